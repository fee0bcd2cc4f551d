"""Functions of time on adaptive panels, as Legendre and Taylor series of full relative accuracy.

A function on a panel is sampled at q = 16 Gauss nodes and represented by its coefficients in the
orthonormal Legendre polynomials p_j of x ∈ [0, 1]. Consider a part of the panel with the relative
length ρ. Around its end the function is a series in y ∈ [0, 1], the time before the end. Term p is
of order ρ^p. Such series are formed, multiplied and integrated term by term, so that every term
keeps its digits however short the part is. Function values would lose them, because they are equal
to leading order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from cldsde.linear.checks import as_float64
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.series import balancing_scale

_NODES = 16  # q
_TERMS = 36  # of a product
_EPS = torch.finfo(torch.float64).eps
_MAX_PANELS = 4096
_SHORTEST = 2.0**-48
_PROMISE = 1e-12

Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def partition(drift: Function, diffusion: Function, grid: Tensor) -> Tensor:
    """Edges of panels on which a transition is a Taylor series of `_TERMS` terms.

    Panels are halved until three conditions hold:

    - F and G are polynomials of degree q − 1 to rounding, by their last Legendre coefficients and
      by their values on the grid;
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
        rounding = _time_rounding(left, length)
        inside = (torch.searchsorted(left, grid, right=True) - 1).clamp_min(0)
        x = (grid - left[inside]) / length[inside]
        values = [_at_nodes(function, left, length) for function in functions]
        fits = length * values[0].abs().sum(-2).amax((1, 2)) <= 2
        terms, errors, sizes = [], [], []
        for value, table in zip(values, tables, strict=True):
            series = _legendre(value)
            size, error = _norm(series).amax(1), _norm(series)[:, -3:].amax(1)
            # Values far below the largest need no relative accuracy; below 1e-308 they have none.
            tolerance = 64 * (_EPS + rounding) * size + 1e-100 * _norm(table).max()
            fits &= error <= tolerance
            missed = _norm(torch.einsum("nj,njab->nab", _basis(x), series[inside]) - table)
            missed = (missed > 100 * tolerance[inside]) & (x >= 0) & (x <= 1)
            fits[inside[missed]] = False
            whole = torch.ones_like(left)
            terms.append(_taylor(_without_rounding(series, rounding), whole, whole))
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


def end_series(
    functions: tuple[Function, Function], left: Tensor, length: Tensor, s: Tensor, h: Tensor
) -> Tensor:
    """Taylor terms ``(p, q, a, b)`` of functions, side by side, at the end of [s, s + h].

    The panels [left, left + length], ``(p,)``, contain these intervals.
    """
    values = torch.cat([_at_nodes(f, left, length) for f in functions], dim=-1)
    at_end = torch.cat([f(s + h) for f in functions], dim=-1)
    series = _without_rounding(_legendre(values), _time_rounding(left, length))
    series = _taylor(series, (s + h - left) / length, h / length)
    # Interpolation gives a nearly vanishing entry no relative accuracy, so use the function's
    # value at the end. It averages the rounding of all other entries.
    small = at_end.detach().abs() < 0.01 * values.detach().abs().amax(1)
    value = torch.where(small, at_end, series[:, 0])
    return torch.cat([value.unsqueeze(1), series[:, 1:]], dim=1)


def transition_series(F: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Taylor terms of Y(y) = Ψ(end, end − h y), which solves Y' = Y F with Y(0) = I, and of Y G.

    They are ``(p, _TERMS, k, k)``, whose sum is Ψ, and ``(p, _TERMS, k, r)``. ``F`` and ``G`` are
    the terms of hF, ``(p, q, k, k)``, and of G, ``(p, q, k, r)``.
    """
    p, _, k, _ = F.shape
    # Term n of a product with Y is the latest terms of Y, side by side, times the stacked factors.
    factors = torch.cat([F, G], dim=-1).flip(1).flatten(1, 2)
    recent = torch.eye(k, device="cpu", dtype=torch.float64).expand(p, k, k)
    Y, driven = [recent], []
    for n in range(1, _TERMS + 1):
        product = recent @ factors[:, -recent.shape[-1] :]
        driven.append(product[..., k:])
        if n < _TERMS:
            Y.append(product[..., :k] / n)
            full = recent.shape[-1] == _NODES * k
            recent = torch.cat([recent[..., k:] if full else recent, Y[-1]], dim=-1)
    return torch.stack(Y, dim=1), torch.stack(driven, dim=1)


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


def _unresolved(time: Tensor) -> ValueError:
    return ValueError(
        f"drift or diffusion nearly diverges or varies too quickly near t = {float(time):.10g}; "
        "end the process earlier, or take smoother functions (that return float64)"
    )


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices)
    return norms


def _at_nodes(function: Function, left: Tensor, length: Tensor) -> Tensor:
    """Values ``(p, q, a, b)`` at the Gauss nodes of panels [left, left + length], ``(p,)``."""
    return function(left.unsqueeze(1) + length.unsqueeze(1) * gauss_legendre(_NODES)[0])


def _time_rounding(left: Tensor, length: Tensor) -> Tensor:
    """Rounding error of the times in panels relative to the panels' lengths, ``(p,)``."""
    return _EPS * (left + length) / length


def _legendre(values: Tensor) -> Tensor:
    """Legendre coefficients ``(p, q, a, b)`` of a function from its values at Gauss nodes."""
    series: Tensor = _transform() @ values.flatten(2)
    return series.reshape(values.shape)


def _without_rounding(series: Tensor, rounding: Tensor) -> Tensor:
    """Set Legendre coefficients below the rounding error of the values to zero, entry by entry.

    Otherwise a derivative of order j would amplify the rounding error by q^2j. The gradients of
    all coefficients are kept. ``rounding`` ``(p,)`` is the rounding error of a time relative to the
    length of its panel.
    """
    size = series.detach().abs()
    order = torch.arange(_NODES, device="cpu", dtype=torch.float64).reshape(-1, 1, 1)
    slope = (order * size).sum(1, keepdim=True)
    noise = 4 * _EPS * size.amax(1, keepdim=True) + rounding.reshape(-1, 1, 1, 1) * slope
    return series - torch.where(size <= noise, series.detach(), 0.0)


def _taylor(series: Tensor, end: Tensor, length: Tensor) -> Tensor:
    """Taylor terms of f(end − length y) in powers of y, from the Legendre coefficients of f.

    Both series are ``(p, q, a, b)``. ``end`` and ``length`` ``(p,)`` are in units of the panel.
    """
    # Powers of y in p_j(x): u p_j = b_{j+1} p_{j+1} + b_j p_{j−1} with u = 2x − 1.
    b = _recurrence()
    u, step = (2 * end - 1).unsqueeze(0), 2 * length.unsqueeze(0)
    last = torch.zeros(_NODES, len(end), device="cpu", dtype=torch.float64)
    row = torch.cat([torch.ones_like(u), last[1:]])
    rows = [row]
    for j in range(1, _NODES):
        raised = torch.cat([torch.zeros_like(u), step * row[:-1]])
        row, last = (u * row - raised - b[j - 1] * last) / b[j], row
        rows.append(row)
    terms: Tensor = torch.stack(rows).permute(2, 1, 0) @ series.flatten(2)
    return terms.reshape(series.shape)


def _basis(x: Tensor) -> Tensor:
    """Polynomials p_0 … p_{q−1} at points ``(n,)`` of [0, 1], ``(n, q)``."""
    b = _recurrence()
    u = 2 * x - 1
    values = [torch.ones_like(x), u / b[1]]
    for j in range(2, _NODES):
        values.append((u * values[-1] - b[j - 1] * values[-2]) / b[j])
    return torch.stack(values, dim=-1)


@lru_cache
@torch.inference_mode(False)
def _recurrence() -> Tensor:
    """b_j = j/√(4j² − 1) for j < q."""
    b = [j / math.sqrt(4 * j * j - 1) for j in range(1, _NODES)]
    return torch.tensor([0.0, *b], device="cpu", dtype=torch.float64)


@lru_cache
@torch.inference_mode(False)
def _transform() -> Tensor:
    """Matrix from values at the Gauss nodes to coefficients, ``(q, q)``."""
    values = _basis(gauss_legendre(_NODES)[0])
    # Compute the Christoffel weights here, because numpy's have an error of some units in the last
    # place.
    return values.T / values.square().sum(1)
