"""Safe reading of picture files: allowed formats, limited sizes, regular files."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

# Formats that Pillow decodes itself: others, such as EPS, would start a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
"""Ends of the names of picture files."""
_GREY16 = {"I;16", "I;16B", "I;16L", "I;16N"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_GREY16}


@contextmanager
def open_picture(file: Path) -> Iterator[PILImage]:
    """Open a picture file, whose pixels are decoded on access; raise a ValueError if unsafe."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for without end
            raise ValueError("it is not a regular file")
        with Image.open(file, formats=_FORMATS) as image:
            if image.mode not in _MODES:
                msg = f"its pixels are of mode {image.mode}; 8 bits and 16-bit grey are allowed"
                raise ValueError(msg)
            yield image
    except Exception as error:  # Pillow has no class of its own for a damaged file
        raise ValueError(f"{file} cannot be decoded as an image: {error}") from error


def read_picture(file: Path, mode: str | None = None) -> PILImage:
    """A picture with its orientation applied, in 8-bit RGB or grey."""
    with open_picture(file) as opened:
        grey = opened.mode in {"1", "L", *_GREY16}
        return _to_colour(ImageOps.exif_transpose(opened), mode or ("L" if grey else "RGB"))


def pixels_of_picture(image: PILImage) -> Tensor:
    """Pixels ``(C, H, W)`` uint8 of a picture in RGB or grey."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _to_colour(image: PILImage, mode: str) -> PILImage:
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
