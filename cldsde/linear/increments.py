"""Brownian increments and the stochastic integrals of a linear SDE: covariance, and refinement.

Over [s, t] they are J = (ΔW, I) with ΔW = w(t) − w(s) and I = ∫Ψ(t, τ) G(τ) dw(τ), or ΔW alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cldsde.linear.covariance import joint_root
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.sde import LinearSDE

_PANELS, _NODES = 4, 16  # smallest number of panels, nodes per panel
_HALVINGS = 20  # bisections of a cell between given times, before it is split at a time exactly


def increment_roots(sde: LinearSDE, s: Tensor, t: Tensor, *, integrals: bool) -> Tensor:
    """Roots of the covariance of J over intervals ``(n,)``, ``(n, r, r)``."""
    span = (t - s).unsqueeze(1)
    # Choose panels so short that Ψ changes little over each.
    probes = s.unsqueeze(1) + span * torch.linspace(0, 1, 9, dtype=torch.float64, device="cpu")
    change = float((sde.drift(probes).abs().sum(-2).amax(-1).amax(1) * (t - s)).max())
    x, w = gauss_legendre(_NODES, max(_PANELS, math.ceil(change)))
    at = torch.minimum(s.unsqueeze(1) + span * x, t.unsqueeze(1))
    G = sde.diffusion(at)
    functional = torch.eye(G.shape[-1], dtype=torch.float64, device="cpu").expand(*at.shape, -1, -1)
    if integrals:
        functional = torch.cat([functional, sde.transition_matrix(at, t.unsqueeze(1)) @ G], dim=-2)
    columns = (span * w).sqrt()[..., None, None] * functional
    return joint_root(columns.movedim(1, 2).flatten(2))


@dataclass(eq=False)
class Interval:
    """An interval of a path, with the rotation that splits its normals between its halves."""

    key: int
    start: float
    end: float
    given: list[float]  # given times inside of it; none for a cell and its parts
    parent: Interval | None = None
    halvings: int = 0  # splits between the cell and this part of it
    children: tuple[Interval, ...] = ()
    root: Tensor = field(init=False)  # J = root ξ
    rotation: Tensor = field(init=False)  # (ξ_earlier, ξ_later) = rotation (ξ, η)

    def halve(self, split: float) -> tuple[Interval, ...]:
        """Split the interval at a time, and return its halves."""
        halvings = self.halvings + (not self.given)
        earlier = [t for t in self.given if t < split]
        later = [t for t in self.given if t > split]
        self.children = (
            Interval(2 * self.key, self.start, split, earlier, self, halvings),
            Interval(2 * self.key + 1, split, self.end, later, self, halvings),
        )
        return self.children

    def cover(self, s: float, t: float) -> list[Interval]:
        """Smallest set of its parts whose union is [s, t], if s and t are ends of cells."""
        if self.end <= s or self.start >= t:
            return []
        if s <= self.start and self.end <= t:
            return [self]
        return [part for child in self.children for part in child.cover(s, t)]


class IncrementTree:
    """Binary tree over increasing times ``(n + 1,)``, which splits J of the whole into J of parts.

    It splits at the given times. To reach another time, it bisects the cell around that time up to
    20 times and then splits exactly there.
    """

    def __init__(self, sde: LinearSDE, times: Tensor, *, integrals: bool) -> None:
        self.sde, self.integrals = sde, integrals
        self.columns = sde.diffusion(times[0]).shape[-1]
        self.size = self.columns + (sde.components if integrals else 0)
        given: list[float] = times.tolist()
        self._top = Interval(1, given[0], given[-1], given[1:-1])
        # Build the tree, and its roots and rotations from the cells up.
        levels = [[self._top]]
        while inner := [part for part in levels[-1] if part.given]:
            halves = [part.halve(part.given[(len(part.given) - 1) // 2]) for part in inner]
            levels.append([half for pair in halves for half in pair])
        self._set_roots([part for level in levels for part in level if not part.children])
        for level in reversed(levels[:-1]):
            inner = [part for part in level if part.children]
            for part, root in zip(inner, self._rotate(inner), strict=True):
                part.root = root

    def read(
        self, intervals: Sequence[tuple[float, float]], blocks: Sequence[Tensor]
    ) -> list[list[tuple[Interval, Tensor]]]:
        """Express functionals block · J of intervals through the normals of parts."""
        low, high = self._top.start, self._top.end
        for s, t in intervals:
            if not low <= s < t <= high:
                raise ValueError(
                    f"an interval of the path must have {low:g} ≤ s < t ≤ {high:g}; got [{s}, {t}]"
                )
        self._refine(sorted({at for interval in intervals for at in interval}))
        # One part per call, because batched products round differently.
        return [
            [
                (part, block @ self._carried([part.end], [t])[0] @ part.root)
                for part in self._top.cover(s, t)
            ]
            for (s, t), block in zip(intervals, blocks, strict=True)
        ]

    def _refine(self, stops: list[float]) -> None:
        """Split cells until every stop is the end of a cell."""
        frontier = [(self._top, stops)]
        while frontier:
            part, near = frontier.pop()
            inside = [at for at in near if part.start < at < part.end]
            if not inside:
                continue
            if not part.children:
                middle = (part.start + part.end) / 2
                deep = part.halvings >= _HALVINGS or not part.start < middle < part.end
                # One part per call, because batched products round differently.
                self._set_roots(part.halve(inside[0] if deep else middle))
                self._rotate([part])
            frontier += [(child, inside) for child in part.children]

    def _set_roots(self, parts: Sequence[Interval]) -> None:
        s, t = _doubles([part.start for part in parts]), _doubles([part.end for part in parts])
        roots = increment_roots(self.sde, s, t, integrals=self.integrals)
        for part, root in zip(parts, roots, strict=True):
            part.root = root

    def _rotate(self, parts: list[Interval]) -> Sequence[Tensor]:
        """Compute the rotations that split parts, and return the parts' roots."""
        carried = self._carried(
            [part.children[0].end for part in parts], [part.end for part in parts]
        )
        earlier, later = (
            torch.stack([part.children[half].root for part in parts]) for half in range(2)
        )
        # [carried earlier, later] = [root, 0] Oᵀ with a rotation O
        joint = torch.cat([carried @ earlier, later], dim=-1)
        rotations, upper = torch.linalg.qr(joint.mT, mode="complete")
        upper = upper[..., : self.size, :]
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        rotations[..., : self.size] *= sign.unsqueeze(-2)
        for part, rotation in zip(parts, rotations, strict=True):
            part.rotation = rotation
        roots: Tensor = (sign.unsqueeze(-1) * upper).mT
        return roots.unbind()

    def _carried(self, s: list[float], t: list[float]) -> Tensor:
        """Matrices ``(n, r, r)`` by which J up to s enters J up to t."""
        carried = torch.eye(self.size, dtype=torch.float64, device="cpu").repeat(len(s), 1, 1)
        if self.integrals:
            block = self.sde.transition_matrix(_doubles(s), _doubles(t))
            carried[:, self.columns :, self.columns :] = block
        return carried


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
