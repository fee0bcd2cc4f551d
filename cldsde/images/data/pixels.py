"""Images to numbers in [−1, 1] and back, and the statistics of these numbers."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cldsde.images.checks import Scale, check_values
from cldsde.images.data.images import Images
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


def pixels_of(images: Images) -> Tensor:
    """All images of a set that fits into memory, ``(N, C, H, W)`` float32 in [−1, 1]."""
    return to_unit(images.load(torch.arange(len(images), device="cpu")), images.levels)


def to_levels(images: Tensor, levels: Scale = 256, *, dequantised: bool = False) -> Tensor:
    """Round numbers of any shape to uint8 levels: the inverse of `to_unit`, or of dequantisation.

    If ``levels`` is a range, numbers become float32 in it, and are not rounded. Numbers outside
    [−1, 1] are clamped. ``dequantised`` numbers are levels spread over their bins,
    (2x + 2U)/levels − 1, instead of 2x/(levels − 1) − 1.
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
    ``dequantise`` spreads each level uniformly over its bin (`cldsde.score.dequantise`), instead of
    `to_unit`. In this order it draws n uniform numbers if ``flip``, 3n if ``crop`` is below 1
    (sizes, rows and columns), and n·C·H·W if ``dequantise``.
    """
    check_values(images, levels)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (n, C, H, W); got {tuple(images.shape)}")
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

    Results are float64 of shape ``()``, ``(C, 1, 1)`` or ``(C, H, W)``. Sums of levels and of their
    squares are integers, so that for bytes both are exact up to one rounding, however many there
    are.
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
