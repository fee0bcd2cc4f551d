"""Noise in other libraries: from their generators, or from streams that belong to the samples."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cldsde.linear.random import Generators, standard_normal
from cldsde.solvers.noise import NoiseSource, SampleNoise

# Keeps the streams apart from others of the same seeds.
_KEY = 0x70697065


class GeneratorNoise(NoiseSource):
    """Normals from a pipeline's generators, each of which draws for its samples."""

    def __init__(self, generator: Generators) -> None:
        self._generator = generator

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``."""
        shape = (len(z), rows, *z.shape[2:])
        return standard_normal(shape, generator=self._generator, dtype=z.dtype, device=z.device)


def streams_of(x: Tensor) -> SampleNoise:
    """One random stream per sample, which depends on the values of this sample alone.

    The values are read back once.
    """
    rows = x.detach().to("cpu", torch.float32).contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    return SampleNoise([int.from_bytes(found[:4], "little") for found in digests], key=_KEY)
