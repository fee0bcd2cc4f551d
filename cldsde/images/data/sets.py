"""Data sets: images to train on and images held out, by functions for each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from cldsde.images.data.arrays import Layout, layout_of, read_arrays, to_nchw, torchvision_arrays
from cldsde.images.data.checks import as_folder, as_whole, check_choice, missing
from cldsde.images.data.folder import FolderImages
from cldsde.images.data.idx import fashion_folder, fashion_part, idx_file
from cldsde.images.data.images import ArrayImages, Images, Subset
from cldsde.images.files import file_lock
from cldsde.linear.checks import as_number

TorchvisionName = Literal[
    "CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "STL10", "SVHN", "USPS"
]


class DataSet(NamedTuple):
    """Images to train on, and images held out.

    Attributes
    ----------
    train, held_out
        Images of one shape and number of levels; None if no image is held out.
    """

    @property
    def all(self) -> list[Images]:
        """Both parts, or the one that there is."""
        return [part for part in self if part is not None]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out, and why."""
        return self.train.skipped

    train: Images
    held_out: Images | None


def digits(*, held_out: float = 0.2, seed: int = 0) -> DataSet:
    """Scikit-learn's 1,797 handwritten digits, 8×8 with 17 grey levels, split at random.

    Parameters
    ----------
    held_out
        Share of the images held out, below 1, or their number.
    seed
        Of the split.

    Raises
    ------
    ImportError
        If scikit-learn is missing.
    ValueError
        If either part would be empty.
    """
    _check_split(held_out, seed)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(missing("digits", "scikit-learn")) from error
    source = load_digits()
    images = ArrayImages(
        torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1),
        levels=17,
        labels=torch.from_numpy(source.target).to(torch.int64),
        classes=[str(name) for name in source.target_names],
    )
    return _split(images, held_out, seed)


def fashion_mnist(*, path: str | Path | None = None, size: Literal[16, 28, 32] = 28) -> DataSet:
    """Fashion-MNIST: 60,000 and 10,000 grey images of ten kinds of clothes (Xiao et al. 2017).

    Parameters
    ----------
    path
        Folder of the four IDX files under their published names, plain or compressed by gzip.
        None: the first that exists of ``$CLDSDE_DATA/fashion-mnist``,
        ``/usr/share/datasets/fashion-mnist`` (Debian's package dataset-fashion-mnist) and
        ``~/.cache/cldsde/fashion-mnist`` (in ``$XDG_CACHE_HOME``, where that is set).
    size
        28 as published; 32, with two rows and columns of black on every side; or 16, by a bicubic
        filter with antialiasing.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged or holds something else; the message names it.
    """
    check_choice(size, (16, 28, 32), "size")
    folder = fashion_folder() if path is None else as_folder(path)
    parts = [
        (
            idx_file(folder, f"{part}-images-idx3-ubyte"),
            idx_file(folder, f"{part}-labels-idx1-ubyte"),
        )
        for part in ("train", "t10k")
    ]
    return DataSet(*(fashion_part(images, labels, size) for images, labels in parts))


# Axes, and the options of the training and the test part.
_TRAIN = ({"train": True}, {"train": False})
_SPLIT = ({"split": "train"}, {"split": "test"})
_TORCHVISION: dict[str, tuple[Layout, tuple[dict[str, Any], dict[str, Any]]]] = {
    "CIFAR10": ("NHWC", _TRAIN),
    "CIFAR100": ("NHWC", _TRAIN),
    "FashionMNIST": ("NHW", _TRAIN),
    "KMNIST": ("NHW", _TRAIN),
    "MNIST": ("NHW", _TRAIN),
    "QMNIST": ("NHW", _TRAIN),
    "STL10": ("NCHW", _SPLIT),
    "SVHN": ("NCHW", _SPLIT),
    "USPS": ("NHW", _TRAIN),
}


def torchvision_set(*, name: TorchvisionName, path: str | Path, download: bool = False) -> DataSet:
    """A data set of torchvision, its test part held out.

    Parameters
    ----------
    name
        Of torchvision's class. Those are on offer that hold images of one size in memory and have
        a training and a test part.
    path
        Torchvision's ``root``: where the set lies, or where it is downloaded to.
    download
        Download the set if it is not there. Nothing is downloaded otherwise.

    Raises
    ------
    ImportError
        If torchvision is missing.
    FileNotFoundError
        If the set is not there, or damaged.
    """
    check_choice(name, get_args(TorchvisionName), "name")
    layout, options = _TORCHVISION[name]
    root = Path(path).expanduser()
    try:
        from torchvision import datasets
    except ImportError as error:
        msg = (
            "torchvision_set needs torchvision, which is missing; install the release that belongs "
            f"to torch {torch.__version__}: pip install torchvision"
        )
        raise ImportError(msg) from error
    try:
        with _one_download(root / name) if download else nullcontext():
            sources = [
                getattr(datasets, name)(str(root), download=download, **part) for part in options
            ]
    except Exception as error:  # of many classes, for files that lack or are damaged
        hint = "is the network there?" if download else "download=True would fetch it"
        msg = f"{name} is not in {root}, or is damaged there; {hint} (torchvision: {error})"
        raise FileNotFoundError(msg) from error
    parts = [torchvision_arrays(source, layout) for source in sources]
    names = getattr(sources[0], "classes", None)
    classes = names or 1 + max(int(labels.max()) for _, labels in parts)
    return DataSet(
        *(ArrayImages(images, labels=labels, classes=classes) for images, labels in parts)
    )


@contextmanager
def _one_download(place: Path) -> Iterator[None]:
    """Let one process download at a time: the others find what it brought."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(place, wait=True):
        yield


def image_folder(
    *,
    path: str | Path,
    size: int,
    channels: Literal[1, 3] = 3,
    classes: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    workers: int = 4,
    skip_damaged: bool = False,
) -> DataSet:
    """Image files of a folder, decoded when they are asked for, split at random.

    Parameters
    ----------
    path, size, channels, classes, workers, skip_damaged
        As for `FolderImages`, which says what becomes of each kind of file.
    held_out
        Share of the images held out, below 1, or their number.
    seed
        Of the split, which depends on nothing else but the number of images.

    Raises
    ------
    TypeError, ValueError, OSError
        As for `FolderImages`; and if either part would be empty.
    """
    _check_split(held_out, seed)
    images = FolderImages(
        path,
        size=size,
        channels=channels,
        classes=classes,
        workers=workers,
        skip_damaged=skip_damaged,
    )
    return _split(images, held_out, seed)


def array_file(
    *,
    path: str | Path,
    images: str | None = None,
    labels: str | None = None,
    layout: Layout = "auto",
    levels: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
) -> DataSet:
    """Images of a ``.npy`` or ``.npz`` file of NumPy, split at random.

    A ``.npy`` is mapped into memory, not read: it may be larger than memory. Nothing is unpickled.

    Parameters
    ----------
    path
        The file. The images are uint8.
    images
        Name of their array in a ``.npz``; None takes the only array of uint8 with three or four
        axes.
    labels
        Name of the array of classes in the ``.npz``, or, beside a ``.npy``, path of another
        ``.npy``: ``(N,)`` integers from 0.
    layout
        Order of the axes: images, channels, height, width. "auto" takes three axes for NHW, and
        four for NHWC or NCHW, whichever puts 1 or 3 in the place of C; shapes that allow more than
        one reading are refused.
    levels
        Number of grey levels.
    held_out
        Share of the images held out, below 1, or their number.
    seed
        Of the split.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError, ValueError
        If a file cannot be read, or holds something else.
    """
    _check_split(held_out, seed)
    found = array_images(path, images=images, labels=labels, layout=layout, levels=levels)
    return _split(found, held_out, seed)


def array_images(
    path: str | Path,
    *,
    images: str | None = None,
    labels: str | None = None,
    layout: Layout = "auto",
    levels: int = 256,
) -> ArrayImages:
    """All images of a ``.npy`` or ``.npz`` file of NumPy, in their order.

    Parameters
    ----------
    path, images, labels, layout, levels
        See `array_file`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError, ValueError
        If a file cannot be read, or holds something else.
    """
    check_choice(layout, get_args(Layout), "layout")
    levels = as_whole(levels, "levels", 2, 256)
    file = Path(path).expanduser()
    pixels, targets = read_arrays(file, images, labels)
    if pixels.dtype != np.uint8:
        msg = f"{file} must hold images of uint8; got {pixels.dtype}"
        raise TypeError(msg)
    if 0 in pixels.shape:
        msg = f"{file} must hold at least one image; got shape {pixels.shape}"
        raise ValueError(msg)
    tensor = to_nchw(torch.from_numpy(pixels), layout_of(pixels.shape, layout, file))
    if targets is not None and (targets.dtype.kind not in "iu" or targets.shape != (len(pixels),)):
        msg = (
            f"labels must be integers of shape ({len(pixels)},), one an image; got "
            f"{targets.dtype} of shape {targets.shape}"
        )
        raise ValueError(msg)
    numbers = None if targets is None else torch.from_numpy(targets.astype(np.int64))
    return ArrayImages(tensor, levels=levels, labels=numbers)


DATA_SETS: dict[str, Callable[..., DataSet]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "torchvision": torchvision_set,
    "folder": image_folder,
    "array": array_file,
}
"""Name of a data set in a configuration to what loads it; the options are its arguments."""
"""Functions that make a data set, by the names that a configuration file knows them by."""


def _check_split(held_out: float, seed: int) -> None:
    number = as_number(held_out, "held_out")
    if not (0 <= number < math.inf) or (number >= 1 and number != round(number)):
        msg = f"held_out must be a share below 1 or a number of images; got {held_out}"
        raise ValueError(msg)
    as_whole(seed, "seed", 0, 2**63 - 1)


def _split(images: Images, held_out: float, seed: int) -> DataSet:
    if held_out == 0:
        return DataSet(images, None)
    n = round(len(images) * held_out) if held_out < 1 else int(held_out)
    if not 0 < n < len(images):
        msg = (
            f"held_out must leave both parts an image; got {held_out}, that is {n} of the "
            f"{len(images)}"
        )
        raise ValueError(msg)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return DataSet(train=Subset(images, order[n:]), held_out=Subset(images, order[:n]))
