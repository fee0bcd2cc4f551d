"""Checks of the sizes of networks: errors name the argument, what it got and what it allows."""

from __future__ import annotations

from collections.abc import Sequence

def check_counts(**counts: object) -> None:
    """Raise a ValueError unless all are positive integers; ``classes`` may be None."""
    for name, value in counts.items():
        if value is None and name == "classes":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name} must be a positive integer; got {value!r}"
            raise ValueError(msg)


def check_levels(shape: Sequence[int], channels: Sequence[int]) -> None:
    """Raise a ValueError unless ``(C, H, W)`` can be halved once for each level but the first."""
    for name, sizes in (("shape", shape), ("channels", channels)):
        integers = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        if not integers or not sizes or (name == "shape" and len(sizes) != 3):
            wanted = "three positive integers (C, H, W)" if name == "shape" else "positive integers"
            msg = f"{name} must be {wanted}; got {sizes!r}"
            raise ValueError(msg)
    factor = 2 ** (len(channels) - 1)
    if shape[1] % factor or shape[2] % factor:
        msg = (
            f"channels asks for {len(channels)} levels, for which H and W must be divisible by "
            f"{factor}; got shape {tuple(shape)}"
        )
        raise ValueError(msg)


def check_groups(groups: int, channels: Sequence[int]) -> None:
    """Raise a ValueError unless the groups of a norm divide all channels into two or more."""
    if any(width % groups or width == groups for width in channels):
        # A norm of single channels would take out what a clock or a latent adds to them.
        msg = (
            f"groups must divide each of the channels, {list(channels)}, into two or more; got "
            f"{groups}"
        )
        raise ValueError(msg)
