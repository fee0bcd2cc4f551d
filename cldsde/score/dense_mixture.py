"""Score of a small Gaussian mixture by dense matrices over all numbers of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DenseMarginal(NamedTuple):
    """The distribution of z_t for each mode, with the numbers of a state component by component."""

    mean: Tensor  # (*, n, k D, 1)
    whitening: Tensor  # (*, n, k D, k D)
    log_scale: Tensor  # (*, n, 1)
    pull: Tensor  # (*, d D, n k D), from whitened residuals to the score

    @classmethod
    def rotated(
        cls, mean: Tensor, blocks: Tensor, log_scale: Tensor, axes: Tensor, rows: Sequence[int]
    ) -> DenseMarginal:
        """From whitening blocks ``(*, n, D, k, k)`` in the eigenbases ``axes`` of the modes."""
        whitening = torch.einsum("...njkl,nij->...nkjli", blocks, axes)
        pull = -whitening[..., rows, :].flatten(-2).flatten(-4, -2).mT
        whole = whitening.flatten(-2).flatten(-3, -2)
        return cls(mean.flatten(-2).unsqueeze(-1), whole, log_scale.unsqueeze(-1), pull)

    def score(self, flat: Tensor) -> Tensor:
        """Score ``(B, d D)`` of states ``(B, k, D)`` that share a time.

        The batch is the last axis, because sums and softmaxes over few entries are much faster if
        the long axis is contiguous.
        """
        whitened = self.whitening @ (flat.flatten(1).mT - self.mean)
        if len(whitened) > 1:
            log_terms = self.log_scale - 0.5 * whitened.square().sum(1)
            whitened = whitened * log_terms.softmax(0).unsqueeze(1)
        score: Tensor = (self.pull @ whitened.flatten(0, 1)).mT
        return score
