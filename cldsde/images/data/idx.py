"""Files in the IDX format, and Fashion-MNIST, which is published in it."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cldsde.images.checks import listed
from cldsde.images.data.images import CHUNK, ArrayImages

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def fashion_folder() -> Path:
    """The first existing folder among the usual places of Fashion-MNIST."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folders = [_DEBIAN, cache / "cldsde" / "fashion-mnist"]
    if os.environ.get("CLDSDE_DATA"):
        folders.insert(0, Path(os.environ["CLDSDE_DATA"]).expanduser() / "fashion-mnist")
    for folder in folders:
        if folder.is_dir():
            return folder
    msg = (
        f"Fashion-MNIST is in none of {listed(folders)}; get it with `apt install "
        "dataset-fashion-mnist` (Debian), or with torchvision: torchvision.datasets.FashionMNIST("
        "FOLDER, download=True), then path=FOLDER/FashionMNIST/raw"
    )
    raise FileNotFoundError(msg)


def fashion_part(folder: Path, part: str, size: int) -> ArrayImages:
    """The training or the test part, checked and resized."""
    image_file = _file(folder, f"{part}-images-idx3-ubyte")
    label_file = _file(folder, f"{part}-labels-idx1-ubyte")
    images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    problem = None
    if images.shape[1:] != (28, 28) or len(images) == 0:
        problem = f"{image_file} must hold images of 28 × 28; got shape {tuple(images.shape)}"
    elif len(labels) != len(images):
        problem = f"{label_file} must hold {len(images)} labels, one per image; got {len(labels)}"
    elif int(labels.max()) >= len(_FASHION_CLASSES):
        problem = f"{label_file} must hold labels 0 … 9; got {int(labels.max())}"
    if problem is not None:
        raise ValueError(problem)
    images = images.unsqueeze(1)
    if size > 28:
        images = F.pad(images, [(size - 28) // 2] * 4)
    elif size < 28:
        images = _shrink(images, size)
    return ArrayImages(images, labels=labels.to(torch.int64), classes=_FASHION_CLASSES)


def _file(folder: Path, name: str) -> Path:
    """A file of the folder, plain or compressed."""
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    msg = f"{folder} holds neither {name} nor {name}.gz"
    raise FileNotFoundError(msg)


def _read_idx(file: Path, axes: int) -> Tensor:
    """Bytes in the IDX format: magic number, sizes, values."""
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":  # gzip, whatever the name; IDX begins with two zeros
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        msg = f"{file} cannot be read: {error}"
        raise ValueError(msg) from error
    magic, header = bytes([0, 0, 8, axes]), 4 + 4 * axes
    if content[:4] != magic:
        msg = f"{file} must begin with the magic number {magic.hex()}; got {content[:4].hex()!r}"
        raise ValueError(msg)
    if len(content) < header:
        msg = f"{file} ends after {len(content)} bytes, inside its header of {header}"
        raise ValueError(msg)
    sizes = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        shape, got = " × ".join(str(n) for n in sizes), len(content) - header
        msg = f"{file} must hold {shape} bytes after its header, which states so; got {got}"
        raise ValueError(msg)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).reshape(sizes)


def _shrink(images: Tensor, size: int) -> Tensor:
    shrunk = []
    for part in images.split(max(1, CHUNK // images[0].numel())):  # type: ignore[no-untyped-call]
        # In float32: torch's kernels for bytes differ from one processor to another.
        fine = F.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
        shrunk.append(fine.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(shrunk)
