"""What the command says where an optional dependency is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

@contextmanager
def needs_images() -> Iterator[None]:
    """Imports that the extra ``images`` provides."""
    try:
        yield
    except ImportError as error:
        msg = f"{error.name} is missing; install the extra: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
