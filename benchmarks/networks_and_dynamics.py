"""What a network's training costs in quality, and what the dynamics that it is sampled with.

``python benchmarks/networks_and_dynamics.py docs/data/networks-and-dynamics.json FOLDER ...`` takes
comparisons that ``cldsde compare cld_variants --out FOLDER`` has made. A network that is shown the
best estimate of the data serves every process, so that the one trained with VP and the one trained
with CLD can each be sampled with either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from cldsde.images.comparison_config import ComparisonConfig
from cldsde.images.comparison_report import RESULTS
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.evaluation_table import Evaluation
from cldsde.images.model import DiffusionModel, ImageModel, load_model
from cldsde.score import MixedScore
from cldsde.solvers.progress import progress_bar

NETWORKS = ("VP", "CLD-estimate")
DYNAMICS = ("VP", "CLD", "PSLD")  # of the models of these names
SAMPLERS = {"multistep SDE": "multistep-2-sde", "multistep ODE": "multistep-2"}
BUDGETS = (10, 20)


def with_dynamics(model: ImageModel, process: ProcessConfig) -> ImageModel:
    score = model.score
    other = MixedScore(
        score.network, process.make(), score.data_mean, score.data_variance, inputs="estimate"
    )
    return dataclasses.replace(model, model=DiffusionModel(other.eval()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    for folder in arguments.folders:
        found = json.loads((folder / RESULTS).read_text())
        config = ComparisonConfig.from_dict(found["config"])
        evaluation = Evaluation(
            data=next(iter(config.runs.values())).data.load(),
            metrics=("fd",),
            samples=config.samples,
            batch=config.batch,
            features="classifier",
            folder=folder,
        )
        cells = [
            (network, dynamics, sampler, nfe)
            for network in NETWORKS
            for dynamics in DYNAMICS
            for sampler in SAMPLERS
            for nfe in BUDGETS
        ]
        for network, dynamics, sampler, nfe in progress_bar(cells, shown=True, desc=folder.name):
            row = results.setdefault(f"{network}, {dynamics}, {sampler}", {})
            cell = row.setdefault(str(nfe), {})
            if str(config.seed) in cell:
                continue
            process = config.runs[dynamics].process
            model = with_dynamics(load_model(folder / "models" / network), process)
            recipe = SamplingConfig(solver=SAMPLERS[sampler], nfe=nfe, grid="root", t_end=1e-2)
            seeds = range(config.first_seed, config.first_seed + config.samples)
            images = evaluation.draw(model, recipe, seeds).images
            [measured] = evaluation.measure(images, ("fd",)).values()
            cell[str(config.seed)] = round(measured["frechet_distance"], 4)
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
