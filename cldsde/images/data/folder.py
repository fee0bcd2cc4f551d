"""Images of a folder, decoded when they are asked for."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cldsde.images.data.checks import as_folder, as_whole, check_choice, listed, missing
from cldsde.images.data.images import Images
from cldsde.images.data.pictures import SUFFIXES, open_picture, pixels_of_picture, read_picture

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
        skip_damaged: bool = False,
    ) -> None:
        size = as_whole(size, "size", 1)
        check_choice(channels, (1, 3), "channels")
        self._workers = as_whole(workers, "workers", 1)
        _import_pillow()
        root = as_folder(path)
        names: list[str] | None = None
        numbers: list[int] | None = None
        if classes:
            names, files, numbers = _class_files(root)
        else:
            files = _image_files(root)
        if not files:
            msg = f"{root} holds no image; files that end in {listed(sorted(SUFFIXES))} count"
            raise ValueError(msg)
        damaged = self._damaged(files, _check_whole if skip_damaged else _check_header)
        if damaged and not skip_damaged:
            raise ValueError(_told(damaged))
        kept = [i for i, file in enumerate(files) if file not in damaged]
        if not kept:
            raise ValueError(_told(damaged))
        labels = None if numbers is None else torch.tensor([numbers[i] for i in kept])
        super().__init__(len(kept), (channels, size, size), labels=labels, classes=names)
        self.files = tuple(files[i] for i in kept)
        self.skipped = (*damaged.values(), *_other_files(root))

    def _read(self, rows: Tensor) -> Tensor:
        channels, size, _ = self.shape
        batch = torch.empty((len(rows), *self.shape), dtype=torch.uint8)

        def decode(place: int) -> None:
            batch[place] = _decode(self.files[int(rows[place])], size, channels)

        try:
            with ThreadPoolExecutor(min(self._workers, len(rows))) as pool:
                for _ in pool.map(decode, range(len(rows))):
                    pass
        except ValueError:
            # One that cannot be decoded is seldom alone: all are named at once.
            raise ValueError(_told(self._damaged(self.files, _check_whole))) from None
        return batch

    def _damaged(self, files: Sequence[Path], check: Callable[[Path], object]) -> dict[Path, str]:
        """Files that cannot be decoded, and why.

        A pool of its own takes a fraction of a millisecond, and nothing is left over that could
        not be pickled or would be broken by a fork.
        """

        def reason(file: Path) -> str | None:
            try:
                check(file)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(min(self._workers, len(files))) as pool:
            found = zip(files, pool.map(reason, files), strict=True)
            return {file: text for file, text in found if text is not None}


def _told(damaged: Mapping[Path, str]) -> str:
    """Damaged files in one line, ten at most."""
    first, *others = damaged.values()
    if not others:
        return f"{first}; skip_damaged = true leaves it out"
    names = ", ".join(str(file) for file in list(damaged)[1:10])
    more = ", …" if len(damaged) > 10 else ""
    return (
        f"{first}; nor can {len(others)} others: {names}{more}. skip_damaged = true leaves them out"
    )


def _other_files(root: Path) -> list[str]:
    """How many files have suffixes of no picture, by suffix."""
    counts = Counter(
        file.suffix or "no suffix"
        for file in root.rglob("*")
        if file.suffix.lower() not in SUFFIXES and file.is_file() and file.name[0] != "."
    )
    return [f"{count} files that end in {suffix}" for suffix, count in sorted(counts.items())]


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
            elif Path(entry.name).suffix.lower() in SUFFIXES:
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


def _check_header(file: Path) -> None:
    with open_picture(file):
        pass


def _check_whole(file: Path) -> None:
    with open_picture(file) as image:
        image.load()


def _decode(file: Path, size: int, channels: int) -> Tensor:
    from PIL import Image

    image = read_picture(file, "RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    # Cropped first: resize(box=…) would let the filter reach over the edges of the box.
    square = image.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return pixels_of_picture(square)
