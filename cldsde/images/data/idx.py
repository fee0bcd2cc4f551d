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
from cldsde.images.data.folder import cache_folder
from cldsde.images.data.images import CHUNK, ArrayImages

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
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {listed(folders)}; get it with `apt install "
        "dataset-fashion-mnist` (Debian), or with torchvision: torchvision.datasets.FashionMNIST("
        "FOLDER, download=True), then path=FOLDER/FashionMNIST/raw"
    )


def fashion_part(folder: Path, part: str, size: int) -> ArrayImages:
    """The training or the test part, checked and resized."""
    name = f"{part}-labels-idx1-ubyte"
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", (28, 28))
    labels = _read_idx(folder, name, ())
    if len(labels) != len(images) or int(labels.max()) >= len(_FASHION_CLASSES):
        got = f"{len(labels)} labels up to {int(labels.max())}"
        msg = f"{folder / name} must hold a label in 0 … 9 for each of {len(images)} images; got "
        raise ValueError(f"{msg}{got}")
    images = images.unsqueeze(1)
    if size > 28:
        images = F.pad(images, [(size - 28) // 2] * 4)
    elif size < 28:
        shrunk = []
        for some in images.split(CHUNK // 28**2):  # type: ignore[no-untyped-call]
            # In float32: torch's kernels for bytes differ from one processor to another.
            fine = F.interpolate(some.float(), (size, size), mode="bicubic", antialias=True)
            shrunk.append(fine.round().clamp(0, 255).to(torch.uint8))
        images = torch.cat(shrunk)
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
