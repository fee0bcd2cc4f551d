"""Linear SDEs whose drift and diffusion are given as functions of time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import stack_first
from cldsde.linear.checks import as_float64
from cldsde.linear.collocation import Matrices, collocate, collocate_from, converged
from cldsde.linear.covariance import joint_root
from cldsde.linear.dynamics import Dynamics, driven_rows

__all__ = ["FunctionDynamics"]


class FunctionDynamics(Dynamics):
    r"""F(t) and G(t) given by callables that need not commute with themselves.

    The law over [s, t] is found by Gauss collocation of order 16 on panels with ‖F‖h ≤ ½ over which
    F and G change little, as a table of 257 times tells; the number of panels is doubled until Ψ
    and the root no longer change by 1e-12 of a row's size; see `cldsde.linear.collocation`. What is
    shorter than 1/256 may be missed.

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
        if not self.driven:
            msg = (
                "diffusion: the callable must not return zeros alone; without noise there is no "
                "score"
            )
            raise ValueError(msg)
        self._rate = max(2 * float(F.detach().abs().sum(1).max()), _variation(F), _variation(G))

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self._drift(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self._diffusion(t)

    @override
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        psi, root = self._law(lambda u: (self._drift(u), self._diffusion(u)), s, t)
        return psi, root if initial_root is None else joint_root(psi @ initial_root, root)

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        def still(u: Tensor) -> tuple[Tensor, Tensor]:
            G = self._diffusion(u)
            return G.new_zeros(*G.shape[:-1], self.components), G

        return self._law(still, s, t)[1]

    def _law(self, matrices: Matrices, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        start, span = s.flatten(), (t - s).flatten()
        longest = float(span.detach().max()) if len(span) else 0.0

        def apart(panels: int) -> tuple[Tensor, Tensor]:
            h = span / panels
            steps = torch.arange(panels, dtype=torch.float64).unsqueeze(1)
            return collocate(matrices, start + steps * h, h.expand(panels, -1))

        def from_one(panels: int) -> tuple[Tensor, Tensor]:
            return collocate_from(matrices, start[0], t.flatten(), panels)

        panels = max(1, math.ceil(self._rate * longest))
        # Marginal laws at many times all start at 0: what they share is integrated once.
        shared = len(span) > 4 and longest > 0 and bool((start == start[0]).all())
        shared = shared and not start.requires_grad  # each start has a gradient of its own
        factors = converged(from_one if shared else apart, panels)
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


def _variation(values: Tensor) -> float:
    """Largest slope of a table of matrices on [0, 1], relative to the largest matrix."""
    table = values.detach().flatten(1)
    size = float(table.norm(dim=1).max())
    return float(table.diff(dim=0).norm(dim=1).max()) * (len(table) - 1) / size if size > 0 else 0.0


def _over_stack(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluate a user's function of one time over times of any shape.

    At once where it can be mapped over a batch and gives the same as one by one, which a function
    that turns times into numbers does not.
    """
    some = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: as_float64(function(x)))

    def at_once(t: Tensor) -> Tensor:
        flat = t.flatten() if t.numel() else t.new_zeros(1)
        values: Tensor = mapped(flat)[: t.numel()]
        return values.reshape(*t.shape, *values.shape[1:])

    def stacked(t: Tensor) -> Tensor:
        flat = t.flatten()
        # One time at least is asked, so that the shape is known where no time is wanted.
        asked = flat if len(flat) else flat.new_zeros(1)
        values = torch.stack([as_float64(function(x)) for x in asked])[: len(flat)]
        return values.reshape(*t.shape, *values.shape[1:])

    alone = stacked(some)
    try:
        together = at_once(some)
    except Exception:  # noqa: BLE001
        return stacked  # it works for one time, as was just seen, and not for many
    same = together.shape == alone.shape and torch.allclose(together, alone, rtol=1e-14, atol=0)
    return at_once if same else stacked
