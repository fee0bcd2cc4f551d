"""Figures of the demonstration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cldsde.images.data.pictures import open_picture

def save_grid(
    file: Path,
    images: Tensor,
    levels: int = 256,
    *,
    columns: int | None = None,
    notes: PngInfo | None = None,
) -> None:
    """Images in a grid as a picture; pixels of small images become squares."""
    n, channels, height, width = images.shape
    columns = math.isqrt(n - 1) + 1 if columns is None else columns
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), np.uint8)
    for i, image in enumerate(images.movedim(1, -1).cpu().numpy()):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        sheet[top : top + height, left : left + width] = image
    scale = max(1, 24 // max(height, width))
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    picture(sheet.transpose(2, 0, 1), levels).save(file, pnginfo=notes)


def is_whole_picture(file: Path) -> bool:
    """Whether a picture is there and can be read to its end."""
    try:
        with open_picture(file) as opened:
            opened.verify()  # checksums, if the format has any
        with open_picture(file) as opened:
            opened.load()
    except ValueError:
        return False
    return True


def picture(image: NDArray[np.uint8], levels: int = 256) -> Image.Image:
    """An image ``(C, H, W)`` of so many grey levels, C = 1 or 3, as one of Pillow's."""
    scaled = np.rint(image * (255 / (levels - 1))).astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else scaled.transpose(1, 2, 0))


def _montage(images: Tensor, columns: int, gap: int = 1) -> NDArray[np.float32]:
    """Images ``(N, 1, H, W)`` in rows of ``columns``, a light frame between them."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan, np.float32
    )
    for i, image in enumerate(images[:, 0].cpu().numpy()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _show(axes: Axes, sheet: NDArray[np.float32], limit: float, colours: str) -> None:
    axes.imshow(sheet, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_axis_off()


def plot_samples(file: Path, real: Tensor, generated: Tensor, caption: str) -> None:
    """Real beside generated images, 100 each at most."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    for axes, images, title in zip(
        figure.subplots(1, 2), (real, generated), ("real", caption), strict=True
    ):
        _show(axes, _montage(images[:100], 10), 1.0, "gray")
        axes.set_title(title)
    figure.savefig(file, dpi=150)


def plot_trajectories(
    file: Path, times: Sequence[float], forward: Tensor, backward: Tensor
) -> None:
    """Data and velocity along the diffusion of one image, and along the generation of another."""
    figure = Figure(figsize=(1.05 * len(times) + 0.9, 5.2), layout="constrained")
    grid = figure.subplots(4, len(times))
    rows = (
        (forward[:, 0], "x", "gray"),
        (forward[:, 1], "v", "RdBu_r"),
        (backward[:, 0], "x", "gray"),
        (backward[:, 1], "v", "RdBu_r"),
    )
    for row, (images, name, colours) in enumerate(rows):
        limit = 1.0 if name == "x" else 1.5
        for column, image in enumerate(images):
            axes = grid[row, column]
            axes.imshow(
                image[0].cpu().numpy(),
                cmap=colours,
                vmin=-limit,
                vmax=limit,
                interpolation="nearest",
            )
            axes.set(xticks=[], yticks=[])
            if column == 0:
                side = "diffusion →" if row < 2 else "← generation"
                axes.set_ylabel(f"{side}\n{name}")
            if row == 0:
                axes.set_title(f"t = {times[column]:.3g}", fontsize=9)
    figure.savefig(file, dpi=150)


def plot_distances(
    file: Path, distances: Mapping[str, Mapping[int, Sequence[float]]], baseline: float
) -> None:
    """Fréchet distance against NFE, one line per solver, with a band of one standard deviation."""
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(distances.items(), "os^Dv", strict=False):
        means = np.array([np.mean(sets) for sets in values.values()])
        spread = np.array([np.std(sets, ddof=1) for sets in values.values()])
        (line,) = axes.loglog(list(values), means, marker=marker, label=name)
        low, high = np.maximum(means - spread, means / 2), means + spread
        axes.fill_between(list(values), low, high, alpha=0.25, color=line.get_color())
    nfes = sorted({nfe for values in distances.values() for nfe in values})
    axes.axhline(baseline, color="0.5", linestyle="--", label="Gaussian fitted to the pixels")
    axes.set_xticks(nfes, [str(nfe) for nfe in nfes])
    axes.minorticks_off()
    axes.set(xlabel="score evaluations per sample (NFE)", ylabel="Fréchet distance (FD)")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
