"""Images as numbers in [−1, 1], with their statistics, as bytes, and as pictures."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from cldsde.images.checks import Scale, check_values
from cldsde.images.data.images import Images, array_images
from cldsde.images.data.pictures import open_picture, pixels_of_picture, read_picture
from cldsde.images.schema import checked
from cldsde.linear.checks import described
from cldsde.score import likelihood


def to_unit(images: Tensor, levels: Scale = 256) -> Tensor:
    """Map uint8 levels of any shape to float32 in [−1, 1]: 2x/(levels − 1) − 1.

    If ``levels`` is a range, images are numbers in it, whose ends are mapped to −1 and 1.
    """
    low, high = (0, levels - 1) if isinstance(levels, int) else levels
    # In this order both ends are exact.
    return 2 * ((check_values(images, levels).to(torch.float32) - low) / (high - low)) - 1


def to_levels(images: Tensor, levels: Scale = 256, *, dequantised: bool = False) -> Tensor:
    """Round numbers of any shape to uint8 levels: the inverse of `to_unit`, or of dequantisation.

    If ``levels`` is a range, numbers become float32 in it, and are not rounded. Numbers outside
    [−1, 1] are clamped. ``dequantised`` numbers are levels spread over bins, (2x + 2U)/levels − 1.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a floating-point tensor; got {described(images)}")
    if bool(images.isnan().any()):
        msg = f"images must be numbers; got {int(images.isnan().sum())} NaN of {images.numel()}"
        raise ValueError(msg)
    # Half precision cannot tell 256 levels from the values between them.
    fine = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    unit = (fine.clamp(-1, 1) + 1) / 2
    if not isinstance(levels, int):
        low, high = levels
        return (low + (high - low) * unit).to(torch.float32).clamp(low, high)
    if dequantised:
        return (unit * levels).floor().clamp_max(levels - 1).to(torch.uint8)
    return (unit * (levels - 1)).round().to(torch.uint8)


def augment(
    images: Tensor,
    levels: Scale,
    *,
    flip: bool,
    dequantise: bool,
    crop: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Map images ``(n, C, H, W)`` to float32 in [−1, 1] for training.

    ``flip`` mirrors each image with probability 1/2. ``crop`` below 1 resizes a random part of each
    image to its size; the share of its height and width is uniform between ``crop`` and 1.
    ``dequantise`` spreads each level uniformly over its bin (`cldsde.score.dequantise`).
    """
    source = images.device if generator is None else generator.device
    if flip:
        uniform = torch.rand(len(images), generator=generator, device=source).to(images.device)
        images = torch.where((uniform < 0.5).reshape(-1, 1, 1, 1), images.flip(-1), images)
    if crop < 1:
        places = torch.rand(3, len(images), generator=generator, device=source).T.tolist()
        parts = [_part(x, levels, crop, *place) for x, place in zip(images, places, strict=True)]
        images = torch.stack(parts)
    if dequantise and isinstance(levels, int):
        return likelihood.dequantise(images, count=levels, generator=generator)
    return to_unit(images, levels)


def _part(image: Tensor, levels: Scale, crop: float, *place: float) -> Tensor:
    """A part of an image ``(C, H, W)``, resized to its size by a bicubic filter."""
    size, (share, *corner) = image.shape[1:], place
    sides = [max(1, round(n * (crop + (1 - crop) * share))) for n in size]
    top, left = (int(x * (n - side + 1)) for x, n, side in zip(corner, size, sides, strict=True))
    part = image[None, :, top : top + sides[0], left : left + sides[1]].to(torch.float32)
    resized = F.interpolate(part, size, mode="bicubic", antialias=True)[0]
    if isinstance(levels, int):
        return resized.round().clamp(0, levels - 1).to(torch.uint8)
    return resized.clamp(*levels)


@checked
def channel_statistics(
    images: Images,
    *,
    per: Literal["scalar", "channel", "pixel"] = "channel",
    dequantise: bool = False,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the numbers in [−1, 1], of `to_unit` or of dequantised images.

    Results are float64 of shape ``()``, ``(C, 1, 1)`` or ``(C, H, W)``. Sums of bytes are
    exact up to one rounding.
    """
    c, h, w = images.shape
    shape = {"scalar": (), "channel": (c, 1, 1), "pixel": (c, h, w)}[per]
    first, second = (x.reshape(math.prod(shape), -1) for x in images.sums(progress=progress))
    if isinstance(images.levels, int):
        # x ↦ 2x/d − 1 with d = levels − 1, or (2x + 1)/d − 1 ± 1/d with d = levels. Python's
        # integers do not overflow, and their quotient is the float64 nearest to the true one.
        n, spread = len(images) * first.shape[1], int(dequantise)
        d = images.levels - 1 + spread
        sums = list(zip(first.sum(1).tolist(), second.sum(1).tolist(), strict=True))
        means = [(2 * s + n * (spread - d)) / (n * d) for s, _ in sums]
        spreads = [(12 * (n * q - s * s) + spread * n * n) / (3 * (n * d) ** 2) for s, q in sums]
        mean, variance = torch.tensor([means, spreads], dtype=torch.float64, device="cpu")
    else:
        low, high = images.levels
        mean = 2 * (first.mean(1) - low) / (high - low) - 1
        variance = second.mean(1) / len(images) + first.var(1, correction=0)
        variance = 4 * variance / (high - low) ** 2
    return mean.reshape(shape), variance.reshape(shape)


def as_bytes(images: Tensor, levels: Scale) -> Tensor:
    """Images of other levels, or numbers of a range, as bytes from 0 to 255."""
    if levels == 256:
        return images
    if isinstance(levels, int):
        return (images.to(torch.float32) * (255 / (levels - 1))).round().to(torch.uint8)
    return to_levels(to_unit(images, levels))


def measured(images: Tensor, levels: Scale) -> Tensor:
    """Images as features take them: bytes, or float32 in [−1, 1] for numbers of a range."""
    return as_bytes(images, levels) if isinstance(levels, int) else to_unit(images, levels)


def measured_batches(images: Images, batch: int = 256) -> Iterator[Tensor]:
    """All images of a set as features take them, batch by batch."""
    for first in range(0, len(images), batch):
        rows = torch.arange(first, min(first + batch, len(images)), device="cpu")
        yield measured(images.load(rows), images.levels)


def load_samples(path: Path, like: Images | None = None) -> Tensor:
    """Load samples ``(N, C, H, W)`` as features take them, from a file or a folder of ``*.png``.

    An array ``levels`` of a ``.npz`` holds the number of grey levels of its images, 256 by default,
    or their range. Floating-point numbers of other files have the range of the images ``like``.
    """
    if path.is_dir():
        return _pictures(path)
    if path.suffix not in {".npz", ".npy"}:
        msg = f"{path} must be a run, a folder of pictures, or an array file (.npz, .npy)"
        raise ValueError(msg)
    levels: Any = 256 if like is None or isinstance(like.levels, int) else like.levels
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as archive:
            levels = archive.get("levels", levels)
    levels = np.asarray(levels).tolist()
    kind = {"value_range" if isinstance(levels, list) else "levels": levels}
    known = (1, 3) if like is None else sorted({1, 3, like.shape[0]})
    try:
        found = array_images(path, channels=known, **kind)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return measured(found.load(torch.arange(len(found), device="cpu")), found.levels)


def _pictures(folder: Path) -> Tensor:
    files = sorted(file for file in folder.glob("*.png") if file.name[0] != ".")
    if not files:
        raise ValueError(f"{folder} holds no pictures (*.png)")
    found: list[Tensor] = []
    for file in files:
        found.append(pixels_of_picture(read_picture(file)))
        own, first = tuple(found[-1].shape), tuple(found[0].shape)
        if own != first:
            raise ValueError(f"{file} must have the shape of {files[0].name}, {first}; got {own}")
    return torch.stack(found)


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
    from torchvision.utils import make_grid

    images = _shown(as_bytes(images.cpu(), levels))
    columns = math.isqrt(len(images) - 1) + 1 if columns is None else columns
    # A grid of grey images has three equal channels.
    sheet = make_grid(images, columns)[: images.shape[1]]
    scale = max(1, 64 // max(images.shape[2:]))
    sheet = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    picture(sheet).save(file, pnginfo=notes)


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
    return images if images.shape[1] in {1, 3} else torch.cat(torch.split(images, 1, 1), -1)


def picture(image: Tensor) -> Image.Image:
    """Bytes ``(C, H, W)`` as an image of Pillow's; channels other than 1 or 3 are side by side."""
    image = _shown(image[None])[0]
    return Image.fromarray((image[0] if len(image) == 1 else image.movedim(0, -1)).numpy())
