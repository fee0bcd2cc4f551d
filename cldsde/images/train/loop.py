"""Training of a score model on images: one loop, on any number of processes, resumable to the bit.

All randomness is a function of the seed and of the number of images seen (`cldsde.images.streams`),
so that a run depends neither on how many processes share it nor on where it was interrupted.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet, augment
from cldsde.images.figures import save_grid
from cldsde.images.files import brief
from cldsde.images.model import (
    MODEL,
    DiffusionModel,
    ImageSpace,
    Statistics,
    check_model,
    data_statistics,
    make_model,
    read_model,
    save_model,
)
from cldsde.images.runs import METRICS, RunFolder
from cldsde.images.sample.sampler import check_sampling, draw_of_classes
from cldsde.images.streams import image_order, stream, stream_seed
from cldsde.images.train.board import Board
from cldsde.images.train.objectives import Batch, Times, make_objective
from cldsde.images.train.state import STATE, Meter, StopRequest, TrainingState
from cldsde.progress import progress_bar

__all__ = ["STATE", "TRAINING", "check_run", "train"]

TRAINING = "repeat the whole training"
"""What it takes to have the model of a finished run again."""

_BLOCK = 8  # images that share generators, at most: what processes share is a number of blocks
_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
_PATIENCE = timedelta(hours=12)  # of processes that wait for the one that writes


def check_run(
    config: RunConfig, data: DataSet, *, device: str = "auto", processes: int = 1
) -> Statistics:
    """Refuse what cannot be trained or sampled, before anything is made.

    Parameters
    ----------
    config, data, device
        As `train` takes them.
    processes
        How many processes will share the work.

    Returns
    -------
    Statistics
        Mean and variance of the data, for `train`.

    Raises
    ------
    ValueError
        If network, process, solver, images, device and processes do not fit; the message names the
        key.
    """
    space = ImageSpace.of(data.train, config)
    check_model(config, space)
    try:
        check_sampling(lambda z, t: z, config.sampling, config.process.make())
    except (ArithmeticError, RuntimeError) as error:
        msg = f"process.options, or sampling: no grid can be computed for them ({error})"
        raise ValueError(msg) from error
    _shares(config, processes)
    if device.startswith("cuda:") and processes > 1:
        msg = f"device: {device} cannot be that of {processes} processes; take 'auto'"
        raise ValueError(msg)
    if config.training.precision == "fp16" and (
        device in {"cpu", "mps"} or not torch.cuda.is_available()
    ):
        msg = "training.precision: 'fp16' needs a GPU; take 'fp32' or 'bf16'"
        raise ValueError(msg)
    return data_statistics(config, data.train)


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
    ``model.safetensors`` with the averaged weights, and until it is done the whole training state.
    SIGINT and SIGTERM end a training that one process does after its step, with its state saved; a
    second one ends it at once. A run that was interrupted goes on from the last state, and on the
    host ends with the same bits, on the same machine, as one that was not; on a GPU up to kernels
    that are not deterministic themselves. A run that is done is loaded. Under ``torchrun`` or
    ``accelerate launch`` the processes share each batch.

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
        engine = _engine(config, device)
        trainer = _Trainer(config, data, statistics, run, engine)
        gpus = [engine.device] if engine.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # dropout draws from the global generators
            return trainer.run(progress=progress)
    finally:
        # Another training of this process may take another precision.
        AcceleratorState._reset_state(reset_partial_state=False)


class _Part(NamedTuple):
    """What goes through the network at once, and its place in the batch."""

    first: int
    batch: Batch


class _Core(NamedTuple):
    """A network as part of the model: the module that it belongs to, and its name there.

    Networks alone are wrapped for several processes, half precision and compilation: times,
    kernels, noise and loss keep their precision.
    """

    owner: nn.Module
    name: str
    network: nn.Module
    wrapped: nn.Module

    def use(self, network: nn.Module) -> None:
        setattr(self.owner, self.name, network)


class _Trainer:
    """One process of a training."""

    def __init__(
        self,
        config: RunConfig,
        data: DataSet,
        statistics: Statistics,
        run: RunFolder,
        engine: Accelerator,
    ) -> None:
        self.config, self.data, self.folder, self.engine = config, data, run, engine
        self.settings = settings = config.training
        self.space = ImageSpace.of(data.train, config)
        self.share, self.part_size, self.block = _shares(config, engine.num_processes)

        self.model = make_model(config, self.space, statistics).to(engine.device)
        self.average: DiffusionModel = (
            copy.deepcopy(self.model).eval().requires_grad_(requires_grad=False)
        )
        self.objective = make_objective(self.model, config)
        self.parts = _parts(self.model)
        optimiser = torch.optim.AdamW(
            [{"params": list(part.parameters())} for part in self.parts.values()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=engine.device.type in {"cpu", "cuda"},
        )
        self.optimiser = engine.prepare_optimizer(optimiser)
        self.cores = [
            _Core(owner, name, network, engine.prepare_model(network))
            for owner, name, network in _networks(self.model)
        ]
        within = {id(p) for core in self.cores for p in core.network.parameters()}
        self.unshared = [p for p in self.model.parameters() if id(p) not in within]
        self.meter = Meter(engine, list(self.parts))
        self.state = TrainingState(
            config,
            statistics,
            {"model": self.model, "average": self.average},
            optimiser,
            self.meter,
            engine,
        )

    def run(self, *, progress: bool) -> DiffusionModel:
        total, batch = self.settings.steps, self.settings.batch
        start, seconds = self._start()
        if start == total:
            return read_model(self.folder / MODEL, self.config, self.engine.device).model
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
            for step, parts in enumerate(self._batches(loader, start), start):
                self._step(step, parts)
                done = step + 1
                bar.update(batch)
                if self._due(self.settings.log_every, done):
                    self._log(done, time.monotonic() - began, bar, board)
                if self._due(self.settings.sample_every, done):
                    self._draw(done)
                if self._due(self.settings.save_every, done) or stop.wanted:
                    self._save(done, time.monotonic() - began)
                if stop.wanted and done < total:
                    stop.obey()
        self.engine.wait_for_everyone()
        if self.engine.is_main_process:
            (self.folder / STATE).unlink(missing_ok=True)
        self.engine.wait_for_everyone()
        return self.average

    def _start(self) -> tuple[int, float]:
        """Steps done, and seconds spent on them, on which all processes agree."""
        if (self.folder / STATE).exists():
            found = self.state.load(self.folder)
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
        file = self.folder / MODEL
        try:
            seen = read_model(file, self.config).images_seen
        except ValueError as error:
            raise ValueError(self.folder.damaged(MODEL, error, cost=TRAINING)) from error
        steps = self.settings.steps
        if seen != steps * self.settings.batch:
            msg = (
                f"{file} is of {seen} images, and the state to go on from, {STATE}, is missing; "
                "put it back, or begin again in another folder"
            )
            raise ValueError(msg)
        return steps

    def _due(self, every: int, done: int) -> bool:
        """Whether a multiple of so many images was passed in the last step, or a stage is done."""
        batch = self.settings.batch
        passed = done * batch // every > (done - 1) * batch // every
        return passed or done in {self.config.pretraining_steps, self.settings.steps}

    def _batches(self, loader: ThreadPoolExecutor, start: int) -> Iterator[list[_Part]]:
        """Batches of this process, the next of which is read while one is trained on."""
        coming = loader.submit(self._load, start)
        for step in range(start, self.settings.steps):
            ready = coming.result()
            if step + 1 < self.settings.steps:
                coming = loader.submit(self._load, step + 1)
            yield ready

    def _load(self, step: int) -> list[_Part]:
        batch, seed = self.settings.batch, self.config.seed
        times = tuple(
            Times(*sampler.sample(batch, generator=stream(seed, "times", step, *which)))
            for sampler, which in zip(self.objective.samplers, ((), (1,)), strict=False)
        )
        order = image_order(seed, len(self.data.train), step * batch, batch)
        begin = self.engine.process_index * self.share
        loaded = []
        for first in range(begin, begin + self.share, self.part_size):
            mine = slice(first, first + self.part_size)
            x, labels = self._present(step, first, order[mine])
            loaded.append(_Part(first, Batch(x, labels, tuple(some.take(mine) for some in times))))
        return loaded

    def _present(self, step: int, first: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images as they are shown, and their classes, some of them hidden."""
        images, classes = self.data.train, self.space.classes
        shown, labels = [], []
        for block, some in enumerate(rows.split(self.block)):  # type: ignore[no-untyped-call]
            draw = stream(self.config.seed, "presentation", step, first // self.block + block)
            shown.append(
                augment(
                    images.load(some),
                    images.levels,
                    flip=self.config.data.flip,
                    dequantise=self.config.data.dequantise,
                    generator=draw,
                )
            )
            if classes is not None:
                assert images.labels is not None
                hidden = torch.rand(len(some), generator=draw) < self.config.network.label_dropout
                labels.append(images.labels[some].masked_fill(hidden, classes))
        return torch.cat(shown), torch.cat(labels) if labels else None

    def _step(self, step: int, parts: list[_Part]) -> None:
        """Update the weights, and meter this process's mean losses and the gradients' norms."""
        seed, device = self.config.seed, self.engine.device
        self.model.train()
        for core in self.cores:
            core.use(core.wrapped)
        for group, rate in zip(
            self.optimiser.param_groups, _learning_rates(self.config, step), strict=True
        ):
            group["lr"] = rate
        self.optimiser.zero_grad()
        totals = {name: torch.zeros((), device=device) for name in self.parts}
        for part in parts:
            count = len(part.batch.images)
            blocks = range(part.first // self.block, (part.first + count) // self.block)
            noise = [stream(seed, "noise", step, block, device=device) for block in blocks]
            torch.manual_seed(stream_seed(seed, "dropout", step, part.first))
            batch = self._to_device(part.batch)
            with ExitStack() as together:
                if part is not parts[-1]:
                    for core in self.cores:
                        together.enter_context(self.engine.no_sync(core.wrapped))
                losses = self.objective.losses(self.model, batch, noise, step, self._frozen_score)
                for name, some in losses:
                    loss = some.mean() / len(parts)
                    self.engine.backward(loss)
                    totals[name] += loss.detach()
        for core in self.cores:
            core.use(core.network)
        for parameter in self.unshared:
            if parameter.grad is not None:
                parameter.grad = cast(Tensor, self.engine.reduce(parameter.grad, "mean"))
        self.meter.add(totals, self._clip())
        self.optimiser.step()
        done = _step_of_stage(self.config, step) + 1
        decay = min(self.settings.ema_decay, done / (done + 9))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.average.parameters()), list(self.model.parameters()), None)

    def _clip(self) -> dict[str, Tensor]:
        """Limit the gradient of each part; return what its norm was before.

        Together, the encoder's bound would rescale the step of the score, and the other way round.
        """
        bound = math.inf if self.settings.clip is None else self.settings.clip
        self.engine.unscale_gradients()
        return {
            name: nn.utils.clip_grad_norm_(part.parameters(), bound)
            for name, part in self.parts.items()
        }

    @contextmanager
    def _frozen_score(self) -> Iterator[None]:
        """Hold the weights of the score fast, and share no gradients of theirs, for a while."""
        score = self.model.score
        own = [core for core in self.cores if core.owner is score]
        for core in own:
            core.use(core.network)
        score.requires_grad_(requires_grad=False)
        try:
            yield
        finally:
            score.requires_grad_(requires_grad=True)
            for core in own:
                core.use(core.wrapped)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.engine.device
        images, labels, times = batch
        return Batch(
            images.to(device, non_blocking=True),
            None if labels is None else labels.to(device, non_blocking=True),
            times,
        )

    @torch.no_grad()
    def _held_out(self, step: int) -> float:
        """Mean of the objective over images not trained on, at times and noise that stay."""
        images = self.data.held_out
        count = min(len(images), self.settings.held_out)
        # Neighbours in the data set get times that are far apart.
        order = torch.randperm(count, generator=stream(0, "held-out times"))
        times = [Times(*some.quantiles((order + 0.5) / count)) for some in self.objective.samplers]
        noise = stream(0, "held-out noise", device=self.engine.device)
        draw = stream(0, "held-out presentation")
        sums = []
        for rows in torch.arange(count).split(self.part_size):  # type: ignore[no-untyped-call]
            x = augment(
                images.load(rows),
                images.levels,
                flip=False,
                dequantise=self.config.data.dequantise,
                generator=draw,
            )
            conditional = self.space.classes is not None and images.labels is not None
            labels = cast(Tensor, images.labels)[rows] if conditional else None
            batch = self._to_device(Batch(x, labels, tuple(some.take(rows) for some in times)))
            sums.append(self.objective.held_out(self.average, batch, noise, step).double().sum())
        return float(torch.stack(sums).sum()) / count

    def _open_logs(self, start: int) -> Board | None:
        """TensorBoard's events, of the process that writes; lines of steps to come are dropped."""
        if not self.engine.is_main_process:
            return None
        seen = start * self.settings.batch
        with self._writing(METRICS):
            self.folder.forget_metrics_after(seen)
        return Board(self.folder / "tensorboard", seen + 1)

    def _log(self, done: int, seconds: float, bar: Any, board: Board | None) -> None:
        means = self.meter.means()
        self.meter.clear()
        seen = done * self.settings.batch
        self._check_finite(means["loss"], seen)
        if board is None:
            return
        record = {
            "images": seen,
            "loss": means.pop("loss"),
            "held_out_loss": self._held_out(done - 1),
            "gradient_norm": means.pop("gradient_norm"),
            **(self._of_parts(means, done) if len(self.parts) > 1 else {}),
            "learning_rate": _learning_rates(self.config, done - 1)[0],
            "seconds": round(seconds, 3),
        }
        with self._writing(METRICS):
            self.folder.log(record)
        scalars = {f"training/{name}": x for name, x in record.items() if name != "images"}
        board.add(scalars, seen)
        shown = {"loss": record["loss"], "held_out": record["held_out_loss"]}
        bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})

    def _of_parts(self, means: dict[str, float], done: int) -> dict[str, float]:
        """Without those of the score where it was not trained: no line is of two stages."""
        trained = done > self.config.pretraining_steps
        return {key: x for key, x in means.items() if trained or not key.startswith("score_")}

    def _save(self, done: int, seconds: float) -> None:
        seen = done * self.settings.batch
        sums = self.meter.shared()
        self._check_finite(self.meter.means()["loss"], seen)
        if self.engine.is_main_process:
            try:
                if done < self.settings.steps:
                    self.state.save(self.folder, done, seconds, sums)
                save_model(self.folder, self.average.state_dict(), self.config, self.space, seen)
            except OSError as error:
                msg = (
                    f"not all of the state of {seen} images could be saved ({error}); "
                    f"{self._what_stays()}"
                )
                raise OSError(msg) from error
        self.engine.wait_for_everyone()

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
        finite = torch.stack([x.isfinite().all() for x in self.average.parameters()])
        if not (math.isfinite(loss) and bool(finite.all())):
            msg = (
                f"the loss became {loss} before {seen} images, or a weight did; "
                f"{self._what_stays()}. Lower training.learning_rate"
            )
            raise FloatingPointError(msg)

    def _what_stays(self) -> str:
        there = (self.folder / STATE).exists()
        return f"the last state saved stays, {STATE}" if there else "no state was saved before"

    def _draw(self, done: int) -> None:
        if self.engine.is_main_process:
            seeds = range(self.settings.sample_grid)
            sheet = draw_of_classes(
                self.average, self.space, seeds, self.config.sampling, batch=self.part_size
            ).images
            name = f"samples/{done * self.settings.batch:010d}.png"
            with self._writing(name):
                (self.folder / "samples").mkdir(exist_ok=True)
                self.folder.write(name, lambda file: save_grid(file, sheet, self.space.levels))
        self.engine.wait_for_everyone()


def _engine(config: RunConfig, device: str) -> Accelerator:
    settings = config.training
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        device = "cpu"
    engine = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        dynamo_backend=DynamoBackend.INDUCTOR if settings.compile else DynamoBackend.NO,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        # Given, it is not taken from the environment: micro-batches are counted here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if engine.distributed_type in _SHARDED:
        msg = (
            f"training: processes under {engine.distributed_type.value} are not supported; each "
            "must hold the whole model. Start them with torchrun"
        )
        raise ValueError(msg)
    wanted = device.partition(":")[0]
    if wanted not in {"auto", engine.device.type}:
        # accelerate settles on a device once for each process.
        msg = f"device: this process has settled on {engine.device}; {device!r} needs a new one"
        raise ValueError(msg)
    return engine


def _shares(config: RunConfig, processes: int) -> tuple[int, int, int]:
    """Images of a process, of one pass through the network, and of a block, in each batch."""
    batch, most = config.training.batch, config.training.micro_batch
    block = math.gcd(batch, _BLOCK)
    if batch % (block * processes):
        msg = (
            f"training.batch must be a multiple of {block * processes} for {processes} processes, "
            f"which take {block} images or a multiple each; got {batch}"
        )
        raise ValueError(msg)
    share = batch // processes
    part = share if most is None or most >= share else most
    if share % part or part % block:
        msg = (
            f"training.micro_batch must divide the {share} images of a process, and be a multiple "
            f"of {block}; got {most}"
        )
        raise ValueError(msg)
    return share, part, block


def _networks(model: DiffusionModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """The networks of a model, each with the module that it belongs to and its name there."""
    found: list[tuple[nn.Module, str, nn.Module]] = [(model.score, "network", model.score.network)]
    if model.vae is not None:
        found += [(model.vae, name, getattr(model.vae, name)) for name in ("encoder", "decoder")]
    return found


def _parts(model: DiffusionModel) -> dict[str, nn.Module]:
    """What has losses and a learning rate of its own, by name."""
    parts: dict[str, nn.Module] = {"score": model.score}
    return parts if model.vae is None else {**parts, "autoencoder": model.vae}


def _step_of_stage(config: RunConfig, step: int) -> int:
    """Steps since the stage began."""
    first = config.pretraining_steps
    return step if step < first else step - first


def _learning_rates(config: RunConfig, step: int) -> list[float]:
    """That of the score, and of the autoencoder if there is one."""
    settings, latent, first = config.training, config.latent, config.pretraining_steps
    steps = first if step < first else settings.steps - first
    done = _step_of_stage(config, step)
    share = min(1.0, (done + 1) * settings.batch / max(1, settings.warmup))
    if settings.decay == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * done / steps))
    peaks = [settings.learning_rate]
    if latent is not None:
        peaks.append(latent.learning_rate if step < first else latent.joint_learning_rate)
    return [share * peak for peak in peaks]
