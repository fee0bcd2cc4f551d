"""Run folders: where a run keeps its configuration, metrics, checkpoints and results."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RunFolder"]

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"


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

    Raises
    ------
    ValueError
        If the folder holds a run of another configuration, or other files.
    OSError
        If the folder cannot be made or written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        _check_vacant(path, config)
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.write(_CONFIG, lambda file: file.write_text(_dumps(config)))
        except OSError:
            # Leave no half-made folder behind.
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise

    def __truediv__(self, name: str) -> Path:
        """Path of a file of the run."""
        return self.path / name

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a file whole or not at all: ``writer`` fills a temporary one, then it is moved."""
        target = self.path / name
        handle, temporary = tempfile.mkstemp(
            dir=self.path, prefix=".partial-", suffix=target.suffix
        )
        os.close(handle)
        try:
            writer(Path(temporary))
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write JSON, whole or not at all."""
        return self.write(name, lambda file: file.write_text(_dumps(content)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.path / _METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines of ``metrics.jsonl`` beyond ``step``: a continued run writes them again."""
        metrics = self.path / _METRICS
        if metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            # A line without its newline was cut off while it was written.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line).get("step", 0) <= step]
            self.write(_METRICS, lambda file: file.write_text("".join(kept)))


def _dumps(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _check_vacant(path: Path, config: Mapping[str, Any]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        msg = f"--out: {path} is not a folder"
        raise ValueError(msg)
    if not any(path.iterdir()):
        return
    if not (path / _CONFIG).is_file():
        msg = f"--out: {path} holds files that are no run of cldsde; choose another folder"
        raise ValueError(msg)
    try:
        found = json.loads((path / _CONFIG).read_text())
    except json.JSONDecodeError as error:
        msg = f"--out: {path / _CONFIG} is not valid JSON ({error}); choose another folder"
        raise ValueError(msg) from None
    if found != config:
        names = [key for key in {**config, **found} if config.get(key) != found.get(key)]
        msg = (
            f"--out: {path} holds a run with other settings ({', '.join(names)}); "
            "choose another folder"
        )
        raise ValueError(msg)
