"""The demonstration ``cldsde demo``."""

import json
import subprocess
import sys

import pytest

from cldsde.cli import demo, main
from command import rejected

TINY = (
    *("samples=8", "repeats=1", "batch=8", "base.network.options.channels=[16]"),
    *("base.training.images=32", "base.training.batch=16", "base.training.held_out=8"),
    "models.CLD.process.name=VPSDE",  # whose plans take the least time
    "rows=[{model='CLD',label='EM',solver='euler-maruyama',nfe=[3,5]}]",
)


def distances(folder) -> dict[str, dict[int, list[float]]]:
    """Fréchet distances of the sets of images by solver and score evaluations."""
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    return {
        row["label"]: {cell["budget"]: cell["measures"]["fd"] for cell in row["cells"]}
        for row in rows
    }


@pytest.mark.usefixtures("untrained_classifier", "undrawn_figures")
def test_a_demonstration_prints_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_QUICK", TINY)
    command = ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert set(distances(tmp_path / "run")["EM"]) == {3, 5}
    text = capsys.readouterr().out
    assert (tmp_path / "run" / "table.md").read_text() in text
    assert (tmp_path / "run" / "models" / "CLD" / "model.safetensors").exists()
    assert "other settings (seed)" in rejected(capsys, *command, "--seed", 1)


@pytest.mark.slow
def test_the_quick_demonstration_generates_digits(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-I", "-m", "cldsde", "demo", "--quick", "--device", "cpu", "--out"]
    result = subprocess.run([*command, folder], capture_output=True, text=True, check=True)
    assert (folder / "table.md").read_text() in result.stdout
    assert "loss=" in result.stderr
    found = distances(folder)
    # Three sets of 300 images scatter by a tenth of their mean.
    assert sum(found["multistep"][10]) < 1.2 * min(sum(found[x][20]) for x in ("EM", "SSCS"))
    lines = (folder / "models" / "CLD" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["held_out_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)
