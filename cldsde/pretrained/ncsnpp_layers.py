"""Layers of NCSN++ and DDPM++: residual blocks of BigGAN, attention, and the levels of a U-Net."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
        fourier, device = fourier_scale is not None, torch.get_default_device()
        drawn = None
        if fourier_scale is not None:
            drawn = fourier_scale * torch.randn(width, device=device)
        self.register_buffer("frequencies", drawn)
        half = width // 2
        rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=device))
        self.register_buffer("rates", None if fourier else rates, persistent=False)
        self.linear_1 = nn.Linear(width * (2 if fourier else 1), 4 * width)
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


class Block(nn.Module):
    """BigGAN's residual block."""

    def __init__(
        self, of: int, to: int, width: int, dropout: float, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.norm_1, self.conv = norm(of), conv(of, to)
        self.clock = nn.Linear(width, to)
        self.norm_2, self.dropout, self.last = norm(to), nn.Dropout(dropout), conv(to, to)
        plain = of == to and resample is None
        self.shortcut = None if plain else nn.Conv2d(of, to, 1)
        self.resample = resample
        self.recomputes = False

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


class Row(nn.Module):
    """Blocks of one level, and attention after some of them."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList()


class Down(Row):
    """A level on the way down."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        super().__init__(blocks)
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

    def published_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers, and prefixes of the published names of their weights."""
        for number, block in enumerate(self.blocks):
            yield "", block
            if self.attentions:
                yield "", self.attentions[number]
        if self.shrink is not None:
            yield "", self.shrink
        if self.enter is not None:
            yield "Conv_0.", self.enter
        elif self.filter is not None:
            yield "Conv2d_0.", self.filter.get_submodule("conv")


class Up(Row):
    """A level on the way up."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        super().__init__(blocks)
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

    def published_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers, except for the output at full resolution, which comes last."""
        yield from (("", layer) for layer in (*self.blocks, *self.attentions))
        if self.grow is not None:
            if self.leave is not None:
                yield from (("", self.leave[i]) for i in (0, 2))
            yield "", self.grow


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


def nearest() -> nn.Module:
    """Upsampling by two by nearest neighbours."""
    return nn.Upsample(scale_factor=2, mode="nearest")


def attentions(width: int, count: int) -> nn.ModuleList:
    """Several attention blocks."""
    return nn.ModuleList(Attention(width) for _ in range(count))
