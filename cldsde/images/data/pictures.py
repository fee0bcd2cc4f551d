"""Pictures in folders, zip archives and data sets that the library datasets saved, read safely.

Formats and sizes are limited, and files are regular.
"""

from __future__ import annotations

import io
import os
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

from cldsde.images.checks import listed
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

_LARGEST = 2**30  # bytes of a picture in an archive


class Packed(NamedTuple):
    """A picture inside of another file, and a ``stamp`` that changes with its content."""

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


Names = tuple[str, ...]
Files = list[tuple[Names, Path | Packed]]
"""Pictures and their names, folders first."""


def find_pictures(
    path: str | Path, *, classes: bool
) -> tuple[Sequence[Path | Packed], Sequence[int] | None, Sequence[str] | None, Any, list[str]]:
    """Pictures of a folder, a zip archive or a saved data set in their order; see `FolderImages`.

    Also returned are their classes and the names of these, or None; facts that change with the
    contents of the pictures; and what other files there are.
    """
    place = Path(path).expanduser()
    packed = place.suffix.lower() == ".zip" and place.is_file()
    root = place if packed else as_folder(place)
    names = {x.name for x in root.iterdir()} if root.is_dir() else set()
    if names >= {"dataset_info.json", "state.json"} or "dataset_dict.json" in names:
        stamps = [(x.name, _stamp(x)) for x in sorted(root.glob("*.arrow"))]
        return *_in_table(root, classes=classes), [str(root.resolve()), stamps], []
    found = [*_in_archive(root)] if packed else [*_in_folder(root)]
    files: Files = [x for x in found if PurePath(x[0][-1]).suffix.lower() in SUFFIXES]
    endings = Counter(PurePath(x[0][-1]).suffix for x in found).items()
    others = [f"{n} files that end in {x!r}" for x, n in endings if x.lower() not in SUFFIXES]
    # An outer folder of all pictures in an archive does not count.
    while packed and len({x[0] for x, _ in files}) == 1 and min(len(x) for x, _ in files) > 2:
        files = [(parts[1:], file) for parts, file in files]
    if not files:
        msg = f"{root} holds no image; files that end in {listed(sorted(SUFFIXES))} count"
        raise ValueError(msg)
    files.sort(key=lambda one: _name_order(one[0]))
    kinds, labels = _classes(files) if classes else (None, None)
    # Files of the same names, sizes and times may be in two places.
    facts = [str(root.resolve()), [(name, _stamp(file)) for name, file in files]]
    return [file for _, file in files], labels, kinds, facts, others


def as_folder(path: str | Path) -> Path:
    """The path of a folder that exists."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder; got {folder}, which is no folder")
    return folder


def _stamp(file: Any) -> Any:
    """Everything that changes with a file: its size and time, or those in an archive."""
    if isinstance(file, Packed):
        return file.stamp
    try:
        return file.stat().st_size, file.stat().st_mtime_ns
    except OSError:  # the error is reported when it is opened
        return None


def _name_order(parts: Names) -> tuple[list[str], Names]:
    """Sorting key that does not depend on how a file system composes accents."""
    return [unicodedata.normalize("NFC", part) for part in parts], parts


def _in_folder(root: Path) -> Iterator[tuple[Names, Path]]:
    for name, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        place = Path(name)
        above = [root / part for part in place.relative_to(root).parents]
        if place.resolve() in (folder.resolve() for folder in above):
            raise ValueError(f"{place} is a link to a folder that it lies in; remove it")
        folders[:] = [folder for folder in folders if folder[0] != "."]
        for file in (place / name for name in names if name[0] != "."):
            yield file.relative_to(root).parts, file


def _raise(error: OSError) -> None:
    raise error


def _in_archive(archive: Path) -> Iterator[tuple[Names, Packed]]:
    stamp = _stamp(archive)
    try:
        entries = _opened(archive, stamp, os.getpid()).infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{archive} cannot be read as a zip archive: {error}") from error
    for names, x in {PurePosixPath(x.filename).parts: x for x in entries}.items():
        if not (x.is_dir() or any(part.startswith(("__MACOSX", ".")) for part in names)):
            read = partial(_member, archive, stamp, x.filename)
            yield names, Packed(f"{archive}, {x.filename}", read, (x.file_size, x.CRC))


@lru_cache(maxsize=8)
def _opened(archive: Path, stamp: Any, process: int) -> zipfile.ZipFile:
    """An archive, open once per process: processes that share a file share its position."""
    del stamp, process
    return zipfile.ZipFile(archive)


def _member(archive: Path, stamp: Any, name: str) -> bytes:
    source = _opened(archive, stamp, os.getpid())
    if source.getinfo(name).file_size > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST // 2**20} MiB")
    return source.read(name)


def _classes(files: Files) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class of each file."""
    for names, file in files:
        if len(names) == 1:
            msg = f"{file} belongs to no class; with classes=True images lie in subfolders"
            raise ValueError(msg)
    owners = [names[0] for names, _ in files]
    classes = sorted({*owners}, key=lambda name: _name_order((name,)))
    numbers = {name: i for i, name in enumerate(classes)}
    return classes, [numbers[owner] for owner in owners]


def _in_table(root: Path, *, classes: bool) -> tuple[list[Packed], Any, Any]:
    """Pictures of a saved data set, their classes and the names of these."""
    table = _table(root, os.getpid())
    kinds = {name: type(kind).__name__ for name, kind in table.features.items()}
    wanted = [("Image", "of pictures"), *([("ClassLabel", "of classes")] if classes else [])]
    found = []
    for kind, text in wanted:
        columns = [name for name, own in kinds.items() if own == kind]
        if len(columns) != 1:
            msg = f"{root} must have one column {text} ({kind}); it has {len(columns)} among "
            raise ValueError(f"{msg}{listed([*kinds])}. Select columns and save it again")
        found += columns
    reads = [partial(_cell, root, found[0], row) for row in range(len(table))]
    files = [Packed(f"{root}, row {i}", read) for i, read in enumerate(reads)]
    if not files:
        raise ValueError(f"{root} holds no image")
    if not classes:
        return files, None, None
    return files, [int(x) for x in table[found[1]]], table.features[found[1]].names


@lru_cache(maxsize=8)
def _table(root: Path, process: int) -> Any:
    """A saved data set, whose pictures are not decoded; once per process."""
    del process
    try:
        import datasets
    except ImportError as error:
        msg = f"{root} needs the library datasets, which saved it: pip install datasets"
        raise ImportError(msg) from error
    try:
        table = datasets.load_from_disk(str(root))
    except Exception as error:  # of many classes, for damaged folders
        raise ValueError(f"{root} cannot be loaded by datasets: {brief(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        msg = f"path must name the folder of a split in {root}: {listed([*table], 'or')}"
        raise ValueError(msg)  # noqa: TRY004 -- the value of a path
    for name, kind in table.features.items():
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _cell(root: Path, column: str, row: int) -> bytes:
    found = _table(root, os.getpid())[row][column]
    if found is None:
        raise ValueError("there is no picture")
    content: bytes | None = found["bytes"]
    return Path(found["path"]).read_bytes() if content is None else content
