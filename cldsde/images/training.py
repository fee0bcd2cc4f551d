"""Training of a score model on images: one loop, on any number of processes, resumable to the bit.

All randomness is a function of the seed and of the number of images seen (`cldsde.images.streams`),
so that a run does not depend on how many processes share it, nor on where it was interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet, augment
from cldsde.images.figures import save_grid
from cldsde.images.files import load_tensors, save_tensors
from cldsde.images.model import (
    MODEL,
    ImageSpace,
    make_model_of,
    make_network,
    read_model,
    save_model,
)
from cldsde.images.runs import RunFolder
from cldsde.images.sampling import check_sampling, draw_images
from cldsde.images.streams import image_order, stream, stream_seed
from cldsde.score import MixedScore, PerturbedData, TimeSampler
from cldsde.solvers.progress import progress_bar

__all__ = ["STATE", "check_run", "train"]

STATE = "training.safetensors"
"""File of a run that holds the state of its training until it is done."""

_KIND = "a training state of cldsde, version 1"


def check_run(config: RunConfig, data: DataSet) -> None:
    """Refuse what cannot be trained or sampled, before anything is made.

    Raises
    ------
    ValueError
        If network, process, solver and images do not fit; the message names the key.
    """
    space = ImageSpace.of(data.train, conditional=config.network.conditional)
    make_network(config, space, device="meta")
    try:
        check_sampling(lambda z, t: z, config.sampling, config.process.make())
    except ValueError as error:
        msg = f"sampling: {error}"
        raise ValueError(msg) from error


def train(
    config: RunConfig,
    data: DataSet,
    run: RunFolder,
    *,
    device: str = "auto",
    progress: bool = False,
) -> MixedScore:
    """Train a model; return it with averaged weights, in evaluation mode.

    Writes to the run folder lines of ``metrics.jsonl`` and TensorBoard's events, grids of samples,
    ``model.safetensors`` with the averaged weights, and until it is done the whole training state.
    A run that was interrupted goes on from the last state and ends with the same bits, on the same
    machine, as one that was not; a run that is done is loaded. Under ``torchrun`` or ``accelerate
    launch`` the processes share each batch.

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
    progress
        Show a progress bar with loss and time left on stderr.

    Returns
    -------
    MixedScore
        The exponential moving average of the model.

    Raises
    ------
    ValueError
        If configuration, data and device do not fit, or a file of the run is damaged.
    FloatingPointError
        If the loss or a weight is not finite; the last state saved stays.
    OSError
        If a file cannot be written; the last state saved stays.
    """
    trainer = _Trainer(config, data, run, device)
    try:
        with torch.random.fork_rng():  # dropout draws from the global generator
            return trainer.run(progress=progress)
    finally:
        trainer.close()


class _Part(NamedTuple):
    """A micro-batch of one process: images in [−1, 1], classes, times, and weights of the times."""

    number: int
    images: Tensor
    labels: Tensor | None
    t: Tensor
    weight: Tensor


class _Trainer:
    """One process of a training."""

    def __init__(self, config: RunConfig, data: DataSet, run: RunFolder, device: str) -> None:
        self.config, self.data, self.folder = config, data, run
        self.settings = settings = config.training
        self.space = ImageSpace.of(data.train, conditional=config.network.conditional)
        self.engine = _engine(settings.precision, compiled=settings.compile, device=device)
        self.parts = _parts(config, self.engine)

        self.model = make_model_of(config, data.train).to(self.engine.device)
        self.network = self.model.network
        self.average = AveragedModel(self.network)
        fused = self.engine.device.type in {"cpu", "cuda"}
        optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        # Wrapped are the network and the optimiser alone: times, kernels, noise and loss keep
        # their precision.
        self.wrapped, self.optimiser = self.engine.prepare(self.network, optimiser)
        self.sampler = _time_sampler(self.model, config)
        self.state = _State(self.network, self.average, optimiser, self.engine)
        self.board: Any = None

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        self.engine.free_memory()
        # Another training of this process may take another precision.
        AcceleratorState._reset_state(reset_partial_state=False)

    def run(self, *, progress: bool) -> MixedScore:
        total = self.settings.steps
        if self._finished():
            return read_model(self.folder / MODEL, self.config, self.engine.device).score
        start, seconds = self.state.load(self.folder) if self._interrupted() else (0, 0.0)
        self._open_logs(start)
        began = time.monotonic() - seconds
        meter = _Meter(self.engine)
        bar = progress_bar(
            None,
            shown=progress and self.engine.is_main_process,
            initial=start * self.settings.batch,
            total=total * self.settings.batch,
            unit="image",
            unit_scale=True,
            desc="training",
        )
        with bar, ThreadPoolExecutor(1) as loader:
            for step, parts in enumerate(self._batches(loader, start), start):
                loss, norm = self._step(step, parts)
                meter.add(loss, norm)
                done = step + 1
                bar.update(self.settings.batch)
                if self._due(self.settings.log_every, done):
                    self._log(done, meter, time.monotonic() - began, bar)
                if self._due(self.settings.save_every, done):
                    self._save(done, meter, time.monotonic() - began)
                if self._due(self.settings.sample_every, done):
                    self._draw(done)
        self.engine.wait_for_everyone()
        if self.engine.is_main_process:
            (self.folder / STATE).unlink(missing_ok=True)
        self.engine.wait_for_everyone()
        return self._averaged()

    def _finished(self) -> bool:
        if not (self.folder / MODEL).exists() or self._interrupted():
            return False
        try:
            seen = read_model(self.folder / MODEL, self.config).images_seen
        except ValueError as error:
            raise ValueError(self.folder.damaged(MODEL, error)) from error
        return seen >= self.settings.steps * self.settings.batch

    def _interrupted(self) -> bool:
        return (self.folder / STATE).exists()

    def _due(self, every: int, done: int) -> bool:
        """Whether a multiple of so many images was passed in the last step, or all are done."""
        batch = self.settings.batch
        passed = done * batch // every > (done - 1) * batch // every
        return passed or done == self.settings.steps

    def _batches(self, loader: ThreadPoolExecutor, start: int) -> Iterator[list[_Part]]:
        """Batches of this process, the next of which is read while one is trained on."""
        steps = range(start, self.settings.steps)
        coming = loader.submit(self._load, start) if steps else None
        for step in steps:
            assert coming is not None
            ready = coming.result()
            coming = loader.submit(self._load, step + 1) if step + 1 in steps else None
            yield ready

    def _load(self, step: int) -> list[_Part]:
        settings, seed = self.settings, self.config.seed
        size = settings.batch // self.parts
        images = self.data.train
        t, weight = self.sampler.sample(settings.batch, generator=stream(seed, "times", step))
        order = image_order(seed, len(images), step * settings.batch, settings.batch)
        loaded = []
        for part in range(self.engine.process_index, self.parts, self.engine.num_processes):
            mine = slice(part * size, (part + 1) * size)
            draw = stream(seed, "presentation", step, part)
            x = augment(
                images.load(order[mine]),
                images.levels,
                flip=self.config.data.flip,
                dequantise=self.config.data.dequantise,
                generator=draw,
            )
            labels = None
            if self.space.classes is not None:
                assert images.labels is not None
                hidden = torch.rand(size, generator=draw) < self.config.network.label_dropout
                labels = images.labels[order[mine]].masked_fill(hidden, self.space.classes)
            loaded.append(_Part(part, x, labels, t[mine], weight[mine]))
        return loaded

    def _step(self, step: int, parts: list[_Part]) -> tuple[Tensor, Tensor]:
        """Update the weights; return this process's mean loss and the gradient's norm."""
        self.network.train()
        self.model.network = self.wrapped
        rate = _learning_rate(self.config, step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        total = torch.zeros((), device=self.engine.device)
        for part in parts:
            last = part is parts[-1]
            torch.manual_seed(stream_seed(self.config.seed, "dropout", step, part.number))
            with nullcontext() if last else self.engine.no_sync(self.wrapped):
                noise = stream(
                    self.config.seed, "noise", step, part.number, device=self.engine.device
                )
                losses = self._losses(self.model, part, noise)
                loss = (part.weight.to(losses) * losses).mean() / len(parts)
                self.engine.backward(loss)
            total += loss.detach()
        self.model.network = self.network
        bound = math.inf if self.settings.clip is None else self.settings.clip
        norm = self.engine.clip_grad_norm_(self.network.parameters(), bound)
        self.optimiser.step()
        decay = min(self.settings.ema_decay, (step + 1) / (step + 10))
        self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.average.update_parameters(self.network)
        return total, cast(Tensor, norm)

    def _losses(self, model: MixedScore, part: _Part, generator: torch.Generator) -> Tensor:
        """Loss of each image, ``(B,)``."""
        device = self.engine.device
        pair = PerturbedData.draw(
            model.sde,
            part.images.to(device, non_blocking=True),
            part.t,
            conditioning=self.settings.conditioning,
            generator=generator,
        )
        labels = None if part.labels is None else part.labels.to(device, non_blocking=True)
        output = model(pair.z, pair.t, prediction="noise", condition=labels)
        return pair.loss(output, "noise", weighting=self.settings.weighting)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Loss of the averaged model on images not trained on, at times and noise that stay."""
        images = self.data.held_out
        count = min(len(images), self.settings.held_out)
        size = self.settings.batch // self.parts
        # Neighbours in the data set get times that are far apart.
        order = torch.randperm(count, generator=stream(0, "held-out times"))
        t, weight = self.sampler.quantiles((order + 0.5) / count)
        noise = stream(0, "held-out noise", device=self.engine.device)
        model = self._averaged()
        sums = []
        for rows in torch.arange(count).split(size):  # type: ignore[no-untyped-call]
            x = augment(images.load(rows), images.levels, flip=False, dequantise=False)
            labels = None
            if self.space.classes is not None and images.labels is not None:
                labels = images.labels[rows]
            part = _Part(0, x, labels, t[rows], weight[rows])
            losses = self._losses(model, part, noise)
            sums.append((weight[rows].to(losses) * losses).double().sum())
        return float(torch.stack(sums).sum()) / count

    def _averaged(self) -> MixedScore:
        """The model with averaged weights, which it shares with the average."""
        model = MixedScore(
            self.average.module, self.model.sde, self.model.data_mean, self.model.data_variance
        )
        return model.eval().requires_grad_(requires_grad=False)

    def _open_logs(self, start: int) -> None:
        if not self.engine.is_main_process:
            return
        from torch.utils.tensorboard import SummaryWriter

        seen = start * self.settings.batch
        self.folder.forget_metrics_after(seen)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=seen + 1)

    def _log(self, done: int, meter: _Meter, seconds: float, bar: Any) -> None:
        loss, norm = meter.read()
        seen = done * self.settings.batch
        self._check_finite(loss, seen)
        if not self.engine.is_main_process:
            return
        record = {
            "images": seen,
            "loss": loss,
            "held_out_loss": self._held_out_loss(),
            "gradient_norm": norm,
            "learning_rate": _learning_rate(self.config, done - 1),
            "seconds": round(seconds, 3),
        }
        self.folder.log(record)
        for name, value in record.items():
            if name != "images":
                self.board.add_scalar(f"training/{name}", value, seen)
        self.board.flush()
        bar.set_postfix(loss=f"{loss:.4f}", held_out=f"{record['held_out_loss']:.4f}")

    def _save(self, done: int, meter: _Meter, seconds: float) -> None:
        seen = done * self.settings.batch
        self._check_finite(meter.peek(), seen)
        if self.engine.is_main_process:
            try:
                if done < self.settings.steps:
                    self.state.save(self.folder, done, seconds)
                save_model(
                    self.folder, self._averaged().state_dict(), self.config, self.space, seen
                )
            except OSError as error:
                msg = f"the state of {seen} images could not be saved; the last one stays: {error}"
                raise OSError(msg) from error
        self.engine.wait_for_everyone()

    def _check_finite(self, loss: float, seen: int) -> None:
        """Raise before weights that are no numbers reach a file."""
        weights = [x.detach() for x in self.average.parameters()]
        finite = math.isfinite(loss) and bool(
            torch.stack([x.isfinite().all() for x in weights]).all()
        )
        if not finite:
            msg = (
                f"the loss became {loss} before {seen} images, or a weight did; the last state "
                "saved stays. Lower training.learning_rate"
            )
            raise FloatingPointError(msg)

    def _draw(self, done: int) -> None:
        if self.engine.is_main_process:
            seen = done * self.settings.batch
            seeds = range(self.settings.sample_grid)
            images = draw_images(self._averaged(), self.space, seeds, self.config.sampling)
            (self.folder / "samples").mkdir(exist_ok=True)
            name = f"samples/{seen:010d}.png"
            self.folder.write(name, lambda file: save_grid(file, images, self.space.levels))
        self.engine.wait_for_everyone()


def _engine(precision: str, *, compiled: bool, device: str) -> Accelerator:
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        msg = "training.precision: 'fp16' needs a GPU; take 'fp32' or 'bf16'"
        raise ValueError(msg)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_backend=DynamoBackend.INDUCTOR if compiled else DynamoBackend.NO,
    )


def _parts(config: RunConfig, engine: Accelerator) -> int:
    """Micro-batches of a batch, which the processes share evenly."""
    settings = config.training
    parts = settings.batch // (settings.micro_batch or settings.batch)
    if parts % engine.num_processes:
        msg = (
            f"training.micro_batch must split the batch of {settings.batch} into a multiple of "
            f"{engine.num_processes} parts, one or more for each process; got "
            f"{settings.micro_batch}, which makes {parts}"
        )
        raise ValueError(msg)
    return parts


def _time_sampler(model: MixedScore, config: RunConfig) -> TimeSampler:
    settings = config.training
    if settings.times == "uniform":
        return TimeSampler(torch.ones_like, settings.t_min)
    if settings.conditioning == "data" and settings.weighting == "reweighted":
        return TimeSampler(model.residual_variance, settings.t_min)
    return TimeSampler.importance(
        model.sde,
        settings.t_min,
        data_variance=float(model.data_variance.mean()),
        conditioning=settings.conditioning,
        weighting=settings.weighting,
    )


def _learning_rate(config: RunConfig, step: int) -> float:
    settings = config.training
    seen = (step + 1) * settings.batch
    rate = settings.learning_rate * min(1.0, seen / max(1, settings.warmup))
    if settings.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rate


class _Meter:
    """Means of the loss and of the gradient's norm, read seldom: reading waits for the device."""

    def __init__(self, engine: Accelerator) -> None:
        self._engine = engine
        self._sum = torch.zeros(2, device=engine.device)
        self._count = 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._sum += torch.stack([loss, norm.detach().to(loss)])
        self._count += 1

    def peek(self) -> float:
        """Mean loss since the last reading; 0 where there was no step."""
        return self._means()[0]

    def read(self) -> tuple[float, float]:
        """Mean loss and norm over all processes since the last reading."""
        means = self._means()
        self._sum.zero_()
        self._count = 0
        return means

    def _means(self) -> tuple[float, float]:
        if not self._count:
            return 0.0, 0.0
        means = self._engine.reduce(self._sum / self._count, "mean")
        loss, norm = cast(Tensor, means).tolist()
        return loss, norm


@dataclass(frozen=True)
class _State:
    """Everything that training depends on, to and from one file without code in it."""

    network: nn.Module
    average: AveragedModel
    optimiser: torch.optim.Optimizer
    engine: Accelerator

    def save(self, run: RunFolder, step: int, seconds: float) -> None:
        tensors = {f"network.{name}": x for name, x in self.network.state_dict().items()}
        tensors |= {f"average.{name}": x for name, x in self.average.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": x for name, x in values.items()}
        scaler = None if self.engine.scaler is None else self.engine.scaler.state_dict()
        metadata = {"step": str(step), "seconds": str(seconds), "scaler": json.dumps(scaler)}
        save_tensors(run / STATE, _KIND, tensors, metadata)

    def load(self, run: RunFolder) -> tuple[int, float]:
        try:
            tensors, metadata = load_tensors(run / STATE, _KIND)
        except ValueError as error:
            raise ValueError(run.damaged(STATE, error)) from error

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if name.startswith(prefix)
            }

        try:
            self.network.load_state_dict(part("network."))
            self.average.load_state_dict(part("average."))
            optimiser = self.optimiser.state_dict()
            for key, x in part("optimiser.").items():
                index, name = key.split(".")
                optimiser["state"].setdefault(int(index), {})[name] = x
            self.optimiser.load_state_dict(optimiser)
            scaler = json.loads(metadata["scaler"])
            if self.engine.scaler is not None and scaler is not None:
                self.engine.scaler.load_state_dict(scaler)
            return int(metadata["step"]), float(metadata["seconds"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(run.damaged(STATE, error)) from error
