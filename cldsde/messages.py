"""Errors in one line, and the import of code that a user names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def one_line(error: object) -> str:
    """Message of an error without line breaks."""
    return " ".join(str(error).split())


def in_words(error: BaseException) -> str:
    """Type and message of an error in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def brief(error: BaseException) -> str:
    """First line of an error; of an error of the system its description alone."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def counted(number: int, noun: str) -> str:
    """A number of things, in the singular or plural.

    Examples
    --------
    >>> counted(1, "evaluation"), counted(2, "evaluation")
    ('1 evaluation', '2 evaluations')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error about an unknown name: the nearest known one, if one is near.

    Examples
    --------
    >>> nearest("ssc", ["em", "sscs"])
    '; did you mean sscs?'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


class Named(dict[str, T]):
    """Dictionary whose error for an unknown name lists the known names."""

    def __missing__(self, name: object) -> T:
        """Raise a KeyError that says what is known."""
        known = ", ".join(map(repr, self))
        raise KeyError(f"name must be one of {known}; got {name!r}{nearest(str(name), self)}")


def imported(name: str) -> Any:
    """Import the attribute that ``module:attribute`` names; raise a ValueError if that fails.

    Examples
    --------
    >>> imported("math:pi")
    3.14...
    """
    module, _, attribute = str(name).partition(":")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        msg = f"{name!r} cannot be loaded as module:attribute ({in_words(error)})"
        raise ValueError(msg) from error
