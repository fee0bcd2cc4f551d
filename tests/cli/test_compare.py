"""The command ``cldsde compare``."""

import json
import tomllib

import pytest

from cldsde.cli import main
from command import rejected
from comparisons import TINY, feature_module, tiny


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
    assert printed("--quick", "--seed", 3) == printed("quick", "--set", "seed=3")


def test_a_comparison_is_one_process(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in rejected(capsys, "compare", config)


@pytest.mark.usefixtures("undrawn_figures")
def test_the_table_is_kept_and_printed(config, capsys, tmp_path):
    config.write_text(json.dumps(tiny(models={"CLD": {}}, rows=TINY["rows"][:1])))
    assert main(["compare", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert (tmp_path / "run" / "table.md").read_text() in capsys.readouterr().out
