"""Fréchet distances of flow matching and VP on digits, and of stochasticity chosen after training.

Train the runs first, as docs/how-to/flow-matching.md says; then

    python benchmarks/digits_flow.py RUNS docs/data/digits-flow.json

with RUNS the folder that holds flow-0, importance-0, vp-0, flow-1, …
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cldsde.images.evaluate.results import read_results

SAMPLES, BUDGETS = 1000, (10, 20)
SCAN = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
LEVELS = {"flow": SCAN, "importance": SCAN, "vp": (0.0, 1.0, 1.5)}
# κ = ½ log SNR is 3.2 at the ends of flow matching, and 3.1 at the end of VP.
ENDS = {"flow": 0.04, "importance": 0.04, "vp": 0.01}


def distances(run: Path, level: float, end: float) -> dict[str, float]:
    """Distances of one run at each budget, by ``cldsde evaluate``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.jsonl"
        command = [
            *(sys.executable, "-m", "cldsde", "evaluate", str(run)),
            *("--solver", "multistep-2", "--set", f"stochasticity={level}"),
            *("--nfe", ",".join(map(str, BUDGETS)), "--t-end", str(end)),
            *("--samples", str(SAMPLES), "--device", "cpu", "--out", str(out)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = read_results(out).values()
    return {str(one.recipe["nfe"]): round(one.numbers["fd"], 4) for one in results}


def main(runs: Path, out: Path) -> None:
    """Measure all runs."""
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run in sorted(runs.glob("*-[0-9]")):
        model, seed = run.name.split("-")
        for level in LEVELS[model]:
            rows = distances(run, level, ENDS[model])
            for nfe, value in rows.items():
                table.setdefault(model, {}).setdefault(str(level), {}).setdefault(nfe, {})[seed] = (
                    value
                )
            print(run.name, level, rows, flush=True)
            out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
