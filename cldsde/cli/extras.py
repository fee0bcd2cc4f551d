"""What the command says where an optional dependency is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs_images"]


@contextmanager
def needs_images() -> Iterator[None]:
    """Imports that the extra ``images`` provides.

    Raises
    ------
    ImportError
        If one is missing; says what to install.
    """
    try:
        yield
    except ImportError as error:
        msg = f"{error.name} is missing; install the extra: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
