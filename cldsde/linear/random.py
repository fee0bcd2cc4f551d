"""Random draws from the caller's generators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""A generator for a batch, or several, each of which draws for an equal share of the batch."""


def check_generator(generator: object, *, several: bool = True) -> None:
    """Raise TypeError unless ``generator`` is None, a generator or, if allowed, several."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    listed = several and isinstance(generator, Sequence) and not isinstance(generator, str)
    if listed and all(isinstance(g, torch.Generator) for g in generator):  # type: ignore[attr-defined]
        return
    raise TypeError(
        f"generator must be a torch.Generator{', a list of them' if several else ''} or None; got "
        f"{generator!r}. For a seed, pass torch.Generator().manual_seed(seed)"
    )


def standard_normal(
    shape: tuple[int, ...] | torch.Size,
    *,
    generator: Generators | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Independent standard normals, drawn on the generator's device and moved to ``device``.

    A CPU generator therefore gives the same numbers for every device of the state. Several
    generators draw for equal shares of the first axis.
    """
    check_generator(generator)
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device=source)
        return drawn if source == device else drawn.to(device)
    if not generator or shape[0] % len(generator):
        raise ValueError(
            f"generator must be a list whose length divides the batch of {shape[0]}; got "
            f"{len(generator)} generators"
        )
    share = (shape[0] // len(generator), *shape[1:])
    draws = [torch.randn(share, generator=g, dtype=dtype, device=g.device) for g in generator]
    return torch.cat(draws).to(device)


def keyed_normals(
    streams: Sequence[np.random.BitGenerator], uniform: Tensor, normals: Tensor
) -> Tensor:
    """Next standard normals of streams by the Box–Muller transform, faster than numpy's.

    ``uniform`` and ``normals`` are memory to write to, ``(2, len(streams), n)``, in float64 for one
    stream only. ``normals`` is returned.
    """
    unit = 1.0
    if uniform.dtype == torch.float64:
        (bits,) = streams
        np.random.Generator(bits).random(out=uniform.numpy())
    else:
        # Take 24 bits per number. numpy does the same one by one, in twice the time.
        raw = np.concatenate([bits.random_raw(uniform.shape[2]) for bits in streams])
        words = torch.from_numpy(raw.view(np.int32)).view(len(streams), 2, -1)
        uniform.copy_(words.bitwise_and_(2**24 - 1).transpose(0, 1))
        unit = 2.0**-24
    first, angle = uniform
    radius = first.mul_(-unit).log1p_().mul_(-2).sqrt_()
    angle.mul_(2 * math.pi * unit)
    torch.cos(angle, out=normals[0])
    torch.sin(angle, out=normals[1])
    return normals.mul_(radius)
