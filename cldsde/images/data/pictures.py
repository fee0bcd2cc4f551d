"""Safe reading of pictures: allowed formats, limited sizes, regular files and parts of others."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

from cldsde.messages import brief

# Formats that Pillow decodes itself: others, such as EPS, would start a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
"""Ends of the names of picture files."""
_GREY16 = {"I;16", "I;16B", "I;16L", "I;16N"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_GREY16}


class Packed(NamedTuple):
    """A picture inside of another file: its name, and a function that returns its content.

    ``stamp`` changes with the content.
    """

    name: str
    read: Callable[[], bytes]
    stamp: object = None

    def __str__(self) -> str:
        return self.name


@contextmanager
def open_picture(file: Path | Packed) -> Iterator[PILImage]:
    """Open a picture file, whose pixels are decoded on access; raise a ValueError if unsafe."""
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is not a regular file")  # a pipe would be waited for without end
        source = io.BytesIO(file.read()) if isinstance(file, Packed) else file
        with Image.open(source, formats=_FORMATS) as image:
            if image.mode not in _MODES:
                msg = f"its pixels are of mode {image.mode}; 8 bits and 16-bit grey are allowed"
                raise ValueError(msg)
            yield image
    except Exception as error:  # Pillow has no class of its own for a damaged file
        raise ValueError(f"{file} cannot be decoded as an image: {brief(error)}") from error


def read_picture(file: Path | Packed, mode: str | None = None) -> PILImage:
    """A picture with its orientation applied, in 8-bit RGB or grey; the mode "F" is 16-bit grey."""
    with open_picture(file) as opened:
        grey = opened.mode in {"1", "L", *_GREY16}
        return _to_colour(ImageOps.exif_transpose(opened), mode or ("L" if grey else "RGB"))


def fitted(image: PILImage, height: int, width: int) -> PILImage:
    """The largest central part of a picture in the shape of images, resized to their size."""
    wide, high = image.size
    part = (min(wide, high * width // height), min(high, wide * height // width))
    left, top = ((own - some) // 2 for own, some in zip(image.size, part, strict=True))
    # Cropped first: resize(box=…) would let the filter reach over the edges of the box.
    cut = image.crop((left, top, left + part[0], top + part[1]))
    if part == (width, height):
        return cut
    return cut.resize((width, height), Image.Resampling.BICUBIC)


def pixels_of_picture(image: PILImage) -> Tensor:
    """Pixels ``(C, H, W)`` uint8 of a picture in RGB or grey."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _to_colour(image: PILImage, mode: str) -> PILImage:
    if mode == "F":
        if image.mode in _GREY16:
            return Image.fromarray(np.asarray(image).astype(np.float32))
        return Image.fromarray(257 * np.asarray(_to_colour(image, "L")).astype(np.float32))
    if image.mode in _GREY16:
        # Pillow's own conversion cuts off instead of scaling; 65535 = 257 · 255.
        fine = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((fine + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, colours).convert("RGB")
    # A copy outlives the file.
    return image.copy() if image.mode == mode else image.convert(mode)
