"""The command ``cldsde train``."""

import json
import re
import tomllib

import pytest

from cldsde.cli import main

RUN = {"config.json", "metrics.jsonl", "model.safetensors", "samples"}
RUN |= {"training.safetensors"}


@pytest.fixture
def config(digits_run):
    return digits_run.with_name("tiny.toml")


def test_a_run_is_whole_and_the_same_command_changes_nothing(config, digits_run):
    assert {file.name for file in digits_run.iterdir()} >= RUN
    assert json.loads((digits_run / "config.json").read_text())["training"]["images"] == 32
    before = {file: file.stat().st_mtime_ns for file in digits_run.rglob("*")}
    command = ["train", str(config), "--out", str(digits_run), "--resume", "--device", "cpu"]
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in digits_run.rglob("*")} == before


def test_the_printed_configuration_is_complete_and_can_be_used(config, capsys, tmp_path):
    assert main(["train", str(config), "--print-config", "--set", "training.batch=32"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["training"]["batch"] == 32
    assert tomllib.loads(text)["training"]["ema_decay"] == 0.9999
    (tmp_path / "again.toml").write_text(text)
    assert main(["train", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_a_dry_run_checks_measures_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "--dry-run", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text
    measured = re.search(r"loading: ([\d,]+) images per second", text)
    assert int(measured[1].replace(",", "")) > 0
    assert not list(tmp_path.iterdir())
