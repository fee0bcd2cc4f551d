"""Bytes to numbers in [−1, 1] and back, and the statistics of these numbers.

Grey levels are numbers 0 … levels − 1. `to_unit` and `to_levels` put both ends of the scale on ±1;
`augment` can instead spread every level over its bin, as likelihoods of discrete data need.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cldsde.images.checks import check_values
from cldsde.images.data.images import CHUNK, Images
from cldsde.images.schema import checked
from cldsde.score import quantisation


def to_unit(images: Tensor, levels: int = 256) -> Tensor:
    """Map uint8 levels of any shape to float32 in [−1, 1]: 2x/(levels − 1) − 1."""
    # In this order both ends are exact.
    return 2 * check_values(images, levels).to(torch.float32) / (levels - 1) - 1


def pixels_of(images: Images) -> Tensor:
    """All images of a set that fits into memory, ``(N, C, H, W)`` float32 in [−1, 1]."""
    return to_unit(images.load(torch.arange(len(images))), images.levels)


def to_levels(images: Tensor, levels: int = 256, *, dequantised: bool = False) -> Tensor:
    """Round numbers of any shape to uint8 levels: the inverse of `to_unit`, or of dequantisation.

    Numbers outside [−1, 1] are clamped. ``dequantised`` numbers are levels spread over their bins,
    (2x + 2U)/levels − 1, instead of 2x/(levels − 1) − 1.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor; got {got}")
    if bool(images.isnan().any()):
        msg = f"images must be numbers; got {int(images.isnan().sum())} NaN of {images.numel()}"
        raise ValueError(msg)
    # Half precision cannot tell 256 levels from the values between them.
    fine = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    unit = (fine.clamp(-1, 1) + 1) / 2
    if dequantised:
        return (unit * levels).floor().clamp_max(levels - 1).to(torch.uint8)
    return (unit * (levels - 1)).round().to(torch.uint8)


def augment(
    images: Tensor,
    levels: int,
    *,
    flip: bool,
    dequantise: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Map bytes ``(n, C, H, W)`` to float32 in [−1, 1] for training.

    ``flip`` mirrors each image with probability 1/2. ``dequantise`` spreads each level uniformly
    over its bin (`cldsde.score.dequantise`), instead of `to_unit`.

    Notes
    -----
    The order of the random numbers: if ``flip``, n uniform numbers, mirrored below 1/2; then, if
    ``dequantise``, n·C·H·W uniform numbers in the order of the mirrored images. They depend on
    nothing but the shape and these two flags.
    """
    check_values(images, levels)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (n, C, H, W); got {tuple(images.shape)}")
    if flip:
        source = images.device if generator is None else generator.device
        uniform = torch.rand(len(images), generator=generator, device=source).to(images.device)
        images = torch.where((uniform < 0.5).reshape(-1, 1, 1, 1), images.flip(-1), images)
    if dequantise:
        return quantisation.dequantise(images, count=levels, generator=generator)
    return to_unit(images, levels)


@checked
def channel_statistics(
    images: Images,
    *,
    per: Literal["scalar", "channel", "pixel"] = "channel",
    dequantise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the numbers in [−1, 1], of `to_unit` or of dequantised images.

    Results are float64 of shape ``()``, ``(C, 1, 1)`` or ``(C, H, W)``. Sums of levels and of their
    squares are integers, so that both are exact up to one rounding, however many images there are.
    """
    c, h, w = images.shape
    shapes = {"scalar": (), "channel": (c, 1, 1), "pixel": (c, h, w)}
    axes = {"scalar": (0, 1, 2, 3), "channel": (0, 2, 3), "pixel": (0,)}
    total = torch.zeros(shapes[per], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for rows in torch.arange(len(images)).split(max(1, CHUNK // (c * h * w))):  # type: ignore[no-untyped-call]
        levels = images.load(rows).to(torch.int32)
        total += levels.sum(axes[per], dtype=torch.int64).reshape(total.shape)
        squares += levels.square().sum(axes[per], dtype=torch.int64).reshape(total.shape)

    # x ↦ 2x/d − 1 with d = levels − 1, or (2x + 1)/d − 1 ± 1/d with d = levels. Python's integers
    # do not overflow, and their quotient is the float64 nearest to the true one.
    n = len(images) * c * h * w // total.numel()
    spread = int(dequantise)
    d = images.levels - 1 + spread
    sums = list(zip(total.flatten().tolist(), squares.flatten().tolist(), strict=True))
    mean = [(2 * s + n * (spread - d)) / (n * d) for s, _ in sums]
    variance = [(12 * (n * q - s * s) + spread * n * n) / (3 * (n * d) ** 2) for s, q in sums]
    found = (torch.tensor(x, dtype=torch.float64).reshape(total.shape) for x in (mean, variance))
    return next(found), next(found)
