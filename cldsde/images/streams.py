"""Randomness of training as a function of seed, purpose and step, without a state to resume."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def stream_seed(seed: int, purpose: str, *place: int) -> int:
    """A seed in [0, 2³²) for one purpose at one place, e.g. ``("noise", step, part)``."""
    text = "/".join([str(seed), purpose, *map(str, place)])
    # torch's generator on the CPU uses 32 bits of its seed.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def stream(
    seed: int, purpose: str, *place: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator for one purpose at one place."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *place))


def image_order(seed: int, images: int, first: int, count: int) -> Tensor:
    """Rows ``(count,)`` of the data set at positions from ``first`` on; each pass has its order."""
    positions = torch.arange(first, first + count, device="cpu")
    passes, rows = positions // images, positions % images
    order = torch.empty_like(rows)
    for epoch in range(int(passes[0]), int(passes[-1]) + 1):
        chosen = passes == epoch
        order[chosen] = _permutation(seed, images, epoch)[rows[chosen]]
    return order


@lru_cache(maxsize=2)
def _permutation(seed: int, images: int, epoch: int) -> Tensor:
    return torch.randperm(images, generator=stream(seed, "order", epoch), device="cpu")
