"""Files that are whole or do not exist, whatever happens while they are written; locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial-"
"""Beginning of the names of files that are being written."""


def write_whole(target: Path, writer: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: ``writer`` fills a temporary one, then it is moved."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=PARTIAL, suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        writer(temporary)
        _to_disk(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _to_disk(file: Path) -> None:
    """Wait until a file is on the disk: its name must not be given to a file that may be lost."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Raise an OSError if a folder cannot be made or written; it is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL):
            pass
    except OSError as error:
        msg = f"{folder} cannot be made or written ({error.strerror or brief(error)})"
        raise OSError(msg) from error


@contextmanager
def file_lock(name: Path, *, wait: bool) -> Iterator[None]:
    """Lock a name for one process at a time, if the system can; BlockingIOError unless ``wait``.

    The lock is on a file beside it, ``.NAME.lock``, which is removed in the end.
    """
    beside = name.with_name(f".{name.name}.lock")
    handle = _locked(beside, wait=wait)
    try:
        yield
    finally:
        if os.name != "nt":  # Windows cannot remove an open file
            beside.unlink(missing_ok=True)
        os.close(handle)


def _locked(file: Path, *, wait: bool) -> int:
    """A locked file that still has its name: an earlier holder removes its file."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(handle, wait=wait)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except FileNotFoundError:  # removed between the two calls
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file for this process, if the system can; BlockingIOError unless ``wait``."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}:
            raise


def save_tensors(
    file: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all, with a digest of its content.

    Equal contents make equal files.
    """
    on_cpu = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
    notes = {**metadata, "kind": kind}
    notes["sha256"] = tensors_digest(on_cpu, notes)
    try:
        write_whole(file, lambda path: _save_sorted(path, on_cpu, notes))
    except (OSError, SafetensorError) as error:
        msg = f"{file} cannot be written ({brief(error)})"
        raise OSError(msg) from error


def _save_sorted(file: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write tensors and notes; the library writes the notes in random order."""
    save_file(tensors, file, metadata=notes)
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(notes.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # another order is not longer
        stream.seek(8)
        stream.write(text.ljust(size))


def load_tensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load tensors and metadata that `save_tensors` wrote; ``"sha256"`` is the digest.

    Runs no code of the file. Raises a FileNotFoundError if there is none, a ValueError if it is
    damaged or of another kind.
    """
    if not file.is_file():
        msg = f"there is no file {file}"
        raise FileNotFoundError(msg)
    try:
        with safe_open(file, framework="pt") as source:
            tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
            notes: dict[str, str] = source.metadata() or {}
    except (SafetensorError, OSError) as error:
        msg = f"{file} is damaged or no safetensors file ({brief(error)})"
        raise ValueError(msg) from error
    if notes.get("kind") != kind:
        msg = f"{file} must hold {kind}; it holds {notes.get('kind', 'something else')}"
        raise ValueError(msg)
    written = notes.pop("sha256", "")
    if written != tensors_digest(tensors, notes):
        msg = f"{file} is damaged: its contents differ from the digest written with them"
        raise ValueError(msg)
    del notes["kind"]
    return tensors, {**notes, "sha256": written}


def tensors_digest(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """SHA-256 of tensors on the CPU and their notes."""
    total = hashlib.sha256(json.dumps(sorted((notes or {}).items())).encode())
    for key in sorted(tensors):
        x = tensors[key]
        total.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def brief(error: BaseException) -> str:
    """First line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
