"""Scores of Gaussian mixtures in few dimensions, by matrix products over the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DenseScore"]


class DenseScore:
    """Scores at T times of n Gaussians whose laws are matrices over all k·D numbers of a state.

    Numbers of the batch lie in the last axis: products with small matrices, sums and softmaxes of
    few entries are many times faster along it than across it.

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
        parts = whole.reshape(*whole.shape[:-1], *split).movedim(-2, 1)
        # Taken apart here: to index a table takes as long as to launch a small kernel.
        self._whitening = [part.unbind() for part in parts.to(like).contiguous()]  # (n k D, D) each
        self._centre = centre.to(like).unbind()  # (n k D, 1), minus the whitened means
        self._log_scale = log_scale.unsqueeze(-1).to(like).unbind()  # (n, 1)
        self._pull = pull.to(like).unbind()  # (d D, n k D), to the score

    def __call__(self, z: Tensor, i: int) -> Tensor:
        """Score ``(B, d D)`` of states ``(B, k, D)`` at time i."""
        whitened = self._centre[i]
        for part, x in zip(self._whitening[i], z.unbind(1), strict=True):
            whitened = torch.addmm(whitened, part, x.mT)
        if self._modes == 1:
            return whitened.mT
        by_mode = whitened.reshape(self._modes, len(whitened) // self._modes, len(z))
        log_terms = self._log_scale[i] - 0.5 * by_mode.square().sum(1)
        weighted = by_mode * log_terms.softmax(0).unsqueeze(1)
        return (self._pull[i] @ weighted.flatten(0, 1)).mT
