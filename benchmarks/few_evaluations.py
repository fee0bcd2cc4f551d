"""Fréchet distances of `cldsde.sample` with few evaluations: order and noise of the solver.

``python benchmarks/few_evaluations.py RUNS docs/data/few-evaluations.json`` samples the networks
RUNS/vp-0, vp-1, cld-0 and cld-1; docs/how-to/solver-tables.md has the commands that train them. It
can be interrupted and keeps finished cells.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import cldsde
from cldsde import PSLD, VESDE, DenoiserScore, LinearSDE
from cldsde.images.data import digits
from cldsde.images.evaluate import FeatureStatistics, frechet_of
from cldsde.images.model import load_model
from cldsde.solvers import ExponentialMultistep
from digit_classifier import pixels_of, train_classifier

BUDGETS, TRAININGS, SEEDS, SAMPLES = (5, 7, 9), (0, 1), (0, 1, 2), 1000
# The network of each process, and the process if it is not the network's own.
PROCESSES: dict[str, tuple[str, LinearSDE | None]] = {
    "VP": ("vp", None),
    "VE": ("vp", VESDE()),
    "CLD": ("cld", None),
    "PSLD": ("vp", PSLD()),
}
SOLVERS = {
    "order 2, λ = 1": ExponentialMultistep(order=2, stochasticity=1.0),
    "order 3, λ = 1": ExponentialMultistep(order=3, stochasticity=1.0),
    "order 3, λ = 0.5": ExponentialMultistep(order=3, stochasticity=0.5),
    "order 3, corrector, λ = 0": ExponentialMultistep(order=3, corrector=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    data = digits()
    features = train_classifier(data, seed=0)[0].features
    both = torch.cat([pixels_of(data.train), pixels_of(data.held_out)])
    real = FeatureStatistics.of(both, features)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    for name, (network, other) in PROCESSES.items():
        for training in TRAININGS:
            model = load_model(arguments.runs / f"{network}-{training}")
            sde = other or model.score.sde
            score = model.score if other is None else DenoiserScore(model.score.denoiser, other)
            for row, solver in SOLVERS.items():
                for nfe in BUDGETS:
                    of_solver = results.setdefault(name, {}).setdefault(row, {})
                    cells = of_solver.setdefault(str(nfe), {})
                    for seed in SEEDS:
                        if f"{training}/{seed}" in cells:
                            continue
                        shape = (SAMPLES, *model.space.shape)
                        found = cldsde.sample(sde, score, shape, nfe=nfe, seed=seed, solver=solver)
                        own = FeatureStatistics.of(found.clamp(-1, 1), features)
                        distance = frechet_of(own, real)
                        cells[f"{training}/{seed}"] = round(distance, 4)
                text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
                arguments.results.write_text(text)
                print(name, training, row, flush=True)


if __name__ == "__main__":
    main()
