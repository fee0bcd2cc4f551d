"""Checks of arguments: errors name the argument, the value received and the values allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cldsde.errors import require
from cldsde.linear.checks import described

Scale = int | tuple[float, float]
"""Number of grey levels, or the range of continuous numbers."""


def check_values(images: object, levels: Scale) -> Tensor:
    """Return images if they are uint8 below ``levels``, or numbers in their range; or raise."""
    if not isinstance(levels, int):
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images must be a floating-point tensor; got {described(images)}")
        least, most = map(float, images.aminmax()) if images.numel() else levels
        # Images are float32, and so are the ends of their range. A comparison with NaN is false.
        low, high = torch.tensor(levels, dtype=torch.float32, device="cpu").tolist()
        if not (min(low, levels[0]) <= least and most <= max(high, levels[1])):
            msg = f"images must have values in their range, {levels[0]:g} to {levels[1]:g}; got "
            raise ValueError(f"{msg}{least:g} to {most:g}")
        return images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor; got {described(images)}")
    # A byte cannot exceed 256 levels, and reading from an accelerator would wait for it.
    if levels < 256 and images.numel() and int(images.max()) >= levels:
        raise ValueError(f"images must have values in 0 … {levels - 1}; got {int(images.max())}")
    return images


def check_images(images: object, name: str, *, least: int = 1) -> Tensor:
    """Return at least ``least`` images ``(N, C, H, W)``, uint8 or floats, on the CPU, or raise."""
    allowed = (torch.uint8, torch.float16, torch.float32, torch.float64)
    if not (isinstance(images, Tensor) and images.is_cpu and images.dtype in allowed):
        raise TypeError(
            f"{name} must be a uint8 or float tensor on the CPU; got {described(images)}"
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{name} must have shape (N, C, H, W); got {tuple(images.shape)}")
    if len(images) < least:
        raise ValueError(f"{name} must hold at least {least} images; got {len(images)}")
    return images


def check_labels(labels: object, count: int, classes: int | None = None) -> int:
    """Check one class per image; return the number of classes, one more than the largest."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be a tensor of integers; got {described(labels)}")
    if labels.shape != (count,):
        msg = f"labels must have shape ({count},), one class per image; got {tuple(labels.shape)}"
        raise ValueError(msg)
    low, high = int(labels.min()), int(labels.max())
    limit = high + 1 if classes is None else classes
    if low < 0 or high >= limit:
        raise ValueError(f"labels must lie in 0 … {limit - 1}; got {low} to {high}")
    return limit


def check_same_shape(images: Tensor, reference: Tensor) -> None:
    """Raise a ValueError if the images of the reference have another shape."""
    if reference.shape[1:] != images.shape[1:]:
        own, other = tuple(images.shape[1:]), tuple(reference.shape[1:])
        raise ValueError(f"reference must have the shape of images, {own}; got {other}")


def check_levels(shape: Sequence[int], channels: Sequence[int]) -> None:
    """Raise a ValueError unless ``(C, H, W)`` can be halved once per level after the first."""
    factor = 2 ** (len(channels) - 1)
    if shape[1] % factor or shape[2] % factor:
        msg = f"channels has {len(channels)} levels, so H and W must be divisible by {factor}; "
        msg += f"got shape {tuple(shape)}"
        raise ValueError(msg)


def check_groups(groups: int, channels: Sequence[int]) -> None:
    """Raise a ValueError unless the groups of a norm divide all channels into two or more."""
    if any(width % groups or width == groups for width in channels):
        # A norm of single channels would remove what a clock or a latent adds to them.
        msg = f"groups must divide each of the channels, {list(channels)}, into two or more; got "
        raise ValueError(f"{msg}{groups}")


def output_place(path: Path) -> Path:
    """The place of an output, at the end of links; raise a SettingError if it cannot be written."""
    plain = path.is_file() or path.is_dir() or not (path.exists() or path.is_symlink())
    require(plain, "out", f"{path} is a link to nothing, a pipe or a device; name a file or folder")
    return path.resolve()


def listed(items: Sequence[object], word: str = "and") -> str:
    """Items as a sentence has them: a, b and c."""
    *head, last = (str(item) for item in items) if items else ("nothing",)
    return f"{', '.join(head)} {word} {last}" if head else last
