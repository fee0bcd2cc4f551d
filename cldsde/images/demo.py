"""The demonstration: CLD is trained on handwritten digits and samples new ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from cldsde import solvers
from cldsde.images.config import RunConfig, load_config
from cldsde.images.data import DataSet, digits, pixels_of, to_unit
from cldsde.images.data.samples import all_bytes, as_bytes
from cldsde.images.entry import Run
from cldsde.images.evaluate import ClassifierFeatures, frechet_distance, train_classifier
from cldsde.images.figures import plot_distances, plot_samples, plot_trajectories
from cldsde.images.runs import RunFolder
from cldsde.progress import progress_bar
from cldsde.score import GaussianMixture, ReverseProcess
from cldsde.tables import Entry, Table, mean_and_spread

_RESULTS = (
    *("results.json", "table.md", "samples.npz"),
    *("samples.png", "trajectories.png", "distances.png"),
)
_CONFIG = Path(__file__).with_name("demo.toml")
_QUICK = {
    "images": 51_200,
    "learning_rate": 2e-3,
    "warmup": 3_200,
    "ema_decay": 0.99,
    "save_every": 6_400,
    "sample_every": 51_200,
}
# Changes of the recipe of the model.
_SOLVERS: dict[str, dict[str, Any]] = {
    "EM": {"solver": "euler-maruyama", "t_start": None},
    "SSCS": {"solver": "sscs", "t_start": None},
    "multistep": {},
}
_BATCH = 500  # images per batch


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demonstration: ``sets`` of ``samples`` images for each solver and NFE.

    NFE include the final denoising.
    """

    model: RunConfig
    device: str = "cpu"
    nfe: tuple[int, ...] = (10, 20, 50, 100)
    samples: int = 800
    sets: int = 3

    @classmethod
    def make(cls, seed: int = 0, device: str = "cpu", *, quick: bool = False) -> DemoConfig:
        """The demonstration, or a smaller version of it for a first look."""
        model = dataclasses.replace(load_config(_CONFIG), seed=seed)
        if not quick:
            return cls(model=model, device=device)
        training = dataclasses.replace(model.training, **_QUICK)  # type: ignore[arg-type]
        model = dataclasses.replace(model, training=training)
        return cls(model=model, device=device, nfe=(10, 50), samples=300)


def run_demo(config: DemoConfig, folder: RunFolder, *, progress: bool = True) -> str:
    """Train CLD on digits, sample it with three solvers, measure, and plot; return ``table.md``."""
    if all((folder / name).exists() for name in _RESULTS):
        return (folder / "table.md").read_text()
    began = time.monotonic()
    data = digits()
    levels, (train, held_out) = data.train.levels, map(all_bytes, data.all)
    options: dict[str, Any] = {"epochs": 20, "batch": 64, "size": 64, "progress": progress}
    labels: list[Any] = [part.labels for part in data.all]
    classifier, accuracy = train_classifier(
        *(train, labels[0], held_out, labels[1]), seed=config.model.seed, **options
    )
    features = ClassifierFeatures(classifier)
    real = features(torch.cat([train, held_out]))
    run = Run.train(config.model, data, folder / "model", device=config.device, progress=progress)
    distances: dict[str, dict[int, list[float]]] = {name: {} for name in _SOLVERS}
    seeds, cells = (
        range(config.sets * config.samples),
        [(x, n) for x in _SOLVERS for n in config.nfe],
    )
    with progress_bar(cells, shown=progress, desc="sampling") as bar:
        for name, nfe in bar:
            bar.set_postfix(solver=name, nfe=nfe)
            drawn = run.sample(seeds, batch=_BATCH, nfe=nfe, **_SOLVERS[name]).images
            sets = features(as_bytes(drawn, levels)).reshape(config.sets, config.samples, -1)
            distances[name][nfe] = [frechet_distance(some, real) for some in sets]
    # The last cell belongs to the multistep solver at its largest budget.
    images = to_unit(drawn, levels)
    found = classifier(images).argmax(1)
    baseline = frechet_distance(classifier.features(_gaussian(data, config)), real)
    results = {
        "accuracy": accuracy,
        "distances": distances,
        "baseline": baseline,
        "class_shares": (found.bincount(minlength=10) / len(found)).tolist(),
        "seconds": time.monotonic() - began,
    }
    folder.write_json("results.json", results)
    arrays = {"images": images[:, 0].numpy(), "labels": found.numpy()}
    folder.write("samples.npz", lambda file: np.savez(file, **arrays))
    shown, caption = pixels_of(data.all[-1])[-100:], f"generated, {name} at {nfe} NFE"
    folder.write("samples.png", lambda file: plot_samples(file, shown, images, caption))
    folder.write("trajectories.png", lambda file: _draw_trajectories(file, run, data, config))
    folder.write("distances.png", lambda file: plot_distances(file, distances, baseline))
    text = _text(**results)
    folder.write("table.md", lambda file: file.write_text(text))
    return text


def _text(
    distances: Mapping[str, Mapping[int, Sequence[float]]],
    baseline: float,
    accuracy: float,
    class_shares: Sequence[float],
    seconds: float,
) -> str:
    """The distances as a table in Markdown, and the other results."""
    budgets = list(distances["multistep"])
    rows = [
        [Entry(name, number=False), *(Entry(mean_and_spread(row[n], 2)) for n in budgets)]
        for name, row in distances.items()
    ]
    table = Table("", ["FD at NFE", *map(str, budgets)], rows, []).markdown()
    shares = " ".join(f"{digit}: {share:.0%}" for digit, share in enumerate(class_shares))
    return (
        f"{table}\n\n{_comparison(distances)}\n\n"
        f"FD of samples of a Gaussian fitted to the pixels: {baseline:.2f}\n"
        f"Classifier on held-out digits: {accuracy:.1%}. Classes among samples: {shares}\n"
        f"Took {seconds:.0f} s.\n"
    )


def _comparison(distances: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """Evaluations that the other solvers need for the best result with the fewest."""
    rows = distances.items()
    means = {name: {n: mean(values) for n, values in row.items()} for name, row in rows}
    own = means.pop("multistep")
    fewest, most = min(own), max(own)
    needs = []
    for name, row in means.items():
        enough = [n for n in sorted(row) if row[n] <= own[fewest]]
        needs.append(f"{name} needs {enough[0] if enough else f'more than {most}'}")
    reached = f"With {fewest} score evaluations the multistep solver reaches {own[fewest]:.2f}"
    return f"{reached}; {' and '.join(needs)} for as much (lower is better)."


def _gaussian(data: DataSet, config: DemoConfig) -> torch.Tensor:
    """Samples of a Gaussian fitted to the training pixels."""
    pixels = pixels_of(data.train).flatten(1).double()
    fitted = GaussianMixture([1.0], pixels.mean(0, keepdim=True), torch.cov(pixels.T)[None])
    generator = torch.Generator().manual_seed(config.model.seed)
    images = fitted.sample(config.samples, generator=generator).reshape(-1, 1, 8, 8)
    return images.clamp(-1, 1).float()


def _draw_trajectories(file: Path, run: Run, data: DataSet, config: DemoConfig) -> None:
    sde, process = run.process, ReverseProcess(run.process, run.score)
    generator = torch.Generator().manual_seed(config.model.seed)
    columns, refinement = 9, 20
    grid = solvers.root_times(sde.T, config.model.sampling.t_end or 0.0, (columns - 1) * refinement)
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
