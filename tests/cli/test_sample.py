"""The command ``cldsde sample``."""

import json

import numpy as np
import pytest
from PIL import Image

from command import command, rejected


def sample(run, out, *arguments):
    words = ("--seeds", "3-7", "--device", "cpu", "--out", out)
    return command("sample", run, *words, *arguments)


def test_samples_go_into_a_file_a_picture_or_a_folder_with_their_recipe(
    digits_run, tmp_path, capsys
):
    for name in ("a.npz", "a.png", "a"):
        assert sample(digits_run, tmp_path / name) == 0
        assert "5 seeds" in capsys.readouterr().out
    found = np.load(tmp_path / "a.npz")
    assert found["images"].shape == (5, 8, 8, 1)
    assert found["images"].max() <= 16  # digits have 17 levels
    assert {file.name for file in (tmp_path / "a").iterdir()} == {f"{i}.png" for i in range(3, 8)}
    recipe = json.loads(str(found["recipe"]))
    for file in (tmp_path / "a.png", tmp_path / "a" / "5.png"):
        with Image.open(file) as picture:
            assert json.loads(picture.text["recipe"]) == recipe
    assert recipe["seeds"] == [3, 8]
    assert recipe["sampling"]["solver"] == "sscs"
    assert len(recipe["weights"]) == 64


def test_files_are_overwritten_only_on_request(digits_run, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert sample(digits_run, out) == 0
    assert "--out: " in rejected(capsys, "sample", digits_run, "--seeds", "0-2", "--out", out)
    assert sample(digits_run, out, "--overwrite", "--precision", "bf16", "--channels-last") == 0
    with Image.open(out) as picture:
        assert json.loads(picture.text["recipe"])["precision"] == "bf16"


def test_a_time_below_those_of_training_is_noted(digits_run, tmp_path, capsys):
    assert sample(digits_run, tmp_path / "x.png", "--t-end", "1e-5") == 0
    assert "note: t_end = 1e-05 is below training.t_min = 0.001" in capsys.readouterr().err


def test_a_class_is_sampled_by_its_name(labelled_run, tmp_path):
    assert sample(labelled_run, tmp_path / "x.npz", "--class", "stripe") == 0
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [1] * 5


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_code_that_a_run_names_is_not_run(run, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "planted.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["sampling"]["solver"] = "planted:Solver"
    (run / "config.json").write_text(json.dumps(config))
    assert "planted:Solver is code outside of cldsde" in rejected(capsys, command, run)
