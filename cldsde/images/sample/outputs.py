"""Samples of a trained model in files: in parts that survive an interruption and can be shared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cldsde.images.config import SamplingConfig
from cldsde.images.data import to_unit
from cldsde.images.figures import picture, save_grid
from cldsde.images.files import PARTIAL, all_to_disk, brief, check_writable, held, write_whole
from cldsde.images.imputation import Imputation, grey_basis
from cldsde.images.model import ImageModel
from cldsde.images.sample.sampler import (
    ImageSampler,
    check_sampling,
    class_batches,
    guided,
    make_solver,
)
from cldsde.progress import progress_bar
from cldsde.solvers.authoring import Solver

__all__ = ["SampleRequest", "check_unused", "draw_to"]

_GRID_LIMIT = 4096  # images that a picture of a grid may hold
_REQUEST = "request"  # file of a folder of parts: of what they are


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleRequest:
    """What to draw from a trained model.

    Attributes
    ----------
    model
        The model.
    sampling
        Solver and budget.
    seeds
        One for each image.
    batch
        Images drawn at once.
    label
        Class of all images; ``"all"``: class i modulo their number for seed i; None: no class.
    guidance
        Weight of the class, see `GuidedScore`.
    known, mask
        Pictures of the image of which a part is kept, and of that part in white.
    colourise
        Keep the grey levels of the known picture instead of a part.
    """

    model: ImageModel
    sampling: SamplingConfig
    seeds: range
    batch: int = 64
    label: int | Literal["all"] | None = None
    guidance: float = 1.0
    known: Path | None = None
    mask: Path | None = None
    colourise: bool = False

    def check(self, out: Path) -> None:
        """Refuse what cannot be drawn or written, before any work is done.

        Raises
        ------
        ValueError
            If the options do not fit the model or each other, or the output is of no known kind.
        OSError
            If the output cannot be written.
        """
        space = self.model.space
        if self.guidance != 1 and space.always_classes:
            msg = "--guidance needs a network trained without classes, too (network.label_dropout)"
            raise ValueError(msg)
        if self.batch < 1:
            msg = f"--batch must be at least 1; got {self.batch}"
            raise ValueError(msg)
        if self.guidance != 1 and self.label is None:
            msg = f"--guidance: there is no class to stress; give --class. Got {self.guidance}"
            raise ValueError(msg)
        if self.guidance < 0 or not np.isfinite(self.guidance):
            msg = f"--guidance must be finite and at least 0; got {self.guidance}"
            raise ValueError(msg)
        self._check_known()
        if out.suffix == ".png" and len(self.seeds) > _GRID_LIMIT:
            msg = (
                f"--out: a picture holds {_GRID_LIMIT} images at most; got {len(self.seeds)} "
                "seeds. Take FILE.npz or a folder"
            )
            raise ValueError(msg)
        if out.name in {"", ".."} or out.resolve().is_mount():
            msg = (
                "--out must name a file, or a folder that can be moved into place; got "
                f"{out}. Take one inside, such as {out / 'samples'}"
            )
            raise ValueError(msg)
        if out.suffix not in {"", ".png", ".npz"}:
            msg = f"--out must be FILE.npz, FILE.png or a folder; got {out}"
            raise ValueError(msg)
        if out.exists() and out.is_dir() == bool(out.suffix):
            msg = f"--out: {out} is there already, as another kind of file"
            raise ValueError(msg)
        check_sampling(self.model.score, self.sampling)
        solver = make_solver(self.sampling)
        if self.known is not None and solver.facts.adaptive:
            msg = f"--known: {self.sampling.solver} chooses its times; take a solver on a grid"
            raise ValueError(msg)
        wrap = self._around
        if wrap is not None:
            check_sampling(self.model.score, self.sampling, around=wrap)
        _check_parts(_parts_folder(out))
        if out.is_dir() and any(out.iterdir()) and not self.is_done(out):
            msg = f"--out: {out} holds files already; name another folder"
            raise ValueError(msg)
        check_writable(_parts_folder(out).parent)

    def _check_known(self) -> None:
        """Refuse options of what is known that do not fit the model or each other."""
        if self.known is None and (self.mask is not None or self.colourise):
            msg = "--mask and --colourise need --known, the picture of which a part is kept"
            raise ValueError(msg)
        if self.known is not None and self.model.vae is not None:
            msg = "--known: pixels are kept where the process is of pixels, not in a latent space"
            raise ValueError(msg)
        if self.known is not None and (self.mask is None) != self.colourise:
            msg = "--known takes either --mask or --colourise"
            raise ValueError(msg)

    def batches(self) -> list[tuple[int | None, list[int]]]:
        """Classes and seeds of the batches; all images of a batch are of one class."""
        return class_batches(self.model.space, self.seeds, self.batch, self.label)

    def draw(self, label: int | None, seeds: list[int]) -> Tensor:
        """Images of one batch, uint8."""
        score = guided(self.model.score, self.model.space, label, self.guidance)
        return self._sampler.draw(seeds, score).images

    def digest(self) -> str:
        """Of everything that the images and their parts depend on."""
        pictures = [
            None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (self.known, self.mask)
        ]
        parts = [
            self.model.digest,
            dataclasses.asdict(self.sampling),
            self.batch,
            self.label,
            self.guidance,
            pictures,
            self.colourise,
            [self.seeds.start, self.seeds.stop],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def picture_names(self) -> list[str]:
        """Names of the pictures in a folder, in the order of the seeds."""
        digits = len(str(self.seeds[-1]))
        return [f"{seed:0{digits}d}.png" for seed in self.seeds]

    def is_done(self, out: Path) -> bool:
        """Whether a folder was put in place, and the parts left, when an earlier call ended."""
        if _note_of(_parts_folder(out)) != self.digest():
            return False
        return sorted(file.name for file in out.iterdir()) == self.picture_names()

    @cached_property
    def _sampler(self) -> ImageSampler:
        model = self.model
        return ImageSampler(
            model.score, model.space, self.sampling, vae=model.vae, around=self._around
        )

    @cached_property
    def _around(self) -> Callable[[Solver], Imputation] | None:
        """What makes of a solver an imputation; its tensors are where the states will be."""
        if self.known is None:
            return None
        shape = self.model.space.shape
        known = _picture_of(self.known, shape, "--known")
        known = (known + 0.5) / 128 - 1 if self.model.space.dequantised else to_unit(known)
        device = self.model.score.data_mean.device
        known = known.to(device)
        if self.colourise:
            if shape[0] != 3:
                msg = f"--colourise needs a model of colour images; this one makes {shape}"
                raise ValueError(msg)
            grey = torch.tensor([True, False, False], device=device).reshape(3, 1, 1)
            return lambda solver: Imputation(solver, known, grey, basis=grey_basis())
        assert self.mask is not None
        mask = _picture_of(self.mask, (1, *shape[1:]), "--mask").to(device) >= 128
        return lambda solver: Imputation(solver, known, mask)


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

    Parameters
    ----------
    out
        ``FILE.npz`` with ``images`` (N, H, W, C) uint8, ``levels``, the number of their grey
        levels, ``seeds`` and, where there are classes, ``labels``; ``FILE.png``, a grid; or a
        folder of pictures named by their seeds.
    request
        What to draw.
    process, processes
        Which share of the batches to draw: every ``processes``-th, beginning with ``process``.
    wait
        Returns when all processes have called it.

    Raises
    ------
    FloatingPointError
        If an image is not finite.
    ValueError
        If the folder of parts is somebody else's, or another call draws to this output.
    OSError
        If a file cannot be written; what was drawn is kept.
    """
    with ExitStack() as own:
        if process == 0:
            own.enter_context(_alone(out))
        _draw_to(out, request, process, processes, wait)


def check_unused(out: Path) -> None:
    """Refuse an output that another call of `draw_to` is at.

    Raises
    ------
    ValueError
        If there is one.
    """
    with _alone(out):
        pass


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with ExitStack() as own:
        try:
            own.enter_context(held(_parts_folder(out), wait=False))
        except BlockingIOError:
            msg = f"--out: {out} is being drawn by another process; wait, or name another"
            raise ValueError(msg) from None
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
            _gather(out, parts, batches, request.model.space.levels)
        else:
            _gather_pictures(out, parts, request)
        _drop_parts(parts)
    wait()


def _read(
    parts: Path, batches: list[tuple[int | None, list[int]]]
) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    for i, (_, seeds) in enumerate(batches):
        yield np.load(parts / f"{i:08d}.npy", allow_pickle=False), seeds


def _gather(
    out: Path, parts: Path, batches: list[tuple[int | None, list[int]]], levels: int
) -> None:
    """Put the parts together in a file, in the order of the seeds."""
    drawn = np.array([seed for _, seeds in batches for seed in seeds], np.int64)
    order = np.argsort(drawn)
    images = np.concatenate([part for part, _ in _read(parts, batches)])[order]
    if out.suffix == ".png":
        _write(out, lambda path: save_grid(path, torch.from_numpy(images), levels))
        return
    arrays: dict[str, Any] = {
        "images": images.transpose(0, 2, 3, 1),
        "levels": np.array(levels),
        "seeds": drawn[order],
    }
    if batches[0][0] is not None:
        labels = np.concatenate([np.full(len(seeds), label) for label, seeds in batches])
        arrays["labels"] = labels[order]
    _write(out, lambda path: np.savez_compressed(path, **arrays))


def _gather_pictures(out: Path, parts: Path, request: SampleRequest) -> None:
    """Make pictures of the parts in a folder that is moved into place with all of them."""
    if out.exists() and request.is_done(out):
        return
    whole = parts / f"{PARTIAL}whole"
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    names = dict(zip(request.seeds, request.picture_names(), strict=True))
    total = len(request.seeds)
    with progress_bar(None, shown=True, total=total, desc="pictures", unit="image") as bar:
        for images, seeds in _read(parts, request.batches()):
            for image, seed in zip(images, seeds, strict=True):
                shown, file = picture(image, request.model.space.levels), whole / names[seed]
                try:
                    shown.save(file)
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


def _parts_folder(out: Path) -> Path:
    """Beside the output itself, where that is a link, so that all can be moved into place."""
    place = out.resolve()
    return place.with_name(f"{place.name}.parts")


def _check_parts(parts: Path) -> None:
    """Refuse a folder of parts that is not one: what is in it would be lost.

    Raises
    ------
    ValueError
        If it holds anything but what `draw_to` leaves there.
    """
    if not parts.exists():
        return
    if parts.is_dir():
        # The note comes first and goes last, also where another process of ours is at it.
        note = _note_of(parts)
        names = [file.name for file in parts.iterdir()]
        noted = not any(map(_is_part, names)) if note is None else _is_digest(note)
        if noted and all(map(_is_ours, names)):
            return
    msg = f"--out: {parts} is needed, but holds other files; move it, or choose another name"
    raise ValueError(msg)


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
    return re.fullmatch(r"[0-9a-f]{64}", note) is not None


def _is_part(name: str) -> bool:
    return re.fullmatch(r"\d{8,}\.npy", name) is not None


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
    return f"{file} cannot be written ({reason}); what was drawn is kept, and the same call goes on"


def _save_array(path: Path, array: NDArray[np.uint8]) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _picture_of(file: Path, shape: tuple[int, int, int], option: str) -> Tensor:
    """A picture as ``(C, H, W)`` uint8."""
    channels, height, width = shape
    try:
        with Image.open(file) as source:
            image = source.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        msg = f"{option}: {file} cannot be read as a picture ({error})"
        raise ValueError(msg) from error
    if image.size != (width, height):
        msg = (
            f"{option}: {file} must have {height} rows and {width} columns; got "
            f"{image.size[1]} and {image.size[0]}"
        )
        raise ValueError(msg)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(height, width, channels).movedim(-1, 0).contiguous()
