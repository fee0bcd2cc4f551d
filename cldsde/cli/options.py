"""Options that several commands share, and the extra that they need."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

INTERRUPTED = "interrupted; the same command resumes"


def option(parser: ArgumentParser, name: str, metavar: str, text: str, **more: Any) -> None:
    """Declare an option with a value, a string unless ``type`` is given."""
    kind = _KINDS.get(more.pop("type", str), str)
    parser.add_argument(name, **{"type": kind, "metavar": metavar, "help": text, **more})


class _Number:
    """A number as text, whose error says what is wrong and whose name stands in ``--help``."""

    def __init__(self, kind: type[int] | type[float], words: str) -> None:
        self.kind, self.words = kind, words

    def __call__(self, text: str | float) -> float:
        try:
            return self.kind(text)
        except ValueError:
            msg = f"must be {self.words}; got {text!r}"
            raise ArgumentTypeError(msg) from None

    def __repr__(self) -> str:
        return self.kind.__name__


_KINDS: dict[type, Any] = {
    int: _Number(int, "an integer"),
    float: _Number(float, "a number"),
    bool: bool,
}


def add_set_argument(parser: ArgumentParser, text: str, metavar: str = "KEY=VALUE") -> None:
    """Declare ``--set``."""
    option(parser, "--set", metavar, f"{text}; may be repeated", action="append")


def add_device_argument(parser: ArgumentParser) -> None:
    """Declare ``--device``."""
    option(parser, "--device", "NAME", "auto, cpu, cuda, cuda:N or mps", default="auto")


def resolve_device(name: str) -> str:
    """The name of a device of this machine, ``auto`` resolved; raise a ValueError for others."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    named = kind in {"cpu", "cuda", "mps"} and (not index or (kind == "cuda" and index.isdigit()))
    if not named or name.endswith(":"):
        msg = f"--device must be auto, cpu, cuda, cuda:N or mps; got {name!r}"
        raise ValueError(msg)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[kind]:
        msg = f"--device {name} is not available on this machine; use auto or cpu"
        raise ValueError(msg)
    return name


def path_of(text: str | None) -> Path | None:
    """The path that an option names, if any."""
    return None if text is None else Path(text).expanduser()


@contextmanager
def needs_images() -> Iterator[None]:
    """Name the extra ``images`` if an import fails."""
    try:
        yield
    except ImportError as error:
        msg = f"{error.name} is missing; install the extra: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
