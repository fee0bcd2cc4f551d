"""What the measures share: checks of images and counts, images by parts, versions of packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import torch
from torch import Tensor

class UndefinedLikelihoodError(ValueError):
    """What a model was trained for gives no likelihood of such images."""


def check_images(images: object, name: str, *, smallest: int = 1, least: int = 1) -> Tensor:
    """Return ``images`` if they are uint8 ``(N, C, H, W)`` on the host; raise otherwise."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        msg = f"{name} must be a uint8 tensor (N, C, H, W); got {got}"
        raise TypeError(msg)
    if images.ndim != 4 or images.shape[1] < 1 or min(images.shape[2:]) < smallest:
        size = f" with H and W at least {smallest}" if smallest > 1 else ""
        msg = f"{name} must have shape (N, C, H, W){size}; got {tuple(images.shape)}"
        raise ValueError(msg)
    if images.device.type != "cpu":
        msg = f"{name} must be on the host; got {images.device}; call .cpu()"
        raise ValueError(msg)
    if len(images) < least:
        msg = f"{name} must hold at least {least} images; got {len(images)}"
        raise ValueError(msg)
    return images


def check_pair(images: Tensor, reference: Tensor) -> None:
    """Refuse a reference whose images are of another shape."""
    if reference.shape[1:] != images.shape[1:]:
        msg = (
            f"reference must have the shape of images, {tuple(images.shape[1:])}; "
            f"got {tuple(reference.shape[1:])}"
        )
        raise ValueError(msg)


def check_count(value: object, name: str, *, least: int = 1) -> int:
    """Return ``value`` if it is an integer ≥ ``least``; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name} must be an integer of at least {least}; got {value!r}"
        raise ValueError(msg)
    return value


def parts(rows: Tensor, batch: int) -> Iterator[Tensor]:
    """Views of ``batch`` rows at a time, the last of what is left."""
    return (rows[first : first + batch] for first in range(0, len(rows), batch))


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages by their names."""
    return {package: importlib.metadata.version(package) for package in packages}
