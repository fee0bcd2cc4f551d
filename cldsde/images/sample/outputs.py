"""Samples of a model in files, in parts that survive an interruption, and shared by processes."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo
from torch import distributed

from cldsde.errors import SettingError
from cldsde.files import PARTIAL, check_writable, file_lock, write_whole, writing
from cldsde.images.checks import output_place
from cldsde.images.data.pixels import as_bytes, picture, save_grid
from cldsde.images.sample.sampler import ImageSampler, Samples, ahead, batches_of
from cldsde.progress import progress_bar

GRID_LIMIT = 4096
"""Largest number of images in a picture of a grid."""
_KEPT = "finished samples are kept: the same call resumes"


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """A request for samples of a trained model or a pipeline, one image for each seed below 2³²."""

    sampler: Any  # an ImageSampler, or the PipelineSampler of a pipeline
    seeds: range
    weights: str  # digest

    def recipe(self) -> dict[str, object]:
        """Everything that the images and their parts depend on, in JSON types."""
        seeds = [self.seeds.start, self.seeds.stop]
        return {"weights": self.weights, **self.sampler.recipe(), "seeds": seeds}


def check_output(out: Path, request: SampleRequest, *, overwrite: bool = False) -> None:
    """Raise an error unless samples can be written; ``overwrite`` replaces files and old parts."""
    named, out, problem = out, output_place(out), None
    if out.suffix == ".png" and len(request.seeds) > GRID_LIMIT:
        problem = f"a picture holds {GRID_LIMIT} images at most; use FILE.npz or a folder"
    elif out.suffix not in {"", ".png", ".npz"} or named.name in {"", ".."} or out.is_mount():
        problem = f"must be FILE.npz, FILE.png or a folder that can be replaced; got {named}"
    elif not out.suffix and request.sampler.space.shape[0] not in {1, 3}:
        problem = f"must be FILE.npz or FILE.png for images of {request.sampler.space.shape[0]} "
        problem += f"channels, of which there are no pictures; got {out}"
    elif out.exists() and out.is_dir() == bool(out.suffix):
        problem = f"{out} is there already, as another kind of file"
    elif out.is_file() and not overwrite:
        problem = f"{out} is there already; name another file, or set `overwrite`"
    elif out.is_dir() and any(out.iterdir()) and not _is_done(out, request):
        problem = f"{out} holds files already; name another folder"
    others = [x for x in _all_parts(out) if x != _parts_folder(out, request) and any(x.iterdir())]
    if problem is None and others and not overwrite:
        problem = f"{others[0]} holds finished samples for {out} with other settings, which would "
        problem += "be deleted. Repeat that call, name another output, or set `overwrite`"
    if problem is not None:
        raise SettingError("out", problem)
    check_writable(out.parent)


def draw_to(out: Path, request: SampleRequest) -> float | None:
    """Sample images into a file or folder; return their mean score evaluations in process 0.

    Each batch is kept in a folder beside the output until all are there, so that a later call for
    the same request resumes. Parts of other requests for this output are deleted.
    """
    out, (rank, processes) = output_place(out), place()
    with alone(out) if rank == 0 else nullcontext():
        parts = _parts_folder(out, request)
        if rank == 0:
            _drop_parts(out, keep=parts)
            parts.mkdir(exist_ok=True)
        of_each(None)  # waits for all processes, here and below
        there = {seed for seeds, *_ in _read(parts) for seed in seeds.tolist()}
        missing = request.sampler.batches([seed for seed in request.seeds if seed not in there])
        of_each(None)
        mine = batches_of(request.sampler, missing[rank::processes], shown=rank == 0)
        # A part is written while the next one is sampled, also if that is interrupted.
        for _ in ahead(partial(_write_part, parts), mine):
            pass
        of_each(None)
        mean = None
        if rank == 0:
            mean = float(np.concatenate([evaluations for *_, evaluations in _read(parts)]).mean())
            (_gather if out.suffix else _gather_pictures)(out, parts, request)
            _drop_parts(out)
        of_each(None)
        return mean


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold an output for one call of `draw_to` at a time, or raise a SettingError."""
    try:
        with file_lock(out.resolve(), wait=False):
            yield
    except TimeoutError:
        msg = f"{out} is being written by another process; wait, or name another"
        raise SettingError("out", msg) from None


def _read(parts: Path) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Seeds, images and score evaluations of each part; raise a ValueError for a damaged part."""
    for file in sorted(parts.glob("[0-9]*.npy")):
        try:
            with file.open("rb") as stream:
                yield np.load(stream), np.load(stream), np.load(stream)
        except (ValueError, EOFError) as error:
            msg = f"{file} is damaged ({error}); delete it to have its images sampled again"
            raise ValueError(msg) from error


def _gather(out: Path, parts: Path, request: SampleRequest) -> None:
    levels = request.sampler.space.levels
    drawn, images, evaluations = map(np.concatenate, zip(*_read(parts), strict=True))
    order = np.argsort(drawn)
    sheet = images[order]
    if out.suffix == ".png":
        grid, notes = torch.from_numpy(sheet), _notes(request)
        _write(out, lambda path: save_grid(path, grid, levels, notes=notes))
        return
    arrays: dict[str, Any] = {"images": sheet.transpose(0, 2, 3, 1), "levels": np.array(levels)}
    arrays |= {"seeds": drawn[order], "evaluations": evaluations[order]}
    arrays["recipe"] = np.array(json.dumps(request.recipe()))
    batches = request.sampler.batches(request.seeds)
    labels = {seed: label for label, seeds in batches for seed in seeds}
    if batches[0][0] is not None:
        arrays["labels"] = np.array([labels[seed] for seed in request.seeds])
    _write(out, lambda path: np.savez_compressed(path, **arrays))


def _gather_pictures(out: Path, parts: Path, request: SampleRequest) -> None:
    """Write the parts as pictures in a folder, and move it into place."""
    if out.exists() and _is_done(out, request):
        return
    whole = parts / f"{PARTIAL}whole"
    if whole.exists():
        shutil.rmtree(whole)
    names = dict(zip(request.seeds, _picture_names(request), strict=True))
    total, notes = len(request.seeds), _notes(request)
    whole.mkdir()
    with progress_bar(None, shown=True, total=total, desc="pictures", unit="image") as bar:
        for seeds, images, _ in _read(parts):
            shown = as_bytes(torch.from_numpy(images), request.sampler.space.levels)
            for image, seed in zip(shown, seeds.tolist(), strict=True):
                with writing(whole / names[seed], _KEPT):
                    picture(image).save(whole / names[seed], pnginfo=notes)
                bar.update()
    if hasattr(os, "sync"):  # once: synchronising each file takes far longer than writing it
        os.sync()
    with writing(out, _KEPT):
        if out.exists():
            out.rmdir()  # fails if it is not empty
        whole.replace(out)


def _picture_names(request: SampleRequest) -> list[str]:
    digits = len(str(request.seeds[-1]))
    return [f"{seed:0{digits}d}.png" for seed in request.seeds]


def _is_done(out: Path, request: SampleRequest) -> bool:
    """Whether a folder is in place, but an earlier call ended before the parts were dropped."""
    names = sorted(file.name for file in out.iterdir())
    return _parts_folder(out, request).exists() and names == _picture_names(request)


def _notes(request: SampleRequest) -> PngInfo:
    """The recipe, for the header of a picture."""
    notes = PngInfo()
    notes.add_itxt("recipe", json.dumps(request.recipe()))
    return notes


def _parts_folder(out: Path, request: SampleRequest) -> Path:
    """Folder beside the output, so that it can be moved into place."""
    # An image does not depend on its batch.
    recipe = {key: x for key, x in request.recipe().items() if key != "batch"}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return out.with_name(f"{out.name}.parts-{digest[:16]}")


def _all_parts(out: Path) -> list[Path]:
    """Folders of parts of an output, of any request."""
    return [*out.parent.glob(f"{glob.escape(out.name)}.parts-{'[0-9a-f]' * 16}")]


def _drop_parts(out: Path, keep: Path | None = None) -> None:
    for parts in {*_all_parts(out)} - {keep}:
        shutil.rmtree(parts)


def _write(file: Path, writer: Callable[[Path], object]) -> None:
    with writing(file, _KEPT):
        write_whole(file, writer)


def _write_part(parts: Path, made: tuple[list[int], Samples]) -> None:
    seeds, drawn = made
    # NumPy's own errors on a full disk do not say that it is full.
    buffer = io.BytesIO()
    for array in (np.array(seeds), *drawn[:2]):
        np.save(buffer, array)
    _write(parts / f"{seeds[0]:010d}.npy", lambda path: path.write_bytes(buffer.getbuffer()))


def place() -> tuple[int, int]:
    """Number of this process, 0 for the one with the results, and of all that share its work."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def of_each(own: Any) -> list[Any]:
    """An object of each process, in the order of their numbers; all processes must call it."""
    found = [own] * place()[1]
    if len(found) > 1:
        distributed.all_gather_object(found, own)
    return found


def shared(sampler: ImageSampler, seeds: range) -> Iterator[tuple[list[int], Samples]]:
    """Batches of `ImageSampler.batches` in their order, of which each process samples a share."""
    (rank, processes), batches = place(), sampler.batches(seeds)
    mine = batches_of(sampler, batches[rank::processes], shown=False)
    for _ in range(0, len(batches), processes):
        own: Any
        try:
            own = next(mine, None)
        except FloatingPointError as error:  # raised by all processes, which wait for each other
            own = error
        for made in of_each(own):
            if isinstance(made, FloatingPointError):
                raise made
            if made is not None:
                yield made
