"""Scores of Gaussian mixtures in few dimensions, by matrix products over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DenseScore"]


class DenseScore(NamedTuple):
    """Scores at T times of n Gaussians whose laws are matrices over all k·D numbers of a state.

    Numbers of the batch lie in the last axis: products with small matrices, sums and softmaxes of
    few entries are many times faster along it than across it.
    """

    whitening: tuple[Tensor, ...]  # (T, n k D, D) for each component of the state
    centre: Tensor  # (T, n k D, 1), minus the whitened means
    log_scale: Tensor  # (T, n, 1)
    pull: Tensor | None  # (T, d D, n k D), to the score; None for one Gaussian: it is multiplied in

    @classmethod
    def of(
        cls,
        psi: Tensor,
        whitening: Tensor,
        log_scale: Tensor,
        means: Tensor,
        axes: Tensor,
        rows: Sequence[int],
    ) -> DenseScore:
        """From laws in eigenbases, ``(T, n, D, k, k)``, and their axes ``(n, D, D)``."""
        n, dimension = means.shape
        # Numbers of a state are ordered component by component.
        whole = torch.einsum("tnjkl,nij->tnkjli", whitening, axes).flatten(4).flatten(2, 3)
        mean = torch.einsum("tl,ni->tnli", psi, means).flatten(2)
        centre = -(whole @ mean.unsqueeze(-1)).flatten(1, 2)
        components = psi.shape[-1]
        driven = whole.reshape(*whole.shape[:-1], components, dimension)[..., rows, :].flatten(-2)
        pull = -driven.flatten(1, 2).mT
        whole = whole.flatten(1, 2)
        if n == 1:
            whole, centre = pull @ whole, pull @ centre
        parts = whole.reshape(*whole.shape[:-1], components, dimension).unbind(-2)
        return cls(parts, centre, log_scale.unsqueeze(-1), None if n == 1 else pull)

    def to(self, like: Tensor) -> DenseScore:
        """The same in the dtype and on the device of a tensor."""
        return DenseScore(
            tuple(part.to(like).contiguous() for part in self.whitening),
            self.centre.to(like),
            self.log_scale.to(like),
            None if self.pull is None else self.pull.to(like),
        )

    def __call__(self, z: Tensor, i: int) -> Tensor:
        """Score ``(B, d D)`` of states ``(B, k, D)`` at time i."""
        whitened = self.centre[i]
        for part, x in zip(self.whitening, z.unbind(1), strict=True):
            whitened = torch.addmm(whitened, part[i], x.mT)
        if self.pull is None:
            return whitened.mT
        modes = self.log_scale.shape[1]
        by_mode = whitened.reshape(modes, len(whitened) // modes, len(z))
        log_terms = self.log_scale[i] - 0.5 * by_mode.square().sum(1)
        weighted = by_mode * log_terms.softmax(0).unsqueeze(1)
        return (self.pull[i] @ weighted.flatten(0, 1)).mT
