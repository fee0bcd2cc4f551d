"""Arrays of NumPy's files and of torchvision's sets, and the order of their axes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cldsde.images.data.checks import listed, what_instead

Layout = Literal["auto", "NHW", "NHWC", "NCHW"]
Array = np.ndarray[Any, Any]
_UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


def layout_of(shape: Sequence[int], layout: Layout, file: Path) -> Layout:
    """The order of the axes, found by the shape where it is not given."""
    if layout != "auto":
        if len(shape) != len(layout):
            msg = f"layout {layout} must have {len(layout)} axes; got shape {tuple(shape)} ({file})"
            raise ValueError(msg)
        return layout
    readings: list[Layout] = []
    if len(shape) == 3:
        # (H, W, 3) is one image, and (3, H, W) as well.
        readings = ["NHW"] if shape[0] not in (1, 3) and shape[2] not in (1, 3) else []
    elif len(shape) == 4:
        if shape[3] in (1, 3):
            readings.append("NHWC")
        if shape[1] in (1, 3):
            readings.append("NCHW")
    if len(readings) != 1:
        msg = (
            f"layout must be given, as NHW, NHWC or NCHW, for the shape of {file}; got "
            f"{tuple(shape)}, which could be several or none of them"
        )
        raise ValueError(msg)
    return readings[0]


def to_nchw(images: Tensor, layout: Layout) -> Tensor:
    """The images with axes (N, C, H, W), not copied."""
    if layout == "NHW":
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2) if layout == "NHWC" else images


def torchvision_arrays(source: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and classes (N,) of a data set of torchvision."""
    images = torch.from_numpy(np.ascontiguousarray(source.data))
    labels = torch.as_tensor(source.targets if hasattr(source, "targets") else source.labels)
    if labels.ndim == 2:  # QMNIST tells more than the class
        labels = labels[:, 0]
    return to_nchw(images, layout), labels.to(torch.int64)


def read_arrays(path: Path, images: str | None, labels: str | None) -> tuple[Array, Array | None]:
    """The arrays of images and labels of a file."""
    if not path.is_file():
        msg = f"path must be a file; got {path}, which {what_instead(path)}"
        raise FileNotFoundError(msg)
    with path.open("rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive:
        return _members(path, images, labels)
    if images is not None:
        msg = f"images names an array of a .npz, which {path} is not; got {images!r}"
        raise ValueError(msg)
    if labels is None:
        return _npy(path), None
    beside = Path(labels).expanduser()
    if not beside.is_file():
        msg = f"labels must be a .npy where path is one; got {beside}, which {what_instead(beside)}"
        raise FileNotFoundError(msg)
    return _npy(path), _npy(beside)


def _npy(file: Path) -> Array:
    try:
        # Copy-on-write: torch wants memory that it may write to, and the file stays as it is.
        array: Array = np.lib.format.open_memmap(file, mode="c")
    except _UNREADABLE as error:
        msg = f"{file} cannot be read as .npy: {error}"
        raise ValueError(msg) from error
    return array


def _members(file: Path, images: str | None, labels: str | None) -> tuple[Array, Array | None]:
    try:
        # Opened here, since np.load leaves damaged archives open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = list(archive.files)
            wanted = (
                names if images is None else [name for name in names if name in (images, labels)]
            )
            arrays = {name: archive[name] for name in wanted}
    except _UNREADABLE as error:
        msg = f"{file} cannot be read as .npz: {error}"
        raise ValueError(msg) from error
    for name, option in ((images, "images"), (labels, "labels")):
        if name is not None and name not in arrays:
            msg = f"{option} must be an array of {file}: {listed(names, 'or')}; got {name!r}"
            raise ValueError(msg)
    if images is None:
        found = [
            name
            for name, array in arrays.items()
            if name != labels and array.dtype == np.uint8 and array.ndim in (3, 4)
        ]
        if len(found) != 1:
            msg = (
                f"images must name the array of images, for {len(found)} arrays of {file} could "
                f"be it; it holds {listed(names)}"
            )
            raise ValueError(msg)
        (images,) = found
    return arrays[images], None if labels is None else arrays[labels]
