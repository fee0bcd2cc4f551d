"""Pictures of images, and figures of the demonstration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cldsde.images.checks import Scale
from cldsde.images.data.pictures import open_picture
from cldsde.images.data.samples import as_bytes


def save_grid(
    file: Path,
    images: Tensor,
    levels: Scale = 256,
    *,
    columns: int | None = None,
    notes: PngInfo | None = None,
) -> None:
    """Write images ``(N, C, H, W)`` in a grid; pixels of small images become squares.

    Channels other than 1 or 3 are side by side. Without ``columns`` the grid is nearly
    square. ``notes`` go into the header of a PNG.
    """
    images = _shown(as_bytes(images.cpu(), levels))
    n, _, height, width = images.shape
    columns = math.isqrt(n - 1) + 1 if columns is None else columns
    sheet = _montage(images.numpy(), columns, gap=2, fill=0)
    sheet = np.pad(sheet, ((0, 0), (2, 2), (2, 2)))
    scale = max(1, 64 // max(height, width))
    sheet = sheet.repeat(scale, 1).repeat(scale, 2)
    picture(torch.from_numpy(sheet)).save(file, pnginfo=notes)


def _montage(images: NDArray, columns: int, *, gap: int, fill: float) -> NDArray:  # type: ignore[type-arg]
    """Images ``(N, C, H, W)`` in rows of ``columns``, with gaps between them: ``(C, H', W')``."""
    padding = ((0, -len(images) % columns), (0, 0), (0, gap), (0, gap))
    padded = np.pad(images, padding, constant_values=fill)
    channels, high, wide = padded.shape[1:]
    rows = padded.reshape(-1, columns, channels, high, wide).transpose(2, 0, 3, 1, 4)
    return rows.reshape(channels, -1, columns * wide)[:, :-gap, :-gap]


def is_whole_picture(file: Path) -> bool:
    """Whether a picture exists and can be read to its end."""
    try:
        with open_picture(file) as opened:
            opened.verify()  # checksums, if the format has any
        with open_picture(file) as opened:
            opened.load()
    except ValueError:
        return False
    return True


def _shown(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` of 1 or 3 channels; others become grey, side by side."""
    return images if images.shape[1] in {1, 3} else torch.cat(images.split(1, 1), -1)  # type: ignore[no-untyped-call]


def picture(image: Tensor) -> Image.Image:
    """Bytes ``(C, H, W)`` as an image of Pillow's; channels other than 1 or 3 are side by side."""
    image = _shown(image[None])[0]
    return Image.fromarray((image[0] if len(image) == 1 else image.movedim(0, -1)).numpy())


def plot_samples(file: Path, real: Tensor, generated: Tensor, caption: str) -> None:
    """Plot real and generated images ``(N, 1, H, W)`` in [−1, 1] side by side, 100 at most."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    pairs = ((real, "real"), (generated, caption))
    for axes, (images, title) in zip(figure.subplots(1, 2), pairs, strict=True):
        sheet = _montage(images[:100].cpu().numpy(), 10, gap=1, fill=np.nan)[0]
        axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title)
    figure.savefig(file, dpi=150)


def plot_trajectories(
    file: Path, times: Sequence[float], forward: Tensor, backward: Tensor
) -> None:
    """Plot data and velocity along the diffusion of one image, and the generation of another.

    The states ``(len(times), 2, 1, H, W)`` are at increasing times.
    """
    count, width = len(times), forward.shape[-1]
    figure = Figure(figsize=(1.05 * count + 0.9, 5.2), layout="constrained")
    ways = {"diffusion →": forward, "← generation": backward}
    looks = {"x": ("gray", 1.0), "v": ("RdBu_r", 1.5)}
    for axes, (way, name) in zip(figure.subplots(4), product(ways, looks), strict=True):
        states, (colours, limit) = ways[way][:, "xv".index(name)], looks[name]
        sheet = _montage(states.cpu().numpy(), count, gap=1, fill=np.nan)[0]
        axes.imshow(sheet, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[], ylabel=f"{way}\n{name}")
    middles = np.arange(count) * (width + 1) + (width - 1) / 2
    top = figure.axes[0].secondary_xaxis("top")
    top.set_xticks(middles, [f"t = {time:.3g}" for time in times], fontsize=9)
    figure.savefig(file, dpi=150)
