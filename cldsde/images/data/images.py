"""Images as bytes or numbers, with labels, found by row number, and images in NumPy's files."""

from __future__ import annotations

import copy
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from cldsde.images.checks import Scale, check_images, check_labels, check_values, listed
from cldsde.images.schema import Count, Levels, Range, checked
from cldsde.progress import progress_bar

Layout = Literal["auto", "NHW", "NHWC", "NCHW"]
Array = np.ndarray[Any, Any]
CHUNK = 2**22  # numbers that are held at once when a whole data set is read
_UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


class Images(ABC):
    """Images of one shape ``(C, H, W)``, as bytes or float32, found by row number.

    Bytes are 0 … levels − 1; of continuous numbers, ``levels`` is the range ``(low, high)``. Labels
    are classes ``(N,)``; ``classes`` is their number or their names, and None stands for the
    largest label + 1. ``skipped`` are the files that were left out, and the reasons.
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        *,
        levels: Scale = 256,
        labels: Tensor | None = None,
        classes: int | Sequence[str] | None = None,
    ) -> None:
        self.levels, self._rows = levels, torch.arange(count, device="cpu")
        self.shape: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.skipped: tuple[str, ...] = ()
        self.class_names = None if isinstance(classes, int | None) else tuple(classes)
        known = classes if isinstance(classes, int | None) else len(classes)
        self.classes = None if labels is None else check_labels(labels, count, known)
        self.labels = None if labels is None else labels.to("cpu", torch.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, rows: Tensor) -> Self:
        """Some rows ``(n,)`` in a given order; the images are shared, not copied."""
        some = copy.copy(self)
        some._rows = self._rows[rows]
        some.labels = None if self.labels is None else self.labels[rows]
        return some

    def load(self, rows: Tensor) -> Tensor:
        """Load rows ``(n,)`` int64, in any order and with repeats, as ``(n, C, H, W)``."""
        return self._read(self._rows[rows.cpu()])

    @property
    def decodes_once(self) -> bool:
        """Whether `keep_decoded` is going to take its time."""
        return False

    def keep_decoded(self, *, progress: bool = False) -> None:  # noqa: B027 -- nothing to do
        """Make later reads fast, of all subsets, if each read decodes the images."""

    def sums(self, *, progress: bool = False) -> Tensor:
        """Sums of each pixel over all images, for statistics: ``(2, C, H, W)``.

        Of bytes these are the sums of levels and of their squares, int64. Of continuous numbers
        they are the mean and the sum of squared deviations from it, float64.
        """
        rows = torch.arange(len(self), device="cpu")
        exact, seen = isinstance(self.levels, int), 0
        dtype = torch.int64 if exact else torch.float64
        found = torch.zeros((2, *self.shape), dtype=dtype, device="cpu")
        with progress_bar(None, shown=progress, total=len(rows), desc="statistics", delay=3) as bar:
            for some in torch.split(rows, max(1, CHUNK // found[0].numel())):
                x = self.load(some).to(torch.int32 if exact else torch.float64)
                if exact:
                    found += torch.stack([y.sum(0, dtype=torch.int64) for y in (x, x.square())])
                else:  # Chan et al. 1983: nothing cancels
                    mean, seen = x.mean(0), seen + len(x)
                    shift, share = mean - found[0], len(x) / seen
                    found[1] += (x - mean).square().sum(0) + shift**2 * (1 - share) * len(x)
                    found[0] += share * shift
                bar.update(len(some))
        return found

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """A new tensor of the images of at least one row of the source; all rows exist."""


class ArrayImages(Images):
    """Images in memory, ``(N, C, H, W)`` uint8, or floats if ``levels`` is their range."""

    @checked
    def __init__(
        self,
        images: Tensor,
        *,
        levels: Levels | Range = 256,
        labels: Tensor | None = None,
        classes: Count | Sequence[str] | None = None,
    ) -> None:
        check_images(images, "images", least=1)
        levels = levels if isinstance(levels, int) else (levels[0], levels[1])
        shape = images.shape[1:]
        for part in torch.split(images, max(1, CHUNK // math.prod(shape))):
            check_values(part, levels)
        super().__init__(len(images), shape, levels=levels, labels=labels, classes=classes)
        self._images = images

    def _read(self, rows: Tensor) -> Tensor:
        found = self._images[rows]
        return found.to(torch.float32) if found.is_floating_point() else found


@checked
def array_images(
    path: str | Path,
    *,
    images: str | None = None,
    labels: str | None = None,
    layout: Layout = "auto",
    levels: Levels = 256,
    value_range: Range | None = None,
    channels: Sequence[int] = (1, 3),
) -> ArrayImages:
    """All images of a ``.npy`` or ``.npz`` file of NumPy, in their order.

    A ``.npy`` is mapped into memory, not read: it may be larger than memory. Nothing is unpickled.

    Parameters
    ----------
    path
        The file. The images are uint8, or floating-point numbers in ``value_range``.
    images
        Name of their array in a ``.npz``; None takes the only array with three or four axes, or the
        only one of them that is uint8.
    labels
        Name of the array of classes in the ``.npz``, or, for a ``.npy``, path of another
        ``.npy``: ``(N,)`` integers from 0.
    layout
        Order of the axes: images, channels, height, width. "auto" takes three axes for NHW, and
        four for NHWC or NCHW, whichever has one of ``channels`` in the place of C; ambiguous shapes
        are errors.
    levels
        Number of grey levels.
    value_range
        Least and largest value of floating-point images, ``[low, high]``, which become −1 and 1.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If the file is missing, cannot be read, or holds something else.
    """
    file = Path(path).expanduser()
    pixels, targets = _read(file, images, labels)
    if 0 in pixels.shape:
        raise ValueError(f"{file} must hold at least one image; got shape {pixels.shape}")
    if pixels.dtype != np.uint8 if value_range is None else pixels.dtype.kind != "f":
        msg = f"{file} must hold images of uint8, or floating-point numbers with value_range; got "
        raise TypeError(f"{msg}{pixels.dtype}")
    order = _layout_of(pixels.shape, layout, file, channels)
    tensor = to_nchw(torch.from_numpy(pixels), order)
    if targets is not None and (targets.dtype.kind not in "iu" or targets.shape != (len(pixels),)):
        msg = f"labels must be integers of shape ({len(pixels)},), one per image; got "
        raise ValueError(f"{msg}{targets.dtype} of shape {targets.shape}")
    numbers = None if targets is None else torch.from_numpy(targets.astype(np.int64))
    return ArrayImages(tensor, levels=value_range or levels, labels=numbers)


def to_nchw(images: Tensor, layout: Layout) -> Tensor:
    """A view of the images with axes (N, C, H, W)."""
    images = images.unsqueeze(-1) if layout == "NHW" else images
    return images if layout == "NCHW" else images.permute(0, 3, 1, 2)


def _layout_of(shape: Sequence[int], layout: Layout, file: Path, known: Sequence[int]) -> Layout:
    """The order of the axes, found by the shape if it is not given."""
    if layout != "auto":
        if len(shape) != len(layout):
            msg = f"layout {layout} must have {len(layout)} axes; got shape {tuple(shape)} ({file})"
            raise ValueError(msg)
        return layout
    axes: Sequence[tuple[Layout, bool]] = ()
    # (H, W, 3) and (3, H, W) are one image each.
    if len(shape) == 3:
        axes = [("NHW", shape[0] not in known and shape[2] not in known)]
    elif len(shape) == 4:
        axes = [("NHWC", shape[3] in known), ("NCHW", shape[1] in known)]
    readings = [reading for reading, fits in axes if fits]
    if len(readings) != 1:
        msg = f"layout must be given, as NHW, NHWC or NCHW, for the shape of {file}; got "
        raise ValueError(f"{msg}{tuple(shape)}, which could be several or none of them")
    return readings[0]


def _read(path: Path, images: str | None, labels: str | None) -> tuple[Array, Array | None]:
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file; got {path}, which is no file")
    with path.open("rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive:
        return _members(path, images, labels)
    if images is not None:
        raise ValueError(f"images names an array of a .npz, which {path} is not; got {images!r}")
    beside = None if labels is None else Path(labels).expanduser()
    if beside is not None and not beside.is_file():
        beside = path.with_name(beside.name)  # as seen from another folder than the training's
    if beside is not None and not beside.is_file():
        raise FileNotFoundError(f"labels must be a .npy if path is one; {beside} is no file")
    return _npy(path), None if beside is None else _npy(beside)


def _npy(file: Path) -> Array:
    try:
        # Copy-on-write: torch needs writable memory, and the file must not change.
        array: Array = np.lib.format.open_memmap(file, mode="c")
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as .npy: {error}") from error
    return array


def _members(file: Path, images: str | None, labels: str | None) -> tuple[Array, Array | None]:
    try:
        # Opened here, because np.load leaves damaged archives open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = list(archive.files)
            wanted = [name for name in names if images is None or name in (images, labels)]
            arrays = {name: archive[name] for name in wanted}
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as .npz: {error}") from error
    for name, option in ((images, "images"), (labels, "labels")):
        if name is not None and name not in arrays:
            msg = f"{option} must be an array of {file}: {listed(names, 'or')}; got {name!r}"
            raise ValueError(msg)
    fits = {name for name, x in arrays.items() if x.ndim in (3, 4)}
    fits = {name for name in fits if arrays[name].dtype == np.uint8} or fits
    found = [images] if images is not None else sorted(fits - {labels})
    if len(found) != 1:
        msg = f"images must name the array of images, for {len(found)} arrays of {file} could be "
        raise ValueError(f"{msg}it; it holds {listed(names)}")
    return arrays[found[0]], None if labels is None else arrays[labels]
