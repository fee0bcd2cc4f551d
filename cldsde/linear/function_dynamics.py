"""Linear SDEs whose drift and diffusion are given as functions of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.dynamics import Dynamics, driven_rows, eliminate, legendre_moments
from cldsde.linear.panels import OverTimes, at_nodes, partition, time_rounding
from cldsde.linear.reprs import shown
from cldsde.linear.taylor import TERMS, legendre, taylor, transition_series, without_rounding

__all__ = ["FunctionDynamics"]

_AT_ONCE = 512  # pieces whose series are held at a time
# On a panel Legendre coefficients fall by a factor of 8: squares beyond the 14th are rounding.
_DEGREES = 14


class FunctionDynamics(Dynamics):
    r"""F(t) and G(t) given by callables that need not commute with themselves.

    [0, end] is divided into panels with ‖F‖h ≤ 2 on which F and G are polynomials to rounding.
    Panels are shorter where the functions vary quickly, and enclose jumps. On a panel, or on a part
    of it, Ψ(end, τ) G(τ) is a Taylor series whose terms have full relative accuracy however short
    the part is. Gaussian elimination of common leading terms then keeps the digits of each row of
    the noise root, as in `TimeChangedDynamics`. Panels in between are composed in a binary tree.
    Structure that is shorter than 1/256 may be missed.

    Parameters
    ----------
    drift
        A time, a 0-dimensional float64 tensor, to ``(k, k)``.
    diffusion
        A time to ``(k, r)``.
    end
        Largest time at which the callables are evaluated.

    Raises
    ------
    ValueError
        If a callable returns matrices that do not fit or values that are not finite, if the
        diffusion is zero at all times, or if a callable nearly diverges or varies too quickly
        somewhere.
    """

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Callable[[Tensor], Tensor], end: float
    ) -> None:
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            if not callable(function):
                msg = f"{name} must be a callable of a time; got {function!r}"
                raise TypeError(msg)
        self._drift = OverTimes(drift)
        self._diffusion = OverTimes(diffusion)
        self._grid = grid = torch.linspace(0, end, 257, dtype=torch.float64, device="cpu")
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
        self._edges = partition(self._drift, self._diffusion, grid)
        self._seen = self._some_values()

    @override
    def __repr__(self) -> str:
        """Functions by name, in one line."""
        drift, diffusion = (shown(f.function) for f in (self._drift, self._diffusion))
        return f"FunctionDynamics(drift={drift}, diffusion={diffusion})"

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
        if initial_root is None:
            initial_root = torch.zeros(self.components, 0, dtype=torch.float64, device="cpu")
        return self._law(s, t, initial_root, moving=True)

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        start = torch.zeros(self.components, 0, dtype=torch.float64, device="cpu")
        return self._law(s, t, start, moving=False)[1]

    def _law(self, s: Tensor, t: Tensor, start: Tensor, *, moving: bool) -> tuple[Tensor, Tensor]:
        """Ψ and root over [s, t] with the root ``start`` at s; F counts only if ``moving``."""
        first, last, span = s.flatten().contiguous(), t.flatten().contiguous(), (t - s).flatten()
        self._follow_changes()
        edges, lengths = self._edges, self._edges.diff()
        i = torch.searchsorted(edges, first.detach(), right=True) - 1
        i = i.clamp_max(len(lengths) - 1)
        j = torch.maximum(torch.searchsorted(edges, last.detach()) - 1, i)
        # Composing two short pieces would lose the digits that elimination keeps. An interval that
        # is short beside the panels on both sides of an edge lies in a panel around that edge.
        shorter = torch.minimum(lengths[i], lengths[j])
        around = (j == i + 1) & (2 * span.detach() <= shorter)
        left = torch.where(around, edges[j] - shorter / 2, edges[i])
        length = torch.where(around, shorter, lengths[i])
        j = torch.where(around, i, j)
        cut = torch.where(i == j, span, edges[i + 1] - first)
        law = self._pieces(left, length, first, cut, start, moving=moving)
        (on,) = (i < j).nonzero(as_tuple=True)
        if len(on):
            i, j = i[on], j[on]
            nothing = start[:, :0]
            late = self._pieces(
                edges[j], lengths[j], edges[j], last[on] - edges[j], nothing, moving=moving
            )
            between = self._between(i + 1, j, moving=moving)
            early = tuple(part[..., on] for part in law)
            rest = _compose(_compose(early, between), late)
            law = tuple(
                part.index_copy(-1, on, whole) for part, whole in zip(law, rest, strict=True)
            )
        psi, root = law
        return stack_first(psi, s.shape), stack_first(root, s.shape)

    def _pieces(
        self, left: Tensor, length: Tensor, s: Tensor, h: Tensor, start: Tensor, *, moving: bool
    ) -> tuple[Tensor, Tensor]:
        """Ψ and root over [s, s + h] inside panels [left, left + length], stack-last."""
        parts = [
            self._piece(*few, start, moving=moving)
            for few in zip(*(x.split(_AT_ONCE) for x in (left, length, s, h)), strict=True)
        ]
        psi, root = zip(*parts, strict=True)
        return torch.cat(psi, dim=-1), torch.cat(root, dim=-1)

    def _piece(
        self, left: Tensor, length: Tensor, s: Tensor, h: Tensor, start: Tensor, *, moving: bool
    ) -> tuple[Tensor, Tensor]:
        end, share, rounding = (s + h - left) / length, h / length, time_rounding(left, length)
        at_end = self._drift(s + h), self._diffusion(s + h)
        F, G = (
            _terms(legendre(at_nodes(function, left, length)), rounding, end, share, value)
            for function, value in zip((self._drift, self._diffusion), at_end, strict=True)
        )
        Y, driven = transition_series(h[:, None, None, None] * F * moving, G)
        psi = Y.sum(1)
        terms = driven.permute(2, 3, 1, 0) * safe_sqrt(h)
        r = terms.shape[1]
        # Elimination sees what is spread at the start, too.
        spread = (psi @ start).permute(1, 2, 0)
        multipliers, columns = eliminate(torch.cat([terms.flatten(1, 2), spread], dim=1))
        terms, spread = columns[:, : r * TERMS].reshape_as(terms), columns[:, r * TERMS :]
        noise = torch.einsum("krpn,pj->krjn", terms, legendre_moments(_DEGREES, TERMS))
        root = lower_factor(torch.cat([noise.flatten(1, 2), spread], dim=1))
        return psi.permute(1, 2, 0), block_product(multipliers, root)

    def _between(self, i: Tensor, j: Tensor, *, moving: bool) -> tuple[Tensor, Tensor]:
        """Ψ and root over the panels i … j − 1, for stacks of i ≤ j, by a binary tree."""
        k, low, high = self.components, int(i.min()), int(j.max())
        psi = torch.eye(k, dtype=torch.float64, device="cpu").unsqueeze(-1).expand(k, k, len(i))
        before = after = (psi, torch.zeros_like(psi))
        if low >= high:
            return before
        left, length = self._edges[low:high], self._edges.diff()[low:high]
        nothing = torch.zeros(k, 0, dtype=torch.float64, device="cpu")
        level = self._pieces(left, length, left, length, nothing, moving=moving)
        i, j = i - low, j - low
        while bool((i < j).any()):
            # Nodes of this level that no node of the next covers.
            odd = (i < j) & (i % 2 == 1)
            before = _where(odd, _compose(before, _take(level, i)), before)
            i = i + odd.to(i)
            odd = (i < j) & (j % 2 == 1)
            j = j - odd.to(j)
            after = _where(odd, _compose(_take(level, j), after), after)
            i, j = i // 2, j // 2
            pairs = level[0].shape[-1] // 2
            even, odds = (
                tuple(part[..., first : 2 * pairs : 2] for part in level) for first in (0, 1)
            )
            level = _compose(even, odds)
        return _compose(before, after)

    @torch.no_grad()
    def _some_values(self) -> Tensor:
        times = self._grid[::16]
        return torch.cat([self._drift(times), self._diffusion(times)], dim=-1)

    def _follow_changes(self) -> None:
        """Divide anew if the callables have changed, as when their parameters are trained."""
        values = self._some_values()
        if not torch.equal(values, self._seen):
            self._edges = partition(self._drift, self._diffusion, self._grid)
            self._seen = values

    @override
    def stationary_covariance(self) -> None:
        return None

    @override
    def stationary_reversal(self, covariance: Tensor) -> None:
        return None


def _terms(series: Tensor, rounding: Tensor, end: Tensor, share: Tensor, value: Tensor) -> Tensor:
    """Taylor terms at the end, with the value there in entries that nearly vanish.

    Those have no relative accuracy from interpolation, which averages rounding in all others.
    """
    terms = taylor(without_rounding(series, rounding), end, share)
    small = value.detach().abs() < 0.01 * series.detach().abs().amax(1)
    return torch.cat([torch.where(small, value, terms[:, 0]).unsqueeze(1), terms[:, 1:]], dim=1)


_Law = tuple[Tensor, Tensor]


def _compose(first: _Law, then: _Law) -> _Law:
    root = torch.cat([block_product(then[0], first[1]), then[1]], dim=1)
    return block_product(then[0], first[0]), lower_factor(root)


def _take(law: _Law, index: Tensor) -> _Law:
    index = index.clamp_max(law[0].shape[-1] - 1)
    return law[0][..., index], law[1][..., index]


def _where(condition: Tensor, law: _Law, other: _Law) -> _Law:
    return torch.where(condition, law[0], other[0]), torch.where(condition, law[1], other[1])
