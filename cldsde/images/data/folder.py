"""Images of a folder, decoded when they are asked for."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from cldsde.images.data.checks import as_folder, as_whole, check_choice, listed, missing
from cldsde.images.data.images import Images

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

__all__ = ["FolderImages"]

T = TypeVar("T")

# Formats that Pillow decodes itself: others, such as EPS, would start a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
_GREY16 = {"I;16", "I;16B", "I;16L", "I;16N"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *_GREY16}


class FolderImages(Images):
    """The image files of a folder and the folders in it, decoded when they are asked for.

    Every file is opened once when the object is made, which reads its header, and decoded anew
    each time that its row is loaded.

    Parameters
    ----------
    path
        The folder.
    size
        Height and width. An image is cropped to its central square, and that is resized by a
        bicubic filter that covers whole source pixels (Pillow's); a square of that size is left
        as it is, a smaller one is enlarged.
    channels
        3 for RGB, 1 for grey.
    classes
        Whether the subfolders are classes: 0, 1, … in the order of their names.
    workers
        Threads that decode.

    Attributes
    ----------
    files : tuple of Path
        The file of each row.

    Raises
    ------
    TypeError, ValueError
        If an option is not allowed, the folder holds no image, a class has none, an image belongs
        to no class, links go round in a circle, or a file cannot be decoded.
    OSError
        If the folder cannot be read.

    Notes
    -----
    Files are told by their suffix (BMP, GIF, JPEG, PNG, PPM, TIFF, WebP), in either case; all
    others are left out, as are files and folders whose name starts with a dot. Links to files and
    folders are followed. Rows are in the order of the names of folders and file, compared by code
    points of their NFC form, so that it does not depend on the file system.

    EXIF orientation is applied. Transparent images are laid over white. Grey becomes three equal
    channels, and RGB becomes grey by Pillow's (Rec. 601) weights. 16-bit grey is scaled by 1/257
    and rounded. CMYK is converted without its colour profile. Images of 32-bit or floating-point
    pixels are refused, since their scale is not known. Of several frames the first counts.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int,
        channels: int = 3,
        classes: bool = False,
        workers: int = 4,
    ) -> None:
        size = as_whole(size, "size", 1)
        check_choice(channels, (1, 3), "channels")
        self._workers = as_whole(workers, "workers", 1)
        _import_pillow()
        root = as_folder(path)
        names: list[str] | None = None
        labels: Tensor | None = None
        if classes:
            names, files, numbers = _class_files(root)
            labels = torch.tensor(numbers)
        else:
            files = _image_files(root)
        if not files:
            msg = f"{root} holds no image; files that end in {listed(sorted(_SUFFIXES))} count"
            raise ValueError(msg)
        super().__init__(len(files), (channels, size, size), labels=labels, classes=names)
        self.files = tuple(files)
        self._in_threads(_check_header, self.files)

    def _read(self, rows: Tensor) -> Tensor:
        channels, size, _ = self.shape
        batch = torch.empty((len(rows), *self.shape), dtype=torch.uint8)

        def decode(place: int) -> None:
            batch[place] = _decode(self.files[int(rows[place])], size, channels)

        self._in_threads(decode, range(len(rows)))
        return batch

    def _in_threads(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """Do the work for every item; raise the first error in the order of the items.

        A pool of its own takes a fraction of a millisecond, and nothing is left over that could
        not be pickled or would be broken by a fork.
        """
        with ThreadPoolExecutor(min(self._workers, len(items))) as pool:
            for _ in pool.map(work, items):
                pass


def _import_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(missing("FolderImages", "Pillow")) from error


def _name_order(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Key that sorts alike on file systems that compose accents and on those that split them."""
    return [unicodedata.normalize("NFC", part) for part in path.parts], path.parts


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and image files of a folder, links followed, each in order."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(folder / entry.name)
            elif Path(entry.name).suffix.lower() in _SUFFIXES:
                files.append(folder / entry.name)
    return sorted(folders, key=_name_order), sorted(files, key=_name_order)


def _image_files(folder: Path) -> list[Path]:
    return sorted(_walk(folder, ()), key=_name_order)


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterable[Path]:
    here = folder.resolve()
    if here in above:
        msg = f"{folder} is a link to a folder that it lies in; remove it"
        raise ValueError(msg)
    folders, files = _visible(folder)
    yield from files
    for inner in folders:
        yield from _walk(inner, (*above, here))


def _class_files(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """Names of the classes, files and their classes."""
    folders, stray = _visible(root)
    if stray:
        msg = f"{stray[0]} belongs to no class; with classes=True images lie in subfolders"
        raise ValueError(msg)
    files: list[Path] = []
    numbers: list[int] = []
    for number, folder in enumerate(folders):
        found = sorted(_walk(folder, (root.resolve(),)), key=_name_order)
        if not found:
            msg = f"{folder} is a class without an image; add images or remove it"
            raise ValueError(msg)
        files += found
        numbers += [number] * len(found)
    return [folder.name for folder in folders], files, numbers


def _undecodable(file: Path, error: Exception) -> str:
    return f"{file} cannot be decoded as an image: {error}"


def _check_header(file: Path) -> None:
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            _check_mode(image)
    except Exception as error:  # Pillow has no class of its own for a broken file
        raise ValueError(_undecodable(file, error)) from error


def _check_mode(image: PILImage) -> None:
    if image.mode not in _MODES:
        msg = f"its pixels are of Pillow's mode {image.mode}; 8 bits and 16-bit grey are allowed"
        raise ValueError(msg)


def _decode(file: Path, size: int, channels: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=_FORMATS) as opened:
            _check_mode(opened)
            image = _to_colour(ImageOps.exif_transpose(opened), "RGB" if channels == 3 else "L")
    except Exception as error:
        raise ValueError(_undecodable(file, error)) from error
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    # Cropped first: resize(box=…) would let the filter reach over the edges of the box.
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).reshape(size, size, channels).permute(2, 0, 1)


def _to_colour(image: PILImage, mode: str) -> PILImage:
    """The image in 8-bit RGB or grey."""
    from PIL import Image

    if image.mode in _GREY16:
        # Pillow's own conversion cuts off instead of scaling; 65535 = 257 · 255.
        fine = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((fine + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, colours).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
