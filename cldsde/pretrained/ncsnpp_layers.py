"""Layers of NCSN++ and DDPM++: resampling, residual blocks of BigGAN, attention, levels of a U-Net.

Resampling by two has the anti-aliasing filter (1, 3, 3, 1), which Song et al. (2021, appendix H)
take from StyleGAN2. Pixels beyond the edge are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_SCALE = 1 / math.sqrt(2)


class Embedding(nn.Module):
    """Embedding of the clock ``(B,)`` as ``(B, 4·width)``."""

    frequencies: Tensor | None
    rates: Tensor

    def __init__(self, width: int, fourier_scale: float | None) -> None:
        super().__init__()
        half, device = width // 2, torch.get_default_device()
        drawn = rates = None
        if fourier_scale is not None:
            half, drawn = width, fourier_scale * torch.randn(width, device=device)
        else:
            rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=device))
        self.register_buffer("frequencies", drawn)
        self.register_buffer("rates", rates, persistent=False)
        self.linear_1 = nn.Linear(2 * half, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, clock: Tensor) -> Tensor:
        """Sines and cosines through two linear layers."""
        clock = clock.unsqueeze(1)
        if self.frequencies is None:
            phase = clock * self.rates
        else:
            phase = clock * self.frequencies * (2 * math.pi)
        features = torch.cat([phase.sin(), phase.cos()], dim=1)
        out: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return out


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


class Block(nn.Module):
    """BigGAN's residual block."""

    def __init__(
        self,
        of: int,
        to: int,
        resample: nn.Module | None = None,
        *,
        width: int,
        dropout: float,
        recomputes: bool,
    ) -> None:
        super().__init__()
        self.norm_1, self.conv = norm(of), conv(of, to)
        self.clock = nn.Linear(width, to)
        self.norm_2, self.dropout, self.last = norm(to), nn.Dropout(dropout), conv(to, to)
        plain = of == to and resample is None
        self.shortcut = None if plain else nn.Conv2d(of, to, 1)
        self.resample = resample
        self.recomputes = recomputes

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features after the block."""
        if self.recomputes and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._run, x, embedding, use_reentrant=False)
            return out
        return self._run(x, embedding)

    def _run(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv(h) + self.clock(F.silu(embedding))[:, :, None, None]
        h = self.last(self.dropout(F.silu(self.norm_2(h))))
        out: Tensor = _SCALE * ((x if self.shortcut is None else self.shortcut(x)) + h)
        return out


class Attention(nn.Module):
    """Attention of one head over all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.query, self.key, self.value, self.last = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Features after the block."""
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).mT.unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        out: Tensor = _SCALE * (x + self.last(found))
        return out


class Down(nn.Module):
    """A level on the way down: blocks, attention after each of them or none, resampling."""

    def __init__(self, blocks: Iterable[Block], attentions: Iterable[Attention]) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.shrink: nn.Module | None = None
        self.filter: nn.Module | None = None
        self.enter: nn.Module | None = None

    def forward(self, features: list[Tensor], entering: Tensor, embedding: Tensor) -> Tensor:
        """Append the level's features; return the input of the next level's ``filter``."""
        for number, block in enumerate(self.blocks):
            h = block(features[-1], embedding)
            features.append(self.attentions[number](h) if self.attentions else h)
        if self.shrink is None:
            return entering
        h = self.shrink(features[-1], embedding)
        if self.filter is not None:
            entering = self.filter(entering)
            if self.enter is not None:
                h = self.enter(entering) + h
            else:
                h = entering = _SCALE * (entering + h)
        features.append(h)
        return entering


class Up(nn.Module):
    """A level on the way up: blocks, attention after the last of them or none, resampling."""

    def __init__(self, blocks: Iterable[Block], attentions: Iterable[Attention]) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.grow: nn.Module | None = None
        self.leave: nn.Sequential | None = None
        self.enlarge: nn.Module | None = None

    def forward(
        self, h: Tensor, features: list[Tensor], out: Tensor | None, embedding: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Features at the next level, and the output so far."""
        for block in self.blocks:
            h = block(torch.cat([h, features.pop()], dim=1), embedding)
        for attention in self.attentions:
            h = attention(h)
        if self.leave is not None:
            own = self.leave(h)
            out = own if out is None or self.enlarge is None else self.enlarge(out) + own
        if self.grow is not None:
            h = self.grow(h, embedding)
        return h, out


def norm(width: int) -> nn.GroupNorm:
    """Group normalisation of at most 32 groups."""
    groups = min(width // 4, 32)
    if width % groups:
        raise ValueError(
            "channels must make equal groups: a layer of more than 128 channels has 32 groups; got "
            f"a layer of {width}, the channels of two neighbouring blocks together"
        )
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv(of: int, to: int) -> nn.Conv2d:
    """Convolution 3 × 3."""
    return nn.Conv2d(of, to, 3, padding=1)
