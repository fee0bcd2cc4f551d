"""The command ``cldsde``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import cldsde
from cldsde.cli import main
from command import rejected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--version", f"cldsde {cldsde.__version__}"),
        ("--help", "demo"),
        ("demo --help", "--quick"),
        ("demo --help", "--seed"),
        ("validate --help", "no problem confirms"),
    ],
)
def test_help_and_version_are_printed(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["dmo"], "dmo"),
        (["train"], "required: CONFIG (see cldsde train --help)"),
        (["demo", "--qick"], "cldsde demo: error: unrecognized arguments: --qick"),
        (["demo", "--seed", "one"], "--seed: must be an integer from 0 to 2^63 - 1; got 'one'"),
        (["demo", "--seed", "-1"], "seed"),
        (["demo", "--seed", "99999999999999999999999"], "--seed"),
        (["demo", "--device", "gpu"], "--device: must be auto or cpu"),
        (["demo", "--device", "meta"], "--device: must be auto or cpu"),
        (["demo", "--device", "cuda:99"], "--device: must be auto or cpu"),
        (["demo", "--out", ""], "--out"),
        (["demo", "--out", "file"], "file"),
        (["demo", "--out", "file/run"], "file"),
    ],
)
def test_wrong_arguments_are_rejected(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    assert words in rejected(capsys, *arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which takes no new folders")
def test_a_folder_that_cannot_be_made_even_by_root_is_rejected(capsys):
    assert "/proc/run" in rejected(capsys, "demo", "--out", "/proc/run")


def test_a_lack_of_memory_is_one_line(capsys, monkeypatch):
    hungry = lambda _: lambda: torch.empty(1 << 60, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr("cldsde.cli.demo.prepare", hungry)
    assert main(["demo"]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("cldsde demo: error: out of memory")


def test_the_module_is_the_command():
    command = [sys.executable, "-I", "-m", "cldsde", "demo", "--seed", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
