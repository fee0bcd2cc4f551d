"""Images to be measured: in one scale, and from files of any origin."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.images.checks import Scale
from cldsde.images.data import Images, array_images, to_levels, to_unit
from cldsde.images.data.pictures import pixels_of_picture, read_picture


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
    for rows in torch.arange(len(images)).split(batch):  # type: ignore[no-untyped-call]
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
    levels: Any = 256
    if like is not None and not isinstance(like.levels, int):
        levels = np.array(like.levels)
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as archive:
            levels = archive.get("levels", levels)
    levels = np.asarray(levels).tolist()
    ends = levels if isinstance(levels, list) else None
    if ends is None and (not isinstance(levels, int) or not 2 <= levels <= 256):
        msg = f"{path}: levels must be a number from 2 to 256, or a range; got {levels}"
        raise ValueError(msg)
    try:
        known = (1, 3) if like is None else sorted({1, 3, like.shape[0]})
        found = array_images(path, value_range=ends, channels=known)
    except TypeError as error:
        raise ValueError(str(error)) from error
    images = found.load(torch.arange(len(found)))
    if ends is None and int(images.max()) >= levels:
        raise ValueError(f"{path} must hold levels from 0 to {levels - 1}; got {int(images.max())}")
    return measured(images, levels if ends is None else found.levels)


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
