"""Bias of Gotta Go Fast after rejections: the docs' table.

``python benchmarks/gotta_go_fast_bias.py docs/data/gotta-go-fast-bias.json`` samples two narrow
modes at ±1 under VP and writes E|x| in units of its value.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from cldsde import VPSDE, GaussianMixture, ReverseProcess, solvers


def measure(mode: str, rtol: float, atol: float, n: int) -> dict[str, float | str | int]:
    sde, variance, eps = VPSDE(), 0.05**2, 1e-3
    data = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[variance]], [[variance]]])
    process = ReverseProcess(sde, data.score(sde))
    g = torch.Generator().manual_seed(0)
    solver = solvers.GottaGoFast(rtol=rtol, atol=atol, noise_on_reject=mode)
    values, evaluations, chunk = [], [], 20_000
    for _ in range(n // chunk):
        start = sde.prior.sample((chunk, 1), generator=g)
        ends = torch.tensor([sde.T, eps], dtype=torch.float64)
        found = solvers.solve(process, solver, start, ends, generator=g)
        values.append(found.data[:, 0].double().abs() / float(sde.marginal(eps).mean))
        evaluations.append(found.stats["nfev"].double())
    x = torch.cat(values)
    return {
        "noise_on_reject": mode,
        "rtol": rtol,
        "atol": atol,
        "samples": n,
        "ratio": round(float(x.mean()), 6),
        "standard_error": round(float(x.std()) / math.sqrt(n), 6),
        "nfev": round(float(torch.cat(evaluations).mean()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    rows = [
        measure(mode, rtol, atol, 200_000)
        for rtol, atol in ((0.05, 0.01), (0.01, 0.002))
        for mode in ("bridge", "fresh")
    ]
    arguments.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
