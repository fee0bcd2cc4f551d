"""Score networks: a U-Net of the library diffusers, and the published NCSN++ and DDPM++.

A score network maps a state of unit size and a clock, half the log of the signal-to-noise ratio, as
`MixedScore` calls it. The output is zero before training: a mixed score starts at its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from cldsde.images.checks import check_groups, check_levels
from cldsde.images.schema import Blocks, Channels, Count, Flag, Shape, Share, checked
from cldsde.pretrained import ncsnpp


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, also if they are frozen."""
    return sum(p.numel() for p in module.parameters())


# Factor of the clock: diffusers embeds integer steps up to 1,000; the clock is about ±8.
CLOCK_SCALE = 50.0


class _ScoreNetwork(nn.Module):
    """A network with an embedding of the clock, and labels."""

    def __init__(self, network: nn.Module, embedding: nn.Module, classes: int | None) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        if classes is not None:
            width = embedding.get_parameter("linear_2.bias").numel()
            network.class_embedding = nn.Embedding(classes + 1, width)

    def forward(self, z: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Noise prediction ``(B, outputs·C, H, W)`` of the driven components.

        ``z`` is ``(B, inputs·C, H, W)`` and ``clock`` ``(B,)``. ``label`` is int64 ``(B,)`` in [0,
        classes]; None, or ``classes``, is no class. Raises a ValueError for another dtype or shape.
        """
        batch, classes = len(z), self.classes
        if classes is None and label is not None:
            raise ValueError("label must be None: the network has no classes; make it with classes")
        if classes is not None and label is None:
            label = torch.full((batch,), classes, device=z.device)
        if label is not None and (label.dtype, *label.shape) != (torch.int64, batch):
            msg = f"label must be an int64 tensor ({batch},), one a state; got {label.dtype} "
            raise ValueError(f"{msg}{tuple(label.shape)}")
        return self._apply_network(z, clock, None if label is None else label.to(z.device))

    def _apply_network(self, z: Tensor, clock: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = self.network(z, clock, label)
        return out


class UNet(_ScoreNetwork):
    """A U-Net of the library diffusers with the interface of a score network.

    Parameters
    ----------
    shape
        Shape ``(C, H, W)`` of the data; H and W are divisible by 2ⁿ⁻¹ for n levels.
    inputs, outputs
        Components of the state and driven components.
    channels
        Channels of each level, from full resolution down.
    blocks
        Residual blocks per level of the encoder. The decoder has one more per level.
    groups
        Groups of the group normalisation, each of two or more channels.
    attention
        Heights H, H/2, … of the levels with attention after each block, e.g. ``(16,)``. With any,
        the middle of the network has attention, too.
    head_channels
        Channels of an attention head, a divisor of the channels; None is one head of them all.
    dropout
        Dropout probability in the residual blocks, in [0, 1).
    classes
        Number of classes; None for images without labels.
    gradient_checkpointing
        Recompute the inside of residual blocks for the gradient: less memory, and about a third
        more time.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range or does not fit the others.
    """

    @checked
    def __init__(
        self,
        shape: Shape,
        inputs: Count,
        outputs: Count,
        *,
        channels: Channels,
        blocks: Blocks = 1,
        groups: Count = 8,
        attention: Sequence[Count] = (),
        head_channels: Count | None = None,
        dropout: Share = 0.0,
        classes: Count | None = None,
        gradient_checkpointing: Flag = False,
    ) -> None:
        check_levels(shape, channels)
        heights = ncsnpp.heights_of_levels(shape[1], channels, attention)
        attends = [height in attention for height in heights]
        check_groups(groups, channels)
        # The middle of the network has the channels of the last level.
        widths = {width for width, used in zip(channels, attends, strict=True) if used}
        widths |= {channels[-1]} if any(attends) else set()
        if head_channels is not None and any(width % head_channels for width in widths):
            msg = f"head_channels must divide the channels of attention, {sorted(widths)}; got "
            raise ValueError(f"{msg}{head_channels}")
        network = UNet2DModel(
            sample_size=tuple(shape[1:]),
            in_channels=inputs * shape[0],
            out_channels=outputs * shape[0],
            block_out_channels=tuple(channels),
            down_block_types=tuple(f"{'Attn' * used}DownBlock2D" for used in attends),
            up_block_types=tuple(f"{'Attn' * used}UpBlock2D" for used in attends[::-1]),
            layers_per_block=blocks,
            norm_num_groups=groups,
            add_attention=any(attends),
            attention_head_dim=head_channels,
            dropout=dropout,
        )
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
        super().__init__(network, network.time_embedding, classes)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()

    def _apply_network(self, z: Tensor, clock: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = self.network(z, CLOCK_SCALE * clock, label, return_dict=False)[0]
        return out


class NCSNpp(_ScoreNetwork):
    """The NCSN++ or DDPM++ of Song et al. (2021), layer by layer as published.

    Parameters
    ----------
    shape, inputs, outputs, classes
        See `UNet`.
    options
        ``channels``; ``blocks=2``; ``attention=()``, heights of the levels with attention;
        ``dropout=0.0``; ``fir=True``, resample with a filter; ``inputs_enter="residual"``, or
        ``"once"`` or ``"skip"``; ``outputs_leave="once"``, or ``"skip"``; ``fourier_scale=None``,
        scale of Fourier features of the clock; ``gradient_checkpointing=False``.
    """

    options_of = ncsnpp.NCSNpp

    @checked
    def __init__(
        self,
        shape: Shape,
        inputs: Count,
        outputs: Count,
        *,
        channels: Channels,
        blocks: Blocks = 2,
        classes: Count | None = None,
        **options: Any,
    ) -> None:
        check_levels(shape, channels)
        sizes = (inputs * shape[0], *shape[1:]), outputs * shape[0]
        network = ncsnpp.NCSNpp(*sizes, channels=channels, blocks=blocks, **options)
        super().__init__(network, network.embedding, classes)


NETWORKS: dict[str, type[nn.Module]] = {"UNet": UNet, "NCSNpp": NCSNpp}
"""Networks by name, all made as ``(shape, inputs, outputs, *, classes=None, **options)``."""
