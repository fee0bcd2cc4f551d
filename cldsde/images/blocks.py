"""Layers of the score networks that the library diffusers does not have."""

from __future__ import annotations

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLOCK_SCALE = 50.0
"""Factor of the clock: diffusers embeds integer steps up to 1,000; the clock is about ±8."""


class ClassEmbedding(nn.Embedding):
    """An embedding that returns NaN for a label out of range, and never waits for its device."""

    def forward(self, label: Tensor) -> Tensor:
        """Apply the layer."""
        last = self.num_embeddings - 1
        rows = super().forward(label.clamp(0, last))
        return rows.masked_fill(((label < 0) | (label > last)).unsqueeze(1), math.nan)


class _RecomputedBlock(ResnetBlock2D):  # type: ignore[misc]
    """A residual block that keeps only its input for the gradient."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(input_tensor, temb)  # type: ignore[no-any-return]
        return checkpoint(forward, input_tensor, temb, use_reentrant=False)  # type: ignore[no-any-return]


def recompute(network: nn.Module) -> None:
    """Turn on gradient checkpointing of residual blocks; names of weights do not change.

    diffusers' own switch reaches only the middle block of networks of skip blocks.
    """
    for module in network.modules():
        if type(module) is ResnetBlock2D:
            module.__class__ = _RecomputedBlock
