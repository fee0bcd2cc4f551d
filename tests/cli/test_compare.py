"""The command ``cldsde compare``: refusals in one line, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from cldsde.cli import main
from command import refused
from comparisons import feature_module, numbers, tiny


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(feature_module(tmp_path / "modules"))
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(tiny()))
    return file


def test_the_printed_configuration_is_complete_and_can_be_used(config, capsys, tmp_path):
    assert main(["compare", str(config), "--print-config", "--set", "samples=7"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["samples"] == 7
    (tmp_path / "again.toml").write_text(text)
    assert main(["compare", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert main(["compare", "quick", "--print-config", "--seed", "3"]) == 0
    named = capsys.readouterr().out
    assert main(["compare", "--quick", "--print-config", "--seed", "3"]) == 0
    assert capsys.readouterr().out == named
    assert tomllib.loads(named)["seed"] == 3


def test_what_cannot_be_compared_is_refused_in_one_line(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    (tmp_path / "file").write_text("text")
    cases = [
        (["missing.toml"], "missing.toml: cannot be read"),
        (["cld_variant"], "did you mean cld_variants?"),
        ([config, "--quick"], "--quick is a comparison of its own"),
        ([config, "--set", "sample=3"], "sample: unknown key; did you mean samples?"),
        ([config, "--set", "models.VE.process.name=VEDSE"], "did you mean VESDE?"),
        ([config, "--set", "base.network.options.groups=5"], "groups must divide"),
        ([config, "--seed", "-1"], "seed: must be"),
        ([config, "--set", "rows=[{model='VP', solver='sscs', nfe=[4, 1]}]"], "rows[0].nfe: must"),
        ([config, "--set", "features=nowhere:thing"], "nowhere"),
        ([config, "--set", "metrics=['fid']"], "weights: fid need the file"),
        ([config, "--set", "base.data.name=folder"], "data.options.path: is missing"),
        ([config, "--device", "gpu"], "--device must be"),
        ([config, "--out", "file"], "file is not a folder"),
        ([config, "--out", " "], "--out must be the name of a folder"),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, "compare", *arguments), arguments
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_a_comparison_is_one_process(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(capsys, "compare", config)


def test_an_interruption_keeps_what_is_done_and_reports_it(config, capsys, tmp_path, monkeypatch):
    from cldsde.images.evaluate import evaluation as evaluation_table

    draw = evaluation_table.ImageSampler
    left = 3

    def interrupted(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    out = tmp_path / "run"
    monkeypatch.setattr(evaluation_table, "ImageSampler", interrupted)
    assert main(["compare", str(config), "--out", str(out), "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "cldsde compare: interrupted; the same command resumes"
    )
    cells = json.loads((out / "comparison.json").read_text())["rows"][0]["cells"]
    assert "Unfinished." in (out / "report.html").read_text()
    assert [cell["repeats"] for cell in cells] == [2, 0]
    monkeypatch.setattr(evaluation_table, "ImageSampler", draw)
    assert main(["compare", str(config), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed
    assert "Unfinished." not in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_numbers(config, tmp_path):
    """SIGKILL in training, between the cells of a model, and in the training of the next."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cldsde", "compare", str(config), "--device", "cpu"]
    # Long enough for the polling below to hit.
    command += ["--set", "base.training.images=800", "--set", "metrics=['fd','bpd']", "--out"]

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, out], cwd=tmp_path, env=environment)

    assert start("whole").wait(600) == 0
    out = tmp_path / "killed"
    for milestone in (
        "models/CLD/training.safetensors",
        "evaluations/CLD.json",
        "models/VP/training.safetensors",
    ):
        process = start("killed")
        deadline = time.monotonic() + 300
        while not (out / milestone).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert start("killed").wait(600) == 0
    assert numbers(out / "comparison.json") == numbers(tmp_path / "whole" / "comparison.json")
    assert (out / "table.md").read_text().split("## Models")[0] == (
        tmp_path / "whole" / "table.md"
    ).read_text().split("## Models")[0]
    # Its models are runs.
    arguments = ["sample", str(out / "models" / "VP"), "--seeds", "0-3", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "samples.png")]) == 0
