"""Adaptive panels on which given functions of time are polynomials to rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cldsde.linear.checks import as_float64
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.series import balancing_scale
from cldsde.linear.taylor import (
    NODES,
    basis,
    legendre,
    taylor,
    transition_series,
    without_rounding,
)

_EPS = torch.finfo(torch.float64).eps
_MAX_PANELS = 4096
_SHORTEST = 2.0**-48
_PROMISE = 1e-12

Function = Callable[[Tensor], Tensor]


def at_nodes(function: Function, left: Tensor, length: Tensor) -> Tensor:
    """Values ``(p, NODES, a, b)`` at the Gauss nodes of panels [left, left + length], ``(p,)``."""
    return function(left.unsqueeze(1) + length.unsqueeze(1) * gauss_legendre(NODES)[0])


def time_rounding(left: Tensor, length: Tensor) -> Tensor:
    """Rounding error of the times in panels relative to the panels' lengths, ``(p,)``."""
    return _EPS * (left + length) / length


@torch.no_grad()
def partition(drift: Function, diffusion: Function, grid: Tensor) -> Tensor:
    """Edges of panels on which a transition is a Taylor series of `taylor.TERMS` terms.

    Panels are halved until three conditions hold:

    - F and G are polynomials of degree NODES − 1 to rounding, by their last Legendre coefficients
      and by their values on the grid;
    - the last terms of Ψ G are below rounding;
    - ‖F‖h ≤ 2.

    A jump or a square root is enclosed by a panel so short that its error does not matter. Raise
    ValueError if more than 4096 panels are needed, or if a panel that is too short to be halved
    contributes more than 1e-12 to a transition.

    ``drift`` and ``diffusion`` map times ``(*)`` to F ``(*, k, k)`` and G ``(*, k, r)``. ``grid``
    is increasing, from one end to the other.
    """
    # Balanced units minimise ‖F‖ and thus the number of panels.
    scale = balancing_scale(drift(grid).abs().amax(0))
    functions: tuple[Function, Function] = (
        lambda t: drift(t) * scale / scale.unsqueeze(1),
        lambda t: diffusion(t) / scale.unsqueeze(1),
    )
    tables = [function(grid) for function in functions]
    left, length = grid[:1], grid[-1:] - grid[:1]
    accepted: list[Tensor] = []
    panels = 0
    while len(left):
        rounding = time_rounding(left, length)
        inside = (torch.searchsorted(left, grid, right=True) - 1).clamp_min(0)
        x = (grid - left[inside]) / length[inside]
        values = [at_nodes(function, left, length) for function in functions]
        fits = length * values[0].abs().sum(-2).amax((1, 2)) <= 2
        terms, errors, sizes = [], [], []
        for value, table in zip(values, tables, strict=True):
            series = legendre(value)
            size, error = _norm(series).amax(1), _norm(series)[:, -3:].amax(1)
            # Values far below the largest need no relative accuracy; below 1e-308 they have none.
            tolerance = 64 * (_EPS + rounding) * size + 1e-100 * _norm(table).max()
            fits &= error <= tolerance
            missed = _norm(torch.einsum("nj,njab->nab", basis(x), series[inside]) - table)
            missed = (missed > 100 * tolerance[inside]) & (x >= 0) & (x <= 1)
            fits[inside[missed]] = False
            whole = torch.ones_like(left)
            terms.append(taylor(without_rounding(series, rounding), whole, whole))
            errors.append(error)
            sizes.append(size)
        hF = length[:, None, None, None] * terms[0]
        for products in transition_series(hF, terms[1]):
            fits &= _norm(products)[:, -4:].amax(1) <= _EPS * _norm(products).amax(1)
        fits |= length <= _SHORTEST * (grid[-1] - grid[0])
        loss = length * torch.stack([errors[0], errors[1] * sizes[1], sizes[1].square()])
        accepted.append(torch.cat([left.unsqueeze(0), loss])[:, fits])
        panels += len(accepted[-1][0])
        left, length = left[~fits], length[~fits] / 2
        if panels + 2 * len(left) > _MAX_PANELS:
            raise _unresolved(left[length.argmin()])
        left = torch.stack([left, left + length], dim=1).flatten()
        length = length.repeat_interleave(2)
    left, of_drift, of_noise, noise = torch.cat(accepted, dim=1)
    loss = torch.maximum(of_drift, of_noise / noise.sum())
    if bool(loss.max() > _PROMISE):
        raise _unresolved(left[loss.argmax()])
    return torch.cat([left.sort().values, grid[-1:]])


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices)
    return norms


def _unresolved(time: Tensor) -> ValueError:
    return ValueError(
        f"drift or diffusion nearly diverges or varies too quickly near t = {float(time):.10g}; "
        "end the process earlier, or take smoother functions (that return float64)"
    )


class OverTimes:
    """A user's function of one time, evaluated at times of any shape.

    The function is mapped over a batch by `torch.func.vmap` if this gives the same values as one
    call per time. Otherwise, for example if it converts times to numbers, it is called per time.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        some = torch.tensor([0.0, 0.3, 1.0], device="cpu", dtype=torch.float64)
        alone = self._one_by_one(some)
        try:
            together = self._at_once(some)
        except Exception:  # noqa: BLE001
            self._maps = False  # the calls above worked for single times, so only vmap fails
        else:
            same = together.shape == alone.shape
            self._maps = same and torch.allclose(together, alone, rtol=1e-14, atol=0)

    def __call__(self, t: Tensor) -> Tensor:
        """Values ``(*t.shape, a, b)`` float64 on the CPU."""
        # Evaluate at least one time, so that the shape is known even without times.
        flat = t.flatten() if t.numel() else t.new_zeros(1)
        values = (self._at_once if self._maps else self._one_by_one)(flat)[: t.numel()]
        return values.reshape(*t.shape, *values.shape[1:])

    def _value(self, t: Tensor) -> Tensor:
        return as_float64(self.function(t))

    def _at_once(self, t: Tensor) -> Tensor:
        values: Tensor = torch.func.vmap(self._value)(t)
        return values

    def _one_by_one(self, t: Tensor) -> Tensor:
        return torch.stack([self._value(x) for x in t])
