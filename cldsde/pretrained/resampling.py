"""Resampling by two with the anti-aliasing filter (1, 3, 3, 1), and the layers of NCSN++ around it.

Song et al. (2021, appendix H) take the filter from StyleGAN2. Pixels beyond the edge are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Filter(nn.Module):
    """The filter (1, 3, 3, 1) in both directions, of sum 1."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=torch.get_default_device()) / 8
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


class FilteredConv(_Filter):
    """The filter, then a 3 × 3 convolution at every second pixel: half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        filtered = F.conv2d(x, self.weight(x), padding=2, groups=x.shape[1])
        out: Tensor = self.conv(filtered)
        return out
