"""The command ``cldsde train``."""

import json
import tomllib

from cldsde.cli import main

RUN = {"config.json", "metrics.jsonl", "model.safetensors", "samples", "training.safetensors"}


def test_a_run_is_whole_and_the_same_command_changes_nothing(digits_run):
    assert {file.name for file in digits_run.iterdir()} >= RUN
    assert json.loads((digits_run / "config.json").read_text())["training"]["images"] == 32
    before = {file: file.stat().st_mtime_ns for file in digits_run.rglob("*")}
    config = str(digits_run.with_name("tiny.toml"))
    command = ["train", config, "--out", str(digits_run), "--resume", "--device", "cpu"]
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in digits_run.rglob("*")} == before


def test_the_printed_configuration_is_complete_and_can_be_used(digits_run, capsys, tmp_path):
    config = str(digits_run.with_name("tiny.toml"))
    assert main(["train", config, "--print-config", "--set", "training.batch=32"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["training"]["batch"] == 32
    assert tomllib.loads(text)["training"]["ema_decay"] == 0.9999
    (tmp_path / "again.toml").write_text(text)
    assert main(["train", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
