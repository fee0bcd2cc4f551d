"""Pictures of files that are decoded once, at the size of a training, into a file of a cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor
from tqdm import tqdm

from cldsde.files import file_lock, write_whole
from cldsde.images.checks import Scale
from cldsde.images.data.images import Array, Images
from cldsde.images.data.pictures import Packed, find_pictures, fitted, open_picture, read_picture
from cldsde.images.schema import Count, Flag, Positive, checked
from cldsde.messages import brief
from cldsde.progress import progress_bar

_RULE = 1  # of `_decode`; another number for each change of its results
_CHUNK = 64  # pictures that are lost at most if decoding is interrupted
_GIB = 2**30


def cache_folder() -> Path:
    """Folder of files that cldsde keeps for a user."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cldsde"
    return Path(os.environ.get("CLDSDE_CACHE") or base).expanduser()


class FolderImages(Images):
    """The pictures of a folder and its subfolders, a zip archive, or a saved data set.

    Parameters
    ----------
    path
        The folder, the ``.zip`` file, or the folder to which the library datasets saved a data set
        with one column of pictures. An outer folder of all files in an archive does not count.
    size
        Height and width. A picture is cropped to its central square, which is resized by Pillow's
        bicubic filter with antialiasing.
    channels, bits
        3 for RGB, or 1 for grey, which may have 16 bits: continuous numbers from 0 to 65,535.
    classes
        Whether the subfolders are classes: 0, 1, … in the order of their names. In a saved data set
        the classes are its column of the type ``ClassLabel``.
    workers
        Threads that decode.
    skip_damaged
        Decode every picture at once, and leave out those that cannot be decoded.
    cache, cache_gib
        Folder of decoded pictures, and its largest size in GiB; ``"auto"`` is the folder
        ``decoded`` in cldsde's cache. None decodes pictures whenever they are needed.

    Raises
    ------
    ValueError, OSError
        If an option is not allowed, there is no image, an image belongs to no class, links form a
        cycle, or something cannot be read.

    Notes
    -----
    Files are selected by their suffix (BMP, GIF, JPEG, PNG, PPM, TIFF, WebP), in either case. Names
    that start with a dot are left out; links are followed. Rows are in the order of the names of
    folders and file, by code points of their NFC form.

    EXIF orientation is applied. Transparent images are laid over white. Grey becomes three equal
    channels, and RGB becomes grey by Pillow's (Rec. 601) weights. 16-bit grey is scaled by 1/257
    and rounded, unless ``bits`` is 16. CMYK is converted without its colour profile. Images of
    32-bit or floating-point pixels are errors, because their scale is not known. Of several frames
    the first is used.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        *,
        size: Count,
        channels: Literal[1, 3] = 3,
        bits: Literal[8, 16] = 8,
        classes: Flag = False,
        workers: Count = 4,
        skip_damaged: Flag = False,
        cache: str | None = "auto",
        cache_gib: Positive = 50,
    ) -> None:
        if bits == 16 and channels != 1:
            raise ValueError("bits must be 8 for colours, of which Pillow reads 8 bits; got 16")
        all_files, labels, names, facts, others = find_pictures(path, classes=classes)
        self._all, self._workers, self._limit = tuple(all_files), workers, cache_gib * _GIB
        self._shape = (len(self._all), channels, size, size)
        self._dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
        self._bytes = math.prod(self._shape) * self._dtype.itemsize
        self._place: Path | None = None
        if cache is not None:
            # Trainings on the same files, decoded alike, share a file.
            decoder = [PIL.__version__, *map(features.version, ("libjpeg_turbo", "zlib", "webp"))]
            key = json.dumps([_RULE, decoder, self._shape, bits, facts])
            folder = cache_folder() / "decoded" if cache == "auto" else Path(cache).expanduser()
            self._place = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.rows"
        known = self._known_damaged()
        damaged = self._damaged(whole=skip_damaged) if known is None else known
        self._left_out, self._checked = damaged, skip_damaged or known is not None
        kept = [row for row in range(len(self._all)) if row not in damaged]
        if damaged and not (skip_damaged and kept):
            raise ValueError(self._described(damaged))
        numbers = None if labels is None else torch.tensor(labels, device="cpu")
        levels: Scale = 256 if bits == 8 else (0.0, 65535.0)
        shape = self._shape[1:]
        super().__init__(len(self._all), shape, levels=levels, labels=numbers, classes=names)
        self._rows = self._rows[kept]
        self.files = tuple(self._all[row] for row in kept)
        self.labels = None if numbers is None else numbers[kept]
        self.skipped = (*damaged.values(), *others)
        if self._place is not None and self._is_whole:
            with suppress(OSError):  # of a folder of another user
                os.utime(self._place)

    @property
    def decodes_once(self) -> bool:
        """Whether `keep_decoded` is going to decode the pictures."""
        if self._place is None or self._is_whole or self._bytes > self._limit:
            return False
        return os.access(next(x for x in self._place.parents if x.exists()), os.W_OK)

    def keep_decoded(self, *, progress: bool = False) -> None:
        """Decode all pictures into a file of the cache, from which they are read from now on.

        Of several processes one decodes, and an interrupted call resumes. If pictures cannot be
        kept, a note on stderr says why.
        """
        place = self._place
        if place is None or self._is_whole:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(place, wait=True):
                if not self._is_whole:
                    self._fill(place, progress=progress)
        except OSError as error:
            msg = f"note: decoded pictures cannot be kept in {place.parent} ({brief(error)}), and "
            msg += "are decoded again in each pass; data.options.cache names another folder"
            tqdm.write(msg, file=sys.stderr)

    def sums(self, *, progress: bool = False) -> Tensor:
        """See `Images`; sums of decoded pictures are kept in the cache."""
        if self._place is None or not self._is_whole:
            return super().sums(progress=progress)
        name = hashlib.sha256(self._rows.numpy().tobytes()).hexdigest()[:16]
        file = self._place.with_suffix(f".{name}.npy")
        with suppress(OSError, ValueError, EOFError):
            return torch.from_numpy(np.load(file))
        found = super().sums(progress=progress)
        with suppress(OSError):
            write_whole(file, lambda path: np.save(path, found.numpy()))
        return found

    @property
    def _is_whole(self) -> bool:
        """Whether the file of decoded pictures is there, to its last byte."""
        with suppress(OSError):
            return self._place is not None and self._place.stat().st_size == self._bytes
        return False

    def _fill(self, place: Path, *, progress: bool) -> None:
        """Write the file of decoded pictures, from where an earlier call was interrupted."""
        part, count = place.with_suffix(".part"), self._shape[0]
        size = self._bytes // count
        try:
            _make_room(place, self._bytes, self._limit)
            if self._checked:
                self._keep_damaged(place)
            with part.open("ab") as target:
                done = min(count, target.tell() // size)
                target.truncate(done * size)
                options = {"total": count, "initial": done, "desc": "decoding", "unit": "picture"}
                with progress_bar(None, shown=progress, **options) as bar:
                    for first in range(done, count, _CHUNK):
                        rows = range(first, min(first + _CHUNK, count))
                        target.write(self._pixels(rows).tobytes())
                        target.flush()
                        os.fsync(target.fileno())
                        bar.update(len(rows))
            self._keep_damaged(place)
            part.replace(place)
        except OSError:
            part.unlink(missing_ok=True)  # a full disk is needed for other files
            raise

    def _keep_damaged(self, place: Path) -> None:
        """Keep what a check of all pictures found, so that the next start need not look."""
        text = json.dumps(self._left_out)
        write_whole(place.with_suffix(".json"), lambda file: file.write_text(text))

    def _read(self, rows: Tensor) -> Tensor:
        if self._is_whole:
            pixels = _mapped(self._place, self._dtype, self._shape)[rows.numpy()]
        else:
            pixels = self._pixels(rows.tolist())
        return torch.from_numpy(pixels if self._dtype == np.uint8 else pixels.astype(np.float32))

    def _pixels(self, rows: Sequence[int]) -> Array:
        """Decoded pictures; those that are left out are black."""

        def decoded(row: int) -> Array:
            if row in self._left_out:
                return np.zeros(self._shape[1:], self._dtype)
            return _decode(self._all[row], self._shape[1:], self._dtype)

        try:
            with ThreadPoolExecutor(min(self._workers, len(rows))) as pool:
                return np.stack(list(pool.map(decoded, rows)))
        except ValueError:
            # A damaged file is seldom alone: name all at once.
            if damaged := self._damaged(whole=True):
                raise ValueError(self._described(damaged)) from None
            raise

    def _damaged(self, *, whole: bool) -> dict[int, str]:
        """Pictures that cannot be decoded, and why; their headers are read, or all of them."""

        def reason(file: Path | Packed) -> str | None:
            try:
                with nullcontext(read_picture(file)) if whole else open_picture(file):
                    pass
            except ValueError as error:
                return str(error)
            return None

        # A pool per call takes a fraction of a millisecond, and can be pickled and forked.
        with ThreadPoolExecutor(min(self._workers, len(self._all))) as pool:
            texts = pool.map(reason, self._all)
            options = {"total": len(self._all), "desc": "checking", "unit": "picture", "delay": 3}
            bar = progress_bar(texts, shown=True, **options)
            return {row: text for row, text in enumerate(bar) if text is not None}

    def _described(self, damaged: Mapping[int, str]) -> str:
        first, names = next(iter(damaged.values())), [str(self._all[row]) for row in damaged]
        others = f"; nor can {', '.join(names[1:10])}" if names[1:] else ""
        more = f" and {len(names) - 10} more" if names[10:] else ""
        return f"{first}{others}{more}. skip_damaged = true leaves them out"

    def _known_damaged(self) -> dict[int, str] | None:
        """Damaged pictures that an earlier start found; None if none looked at all of them."""
        with suppress(OSError, ValueError, AttributeError):
            if self._place is not None:
                known = json.loads(self._place.with_suffix(".json").read_text(encoding="utf-8"))
                return {int(row): str(text) for row, text in known.items()}
        return None


def _decode(file: Path | Packed, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    mode = "F" if dtype == np.uint16 else "RGB" if shape[0] == 3 else "L"
    pixels = np.asarray(fitted(read_picture(file, mode), shape[1], shape[2]))
    if mode == "F":  # the filter reaches over both ends
        pixels = pixels.round().clip(0, 65535).astype(np.uint16)
    return np.moveaxis(pixels.reshape(*shape[1:], -1), -1, 0)


@lru_cache
def _mapped(place: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return np.memmap(place, dtype, mode="r", shape=shape)


def _make_room(place: Path, needed: int, limit: float) -> None:
    """Delete the files unused for the longest time; raise an OSError if there is no room then."""
    if needed > limit:
        allowed = f"data.options.cache_gib allows {limit / _GIB:g}"
        raise OSError(f"they need {needed / _GIB:.3g} GiB, and {allowed}")
    found = place.parent.glob(f"{'[0-9a-f]' * 32}.*")
    large = [x for x in found if x.suffix in {".rows", ".part"}]  # with small ones beside them
    sizes = {x: x.stat().st_size for x in sorted(large, key=lambda x: x.stat().st_mtime)}
    own = sum(sizes.pop(place.with_suffix(suffix), 0) for suffix in (".rows", ".part"))
    total = needed + sum(sizes.values())
    for file, size in sizes.items():
        if total > limit:
            total -= size
            for each in place.parent.glob(f"{file.stem}.*"):
                each.unlink(missing_ok=True)
    free = own + shutil.disk_usage(place.parent).free
    if needed > 0.9 * free:
        raise OSError(f"they need {needed / _GIB:.3g} GiB, and {free / _GIB:.3g} are free")
