"""Effects of the training process and of the sampling process on image quality.

``python benchmarks/networks_and_dynamics.py RESULTS FOLDER ...`` reads the folders of ``cldsde
compare cld_variants --out FOLDER``. A network whose input is the best estimate of the data serves
every process. So the network trained with VP and the network trained with CLD can each be sampled
with both. CLD starts at a slightly lower signal-to-noise ratio than VP was trained on, but the data
have no influence there.

RESULTS records the digests of the networks. If they match the folders, the measurement resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from cldsde.images.compare.config import ComparisonConfig
from cldsde.images.compare.report import RESULTS
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.model import ImageModel, load_model
from cldsde.images.sample.sampler import ImageSampler
from cldsde.progress import progress_bar
from cldsde.score import MixedScore

NETWORKS = ("VP", "CLD-estimate", "CLD-estimate-log-snr")
DYNAMICS = ("VP", "CLD", "PSLD")  # of the models of these names
SAMPLERS = {"multistep SDE": "multistep-2-sde", "multistep ODE": "multistep-2"}
BUDGETS = (10, 20)
# Test whether more steps reduce the effect of the flow on a network's error.
LONG = [
    (network, dynamics, "multistep ODE", 100) for network in NETWORKS for dynamics in ("VP", "CLD")
]


def with_dynamics(model: ImageModel, process: ProcessConfig) -> ImageModel:
    score = model.score
    other = MixedScore(
        score.network, process.make(), score.data_mean, score.data_variance, inputs="estimate"
    )
    return dataclasses.replace(model, score=other.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"weights": {}, "fd": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    opened = [Crossing(folder, results) for folder in arguments.folders]
    for crossing in opened:
        for network, dynamics, sampler, nfe in progress_bar(
            crossing.missing(), shown=True, desc=crossing.folder.name
        ):
            row = results["fd"].setdefault(f"{network}, {dynamics}, {sampler}", {})
            distance = crossing.distance(network, dynamics, sampler, nfe)
            row.setdefault(str(nfe), {})[crossing.seed] = round(distance, 4)
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")


class Crossing:
    """The networks of one comparison, with the results so far."""

    def __init__(self, folder: Path, results: dict[str, Any]) -> None:
        if not (folder / RESULTS).is_file():
            sys.exit(f"{folder} is no folder of cldsde compare")
        config = ComparisonConfig.from_dict(json.loads((folder / RESULTS).read_text())["config"])
        lacking = {*NETWORKS, *DYNAMICS} - {*config.runs}
        if lacking:
            sys.exit(f"{folder} is no comparison of cld_variants: it has no {sorted(lacking)}")
        self.folder, self.config, self.seed = folder, config, str(config.seed)
        self.models = {name: load_model(folder / "models" / name) for name in NETWORKS}
        self.known = results["fd"]
        weights = results["weights"].setdefault(self.seed, {})
        for name, model in self.models.items():
            if weights.setdefault(name, model.digest) != model.digest:
                sys.exit(f"the results of seed {self.seed} are of other weights of {name}")
        self.evaluation = Evaluation(
            data=next(iter(config.runs.values())).data.load(),
            metrics=("fd",),
            samples=config.samples,
            batch=config.batch,
            features="classifier",
            folder=folder,
        )

    def missing(self) -> list[tuple[str, str, str, int]]:
        usual = list(itertools.product(NETWORKS, DYNAMICS, SAMPLERS, BUDGETS))
        return [cell for cell in [*usual, *LONG] if not self.knows(*cell)]

    def knows(self, network: str, dynamics: str, sampler: str, nfe: int) -> bool:
        row = self.known.get(f"{network}, {dynamics}, {sampler}", {})
        return self.seed in row.get(str(nfe), {})

    def distance(self, network: str, dynamics: str, sampler: str, nfe: int) -> float:
        model = with_dynamics(self.models[network], self.config.runs[dynamics].process)
        recipe = SamplingConfig(solver=SAMPLERS[sampler], nfe=nfe, grid="root", t_end=1e-2)
        first = self.config.first_seed
        seeds = range(first, first + self.config.samples)
        images = ImageSampler.of(model, recipe, batch=self.config.batch).sample(seeds).images
        [measured] = self.evaluation.measure(images, ("fd",)).values()
        return measured["frechet_distance"]


if __name__ == "__main__":
    main()
