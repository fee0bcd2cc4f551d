"""Linear SDEs whose drift and diffusion are given as functions of time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import stack_first
from cldsde.linear.checks import as_float64
from cldsde.linear.collocation import converged
from cldsde.linear.dynamics import Dynamics, driven_rows

__all__ = ["FunctionDynamics"]


class FunctionDynamics(Dynamics):
    r"""F(t) and G(t) given by callables that need not commute with themselves.

    The law over [s, t] is found by Gauss collocation of order 16 on panels with ‖F‖h ≤ ½, whose
    number is doubled until Ψ and the root no longer change by 1e-12 of a row's size; see
    `cldsde.linear.collocation`.

    Parameters
    ----------
    drift
        A time, a 0-dimensional float64 tensor, to ``(k, k)``.
    diffusion
        A time to ``(k, r)``.
    end
        Largest time at which the callables are asked.
    """

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Callable[[Tensor], Tensor], end: float
    ) -> None:
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            if not callable(function):
                msg = f"{name} must be a callable of a time; got {function!r}"
                raise TypeError(msg)
        self._drift = _over_stack(drift)
        self._diffusion = _over_stack(diffusion)
        grid = torch.linspace(0, end, 257, dtype=torch.float64)
        F, G = self._drift(grid), self._diffusion(grid)
        for name, values in (("drift", F), ("diffusion", G)):
            if values.ndim != 3 or values.shape[0] != len(grid):
                msg = (
                    f"{name}: the callable must return one matrix a time; got {tuple(values.shape)}"
                )
                raise ValueError(msg)
            if not bool(values.detach().isfinite().all()):
                bad = grid[~values.detach().isfinite().all(-1).all(-1)][0]
                msg = (
                    f"{name}: the callable must be finite on [0, {end:g}]; it is not at t = {bad:g}"
                )
                raise ValueError(msg)
        if F.shape[1] != F.shape[2]:
            msg = f"drift: the callable must return square matrices; got {tuple(F.shape[1:])}"
            raise ValueError(msg)
        if G.shape[1] != F.shape[1]:
            msg = (
                f"diffusion: the callable must return matrices with as many rows as the drift, "
                f"{F.shape[1]}; got {tuple(G.shape[1:])}"
            )
            raise ValueError(msg)
        self.components = F.shape[1]
        self.driven = driven_rows(G)
        self._largest = float(F.detach().abs().sum(1).max())

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self._drift(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self._diffusion(t)

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        start, span = s.flatten(), (t - s).flatten()
        longest = float(span.detach().max()) if len(span) else 0.0

        def edges(panels: int) -> tuple[Tensor, Tensor]:
            h = span / panels
            steps = torch.arange(panels, dtype=torch.float64).unsqueeze(1)
            return start + steps * h, h.expand(panels, -1)

        panels = max(1, math.ceil(2 * self._largest * longest))
        factors = converged(lambda u: (self._drift(u), self._diffusion(u)), edges, panels)
        if factors is None:
            msg = (
                f"drift, diffusion: they vary too fast over an interval of {longest:g} to be "
                "resolved; take shorter intervals or smoother functions"
            )
            raise ValueError(msg)
        psi, root = factors
        return stack_first(psi, s.shape), stack_first(root, s.shape)

    @override
    def stationary_covariance(self) -> None:
        return None

    @override
    def stationary_reversal(self, covariance: Tensor) -> None:
        return None


def _over_stack(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluate a user's function of one time over times of any shape."""

    def stacked(t: Tensor) -> Tensor:
        flat = t.flatten()
        # One time at least is asked, so that the shape is known where no time is wanted.
        asked = flat if len(flat) else flat.new_zeros(1)
        values = torch.stack([as_float64(function(x)) for x in asked])[: len(flat)]
        return values.reshape(*t.shape, *values.shape[1:])

    return stacked
