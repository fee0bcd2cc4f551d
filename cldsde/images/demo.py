"""The demonstration: CLD learns handwritten digits and draws new ones."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cldsde import solvers
from cldsde.images.config import NetworkConfig, RunConfig, SamplingConfig, TrainingConfig
from cldsde.images.data import DataSet, digits, pixels_of, to_unit
from cldsde.images.digit_classifier import DigitClassifier, train_classifier
from cldsde.images.evaluate import frechet_distance
from cldsde.images.figures import plot_distances, plot_samples, plot_trajectories
from cldsde.images.model import ImageSpace
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.schema import plain
from cldsde.images.train.loop import train
from cldsde.progress import progress_bar
from cldsde.score import GaussianMixture, MixedScore, ReverseProcess

_RESULTS = (
    "results.json",
    "table.md",
    "samples.npz",
    "samples.png",
    "trajectories.png",
    "distances.png",
)
_SOLVERS = {"EM": "euler-maruyama", "SSCS": "sscs", "multistep": "multistep-2-sde"}
_BATCH = 500  # images sampled at once


def _full_training() -> TrainingConfig:
    return TrainingConfig(
        images=192_000,
        batch=64,
        learning_rate=1e-3,
        warmup=6_400,
        decay="cosine",
        ema_decay=0.998,
        t_min=1e-3,
        log_every=6_400,
        save_every=32_000,
        sample_every=96_000,
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything that the demonstration depends on.

    Attributes
    ----------
    seed
        Of weights, training and sampling.
    device
        Torch device.
    channels
        Of the network's levels.
    training
        How the score is trained.
    nfe
        Budgets of score evaluations a sample, the final denoising included.
    t_end
        ε, where sampling ends.
    samples
        Images of a set.
    sets
        Sets of images, with seeds of their own, for each cell of the table.
    """

    seed: int = 0
    device: str = "cpu"
    channels: tuple[int, ...] = (16, 48)
    training: TrainingConfig = field(default_factory=_full_training)
    nfe: tuple[int, ...] = (10, 20, 50, 100)
    t_end: float = 2e-2
    samples: int = 800
    sets: int = 3

    @classmethod
    def quick(cls, **changes: Any) -> DemoConfig:
        """The same in small, for a first look and for tests."""
        training = dataclasses.replace(
            _full_training(),
            images=51_200,
            learning_rate=2e-3,
            warmup=3_200,
            ema_decay=0.99,
            save_every=6_400,
            sample_every=51_200,
        )
        return cls(**{"training": training, "nfe": (10, 50), "samples": 300, **changes})

    def model(self) -> RunConfig:
        """The configuration of the model's own run."""
        return RunConfig(
            seed=self.seed,
            network=NetworkConfig(options={"channels": list(self.channels)}),
            training=self.training,
            sampling=self.recipe("multistep", 10),
        )

    def recipe(self, solver: str, nfe: int) -> SamplingConfig:
        """How a solver of the table samples with a budget."""
        return SamplingConfig(solver=_SOLVERS[solver], nfe=nfe, t_end=self.t_end)

    def resolved(self) -> dict[str, Any]:
        """The configuration in JSON types."""
        resolved: dict[str, Any] = plain(self)
        return resolved


class DemoReport(NamedTuple):
    """What the demonstration found; also in ``results.json``.

    Attributes
    ----------
    accuracy
        Of the classifier on held-out digits.
    distances
        Solver to NFE to the Fréchet distances of the sets of samples from all real digits.
    baseline
        Fréchet distance of samples of a Gaussian fitted to the training pixels.
    class_shares
        Shares of the ten classes among the multistep samples at the largest NFE.
    seconds
        Wall time.
    """

    accuracy: float
    distances: dict[str, dict[int, list[float]]]
    baseline: float
    class_shares: list[float]
    seconds: float

    def table(self) -> str:
        """The distances as a Markdown table."""
        budgets = list(next(iter(self.distances.values())))
        lines = [
            "| FD at NFE | " + " | ".join(str(nfe) for nfe in budgets) + " |",
            "| --- |" + " ---: |" * len(budgets),
        ]
        for name, row in self.distances.items():
            cells = [f"{mean(row[n]):.2f} ± {stdev(row[n]):.2f}" for n in budgets]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def sentence(self) -> str:
        """Evaluations that the other solvers need for what multistep reaches with the fewest."""
        means = {
            name: {n: mean(values) for n, values in row.items()}
            for name, row in self.distances.items()
        }
        own = means.pop("multistep")
        fewest, most = min(own), max(own)
        needs = []
        for name, row in means.items():
            enough = [n for n in sorted(row) if row[n] <= own[fewest]]
            needs.append(f"{name} needs {enough[0] if enough else f'more than {most}'}")
        reached = f"With {fewest} score evaluations the multistep solver reaches {own[fewest]:.2f}"
        return f"{reached}; {' and '.join(needs)} for as much (lower is better)."


def run_demo(config: DemoConfig, run: RunFolder, *, progress: bool = True) -> DemoReport:
    """Train CLD on digits, sample it with three solvers, measure, and draw.

    Parameters
    ----------
    config
        What to do.
    run
        Where to write. An interrupted run goes on where it was; one that is finished is reported
        again.
    progress
        Show progress bars on stderr.
    """
    if all((run / name).exists() for name in _RESULTS):
        return _stored_report(run)
    began = time.monotonic()
    data = digits()
    classifier, accuracy = train_classifier(data, seed=config.seed, progress=progress)
    model = trained_model(config, run, progress=progress)
    space = ImageSpace.of(data.train, config.model())

    real = torch.cat([pixels_of(part) for part in data.all])
    features = classifier.features(real)
    distances: dict[str, dict[int, list[float]]] = {name: {} for name in _SOLVERS}
    cells = [(name, nfe) for name in _SOLVERS for nfe in config.nfe]
    sets = [
        range(first, first + config.samples)
        for first in range(0, config.sets * config.samples, config.samples)
    ]
    with progress_bar(cells, shown=progress, desc="sampling") as bar:
        for name, nfe in bar:
            bar.set_postfix(solver=name, nfe=nfe)
            recipe = config.recipe(name, nfe)
            sampler = ImageSampler(model, space, recipe, batch=_BATCH)
            values = distances[name][nfe] = []
            for seeds in sets:
                images = to_unit(sampler.sample(seeds).images, space.levels)
                values.append(frechet_distance(classifier.features(images), features))
    # The last cell belongs to the multistep solver at its largest budget.
    labels = classifier(images).argmax(1)
    shares = (labels.bincount(minlength=10) / len(labels)).tolist()
    report = DemoReport(
        accuracy=accuracy,
        distances=distances,
        baseline=frechet_distance(_gaussian_features(data, classifier, config), features),
        class_shares=shares,
        seconds=time.monotonic() - began,
    )
    run.write_json("results.json", report._asdict())
    run.write("table.md", lambda file: file.write_text(report.table() + "\n"))
    run.write(
        "samples.npz",
        lambda file: np.savez(file, images=images[:, 0].numpy(), labels=labels.numpy()),
    )
    caption = f"generated, {name} at {nfe} NFE"
    run.write("samples.png", lambda file: plot_samples(file, real[-100:], images, caption))
    process = ReverseProcess(model.sde, model)
    run.write("trajectories.png", lambda file: _draw_trajectories(file, process, data, config))
    run.write(
        "distances.png",
        lambda file: plot_distances(file, distances, report.baseline),
    )
    return report


def _stored_report(run: RunFolder) -> DemoReport:
    try:
        stored = json.loads((run / "results.json").read_text())
        distances = {
            name: {int(nfe): list(values) for nfe, values in row.items()}
            for name, row in stored.pop("distances").items()
        }
        return DemoReport(distances=distances, **stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(run.damaged("results.json", error)) from error


def trained_model(config: DemoConfig, run: RunFolder, *, progress: bool) -> MixedScore:
    """Train the demonstration's network in the folder ``model`` of the run, or load it from there.

    Parameters
    ----------
    config
        What to train.
    run
        The demonstration's run; its folder ``model`` is a run of ``cldsde train``.
    progress
        Show a progress bar on stderr.

    Raises
    ------
    ValueError
        If a checkpoint is damaged.
    """
    model = config.model()
    folder = RunFolder(run / "model", model.to_dict())
    data = model.data.load()
    return train(model, data, folder, device=config.device, progress=progress).score


def _gaussian_features(data: DataSet, classifier: DigitClassifier, config: DemoConfig) -> Tensor:
    pixels = pixels_of(data.train).flatten(1).double()
    fitted = GaussianMixture([1.0], pixels.mean(0, keepdim=True), torch.cov(pixels.T)[None])
    generator = torch.Generator().manual_seed(config.seed)
    images = fitted.sample(config.samples, generator=generator).reshape(-1, 1, 8, 8)
    return classifier.features(images.clamp(-1, 1))


def _draw_trajectories(
    file: Path, process: ReverseProcess, data: DataSet, config: DemoConfig
) -> None:
    sde = process.sde
    generator = torch.Generator().manual_seed(config.seed)
    columns, refinement = 9, 20
    grid = solvers.root_times(sde.T, config.t_end, (columns - 1) * refinement)
    stops = grid[::refinement].flip(0)

    z = sde.marginal(stops[0]).sample(sde.embed(pixels_of(data.train)[:1]), generator=generator)
    forward = [z]
    for s, t in pairwise(stops):
        forward.append(sde.transition(s, t).sample(forward[-1], generator=generator))

    z = sde.prior.sample((1, 1, 8, 8), generator=generator, device=config.device)
    backward = [z]
    for i in range(0, len(grid) - 1, refinement):
        solution = solvers.solve(
            process,
            solvers.SSCS(),
            backward[-1],
            grid[i : i + refinement + 1],
            generator=generator,
        )
        backward.append(solution.state)
    plot_trajectories(file, stops.tolist(), torch.cat(forward), torch.cat(backward[::-1]).cpu())
