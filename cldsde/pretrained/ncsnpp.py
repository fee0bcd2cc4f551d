"""NCSN++ and DDPM++, the score networks of Song et al. (2021).

Both networks are U-Nets of BigGAN's residual blocks, which also halve and double the resolution.
Sums of two branches are divided by √2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cldsde.linear.checks import check_at_least, check_positive
from cldsde.pretrained.ncsnpp_layers import (
    Attention,
    Block,
    Double,
    Down,
    Embedding,
    FilteredConv,
    Halve,
    Up,
    conv,
    norm,
)

_NEARLY_ZERO = 1e-5  # the published initial variance is 1e-10 times the Glorot variance


class NCSNpp(nn.Module):
    """NCSN++ or DDPM++ with the layers of the published code.

    Parameters
    ----------
    shape
        Channels, rows and columns of the input. With L levels, rows and columns must be divisible
        by 2^(L − 1).
    outputs
        Channels of the output.
    channels
        Channels of each level, from full resolution down. The number of the first level is also
        the width of the embedding.
    blocks
        Residual blocks per level of the encoder. The decoder has one more per level.
    attention
        Heights of the levels with attention: after each block of the encoder, and after the last
        block of the decoder. The middle of the network always has attention.
    dropout
        Dropout probability of a residual block.
    fir
        Whether to resample with the filter (1, 3, 3, 1) instead of averages and nearest
        neighbours.
    inputs_enter
        Levels that see the input. ``"once"``: the highest resolution only (DDPM++). ``"skip"``:
        every level, which adds a downsampled copy of the input to its features (networks for
        256 × 256). ``"residual"``: every level; the copy also passes through one convolution per
        level, and its sum with the features replaces both (CIFAR-10).
    outputs_leave
        Levels that contribute to the output. ``"once"``: the highest resolution only. ``"skip"``:
        all levels, whose outputs are added.
    fourier_scale
        None: the clock is embedded by sines and cosines with frequencies from 1 down to 1/10,000.
        σ > 0: by random Fourier features with frequencies 2π N(0, σ²), which are drawn and kept
        with the weights. The published value 16 is for the log of a time or noise level. Karras et
        al. (2022) use, in effect, 4.
    gradient_checkpointing
        Whether to recompute the activations of residual blocks for the gradient, which saves
        memory.

    Raises
    ------
    ValueError
        If an argument is out of range, or rows, columns, channels and attention do not fit.

    Notes
    -----
    Weights start with the Glorot uniform distribution, biases at zero. The last layer of each
    residual and attention block starts near zero, so that the block starts as its shortcut. The
    output starts at zero.

    References
    ----------
    Y. Song et al., *Score-based generative modeling through stochastic differential equations*,
    2021, appendix H. T. Dockhorn et al., *Score-based generative modeling with critically-damped
    Langevin diffusion*, 2022, appendix E.

    Examples
    --------
    >>> import torch
    >>> network = NCSNpp((6, 16, 16), 3, channels=(8, 16), fourier_scale=16.0)
    >>> network(torch.zeros(2, 6, 16, 16), torch.tensor([0.5, 1.0]).log()).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        channels: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        fir: bool = True,
        inputs_enter: Literal["once", "skip", "residual"] = "residual",
        outputs_leave: Literal["once", "skip"] = "once",
        fourier_scale: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        inputs, height, width = shape
        heights = _heights(height, width, channels, attention)
        if not check_at_least(dropout, 0, "dropout") < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        if fourier_scale is not None:
            check_positive(fourier_scale, "fourier_scale")
        if inputs_enter == "residual" and not fir:
            raise ValueError("fir must be True if inputs_enter is 'residual'")
        self.embedding = Embedding(channels[0], fourier_scale)
        #: Added to the embedding of the clock: maps labels ``(B,)`` to ``(B, 4·channels[0])``.
        self.class_embedding: nn.Module | None = None
        self.conv_in = conv(inputs, channels[0])
        block = partial(
            Block, width=4 * channels[0], dropout=dropout, recomputes=gradient_checkpointing
        )
        halve: Callable[[], nn.Module] = Halve if fir else partial(nn.AvgPool2d, 2)
        double: Callable[[], nn.Module] = Double if fir else partial(nn.Upsample, scale_factor=2)
        skips, last = [channels[0]], len(channels) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        entering = inputs
        for level, of in enumerate(channels):
            attended = range(blocks if heights[level] in attention else 0)
            inside = (block(n, of) for n in (skips[-1], *[of] * (blocks - 1)))
            row = Down(inside, (Attention(of) for _ in attended))
            skips += [of] * blocks
            if level < last:
                row.shrink = block(of, of, halve())
                if inputs_enter == "skip":
                    row.filter, row.enter = halve(), nn.Conv2d(entering, of, 1)
                elif inputs_enter == "residual":
                    row.filter, entering = FilteredConv(entering, of), of
                skips.append(of)
            self.down.append(row)
        of = channels[-1]
        self.middle = nn.ModuleList([block(of, of), Attention(of), block(of, of)])
        for level in reversed(range(len(channels))):
            attended, to = range(int(heights[level] in attention)), channels[level]
            inside = (block(n + skips.pop(), to) for n in (of, *[to] * blocks))
            row_up = Up(inside, (Attention(to) for _ in attended))
            of = to
            if outputs_leave == "skip" or level == 0:
                row_up.leave = nn.Sequential(norm(of), nn.SiLU(), conv(of, outputs))
            if outputs_leave == "skip" and level < last:
                row_up.enlarge = double()
            if level:
                row_up.grow = block(of, of, double())
            self.up.append(row_up)
        self._initialise()

    def forward(self, x: Tensor, clock: Tensor, label: Tensor | None = None) -> Tensor:
        """Output ``(B, outputs, H, W)`` for x ``(B, C, H, W)`` and a clock ``(B,)``.

        For published networks with Fourier features the clock is the log of their label. ``label``
        is the argument of ``class_embedding``, if the network has one.
        """
        # Phases reach thousands of radians, so autocast must not lower their precision.
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            embedding = self.embedding(clock)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(label)
        entering, features = x, [self.conv_in(x)]
        for row in self.down:
            entering = row(features, entering, embedding)
        first, attention, second = self.middle
        h = second(attention(first(features[-1], embedding)), embedding)
        out: Tensor | None = None
        for row in self.up:
            h, out = row(h, features, out, embedding)
        assert out is not None
        return out

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Block | Attention):
                    module.last.weight.mul_(_NEARLY_ZERO)
        rows: list[Any] = [*self.up]
        for row in rows:
            if row.leave is not None:
                nn.init.zeros_(row.leave[-1].weight)


def _heights(
    height: int, width: int, channels: Sequence[int], attention: Sequence[int]
) -> list[int]:
    """Heights of the levels, if everything fits them."""
    factor = 2 ** (len(channels) - 1)
    if not channels or height % factor or width % factor:
        msg = f"channels {tuple(channels)} need rows and columns divisible by {factor}"
        raise ValueError(f"{msg}; got {height} × {width}")
    if any(of % 4 for of in channels):
        raise ValueError(f"channels must be multiples of 4; got {list(channels)}")
    return heights_of_levels(height, channels, attention)


def heights_of_levels(height: int, channels: Sequence[int], attention: Sequence[int]) -> list[int]:
    """Heights H, H/2, … of the levels; raise a ValueError for attention at other heights."""
    heights = [height >> level for level in range(len(channels))]
    missing = [h for h in attention if h not in heights]
    if missing:
        raise ValueError(f"attention must be at heights of levels, {heights}; got {missing}")
    return heights
