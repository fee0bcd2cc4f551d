"""Layers of the score networks that the library diffusers does not have."""

from __future__ import annotations

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
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


class FourierFeatures(nn.Module):
    """Sines and cosines of the clock in random frequencies."""

    frequencies: Tensor

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * scale / CLOCK_SCALE * torch.randn(count))

    def forward(self, clock: Tensor) -> Tensor:
        """Apply the layer."""
        phase = clock[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class _Filter(nn.Module):
    """The filter (1, 3, 3, 1) in both directions, of sum 1.

    It equals diffusers' own to rounding, which copies its kernel to the device at every call.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def weight(self, x: Tensor) -> Tensor:
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)


class Halve(_Filter):
    """Half the resolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.conv2d(x, self.weight(x), stride=2, padding=1, groups=x.shape[1])


class Double(_Filter):
    """Twice the resolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        # Three of four numbers that the filter sees are zeros put between the pixels.
        return F.conv_transpose2d(x, 4 * self.weight(x), stride=2, padding=1, groups=x.shape[1])


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
