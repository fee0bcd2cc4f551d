"""Images in the array files of NumPy, and the order of their axes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cldsde.images.checks import listed, what_instead
from cldsde.images.data.images import ArrayImages
from cldsde.images.schema import Levels, Range, checked

Layout = Literal["auto", "NHW", "NHWC", "NCHW"]
Array = np.ndarray[Any, Any]
_UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


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
    """All images of a ``.npy`` or ``.npz`` file of NumPy, in their order; see `array_file`.

    ``channels`` are the numbers of channels by which the layout "auto" finds their axis.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If there is no such file, or it cannot be read or holds something else.
    """
    file = Path(path).expanduser()
    pixels, targets = _read(file, images, labels)
    if 0 in pixels.shape:
        raise ValueError(f"{file} must hold at least one image; got shape {pixels.shape}")
    if pixels.dtype.kind == "f" and value_range is None:
        msg = f"{file} must hold images of uint8, or have a value_range; got {pixels.dtype} in "
        raise ValueError(f"{msg}{pixels.min():g} to {pixels.max():g}")
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
        raise FileNotFoundError(f"path must be a file; got {path}, which {what_instead(path)}")
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
        msg = f"labels must be a .npy if path is one; got {beside}, which {what_instead(beside)}"
        raise FileNotFoundError(msg)
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
