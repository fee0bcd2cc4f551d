"""Bookkeeping for adaptive solvers: each sample has its own time, step length and count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.linear.blocks import per_sample
from cldsde.messages import counted
from cldsde.progress import progress_bar
from cldsde.score.times import on_device

from .base import Integration, Run

LOOSE = 1e12
"""A tolerance so large that every step is accepted."""


class ActiveSamples:
    """Samples on their way from one time to another, each at its own time.

    A sample stops when it arrives, when its step length underflows, or when its evaluations are
    used up; the other samples continue. A sample that has stopped keeps its place in the batch and
    takes steps of length zero. So every score evaluation gets all samples in their order.

    Times, step lengths and counts are kept on the CPU. Each attempted step copies them to the
    device once (`moved`), and waits for the device once, for the errors of the samples. ``t`` are
    the times of the samples, float64, and ``active`` says which are still on their way, ``(B,)``.
    """

    def __init__(self, run: Run, state: Tensor, *, max_nfev: int, name: str) -> None:
        n = len(state)
        self.t = torch.full((n,), float(run.times[0]), dtype=torch.float64, device="cpu")
        self.active = torch.ones(n, dtype=torch.bool, device="cpu")
        self._stops, self._max_nfev, self._callback = run.stops, max_nfev, run.callback
        self._state = state
        self._at_stops = [torch.full_like(state, torch.nan) for _ in run.stops[:-1]]
        self._nfev = torch.zeros(n, dtype=torch.int64, device="cpu")
        self._next = torch.zeros(n, dtype=torch.int64, device="cpu")
        self._failures: Counter[str] = Counter()
        self._attempts, self._stopped = 0, False
        self._bar = progress_bar(None, shown=run.progress, total=n, desc=name)

    def screen(self, h: Tensor, cost: int) -> None:
        """Stop samples that have arrived or cannot attempt a step of length h ``(B,)``.

        ``cost`` is the number of score evaluations of the step.
        """
        travelling = self.active & (self._next < len(self._stops))
        long_enough = (h >= 1e-14 * self.t) | (h >= self.t - self._stop())
        in_budget = self._nfev + cost <= self._max_nfev
        short = "the step length underflowed: "
        short += "the score is not finite, or rtol and atol cannot be met"
        spent = f"max_nfev: {counted(self._max_nfev, 'evaluation')} did not reach the end"
        for reason, failed in ((short, ~long_enough), (spent, long_enough & ~in_budget)):
            if count := int((travelling & failed).sum()):
                self._failures[reason] += count
        self.active = travelling & long_enough & in_budget
        self._bar.update(int((~self.active).sum()) - self._bar.n)

    def on_their_way(self) -> bool:
        """Whether any sample is still integrating."""
        return bool(self.active.any()) and not self._stopped

    def spend(self, evaluations: Tensor) -> None:
        """Add score evaluations ``(B,)`` to the counts of the samples on their way."""
        self._nfev += evaluations * self.active

    def attempt(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths of steps that do not pass the next stop, and their end times, ``(B,)``.

        Samples that have stopped get length zero.
        """
        self._proposed = h = torch.where(self.active, h, 0.0)
        left = self.t - self._stop()
        last = h >= left
        self._goal = torch.where(last & self.active, self._next, -1)
        return torch.minimum(h, left), torch.where(last, self._stop(), self.t - h)

    def moved(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Copies of CPU tensors on the device, in single precision at least."""
        dtype = torch.promote_types(self._state.dtype, torch.float32)
        *found, self._device_goal = on_device([*parts, self._goal], dtype, self._state.device)
        return found

    def settle(
        self, z: Tensor, accept: Tensor, accept_on_device: Tensor, after: Tensor, h: Tensor
    ) -> Tensor:
        """Record states and times after an attempt; return the lengths of the next steps.

        A step that was shortened to end at a stop does not shorten the next step, of length h.
        Accepted steps ended at the times ``after``.
        """
        self._attempts += 1
        self._state = z
        self.t = torch.where(accept, after, self.t)
        at_stop = accept & (self._goal >= 0)
        for stop in sorted(set(self._next[at_stop].tolist())):
            if stop < len(self._at_stops):
                reached = per_sample(accept_on_device & (self._device_goal == stop), z)
                self._at_stops[stop] = torch.where(reached, z, self._at_stops[stop])
        self._next = self._next + at_stop
        if self._callback is not None:
            self._stopped = bool(self._callback(self._attempts, self.t, z))
        return torch.where(at_stop, torch.maximum(h, self._proposed), h)

    def result(self, **stats: int) -> Integration:
        """The result so far."""
        self._bar.close()
        success = self._next == len(self._stops)
        stats["attempts"] = self._attempts
        n = len(success)
        failed = [
            reason if count == n else f"{count} of {n} samples: {reason}"
            for reason, count in self._failures.items()
        ]
        stopped = self._stopped and bool(self.active.any())
        message = "stopped by the callback" if stopped else "; ".join(failed)
        state = last = self._state
        if not bool(success.all()):
            last = torch.where(per_sample(success.to(state.device), state), state, torch.nan)
        return Integration(
            state,
            torch.stack([*self._at_stops, last]),
            self._nfev,
            success,
            message or "reached the end of the interval",
            stopped,
            stats,
        )

    def _stop(self) -> Tensor:
        """The next stop of each sample."""
        return self._stops[self._next.clamp_max(len(self._stops) - 1)]
