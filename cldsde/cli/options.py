"""Options of the commands as data, and those that several commands share."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cldsde.errors import SettingError, require

Option = tuple[list[str], dict[str, Any]]
"""Names and settings of an option, arguments of ``ArgumentParser.add_argument``."""


class Kind(NamedTuple):
    """A conversion of a text, whose error says what is allowed."""

    convert: Callable[[str], Any]
    allowed: str

    def __call__(self, text: str) -> Any:
        """Convert a text."""
        try:
            return self.convert(text)
        except (ValueError, KeyError):
            raise ArgumentTypeError(f"must be {self.allowed}; got {text!r}") from None


def option(usage: str, kind: Any, text: str, **settings: Any) -> Option:
    """Declare an option as in a help text, ``--name METAVAR``, or an argument, ``METAVAR``."""
    *names, metavar = usage.split()
    default = settings.get("default")
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    text = text if shown in (None, "") else f"{text} (default: {shown})"
    text = f"{text} (required)" if settings.get("required") else text
    names = names or [settings.pop("dest", metavar.lower())]
    return names, {"type": _KINDS.get(kind, kind), "metavar": metavar, "help": text, **settings}


def flag(name: str, text: str) -> Option:
    """Declare an option without a value."""
    return [name], {"action": "store_true", "help": text}


def several(usage: str, text: str) -> Option:
    """Declare an option that may be repeated."""
    return option(usage, str, f"{text}; may be repeated", action="append", default=[])


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError
    return Path(text).expanduser()


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


def _seeds(text: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last < 2**32:
        raise ValueError
    return range(first, last + 1)


SEED = Kind(_seed, "an integer from 0 to 2^63 - 1")
SEEDS = Kind(_seeds, "A-B with 0 ≤ A ≤ B < 2³²")
ONE_SEED = Kind(lambda text: _seeds(str(int(text))), "an integer from 0 to 2^32 - 1")
LIST = Kind(lambda text: [word.strip() for word in text.split(",")], "names with commas")
INTEGERS = Kind(lambda text: [int(word) for word in text.split(",")], "integers with commas")
_KINDS: dict[Any, Kind] = {
    bool: Kind({"true": True, "false": False}.__getitem__, "true or false"),
    int: Kind(int, "an integer"),
    float: Kind(float, "a number"),
    Path: Kind(_path, "the name of a file or folder"),
}

DEVICE = option("--device NAME", str, "auto, cpu, cuda, cuda:N or mps", default="auto")


def reject(options: Namespace, names: Iterable[str], reason: str) -> None:
    """Raise a SettingError for the first of some options that is given."""
    for name in names:
        require(getattr(options, name) in (None, []), name, reason)


def resolve_device(name: str) -> str:
    """The name of a device of this machine, ``auto`` resolved; raise a SettingError for others."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda", *gpus] if gpus else [])]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in here:
        msg = f"must be {' or '.join(['auto', *here])} on this machine; got {name!r}"
        raise SettingError("device", msg)
    return name


def join_processes(device: str) -> tuple[Any, str]:
    """Join the processes that were started together; return their state and this one's device."""
    from accelerate import PartialState

    # Without a GPU processes find each other only if they are told that there is none.
    name = resolve_device(device)
    state = PartialState(cpu=name == "cpu", timeout=timedelta(hours=12))
    return state, str(state.device) if name == "cuda" else name
