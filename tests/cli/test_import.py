"""The command ``cldsde import``: published checkpoints become runs."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch

from cldsde import pretrained
from cldsde.cli import main
from cldsde.images import published
from cldsde.images.model import load_model
from cldsde.pretrained.published_models import PUBLISHED
from command import refused
from published_data import MODELS, checkpoint, save_checkpoint

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """The published settings in small, under names of their own."""
    small = {"cld-sgm": {}, "score-sde": {}}
    for name, model in MODELS.items():
        family = "cld-sgm" if model.parameterisation.code == "cld-sgm" else "score-sde"
        small[family][name] = model
    monkeypatch.setattr("cldsde.pretrained.published.PUBLISHED", small)


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, "cld-sgm" if m.sigmas is None else "score-sde") for n, m in MODELS.items()],
)
def test_an_imported_run_has_the_score_of_the_checkpoint(name, family, tmp_path, capsys):
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


def test_an_imported_run_is_recognised_and_sampled_with_every_kind_of_solver(tmp_path):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    assert main(["import", str(file), "--as", "cld-sgm", "--out", str(run)]) == 0
    images = {}
    for solver in ("em", "sscs", "multistep-2-sde", "probability-flow"):
        out = tmp_path / f"{solver}.npz"
        nfe = [] if solver == "probability-flow" else ["--nfe", "6"]
        command = ["sample", str(run), "--solver", solver, *nfe, "--seeds", "0-1"]
        assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
        images[solver] = np.load(out)["images"]
        assert images[solver].shape == (2, 8, 8, 1)
    assert not np.array_equal(images["em"], images["sscs"])


def test_an_imported_run_samples_under_another_process(tmp_path):
    file, run = save_checkpoint("vp", tmp_path), tmp_path / "run"
    command = ["import", str(file), "--as", "score-sde", "--config", "vp", "--out", str(run)]
    assert main(command) == 0
    out = str(tmp_path / "x.npz")
    command = ["sample", str(run), "--process", "CLD", "--nfe", "6", "--seeds", "0-1"]
    assert main([*command, "--out", out, "--device", "cpu"]) == 0
    assert np.load(out)["images"].shape == (2, 8, 8, 1)


def test_settings_of_the_run_can_differ(tmp_path):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    more = ["--set", "sampling.nfe=7", "--set", "data.options.path=elsewhere"]
    assert main(["import", str(file), "--as", "cld-sgm", *more, "--out", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["sampling"]["nfe"] == 7
    assert config["data"]["options"]["path"] == "elsewhere"


def test_a_checkpoint_that_holds_code_is_refused_and_nothing_is_run_or_written(tmp_path, capsys):
    mark, run = tmp_path / "was-run", tmp_path / "run"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    file = tmp_path / "evil.pth"
    torch.save(checkpoint("cld_fourier") | {"step": Code()}, file)
    command = ["import", str(file), "--as", "cld-sgm", "--out", str(run)]
    assert "holds code, which is never run" in refused(capsys, *command)
    assert not mark.exists()
    assert not run.exists()


def test_a_checkpoint_with_a_missing_key_is_refused(tmp_path, capsys):
    contents, run = checkpoint("cld_fourier"), tmp_path / "run"
    del contents["model"]["module.all_modules.4.Conv_0.bias"]
    file = tmp_path / "short.pth"
    torch.save(contents, file)
    text = refused(capsys, "import", str(file), "--as", "cld-sgm", "--out", str(run))
    assert "PATH: " in text
    assert re.search(r"1 of \d+ weights are missing: all_modules\.4\.Conv_0\.bias$", text)
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "edm"], "--as must be cld-sgm or score-sde; got 'edm'"),
        (["--as", "cld-sgm", "--config", "x"], "--config: must be one of cld_fourier"),
        (["--as", "cld-sgm", "--set", "sampling.nfe=0"], "sampling.nfe"),
        *(
            (["--as", "cld-sgm", "--set", f"{key}=1"], f"{key}: is determined by the checkpoint")
            for key in ("score.mixed", "process.name", "data", "data.flip", "samplings.nfe")
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    file = save_checkpoint("cld_fourier", tmp_path)
    text = refused(capsys, "import", str(file), *options, "--out", str(tmp_path / "run"))
    assert message in text


def test_the_folder_of_another_run_is_left_alone(tmp_path, capsys):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    text = refused(capsys, "import", str(file), "--as", "cld-sgm", "--out", str(run))
    assert "holds files that are no run" in text
    assert [entry.name for entry in run.iterdir()] == ["notes.txt"]


def test_a_folder_is_no_checkpoint(tmp_path, capsys):
    text = refused(capsys, "import", tmp_path, "--as", "cld-sgm", "--out", tmp_path / "run")
    assert f"PATH: {tmp_path} is a folder; name the file in it" in text


def test_another_run_is_overwritten_only_if_that_is_asked_for(tmp_path, capsys):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    command = ["import", str(file), "--as", "cld-sgm", "--out", str(run)]
    assert main(command) == 0
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    capsys.readouterr()
    assert main(command) == 0
    assert "has this model already" in capsys.readouterr().out
    contents = checkpoint("cld_fourier")
    contents["ema"]["shadow_params"][0] += 1
    torch.save(contents, tmp_path / "later.pth")
    others = [
        [command[0], str(tmp_path / "later.pth"), *command[2:]],
        [*command, "--set", "sampling.nfe=7"],
    ]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text('{"training": {"images": 5}}')
    assert "another model or settings" in refused(capsys, *command[:-1], tmp_path / "begun")
    for other in others:
        assert "--out: " in (text := refused(capsys, *other))
        assert "holds another model or settings; choose another folder" in text
        assert {entry.name: entry.read_bytes() for entry in run.iterdir()} == before
    assert main([*others[1], "--overwrite"]) == 0
    assert load_model(run).config.sampling.nfe == 7
    assert main([*others[0], "--overwrite"]) == 0
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_the_settings_of_every_published_model_make_a_configuration():
    for models in PUBLISHED.values():
        for model in models.values():
            config = published.RunConfig.from_dict(published._settings(model, 128))
            assert repr(config.process.make()) == repr(model.make_process())


def test_images_of_a_network_in_half_precision_are_nearly_the_same(tmp_path, capsys):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    assert main(["import", str(file), "--as", "cld-sgm", "--out", str(run)]) == 0
    images = {}
    command = ["sample", str(run), "--solver", "em", "--nfe", "5", "--seeds", "0-3"]
    for name in ("fp32", "bf16"):
        out = tmp_path / f"{name}.npz"
        options = ["--precision", name, "--out", str(out), "--device", "cpu"]
        assert main([*command, *options]) == 0
        images[name] = np.load(out)["images"].astype(float)
    difference = abs(images["bf16"] - images["fp32"])
    # Seven bits of the network's output, a few percent of which reaches the image.
    assert 0 < difference.mean() < 2
    capsys.readouterr()
    text = refused(capsys, *command, "--precision", "fp8", "--out", str(tmp_path / "x.npz"))
    assert "must be one of fp32, bf16, fp16; got 'fp8'" in text


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_images_of_a_compiled_network_are_the_same_up_to_rounding(tmp_path, mode):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    assert main(["import", str(file), "--as", "cld-sgm", "--out", str(run)]) == 0
    images = {}
    compiled = ["--compile", mode, "--channels-last"]
    # The last batch of seeds is smaller.
    for name, more in (("plain", []), ("compiled", compiled)):
        out = tmp_path / f"{name}.npz"
        command = ["sample", str(run), "--solver", "em", "--nfe", "5", "--seeds", "0-4", *more]
        assert main([*command, "--batch", "3", "--out", str(out), "--device", "cpu"]) == 0
        images[name] = np.load(out)["images"].astype(int)
    # Rounding of single precision moves a number to the next of 256 levels at most.
    assert abs(images["compiled"] - images["plain"]).max() <= 1


def test_images_with_channels_last_are_the_same_up_to_rounding(tmp_path, capsys):
    file, run = save_checkpoint("cld_fourier", tmp_path), tmp_path / "run"
    assert main(["import", str(file), "--as", "cld-sgm", "--out", str(run)]) == 0
    images = {}
    command = ["sample", str(run), "--solver", "em", "--nfe", "5", "--seeds", "0-3"]
    for name, more in (("plain", []), ("last", ["--channels-last"])):
        out = tmp_path / f"{name}.npz"
        assert main([*command, *more, "--out", str(out), "--device", "cpu"]) == 0
        images[name] = np.load(out)["images"].astype(int)
    assert abs(images["last"] - images["plain"]).max() <= 1
    capsys.readouterr()
    text = refused(capsys, *command, "--compile", "fast", "--out", tmp_path / "x.npz")
    assert "--compile: must be one of default, reduce-overhead, max-autotune; got 'fast'" in text
