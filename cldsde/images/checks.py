"""Checks of arguments: errors name the argument, the value received and the values allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor


def as_whole(value: object, name: str, low: int, high: int | None = None) -> int:
    """Return an integer in [low, high] as an int, or raise."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer in {low} … {high}"
    msg = f"{name} must be {allowed}; got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(msg)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(msg)
    return number


def check_counts(**counts: object) -> None:
    """Raise an error unless all are positive integers; ``classes`` may be None."""
    for name, value in counts.items():
        if value is not None or name != "classes":
            as_whole(value, name, 1)


def check_choice(value: object, allowed: Sequence[object], name: str) -> None:
    """Raise a ValueError unless the value is among those allowed."""
    # True equals 1, but is not a number of channels.
    if isinstance(value, bool) or value not in allowed:
        msg = f"{name} must be {listed(allowed, 'or')}; got {value!r}"
        raise ValueError(msg)


def check_bytes(images: object, name: str = "images") -> Tensor:
    """Return a uint8 tensor, or raise a TypeError."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        msg = f"{name} must be a uint8 tensor; got {got}"
        raise TypeError(msg)
    return images


def check_values(images: object, levels: int, name: str = "images") -> Tensor:
    """Return uint8 images if their values are below ``levels``, or raise."""
    found = check_bytes(images, name)
    as_whole(levels, "levels", 2, 256)
    # A byte cannot exceed 256 levels, and reading from an accelerator would wait for it.
    if levels < 256 and found.numel() and int(found.max()) >= levels:
        msg = f"{name} must have values in 0 … {levels - 1}; got {int(found.max())}"
        raise ValueError(msg)
    return found


def check_images(images: object, name: str, *, smallest: int = 1, least: int = 1) -> Tensor:
    """Return at least ``least`` uint8 images ``(N, C, H, W)`` on the CPU, or raise."""
    found = check_bytes(images, name)
    if found.ndim != 4 or found.shape[1] < 1 or min(found.shape[2:]) < smallest:
        size = f" with H and W at least {smallest}" if smallest > 1 else ""
        msg = f"{name} must have shape (N, C, H, W){size}; got {tuple(found.shape)}"
        raise ValueError(msg)
    if found.device.type != "cpu":
        msg = f"{name} must be on the CPU; got {found.device}; call .cpu()"
        raise ValueError(msg)
    if len(found) < least:
        msg = f"{name} must hold at least {least} images; got {len(found)}"
        raise ValueError(msg)
    return found


def check_labels(labels: object, name: str, count: int, classes: int | None = None) -> int:
    """Check one class per image; return the number of classes, one more than the largest."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        msg = f"{name} must be a tensor of integers; got {got}"
        raise TypeError(msg)
    if labels.shape != (count,):
        msg = f"{name} must have shape ({count},), one class per image; got {tuple(labels.shape)}"
        raise ValueError(msg)
    low, high = int(labels.min()), int(labels.max())
    limit = high + 1 if classes is None else classes
    if low < 0 or high >= limit:
        msg = f"{name} must lie in 0 … {limit - 1}; got {low} to {high}"
        raise ValueError(msg)
    return limit


def check_same_shape(images: Tensor, reference: Tensor, name: str = "reference") -> None:
    """Raise a ValueError if the images of the reference have another shape."""
    if reference.shape[1:] != images.shape[1:]:
        own, other = tuple(images.shape[1:]), tuple(reference.shape[1:])
        msg = f"{name} must have the shape of images, {own}; got {other}"
        raise ValueError(msg)


def check_levels(shape: Sequence[int], channels: Sequence[int]) -> None:
    """Raise a ValueError unless ``(C, H, W)`` can be halved once per level after the first."""
    for name, sizes in (("shape", shape), ("channels", channels)):
        integers = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        if not integers or not sizes or (name == "shape" and len(sizes) != 3):
            wanted = "three positive integers (C, H, W)" if name == "shape" else "positive integers"
            msg = f"{name} must be {wanted}; got {sizes!r}"
            raise ValueError(msg)
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


def listed(items: Sequence[object], word: str = "and") -> str:
    """Items as a sentence has them: a, b and c."""
    *head, last = (str(item) for item in items) if items else ("nothing",)
    return f"{', '.join(head)} {word} {last}" if head else last


def what_instead(path: Path) -> str:
    """State of a path that is not what it must be."""
    return "is none" if path.exists() else "does not exist"
