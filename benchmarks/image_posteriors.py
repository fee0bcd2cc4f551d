"""Posterior samples of a trained network: the gallery's picture and the coverage of intervals.

``python benchmarks/image_posteriors.py RUN docs/_static/image-posteriors.png docs/data`` observes
held-out images of the run's data and samples them given the observation. It writes the picture, the
observed pictures (``observed-*.png``), and ``image-posteriors.json``: how often the central
intervals of posterior samples hold the truth, pixel by pixel.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cldsde import Observation, PosteriorScore, ReverseProcess, solvers
from cldsde.images import Run
from cldsde.images.data import to_levels, to_unit
from cldsde.images.sample import ObservedImage
from cldsde.progress import progress_bar
from digit_classifier import pixels_of

SHOWN, FIRST_SHOWN = 2, 20  # held-out images of the picture
SAMPLES, SHOWN_NOISE = 16, 0.05
TRUTHS, DRAWS, NFE, NOISE = 32, 9, 25, 0.1  # of the coverage
LEAST_STD = 0.05  # of pixels that count: the black surroundings are known without an observation
BATCH = 16  # truths sampled at once


def upper_half(shape: tuple[int, ...]) -> Tensor:
    _, height, width = shape
    return (torch.arange(height) < height // 2).unsqueeze(1).expand(height, width)


def inpainting(y: Tensor, shape: tuple[int, ...]) -> Observation:
    return Observation.mask(upper_half(shape).expand(shape), y, NOISE)


def super_resolution(y: Tensor, shape: tuple[int, ...]) -> Observation:
    low = Observation.downsample(4, y[0], NOISE)
    return Observation(low.forward, y, NOISE, shape)


def coverage(run: Run, x: Tensor, problem: str, method: str) -> dict[str, Any]:
    """Part of the pixels whose truth lies in central intervals of their samples."""
    g = torch.Generator().manual_seed(0)
    shape, sde = tuple(x.shape[1:]), run.process
    ranks, kept = [], []
    for truth in x.split(BATCH):
        noisy = truth + NOISE * torch.randn(truth.shape, generator=g)
        if problem == "inpainting":
            y, make = noisy, inpainting
        else:
            low = Observation.downsample(4, torch.zeros(1, 4, 4), NOISE).forward(truth)
            y, make = low + NOISE * torch.randn(low.shape, generator=g), super_resolution
        seen = make(y.repeat_interleave(DRAWS, 0), shape)
        solver: solvers.Solver = solvers.ExponentialMultistep(order=2, stochasticity=1.0)
        score: Any = run.score
        if method == "replacement":
            known = noisy.repeat_interleave(DRAWS, 0)
            solver = solvers.Imputation(solver, known, upper_half(shape).expand(shape))
        else:
            score = PosteriorScore(score, seen, method)
        times = solvers.root_times(sde.T, seen.end_time(sde, shape), NFE - 1)
        start = sde.prior.sample((len(truth) * DRAWS, *shape), generator=g)
        process = ReverseProcess(sde, score)
        found = solvers.solve(process, solver, start, times, generator=g, denoise=True)
        drawn = found.data.unflatten(0, (-1, DRAWS))
        ranks.append((drawn < truth.unsqueeze(1)).sum(1))
        free = ~upper_half(shape) if problem == "inpainting" else torch.ones(shape[1:]).bool()
        kept.append((drawn.std(1) > LEAST_STD) & free)
    rank, counts = torch.cat(ranks).flatten(1), torch.cat(kept).flatten(1)
    result: dict[str, Any] = {"problem": problem, "method": method, "pixels": int(counts.sum())}
    for outside in (1, 3):
        inside = (rank >= outside) & (rank <= DRAWS - outside) & counts
        # Pixels of an image depend on each other: images are the sample.
        share = inside.sum(1).double() / counts.sum(1).clamp_min(1)
        level = round(100 * (DRAWS + 1 - 2 * outside) / (DRAWS + 1))
        result[f"{level}"] = float(share.mean())
        result[f"{level}_std"] = float(share.std() / len(share) ** 0.5)
    return result


def picture(run: Run, truths: Tensor, file: Path, folder: Path) -> None:
    """Truth, observation, samples and standard deviation, a row for each image and problem."""
    g = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(2 * SHOWN, 8, figsize=(9, 4.7 * SHOWN / 2), layout="constrained")
    for i, x in enumerate(truths):
        mask = upper_half(tuple(x.shape))
        small = torch.nn.functional.avg_pool2d(x, 4)
        for j, (name, clean) in enumerate({"mask": x, "downsample:4": small}.items()):
            noisy = clean + SHOWN_NOISE * torch.randn(clean.shape, generator=g)
            seen = to_levels(noisy.unsqueeze(0))[0]
            Image.fromarray(seen[0].numpy()).save(folder / f"observed-{'ab'[i]}-{name[:4]}.png")
            observed = ObservedImage(
                known=seen,
                operator=name,
                mask=mask if name == "mask" else None,
                noise_std=SHOWN_NOISE,
            )
            images = run.sample(range(SAMPLES), observed=observed, nfe=50).images
            blank = torch.where(mask, seen, 128) if name == "mask" else seen
            row = axes[SHOWN * j + i]
            shown = [x[0], blank[0], *images[:4, 0], to_unit(images).mean(0)[0]]
            for axis, image in zip(row, shown, strict=False):
                axis.imshow(np.asarray(image), cmap="gray", **limits(image))
            row[7].imshow(to_unit(images).std(0)[0], cmap="viridis", vmin=0, vmax=0.6)
    titles = ("held out", "observed", *["sample"] * 4, "mean", "std")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(file, dpi=120)
    Image.fromarray(255 * upper_half((1, 16, 16)).byte().numpy()).save(folder / "observed-mask.png")


def limits(image: Tensor) -> dict[str, float]:
    return {"vmin": 0, "vmax": 255} if image.dtype == torch.uint8 else {"vmin": -1, "vmax": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    run = Run.load(arguments.run)
    held_out = pixels_of(run.config.data.load().held_out)
    shown = held_out[FIRST_SHOWN : FIRST_SHOWN + SHOWN]
    picture(run, shown, arguments.picture, arguments.folder)
    truths = held_out[1000 : 1000 + TRUTHS]
    cells = [("inpainting", m) for m in ("replacement", "moments", "pigdm")]
    cells += [("super-resolution", m) for m in ("moments", "pigdm")]
    rows: list[dict[str, Any]] = []
    content = {"truths": TRUTHS, "draws": DRAWS, "nfe": NFE, "noise_std": NOISE, "rows": rows}
    file = arguments.folder / "image-posteriors.json"
    for cell in progress_bar(cells, shown=True):
        rows.append(coverage(run, truths, *cell))
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
