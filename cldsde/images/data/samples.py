"""Images to be measured or shown: in one scale, from files of any origin, and as pictures."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cldsde.images.checks import Scale
from cldsde.images.data import Images, array_images, to_levels, to_unit
from cldsde.images.data.pictures import open_picture, pixels_of_picture, read_picture


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
    ends = levels if isinstance(levels, list) else None
    if ends is None and (not isinstance(levels, int) or not 2 <= levels <= 256):
        raise ValueError(f"{path}: levels must be a number from 2 to 256, or a range; got {levels}")
    try:
        known = (1, 3) if like is None else sorted({1, 3, like.shape[0]})
        found = array_images(path, value_range=ends, channels=known)
    except TypeError as error:
        raise ValueError(str(error)) from error
    images = found.load(torch.arange(len(found), device="cpu"))
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
