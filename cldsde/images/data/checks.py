"""Checks of arguments: errors name the argument, what it got and what it allows."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

def as_whole(value: object, name: str, low: int, high: int | None = None) -> int:
    """A whole number in [low, high], as an int."""
    allowed = f"at least {low}" if high is None else f"in {low} … {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be a whole number {allowed}; got {value!r}"
        raise TypeError(msg)
    number = int(value)
    if number < low or (high is not None and number > high):
        msg = f"{name} must be {allowed}; got {value}"
        raise ValueError(msg)
    return number


def check_choice(value: object, allowed: Sequence[object], name: str) -> None:
    """Raise a ValueError if the value is none of those allowed."""
    # True equals 1, and is none of the channels.
    if isinstance(value, bool) or value not in allowed:
        msg = f"{name} must be {listed(allowed, 'or')}; got {value!r}"
        raise ValueError(msg)


def listed(items: Sequence[object], word: str = "and") -> str:
    """Items as a sentence has them: a, b and c."""
    *head, last = (str(item) for item in items) if items else ("nothing",)
    return f"{', '.join(head)} {word} {last}" if head else last


def missing(what: str, package: str) -> str:
    """What an ImportError says of a package of the extra."""
    return (
        f"{what} needs {package}, which is missing; install the extra: pip install 'cldsde[images]'"
    )


def check_values(images: Tensor, levels: int) -> None:
    """Raise an error if the images are not uint8, or a value is out of range."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        msg = f"images must be a tensor of uint8; got {got}"
        raise TypeError(msg)
    # A byte cannot exceed 256 levels, and to ask an accelerator would make it wait.
    if levels < 256 and images.numel() and int(images.max()) >= levels:
        msg = f"images must have values in 0 … {levels - 1}; got {int(images.max())}"
        raise ValueError(msg)


def as_folder(path: str | Path) -> Path:
    """The path of a folder that exists."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        msg = f"path must be a folder; got {folder}, which {what_instead(folder)}"
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(msg)
    return folder


def what_instead(path: Path) -> str:
    """What to say of a path that is not what it must be."""
    return "is none" if path.exists() else "does not exist"
