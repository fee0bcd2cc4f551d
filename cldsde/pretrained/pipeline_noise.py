"""Noise of pipelines: from their generators, or from streams that belong to the latents."""

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


def latent_streams(latents: Tensor) -> SampleNoise:
    """Streams that depend on the values of each sample alone; they are read back once."""
    return SampleNoise([_seed_of(x) for x in latents], key=_KEY)


def _seed_of(x: Tensor) -> int:
    """Seed that depends on the values of a sample."""
    values = x.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(values).digest()[:4], "little")
