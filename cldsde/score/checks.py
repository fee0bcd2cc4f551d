"""Checks of the arguments of scores."""

from __future__ import annotations

from typing import get_args

__all__ = ["one_of"]


def one_of(value: object, allowed: object, name: str) -> None:
    """Raise ValueError unless ``value`` is one of the strings of a Literal type."""
    options = get_args(allowed)
    if value not in options:
        msg = f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}"
        raise ValueError(msg)
