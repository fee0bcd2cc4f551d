"""Random draws that obey the caller's generator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standard_normal"]


def standard_normal(
    shape: tuple[int, ...] | torch.Size,
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Independent standard normals, drawn on the generator's device and moved to ``device``.

    Drawing where the generator lives makes a CPU generator give the same numbers whatever the
    device of the state.
    """
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=source).to(device)
