"""Errors as data: which setting or argument is at fault, and why.

Layers name settings by their keys in a configuration or by the names of arguments. A front end
renders the key, and arguments in backquotes, in its own language, such as options of a command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SettingError(ValueError):
    """A setting that cannot be used: its key or the name of an argument, and the reason.

    Examples
    --------
    >>> str(SettingError("training.batch", "must be at least 1; got 0"))
    'training.batch: must be at least 1; got 0'
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"

    def within(self, section: str) -> SettingError:
        """The same error, its key in a section."""
        if not section:
            return self
        return SettingError(f"{section}.{self.key}" if self.key else section, self.reason)


def require(holds: bool, key: str, reason: str) -> None:
    """Raise a SettingError unless a condition holds."""
    if not holds:
        raise SettingError(key, reason)


@contextmanager
def setting(key: str) -> Iterator[None]:
    """Raise errors of values, types, arithmetic or files in a block as errors of one setting."""
    try:
        yield
    except SettingError as error:
        raise error.within(key) from error
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        raise SettingError(key, " ".join(reason.split())) from error
