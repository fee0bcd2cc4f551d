"""Fréchet distances of solvers on trained velocity-score networks: the docs' table on digits.

``python benchmarks/digits_solvers.py RUNS docs/data/digits-solvers.json`` trains the network of the
demonstration for each seed in a folder of RUNS, or loads a trained one. It samples the networks
with each recipe. It can be interrupted and keeps finished cells.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cldsde import ReverseProcess, solvers
from cldsde.images import Run
from cldsde.images.compare import PRESETS, load_comparison
from cldsde.images.data import digits
from cldsde.images.evaluate import FeatureStatistics, frechet_of
from cldsde.progress import progress_bar
from digit_classifier import pixels_of, train_classifier

BUDGETS = (7, 10, 20, 50, 100)


def multistep(**options: Any) -> solvers.ExponentialMultistep:
    return solvers.ExponentialMultistep(**options)


def early(t: torch.Tensor) -> torch.Tensor:
    """Stochasticity 1 for t > 0.1, and 0 below."""
    return (t > 0.1).to(t)


# Solver, grid, end and start by name.
RECIPES: dict[str, tuple[solvers.Solver, str, float, float]] = {
    "Euler–Maruyama": (solvers.EulerMaruyama(), "root", 2e-2, 1.0),
    "SSCS": (solvers.SSCS(), "root", 2e-2, 1.0),
    "SSCS, midpoint": (solvers.SSCS(score_step="midpoint"), "root", 2e-2, 1.0),
    "SSCS, gaussian": (solvers.SSCS(score_step="gaussian", data_variance=0.5), "root", 2e-2, 1.0),
    "OBA": (solvers.Splitting(scheme="OBA"), "root", 2e-2, 1.0),
    "OBAB, one score at the end": (
        solvers.Splitting(scheme="OBAB", shared_score=True, score_time="end"),
        "root",
        2e-2,
        1.0,
    ),
    "multistep 1, λ = 1": (multistep(order=1, stochasticity=1.0), "root", 2e-2, 1.0),
    "multistep 2, λ = 1": (multistep(order=2, stochasticity=1.0), "root", 2e-2, 1.0),
    "multistep 3, λ = 1": (multistep(order=3, stochasticity=1.0), "root", 2e-2, 1.0),
    "multistep 2, λ = 1 for t > 0.1": (multistep(order=2, stochasticity=early), "root", 2e-2, 1.0),
    "multistep 2, λ = 1, ε = 1e-3": (multistep(order=2, stochasticity=1.0), "root", 1e-3, 1.0),
    "multistep 2, λ = 1, ε = 5e-2": (multistep(order=2, stochasticity=1.0), "root", 5e-2, 1.0),
    "multistep 2, λ = 1, T = 0.8": (multistep(order=2, stochasticity=1.0), "root", 2e-2, 0.8),
    "multistep 2, λ = 1, logistic grid": (
        multistep(order=2, stochasticity=1.0),
        "logistic",
        2e-2,
        1.0,
    ),
    "multistep 1, λ = 0": (multistep(order=1), "root", 2e-2, 1.0),
    "multistep 2, λ = 0": (multistep(order=2), "root", 2e-2, 1.0),
    "multistep 2, λ = 0, ε = 1e-3": (multistep(order=2), "root", 1e-3, 1.0),
    "multistep 2, λ = 0, logistic grid": (multistep(order=2), "logistic", 2e-2, 1.0),
    "multistep 2, λ = 0, log-SNR grid": (multistep(order=2), "kappa", 2e-2, 1.0),
    "multistep 2, λ = 0, Karras grid": (multistep(order=2), "karras", 2e-2, 1.0),
    "multistep 2, λ = 0, in log-SNR": (multistep(order=2, variable="kappa"), "root", 2e-2, 1.0),
    "multistep 3, corrector, λ = 0": (multistep(order=3, corrector=True), "root", 2e-2, 1.0),
    "multistep 3, corrector, λ = 0, logistic grid": (
        multistep(order=3, corrector=True),
        "logistic",
        2e-2,
        1.0,
    ),
    "multistep 2, noise prediction": (multistep(order=2, prediction="noise"), "root", 2e-2, 1.0),
}


def grid(name: str, sde: Any, T: float, eps: float, n: int) -> torch.Tensor:
    made: torch.Tensor = getattr(solvers, f"{name}_times")(T, eps, n, sde=sde)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", type=int, nargs="+", default=[0, 1], help="training seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="sampling seeds")
    arguments = parser.parse_args()
    data = digits()
    features = train_classifier(data, seed=0)[0].features
    both = torch.cat([pixels_of(data.train), pixels_of(data.held_out)])
    real = FeatureStatistics.of(both, features)
    results: dict[str, dict[str, dict[str, float]]] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    for model_seed in arguments.models:
        config = load_comparison(PRESETS["demo"], [f"seed={model_seed}"])
        folder = arguments.runs / str(model_seed) / "model"
        model = Run.train(config.runs["CLD"], data, folder, device="cpu").score
        process, sde = ReverseProcess(model.sde, model), model.sde
        for name, (solver, grid_name, eps, T) in progress_bar(list(RECIPES.items()), shown=True):
            row = results.setdefault(name, {})
            for nfe in BUDGETS:
                steps = (nfe - 1) // solver.facts.nfe_per_step
                for seed in arguments.seeds:
                    cell = row.setdefault(str(nfe), {})
                    if f"{model_seed}/{seed}" in cell:
                        continue
                    generator = torch.Generator().manual_seed(seed)
                    start = sde.prior.sample((config.samples, 1, 8, 8), generator=generator)
                    times = grid(grid_name, sde, T, eps, steps)
                    found = solvers.solve(
                        process, solver, start, times, generator=generator, denoise=True
                    )
                    distance = float("inf")
                    if found.success:
                        own = FeatureStatistics.of(found.data.clamp(-1, 1), features)
                        distance = frechet_of(own, real)
                    cell[f"{model_seed}/{seed}"] = round(distance, 4)
            arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
