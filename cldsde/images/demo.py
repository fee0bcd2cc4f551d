"""The demonstration: CLD is trained on handwritten digits and samples new ones."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from cldsde import solvers
from cldsde.images.config import NetworkConfig, RunConfig, SamplingConfig, TrainingConfig
from cldsde.images.data import DataSet, digits, pixels_of, to_unit
from cldsde.images.data.samples import all_bytes, as_bytes
from cldsde.images.evaluate import ClassifierFeatures, frechet_distance, train_classifier
from cldsde.images.figures import plot_distances, plot_samples, plot_trajectories
from cldsde.images.model import ImageSpace
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.schema import plain
from cldsde.images.train.loop import train
from cldsde.messages import one_line
from cldsde.progress import progress_bar
from cldsde.score import GaussianMixture, MixedScore, ReverseProcess
from cldsde.tables import Entry, Table, mean_and_spread

_RESULTS = (
    *("results.json", "table.md", "samples.npz"),
    *("samples.png", "trajectories.png", "distances.png"),
)
_SOLVERS: dict[str, dict[str, Any]] = {
    "EM": {"solver": "euler-maruyama"},
    "SSCS": {"solver": "sscs"},
    # Few steps are better spent after the first part, in which noise hides the data.
    "multistep": {"solver": "multistep-2-sde", "t_start": 0.7},
}
_BATCH = 500  # images per batch


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
    """Settings of the demonstration: ``sets`` of ``samples`` images for each solver and NFE.

    Sampling ends at ``t_end``; NFE include the final denoising.
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
        """A smaller version, for a first look and for tests."""
        shorter = {"images": 51_200, "warmup": 3_200, "save_every": 6_400, "sample_every": 51_200}
        rates = {"learning_rate": 2e-3, "ema_decay": 0.99}
        training = dataclasses.replace(_full_training(), **shorter, **rates)  # type: ignore[arg-type]
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
        """Sampling settings of a solver of the table with a budget."""
        return SamplingConfig(nfe=nfe, t_end=self.t_end, **_SOLVERS[solver])

    def resolved(self) -> dict[str, Any]:
        """The configuration in JSON types."""
        resolved: dict[str, Any] = plain(self)
        return resolved


@dataclass(frozen=True)
class DemoReport:
    """Results of the demonstration; also in ``results.json``."""

    accuracy: float
    distances: dict[str, dict[int, list[float]]]
    baseline: float
    class_shares: list[float]
    seconds: float

    def table(self) -> str:
        """The distances as a Markdown table."""
        budgets = list(next(iter(self.distances.values())))
        rows = [
            [Entry(name, number=False), *(Entry(mean_and_spread(row[n], 2)) for n in budgets)]
            for name, row in self.distances.items()
        ]
        return Table("", ["FD at NFE", *map(str, budgets)], rows, []).markdown()

    def sentence(self) -> str:
        """Evaluations that the other solvers need for the best result with the fewest."""
        rows = self.distances.items()
        means = {name: {n: mean(values) for n, values in row.items()} for name, row in rows}
        own = means.pop("multistep")
        fewest, most = min(own), max(own)
        needs = []
        for name, row in means.items():
            enough = [n for n in sorted(row) if row[n] <= own[fewest]]
            needs.append(f"{name} needs {enough[0] if enough else f'more than {most}'}")
        reached = f"With {fewest} score evaluations the multistep solver reaches {own[fewest]:.2f}"
        return f"{reached}; {' and '.join(needs)} for as much (lower is better)."


def run_demo(config: DemoConfig, run: RunFolder, *, progress: bool = True) -> DemoReport:
    """Train CLD on digits, sample it with three solvers, measure, and plot."""
    if all((run / name).exists() for name in _RESULTS):
        try:
            return TypeAdapter(DemoReport).validate_json((run / "results.json").read_text())
        except ValueError as error:
            raise ValueError(run.damaged("results.json", one_line(error))) from error
    began = time.monotonic()
    data = digits()
    levels = data.train.levels
    train_set, held_out = ((all_bytes(part), part.labels) for part in data.all)
    options = {"epochs": 20, "batch": 64, "size": 64, "seed": config.seed, "progress": progress}
    classifier, accuracy = train_classifier(*train_set, *held_out, **options)  # type: ignore[arg-type]
    features = ClassifierFeatures(classifier)
    model = trained_model(config, run, progress=progress)
    space = ImageSpace.of(data.train, config.model())
    real = features(torch.cat([train_set[0], held_out[0]]))
    distances: dict[str, dict[int, list[float]]] = {name: {} for name in _SOLVERS}
    cells = [(name, nfe) for name in _SOLVERS for nfe in config.nfe]
    with progress_bar(cells, shown=progress, desc="sampling") as bar:
        for name, nfe in bar:
            bar.set_postfix(solver=name, nfe=nfe)
            sampler = ImageSampler(model, space, config.recipe(name, nfe), batch=_BATCH)
            values = distances[name][nfe] = []
            for first in range(0, config.sets * config.samples, config.samples):
                drawn = sampler.sample(range(first, first + config.samples)).images
                values.append(frechet_distance(features(as_bytes(drawn, levels)), real))
    # The last cell belongs to the multistep solver at its largest budget.
    images = to_unit(drawn, levels)
    labels = classifier(images).argmax(1)
    report = DemoReport(
        accuracy=accuracy,
        distances=distances,
        baseline=frechet_distance(classifier.features(_gaussian(data, config)), real),
        class_shares=(labels.bincount(minlength=10) / len(labels)).tolist(),
        seconds=time.monotonic() - began,
    )
    run.write_json("results.json", dataclasses.asdict(report))
    run.write("table.md", lambda file: file.write_text(report.table() + "\n"))
    arrays = {"images": images[:, 0].numpy(), "labels": labels.numpy()}
    run.write("samples.npz", lambda file: np.savez(file, **arrays))
    shown, caption = pixels_of(data.all[-1])[-100:], f"generated, {name} at {nfe} NFE"
    run.write("samples.png", lambda file: plot_samples(file, shown, images, caption))
    run.write("trajectories.png", lambda file: _draw_trajectories(file, model, data, config))
    run.write("distances.png", lambda file: plot_distances(file, distances, report.baseline))
    return report


def trained_model(config: DemoConfig, run: RunFolder, *, progress: bool) -> MixedScore:
    """Train the network in the folder ``model`` of the demonstration's run, or load it."""
    model = config.model()
    folder = RunFolder(run / "model", model.to_dict())
    data = model.data.load()
    score = train(model, data, folder, device=config.device, progress=progress).score
    assert isinstance(score, MixedScore)
    return score


def _gaussian(data: DataSet, config: DemoConfig) -> torch.Tensor:
    """Samples of a Gaussian fitted to the training pixels."""
    pixels = pixels_of(data.train).flatten(1).double()
    fitted = GaussianMixture([1.0], pixels.mean(0, keepdim=True), torch.cov(pixels.T)[None])
    generator = torch.Generator().manual_seed(config.seed)
    images = fitted.sample(config.samples, generator=generator).reshape(-1, 1, 8, 8)
    return images.clamp(-1, 1).float()


def _draw_trajectories(file: Path, model: MixedScore, data: DataSet, config: DemoConfig) -> None:
    sde, process = model.sde, ReverseProcess(model.sde, model)
    generator = torch.Generator().manual_seed(config.seed)
    columns, refinement = 9, 20
    grid = solvers.root_times(sde.T, config.t_end, (columns - 1) * refinement)
    stops = grid[::refinement].flip(0)
    first = sde.embed(pixels_of(data.train)[:1])
    forward = [sde.marginal(stops[0]).sample(first, generator=generator)]
    for s, t in pairwise(stops):
        forward.append(sde.transition(s, t).sample(forward[-1], generator=generator))
    backward = [sde.prior.sample((1, 1, 8, 8), generator=generator, device=config.device)]
    for i in range(0, len(grid) - 1, refinement):
        part = process, solvers.SSCS(), backward[-1], grid[i : i + refinement + 1]
        backward.append(solvers.solve(*part, generator=generator).state)
    plot_trajectories(file, stops.tolist(), torch.cat(forward), torch.cat(backward[::-1]).cpu())
