"""Run folders, which keep the configuration, metrics, checkpoints and results of a run."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from cldsde.errors import SettingError, require
from cldsde.files import PARTIAL, check_writable, file_lock, new_folder, write_whole
from cldsde.images.config import RunConfig
from cldsde.images.schema import leaves
from cldsde.messages import brief

CONFIG = "config.json"
"""File of a run that holds its configuration."""
METRICS = "metrics.jsonl"
"""File of a run with lines of numbers about its training."""
STATE = "training.safetensors"
"""File of a run that holds the state of its training, to resume from."""

SNAPSHOTS = "snapshots"
"""Folder of a run with averaged weights at several times."""

_FOLDERS = ("evaluations", "samples", SNAPSHOTS)  # of a run, for files of its own


class RunFolder:
    """A folder that belongs to one configuration.

    Opening it checks everything before anything is written; ``known`` are arguments of
    `check_folder`. The file of a folder that is continued keeps the settings that may change,
    ``free``. No other process can open it until ``close()``, or the end of the object.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], *, shared: bool = False, **known: Any
    ) -> None:
        self.path = path
        lock = ExitStack()
        self.close = weakref.finalize(self, lock.close)
        if shared:
            return
        check_folder(path, config, **known)
        try:
            with new_folder(path):
                if not (path / CONFIG).exists():
                    self.write_json(CONFIG, config)
                lock.enter_context(file_lock(path / CONFIG, wait=False))
                # Left by a killed process. Runs in folders below have locks of their own.
                for folder in (path, *(path / name for name in _FOLDERS)):
                    for left in folder.glob(f"{PARTIAL}*"):
                        left.unlink()
        except TimeoutError:
            raise SettingError("out", f"{path} is in use by another process") from None
        except OSError as error:
            raise OSError(f"{path} cannot be made or written ({brief(error)})") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a file whole or not at all: ``writer`` fills a temporary one, then it is moved."""
        write_whole(self.path / name, writer)
        return self.path / name

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write JSON, whole or not at all."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        return self.write(name, lambda file: file.write_text(text, encoding="utf-8"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``; numbers that are not finite become null."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_jsonable_python(record, inf_nan_mode="null")) + "\n")

    def forget_metrics_after(self, images: int) -> None:
        """Drop lines of ``metrics.jsonl`` beyond ``images``, which a resumed run writes again."""
        metrics = self.path / METRICS
        if metrics.exists():
            try:
                lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            except UnicodeDecodeError as error:
                msg = f"{metrics} is damaged ({error}); put a copy of it back, or delete it"
                raise ValueError(msg) from error
            kept = [line for line in lines if _images(line) <= images]
            self.write(METRICS, lambda file: file.write_text("".join(kept), encoding="utf-8"))

    def keep_snapshot(self, name: str, metrics: Mapping[str, float], by: str, count: int) -> None:
        """Add a file of weights with its metrics; keep those with the smallest metric ``by``."""
        record = self.path / SNAPSHOTS / "values.json"
        known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        # Files of another metric, or written by version 0.2, have no value.
        known[name] = metrics
        of = {x: m.get(by, math.inf) if isinstance(m, dict) else math.inf for x, m in known.items()}
        kept = sorted(known, key=lambda x: (of[x], x))[:count]
        self.write_json(f"{SNAPSHOTS}/values.json", {name: known[name] for name in sorted(kept)})
        for file in record.parent.glob("[0-9]*.safetensors"):
            if file.name not in kept:
                file.unlink()


def _images(line: str) -> float:
    """Images seen at a line of metrics; infinite if the line was cut off."""
    try:
        return float(json.loads(line)["images"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def check_folder(
    path: Path, config: Mapping[str, Any], *, parts: Sequence[str] = (), free: Sequence[str] = ()
) -> None:
    """Raise the errors of `RunFolder`, and make nothing."""
    if not path.is_dir():
        require(not path.exists(), "out", f"{path} is not a folder")
        return
    names, again = [entry.name for entry in path.iterdir()], "choose another folder"
    if not all(name.startswith(PARTIAL) or name in parts for name in names):
        file = path / CONFIG
        require(file.is_file(), "out", f"{path} holds files that are no run of cldsde; {again}")
        try:
            found = {**json.loads(file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, RecursionError) as error:
            msg = f"{file} is no configuration of cldsde ({error}); {again}"
            raise SettingError("out", msg) from error
        with suppress(SettingError):  # an older one gets the defaults of what it lacks
            found = RunConfig.from_dict(found).to_dict()
        wanted, there = leaves(config, without=free), leaves(found, without=free)
        others = [key for key in {**wanted, **there} if wanted.get(key) != there.get(key)]
        msg = f"{path} holds a run with other settings ({', '.join(others)}); {again}"
        require(not others, "out", msg)
    check_writable(path)
