"""Fréchet distances of trained networks sampled with other processes: the docs' table.

``python benchmarks/dynamics_when_sampling.py RESULTS NAME=RUN ...`` samples the network of each run
folder of Fashion-MNIST (`configs/fashion_mnist_cpu.toml`) with every process. All cells share the
solver, the grid and the noise levels at which sampling starts and ends. RESULTS is written after
every cell and resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, DenoiserScore, sample
from cldsde.images.data import to_levels
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.model import ImageModel, load_model
from cldsde.progress import progress_bar
from cldsde.solvers import ExponentialMultistep

DYNAMICS = {"VP": VPSDE, "CLD": CLD, "PSLD": PSLD, "HOLD": HOLD}
BUDGETS = (5, 7, 10, 20, 50)
SEEDS = (0, 1, 2)
SAMPLES = 500
# One solver for all cells: the choice of `sample` depends on the process and the evaluations.
SOLVER = ExponentialMultistep(order=2, stochasticity=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"samples": SAMPLES, "weights": {}, "fd": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    models = {}
    for run in arguments.runs:
        name, _, folder = run.partition("=")
        models[name] = load_model(Path(folder))
        if results["weights"].setdefault(name, models[name].digest) != models[name].digest:
            sys.exit(f"{arguments.results} holds results of other weights of {name}")
    cells = [
        (nfe, seed, network, dynamics)
        for nfe in BUDGETS
        for seed in SEEDS
        for network in models
        for dynamics in DYNAMICS
        if str(seed) not in row_of(results, network, dynamics, nfe)
    ]
    evaluation = Evaluation(
        data=next(iter(models.values())).config.data.load(),
        samples=SAMPLES,
        folder=arguments.results.parent,
    )
    for nfe, seed, network, dynamics in progress_bar(cells, shown=True, desc="cells"):
        images = generate(models[network], dynamics, nfe, seed)
        [measured] = evaluation.measure(images, ("fd",)).values()
        row = row_of(results, network, dynamics, nfe)
        row[str(seed)] = round(measured["frechet_distance"], 4)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


def row_of(results: dict[str, Any], network: str, dynamics: str, nfe: int) -> dict[str, float]:
    row = results["fd"].setdefault(f"{network}, {dynamics}", {})
    found: dict[str, float] = row.setdefault(str(nfe), {})
    return found


def generate(model: ImageModel, dynamics: str, nfe: int, seed: int) -> torch.Tensor:
    sde = DYNAMICS[dynamics]()
    score = DenoiserScore(model.score.denoiser, sde)
    shape = (SAMPLES, *model.space.shape)
    data = sample(sde, score, shape, nfe=nfe, seed=seed, solver=SOLVER, batch=250)
    return to_levels(data, model.space.levels, dequantised=model.space.dequantised)


if __name__ == "__main__":
    main()
