"""Training of a score model on images: a loop on any number of processes, resumable to the bit."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cldsde.files import writing
from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.data.pixels import measured, save_grid
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.model import (
    KIND,
    MODEL,
    DiffusionModel,
    Statistics,
    TrainedModel,
    copy_weights,
    make_model,
    model_notes,
    read_model,
)
from cldsde.images.power_averages import WIDTHS
from cldsde.images.runs import CONFIG, METRICS, SNAPSHOTS, STATE, RunFolder
from cldsde.images.sample.sampler import ImageSampler, ahead
from cldsde.images.schema import leaves
from cldsde.images.tensor_files import save_tensors
from cldsde.images.train.engine import check_run, load, on_cpu, own, stop_signals
from cldsde.images.train.learner import Learner, learning, learning_rates
from cldsde.progress import progress_bar

_FIRST_SEED = 2**31  # of measured samples, far from the seeds of samples and evaluations
_TRACKERS = "cldsde"  # project of the trackers, and folder of their files in a run


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

    A finished run is loaded, or trained further if ``training.images`` has grown.
    """
    if statistics is None:
        statistics = check_run(config, data, device=device)
    with learning(config, data, device, statistics) as learner:
        return _Trainer(learner, run).run(progress=progress)


class _Trainer:
    """One process of a training. ``done`` are the steps made, ``saved`` those in its state."""

    def __init__(self, learner: Learner, run: RunFolder) -> None:
        self.learner, self.folder = learner, run
        self.config, self.engine = learner.config, learner.engine
        self.settings, self.space = learner.config.training, learner.space
        # Whether this process samples and measures; networks with shared weights are called by all.
        self.busy = learner.sharded or learner.engine.is_main_process
        self.done, seconds = self._start()
        self.saved = self.done
        self.began = time.monotonic() - seconds
        if self.engine.is_main_process:
            self._keep_config()

    @property
    def seen(self) -> int:
        return self.done * self.settings.batch

    def run(self, *, progress: bool) -> DiffusionModel:
        settings, is_main = self.settings, self.engine.is_main_process
        total = settings.steps * settings.batch
        if self.seen == total:
            # A process that was killed at the last checkpoint leaves the model of the one before.
            if not (self.folder / MODEL).exists() or self._stored().images_seen != total:
                self._save()
            return self._stored(self.engine.device).model
        if self.done == 0 and settings.init_from is not None:
            first = make_model(self.config, self.space, self.learner.statistics)
            copy_weights(first, Path(settings.init_from).expanduser())
            for model in self.learner.modules.values():
                load(model, first.state_dict())
        if is_main:
            with self._writing(METRICS):
                self.folder.forget_metrics_after(self.seen)
        counts = {"initial": self.seen, "total": total, "unit": "image", "unit_scale": True}
        bar = progress_bar(None, shown=progress and is_main, desc="training", **counts)
        with bar, self._logging(), stop_signals(self.engine) as self.stop:
            if self.done and self._due(settings.sample_every):
                self._draw()
            for parts in ahead(self.learner.load, range(self.done, settings.steps)):
                self.learner.step(self.done, parts)
                self.done += 1
                bar.update(settings.batch)
                if self._due(settings.log_every):
                    bar.set_postfix(self._log())
                if self._due(settings.save_every):
                    self._save()
                self._obey()
                if self._due(settings.save_every):
                    self._measure()
                if self._due(settings.sample_every):
                    self._draw()
        self.engine.wait_for_everyone()
        if is_main and not settings.keep_state:
            (self.folder / STATE).unlink(missing_ok=True)
        self.engine.wait_for_everyone()
        return self.learner.average

    def _keep_config(self) -> None:
        """Write settings that changed. The weights that the training started from stay the same."""
        file, config = self.folder / CONFIG, self.config.to_dict()
        found = json.loads(file.read_text(encoding="utf-8"))
        if self.done:
            config["training"]["init_from"] = found["training"].get("init_from")
            longer = found["training"]["images"] < config["training"]["images"]
            if longer and self.settings.decay == "cosine":
                msg = "note: the learning rate jumps, as its cosine now ends at training.images = "
                tqdm.write(f"{msg}{self.settings.images:,}", file=sys.stderr)
        if found != config:
            self.folder.write_json(CONFIG, config)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        report = threading.excepthook
        # TensorBoard raises the errors of its thread in the main thread, too.
        threading.excepthook = lambda error: (
            type(error.thread).__name__ == "_AsyncWriterThread" or report(error)
        )
        config = {key: str(x) for key, x in leaves(self.config.to_dict()).items()}
        # Events of an earlier process from here on are hidden.
        options = {"tensorboard": {"purge_step": self.seen + 1}}
        with self._writing(_TRACKERS):
            self.engine.project_configuration.logging_dir = str(self.folder.path)
            self.engine.init_trackers(_TRACKERS, config, options)
        try:
            yield
        finally:
            with suppress(OSError):
                for tracker in self.engine.trackers:
                    tracker.finish()
            threading.excepthook = report

    def _obey(self) -> None:
        # Several processes agree every eighth step, because that takes time.
        if self.engine.num_processes > 1 and self.done % 8:
            return
        if number := self.stop():
            if self.done != self.saved:
                self._save()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)

    def _start(self) -> tuple[int, float]:
        """Steps done, and seconds spent on them, on which all processes agree."""
        found = 0, 0.0
        if (self.folder / STATE).exists():
            found = self.learner.load_state(self.folder)
        elif (self.folder / MODEL).exists():
            found, seen = (self.settings.steps, 0.0), self._stored().images_seen
            if seen != found[0] * self.settings.batch:
                msg = f"{self.folder / MODEL} has seen {seen:,} images, and the state to resume "
                msg += f"from, {STATE}, is missing; put it back, or begin again in another folder, "
                raise ValueError(f"{msg}with training.init_from")
        [first] = broadcast_object_list([found])
        if first[0] != found[0]:
            msg = f"{self.folder.path} must be one folder for all processes: they see other states"
            raise ValueError(msg)
        return found

    def _stored(self, device: torch.device | str = "cpu") -> TrainedModel:
        try:
            return read_model(self.folder / MODEL, self.config, device)
        except ValueError as error:
            msg = f"{self.folder / MODEL} is damaged ({error}); put a copy of it back, or delete "
            raise ValueError(f"{msg}it, to repeat the training that {STATE} lacks") from error

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of so many images, or ended a stage."""
        passed = self.seen // every > (self.seen - self.settings.batch) // every
        return passed or self.done in {self.config.pretraining_steps, self.settings.steps}

    @cached_property
    def sampler(self) -> ImageSampler:
        """Sampler of the averaged model; its tables are computed once."""
        model, batch = self.learner.average, self.learner.part_size
        recipe = self.config.sampling
        return ImageSampler(model.score, self.space, recipe, vae=model.vae, batch=batch)

    def _sample(self, seeds: range) -> Tensor:
        """Images of the averaged model. A single process obeys a signal between two batches."""
        obey = self._obey if self.engine.num_processes == 1 else lambda: None
        return self.sampler.sample(seeds, before_batch=obey).images

    def _log(self) -> dict[str, str]:
        """Write means since the last line of metrics; return those that a bar shows."""
        means = self.learner.means()
        self.learner.sums.zero_()
        self._check_finite(means["loss"])
        held_out = self.learner.held_out(self.done - 1) if self.busy else None
        if not self.engine.is_main_process:
            return {}
        loss, norm = means.pop("loss"), means.pop("gradient_norm")
        if len(self.learner.parts) == 1:
            means = {}
        elif self.done <= self.config.pretraining_steps:  # the score is not trained in this stage
            means = {key: x for key, x in means.items() if not key.startswith("score_")}
        held = {} if held_out is None else {"held_out_loss": held_out}
        rate = {"learning_rate": learning_rates(self.config, self.done - 1)[0]}
        self._record({"loss": loss, **held, "gradient_norm": norm, **means, **rate})
        return {name: f"{x:.4f}" for name, x in {"loss": loss, **held}.items()}

    def _record(self, numbers: dict[str, float]) -> None:
        numbers = {**numbers, "seconds": round(time.monotonic() - self.began, 3)}
        with self._writing(METRICS):
            self.folder.log({"images": self.seen, **numbers})
        with self._writing(_TRACKERS):
            self.engine.log({f"training/{name}": x for name, x in numbers.items()}, self.seen)

    def _save_model(self, file: Path, average: DiffusionModel | None = None) -> None:
        weights = (average or self.learner.average).state_dict()
        weights = on_cpu(weights, kept=self.engine.is_main_process)
        if self.engine.is_main_process:
            file.parent.mkdir(exist_ok=True)
            save_tensors(file, KIND, weights, model_notes(self.config, self.space, self.seen))

    def _save(self) -> None:
        """Save state and model, in this order: a run resumes from its state alone."""
        self._check_finite(self.learner.means()["loss"])
        names = [MODEL, *(f"ema-{x}.safetensors" for x in self.settings.ema_decays)]
        power = [f"{SNAPSHOTS}/power-{x}-{self.seen:012d}.safetensors" for x in WIDTHS]
        power = power if self._due(self.settings.save_every) else []
        try:
            for name, average in zip(power, self.learner.averages[len(names) :], strict=False):
                self._save_model(self.folder / name, average)
            if self.done < self.settings.steps or self.settings.keep_state:
                self.learner.save_state(self.folder, self.done, time.monotonic() - self.began)
            for name, average in reversed([*zip(names, self.learner.averages, strict=False)]):
                self._save_model(self.folder / name, average)
        except OSError as error:
            msg = f"not all of the state of {self.seen} images could be saved ({error}); "
            raise OSError(f"{msg}{self._last_state()}") from error
        self.saved = self.done
        self.engine.wait_for_everyone()

    def _measure(self) -> None:
        """Measure the averaged model, and keep it if it is among the best."""
        settings, samples = self.settings, self.settings.measure_samples
        metrics = {"last": -float(self.seen)}
        is_main = self.engine.is_main_process
        if self.busy and settings.measure == "fd":
            drawn = self._sample(range(_FIRST_SEED, _FIRST_SEED + samples))
            if is_main:
                found = self.evaluation.measure(measured(drawn, self.space.levels), ["fd"])["fd"]
                metrics[f"fd of {samples}"] = found["frechet_distance"]
                self._record({"fd": found["frechet_distance"]})
        if settings.snapshots:
            if self.busy and settings.snapshots_by == "held_out_loss":
                metrics["held_out_loss"] = cast(float, self.learner.held_out(self.done - 1))
            by = f"fd of {samples}" if settings.snapshots_by == "fd" else settings.snapshots_by
            name = f"{self.seen:012d}.safetensors"
            with self._writing(SNAPSHOTS):
                self._save_model(self.folder / SNAPSHOTS / name)
                if is_main:
                    self.folder.keep_snapshot(name, metrics, by, settings.snapshots)
        self.engine.wait_for_everyone()

    @cached_property
    def evaluation(self) -> Evaluation:
        """Measurement of samples; features of the training images are computed once."""
        samples, device = self.settings.measure_samples, str(self.engine.device)
        data, folder = self.learner.data, self.folder.path
        return Evaluation(data=data, samples=samples, folder=folder, device=device)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        """Name the file of the run that cannot be written."""
        return writing(self.folder / name, self._last_state())

    def _check_finite(self, loss: float) -> None:
        """Raise, in all processes, before weights that are not finite reach a file."""
        weights = map(own, self.learner.average.parameters())
        finite = torch.stack([x.isfinite().all() for x in weights]).all()
        finite = self.engine.gather(finite[None])
        if not (math.isfinite(loss) and bool(finite.all())):
            what = "a weight is not finite" if math.isfinite(loss) else f"the loss became {loss}"
            msg = f"{what} before {self.seen} images; "
            raise FloatingPointError(f"{msg}{self._last_state()}. Lower training.learning_rate")

    def _last_state(self) -> str:
        there = (self.folder / STATE).exists()
        return f"the last state saved stays, {STATE}" if there else "no state was saved before"

    def _draw(self) -> None:
        """Write a grid of samples, if it is not there."""
        name, levels = f"samples/{self.seen:010d}.png", self.space.levels
        sheet = None
        if self.busy and not (self.folder / name).exists():
            sheet = self._sample(range(self.settings.sample_grid))
        if self.engine.is_main_process and sheet is not None:
            with self._writing(name):
                (self.folder / "samples").mkdir(exist_ok=True)
                file = self.folder.write(name, lambda file: save_grid(file, sheet, levels))
            with self._writing(_TRACKERS), Image.open(file) as opened:
                pixels = {"samples": np.asarray(opened.convert("RGB"))[None]}
                for tracker in self.engine.trackers:
                    kind = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    if hasattr(tracker, "log_images"):
                        tracker.log_images(pixels, self.seen, **kind)
        self.engine.wait_for_everyone()
