"""Dynamics of linear SDEs whose drift and diffusion are functions of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.checks import check_callable
from cldsde.linear.dynamics import Dynamics, driven_rows
from cldsde.linear.panels import Function, OverTimes, end_series, partition, transition_series
from cldsde.linear.reprs import shown
from cldsde.linear.series import eliminate, legendre_moments

_AT_ONCE = 512  # largest number of pieces whose series are in memory
# On a panel Legendre coefficients decrease by a factor of 8 each. The squares of those after the
# 14th are below rounding.
_DEGREES = 14


class FunctionDynamics(Dynamics):
    r"""Dynamics with F(t) and G(t) given by functions of time, which need not commute.

    On a panel of `partition`, or on a part of it, Ψ(end, τ) G(τ) is a Taylor series. Its terms have
    full relative accuracy however short the part is. Gaussian elimination of common leading terms
    then keeps the digits of each row of the noise root, as in `TimeChangedDynamics`. Panels in
    between are composed in a binary tree.

    Structure shorter than 1/256 may be missed. Near a jump or a square root of t, panels are much
    shorter than 1/‖F‖. Composing them loses digits of the smallest rows. See
    `LinearSDE.from_functions` for the parameters.
    """

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Callable[[Tensor], Tensor]
    ) -> None:
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            check_callable(function, name, "a function of a time")
        self._drift = OverTimes(drift)
        self._diffusion = OverTimes(diffusion)
        self._grid = grid = torch.linspace(0, 1, 257, device="cpu", dtype=torch.float64)
        F, G = self._drift(grid), self._diffusion(grid)
        for name, values in (("drift", F), ("diffusion", G)):
            if values.ndim != 3 or values.shape[0] != len(grid):
                msg = f"{name} must return one matrix per time; got shape {tuple(values.shape[1:])}"
                raise ValueError(msg)
            if not bool(values.detach().isfinite().all()):
                bad = grid[~values.detach().isfinite().all(-1).all(-1)][0]
                msg = f"{name} must be finite on [0, 1]; got NaN or infinity at t = {bad:g}"
                raise ValueError(msg)
        if F.shape[1] != F.shape[2]:
            raise ValueError(f"drift must return square matrices; got shape {tuple(F.shape[1:])}")
        if G.shape[1] != F.shape[1]:
            raise ValueError(
                f"diffusion must return matrices with as many rows as the drift, {F.shape[1]}; got "
                f"shape {tuple(G.shape[1:])}"
            )
        self.components = F.shape[1]
        self.driven = driven_rows(G)
        if not self.driven:
            raise ValueError(
                "diffusion must have a nonzero entry at some time, because without noise there is "
                "no score; got 0"
            )
        self._edges = partition(self._drift, self._diffusion, grid)
        self._known_values = self._some_values()

    @override
    def __repr__(self) -> str:
        """One line with the names of the functions."""
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
        result = self._transitions(self._drift, s, t, initial_root)
        return stack_first(result.psi, s.shape), stack_first(result.root, s.shape)

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        def no_drift(u: Tensor) -> Tensor:
            return 0 * self._drift(u)

        return stack_first(self._transitions(no_drift, s, t).root, s.shape)

    def _transitions(
        self, drift: Function, s: Tensor, t: Tensor, start: Tensor | None = None
    ) -> _Transitions:
        """Transitions over [s, t], with ``start`` as the root of the covariance of z_s."""
        self._follow_changes()
        first, last, span = s.flatten().contiguous(), t.flatten().contiguous(), (t - s).flatten()
        edges, lengths = self._edges, self._edges.diff()
        i = torch.searchsorted(edges, first.detach(), right=True) - 1
        i = i.clamp_max(len(lengths) - 1)
        j = torch.maximum(torch.searchsorted(edges, last.detach()) - 1, i)
        # Composing two short pieces would lose the digits that elimination keeps. An interval
        # around an edge that is shorter than the panels beside it gets a panel around that edge.
        shorter = torch.minimum(lengths[i], lengths[j])
        around = (j == i + 1) & (2 * span.detach() <= shorter)
        left = torch.where(around, edges[j] - shorter / 2, edges[i])
        length = torch.where(around, shorter, lengths[i])
        # A longer interval has three parts: one piece up to the first edge, unless it starts there;
        # whole panels, which other intervals share; and one piece after the last edge.
        longer = (i < j) & ~around
        at_edge = longer & (first == edges[i]) & (not s.requires_grad)
        cut = torch.where(longer, edges[i + 1] - first, span)
        i = torch.where(at_edge, i, i + 1)
        (early,), (late,) = (~at_edge).nonzero(as_tuple=True), longer.nonzero(as_tuple=True)
        i, j = i[late], j[late]
        low, high = (int(i.min()), int(j.max())) if len(late) else (0, 0)
        panels = slice(low, max(low, high))
        eye = torch.eye(self.components, device="cpu", dtype=torch.float64).unsqueeze(-1)
        known = torch.zeros_like(eye) if start is None else start.unsqueeze(-1)
        result = _Transitions(*(x.expand(-1, -1, len(first)) for x in (eye, known)))
        sizes = [len(early), len(late), len(lengths[panels])]
        early_pieces, late_pieces, whole_panels = self._pieces(
            drift,
            torch.cat([left[early], edges[j], edges[panels]]),
            torch.cat([length[early], lengths[j], lengths[panels]]),
            torch.cat([first[early], edges[j], edges[panels]]),
            torch.cat([cut[early], last[late] - edges[j], lengths[panels]]),
            known * (torch.arange(sum(sizes), device="cpu") < len(early)),
        ).split(sizes)
        result = result.put(early, early_pieces)
        if len(late):
            whole = result.at(late).then(_between(whole_panels, i - low, j - low)).then(late_pieces)
            result = result.put(late, whole)
        return result

    def _pieces(self, drift: Function, *tables: Tensor) -> _Transitions:
        """Results of `_piece` for long tables, a few pieces at a time."""
        portions = zip(*(torch.split(x, _AT_ONCE, dim=-1) for x in tables), strict=True)
        results = [self._piece(drift, *few) for few in portions]
        return _Transitions(*(torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)))

    def _piece(
        self, drift: Function, left: Tensor, length: Tensor, s: Tensor, h: Tensor, start: Tensor
    ) -> _Transitions:
        """Transitions over [s, s + h] in panels [left, left + length] ``(n,)``, from ``start``."""
        series, k = end_series((drift, self._diffusion), left, length, s, h), self.components
        F, G = h[:, None, None, None] * series[..., :k], series[..., k:]
        Y, driven = transition_series(F, G)
        psi = Y.sum(1).permute(1, 2, 0)
        terms = driven.permute(2, 3, 1, 0) * safe_sqrt(h)
        _, r, count, _ = terms.shape
        # Eliminate the initial root together with the noise.
        columns = torch.cat([terms.flatten(1, 2), block_product(psi, start)], dim=1)
        multipliers, columns = eliminate(columns)
        terms, spread = columns[:, : r * count].reshape_as(terms), columns[:, r * count :]
        noise = legendre_moments(_DEGREES, count).T @ terms
        root = lower_factor(torch.cat([noise.flatten(1, 2), spread], dim=1))
        return _Transitions(psi, block_product(multipliers, root))

    @torch.no_grad()
    def _some_values(self) -> Tensor:
        times = self._grid[::16]
        return torch.cat([self._drift(times), self._diffusion(times)], dim=-1)

    def _follow_changes(self) -> None:
        """Compute the panels again if the functions have changed, for example in training."""
        values = self._some_values()
        if not torch.equal(values, self._known_values):
            self._edges = partition(self._drift, self._diffusion, self._grid)
            self._known_values = values


def _between(level: _Transitions, i: Tensor, j: Tensor) -> _Transitions:
    """Transitions over the panels i … j − 1 of a stack, for i ≤ j, by a binary tree."""
    k = len(level.psi)
    psi = torch.eye(k, device="cpu", dtype=torch.float64).unsqueeze(-1).expand(-1, -1, len(i))
    before = after = _Transitions(psi, torch.zeros_like(psi))
    while bool((i < j).any()):
        # Compose the nodes of this level that no node of the next level covers.
        odd = (i < j) & (i % 2 == 1)
        before = before.then(level.at(i)).where(odd, before)
        i = i + odd.to(i)
        odd = (i < j) & (j % 2 == 1)
        j = j - odd.to(j)
        after = level.at(j).then(after).where(odd, after)
        i, j = i // 2, j // 2
        pairs = 2 * torch.arange(level.psi.shape[-1] // 2, device="cpu")
        level = level.at(pairs).then(level.at(pairs + 1))
    return before.then(after)


class _Transitions(NamedTuple):
    """Transition matrices and roots ``(k, k, n)``, stack-last."""

    psi: Tensor
    root: Tensor

    def at(self, index: Tensor) -> _Transitions:
        index = index.clamp_max(self.psi.shape[-1] - 1)
        return _Transitions(self.psi[..., index], self.root[..., index])

    def put(self, index: Tensor, new: _Transitions) -> _Transitions:
        return _Transitions(*(a.index_copy(-1, index, b) for a, b in zip(self, new, strict=True)))

    def split(self, sizes: list[int]) -> list[_Transitions]:
        parts = (x.split(sizes, -1) for x in self)  # type: ignore[no-untyped-call]
        return [_Transitions(*part) for part in zip(*parts, strict=True)]

    def then(self, later: _Transitions) -> _Transitions:
        root = torch.cat([block_product(later.psi, self.root), later.root], dim=1)
        return _Transitions(block_product(later.psi, self.psi), lower_factor(root))

    def where(self, condition: Tensor, other: _Transitions) -> _Transitions:
        return _Transitions(
            *(torch.where(condition, a, b) for a, b in zip(self, other, strict=True))
        )
