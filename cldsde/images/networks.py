"""Score networks."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DModel
from torch import Tensor, nn

__all__ = ["UNet"]


class UNet(nn.Module):
    """A U-Net of the library diffusers with the interface of a score network.

    Maps a state ``(B, inputs·C, H, W)`` and a clock ``(B,)`` of order 1, as `MixedScore` supplies
    them, to ``(B, outputs·C, H, W)``. The last layer starts at zero, so that a mixed score starts
    at its Gaussian reference.

    Parameters
    ----------
    shape
        Shape ``(C, H, W)`` of the data; H and W divisible by 2 to the number of levels less one.
    inputs, outputs
        Components of the state and driven components.
    channels
        Channels of each level, from full resolution down, each divisible by ``groups``.
    blocks
        Residual blocks a level.
    groups
        Groups of the group normalisation.
    """

    # diffusers embeds integer steps up to 1,000; κ runs over about ±8.
    _CLOCK_SCALE = 50.0

    def __init__(
        self,
        shape: Sequence[int],
        inputs: int,
        outputs: int,
        *,
        channels: Sequence[int],
        blocks: int = 1,
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.network = UNet2DModel(
            sample_size=tuple(shape[1:]),
            in_channels=inputs * shape[0],
            out_channels=outputs * shape[0],
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=blocks,
            norm_num_groups=groups,
            add_attention=False,
        )
        nn.init.zeros_(self.network.conv_out.weight)
        nn.init.zeros_(self.network.conv_out.bias)

    def forward(self, z: Tensor, clock: Tensor) -> Tensor:
        """Noise prediction of the driven components."""
        out: Tensor = self.network(z, self._CLOCK_SCALE * clock, return_dict=False)[0]
        return out
