"""Random draws that obey the caller's generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Generators", "check_generator", "standard_normal"]

Generators = torch.Generator | Sequence[torch.Generator]
"""A generator for a batch, or several, each of which draws for its even share of the batch."""


def check_generator(generator: object, *, several: bool = True) -> None:
    """Raise TypeError unless ``generator`` is None, a generator or, if allowed, several."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    listed = several and isinstance(generator, Sequence) and not isinstance(generator, str)
    if listed and all(isinstance(g, torch.Generator) for g in generator):  # type: ignore[attr-defined]
        return
    msg = (
        f"generator must be a torch.Generator{', a list of them' if several else ''} or None; got "
        f"{generator!r}. For a seed, pass torch.Generator().manual_seed(seed)"
    )
    raise TypeError(msg)


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
    TypeError
        If ``generator`` is no generator.
    ValueError
        If the first axis is no multiple of the number of generators.
    """
    check_generator(generator)
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
