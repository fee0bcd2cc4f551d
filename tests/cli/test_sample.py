"""The command ``cldsde sample``."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cldsde.cli import main
from cldsde.files import file_lock
from command import rejected


def sample(run, out, *arguments):
    words = ["sample", run, "--seeds", "3-7", "--device", "cpu", "--out", out, *arguments]
    return main(list(map(str, words)))


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


def test_a_class_is_sampled_by_its_name(labelled_run, tmp_path, capsys):
    assert sample(labelled_run, tmp_path / "x.npz", "--class", "stripe") == 0
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [1] * 5
    out = tmp_path / "y.npz"
    text = rejected(capsys, "sample", labelled_run, "--class", "ten", "--out", out)
    assert "--class: must be 'all', a number from 0 to 2, or one of" in text


def test_a_run_samples_under_another_process(digits_run, tmp_path):
    for name, process in (("x", []), ("y", ["--process", "HOLD"])):
        assert sample(digits_run, tmp_path / f"{name}.npz", *process) == 0
    own, found = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("x", "y"))
    assert found.shape == own.shape
    assert not np.array_equal(found, own)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--solver sscz", "'sscz'; did you mean sscs?"),
        ("--nfe 1", "--nfe: must be"),
        (
            "--solver probability-flow --nfe 10",
            "--nfe: probability-flow is adaptive; set its options rtol and atol",
        ),
        ("--seeds 5-3", "--seeds: must be A-B"),
        ("--seeds x", "--seeds: must be A-B"),
        ("--seed 3-9", "--seed: must be an integer from 0 to 2^32 - 1; got '3-9'"),
        ("--seeds 0-3 --seed 5", "--seed: --seeds is an alternative; got both"),
        ("--grid cubic", "--grid: must be 'uniform'"),
        ("--t-end 0", "--t-end: must be"),
        ("--set rtol", "--set: takes"),
        ("--set order=3", "options.order: unknown key"),
        ("--class 1", "--class: the network was not trained with classes"),
        ("--known x.png", "--known: needs observe"),
        ("--precision fp8", "--precision: must be one of fp32, bf16, fp16; got 'fp8'"),
        ("--denoise maybe", "--denoise: must be true or false; got 'maybe'"),
        ("--t-start x", "--t-start: must be a number; got 'x'"),
        ("--known black.png --mask black.png", "--observe: "),
        ("--out x.gif", "--out: must be"),
        ("--out .", "--out: must name a file, or a folder"),
        ("--process-set beta=3", "--process-set: needs --process"),
        ("--process-set beta", "--process-set: takes key=value, such as beta=8.0; got 'beta'"),
        ("--compile fast", "--compile: must be default or reduce-overhead or max-autotune; got"),
    ],
)
def test_wrong_arguments_are_rejected(digits_run, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    assert words in rejected(capsys, "sample", digits_run, *arguments.split())
    assert [file.name for file in tmp_path.iterdir()] == ["black.png"]


def test_folders_that_are_no_runs_are_rejected(capsys, tmp_path):
    assert "is no folder" in rejected(capsys, "sample", tmp_path / "mistyped")
    assert "holds no config.json" in rejected(capsys, "sample", tmp_path)


def test_an_output_that_another_command_writes_is_left_alone(digits_run, tmp_path, capsys):
    out = tmp_path / "x.npz"
    with file_lock(tmp_path / "x.npz", wait=False):
        message = rejected(capsys, "sample", digits_run, "--out", out)
    assert "x.npz is being written by another process; wait, or name another" in message


def test_a_solver_is_found_in_the_current_folder(digits_run, tmp_path, monkeypatch):
    own = "from cldsde import solvers\n\n\nclass Own(solvers.EulerMaruyama):\n    pass\n"
    (tmp_path / "standing_here.py").write_text(own)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in {"", "."}])
    monkeypatch.chdir(tmp_path)
    assert sample(digits_run, "own.npz", "--solver", "standing_here:Own", "--nfe", 3) == 0


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_code_that_a_run_names_is_not_run(digits_run, tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "run"
    shutil.copytree(digits_run, folder)
    (tmp_path / "planted.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["sampling"]["solver"] = "planted:Solver"
    (folder / "config.json").write_text(json.dumps(config))
    assert "planted:Solver, is code outside of cldsde" in rejected(capsys, command, folder)
