"""What an adaptive solver is, and what such solvers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cldsde.score import ReverseProcess

from .base import Facts
from .noise import NoiseSource
from .progress import progress_bar

__all__ = ["ActiveSamples", "AdaptiveSolver", "Integration", "common_time"]


@dataclass(frozen=True, eq=False)
class Integration:
    """What an adaptive solver did.

    Attributes
    ----------
    state
        Last states, ``(B, k, *D)``.
    nfev
        Score evaluations of each sample, ``(B,)`` int64 on the host.
    success
        Whether every sample arrived.
    message
        What happened, in words.
    stats
        Further numbers.
    """

    state: Tensor
    nfev: Tensor
    success: bool
    message: str
    stats: dict[str, Any]


class AdaptiveSolver(ABC):
    """A solver that chooses its own times between two ends."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What the solver needs and promises with these options."""

    @abstractmethod
    def integrate(
        self,
        process: ReverseProcess,
        z: Tensor,
        start: float,
        end: float,
        noise: NoiseSource,
        *,
        progress: bool,
    ) -> Integration:
        """Run states ``(B, k, *D)`` from time ``start`` down to ``end``.

        Parameters
        ----------
        process
            The reverse process.
        z
            States at ``start``; not to be changed.
        start, end
            Times, start > end ≥ 0.
        noise
            Where standard normals come from.
        progress
            Show how many samples have arrived on stderr.
        """


class ActiveSamples:
    """Samples on their way from one time to another, each at its own; those that arrive drop out.

    Attributes
    ----------
    t
        Times of the samples still on their way, float64 on the host.
    """

    def __init__(
        self, z: Tensor, start: float, end: float, *, max_nfev: int, progress: bool, name: str
    ) -> None:
        self.t = torch.full((len(z),), start, dtype=torch.float64)
        self._end, self._max_nfev = end, max_nfev
        self._state = z.clone()
        self._nfev = torch.zeros(len(z), dtype=torch.int64)
        self._rows = torch.arange(len(z))
        self._attempts = 0
        self._message = "reached the end of the interval"
        self._bar = progress_bar(None, shown=progress, total=len(z), desc=name)

    def on_their_way(self) -> bool:
        """Whether any sample is."""
        return len(self._rows) > 0

    def afford(self, evaluations: int) -> bool:
        """Whether every sample may have so many more evaluations, which are then counted."""
        used = self._nfev[self._rows]
        if len(used) and int(used.max()) + evaluations > self._max_nfev:
            self._message = f"max_nfev: {self._max_nfev} evaluations did not reach the end"
            return False
        self._nfev[self._rows] += evaluations
        return True

    def attempt(self, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """Step lengths cut at the end, and the times they lead to; None if one is too short."""
        left = self.t - self._end
        last = h >= left
        if bool((~last & ~(h >= 1e-14 * self.t)).any()):
            self._message = (
                "the step length underflowed: the score is not finite, or rtol and atol cannot be "
                "met"
            )
            return None
        return torch.minimum(h, left), torch.where(last, self._end, self.t - h)

    def settle(self, z: Tensor, t: Tensor) -> Tensor | None:
        """Note states and times after an attempt; a mask of who goes on where some have arrived."""
        self._attempts += 1
        self._state[self._rows.to(z.device)] = z
        going = t > self._end
        self.t = t[going]
        if bool(going.all()):
            return None
        self._rows = self._rows[going]
        self._bar.update(len(self._state) - len(self._rows) - self._bar.n)
        return going

    def result(self, **stats: int) -> Integration:
        """What came of it."""
        self._bar.close()
        stats["attempts"] = self._attempts
        return Integration(self._state, self._nfev, not len(self._rows), self._message, stats)


def common_time(t: Tensor) -> Tensor:
    """The time of all samples where it is one, so that they share their coefficients."""
    return t[0] if len(t) and bool((t == t[0]).all()) else t
