"""Options that several commands share, and the extra that they need."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser


class _Kind:
    """A conversion of a text, whose error says what is allowed and whose name is in ``--help``."""

    def __init__(self, name: str, convert: Callable[[Any], Any], allowed: str) -> None:
        self.name, self.convert, self.allowed = name, convert, allowed

    def __call__(self, text: object) -> Any:
        try:
            return self.convert(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {self.allowed}; got {text!r}") from None

    def __repr__(self) -> str:
        return self.name


def _path(text: str | Path) -> Path:
    if not str(text).strip():
        raise ValueError
    return Path(text).expanduser()


def _seed(text: str | int) -> int:
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


SEED = _Kind("int", _seed, "an integer from 0 to 2^63 - 1")
_KINDS: dict[Any, Any] = {
    int: _Kind("int", int, "an integer"),
    float: _Kind("float", float, "a number"),
    Path: _Kind("path", _path, "the name of a file or folder"),
}


def option(
    parser: ArgumentParser, name: str, metavar: str, text: str, *, kind: Any = str, **more: Any
) -> None:
    """Declare an option with a value, a string unless ``kind`` is another type."""
    parser.add_argument(name, type=_KINDS.get(kind, kind), metavar=metavar, help=text, **more)


def flag(parser: ArgumentParser, name: str, text: str, **more: Any) -> None:
    """Declare an option without a value."""
    parser.add_argument(name, action="store_true", help=text, **more)


def set_option(parser: ArgumentParser, text: str, metavar: str = "KEY=VALUE") -> None:
    """Declare ``--set``."""
    option(parser, "--set", metavar, f"{text}; may be repeated", action="append", default=[])


def device_option(parser: ArgumentParser) -> None:
    """Declare ``--device``."""
    option(parser, "--device", "NAME", "auto, cpu, cuda, cuda:N or mps", default="auto")


def resolve_device(name: str) -> str:
    """The name of a device of this machine, ``auto`` resolved; raise a ValueError for others."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda", *gpus] if gpus else [])]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in here:
        msg = f"--device must be {' or '.join(['auto', *here])} on this machine; got {name!r}"
        raise ValueError(msg)
    return name


@contextmanager
def needs_images() -> Iterator[None]:
    """Name the extra ``images`` if an import fails."""
    try:
        yield
    except ImportError as error:
        msg = f"{error.name} is missing; install the extra: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
