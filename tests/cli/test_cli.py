"""The command line: help, refusals in one line, and the demonstration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import cldsde
from cldsde.cli import main
from command import refused

RUN = [
    "config.json",
    "distances.png",
    "model",
    "results.json",
    "samples.npz",
    "samples.png",
    "table.md",
    "trajectories.png",
]


def test_help_of_the_program_and_of_the_command_names_what_there_is(capsys):
    for arguments, words in ((["--help"], ["demo"]), (["demo", "--help"], ["--quick", "--seed"])):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["dmo"], "dmo"),
        (["train"], "cldsde COMMAND --help"),
        (["demo", "--qick"], "qick"),
        (["demo", "--seed", "one"], "seed"),
        (["demo", "--seed", "-1"], "seed"),
        (["demo", "--seed", "99999999999999999999999"], "--seed"),
        (["demo", "--device", "gpu"], "--device must be auto or cpu"),
        (["demo", "--device", "meta"], "--device must be auto or cpu"),
        (["demo", "--device", "cuda:99"], "--device must be auto or cpu"),
        (["demo", "--out", ""], "--out"),
    ],
)
def test_words_that_are_not_understood_are_refused(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_lack_of_memory_is_one_line(capsys, monkeypatch, tmp_path):
    def hungry(options):
        del options
        return lambda: torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("cldsde.cli.demo.prepare", hungry)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cldsde demo: error: out of memory")
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(capsys, tmp_path):
    message = refused(capsys, "demo", "--device", "cuda", "--out", str(tmp_path / "run"))
    assert "--device" in message
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("text")
    assert "file" in refused(capsys, "demo", "--out", str(tmp_path / "file" / "run"))
    assert "file" in refused(capsys, "demo", "--out", str(tmp_path / "file"))
    # /proc takes no new folders, not even from root.
    if sys.platform == "linux":
        assert "/proc/run" in refused(capsys, "demo", "--out", "/proc/run")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == ["cldsde", cldsde.__version__]


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-I", "-m", "cldsde", "demo", "--seed", "x"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick demonstration, through a process of its own."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-I", "-m", "cldsde", "demo", "--quick", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--out", str(folder)], capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_quick_demonstration_writes_a_whole_run_folder(quick):
    folder, _ = quick
    assert sorted(file.name for file in folder.iterdir()) == RUN
    assert json.loads((folder / "config.json").read_text())["seed"] == 0


def test_the_quick_demonstration_prints_its_table_and_shows_progress(quick):
    folder, result = quick
    assert (folder / "table.md").read_text() in result.stdout
    assert "loss=" in result.stderr


def test_the_quick_demonstration_draws_digits(quick):
    """Already the short training leaves a Gaussian fitted to the pixels far behind."""
    folder, _ = quick
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy"] >= 0.97
    # About 0.3 of it. The mean of three sets of 300 images scatters by a tenth of itself.
    assert sum(results["distances"]["multistep"]["50"]) / 3 <= results["baseline"] / 2
    assert min(results["class_shares"]) > 0


def test_the_held_out_loss_falls(quick):
    folder, _ = quick
    lines = (folder / "model" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["held_out_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)


def test_the_same_command_goes_on_from_the_checkpoint_to_the_same_images(quick, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(quick[0], folder)
    images = np.load(folder / "samples.npz")["images"]
    (folder / "samples.npz").unlink()
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(folder)]) == 0
    assert np.array_equal(np.load(folder / "samples.npz")["images"], images)
    assert (folder / "table.md").read_text() == (quick[0] / "table.md").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [("model/model.safetensors", b"short"), ("results.json", b"[1]"), ("results.json", b"{")],
)
def test_a_damaged_file_of_a_finished_run_is_named(quick, capsys, tmp_path, name, content):
    folder = tmp_path / "run"
    shutil.copytree(quick[0], folder)
    (folder / name).write_bytes(content)
    if name != "results.json":
        (folder / "results.json").unlink()  # so that the run goes on
    code = main(["demo", "--quick", "--device", "cpu", "--out", str(folder)])
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{name} is damaged" in error
    assert "delete it" in error


def test_a_run_that_is_finished_is_reported_again_at_once(quick, capsys):
    folder, result = quick
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(folder)]) == 0
    assert capsys.readouterr().out == result.stdout
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_folder_of_another_seed_is_refused(quick, capsys):
    folder, _ = quick
    message = refused(capsys, "demo", "--quick", "--seed", "1", "--out", str(folder))
    assert "other settings (seed)" in message
