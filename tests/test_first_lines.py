"""The programs on the first page of the documentation, and in the README."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cldsde.pretrained import sample_k_diffusion
from tiny_pipelines import make

FOLDER = Path(__file__).parents[1] / "docs" / "first-lines"


@pytest.mark.parametrize("name", ["k_diffusion", "python"])
def test_a_program_prints_what_it_says(name, capsys):
    promised = re.findall(r"^# prints (.*)$", (FOLDER / f"{name}.py").read_text(), re.MULTILINE)
    assert promised
    runpy.run_path(str(FOLDER / f"{name}.py"))
    assert capsys.readouterr().out.strip().splitlines() == promised


def test_the_program_of_a_pipeline_writes_its_image(tmp_path, monkeypatch):
    make("SD").save_pretrained(tmp_path / "stable-diffusion")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "pipeline.py"))
    assert Image.open("lighthouse.png").getbbox() is not None


def test_the_node_of_comfyui_makes_a_sampler(monkeypatch):
    comfy = SimpleNamespace(KSAMPLER=lambda function, options: (function, options))
    monkeypatch.setitem(sys.modules, "comfy.samplers", comfy)
    node = runpy.run_path(str(FOLDER / "cldsde_sampler.py"))["NODE_CLASS_MAPPINGS"]["CLDSampler"]
    (processes,) = node.INPUT_TYPES()["required"]["process"]
    for process in processes:
        assert node().make(process) == ((sample_k_diffusion, {"process": process}),)


def test_the_readme_starts_with_the_program_in_python():
    program = (FOLDER / "python.py").read_text().strip()
    assert program in (Path(__file__).parents[1] / "README.md").read_text()
