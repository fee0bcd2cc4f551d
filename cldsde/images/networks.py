"""Score networks: a U-Net and the NCSN++, both made of parts of the library diffusers.

A score network maps a state ``(B, inputs·C, H, W)`` of unit size and a clock ``(B,)``, half the log
of the signal-to-noise ratio (about ±8), to ``(B, outputs·C, H, W)``, as `MixedScore` calls it. Its
output is zero before training, so that a mixed score starts at its Gaussian reference.

A network of labelled images also takes the label of each image: 0 … classes − 1, or ``classes``,
the null label for no class, which classifier-free guidance needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from cldsde.images.blocks import (
    CLOCK_SCALE,
    ClassEmbedding,
    Double,
    FourierFeatures,
    Halve,
    recompute,
)
from cldsde.images.checks import check_counts, check_groups, check_levels
from cldsde.linear.checks import check_at_least, check_positive


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _ScoreNetwork(nn.Module):
    """A `UNet2DModel` with labels."""

    def __init__(self, network: UNet2DModel, classes: int | None) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        if classes is not None:
            width = network.time_embedding.linear_2.out_features
            network.class_embedding = ClassEmbedding(classes + 1, width)

    def forward(self, z: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Noise prediction ``(B, outputs·C, H, W)`` of the driven components.

        Parameters
        ----------
        z
            States ``(B, inputs·C, H, W)``.
        clock
            ``(B,)``.
        label
            Classes ``(B,)`` int64 in [0, classes], the last one for no class; None: no class.
            Labels on the CPU are checked. Reading labels on another device would wait for it in
            every step of a sampler: there an image is NaN if its label is out of range.

        Raises
        ------
        ValueError
            If there are labels but no classes, or they are not ``(B,)`` int64 in [0, classes].
        """
        if self.classes is not None:
            label = _checked_label(label, len(z), self.classes, z.device)
        elif label is not None:
            msg = "label must be None: the network has no classes; make it with classes=…"
            raise ValueError(msg)
        out: Tensor = self.network(z, CLOCK_SCALE * clock, label, return_dict=False)[0]
        return out


class UNet(_ScoreNetwork):
    """A U-Net of the library diffusers with the interface of a score network.

    Parameters
    ----------
    shape
        Shape ``(C, H, W)`` of the data; H and W divisible by 2 to the number of levels less one.
    inputs, outputs
        Components of the state and driven components.
    channels
        Channels of each level, from full resolution down; each of the groups has two or more.
    blocks
        Residual blocks per level.
    groups
        Groups of the group normalisation.
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

    def __init__(
        self,
        shape: Sequence[int],
        inputs: int,
        outputs: int,
        *,
        channels: Sequence[int],
        blocks: int = 1,
        groups: int = 8,
        attention: Sequence[int] = (),
        head_channels: int | None = None,
        dropout: float = 0.0,
        classes: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_counts(inputs=inputs, outputs=outputs, blocks=blocks, groups=groups, classes=classes)
        attends = _levels(shape, channels, attention)
        check_groups(groups, channels)
        _check_heads(head_channels, channels, attends)
        _check_dropout(dropout)
        network = UNet2DModel(
            sample_size=tuple(shape[1:]),
            in_channels=inputs * shape[0],
            out_channels=outputs * shape[0],
            block_out_channels=tuple(channels),
            down_block_types=_block_types("DownBlock2D", attends),
            up_block_types=_block_types("UpBlock2D", attends[::-1]),
            layers_per_block=blocks,
            norm_num_groups=groups,
            add_attention=any(attends),
            attention_head_dim=head_channels,
            dropout=dropout,
        )
        _zero(network.conv_out)
        super().__init__(network, classes)
        if gradient_checkpointing:
            recompute(network)


class NCSNpp(_ScoreNetwork):
    """The NCSN++ of Song et al. (2021), from blocks of the library diffusers.

    A U-Net of residual blocks in the manner of BigGAN, which halve and double the resolution
    themselves, with an anti-aliasing filter (1, 3, 3, 1) and sums divided by √2. The filtered input
    enters at each level, and the output is a sum over the levels.

    Parameters
    ----------
    shape, inputs, outputs, dropout, classes, gradient_checkpointing
        See `UNet`.
    channels
        Channels of each level, from full resolution down: multiples of 32, or, without attention
        and up to 64, of 4. A level has c/4 groups of the group normalisation, 32 at most.
    blocks
        Residual blocks per level, beside the block that halves the resolution.
    attention
        Heights H, H/2, … of the levels with attention after each block, e.g. ``(16,)``; on the way
        up after the last. The middle of the network always has attention.
    head_channels
        See `UNet`; None, one head of all channels, is as published.
    fourier_scale
        None: sines and cosines of the clock in a geometric series of frequencies. σ > 0: in random
        frequencies 2π N(0, σ²), part of the weights. Song et al. take 16 for VE's log noise level;
        Karras et al. (2022), who divide its log by 4, in effect 4.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range or does not fit the others.

    Notes
    -----
    For CIFAR-10: ``channels=(128, 256, 256, 256), blocks=8, attention=(16,), dropout=0.1,
    fourier_scale=16``, 106.7 million parameters for CLD. For CelebA-HQ of 256 × 256:
    ``channels=(128, 128, 256, 256, 256, 256, 256), blocks=2, attention=(16,)``, 65.5 million.

    Weights start as published: Glorot uniform, biases zero, and the last convolution of a residual
    or attention block so small that the block starts as its shortcut.

    The input enters, and the output is summed, as in the published networks for 256 × 256
    (``input_skip``, ``output_skip``). The network for CIFAR-10 passes the filtered input through
    3 × 3 convolutions (``residual``) and has its output at full resolution alone, with 0.9 million
    more parameters.

    References
    ----------
    Y. Song et al., *Score-based generative modeling through stochastic differential equations*,
    2021, appendix H. T. Dockhorn et al., *Score-based generative modeling with critically-damped
    Langevin diffusion*, 2022, appendix E.
    """

    def __init__(
        self,
        shape: Sequence[int],
        inputs: int,
        outputs: int,
        *,
        channels: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (),
        head_channels: int | None = None,
        dropout: float = 0.0,
        fourier_scale: float | None = None,
        classes: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_counts(inputs=inputs, outputs=outputs, blocks=blocks, classes=classes)
        attends = _levels(shape, channels, attention)
        unit = 32 if any(attends) or max(channels) > 64 else 4
        if any(width % unit for width in channels):
            msg = "channels must be multiples of 32, or, without attention and up to 64, of 4; got "
            raise ValueError(f"{msg}{list(channels)}")
        _check_heads(head_channels, channels, [*attends[:-1], True])
        _check_dropout(dropout)
        if fourier_scale is not None:
            check_positive(fourier_scale, "fourier_scale")
        network = UNet2DModel(
            sample_size=tuple(shape[1:]),
            in_channels=inputs * shape[0],
            out_channels=outputs * shape[0],
            block_out_channels=tuple(channels),
            down_block_types=_block_types("SkipDownBlock2D", attends),
            up_block_types=_block_types("SkipUpBlock2D", attends[::-1]),
            layers_per_block=blocks,
            norm_num_groups=None,
            norm_eps=1e-6,
            mid_block_scale_factor=math.sqrt(2),
            attention_head_dim=head_channels,
            dropout=dropout,
        )
        # diffusers divides the output by the clock if it computes Fourier features itself.
        if fourier_scale is not None:
            embedding = network.time_embedding
            network.time_proj = FourierFeatures(channels[0], fourier_scale)
            embedding.linear_1 = nn.Linear(2 * channels[0], embedding.linear_1.out_features)
        # The blocks' own convolutions are for images of three channels.
        for block, width in zip(network.down_blocks[:-1], channels, strict=False):
            block.skip_conv = nn.Conv2d(inputs * shape[0], width, 1)
            block.downsamplers = nn.ModuleList([Halve()])
            block.resnet_down.downsample = Halve()
        for block, width in zip(network.up_blocks, reversed(channels), strict=True):
            block.upsampler = Double()
            if block.resnet_up is not None:
                block.skip_conv = nn.Conv2d(width, outputs * shape[0], 3, padding=1)
                block.resnet_up.upsample = Double()
        _initialise(network)
        super().__init__(network, classes)
        if gradient_checkpointing:
            recompute(network)


NETWORKS: dict[str, type[nn.Module]] = {"UNet": UNet, "NCSNpp": NCSNpp}
"""Networks by name, all made as ``(shape, inputs, outputs, *, classes=None, **options)``.

A configuration names a network of one's own, with the same arguments, by ``module:Class``.
"""


def _initialise(network: UNet2DModel) -> None:
    """Initialise the weights as Song et al.'s code does; see the notes of `NCSNpp`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in network.modules():
            # Their variance is scaled by 1e-10, for a gradient that is not zero.
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(1e-5)
            elif isinstance(module, Attention):
                module.to_out[0].weight.mul_(1e-5)
    _zero(network.conv_out)
    for block in network.up_blocks[:-1]:
        _zero(block.skip_conv)


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _block_types(name: str, attends: Sequence[bool]) -> tuple[str, ...]:
    return tuple(f"Attn{name}" if with_attention else name for with_attention in attends)


def _checked_label(label: Tensor | None, batch: int, classes: int, device: torch.device) -> Tensor:
    if label is None:
        return torch.full((batch,), classes, device=device)
    if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.shape != (batch,):
        got = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else repr(label)
        msg = f"label must be an int64 tensor ({batch},), one a state; got {got}"
        raise ValueError(msg)
    if label.device.type == "cpu" and bool(((label < 0) | (label > classes)).any()):
        msg = f"label must lie in [0, {classes}], {classes} being no class; got {label.tolist()}"
        raise ValueError(msg)
    return label.to(device)


def _levels(shape: Sequence[int], channels: Sequence[int], attention: Sequence[int]) -> list[bool]:
    """Whether each level has attention; raise if sizes and resolutions do not fit the levels."""
    check_levels(shape, channels)
    heights = [shape[1] >> level for level in range(len(channels))]
    missing = [height for height in attention if height not in heights]
    if missing:
        msg = f"attention must be at heights of levels, {heights}; got {missing}"
        raise ValueError(msg)
    return [height in attention for height in heights]


def _check_heads(
    head_channels: int | None, channels: Sequence[int], attends: Sequence[bool]
) -> None:
    if head_channels is None:
        return
    check_counts(head_channels=head_channels)
    # The middle of the network has the channels of the last level.
    last = [channels[-1]] if any(attends) else []
    widths = [width for width, used in zip(channels, attends, strict=True) if used] + last
    if any(width % head_channels for width in widths):
        msg = f"head_channels must divide the channels of attention, {sorted(set(widths))}; got "
        raise ValueError(f"{msg}{head_channels}")


def _check_dropout(dropout: float) -> None:
    if not check_at_least(dropout, 0, "dropout") < 1:
        msg = f"dropout must lie in [0, 1); got {dropout}"
        raise ValueError(msg)
