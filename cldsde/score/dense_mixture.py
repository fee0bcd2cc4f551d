"""Scores of Gaussian mixtures in few dimensions, by matrix products over the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DenseScore"]

_WIDTH = 16  # numbers of a row, in products with the score of one Gaussian


class DenseScore:
    """Scores at T times of n Gaussians whose laws are matrices over all k·D numbers of a state.

    Numbers of the batch lie in the last axis: products with small matrices, sums and softmaxes of
    few entries are many times faster along it than across it. The score of a single Gaussian is a
    product alone, of several samples at once with a block-diagonal matrix, and lies as states do.

    Parameters
    ----------
    psi, whitening, log_scale
        Laws in the eigenbases of the covariances, ``(T, k)``, ``(T, n, D, k, k)``, ``(T, n)``.
    means, axes
        ``(n, D)`` and the eigenbases, ``(n, D, D)``.
    rows
        Components whose score is wanted.
    like
        A tensor of the dtype and device of the states to come.
    """

    def __init__(
        self,
        psi: Tensor,
        whitening: Tensor,
        log_scale: Tensor,
        means: Tensor,
        axes: Tensor,
        rows: Sequence[int],
        like: Tensor,
    ) -> None:
        (self._modes, dimension), components = means.shape, psi.shape[-1]
        # Numbers of a state are ordered component by component.
        whole = torch.einsum("tnjkl,nij->tnkjli", whitening, axes).flatten(4).flatten(2, 3)
        mean = torch.einsum("tl,ni->tnli", psi, means).flatten(2)
        centre = -(whole @ mean.unsqueeze(-1)).flatten(1, 2)
        split = components, dimension
        driven = whole.reshape(*whole.shape[:-1], *split)[..., rows, :].flatten(-2)
        pull = -driven.flatten(1, 2).mT
        whole = whole.flatten(1, 2)
        if self._modes == 1:
            # The only Gaussian is responsible for every state: its score is linear.
            whole, centre = pull @ whole, pull @ centre
            self._lines = _Lines(whole, centre, components, like)
            return
        parts = whole.reshape(*whole.shape[:-1], *split).movedim(-2, 1)
        # Taken apart here: to index a table takes as long as to launch a small kernel.
        self._whitening = [part.unbind() for part in parts.to(like).contiguous()]  # (n k D, D) each
        self._centre = centre.to(like).unbind()  # (n k D, 1), minus the whitened means
        self._log_scale = log_scale.unsqueeze(-1).to(like).unbind()  # (n, 1)
        self._pull = pull.to(like).unbind()  # (d D, n k D), to the score

    def __call__(self, z: Tensor, i: int) -> Tensor:
        """Score ``(B, d D)`` of states ``(B, k, D)`` at time i."""
        if self._modes == 1:
            return self._lines(z, i)
        whitened = self._centre[i]
        for part, x in zip(self._whitening[i], z.unbind(1), strict=True):
            whitened = torch.addmm(whitened, part, x.mT)
        by_mode = whitened.reshape(self._modes, len(whitened) // self._modes, len(z))
        log_terms = self._log_scale[i] - 0.5 * by_mode.square().sum(1)
        weighted = by_mode * log_terms.softmax(0).unsqueeze(1)
        return (self._pull[i] @ weighted.flatten(0, 1)).mT


class _Lines:
    """Linear maps of states at T times, ``(T, d D, k D)`` and ``(T, d D, 1)``."""

    def __init__(self, matrix: Tensor, offset: Tensor, components: int, like: Tensor) -> None:
        self._wide, dimension = matrix.shape[-2], matrix.shape[-1] // components
        # Products with matrices of eight columns and fewer waste most of what a processor can do.
        self._side_by_side = max(1, _WIDTH // dimension)
        split = *matrix.shape[:-1], components, dimension
        parts = matrix.to(like).reshape(split).movedim(-2, 1).mT
        offset = offset.to(like).squeeze(-1)
        times, _, inner, outer = parts.shape
        count = self._side_by_side
        blocks = like.new_zeros(components, times, count, inner, count, outer)
        blocks.diagonal(dim1=2, dim2=4).copy_(parts.movedim(1, 0).unsqueeze(-1))
        blocks = blocks.view(components, times, count * inner, count * outer)
        self._blocks = [part.unbind() for part in blocks], offset.repeat(1, count).unbind()
        self._parts, self._offset = parts, offset

    def __call__(self, z: Tensor, i: int) -> Tensor:
        parts: Sequence[Tensor]
        if len(z) % self._side_by_side:
            parts, total = self._parts[i].unbind(), self._offset[i]
        else:
            blocks, offsets = self._blocks
            parts, total = [part[i] for part in blocks], offsets[i]
        for part, x in zip(parts, z.unbind(1), strict=True):
            total = torch.addmm(total, x.reshape(-1, len(part)), part)
        return total.view(len(z), self._wide)
