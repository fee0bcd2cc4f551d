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

    A sample drops out when it arrives, when its step length underflows, or when its evaluations are
    used up; the other samples continue. Times, step lengths and counts are kept on the CPU. Each
    attempted step copies them to the device once (`moved`), and waits for the device once, for the
    errors of the samples. ``t`` are the times of the samples still on their way, float64.
    """

    def __init__(self, run: Run, state: Tensor, *, max_nfev: int, name: str) -> None:
        n = len(state)
        self.t = torch.full((n,), float(run.times[0]), dtype=torch.float64, device="cpu")
        self._times = self.t.clone()
        self._stops, self._max_nfev, self._callback = run.stops, max_nfev, run.callback
        self._state = self._latest = state
        self._at_stops = [torch.full_like(state, torch.nan) for _ in run.stops[:-1]]
        self._rows = torch.arange(n, device="cpu")
        self._device_rows: Tensor | None = None  # the same on the device; None: all samples
        self._kept: Tensor | None = None
        self._nfev = torch.zeros(n, dtype=torch.int64, device="cpu")
        self._next = torch.zeros(n, dtype=torch.int64, device="cpu")
        self._success = torch.zeros(n, dtype=torch.bool, device="cpu")
        self._failures: Counter[str] = Counter()
        self._attempts, self._stopped = 0, False
        self._bar = progress_bar(None, shown=run.progress, total=n, desc=name)

    def screen(self, h: Tensor, cost: int) -> Tensor | None:
        """Drop samples that have arrived or cannot attempt a step of length h ``(N,)``.

        Returns indices of the samples that stay, on the CPU; None if all stay. ``cost`` is the
        number of score evaluations of the step.
        """
        travelling = self._next < len(self._stops)
        long_enough = (h >= 1e-14 * self.t) | (h >= self.t - self._stop())
        in_budget = self._nfev[self._rows] + cost <= self._max_nfev
        stays = travelling & long_enough & in_budget
        if bool(stays.all()):
            return None
        self._success[self._rows[~travelling]] = True
        short = "the step length underflowed: "
        short += "the score is not finite, or rtol and atol cannot be met"
        spent = f"max_nfev: {counted(self._max_nfev, 'evaluation')} did not reach the end"
        for reason, failed in ((short, ~long_enough), (spent, long_enough & ~in_budget)):
            if count := int((travelling & failed).sum()):
                self._failures[reason] += count
        kept = self._kept = stays.nonzero().flatten()
        self._rows, self._next, self.t = self._rows[kept], self._next[kept], self.t[kept]
        self._bar.update(len(self._success) - len(self._rows) - self._bar.n)
        return kept

    def on_their_way(self) -> bool:
        """Whether any sample is still integrating."""
        return len(self._rows) > 0 and not self._stopped

    def spend(self, evaluations: Tensor) -> None:
        """Add the score evaluations ``(N,)`` of the samples on their way to their counts."""
        self._nfev[self._rows] += evaluations

    def attempt(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Shorten steps that would pass the next stop; return lengths and end times, ``(N,)``."""
        self._proposed = h
        left = self.t - self._stop()
        last = h >= left
        self._goal = torch.where(last, self._next, -1)
        return torch.minimum(h, left), torch.where(last, self._stop(), self.t - h)

    def moved(
        self, parts: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of CPU tensors on the device, in single precision at least, and remaining states.

        ``states`` ``(N, …)`` lose the samples that the last `screen` dropped.
        """
        like = self._latest
        dtype = torch.promote_types(like.dtype, torch.float32)
        whole = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
        kept, self._kept = self._kept, None
        # Row numbers travel as the bits of floating-point numbers, so that none is rounded.
        rows = [] if kept is None else [kept.to(whole).view(dtype)]
        found = on_device([*parts, self._goal, *rows], dtype, like.device)
        if kept is not None:
            self._store()
            left = found.pop().view(whole).to(torch.int64)
            self._device_rows = left if self._device_rows is None else self._device_rows[left]
            states = [x[left] for x in states]
            self._latest = like[left]
        self._device_goal = found.pop()
        return found, list(states)

    def settle(
        self, z: Tensor, accept: Tensor, accept_on_device: Tensor, after: Tensor, h: Tensor
    ) -> Tensor:
        """Record states and times after an attempt; return the lengths of the next steps.

        A step that was shortened to end at a stop does not shorten the next step, of length h.
        Accepted steps ended at the times ``after``.
        """
        self._attempts += 1
        self._latest = z
        self.t = torch.where(accept, after, self.t)
        self._times[self._rows] = self.t
        at_stop = accept & (self._goal >= 0)
        for stop in sorted(set(self._next[at_stop].tolist())):
            if stop < len(self._at_stops):
                reached = per_sample(accept_on_device & (self._device_goal == stop), z)
                rows, saved = self._device_rows, self._at_stops[stop]
                found = torch.where(reached, z, saved if rows is None else saved[rows])
                self._at_stops[stop] = found if rows is None else saved.index_copy(0, rows, found)
        self._next = self._next + at_stop
        if self._callback is not None:
            self._store()
            self._stopped = bool(self._callback(self._attempts, self._times, self._state))
        return torch.where(at_stop, torch.maximum(h, self._proposed), h)

    def result(self, **stats: int) -> Integration:
        """The result so far."""
        self._bar.close()
        self._store()
        stats["attempts"] = self._attempts
        n = len(self._success)
        failed = [
            reason if count == n else f"{count} of {n} samples: {reason}"
            for reason, count in self._failures.items()
        ]
        stopped = self._stopped and len(self._rows) > 0
        message = "stopped by the callback" if stopped else "; ".join(failed)
        state = last = self._state
        if not bool(self._success.all()):
            last = torch.where(per_sample(self._success.to(state.device), state), state, torch.nan)
        return Integration(
            state,
            torch.stack([*self._at_stops, last]),
            self._nfev,
            self._success,
            message or "reached the end of the interval",
            stopped,
            stats,
        )

    def _store(self) -> None:
        """Write the states of the samples on their way into the states of all samples."""
        rows = self._device_rows
        self._state = (
            self._latest if rows is None else self._state.index_copy(0, rows, self._latest)
        )

    def _stop(self) -> Tensor:
        """The next stop of each sample."""
        return self._stops[self._next.clamp_max(len(self._stops) - 1)]
