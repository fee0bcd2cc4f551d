"""Helpers of the tests of image data: bytes, files that hold them, and their images."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cldsde import LinearSDE
from cldsde.images.data import Images
from cldsde.score import Score

PIXELS = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)


def random_bytes(*shape, levels=256, seed=0):
    return np.random.default_rng(seed).integers(0, levels, shape, dtype=np.uint8)


def noise(count: int, seed: int, shape: tuple[int, ...] = (1, 4, 4), top: int = 256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (count, *shape), generator=generator).to(torch.uint8)


def whole(images: Images) -> torch.Tensor:
    return images.load(torch.arange(len(images)))


def cubic_weights(n: int, m: int) -> np.ndarray:
    """Matrix of Keys' cubic (a = -1/2), from n numbers to m, widened if m < n."""
    scale = n / m
    centres = (np.arange(m)[:, None] + 0.5) * scale - 0.5
    x = np.abs(np.arange(n) - centres) / max(scale, 1)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def save(file: Path, pixels: np.ndarray, mode: str | None = None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, **options)


def idx(array: np.ndarray) -> bytes:
    """By the format's description: 0, 0, type 8, axes; big-endian sizes; values row by row."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


class PixelScore(Score):
    """Score of images of independent pixels N(mean, variance)."""

    def __init__(self, sde: LinearSDE, mean: float = 0.1, variance: float = 0.04) -> None:
        super().__init__()
        self.sde: LinearSDE = sde
        self.mean = mean
        self.initial = sde.initial_covariance.clone()
        self.initial[0, 0] += variance

    def forward(self, z: torch.Tensor, t: torch.Tensor, **options: object) -> torch.Tensor:
        kernel = self.sde.marginal(t.double(), self.initial)
        precision = torch.linalg.inv(kernel.covariance)[:, list(self.sde.driven)].to(z)
        apart = z - self.mean * kernel.mean[..., 0, None, None, None].to(z)
        return -torch.einsum("bdk,bkchw->bdchw", precision, apart)


STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def write_fashion(folder: Path, *, zipped: bool, counts=(12, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for count, stems in zip(counts, STEMS.values(), strict=True):
        pixels = random_bytes(count, 28, 28, seed=count)
        labels = random_bytes(count, levels=10, seed=count + 1)
        for stem, array in zip(stems, (pixels, labels), strict=True):
            if zipped:
                (folder / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / stem).write_bytes(idx(array))
        arrays.append((pixels, labels))
    return arrays
