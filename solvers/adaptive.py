"""Solvers with a loop of their own, and what those with adaptive steps share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cldsde.score import ReverseProcess

from .base import Facts
from .noise import NoiseSource
from .progress import progress_bar

__all__ = [
    "LOOSE",
    "ActiveSamples",
    "Callback",
    "EvenSteps",
    "Integration",
    "Integrator",
    "common_time",
]

LOOSE = 1e12
"""A tolerance that no step fails."""

Callback = Callable[[int, Any, Tensor], object]
"""What `solve` calls after each step, with the number of steps so far, the time and the state."""


@dataclass(frozen=True, eq=False)
class Integration:
    """What an integrator did.

    Attributes
    ----------
    state
        Last states, ``(B, k, *D)``.
    states
        States at the stops, ``(S, B, k, *D)``; NaN where a sample did not come so far.
    nfev
        Score evaluations of each sample, ``(B,)`` int64 on the host.
    success
        Which samples arrived, ``(B,)`` bool on the host.
    message
        What happened, in words.
    stopped
        Whether the callback asked to stop.
    stats
        Further numbers.
    """

    state: Tensor
    states: Tensor
    nfev: Tensor
    success: Tensor
    message: str
    stopped: bool
    stats: dict[str, Any]


class Integrator(ABC):
    """A solver with a loop of its own: one that chooses its times, or another library's."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What the solver needs and promises with these options."""

    @abstractmethod
    def integrate(
        self,
        process: ReverseProcess,
        z: Tensor,
        times: Tensor,
        noise: NoiseSource,
        *,
        stops: Tensor,
        callback: Callback | None,
        progress: bool,
    ) -> Integration:
        """Run states ``(B, k, *D)`` from ``times[0]`` down to ``times[-1]``.

        Parameters
        ----------
        process
            The reverse process.
        z
            States at ``times[0]``; not to be changed.
        times
            Decreasing float64 grid on the host; those that choose their times use its ends.
        noise
            Where standard normals come from.
        stops
            Times at which states are wanted, decreasing to ``times[-1]``.
        callback
            Called after each attempt of a step with the number of attempts, the times ``(B,)`` and
            the states ``(B, k, *D)``; whether to stop.
        progress
            Show how many samples have arrived on stderr.
        """


@runtime_checkable
class EvenSteps(Protocol):
    """An integrator that chooses its times, but can be made to take steps of one length."""

    def with_step(self, h: float) -> Integrator:
        """The same method with steps of length h and no control of its error."""
        ...


class ActiveSamples:
    """Samples on their way from one time to another, each at its own; those that end drop out.

    A sample ends when it arrives, or when its step length underflows or its evaluations are used
    up; the others go on.

    Attributes
    ----------
    t
        Times of the samples still on their way, float64 on the host.
    """

    def __init__(
        self,
        z: Tensor,
        start: float,
        stops: Tensor,
        *,
        max_nfev: int,
        callback: Callback | None,
        progress: bool,
        name: str,
    ) -> None:
        n = len(z)
        self.t = torch.full((n,), start, dtype=torch.float64)
        self._times = self.t.clone()
        self._stops, self._max_nfev, self._callback = stops, max_nfev, callback
        self._state, self._shared = z, True
        self._states = z.new_full((len(stops), *z.shape), torch.nan)
        self._nfev = torch.zeros(n, dtype=torch.int64)
        self._rows = torch.arange(n)
        self._next = torch.zeros(n, dtype=torch.int64)
        self._success = torch.zeros(n, dtype=torch.bool)
        self._failures: dict[str, int] = {}
        self._attempts, self._stopped = 0, False
        self._proposed = self.t
        self._bar = progress_bar(None, shown=progress, total=n, desc=name)

    def on_their_way(self) -> bool:
        """Whether any sample is."""
        return len(self._rows) > 0 and not self._stopped

    def spend(self, evaluations: int) -> None:
        """Count evaluations of each sample on its way."""
        self._nfev[self._rows] += evaluations

    def screen(self, h: Tensor, cost: int) -> Tensor | None:
        """A mask of the samples that can attempt a step of so many evaluations, where some cannot.

        The others drop out: they have arrived, or failed.
        """
        going = self._next < len(self._stops)
        long = (h >= 1e-14 * self.t) | (h >= self.t - self._stop())
        rich = self._nfev[self._rows] + cost <= self._max_nfev
        if bool((going & long & rich).all()):
            return None
        self._success[self._rows[~going]] = True
        short, poor = going & ~long, going & long & ~rich
        self._note(
            short,
            "the step length underflowed: the score is not finite, or rtol and atol cannot be met",
        )
        self._note(poor, f"max_nfev: {self._max_nfev} evaluations did not reach the end")
        going = going & long & rich
        self._rows, self._next, self.t = self._rows[going], self._next[going], self.t[going]
        self._bar.update(len(self._state) - len(self._rows) - self._bar.n)
        return going

    def attempt(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Step lengths cut at the next stop, and the times they lead to."""
        self._proposed = h
        left = self.t - self._stop()
        last = h >= left
        return torch.minimum(h, left), torch.where(last, self._stop(), self.t - h)

    def settle(self, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Note states and times after an attempt; the length of the next from what is proposed.

        A step that was cut at a stop does not shorten the one after it.
        """
        self._attempts += 1
        rows = self._rows.to(z.device)
        if len(rows) == len(self._state):
            self._state, self._shared = z, True
        else:
            if self._shared:
                self._state, self._shared = self._state.clone(), False
            self._state[rows] = z
        self._times[self._rows] = t
        at_stop = t <= self._stop()
        self.t = t
        for stop in sorted(set(self._next[at_stop].tolist())):
            here = (at_stop & (self._next == stop)).to(z.device)
            self._states[stop, rows[here]] = z[here]
        self._next = self._next + at_stop
        if self._callback is not None:
            state = self._state.contiguous()
            self._stopped = bool(self._callback(self._attempts, self._times, state))
        return torch.where(at_stop, torch.maximum(h, self._proposed), h)

    def result(self, **stats: int) -> Integration:
        """What came of it."""
        self._bar.close()
        stats["attempts"] = self._attempts
        failed = [
            reason
            if count == len(self._state)
            else f"{count} of {len(self._state)} samples: {reason}"
            for reason, count in self._failures.items()
        ]
        message = "; ".join(failed) or "reached the end of the interval"
        stopped = self._stopped and len(self._rows) > 0
        if stopped:
            message = "stopped by the callback"
        return Integration(
            self._state, self._states, self._nfev, self._success, message, stopped, stats
        )

    def _stop(self) -> Tensor:
        """The next stop of each sample."""
        return self._stops[self._next.clamp_max(len(self._stops) - 1)]

    def _note(self, failed: Tensor, reason: str) -> None:
        count = int(failed.sum())
        if count:
            self._failures[reason] = self._failures.get(reason, 0) + count


def common_time(t: Tensor) -> Tensor:
    """The time of all samples where it is one, so that they share their coefficients."""
    return t[0] if len(t) and bool((t == t[0]).all()) else t
