"""One-line representations that look like a constructor call."""

from __future__ import annotations

import inspect
from functools import partial

from torch import Tensor


def constructor_repr(owner: object) -> str:
    """Format an object as ``Name(parameter=value, …)``.

    Parameters of the constructor are left out if they are None or not attributes of ``owner``.
    """
    names = list(inspect.signature(type(owner)).parameters)
    values = {name: getattr(owner, name, None) for name in names}
    facts = [f"{name}={shown(value)}" for name, value in values.items() if value is not None]
    return f"{type(owner).__name__}({', '.join(facts)})"


def shown(value: object) -> str:
    """Format a value in one line: numbers with six significant digits, functions by name."""
    if isinstance(value, Tensor):
        return shown(value.detach().tolist())
    if isinstance(value, float):
        return repr(float(f"{value:.6g}"))
    if isinstance(value, tuple | list):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return f"{left}{', '.join(map(shown, value))}{right}"
    if isinstance(value, partial):
        return shown(value.func)
    name = getattr(value, "__name__", None) if callable(value) else None
    if name is not None:
        return f"<function {name}>"
    text = repr(value)
    return f"{type(value).__name__}(…)" if "\n" in text else text
