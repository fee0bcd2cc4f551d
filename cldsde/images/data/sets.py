"""Data sets: images to train on and images held out, one function per source."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from cldsde.files import file_lock
from cldsde.images.checks import listed
from cldsde.images.data.folder import FolderImages, cache_folder
from cldsde.images.data.images import ArrayImages, Images, Layout, array_images, to_nchw
from cldsde.images.data.pictures import as_folder
from cldsde.images.schema import Flag, Natural, Share, checked

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def fashion_folder() -> Path:
    """The first existing folder among the usual places of Fashion-MNIST."""
    folders = [_DEBIAN, cache_folder() / "fashion-mnist"]
    if os.environ.get("CLDSDE_DATA"):
        folders.insert(0, Path(os.environ["CLDSDE_DATA"]).expanduser() / "fashion-mnist")
    for folder in filter(Path.is_dir, folders):
        return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {listed(folders)}; get it with `apt install "
        "dataset-fashion-mnist` (Debian), or with torchvision: torchvision.datasets.FashionMNIST("
        "FOLDER, download=True), then path=FOLDER/FashionMNIST/raw"
    )


def fashion_part(folder: Path, part: str, size: int) -> ArrayImages:
    """The training or the test part, checked and resized."""
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", (28, 28)).unsqueeze(1)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", ())
    if size > 28:
        images = F.pad(images, [(size - 28) // 2] * 4)
    elif size < 28:
        # In float32: torch's kernels for bytes differ from one processor to another.
        fine = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        images = fine.round().clamp(0, 255).to(torch.uint8)
    return ArrayImages(images, labels=labels.to(torch.int64), classes=_FASHION_CLASSES)


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Bytes ``(N, *shape)`` of a file in the IDX format: magic number, sizes, values."""
    file = next((x for x in (folder / name, folder / f"{name}.gz") if x.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":  # gzip, whatever the name; IDX begins with two zeros
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    axes = len(shape) + 1
    start = 4 + 4 * axes
    count, left = divmod(len(content) - start, math.prod(shape))
    header = struct.pack(f">4B{axes}I", 0, 0, 8, axes, max(count, 0), *shape)
    if content[:start] != header or left or count < 1:
        wanted = " × ".join(map(str, ("N ≥ 1", *shape)))
        msg = f"{file} must be an IDX file of {wanted} bytes; got {len(content)} bytes that begin "
        raise ValueError(f"{msg}with {content[:start].hex(' ', 4)}")
    values = np.frombuffer(content, np.uint8, offset=start)
    return torch.from_numpy(values.copy()).reshape(count, *shape)


TorchvisionName = Literal[
    "CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "STL10", "SVHN", "USPS"
]

TORCHVISION_SHAPES: dict[TorchvisionName, tuple[int, int, int]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "SVHN"), (3, 32, 32)),
    **dict.fromkeys(("FashionMNIST", "KMNIST", "MNIST", "QMNIST"), (1, 28, 28)),
    "STL10": (3, 96, 96),
    "USPS": (1, 16, 16),
}
"""Shapes of the images, known without them."""


HeldOut = Annotated[Share | Annotated[int, Field(ge=1, strict=False)], AfterValidator(float)]
"""Share of the images held out, below 1, or their number."""


class DataSet(NamedTuple):
    """Images to train on, and images held out, or None; both of one shape and number of levels."""

    train: Images
    held_out: Images | None


@checked
def digits(*, held_out: HeldOut = 0.2, seed: Natural = 0) -> DataSet:
    """Scikit-learn's 1,797 handwritten digits, 8×8 with 17 grey levels, split at random.

    Parameters
    ----------
    held_out
        Share of the images held out, below 1, or their number.
    seed
        Seed of the split.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    labels, classes = torch.from_numpy(source.target), [str(name) for name in source.target_names]
    return _split(ArrayImages(images, levels=17, labels=labels, classes=classes), held_out, seed)


@checked
def fashion_mnist(*, path: str | Path | None = None, size: Literal[16, 28, 32] = 28) -> DataSet:
    """Fashion-MNIST: 60,000 and 10,000 grey images of ten kinds of clothes (Xiao et al. 2017).

    Parameters
    ----------
    path
        Folder of the four IDX files under their published names, plain or compressed by gzip.
        None: the first that exists of ``$CLDSDE_DATA/fashion-mnist``,
        ``/usr/share/datasets/fashion-mnist`` (Debian's package dataset-fashion-mnist) and
        ``~/.cache/cldsde/fashion-mnist``. ``$CLDSDE_CACHE`` replaces ``~/.cache/cldsde``, or else
        ``$XDG_CACHE_HOME`` replaces ``~/.cache``.
    size
        28 as published; 32, with two rows and columns of black on every side; or 16, by a bicubic
        filter with antialiasing.

    Raises
    ------
    FileNotFoundError, ValueError
        If a file is missing, damaged or holds something else.
    """
    folder = fashion_folder() if path is None else as_folder(path)
    return DataSet(*(fashion_part(folder, part, size) for part in ("train", "t10k")))


@checked
def torchvision_set(*, name: TorchvisionName, path: str | Path, download: Flag = False) -> DataSet:
    """A data set of torchvision, its test part held out.

    Parameters
    ----------
    name
        Name of torchvision's class, among the sets of images of one size with a test part.
    path
        Torchvision's ``root``, the folder of the set.
    download
        Download the set if it is not there.

    Raises
    ------
    FileNotFoundError
        If the set is not there or damaged.
    """
    from torchvision import datasets

    layout: Layout = "NHWC" if name.startswith("CIFAR") else "NHW"
    layout = "NCHW" if name in {"STL10", "SVHN"} else layout
    parts = (
        {"split": x} if layout == "NCHW" else {"train": x == "train"} for x in ("train", "test")
    )
    root = Path(path).expanduser()
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Of several processes one downloads, and the others find the files.
        with file_lock(root / name, wait=True) if download else nullcontext():
            make = getattr(datasets, name)
            sources = [make(str(root), download=download, **part) for part in parts]
    except Exception as error:  # of many classes, for missing or damaged files
        hint = "is the network there?" if download else "download=True would fetch it"
        msg = f"{name} is not in {root}, or is damaged there; {hint} (torchvision: {error})"
        raise FileNotFoundError(msg) from error
    found = []
    for source in sources:
        images = torch.from_numpy(np.ascontiguousarray(source.data))
        labels = source.targets if hasattr(source, "targets") else source.labels
        labels = torch.as_tensor(labels, device="cpu")
        # QMNIST has more labels than the class.
        found.append((to_nchw(images, layout), labels[:, 0] if labels.ndim == 2 else labels))
    names = getattr(sources[0], "classes", None)
    classes = names or 1 + max(int(labels.max()) for _, labels in found)
    return DataSet(*(ArrayImages(x, labels=labels, classes=classes) for x, labels in found))


@checked
def image_folder(*, held_out: HeldOut = 0.1, seed: Natural = 0, **options: Any) -> DataSet:
    """Pictures in a folder, a zip archive or a saved data set, split at random.

    See `digits` for ``held_out`` and ``seed``, and `FolderImages` for the other options.
    """
    return _split(FolderImages(**options), held_out, seed)


@checked
def array_file(*, held_out: HeldOut = 0.1, seed: Natural = 0, **options: Any) -> DataSet:
    """Images of a ``.npy`` or ``.npz`` file of NumPy, split at random.

    See `digits` for ``held_out`` and ``seed``, and `array_images` for the other options.
    """
    return _split(array_images(**options), held_out, seed)


image_folder.options_of = FolderImages  # type: ignore[attr-defined]
array_file.options_of = array_images  # type: ignore[attr-defined]

DATA_SETS: dict[str, Callable[..., DataSet]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "torchvision": torchvision_set,
    "folder": image_folder,
    "array": array_file,
}
"""Data sets by their names in a configuration; the options are the arguments of the functions."""


def _split(images: Images, held_out: float, seed: int) -> DataSet:
    if held_out == 0:
        return DataSet(images, None)
    n = round(len(images) * held_out) if held_out < 1 else int(held_out)
    if not 0 < n < len(images):
        msg = f"held_out must leave both parts an image; got {held_out}, that is {n} of the "
        raise ValueError(f"{msg}{len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
    return DataSet(train=images.subset(order[n:]), held_out=images.subset(order[:n]))
