"""Run folders: where a run keeps its configuration, metrics, checkpoints and results."""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
            if not (path / _CONFIG).exists():
                self.write_json(_CONFIG, config)
            weakref.finalize(self, os.close, _lock(path / _CONFIG))
        except BlockingIOError:
            msg = f"--out: {path} is in use by another process"
            raise ValueError(msg) from None
        except OSError as error:
            # Leave no half-made folder behind.
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            msg = f"--out: {path} cannot be made or written ({error.strerror or error})"
            raise OSError(msg) from error

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

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file of the run.

        Raises
        ------
        ValueError
            If the file is not whole; says what to do.
        """
        file = self.path / name
        try:
            with safe_open(file, framework="pt") as source:
                tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
                return tensors, source.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(self.damaged(name, error)) from error

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, whole or not at all.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        hosted = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
        notes = dict(metadata or {})
        try:
            self.write(name, lambda file: save_file(hosted, file, metadata=notes))
        except SafetensorError as error:
            msg = f"{self.path / name} cannot be written ({error})"
            raise OSError(msg) from error

    def damaged(self, name: str, reason: object) -> str:
        """Message for a file of the run that cannot be used."""
        return f"{self.path / name} is damaged ({reason}); delete it to have it made again"

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines of ``metrics.jsonl`` beyond ``step``: a continued run writes them again."""
        metrics = self.path / _METRICS
        if metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= step]
            self.write(_METRICS, lambda file: file.write_text("".join(kept)))


def _step(line: str) -> float:
    """Step of a line of metrics; infinite for one that was cut off while it was written."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _lock(file: Path) -> int:
    """Open a file and hold it for this process alone, where the system can; return its number.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """
    handle = os.open(file, os.O_RDONLY)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


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
    except ValueError as error:
        msg = f"--out: {path / _CONFIG} is not valid JSON ({error}); choose another folder"
        raise ValueError(msg) from None
    if not isinstance(found, dict):
        msg = f"--out: {path / _CONFIG} is no configuration of cldsde; choose another folder"
        raise ValueError(msg)  # noqa: TRY004
    if found != config:
        names = [key for key in {**config, **found} if config.get(key) != found.get(key)]
        msg = (
            f"--out: {path} holds a run with other settings ({', '.join(names)}); "
            "choose another folder"
        )
        raise ValueError(msg)
