"""Noise sources: they supply a solver's standard normals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import described
from cldsde.linear.random import keyed_normals, standard_normal
from cldsde.linear.sde import LinearSDE

Seeds = Sequence[int] | Tensor | NDArray[Any]
"""Integers in [0, 2³²), one per sample or run; see `checked_seeds`."""

# Numbers that a sample's generator draws at once. The count is fixed, because a generator's numbers
# depend on it.
_BLOCK = 4096
# Standard deviation of the part of the data that all numbers of a sample share, where sampling
# starts: 0.5 of the data's 1, and what the first of 20 steps lose of it.
_SHARED = 0.52


class PathNoise(NamedTuple):
    """Normals of each step as functionals of one Brownian path.

    ξ = increment ΔW + integral I + time_integral U, with the increment ΔW of w over a step from t
    down to u, I = ∫Ψ(t, τ) G dw and U = ∫(τ − u) dw.
    """

    increment: Tensor  #: ``(n, r, m)`` for n steps, r normals and m columns of G.
    integral: Tensor  #: ``(n, r, k)``
    time_integral: Tensor | None = None  #: ``(n, r, m)``; `BrownianPath` does not know U.

    @classmethod
    def increments(cls, sde: LinearSDE, times: Tensor, rotation: Tensor | None = None) -> PathNoise:
        """Normals ξ = ΔW/√h, or a rotation ``(n, r, m)`` of them, for decreasing times."""
        h = -times.diff()[:, None, None]
        if rotation is None:
            columns = sde.diffusion(times[-1]).shape[-1]
            rotation = torch.eye(columns, dtype=torch.float64, device="cpu")
        scaled = rotation / h.sqrt()
        return cls(scaled, scaled.new_zeros(*scaled.shape[:2], sde.components))

    @classmethod
    def integrals(cls, root: Tensor, functional: Tensor) -> PathNoise:
        """Normals ξ with root ξ = functional I, where root is the root of Cov(functional I)."""
        # Rows of a root differ by powers of the step. Scale them alike, so that the pseudo-inverse
        # does not drop a small row as rounding error.
        scale = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
        scale = torch.where(scale == 0, 1.0, scale)
        integral = torch.linalg.pinv(root / scale, rtol=1e-13) @ (functional / scale)
        return cls(integral.new_zeros(*integral.shape[:2], 0), integral)


class NoiseSource(ABC):
    """Base class of noise sources; a solver draws standard normals in the order of their use."""

    @abstractmethod
    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw normals ``(B, rows, *D)`` with dtype and device of the state z ``(B, k, *D)``.

        A source that keeps the state must clone it.
        """

    def check(self, z: Tensor) -> None:
        """Raise ValueError for states that the source does not fit, before any evaluation."""
        return

    def along(
        self, sde: LinearSDE, times: Tensor, functionals: Callable[[], PathNoise | None]
    ) -> NoiseSource:
        """Return the source for one solve with a process and a grid; by default the source itself.

        Raises a ValueError if the source depends on these and does not fit. ``functionals`` returns
        the solver's normals as functionals of a Brownian path, or None.
        """
        return self


class FreshNoise(NoiseSource):
    """Independent normals from a generator; None: torch's default one of the state's device."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``."""
        batch, _, *data = z.shape
        drawn = standard_normal(
            (rows, batch, *data), generator=self.generator, dtype=z.dtype, device=z.device
        )
        return drawn.transpose(0, 1)


class CheckedNoise(NoiseSource):
    """Noise source that checks each draw, because a draw of a wrong shape might be broadcast.

    With ``keep`` it remembers the last draw, ``last``.
    """

    last: Tensor

    def __init__(self, source: NoiseSource, *, keep: bool = False) -> None:
        self._source, self._keep = source, keep

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the source's draw if it has the dtype, shape and device of the state."""
        drawn, shape = self._source.normal(z, rows), (len(z), rows, *z.shape[2:])
        if not isinstance(drawn, Tensor) or drawn.dtype != z.dtype:
            got = described(drawn)
            raise TypeError(f"noise {self._source!r} must return a tensor of {z.dtype}; got {got}")
        if drawn.shape != shape or drawn.device != z.device:
            raise ValueError(
                f"noise {self._source!r} must return shape {shape} on {z.device}; "
                f"got {tuple(drawn.shape)} on {drawn.device}"
            )
        if self._keep:
            self.last = drawn
        return drawn


class RecordedNoise(NoiseSource):
    """Noise source that replays draws ``(B, rows, *D)`` in their order, for tests."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        # Count draws by an integer, because torch.compile cannot trace an iterator.
        self._draws, self._used = list(draws), 0

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the next recorded draw; raise ValueError if all have been used."""
        if self._used == len(self._draws):
            shape = (len(z), rows, *z.shape[2:])
            raise ValueError(
                f"noise must hold another draw of shape {shape}; got {self._used} recorded draws, "
                "which are used up"
            )
        self._used += 1
        return self._draws[self._used - 1].to(z)


class SampleNoise(NoiseSource):
    """Noise source with one random stream per sample: a sample does not depend on its batch.

    Each sample draws from a generator with its own seed, on the CPU, in blocks.

    Parameters
    ----------
    seeds
        One integer in [0, 2³²) per sample, at least one: a sequence, tensor or array. Other seeds
        raise a ValueError, or a TypeError if they are not integers.
    key
        Integer ≥ 0 that the streams depend on, too: two keys have no stream in common. None: a
        stream depends on its seed alone.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> together = SampleNoise([3, 4, 5]).start(CLD(), (2,))
    >>> alone = SampleNoise([4]).start(CLD(), (2,))
    >>> torch.equal(together[1:2], alone)
    True
    """

    def __init__(self, seeds: Seeds, *, key: int | None = None) -> None:
        self.seeds = checked_seeds(seeds)
        # torch's generator on the CPU uses 32 bits, which cannot hold both key and seed.
        self._streams: list[Any] = [
            torch.Generator().manual_seed(seed)
            if key is None
            else np.random.PCG64DXSM(np.random.SeedSequence(key, spawn_key=(seed,)))
            for seed in self.seeds
        ]
        # A tensor allocated in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._block = torch.empty(len(self.seeds), _BLOCK, dtype=torch.float32, device="cpu")
        self._used = _BLOCK  # all numbers of the block are used up

    def start(
        self,
        sde: LinearSDE,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        t: float | None = None,
    ) -> Tensor:
        """Draw a state ``(len(seeds), k, *D)`` to start from, for one sample's data ``(*D)``.

        It is a draw from the prior, or with ``t`` from the distribution at time t of Gaussian data
        of mean 0 and variance 1. The numbers of such data share a part with a standard deviation of
        0.52, as images share their brightness.
        """
        like = torch.empty(len(self.seeds), sde.components, *shape, dtype=dtype, device=device)
        root = start_root(sde, t, 1 - _SHARED**2)
        drawn = apply_blocks(root, self.normal(like, sde.components))
        if t is None:
            return drawn
        single = like.new_empty(*like.shape[:2], *(1 for _ in shape))
        shared = apply_blocks(_SHARED * sde.marginal(t).mean[..., :1], self.normal(single, 1))
        return drawn + shared

    def check(self, z: Tensor) -> None:
        """Raise ValueError unless the batch has one sample per seed."""
        if len(z) != len(self.seeds):
            msg = f"noise must have one seed per sample, {len(z)}; got {len(self.seeds)} seeds"
            raise ValueError(msg)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``."""
        self.check(z)
        shape = (rows, *z.shape[2:])
        wanted = math.prod(shape)
        # The CPU does not wait for copies from pinned memory: it draws while a GPU computes.
        numbers = torch.empty(
            len(z), wanted, dtype=torch.float32, device="cpu", pin_memory=z.is_cuda
        )
        done = 0
        while done < wanted:
            if self._used == _BLOCK:
                self._refill()
                self._used = 0
            count = min(wanted - done, _BLOCK - self._used)
            numbers[:, done : done + count] = self._block[:, self._used : self._used + count]
            done, self._used = done + count, self._used + count
        return numbers.reshape(len(z), *shape).to(z, non_blocking=z.is_cuda)

    def _refill(self) -> None:
        """Write the next numbers of each stream to the block."""
        if isinstance(self._streams[0], torch.Generator):
            for row, generator in zip(self._block.unbind(), self._streams, strict=True):
                row.normal_(generator=generator)
            return
        scratch = torch.empty(2, 2, len(self.seeds), _BLOCK // 2, dtype=torch.float32, device="cpu")
        pairs = keyed_normals(self._streams, *scratch)
        self._block.view(len(self.seeds), 2, -1).copy_(pairs.transpose(0, 1))


def start_root(sde: LinearSDE, t: float | None, data_variance: float = 1.0) -> Tensor:
    """Root of the initial states' covariance: of the prior, or at time t for Gaussian data."""
    if t is None or t == 1:
        return sde.prior.root
    initial = sde.initial_covariance.clone()
    initial[0, 0] = initial[0, 0] + data_variance
    return sde.marginal(t, initial).root


def checked_seeds(seeds: Seeds, name: str = "seeds") -> tuple[int, ...]:
    """Check seeds of CPU generators, which use 32 bits, and return them as integers."""
    listed = seeds.tolist() if isinstance(seeds, Tensor | np.ndarray) else seeds
    if not isinstance(listed, Iterable):
        raise TypeError(f"{name} must be a sequence of integers; got {listed!r}")
    found = tuple(listed)
    whole = [isinstance(s, Integral) and not isinstance(s, bool) for s in found]
    bad = [s for s, is_whole in zip(found, whole, strict=True) if not is_whole]
    bad = bad or [s for s in found if not 0 <= s < 2**32]
    if bad or not found:
        got = repr((bad or [()])[0])
        msg = f"{name} must be integers in [0, 2³²), one per sample or run; got {got}"
        raise (ValueError if all(whole) else TypeError)(msg)
    return tuple(int(seed) for seed in found)
