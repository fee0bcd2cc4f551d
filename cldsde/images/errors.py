"""Errors of a block as errors of one setting; see `cldsde.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cldsde.errors import SettingError
from cldsde.messages import one_line

__all__ = ["SettingError", "setting"]


@contextmanager
def setting(key: str) -> Iterator[None]:
    """Raise errors of values, types, arithmetic or files in a block as errors of one setting."""
    try:
        yield
    except SettingError as error:
        raise error.within(key) from error
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise SettingError(key, one_line(error)) from error
