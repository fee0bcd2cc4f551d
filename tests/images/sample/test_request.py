"""Requests say what they are of, and what was probably not meant."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from cldsde.cli import main
from cldsde.images.errors import SettingError
from cldsde.images.model import ImageSpace
from command import refused

CONFIG = """
[data]
options = { held_out = 0 }
[network]
conditional = true
options = { channels = [16, 16] }
[training]
images = 32
batch = 16
sample_every = 32
sample_grid = 2
[sampling]
solver = "sscs"
nfe = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.toml").write_text(CONFIG)
    out = folder / "run"
    assert main(["train", str(folder / "tiny.toml"), "--out", str(out), "--device", "cpu"]) == 0
    return out


def sample(run, out, *arguments):
    return ["sample", str(run), "--seeds", "0-2", "--device", "cpu", "--out", str(out), *arguments]


def test_samples_carry_their_recipe_and_the_hash_of_the_weights(run, tmp_path):
    for name in ("x.npz", "x.png", "x"):
        assert main(sample(run, tmp_path / name)) == 0
    npz = json.loads(str(np.load(tmp_path / "x.npz")["recipe"]))
    for file in (tmp_path / "x.png", tmp_path / "x" / "1.png"):
        with Image.open(file) as picture:
            assert json.loads(picture.text["recipe"]) == npz
    assert npz["seeds"] == [0, 3]
    assert npz["sampling"]["solver"] == "sscs"
    assert len(npz["weights"]) == 64


def test_files_are_overwritten_only_if_that_is_asked_for(run, tmp_path, capsys):
    arguments = sample(run, tmp_path / "x.png")
    assert main(arguments) == 0
    capsys.readouterr()
    assert "--out: " in refused(capsys, *arguments)
    assert main([*arguments, "--overwrite"]) == 0


def test_a_time_below_those_of_training_is_remarked_on(run, tmp_path, capsys):
    assert main(sample(run, tmp_path / "x.png", "--t-end", "1e-5")) == 0
    assert "note: t_end = 1e-05 is below training.t_min = 0.001" in capsys.readouterr().err


def test_a_mask_that_keeps_nothing_is_refused(run, tmp_path, capsys):
    for name, value in (("known", 100), ("mask", 0)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"{name}.png")
    known = ["--known", str(tmp_path / "known.png"), "--mask", str(tmp_path / "mask.png")]
    message = refused(capsys, *sample(run, tmp_path / "x.png", *known))
    assert "--observe: " in message
    assert "is all black" in message


def test_classes_are_named():
    space = ImageSpace((1, 8, 8), classes=3, class_names=("dot", "stripe", "7"))
    assert [space.label(x) for x in ("stripe", "1", 2, "7")] == [1, 1, 2, 2]
    with pytest.raises(SettingError, match="label: must be 'all', a number from 0 to 2, or one of"):
        space.label("strip")


def test_a_class_is_sampled_by_its_name(run, tmp_path, capsys):
    assert main(sample(run, tmp_path / "x.npz", "--class", "7")) == 0
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [7, 7, 7]
    capsys.readouterr()
    assert "--class: must be 'all'" in refused(
        capsys, *sample(run, tmp_path / "y.npz", "--class", "ten")
    )


def test_a_dry_run_checks_measures_and_writes_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(run.parent / "tiny.toml")
    assert main(["train", config, "--dry-run", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "images per second" in text
    assert "parameters" in text
    assert not list(tmp_path.iterdir())
    refusal = refused(capsys, "train", config, "--dry-run", "--set", "sampling.solver=sscz")
    assert "sampling.solver" in refusal
