"""Result of a solve, and the warning about a failed solve."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import Integration, Run


class SolveWarning(RuntimeWarning):
    """Warning that a solve failed: it did not reach its end with finite numbers."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Result of `solve`; fields have the names that `scipy.integrate` uses."""

    state: Tensor  #: Final state ``(B, k, *D)``.
    #: ``(B, *D)``: the data component of the state, or the denoised data if ``denoise`` is set. It
    #: shares no memory with ``state`` and ``y``.
    data: Tensor
    t: Tensor  #: Times ``(S,)`` of the states in ``y``: the last time, or ``t_eval``.
    #: States at these times, ``(S, B, k, *D)``; states that a sample never reached are NaN. If only
    #: the last time is requested, ``y`` may share memory with ``state``.
    y: Tensor
    #: Score evaluations per sample, counted by wrapping the score; the largest number if samples
    #: differ.
    nfev: int
    #: 0: every sample arrived. 1: a state is not finite, or a solver gave up. 2: the callback
    #: stopped the solve.
    status: int
    message: str  #: The outcome in words.
    #: ``success`` ``(B,)``: which samples arrived with finite numbers. ``nfev`` ``(B,)``:
    #: evaluations of each sample until it stopped; the score is evaluated for the whole batch until
    #: the last sample stops. ``steps`` of a solver on a grid, ``attempts`` of an adaptive one.
    stats: dict[str, Any] = field(default_factory=dict)
    #: With ``log_prob=True`` the log-densities of the steps given the past, ``(n, B)`` nats.
    log_probs: Tensor | None = None

    @property
    def log_prob(self) -> Tensor | None:
        """Log-density of the path given its start, ``(B,)`` nats: the sum of ``log_probs``.

        The start that `solve` was given has the log-density ``sde.prior.log_prob(start)``. If the
        noise does not reach all components (Euler–Maruyama under CLD), the density is on its range.
        """
        return None if self.log_probs is None else self.log_probs.sum(0)

    @property
    def success(self) -> bool:
        """Whether every sample reached the end with finite numbers."""
        return self.status == 0

    def raise_for_failure(self) -> Solution:
        """Return the solution; raise FloatingPointError if ``status`` is 1."""
        if self.status == 1:
            raise FloatingPointError(self.message)
        return self

    def __repr__(self) -> str:
        return (
            f"Solution(success={self.success}, nfev={self.nfev}, state={tuple(self.state.shape)}, "
            f"message={self.message!r})"
        )


def finished(
    run: Run, done: Integration, requested: Tensor, final: Callable[[Tensor], Tensor] | None
) -> Solution:
    """Make a solution with the states at the requested times from an integration.

    ``final`` computes denoised data at the last time; None takes the data component.
    """
    states = done.states[: int((requested != run.times[0]).sum())]
    if requested[0] == run.times[0]:
        states = torch.cat([run.state.unsqueeze(0), states])
    nfev, z = done.nfev, done.state.contiguous()
    arrived = bool(done.success.all())
    if final is None or not bool(done.success.any()):
        data = z[:, 0].clone()
    else:
        nfev = nfev + int(run.process.score.evaluations(run.times[-1])) * done.success
        rows = done.success.nonzero().flatten().to(z.device)
        data = final(z) if arrived else z[:, 0].index_copy(0, rows, final(z)[rows])
    success = done.success & (finite_samples(z) & finite_samples(data)).cpu()
    whole = bool(success.all())
    message, log_probs = done.message, done.log_probs
    if arrived and not whole:
        message = "the state is not finite: the score is not finite, or the steps are too long"
    if log_probs is not None and not whole:
        log_probs = log_probs.masked_fill(~success.to(log_probs.device), torch.nan)
    return Solution(
        state=z,
        data=data,
        t=requested,
        y=states,
        nfev=int(nfev.max()) if len(nfev) else 0,
        status=2 if done.stopped else 0 if whole else 1,
        message=message,
        stats={**done.stats, "nfev": nfev, "success": success},
        log_probs=log_probs,
    )


def warn_of_failure(message: str) -> None:
    """Warn of a failed solve at the first stack frame outside the package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("cldsde."):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"the solve failed: {message}", SolveWarning, stacklevel=level)


def finite_samples(x: Tensor) -> Tensor:
    """Which samples are finite, ``(B,)``, without a temporary tensor of the size of x."""
    if not x.numel():
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    # amin and amax return NaN if any number is NaN.
    rows = x.reshape(len(x), -1)
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()
