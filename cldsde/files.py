"""Files that are whole or do not exist, whatever happens while they are written; locks."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

PARTIAL = ".partial-"
"""Beginning of the names of files that are being written."""


def write_whole(target: Path, writer: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: ``writer`` fills a temporary one, then it is moved."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=PARTIAL, suffix=target.suffix)
    temporary = Path(name)
    try:
        os.close(handle)
        writer(temporary)
        with temporary.open("rb") as file:
            # The name must not be given to a file that is not on the disk yet.
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(target: Path, advice: str) -> Iterator[None]:
    """Name a file that a block cannot write, and say what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise OSError(f"{target} cannot be written ({reason}); {advice}") from error


def check_writable(folder: Path) -> None:
    """Raise an OSError if a folder cannot be made or written; it is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be made or written ({error.strerror or error})") from error


def check_target(file: Path) -> None:
    """Raise an OSError if `write_whole` cannot write a file; its folder must be there."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent}")
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(file.stat().st_mode):  # raises an error for a name that is too long
            raise IsADirectoryError(f"{file} is a folder")
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=PARTIAL):
        pass


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; remove what was made if the block raises an error."""
    absolute = folder.absolute()
    missing = [parent for parent in (absolute, *absolute.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def file_lock(name: Path, *, wait: bool) -> Iterator[None]:
    """Lock a name for one holder at a time; raise a TimeoutError if it is held, unless ``wait``.

    The lock is a file beside it, ``.NAME.lock``, which is removed in the end.
    """
    beside = name.with_name(f".{name.name}.lock")
    with FileLock(beside, blocking=wait, thread_local=False):
        try:
            yield
        finally:
            if os.name != "nt":  # Windows cannot remove an open file
                beside.unlink(missing_ok=True)
