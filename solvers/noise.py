"""Noise sources: where a solver's standard normals come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.linear.random import standard_normal

__all__ = ["FreshNoise", "NoiseSource", "RecordedNoise"]


class NoiseSource(ABC):
    """Standard normals, asked for in the order in which a solver uses them."""

    @abstractmethod
    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Normals for ``rows`` noise components a sample, ``(B, rows, *D)`` like the state z."""


class FreshNoise(NoiseSource):
    """Independent normals from one generator.

    Parameters
    ----------
    generator
        Source; None is torch's default generator of the state's device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``."""
        shape = (len(z), rows, *z.shape[2:])
        return standard_normal(shape, generator=self.generator, dtype=z.dtype, device=z.device)


class RecordedNoise(NoiseSource):
    """Given normals, for tests and for probing a solver.

    Parameters
    ----------
    draws
        Tensors ``(B, rows, *D)`` in the order of use.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self._draws = iter(list(draws))

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the next recorded draw.

        Raises
        ------
        ValueError
            If the record is exhausted or the next draw has another shape.
        """
        shape = (len(z), rows, *z.shape[2:])
        draw = next(self._draws, None)
        if draw is None or draw.shape != shape:
            got = "the end of the record" if draw is None else f"shape {tuple(draw.shape)}"
            msg = f"recorded noise: the solver asks for shape {shape}; got {got}"
            raise ValueError(msg)
        return draw.to(z)
