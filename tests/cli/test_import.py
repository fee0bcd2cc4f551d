"""The command ``cldsde import``: published checkpoints become runs."""

import json
import os
import re

import numpy as np
import pytest
import torch

from cldsde import pretrained
from cldsde.cli import main
from cldsde.images.model import load_model
from command import rejected
from published_data import CLD_SGM, MODELS, SCORE_SDE, checkpoint, save_checkpoint

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """The published settings in small, under names of their own."""
    small = {"cld-sgm": CLD_SGM, "score-sde": SCORE_SDE}
    monkeypatch.setattr("cldsde.pretrained.published.PUBLISHED", small)


FEW = ("cld_fourier", "ve_fourier")  # one of each code


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in FEW)) for x in MODELS]
)
def test_an_imported_run_has_the_score_of_the_checkpoint(name, tmp_path, capsys):
    family = "cld-sgm" if name in CLD_SGM else "score-sde"
    file, run = save_checkpoint(name, tmp_path), tmp_path / "run"
    command = ["import", str(file), "--as", family, "--config", name, "--out", str(run)]
    assert main(command) == 0
    assert "parameters, images of 1×8×8" in capsys.readouterr().out
    found = load_model(run)
    load = pretrained.load_cld_sgm if family == "cld-sgm" else pretrained.load_score_sde
    score = load(file, name)
    z = torch.randn(2, score.sde.components, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.8])
    assert torch.equal(found.score(z, t), score(z, t))
    assert found.images_seen == 5 * MODELS[name].batch


def test_an_imported_run_is_recognised_configured_and_sampled(tmp_path):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    more = ["--set", "sampling.nfe=7", "--set", "data.options.path=elsewhere"]
    assert main(["import", str(file), "--as", "cld-sgm", *more, "--out", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["sampling"]["nfe"] == 7
    assert config["data"]["options"]["path"] == os.path.abspath("elsewhere")
    out = tmp_path / "x.npz"
    command = ["sample", str(run), "--solver", "em", "--process", "VPSDE", "--seeds", "0-1"]
    assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
    assert np.load(out)["images"].shape == (2, 8, 8, 1)


def test_a_folder_and_a_checkpoint_with_a_missing_weight_are_rejected(tmp_path, capsys):
    options = ["--as", "cld-sgm", "--out", tmp_path / "run"]
    text = rejected(capsys, "import", tmp_path, *options)
    assert f"PATH: {tmp_path} is a folder; name the file in it" in text
    contents = checkpoint("cld_fourier")
    del contents["model"]["module.all_modules.4.Conv_0.bias"]
    torch.save(contents, tmp_path / "short.pth")
    text = rejected(capsys, "import", tmp_path / "short.pth", *options)
    assert re.search(r"PATH: .* 1 of \d+ weights are missing: all_modules\.4\.Conv_0\.bias$", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_run_is_overwritten_only_on_request(tmp_path, capsys):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    options = ["--as", "cld-sgm", "--out", str(run)]
    assert main(["import", str(file), *options]) == 0
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    contents = checkpoint("cld_fourier")
    contents["ema"]["shadow_params"][0] += 1
    torch.save(contents, tmp_path / "later.pth")
    for other in ([tmp_path / "later.pth"], [file, "--set", "sampling.nfe=7"]):
        text = rejected(capsys, "import", *other, *options)
        assert "holds a run; choose another folder, or set --overwrite" in text
        assert {entry.name: entry.read_bytes() for entry in run.iterdir()} == before
    assert main(["import", str(tmp_path / "later.pth"), *options, "--overwrite"]) == 0
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]
