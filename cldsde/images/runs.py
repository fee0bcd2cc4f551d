"""Run folders: where a run keeps its configuration, metrics, checkpoints and results."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cldsde.images.errors import SettingError
from cldsde.images.files import PARTIAL, check_writable, lock, write_whole

CONFIG = "config.json"
"""File of a run that holds its configuration."""
METRICS = "metrics.jsonl"
"""File of a run that holds a line of numbers for every part of its training."""

_AGAIN = "delete it to have it made again"
_FOLDERS = ("evaluations", "samples")  # of a run, for files of its own


class RunFolder:
    """A folder that belongs to one configuration.

    Opening it checks everything before anything is written: a folder of another configuration, or
    one that holds other files, is refused and left as it is. A folder of the same configuration
    is a run to be continued.

    Parameters
    ----------
    path
        The folder; made, with its parents, if it does not exist.
    config
        The resolved configuration, JSON types only.
    shared
        Whether another process of the same run has opened the folder, and this one only reads it.
    parts
        Names of what may be there before the folder is anyone's.
    free
        Settings, ``section.key`` or a whole section, that may differ from those that the folder
        was made with: nothing in it depends on them. Those given here take their place.

    Raises
    ------
    ValueError
        If the folder holds a run of another configuration, or other files.
    OSError
        If the folder cannot be made or written.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        shared: bool = False,
        parts: Collection[str] = (),
        free: Collection[str] = (),
    ) -> None:
        self.path = path
        if shared:
            return
        check_folder(path, config, parts=parts, free=free)
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / CONFIG).exists():
                self.write_json(CONFIG, config)
            weakref.finalize(self, os.close, _lock(path / CONFIG))
            if json.loads((path / CONFIG).read_text()) != config:  # in what is free
                self.write_json(CONFIG, config)
                # The first lock is of the file that was replaced.
                weakref.finalize(self, os.close, _lock(path / CONFIG))
            # By a process that was killed. Runs below this one have locks of their own, and may be
            # written to.
            for folder in (path, *(path / name for name in _FOLDERS)):
                for left in folder.glob(f"{PARTIAL}*"):
                    left.unlink()
        except BlockingIOError:
            raise SettingError("out", f"{path} is in use by another process") from None
        except OSError as error:
            # Leave no half-made folder behind.
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            msg = f"{path} cannot be made or written ({error.strerror or error})"
            raise OSError(msg) from error

    def __truediv__(self, name: str) -> Path:
        """Path of a file of the run."""
        return self.path / name

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a file whole or not at all: ``writer`` fills a temporary one, then it is moved."""
        write_whole(self.path / name, writer)
        return self.path / name

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write JSON, whole or not at all."""
        return self.write(name, lambda file: file.write_text(_dumps(content)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def damaged(self, name: str, reason: object, *, cost: str = "") -> str:
        """Message for a file of the run that cannot be used.

        Parameters
        ----------
        name
            The file.
        reason
            What is wrong with it.
        cost
            What it takes to make it again, where that is much.
        """
        again = f"put a copy of it back, or delete it to {cost}" if cost else _AGAIN
        return f"{self.path / name} is damaged ({reason}); {again}"

    def forget_metrics_after(self, images: int) -> None:
        """Drop lines of ``metrics.jsonl`` beyond ``images``: a continued run writes them again."""
        metrics = self.path / METRICS
        if metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _images(line) <= images]
            self.write(METRICS, lambda file: file.write_text("".join(kept)))


def _images(line: str) -> float:
    """Images seen at a line of metrics; infinite for one that was cut off while it was written."""
    try:
        return float(json.loads(line)["images"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _lock(file: Path) -> int:
    """Open a file and hold it for this process alone, where the system can; return its number."""
    handle = os.open(file, os.O_RDONLY)
    try:
        lock(handle, wait=False)
    except OSError:
        os.close(handle)
        raise
    return handle


def _dumps(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def check_folder(
    path: Path,
    config: Mapping[str, Any],
    *,
    parts: Collection[str] = (),
    free: Collection[str] = (),
) -> None:
    """Raise where a `RunFolder` would, and make nothing."""
    if path.is_dir():
        _check_owner(path, config, parts, free)
        check_writable(path)
    elif path.exists():
        raise SettingError("out", f"{path} is not a folder")


def _check_owner(
    path: Path, config: Mapping[str, Any], parts: Collection[str], free: Collection[str]
) -> None:
    held = [entry.name for entry in path.iterdir()]
    if all(name.startswith(PARTIAL) or name in parts for name in held):
        return
    if not (path / CONFIG).is_file():
        msg = f"{path} holds files that are no run of cldsde; choose another folder"
        raise SettingError("out", msg)
    try:
        found = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        msg = f"{path / CONFIG} is not valid JSON ({error}); choose another folder"
        raise SettingError("out", msg) from None
    if not isinstance(found, dict):
        msg = f"{path / CONFIG} is no configuration of cldsde; choose another folder"
        raise SettingError("out", msg)
    wanted, there = _leaves(config), _leaves(found)
    names = [
        key
        for key in {**wanted, **there}
        if wanted.get(key) != there.get(key)
        and not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]
    if names:
        msg = f"{path} holds a run with other settings ({', '.join(names)}); choose another folder"
        raise SettingError("out", msg)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their full names, ``section.key``."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
