"""Programs of the documentation that its build does not run, and of the README."""

import math
import pickle
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cldsde.pretrained import sample_k_diffusion
from tiny_pipelines import make
from tolerances import rounding

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "first-lines"


def test_the_program_of_k_diffusion_prints_what_it_says(capsys):
    program = FOLDER / "k_diffusion.py"
    promised = re.findall(r"^# prints (.*)$", program.read_text(), re.MULTILINE)
    assert promised
    runpy.run_path(str(program))
    assert capsys.readouterr().out.strip().splitlines() == promised


@pytest.mark.parametrize("name", ["pipeline", "text_to_image", "flow_transformer"])
def test_a_program_for_a_pipeline_writes_its_images(name, tmp_path, monkeypatch):
    version, kind = ("-3", "SD3") if name == "flow_transformer" else ("", "SD")
    make(kind).save_pretrained(tmp_path / f"stable-diffusion{version}")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"))
    written = list(tmp_path.glob("*.png"))
    assert len(written) == (2 if name == "text_to_image" else 1)
    assert all(Image.open(file).getbbox() is not None for file in written)


class EDM(torch.nn.Module):
    """A network with the names of EDM's: exact for classes at ±1/2 with a deviation of 0.1."""

    def __init__(self, label_dim):
        super().__init__()
        self.label_dim, self.img_channels, self.img_resolution = label_dim, 3, 4

    def forward(self, x, sigma, class_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        means = torch.tensor([-0.5, 0.5])
        mean = 0.0 if class_labels is None else (class_labels @ means).reshape(-1, 1, 1, 1)
        return (0.01 * x + sigma**2 * mean) / (0.01 + sigma**2)


@pytest.mark.parametrize("classes", [0, 2])
def test_the_program_for_pickles_of_edm_gives_its_classes(classes, tmp_path, monkeypatch):
    (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": EDM(classes)}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = runpy.run_path(str(DOCS / "how-to" / "bring-your-model" / "edm_pickle.py"))
    means = found["samples"].mean((1, 2, 3))
    expected = torch.tensor([-0.5, 0.5] * 8) if classes else torch.zeros(16)
    # Sampling's standard error of a mean of 48 numbers, five times.
    assert (means - expected).abs().max() < 5 * 0.1 / 48**0.5
    assert found["images"].dtype == torch.uint8


def test_the_nodes_of_comfyui_make_a_sampler_and_its_levels(monkeypatch):
    comfy = SimpleNamespace(KSAMPLER=lambda function, options: (function, options))
    monkeypatch.setitem(sys.modules, "comfy.samplers", comfy)
    nodes = runpy.run_path(str(FOLDER / "cldsde_sampler.py"))["NODE_CLASS_MAPPINGS"]
    node, known = nodes["CLDSampler"], SimpleNamespace(sigma_min=0.03, sigma_max=14.6)
    model = SimpleNamespace(get_model_object={"model_sampling": known}.__getitem__)
    (processes,) = node.INPUT_TYPES()["required"]["process"]
    for process in processes:
        assert node().make(process) == ((sample_k_diffusion, {"process": process}),)
        (sigmas,) = nodes["CLDLevels"]().make(model, process, 5)
        differences = sigmas[[0, -2, -1]] - torch.tensor([14.6, math.exp(-1.7), 0])
        assert float(differences.abs().max()) <= rounding(8, 14.6, torch.float32)
    flow = SimpleNamespace(get_model_object=lambda _: type("CONST", (), {})())
    with pytest.raises(ValueError, match="model is a flow-matching model"):
        nodes["CLDLevels"]().make(flow, "CLD", 5)


def test_the_readme_starts_with_the_program_in_python():
    """The tests of the package run it there."""
    program = (FOLDER / "python.py").read_text().strip()
    assert program in (Path(__file__).parents[1] / "README.md").read_text()
