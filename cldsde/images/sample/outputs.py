"""Samples of a trained model in files: in parts that survive an interruption and can be shared."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

from cldsde.images.errors import SettingError
from cldsde.images.figures import picture, save_grid
from cldsde.images.files import (
    PARTIAL,
    all_to_disk,
    brief,
    check_writable,
    file_lock,
    write_whole,
)
from cldsde.images.sample.request import GRID_LIMIT, SampleRequest
from cldsde.progress import progress_bar

_REQUEST = "request"  # file of a folder of parts: of what they are


def check_output(out: Path, request: SampleRequest, *, overwrite: bool = False) -> None:
    """Reject a file or folder that samples cannot be written to, before any work is done."""
    if out.suffix == ".png" and len(request.seeds) > GRID_LIMIT:
        msg = f"a picture holds {GRID_LIMIT} images at most; got {len(request.seeds)} seeds. Take "
        raise SettingError("out", f"{msg}FILE.npz or a folder")
    if out.name in {"", ".."} or out.resolve().is_mount():
        msg = "must name a file, or a folder that can be moved into place; "
        raise SettingError("out", f"{msg}got {out}. Take one inside, such as {out / 'samples'}")
    if out.suffix not in {"", ".png", ".npz"}:
        raise SettingError("out", f"must be FILE.npz, FILE.png or a folder; got {out}")
    if out.exists() and out.is_dir() == bool(out.suffix):
        raise SettingError("out", f"{out} is there already, as another kind of file")
    if out.is_file() and not overwrite:
        msg = f"{out} is there already; name another file, or allow it to be overwritten"
        raise SettingError("out", msg)
    _check_parts(_parts_folder(out))
    if out.is_dir() and any(out.iterdir()) and not _is_done(out, request):
        raise SettingError("out", f"{out} holds files already; name another folder")
    check_writable(_parts_folder(out).parent)


def draw_to(
    out: Path,
    request: SampleRequest,
    *,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Draw images into a file or folder.

    Each batch is kept in a folder beside the output, ``NAME.parts``, until all are there: whoever
    asks for the same again goes on from them.
    """
    with ExitStack() as own:
        if process == 0:
            own.enter_context(alone(out))
        _draw_to(out, request, process, processes, wait)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold an output for one call of `draw_to` at a time."""
    with ExitStack() as own:
        try:
            own.enter_context(file_lock(_parts_folder(out), wait=False))
        except BlockingIOError:
            msg = f"{out} is being written by another process; wait, or name another"
            raise SettingError("out", msg) from None
        yield


def _draw_to(
    out: Path, request: SampleRequest, process: int, processes: int, wait: Callable[[], None]
) -> None:
    parts = _parts_folder(out)
    digest = request.digest()
    if process == 0:
        _open_parts(parts, digest)
    wait()
    batches = request.batches()
    missing = [i for i in range(len(batches)) if not (parts / f"{i:08d}.npy").exists()]
    wait()
    mine = missing[process::processes]
    bar = progress_bar(
        None,
        shown=process == 0,
        total=sum(len(batches[i][1]) for i in mine),
        desc="sampling",
        unit="image",
    )
    with bar:
        for i in mine:
            label, seeds = batches[i]
            images = request.draw(label, seeds)
            file = parts / f"{i:08d}.npy"
            _write(file, partial(_save_array, array=images.numpy()))
            bar.update(len(seeds))
    wait()
    if process == 0:
        if out.suffix:
            _gather(out, parts, request)
        else:
            _gather_pictures(out, parts, request)
        _drop_parts(parts)
    wait()


def _read(
    parts: Path, batches: list[tuple[int | None, list[int]]]
) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    for i, (_, seeds) in enumerate(batches):
        yield np.load(parts / f"{i:08d}.npy", allow_pickle=False), seeds


def _gather(out: Path, parts: Path, request: SampleRequest) -> None:
    """Put the parts together in a file, in the order of the seeds."""
    batches, levels = request.batches(), request.model.space.levels
    drawn = np.array([seed for _, seeds in batches for seed in seeds], np.int64)
    order = np.argsort(drawn)
    images = np.concatenate([part for part, _ in _read(parts, batches)])[order]
    if out.suffix == ".png":
        grid = torch.from_numpy(images)
        _write(out, lambda path: save_grid(path, grid, levels, notes=_notes(request)))
        return
    arrays: dict[str, Any] = {
        "images": images.transpose(0, 2, 3, 1),
        "levels": np.array(levels),
        "seeds": drawn[order],
        "recipe": np.array(json.dumps(request.recipe())),
    }
    if batches[0][0] is not None:
        labels = np.concatenate([np.full(len(seeds), label) for label, seeds in batches])
        arrays["labels"] = labels[order]
    _write(out, lambda path: np.savez_compressed(path, **arrays))


def _gather_pictures(out: Path, parts: Path, request: SampleRequest) -> None:
    """Make pictures of the parts in a folder that is moved into place with all of them."""
    if out.exists() and _is_done(out, request):
        return
    whole = parts / f"{PARTIAL}whole"
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    names = dict(zip(request.seeds, _picture_names(request), strict=True))
    total, notes = len(request.seeds), _notes(request)
    with progress_bar(None, shown=True, total=total, desc="pictures", unit="image") as bar:
        for images, seeds in _read(parts, request.batches()):
            for image, seed in zip(images, seeds, strict=True):
                shown, file = picture(image, request.model.space.levels), whole / names[seed]
                try:
                    shown.save(file, pnginfo=notes)
                except OSError as error:
                    raise OSError(_unwritten(file, error)) from error
                bar.update()
    all_to_disk()  # at once: waiting for the disk after each takes far longer than writing it
    place = out.resolve()
    try:
        if place.exists():
            place.rmdir()  # which the system refuses if it is not empty
        whole.replace(place)
    except OSError as error:
        raise OSError(_unwritten(place, error)) from error


def _picture_names(request: SampleRequest) -> list[str]:
    """Names of the pictures in a folder, in the order of the seeds."""
    digits = len(str(request.seeds[-1]))
    return [f"{seed:0{digits}d}.png" for seed in request.seeds]


def _is_done(out: Path, request: SampleRequest) -> bool:
    """Whether a folder was put in place, and the parts left, when an earlier call ended."""
    if _note_of(_parts_folder(out)) != request.digest():
        return False
    return sorted(file.name for file in out.iterdir()) == _picture_names(request)


def _notes(request: SampleRequest) -> PngInfo:
    """The recipe, for the header of a picture."""
    notes = PngInfo()
    notes.add_itxt("recipe", json.dumps(request.recipe()))
    return notes


def _parts_folder(out: Path) -> Path:
    """Beside the output itself, where that is a link, so that all can be moved into place."""
    place = out.resolve()
    return place.with_name(f"{place.name}.parts")


def _check_parts(parts: Path) -> None:
    """Refuse a folder of parts that is not one: what is in it would be lost."""
    if not parts.exists():
        return
    if parts.is_dir():
        # The note comes first and goes last, also where another process of ours is at it.
        note = _note_of(parts)
        names = [file.name for file in parts.iterdir()]
        noted = not any(map(_is_part, names)) if note is None else _is_digest(note)
        if noted and all(map(_is_ours, names)):
            return
    msg = f"{parts} is needed, but holds other files; move it, or choose another name"
    raise SettingError("out", msg)


def _open_parts(parts: Path, digest: str) -> None:
    """Make the folder of parts, or go on with it; what other settings left there is dropped."""
    _check_parts(parts)
    if _note_of(parts) == digest:
        return
    if parts.exists():
        _drop_parts(parts)
    parts.mkdir(exist_ok=True)
    _write(parts / _REQUEST, lambda path: path.write_text(digest))


def _note_of(parts: Path) -> str | None:
    """Digest of the request whose parts a folder holds."""
    try:
        return (parts / _REQUEST).read_text(errors="replace")
    except FileNotFoundError:
        return None


def _drop_parts(parts: Path) -> None:
    """Delete a folder of parts, but nothing that somebody else put there."""
    ours = [file for file in parts.iterdir() if _is_ours(file.name)]
    for file in sorted(ours, key=lambda file: file.name == _REQUEST):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


def _is_digest(note: str) -> bool:
    return len(note) == 64 and set(note) <= set("0123456789abcdef")


def _is_part(name: str) -> bool:
    stem, _, suffix = name.partition(".")
    return suffix == "npy" and len(stem) >= 8 and stem.isdecimal()


def _is_ours(name: str) -> bool:
    return name == _REQUEST or name.startswith(PARTIAL) or _is_part(name)


def _write(file: Path, writer: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and name it where that fails."""
    try:
        write_whole(file, writer)
    except OSError as error:
        raise OSError(_unwritten(file, error)) from error


def _unwritten(file: Path, error: OSError) -> str:
    reason = error.strerror or brief(error)
    return f"{file} cannot be written ({reason}); what was sampled is kept: the same call resumes"


def _save_array(path: Path, array: NDArray[np.uint8]) -> None:
    # NumPy's own errors on a full disk do not say that it is full.
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())
