"""The command ``cldsde compare``."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from cldsde.cli import main
from cldsde.images.evaluate.evaluation import Evaluation
from command import rejected
from comparisons import TINY, feature_module, numbers, tiny


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(feature_module(tmp_path / "modules"))
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(tiny()))
    return file


def test_the_printed_configuration_is_complete_and_can_be_used(config, capsys, tmp_path):
    def printed(*arguments):
        assert main(["compare", *map(str, arguments), "--print-config"]) == 0
        return capsys.readouterr().out

    text = printed(config, "--set", "samples=7")
    assert tomllib.loads(text)["samples"] == 7
    (tmp_path / "again.toml").write_text(text)
    assert printed(tmp_path / "again.toml") == text
    named = printed("quick", "--seed", 3)
    assert tomllib.loads(named)["seed"] == 3
    assert printed("--quick", "--seed", 3) == named


def test_a_comparison_is_one_process(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in rejected(capsys, "compare", config)


@pytest.mark.usefixtures("undrawn_figures")
def test_an_interruption_keeps_finished_cells_and_reports_them(
    config, capsys, tmp_path, monkeypatch
):
    measure, left = Evaluation.measure, iter(range(2))

    def interrupted(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    out = tmp_path / "run"
    config.write_text(json.dumps(tiny(models={"CLD": {}}, rows=TINY["rows"][:1])))
    command = ["compare", str(config), "--out", str(out), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", interrupted)
        assert main(command) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "cldsde compare: interrupted; the same command resumes"
    cells = json.loads((out / "comparison.json").read_text())["rows"][0]["cells"]
    assert [cell["repeats"] for cell in cells] == [2, 0]
    assert "Unfinished." in (out / "report.html").read_text()
    assert main(command) == 0
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert "Unfinished." not in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_numbers(config, tmp_path):
    """SIGKILL in training, between the cells of a model, and in the training of the next."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cldsde", "compare", str(config), "--device", "cpu"]
    # Long enough for the polling below to hit.
    command += ["--set", "base.training.images=800", "--set", "metrics=['fd','bpd']", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(folder)], cwd=tmp_path, env=environment)

    assert start(whole).wait(600) == 0
    for milestone in (
        "models/CLD/training.safetensors",
        "evaluations/CLD.jsonl",
        "models/VP/training.safetensors",
    ):
        process, deadline = start(out), time.monotonic() + 300
        while not (out / milestone).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait(60)
    assert start(out).wait(600) == 0
    assert numbers(out / "comparison.json") == numbers(whole / "comparison.json")
    tables = [(folder / "table.md").read_text().split("## Models")[0] for folder in (out, whole)]
    assert tables[0] == tables[1]
    # Its models are runs.
    arguments = ["sample", str(out / "models" / "VP"), "--seeds", "0-3", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "samples.png")]) == 0
