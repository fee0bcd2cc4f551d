"""The demonstration: CLD is trained on handwritten digits and samples new ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from cldsde import solvers
from cldsde.images.compare.report import plot_measure
from cldsde.images.compare.tables import tables
from cldsde.images.config import RunConfig, load_config
from cldsde.images.data import DataSet, digits, pixels_of, to_unit
from cldsde.images.data.samples import all_bytes, as_bytes
from cldsde.images.entry import Run
from cldsde.images.evaluate import ClassifierFeatures, frechet_distance, train_classifier
from cldsde.images.figures import plot_samples, plot_trajectories
from cldsde.images.runs import RunFolder
from cldsde.progress import progress_bar
from cldsde.score import GaussianMixture, ReverseProcess

_RESULTS = (
    *("results.json", "table.md", "samples.npz"),
    *("samples.png", "trajectories.png", "distances.png"),
)
_CONFIG = Path(__file__).with_name("demo.toml")
_QUICK = (
    *("training.images=51_200", "training.learning_rate=2e-3", "training.warmup=3_200"),
    *("training.ema_decay=0.99", "training.save_every=6_400", "training.sample_every=51_200"),
)
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
    samples: int = 1000
    sets: int = 3

    @classmethod
    def make(cls, seed: int = 0, device: str = "cpu", *, quick: bool = False) -> DemoConfig:
        """The demonstration, or a smaller version of it for a first look."""
        model = load_config(_CONFIG, [f"seed={seed}", *(_QUICK if quick else ())])
        smaller: dict[str, Any] = {"nfe": (10, 50), "samples": 300} if quick else {}
        return cls(model=model, device=device, **smaller)


def run_demo(config: DemoConfig, folder: RunFolder, *, progress: bool = True) -> str:
    """Train CLD on digits, sample it with three solvers, measure, and plot; return ``table.md``."""
    if all((folder / name).exists() for name in _RESULTS):
        return (folder / "table.md").read_text(encoding="utf-8")
    began = time.monotonic()
    data = digits()
    levels, seed = data.train.levels, config.model.seed
    classifier, accuracy = train_classifier(
        data, epochs=20, batch=64, size=64, seed=seed, progress=progress
    )
    features = ClassifierFeatures(classifier)
    real = features(torch.cat([*map(all_bytes, data.all)]))
    run = Run.train(config.model, data, folder / "model", device=config.device, progress=progress)
    # In the format of a comparison.
    rows: dict[str, dict[str, Any]] = {
        name: {"model": "CLD", "label": name, "adaptive": False, "cells": []} for name in _SOLVERS
    }
    seeds, cells = range(config.sets * config.samples), list(product(_SOLVERS, config.nfe))
    with progress_bar(cells, shown=progress, desc="sampling") as bar:
        for name, nfe in bar:
            bar.set_postfix(solver=name, nfe=nfe)
            drawn = run.sample(seeds, batch=_BATCH, nfe=nfe, **_SOLVERS[name]).images
            sets = features(as_bytes(drawn, levels)).reshape(config.sets, config.samples, -1)
            measures = {"fd": [frechet_distance(some, real) for some in sets]}
            rows[name]["cells"].append({"budget": nfe, "nfe": nfe, "measures": measures})
    # The last cell belongs to the multistep solver at its largest budget.
    images = to_unit(drawn, levels)
    found = classifier(images).argmax(1)
    results: dict[str, Any] = {
        "accuracy": accuracy,
        "rows": list(rows.values()),
        "models": {},
        "baseline": frechet_distance(classifier.features(_gaussian(data, config)), real),
        "class_shares": (found.bincount(minlength=10) / len(found)).tolist(),
        "seconds": time.monotonic() - began,
    }
    folder.write_json("results.json", results)
    arrays = {"images": images[:, 0].numpy(), "labels": found.numpy()}
    folder.write("samples.npz", lambda file: np.savez(file, **arrays))
    shown, caption = pixels_of(data.all[-1])[-100:], f"generated, {name} at {nfe} NFE"
    folder.write("samples.png", lambda file: plot_samples(file, shown, images, caption))
    folder.write("trajectories.png", lambda file: _draw_trajectories(file, run, data, config))
    figure, label = plot_measure(results, "fd"), "Gaussian fitted to the pixels"
    figure.axes[0].axhline(results["baseline"], color="0.5", linestyle="dashed", label=label)
    figure.axes[0].legend(fontsize="small")
    folder.write("distances.png", lambda file: figure.savefig(file, dpi=150))
    folder.write("table.md", lambda file: file.write_text(_text(results), encoding="utf-8"))
    return (folder / "table.md").read_text(encoding="utf-8")


def _text(results: Mapping[str, Any]) -> str:
    """The distances as a table in Markdown, and the other results."""
    [table] = tables(results)
    # Evaluations that the other solvers need for the best result with the fewest.
    means = {
        row["label"]: {cell["nfe"]: mean(cell["measures"]["fd"]) for cell in row["cells"]}
        for row in results["rows"]
    }
    own = means.pop("multistep")
    fewest, most = min(own), max(own)
    needs = []
    for name, row in means.items():
        enough = [n for n in sorted(row) if row[n] <= own[fewest]]
        needs.append(f"{name} needs {enough[0] if enough else f'more than {most}'}")
    shares = " ".join(f"{digit}: {x:.0%}" for digit, x in enumerate(results["class_shares"]))
    return (
        f"{table.markdown()}\n\n"
        f"With {fewest} score evaluations the multistep solver reaches {own[fewest]:.2f}; "
        f"{' and '.join(needs)} for as much (lower is better).\n\n"
        f"FD of samples of a Gaussian fitted to the pixels: {results['baseline']:.2f}\n"
        f"Classifier on held-out digits: {results['accuracy']:.1%}. "
        f"Classes among samples: {shares}\n"
        f"Took {results['seconds']:.0f} s.\n"
    )


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
    noise = sde.prior.sample((1, 1, 8, 8), generator=generator, device=config.device)
    options: dict[str, Any] = {"generator": generator, "t_eval": stops.flip(0)}
    backward = solvers.solve(process, solvers.SSCS(), noise, grid, **options).y[:, 0].flip(0)
    plot_trajectories(file, stops.tolist(), torch.cat(forward), backward.cpu())
