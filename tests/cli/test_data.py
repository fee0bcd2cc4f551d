"""Data sets of the command line: continuous numbers, relative paths, photographs."""

import re

import numpy as np
import pytest

from cldsde.cli import main
from cldsde.images.config import load_config
from cldsde.images.evaluate.results import read_results
from command import rejected
from image_data import random_bytes, save
from tiny_runs import DIGITS

DEVICE = ["--device", "cpu"]
OPTIONS = 'path = "data/fields.npy", layout = "NCHW", value_range = [-3, 5]'


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Five channels of numbers with means 0, 1, …, 4, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("fields")
    draws = np.random.default_rng(0).normal(size=(60, 5, 8, 8)).clip(-3, 1)
    (folder / "data").mkdir()
    np.save(folder / "data" / "fields.npy", (draws + np.arange(5)[:, None, None]).astype("f4"))
    data = f'[data]\nname = "array"\noptions = {{ {OPTIONS} }}\ncrop = 0.7\nflip = true\n'
    (folder / "fields.toml").write_text(data + DIGITS.replace("[training]", "[training]\nclip = 1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "fields.toml", "--out", "run", *DEVICE]) == 0
    return folder


def test_numbers_of_five_channels_are_trained_on_sampled_and_evaluated(
    fields, tmp_path, monkeypatch, capsys
):
    """The data's path is relative to the folder of the training, and the tests run in another."""
    monkeypatch.chdir(tmp_path)
    run, out = fields / "run", tmp_path / "x.npz"
    sample = ["sample", str(run), "--seeds", "0-7", *DEVICE]
    assert main([*sample, "--out", str(out)]) == 0
    with np.load(out) as found:
        images, levels = found["images"], found["levels"]
    assert (images.dtype, images.shape) == (np.dtype(np.float32), (8, 8, 8, 5))
    assert levels.tolist() == [-3, 5]
    assert images.min() >= -3
    assert images.max() <= 5
    assert len(np.unique(images)) > 1000  # they are not rounded
    assert main([*sample, "--out", str(tmp_path / "x.png")]) == 0
    message = rejected(capsys, *sample, "--out", tmp_path / "pictures")
    assert "must be FILE.npz or FILE.png for images of 5 channels" in message
    assert main(["evaluate", str(run), "--samples", "8", *DEVICE]) == 0
    assert main(["evaluate", str(out), "--reference", str(run), *DEVICE]) == 0
    assert "fd random train" in capsys.readouterr().out
    for file in (run / "evaluation.jsonl", tmp_path / "x.npz-evaluation.jsonl"):
        [one] = read_results(file).values()
        assert one.against == "random train"
        assert np.isfinite(one.numbers["fd"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate RUN --metrics fid --weights x", "--metrics: fid needs grey levels"),
        ("sample RUN --known x.png --observe blur:1", "--known: needs a model of pictures; this"),
        ("train CONFIG --set data.dequantise=true", "data.dequantise: must be false: continuous"),
        ("train CONFIG --set latent.pretraining=16", "latent: must be absent: the autoencoder"),
        ("train CONFIG --set data.options.value_range=[-3,4]", "range, -3 to 4; got"),
    ],
)
def test_settings_without_a_meaning_for_numbers_are_rejected(
    fields, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(fields)
    words = arguments.replace("RUN", "run").replace("CONFIG", "fields.toml").split()
    assert message in rejected(capsys, *words, "--out", tmp_path / "new.npz")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("CLDSDE_CACHE", str(tmp_path / "cache"))
    for i in range(12):
        save(tmp_path / "photos" / f"{i}.png", random_bytes(20, 30, 3, seed=i))
    data = '[data]\nname = "folder"\noptions = { path = "photos", size = 8 }\n'
    (tmp_path / "photos.toml").write_text(data + DIGITS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_forecasts_decoding_and_each_stage(photos, capsys):
    arguments = ["train", "photos.toml", "--dry-run", *DEVICE]
    for setting in ("latent.pretraining=16", "latent.channels=[8,8]", "latent.groups=4"):
        arguments += ["--set", setting]
    before = sorted(photos.iterdir())
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "data: 11 images of 3×8×8" in out
    assert "decoding, once: 0.0 minutes" in out
    assert "minutes in all" in out
    assert re.search(r"images per second in the two stages", out)
    assert sorted(photos.iterdir()) == before
    load_config(photos / "photos.toml").data.load().train.keep_decoded(progress=False)
    assert main(arguments) == 0
    assert "decoding" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named_before_pictures_are_decoded(photos, capsys):
    message = rejected(capsys, "train", "photos.toml", "--out", "photos", *DEVICE)
    assert "--out: photos holds files that are no run" in message
    assert not (photos / "cache").exists()
