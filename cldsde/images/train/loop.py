"""Training of a score model on images: one loop, on any number of processes, resumable to the bit.

All randomness is a function of the seed and of the number of images seen (`cldsde.images.streams`),
so that a run depends neither on how many processes share it nor on where it was interrupted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.figures import save_grid
from cldsde.images.files import brief
from cldsde.images.model import (
    MODEL,
    DiffusionModel,
    ImageModel,
    Statistics,
    read_model,
    save_model,
)
from cldsde.images.networks import parameter_count
from cldsde.images.runs import METRICS, RunFolder
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.train.board import Board
from cldsde.images.train.engine import check_run, make_engine
from cldsde.images.train.learner import Learner
from cldsde.images.train.schedule import learning_rates
from cldsde.images.train.start import copy_weights
from cldsde.images.train.state import STATE, StopRequest
from cldsde.progress import progress_bar

TRAINING = "repeat the whole training"
"""What it takes to have the model of a finished run again."""


def train(
    config: RunConfig,
    data: DataSet,
    run: RunFolder,
    *,
    device: str = "auto",
    statistics: Statistics | None = None,
    progress: bool = False,
) -> DiffusionModel:
    """Train a model; return it with averaged weights, in evaluation mode.

    Writes to the run folder lines of ``metrics.jsonl`` and TensorBoard's events, grids of samples,
    ``model.safetensors`` with the averaged weights, and the training state. SIGINT and SIGTERM end
    the training of a single process after its step, with its state saved; a second signal ends it
    at once. An interrupted run resumes from its last state and ends, on the CPU of the same
    machine, with the same bits as an uninterrupted one; on a GPU up to nondeterministic kernels. A
    finished run is loaded, or trained further if ``training.images`` has grown. Under ``torchrun``
    or ``accelerate launch`` the processes share each batch.

    Parameters
    ----------
    config
        The configuration.
    data
        Its images.
    run
        Where to write.
    device
        ``"auto"``: the GPU that the process is given, or the host; or the name of a device.
    statistics
        What `check_run` returned, if it was called.
    progress
        Show a progress bar with loss and time left on stderr.

    Returns
    -------
    DiffusionModel
        The exponential moving average of the model.

    Raises
    ------
    ValueError
        If configuration, data and device do not fit, or a file of the run cannot be used.
    FloatingPointError
        If the loss or a weight is not finite; the last state saved stays.
    OSError
        If a file cannot be written; the last state saved stays.
    """
    if statistics is None:
        statistics = check_run(config, data, device=device)
    try:
        engine = make_engine(config, device)
        trainer = _Trainer(Learner(config, data, statistics, engine), run)
        with _own_randomness(engine):
            return trainer.run(progress=progress)
    finally:
        # Another training of this process may take another precision.
        AcceleratorState._reset_state(reset_partial_state=False)


class Rehearsal(NamedTuple):
    """Measurements of the first steps of a training.

    Attributes
    ----------
    parameters
        Of score and autoencoder.
    images_per_second
        Of an optimiser step, over all processes.
    memory
        Peak bytes of the GPU, or of the process on a CPU.
    """

    parameters: int
    images_per_second: float
    memory: int


def rehearse(
    config: RunConfig, data: DataSet, *, device: str = "auto", statistics: Statistics | None = None
) -> Rehearsal:
    """Make two training steps, the second of which is timed, and write nothing.

    Parameters and errors are those of `train`.
    """
    if statistics is None:
        statistics = check_run(config, data, device=device)
    try:
        engine = make_engine(config, device)
        learner = Learner(config, data, statistics, engine)
        with _own_randomness(engine):
            return _rehearse(learner)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


def _rehearse(learner: Learner) -> Rehearsal:
    device, batches = learner.engine.device, [learner.feed.load(step) for step in range(2)]
    on_gpu = device.type == "cuda"
    for step, batch in enumerate(batches):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        learner.step(step, batch)
    if on_gpu:
        torch.cuda.synchronize(device)
    speed = learner.config.training.batch / (time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else _peak()
    return Rehearsal(parameter_count(learner.model), speed, memory)


@contextmanager
def _own_randomness(engine: Accelerator) -> Iterator[None]:
    """Leave the global generators as they are: dropout draws from them."""
    gpus = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        yield


class _Trainer:
    """One process of a training."""

    def __init__(self, learner: Learner, run: RunFolder) -> None:
        self.learner, self.folder = learner, run
        self.config, self.engine = learner.config, learner.engine
        self.settings, self.space = learner.config.training, learner.space

    def run(self, *, progress: bool) -> DiffusionModel:
        total, batch = self.settings.steps, self.settings.batch
        start, seconds = self._start()
        if start == total:
            if not (self.folder / MODEL).exists():
                self._save(total, seconds)
            return self._model(self.engine.device).model
        if start == 0 and self.settings.init_from is not None:
            for model in (self.learner.model, self.learner.average):
                copy_weights(model, Path(self.settings.init_from).expanduser())
        board = self._open_logs(start)
        began = time.monotonic() - seconds
        bar = progress_bar(
            None,
            shown=progress and self.engine.is_main_process,
            initial=start * batch,
            total=total * batch,
            unit="image",
            unit_scale=True,
            desc="training",
        )
        logs = nullcontext() if board is None else closing(board)
        with bar, logs, ThreadPoolExecutor(1) as loader, StopRequest(self.engine) as stop:
            if start and self._due(self.settings.sample_every, start):
                self._draw(start, board, partial(self._obey, stop, start, began))
            for step, parts in enumerate(self.learner.feed.batches(loader, start), start):
                self.learner.step(step, parts)
                done = step + 1
                bar.update(batch)
                if self._due(self.settings.log_every, done):
                    self._log(done, time.monotonic() - began, bar, board)
                if self._due(self.settings.save_every, done):
                    self._save(done, time.monotonic() - began)
                if self._due(self.settings.sample_every, done):
                    self._draw(done, board, partial(self._obey, stop, done, began))
                self._obey(stop, done, began)
        self.engine.wait_for_everyone()
        if self.engine.is_main_process and not self.settings.keep_state:
            (self.folder / STATE).unlink(missing_ok=True)
        self.engine.wait_for_everyone()
        return self.learner.average

    def _obey(self, stop: StopRequest, done: int, began: float) -> None:
        """Save and stop if a signal asks for it, between two steps or two batches of a grid."""
        if stop.wanted and done < self.settings.steps:
            self._save(done, time.monotonic() - began)
            stop.obey()

    def _start(self) -> tuple[int, float]:
        """Steps done, and seconds spent on them, on which all processes agree."""
        if (self.folder / STATE).exists():
            found = self.learner.state.load(self.folder)
        elif (self.folder / MODEL).exists():
            found = self._finished(), 0.0
        else:
            found = 0, 0.0
        [first] = broadcast_object_list([found])
        if first[0] != found[0]:
            msg = f"{self.folder.path} must be one folder for all processes: they see other states"
            raise ValueError(msg)
        return found

    def _finished(self) -> int:
        seen, steps = self._model().images_seen, self.settings.steps
        if seen != steps * self.settings.batch:
            msg = (
                f"{self.folder / MODEL} has seen {seen:,} images, and the state to resume from, "
                f"{STATE}, is missing; put it back, or begin again in another folder, with "
                "training.init_from"
            )
            raise ValueError(msg)
        return steps

    def _model(self, device: torch.device | str = "cpu") -> ImageModel:
        """The model in its file."""
        try:
            return read_model(self.folder / MODEL, self.config, device)
        except ValueError as error:
            cost = "" if (self.folder / STATE).exists() else TRAINING
            raise ValueError(self.folder.damaged(MODEL, error, cost=cost)) from error

    def _due(self, every: int, done: int) -> bool:
        """Whether a multiple of so many images was passed in the last step, or a stage is done."""
        batch = self.settings.batch
        passed = done * batch // every > (done - 1) * batch // every
        return passed or done in {self.config.pretraining_steps, self.settings.steps}

    @cached_property
    def sampler(self) -> ImageSampler:
        """Sampler of the averaged model; its tables are computed once."""
        score, vae = self.learner.average.score, self.learner.average.vae
        return ImageSampler(
            score, self.space, self.config.sampling, vae=vae, batch=self.learner.feed.part_size
        )

    def _open_logs(self, start: int) -> Board | None:
        """TensorBoard's events, of the process that writes; lines of steps to come are dropped."""
        if not self.engine.is_main_process:
            return None
        seen = start * self.settings.batch
        with self._writing(METRICS):
            self.folder.forget_metrics_after(seen)
        return Board(self.folder / "tensorboard", seen + 1)

    def _log(self, done: int, seconds: float, bar: Any, board: Board | None) -> None:
        means = self.learner.meter.means()
        self.learner.meter.clear()
        seen = done * self.settings.batch
        self._check_finite(means["loss"], seen)
        if board is None:
            return
        held_out = self.learner.held_out(done - 1)
        record = {
            "images": seen,
            "loss": means.pop("loss"),
            **({} if held_out is None else {"held_out_loss": held_out}),
            "gradient_norm": means.pop("gradient_norm"),
            **(self._of_parts(means, done) if len(self.learner.parts) > 1 else {}),
            "learning_rate": learning_rates(self.config, done - 1)[0],
            "seconds": round(seconds, 3),
        }
        with self._writing(METRICS):
            self.folder.log(record)
        scalars = {f"training/{name}": x for name, x in record.items() if name != "images"}
        board.add(scalars, seen)
        shown = {"loss": record["loss"], "held_out": held_out}
        bar.set_postfix({name: f"{x:.4f}" for name, x in shown.items() if x is not None})

    def _of_parts(self, means: dict[str, float], done: int) -> dict[str, float]:
        """Without those of the score where it was not trained: no line is of two stages."""
        trained = done > self.config.pretraining_steps
        return {key: x for key, x in means.items() if trained or not key.startswith("score_")}

    def _save(self, done: int, seconds: float) -> None:
        seen = done * self.settings.batch
        sums = self.learner.meter.shared()
        self._check_finite(self.learner.meter.means()["loss"], seen)
        if self.engine.is_main_process:
            try:
                weights = self.learner.average.state_dict()
                save_model(self.folder / MODEL, weights, self.config, self.space, seen)
                self._keep_snapshot(weights, seen)
                if done < self.settings.steps or self.settings.keep_state:
                    self.learner.state.save(self.folder, done, seconds, sums)
            except OSError as error:
                msg = (
                    f"not all of the state of {seen} images could be saved ({error}); "
                    f"{self._what_stays()}"
                )
                raise OSError(msg) from error
        self.engine.wait_for_everyone()

    def _keep_snapshot(self, weights: dict[str, Tensor], seen: int) -> None:
        """Keep the last averaged weights beside the model, as many as are wanted."""
        if self.settings.snapshots:
            folder = self.folder / "snapshots"
            folder.mkdir(exist_ok=True)
            save_model(folder / f"{seen:012d}.safetensors", weights, self.config, self.space, seen)
            for old in sorted(folder.glob("*.safetensors"))[: -self.settings.snapshots]:
                old.unlink()

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Say which file of the run finds no room, and what stays."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or brief(error)
            msg = f"{self.folder / name} cannot be written ({reason}); {self._what_stays()}"
            raise OSError(msg) from error

    def _check_finite(self, loss: float, seen: int) -> None:
        """Raise before weights that are no numbers reach a file."""
        finite = torch.stack([x.isfinite().all() for x in self.learner.average.parameters()])
        if not (math.isfinite(loss) and bool(finite.all())):
            msg = (
                f"the loss became {loss} before {seen} images, or a weight did; "
                f"{self._what_stays()}. Lower training.learning_rate"
            )
            raise FloatingPointError(msg)

    def _what_stays(self) -> str:
        there = (self.folder / STATE).exists()
        return f"the last state saved stays, {STATE}" if there else "no state was saved before"

    def _draw(self, done: int, board: Board | None, before_batch: Callable[[], object]) -> None:
        """Write a grid of samples, if it is not there."""
        seen = done * self.settings.batch
        name = f"samples/{seen:010d}.png"
        if board is not None and not (self.folder / name).exists():
            seeds = range(self.settings.sample_grid)
            sheet = self.sampler.sample(seeds, before_batch=before_batch).images
            with self._writing(name):
                (self.folder / "samples").mkdir(exist_ok=True)
                file = self.folder.write(
                    name, lambda file: save_grid(file, sheet, self.space.levels)
                )
            board.add_picture("samples", file, seen)
        self.engine.wait_for_everyone()


def _peak() -> int:
    """Peak memory of this process in bytes; 0 if the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
