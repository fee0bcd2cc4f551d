"""Pictures of images."""

from __future__ import annotations

import math
from pathlib import Path

import torch
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
    return images if images.shape[1] in {1, 3} else torch.cat(images.split(1, 1), -1)  # type: ignore[no-untyped-call]


def picture(image: Tensor) -> Image.Image:
    """Bytes ``(C, H, W)`` as an image of Pillow's; channels other than 1 or 3 are side by side."""
    image = _shown(image[None])[0]
    return Image.fromarray((image[0] if len(image) == 1 else image.movedim(0, -1)).numpy())
