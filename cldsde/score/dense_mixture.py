"""Scores of Gaussian mixtures in few dimensions, by matrix products over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["dense_score"]

_WIDTH = 16  # numbers of a row in products with the score of one Gaussian


def dense_score(
    psi: Tensor,
    whitening: Tensor,
    log_scale: Tensor,
    means: Tensor,
    axes: Tensor,
    rows: Sequence[int],
    like: Tensor,
) -> Callable[[Tensor, int], Tensor]:
    """Scores at T times of n Gaussians whose laws are matrices over all k·D numbers of a state.

    Parameters
    ----------
    psi, whitening, log_scale
        Laws in the eigenbases of the covariances, ``(T, k)``, ``(T, n, D, k, k)``, ``(T, n)``.
    means, axes
        ``(n, D)`` and the eigenbases, ``(n, D, D)``.
    rows
        The d components whose score is wanted.
    like
        A tensor of the dtype and device of the states to come.

    Returns
    -------
    callable
        States ``(B, k, D)`` and the number of a time to scores ``(B, d D)``.
    """
    (modes, dimension), components = means.shape, psi.shape[-1]
    # Numbers of a state are ordered component by component.
    whole = torch.einsum("tnjkl,nij->tnkjli", whitening, axes).flatten(4).flatten(2, 3)
    mean = torch.einsum("tl,ni->tnli", psi, means).flatten(2)
    centre = -(whole @ mean.unsqueeze(-1)).flatten(1, 2)
    driven = whole.reshape(*whole.shape[:-1], components, dimension)[..., rows, :].flatten(-2)
    pull = -driven.flatten(1, 2).mT
    whole = whole.flatten(1, 2)
    if modes == 1:
        # The only Gaussian is responsible for every state: its score is linear.
        return _Line(_by_component(pull @ whole, components), pull @ centre, like)
    return _Mixture(_by_component(whole, components), centre, log_scale, pull, like)


def _by_component(matrix: Tensor, components: int) -> Tensor:
    """The parts ``(T, k, r, D)`` of matrices ``(T, r, k D)``."""
    return matrix.reshape(*matrix.shape[:-1], components, -1).movedim(-2, 1)


class _Mixture:
    """Scores of several Gaussians.

    Numbers of the batch lie in the last axis: products with small matrices, sums and softmaxes of
    few entries are many times faster along it than across it.

    Parameters
    ----------
    parts, centre
        Whitening ``(T, k, n k D, D)`` and minus the whitened means ``(T, n k D, 1)``.
    log_scale, pull
        Of the densities, ``(T, n)``, and from whitened residuals to the score, ``(T, d D, n k D)``.
    like
        A tensor of the dtype and device of the states to come.
    """

    def __init__(
        self, parts: Tensor, centre: Tensor, log_scale: Tensor, pull: Tensor, like: Tensor
    ) -> None:
        self._modes = log_scale.shape[-1]
        # Taken apart here: to index a table takes as long as to launch a small kernel.
        self._parts = [part.unbind() for part in parts.to(like).contiguous()]
        self._centre = centre.to(like).unbind()
        self._log_scale = log_scale.unsqueeze(-1).to(like).unbind()
        self._pull = pull.to(like).unbind()

    def __call__(self, z: Tensor, i: int) -> Tensor:
        whitened = self._centre[i]
        for part, x in zip(self._parts[i], z.unbind(1), strict=True):
            whitened = torch.addmm(whitened, part, x.mT)
        by_mode = whitened.reshape(self._modes, len(whitened) // self._modes, len(z))
        log_terms = self._log_scale[i] - 0.5 * by_mode.square().sum(1)
        weighted = by_mode * log_terms.softmax(0).unsqueeze(1)
        return (self._pull[i] @ weighted.flatten(0, 1)).mT


class _Line:
    """The score of one Gaussian: a linear map, which several samples share one product of.

    Products with matrices of eight columns and fewer waste most of what a processor can do; those
    of samples side by side, with a block-diagonal matrix, do not.

    Parameters
    ----------
    parts, offset
        ``(T, k, d D, D)`` and ``(T, d D, 1)``.
    like
        A tensor of the dtype and device of the states to come.
    """

    def __init__(self, parts: Tensor, offset: Tensor, like: Tensor) -> None:
        parts, offset = parts.movedim(1, 0).mT.to(like), offset.squeeze(-1).to(like)
        components, times, inner, self._wide = parts.shape
        # To look whether a sum is finite would hold up another device.
        count = max(1, _WIDTH // inner) if like.device.type == "cpu" else 1
        self._side_by_side = count
        blocks = like.new_zeros(components, times, count, inner, count, self._wide)
        blocks.diagonal(dim1=2, dim2=4).copy_(parts.unsqueeze(-1))
        blocks = blocks.view(components, times, count * inner, count * self._wide)
        self._blocks = [part.unbind() for part in blocks], offset.repeat(1, count).unbind()
        self._alone = [part.unbind() for part in parts], offset.unbind()

    def __call__(self, z: Tensor, i: int) -> Tensor:
        count = self._side_by_side
        # 0 · NaN: what is not finite would spread to the samples beside it, forth or back.
        followed = torch.is_grad_enabled() and z.requires_grad
        if count == 1 or len(z) % count or followed or torch.compiler.is_compiling():
            return self._products(self._alone, z, i)
        score = self._products(self._blocks, z, i)
        return score if math.isfinite(score.sum()) else self._products(self._alone, z, i)

    def _products(
        self, table: tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]], z: Tensor, i: int
    ) -> Tensor:
        (first, *others), offsets = table
        x, *rest = z.unbind(1)
        shape = -1, len(first[i])
        total = torch.addmm(offsets[i], x.reshape(shape), first[i])
        for part, x in zip(others, rest, strict=True):
            total.addmm_(x.reshape(shape), part[i])
        return total.view(len(z), self._wide)
