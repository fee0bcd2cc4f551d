"""Random draws that obey the caller's generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Generators", "standard_normal"]

Generators = torch.Generator | Sequence[torch.Generator]
"""A generator for a batch, or several, each of which draws for its even share of the batch."""


def standard_normal(
    shape: tuple[int, ...] | torch.Size,
    *,
    generator: Generators | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Independent standard normals, drawn on the generator's device and moved to ``device``.

    Drawing where the generator lives makes a CPU generator give the same numbers whatever the
    device of the state.

    Raises
    ------
    ValueError
        If the first axis is no multiple of the number of generators.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device=source)
        return drawn if source == device else drawn.to(device)
    if not generator or shape[0] % len(generator):
        msg = f"generator: a batch of {shape[0]} has no even shares for {len(generator)} generators"
        raise ValueError(msg)
    share = (shape[0] // len(generator), *shape[1:])
    draws = [torch.randn(share, generator=g, dtype=dtype, device=g.device) for g in generator]
    return torch.cat(draws).to(device)
