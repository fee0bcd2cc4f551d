"""Noise sources: where a solver's standard normals come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.random import standard_normal
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

if TYPE_CHECKING:
    from .adaptive import Integrator
    from .base import Solver

__all__ = [
    "FreshNoise",
    "GridNoise",
    "NoiseSource",
    "RecordedNoise",
    "SampleNoise",
    "checked_noise",
]

# Numbers that a sample's generator draws at once. Fixed, because a generator's numbers depend on
# how many are asked for.
_BLOCK = 4096


class NoiseSource(ABC):
    """Standard normals, asked for in the order in which a solver uses them."""

    @abstractmethod
    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Normals for ``rows`` noise components a sample, ``(B, rows, *D)`` like the state z.

        The state is that of now: what is kept of it is to be cloned.
        """

    def check(self, z: Tensor) -> None:
        """Refuse states for which there are no normals, before a score is asked for.

        Raises
        ------
        ValueError
            If the states do not fit.
        """
        return

    def in_turn(self) -> NoiseSource:
        """The same draws for one solve in which none is needed once the next is asked for.

        A source that makes its draws anew may take one piece of memory for all of them.
        """
        return self


@runtime_checkable
class GridNoise(Protocol):
    """A source whose normals depend on the times that a solver steps through."""

    def along(
        self, process: ReverseProcess, solver: Solver | Integrator, times: Tensor
    ) -> NoiseSource:
        """The source for one solve over a decreasing grid ``(n + 1,)``.

        Raises
        ------
        ValueError
            If the solver's noise is not of this kind, or the grid or the process do not fit.
        """
        ...


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
        batch, _, *data = z.shape
        # Each component in one piece, as of states; one alone is so in any order.
        shape = (batch, 1, *data) if rows == 1 else (rows, batch, *data)
        drawn = standard_normal(shape, generator=self.generator, dtype=z.dtype, device=z.device)
        return drawn if rows == 1 else drawn.transpose(0, 1)

    def in_turn(self) -> NoiseSource:
        """Into the memory of the first draw."""
        return _NoiseInTurn(self.generator) if type(self) is FreshNoise else self


class _NoiseInTurn(FreshNoise):
    """`FreshNoise` in one piece of memory: new memory takes half as long as an image's normals."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__(generator)
        self._drawn: Tensor | None = None
        self._memory: Tensor | None = None

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``, which lasts until the next draw."""
        drawn, memory = self._drawn, self._memory
        if drawn is None or memory is None or drawn.shape[1] != rows:
            drawn = self._drawn = super().normal(z, rows)
            # What a generator of another device draws is moved, to memory that is new.
            if self.generator is None or self.generator.device == z.device:
                self._memory = drawn if rows == 1 else drawn.transpose(0, 1)
            return drawn
        memory.normal_(generator=self.generator)
        return drawn


class _CheckedNoise(NoiseSource):
    """A source whose draws are looked at: ones that do not fit might be broadcast."""

    def __init__(self, source: NoiseSource) -> None:
        self._source = source

    def check(self, z: Tensor) -> None:
        """Let the source refuse states."""
        self._source.check(z)

    def in_turn(self) -> NoiseSource:
        """The source in turn, looked at as well."""
        return _CheckedNoise(self._source.in_turn())

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the source's draw.

        Raises
        ------
        TypeError
            If it is no tensor of the state's dtype.
        ValueError
            If it has another shape.
        """
        drawn, shape = self._source.normal(z, rows), (len(z), rows, *z.shape[2:])
        if not isinstance(drawn, Tensor) or drawn.dtype != z.dtype:
            got = drawn.dtype if isinstance(drawn, Tensor) else type(drawn).__name__
            msg = f"noise: {self._source!r} must return a tensor of {z.dtype}; got {got}"
            raise TypeError(msg)
        if drawn.shape != shape:
            msg = f"noise: {self._source!r} must return shape {shape}; got {tuple(drawn.shape)}"
            raise ValueError(msg)
        return drawn


class RecordedNoise(NoiseSource):
    """Given normals, for tests and for probing a solver.

    Parameters
    ----------
    draws
        Tensors ``(B, rows, *D)`` in the order of use.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self._draws, self._used = list(draws), 0

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the next recorded draw.

        Raises
        ------
        ValueError
            If the record is exhausted or the next draw has another shape.
        """
        shape = (len(z), rows, *z.shape[2:])
        draw = self._draws[self._used] if self._used < len(self._draws) else None
        self._used += 1
        if draw is None or draw.shape != shape:
            got = "the end of the record" if draw is None else f"shape {tuple(draw.shape)}"
            msg = f"recorded noise: the solver asks for shape {shape}; got {got}"
            raise ValueError(msg)
        return draw.to(z)


class SampleNoise(NoiseSource):
    """One stream of normals for each sample, so that a sample does not depend on its batch.

    Sample i draws from a generator of its own seed: whatever the batch it is drawn in, and where in
    it, it sees the same numbers. Numbers are drawn on the host, in blocks.

    Parameters
    ----------
    seeds
        One integer in [0, 2³²) a sample.

    Raises
    ------
    TypeError
        If a seed is no integer.
    ValueError
        If a seed is out of range or there is none.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> together = SampleNoise([3, 4, 5]).start(CLD(), (2,))
    >>> alone = SampleNoise([4]).start(CLD(), (2,))
    >>> torch.equal(together[1:2], alone)
    True
    """

    def __init__(self, seeds: Sequence[int] | Tensor) -> None:
        self.seeds = tuple(seeds.tolist() if isinstance(seeds, Tensor) else seeds)
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, Integral):
                msg = f"seeds must be integers, one a sample; got {seed!r}"
                raise TypeError(msg)
        # torch's generator on the host looks at 32 bits of its seed.
        if not self.seeds or not (min(self.seeds) >= 0 and max(self.seeds) < 2**32):
            msg = f"seeds must be integers in [0, 2³²), one a sample; got {self.seeds}"
            raise ValueError(msg)
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in self.seeds]
        self._block = torch.empty(len(self.seeds), _BLOCK, dtype=torch.float32)
        self._used = _BLOCK  # numbers of the block, that is none is left

    def start(
        self,
        sde: LinearSDE,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw a state from the prior for each sample, for data of shape ``(*D)``.

        Returns
        -------
        Tensor
            ``(len(seeds), k, *D)``.
        """
        like = torch.empty(len(self.seeds), sde.components, *shape, dtype=dtype, device=device)
        return apply_blocks(sde.prior.root, self.normal(like, sde.components))

    def check(self, z: Tensor) -> None:
        """Refuse a batch that is not of one sample a seed.

        Raises
        ------
        ValueError
            If it is not.
        """
        if len(z) != len(self.seeds):
            msg = f"noise: there are {len(self.seeds)} seeds for a batch of {len(z)} samples"
            raise ValueError(msg)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``.

        Raises
        ------
        ValueError
            If the batch is not of one sample a seed.
        """
        self.check(z)
        shape = (rows, *z.shape[2:])
        wanted = math.prod(shape)
        numbers = torch.empty(len(z), wanted, dtype=torch.float32)
        done = 0
        while done < wanted:
            if self._used == _BLOCK:
                for row, generator in zip(self._block.unbind(), self._generators, strict=True):
                    row.normal_(generator=generator)
                self._used = 0
            count = min(wanted - done, _BLOCK - self._used)
            numbers[:, done : done + count] = self._block[:, self._used : self._used + count]
            done, self._used = done + count, self._used + count
        return numbers.reshape(len(z), *shape).to(z)


def checked_noise(source: NoiseSource) -> NoiseSource:
    """A source for one solve: those that are known to fit as they are, others looked at."""
    known = type(source) in {FreshNoise, RecordedNoise, SampleNoise}
    return source if known else _CheckedNoise(source)
