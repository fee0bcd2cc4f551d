"""Checks of the arguments of scores."""

from __future__ import annotations

from typing import get_args

from cldsde.linear.sde import LinearSDE

__all__ = ["check_process", "one_of"]


def check_process(sde: object) -> None:
    """Raise TypeError unless ``sde`` is a `LinearSDE`, ready for use."""
    if not isinstance(sde, LinearSDE):
        hint = " (write it with parentheses)" if isinstance(sde, type) else ""
        got = sde.__name__ if isinstance(sde, type) else type(sde).__name__
        msg = f"sde must be a LinearSDE; got {got}{hint}"
        raise TypeError(msg)
    if not hasattr(sde, "dynamics"):
        msg = f"sde: {type(sde).__name__} has to call super().__init__ with its dynamics"
        raise TypeError(msg)


def one_of(value: object, allowed: object, name: str) -> None:
    """Raise ValueError unless ``value`` is one of the strings of a Literal type."""
    options = get_args(allowed)
    if value not in options:
        msg = f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}"
        raise ValueError(msg)
