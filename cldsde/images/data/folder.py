"""Images of a folder, decoded when they are needed."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from cldsde.images.checks import listed, what_instead
from cldsde.images.data.images import Images
from cldsde.images.data.pictures import SUFFIXES, open_picture, pixels_of_picture, read_picture
from cldsde.images.schema import Count, Flag, checked


class FolderImages(Images):
    """The image files of a folder and its subfolders, decoded when they are needed.

    Every file is opened once when the object is made, which reads its header.

    Parameters
    ----------
    path
        The folder.
    size
        Height and width. An image is cropped to its central square, which is resized by Pillow's
        bicubic filter with antialiasing; a square of that size is not changed.
    channels
        3 for RGB, 1 for grey.
    classes
        Whether the subfolders are classes: 0, 1, … in the order of their names.
    workers
        Threads that decode.
    skip_damaged
        Decode every file at once, and leave out those that cannot be decoded.

    Attributes
    ----------
    files : tuple of Path
        The file of each row.
    skipped : tuple of str
        Files left out, and the reason: undecodable files, and files with other suffixes.

    Raises
    ------
    ValueError, OSError
        If an option is not allowed, the folder holds no image, a class has none, an image belongs
        to no class, links form a cycle, or a file or folder cannot be read.

    Notes
    -----
    Files are selected by their suffix (BMP, GIF, JPEG, PNG, PPM, TIFF, WebP), in either case. Names
    that start with a dot are left out; links are followed. Rows are in the order of the names of
    folders and file, by code points of their NFC form, whatever the file system.

    EXIF orientation is applied. Transparent images are laid over white. Grey becomes three equal
    channels, and RGB becomes grey by Pillow's (Rec. 601) weights. 16-bit grey is scaled by 1/257
    and rounded. CMYK is converted without its colour profile. Images of 32-bit or floating-point
    pixels are errors, because their scale is not known. Of several frames the first is used.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        *,
        size: Count,
        channels: Literal[1, 3] = 3,
        classes: Flag = False,
        workers: Count = 4,
        skip_damaged: Flag = False,
    ) -> None:
        self._workers = workers
        root = as_folder(path)
        found, others = _found(root)
        if not found:
            msg = f"{root} holds no image; files that end in {listed(sorted(SUFFIXES))} count"
            raise ValueError(msg)
        names, numbers = _classes(root, found) if classes else (None, [0] * len(found))
        damaged = self._damaged(found, whole=skip_damaged)
        self.files = tuple(file for file in found if file not in damaged)
        if damaged and not (skip_damaged and self.files):
            raise ValueError(_described(damaged))
        kept = [number for file, number in zip(found, numbers, strict=True) if file not in damaged]
        labels = None if names is None else torch.tensor(kept)
        super().__init__(len(kept), (channels, size, size), labels=labels, classes=names)
        counts = (f"{count} files that end in {suffix}" for suffix, count in sorted(others.items()))
        self.skipped = (*damaged.values(), *counts)

    def _read(self, rows: Tensor) -> Tensor:
        channels, size, _ = self.shape
        files = [self.files[row] for row in rows.tolist()]
        try:
            with ThreadPoolExecutor(min(self._workers, len(rows))) as pool:
                return torch.stack(list(pool.map(partial(_decode, size, channels), files)))
        except ValueError:
            # A damaged file is seldom alone: name all at once.
            if damaged := self._damaged(self.files, whole=True):
                raise ValueError(_described(damaged)) from None
            raise

    def _damaged(self, files: Sequence[Path], *, whole: bool) -> dict[Path, str]:
        """Files that cannot be decoded, and why; their headers are read, or all of them."""

        def reason(file: Path) -> str | None:
            try:
                with nullcontext(read_picture(file)) if whole else open_picture(file):
                    pass
            except ValueError as error:
                return str(error)
            return None

        # A pool per call takes a fraction of a millisecond, and can be pickled and forked.
        with ThreadPoolExecutor(min(self._workers, len(files))) as pool:
            found = zip(files, pool.map(reason, files), strict=True)
            return {file: text for file, text in found if text is not None}


def as_folder(path: str | Path) -> Path:
    """The path of a folder that exists."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        msg = f"path must be a folder; got {folder}, which {what_instead(folder)}"
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(msg)
    return folder


def _described(damaged: Mapping[Path, str]) -> str:
    """Damaged files in one line, ten at most."""
    first, *others = damaged.values()
    if not others:
        return f"{first}; skip_damaged = true leaves it out"
    names = ", ".join(str(file) for file in list(damaged)[1:10])
    more = f"{len(others)} others: {names}{', …' if len(damaged) > 10 else ''}"
    return f"{first}; nor can {more}. skip_damaged = true leaves them out"


def _name_order(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Sorting key that does not depend on how a file system composes accents."""
    return [unicodedata.normalize("NFC", part) for part in path.parts], path.parts


def _found(root: Path) -> tuple[list[Path], Counter[str]]:
    """Image files of a folder and its subfolders in order, and numbers of other files by suffix."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    for name, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        place = Path(name)
        above = [root / part for part in place.relative_to(root).parents] if place != root else []
        if place.resolve() in (folder.resolve() for folder in above):
            raise ValueError(f"{place} is a link to a folder that it lies in; remove it")
        folders[:] = [folder for folder in folders if folder[0] != "."]
        for file in (place / name for name in names if name[0] != "."):
            if file.suffix.lower() in SUFFIXES:
                files.append(file)
            else:
                others[file.suffix or "no suffix"] += 1
    return sorted(files, key=_name_order), others


def _raise(error: OSError) -> None:
    raise error


def _classes(root: Path, files: Sequence[Path]) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class of each file."""
    visible = (x for x in root.iterdir() if x.is_dir() and x.name[0] != ".")
    folders = sorted(visible, key=_name_order)
    numbers = {folder.name: i for i, folder in enumerate(folders)}
    owners = [file.relative_to(root).parts[0] for file in files]
    for file, owner in zip(files, owners, strict=True):
        if owner not in numbers:
            msg = f"{file} belongs to no class; with classes=True images lie in subfolders"
            raise ValueError(msg)
    for name in sorted(numbers.keys() - set(owners)):
        raise ValueError(f"{root / name} is a class without an image; add images or remove it")
    return list(numbers), [numbers[owner] for owner in owners]


def _decode(size: int, channels: int, file: Path) -> Tensor:
    image = read_picture(file, "RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    # Cropped first: resize(box=…) would let the filter reach over the edges of the box.
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return pixels_of_picture(square)
