"""Old names of arguments and functions, which warn and keep working for one release."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def warn_of_old(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say that a name has a new one."""
    msg = f"{old} is called {new} now; the old name goes after the next release"
    warnings.warn(msg, DeprecationWarning, stacklevel=stacklevel)


def takes_old(**names: str) -> Callable[[T], T]:
    """Let a function, or the constructor of a class, take arguments by old names, ``old="new"``."""

    def decorate(made: T) -> T:
        inner: Any = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]

        @functools.wraps(inner)
        def called(*args: Any, **given: Any) -> Any:
            for old in names.keys() & given.keys():
                new = names[old]
                if new in given:
                    raise TypeError(f"{new} must be given once; got {old}, its old name, too")
                warn_of_old(old, new)
                given[new] = given.pop(old)
            return inner(*args, **given)

        if not isinstance(made, type):
            return called  # type: ignore[return-value]
        made.__init__ = called  # type: ignore[misc]
        return made

    return decorate


def old_attributes(module: str, **names: str) -> Callable[[str], Any]:
    """``__getattr__`` of a module that finds old names, ``old="new"``."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_old(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find


def current(value: Any, name: str, **names: str) -> Any:
    """The value of an argument, or the new spelling of an old one, ``old="new"``."""
    if isinstance(value, str) and value in names:
        warn_of_old(f"{name}={value!r}", repr(names[value]), stacklevel=5)
        return names[value]
    return value
