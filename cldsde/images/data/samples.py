"""Images to be measured: as bytes, and from files of any origin."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cldsde.images.data import Images, array_images
from cldsde.images.data.pictures import pixels_of_picture, read_picture


def as_bytes(images: Tensor, levels: int) -> Tensor:
    """Images of fewer grey levels as bytes from 0 to 255."""
    if levels == 256:
        return images
    return (images.to(torch.float32) * (255 / (levels - 1))).round().to(torch.uint8)


def byte_batches(images: Images, batch: int = 256) -> Iterator[Tensor]:
    """All images of a set as bytes from 0 to 255, batch by batch."""
    for rows in torch.arange(len(images)).split(batch):  # type: ignore[no-untyped-call]
        yield as_bytes(images.load(rows), images.levels)


def all_bytes(images: Images) -> Tensor:
    """All images of a set as bytes from 0 to 255."""
    return as_bytes(images.load(torch.arange(len(images))), images.levels)


def load_samples(path: Path) -> Tensor:
    """Load samples ``(N, C, H, W)`` uint8 with 256 levels, from a file or a folder of ``*.png``.

    An array ``levels`` of a ``.npz`` is the number of grey levels of its images, 256 by default.
    """
    if path.is_dir():
        return _pictures(path)
    if path.suffix not in {".npz", ".npy"}:
        msg = f"{path} must be a run, a folder of pictures, or an array file (.npz, .npy)"
        raise ValueError(msg)
    try:
        found = array_images(path)
    except TypeError as error:
        raise ValueError(str(error)) from error
    images, levels = found.load(torch.arange(len(found))), np.array(256)
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as archive:
            levels = archive.get("levels", levels)
    if levels.ndim or levels.dtype.kind not in "iu" or not 2 <= levels <= 256:
        raise ValueError(f"{path}: levels must be a number from 2 to 256; got {levels}")
    if int(images.max()) >= levels:
        raise ValueError(f"{path} must hold levels from 0 to {levels - 1}; got {int(images.max())}")
    return as_bytes(images, int(levels))


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
