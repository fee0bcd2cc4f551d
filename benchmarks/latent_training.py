"""Bits per dim of latent models during training, and Fréchet distances of their autoencoders.

``python benchmarks/latent_training.py RESULTS FASHION RUN ...`` reads the folder of ``cldsde
compare fashion_mnist --out FASHION``, and runs of latent models on digits, such as
``digits-0/models/LSGM``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from cldsde.images.compare.config import ComparisonConfig
from cldsde.images.compare.report import RESULTS
from cldsde.images.config import RunConfig
from cldsde.images.data import to_levels, to_unit
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.model import load_model
from cldsde.images.runs import CONFIG, METRICS

MODELS = ("LSGM", "CLD-LSGM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("fashion", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    for folder, file in ((arguments.fashion, RESULTS), *((run, CONFIG) for run in arguments.runs)):
        if not (folder / file).is_file():
            sys.exit(f"{folder} has no {file}")
    found = {
        "fashion_mnist": {name: bits(arguments.fashion / "models" / name) for name in MODELS},
        "reconstructions": reconstructions(arguments.fashion),
        "digits": digits(arguments.runs),
    }
    arguments.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def bits(run: Path) -> list[tuple[int, float]]:
    """Images seen, and bits per dim of held-out images."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [(line["images"], round(line["held_out_loss"], 4)) for line in lines]


def digits(runs: list[Path]) -> dict[str, dict[str, float]]:
    """Bits per dim at the end of each run, by kind and seed."""
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        config = RunConfig.from_dict(json.loads((run / CONFIG).read_text()))
        lines = bits(run)
        assert lines[-1][0] == config.training.steps * config.training.batch, (
            f"{run} is not finished"
        )
        seed, (*_, before, last) = str(config.seed), lines
        table.setdefault(described(config), {})[seed] = (before if is_control(config) else last)[1]
        if is_control(config):
            # The average of the weights starts anew with its only step in the second stage.
            table.setdefault("standard normal prior, no average", {})[seed] = last[1]
    return table


def is_control(config: RunConfig) -> bool:
    """Whether all but one step were of the first stage."""
    return config.pretraining_steps == config.training.steps - 1


def described(config: RunConfig) -> str:
    if is_control(config):
        return "standard normal prior"
    name = "LSGM" if config.process.name == "VPSDE" else "CLD-LSGM"
    if config.score.mixing is not None:
        name += f", mixing {config.score.mixing:g}"
    return name if config.score.inputs == "state" else f"{name}, shown the estimate"


def reconstructions(folder: Path) -> dict[str, float]:
    """Fréchet distances of held-out images, and of their reconstructions by the autoencoders."""
    config = ComparisonConfig.from_dict(json.loads((folder / RESULTS).read_text())["config"])
    data = next(iter(config.runs.values())).data.load()
    evaluation = Evaluation(
        data=data, metrics=("fd",), samples=config.samples, features="classifier", folder=folder
    )
    images = data.held_out.load(torch.arange(config.samples))
    distances = {"images": images}
    for name in MODELS:
        vae = load_model(folder / "models" / name).model.vae
        with torch.no_grad():
            z = vae.encode(to_unit(images)).sample(torch.Generator().manual_seed(0))
            distances[name] = to_levels(vae.images(z))
    measured: dict[str, Any] = {
        name: evaluation.measure(shown, ("fd",)) for name, shown in distances.items()
    }
    return {
        name: round(next(iter(cell.values()))["frechet_distance"], 4)
        for name, cell in measured.items()
    }


if __name__ == "__main__":
    main()
