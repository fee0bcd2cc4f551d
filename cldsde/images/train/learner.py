"""Model, averages and optimiser of a training: one step, the batches of steps, and the state."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cldsde.errors import require
from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet, augment
from cldsde.images.latent import Batch
from cldsde.images.model import STATE_KIND, ImageSpace, Statistics, make_model, model_notes
from cldsde.images.power_averages import WIDTHS, power
from cldsde.images.runs import STATE, RunFolder
from cldsde.images.streams import image_order, stream, stream_seed
from cldsde.images.tensor_files import load_tensors, save_tensors
from cldsde.images.train.engine import (
    like,
    load,
    make_engine,
    networks,
    on_cpu,
    own,
    shard,
    shares,
    whole,
)
from cldsde.images.train.objectives import Objective
from cldsde.messages import one_line


class Learner:
    """Model, average and optimiser of one process of a training.

    ``parts`` are the parts of the model with losses and learning rates of their own. If they are
    ``sharded`` (FSDP), each process has a share of weights, averages, gradients and moments, and
    all processes must call the networks together.
    """

    def __init__(
        self, config: RunConfig, data: DataSet, statistics: Statistics, engine: Accelerator
    ) -> None:
        self.config, self.data, self.engine = config, data, engine
        self.statistics, self.settings = statistics, config.training
        self.space = ImageSpace.of(data.train, config)
        self.model = make_model(config, self.space, statistics).to(engine.device)
        self.decays = (self.settings.ema_decay, *self.settings.ema_decays)
        self.powers = [power(x) for x in WIDTHS] if self.settings.power_averages else []
        self.averages = [
            shard(engine, copy.deepcopy(self.model).eval().requires_grad_(requires_grad=False))
            for _ in (*self.decays, *self.powers)
        ]
        self.average, self.sharded = self.averages[0], engine.is_fsdp2
        shard(engine, self.model)
        self.objective = Objective(self.model, config)
        share, self.part_size, self._block = shares(config, engine.num_processes)
        begin = engine.process_index * share
        self._firsts = range(begin, begin + share, self.part_size)  # of each part of a batch
        self.parts: dict[str, nn.Module] = {"score": self.model.score}
        if self.model.vae is not None:
            self.parts["autoencoder"] = self.model.vae
        groups = [{"params": list(part.parameters())} for part in self.parts.values()]
        options = self.settings.optimiser_options
        fused = self.settings.optimiser in {"Adam", "AdamW"}
        fused &= engine.device.type in {"cpu", "cuda"}
        fused &= not {"fused", "foreach", "differentiable"} & {*options}
        optimiser = self.settings.make_optimiser(groups, **({"fused": True} if fused else {}))
        self.optimiser = engine.prepare_optimizer(optimiser)
        # Only networks are wrapped for several processes, half precision and compilation: times,
        # kernels, noise and loss keep their precision.
        self._places = networks(self.model)
        self._networks = [getattr(owner, name) for owner, name in self._places]
        prepared = partial(engine.prepare_model, evaluation_mode=self.sharded)
        self._wrapped = [prepared(network) for network in self._networks]
        within = {id(p) for network in self._networks for p in network.parameters()}
        self.unshared = [p for p in self.model.parameters() if id(p) not in within]
        # Sums over steps of losses and of gradients' norms, of all parts together and of each, and
        # the number of steps. They are read seldom, because reading waits for the device.
        dtype = torch.float64 if engine.device.type == "cpu" else None
        self.sums = torch.zeros(3 + 2 * len(self.parts), dtype=dtype, device=engine.device)
        averages = {f"average{i or ''}": average for i, average in enumerate(self.averages)}
        self.modules = nn.ModuleDict({**averages, "model": self.model})

    def load(self, step: int) -> list[Batch]:
        """The parts of a step's batch for this process, each for one pass through the networks."""
        config, size, seed = self.config, self.settings.batch, self.config.seed
        images, classes = self.data.train, self.space.classes
        kind: Any = {name: getattr(config.data, name) for name in ("flip", "crop", "dequantise")}
        drawn = [
            torch.stack(sampler.sample(size, generator=stream(seed, "times", step, *which)))
            for sampler, which in zip(self.objective.samplers, ((), (1,)), strict=False)
        ]
        times = torch.stack(drawn)
        order = image_order(seed, len(images), step * size, size)
        loaded = []
        for first in self._firsts:
            mine = slice(first, first + self.part_size)
            shown, labels = [], []
            for block, rows in enumerate(torch.split(order[mine], self._block)):
                draw = stream(seed, "presentation", step, first // self._block + block)
                shown.append(augment(images.load(rows), images.levels, generator=draw, **kind))
                if classes is not None:
                    assert images.labels is not None
                    uniform = torch.rand(len(rows), generator=draw, device="cpu")
                    hidden = uniform < config.network.label_dropout
                    labels.append(images.labels[rows].masked_fill(hidden, classes))
            known = torch.cat(labels) if labels else None
            loaded.append(Batch(torch.cat(shown), known, times[..., mine]))
        return loaded

    def step(self, step: int, parts: list[Batch]) -> None:
        """Update the weights, and add this process's mean losses and the gradients' norms."""
        seed, device = self.config.seed, self.engine.device
        self.model.train()
        self._use(self._wrapped)
        rates = learning_rates(self.config, step)
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimiser.zero_grad()
        totals = {name: torch.zeros((), device=device) for name in self.parts}
        for first, part in zip(self._firsts, parts, strict=True):
            blocks = range(first // self._block, (first + len(part.images)) // self._block)
            noise = [stream(seed, "noise", step, block, device=device) for block in blocks]
            torch.manual_seed(stream_seed(seed, "dropout", step, first))
            batch = self._to_device(part)
            with ExitStack() as together:
                # Shares of gradients take less memory than what is not shared yet.
                for network in self._wrapped if part is not parts[-1] and not self.sharded else ():
                    together.enter_context(self.engine.no_sync(network))
                losses = self.objective.losses(self.model, batch, noise, step, self._frozen_score)
                for name, some in losses:
                    loss = some.mean() / len(parts)
                    self.engine.backward(loss)
                    totals[name] += loss.detach()
        self._use(self._networks)
        for parameter in self.unshared:
            if parameter.grad is not None:
                parameter.grad = cast(Tensor, self.engine.reduce(parameter.grad, "mean"))
        self.engine.unscale_gradients()
        # One bound for all parts would let the encoder rescale the step of the score.
        bound = math.inf if self.settings.clip is None else self.settings.clip
        clip = nn.utils.clip_grad_norm_
        norms = [whole(clip(part.parameters(), bound)) for part in self.parts.values()]
        each = torch.stack(list(totals.values()))
        sizes = torch.stack([norm.detach() for norm in norms]).to(each)
        joined = torch.stack([each.sum(), sizes.norm()])
        self.sums += torch.cat([joined, each, sizes, torch.ones_like(each[:1])])
        self.optimiser.step()
        done = step_of_stage(self.config, step) + 1
        kept = [min(decay, done / (done + 9)) for decay in self.decays]
        kept += [(1 - 1 / done) ** (gamma + 1) for gamma in self.powers]
        for share, average in zip(kept, self.averages, strict=True):
            update = get_ema_multi_avg_fn(share)  # type: ignore[no-untyped-call]
            update(*([own(x) for x in each.parameters()] for each in (average, self.model)), None)
            for copied, current in zip(average.buffers(), self.model.buffers(), strict=True):
                copied.copy_(current)

    def means(self) -> dict[str, float]:
        """Means of `sums` over steps and processes, all of which must call it; 0 without a step."""
        kinds = ("loss", "gradient_norm")
        names = [*kinds, *(f"{part}_{kind}" for kind in kinds for part in self.parts)]
        *sums, steps = self.engine.reduce(self.sums, "mean").tolist()
        return {name: x / max(steps, 1) for name, x in zip(names, sums, strict=True)}

    def _use(self, modules: Sequence[nn.Module]) -> None:
        for (owner, name), module in zip(self._places, modules, strict=True):
            setattr(owner, name, module)

    @contextmanager
    def _frozen_score(self) -> Iterator[None]:
        """Make the weights of the score constants, without sharing gradients, for a while."""
        score = self.model.score
        score.network = self._networks[0]
        score.requires_grad_(requires_grad=False)
        before = [(x, x.grad) for x in score.parameters()]
        score.zero_grad()
        try:
            yield
        finally:
            for x, gradient in before:  # FSDP makes gradients of constants, too
                x.grad = gradient
            score.requires_grad_(requires_grad=True)
            score.network = self._wrapped[0]

    def _to_device(self, batch: Batch) -> Batch:
        where: Any = {"device": self.engine.device, "non_blocking": True}
        labels = None if batch.labels is None else batch.labels.to(**where)
        return batch._replace(images=batch.images.to(**where), labels=labels)

    @torch.no_grad()
    def held_out(self, step: int) -> float | None:
        """Mean objective over held-out images, at fixed times and noise."""
        images = self.data.held_out
        if images is None:
            return None
        count = min(len(images), self.settings.held_out)
        # Neighbours in the data set get times that are far apart.
        order = torch.randperm(count, generator=stream(0, "held-out times"), device="cpu")
        quantiles = [x.quantiles((order + 0.5) / count) for x in self.objective.samplers]
        times = torch.stack([torch.stack(pair) for pair in quantiles])
        noise = stream(0, "held-out noise", device=self.engine.device)
        kind = {"flip": False, "dequantise": self.config.data.dequantise}
        draw = stream(0, "held-out presentation")
        known = images.labels if self.space.classes is not None else None
        sums = []
        for rows in torch.split(torch.arange(count, device="cpu"), self.part_size):
            x = augment(images.load(rows), images.levels, generator=draw, **kind)
            labels = None if known is None else known[rows]
            batch = self._to_device(Batch(x, labels, times[..., rows]))
            sums.append(self.objective.held_out(self.average, batch, noise, step).double().sum())
        return float(torch.stack(sums).sum()) / count

    def save_state(self, run: RunFolder, step: int, seconds: float) -> None:
        """Write the state after so many steps and seconds; all processes must call it."""
        tensors = dict(self.modules.state_dict())
        for index, values in self.optimiser.state_dict()["state"].items():
            kept = {name: x for name, x in values.items() if isinstance(x, Tensor)}
            tensors |= {f"optimiser.{index}.{name}": x for name, x in kept.items()}
        tensors = on_cpu(tensors, kept=self.engine.is_main_process)
        tensors["meter"] = self.engine.reduce(self.sums, "mean")
        if not self.engine.is_main_process:
            return
        scaler = None if self.engine.scaler is None else self.engine.scaler.state_dict()
        metadata = {"step": str(step), "seconds": str(seconds), "scaler": json.dumps(scaler)}
        metadata |= model_notes(self.config, self.space, step * self.settings.batch)
        save_tensors(run / STATE, STATE_KIND, {**tensors, **self.statistics._asdict()}, metadata)

    def load_state(self, run: RunFolder) -> tuple[int, float]:
        """Load the state of a run; return steps done and seconds spent.

        Raises a ValueError if the file is damaged, or was written for other settings or data.
        """
        try:
            tensors, metadata = load_tensors(run / STATE, STATE_KIND)
            # States of 0.2 have no other digest.
            if metadata.get("training", metadata["config"]) != self.config.training_digest():
                raise ValueError("it was written for other settings than this run's")
            for name, value in self.statistics._asdict().items():
                if not torch.equal(tensors[name], value):
                    raise ValueError(f"the data have changed since it was written: {name} differs")
            optimiser, weights = self.optimiser.state_dict(), {}
            trained = [x for group in self.optimiser.param_groups for x in group["params"]]
            for key, x in tensors.items():
                part, _, name = key.partition(".")
                if part in self.modules:
                    weights[key] = x
                elif part == "optimiser":
                    index, name = name.split(".")
                    values = optimiser["state"].setdefault(int(index), {})
                    values[name] = like(x, trained[int(index)])
            load(self.modules, weights)
            self.optimiser.load_state_dict(optimiser)
            scaler = json.loads(metadata["scaler"])
            if self.engine.scaler is not None and scaler is not None:
                self.engine.scaler.load_state_dict(scaler)
            self.sums.copy_(tensors["meter"])
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
        except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
            msg = f"{run / STATE} cannot be used ({one_line(error)}); put a copy of it back, or "
            raise ValueError(f"{msg}begin again in another folder") from error
        msg = f"can grow, but not shrink; the run has seen {step * self.settings.batch:,}, got "
        msg += f"{self.settings.images:,}"
        require(step <= self.settings.steps, "training.images", msg)
        return step, seconds


@contextmanager
def learning(
    config: RunConfig, data: DataSet, device: str, statistics: Statistics
) -> Iterator[Learner]:
    """Make the learner of one training; restore random numbers and precision afterwards."""
    try:
        engine = make_engine(config, device)
        learner = Learner(config, data, statistics, engine)
        # Dropout draws from the global generators, which must not change.
        with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
            yield learner
    finally:
        # Another training of this process may use another precision.
        AcceleratorState._reset_state(reset_partial_state=False)


def step_of_stage(config: RunConfig, step: int) -> int:
    """Steps since the stage began."""
    first = config.pretraining_steps
    return step if step < first else step - first


def learning_rates(config: RunConfig, step: int) -> list[float]:
    """Learning rates of the score, and of the autoencoder if there is one."""
    settings, latent, first = config.training, config.latent, config.pretraining_steps
    steps, done = first if step < first else settings.steps - first, step_of_stage(config, step)
    images = (done + 1) * settings.batch
    share = min(1.0, images / max(1, settings.warmup))
    if settings.decay == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * done / steps))
    if settings.decay == "inverse_square_root":
        share *= min(1.0, math.sqrt(max(settings.warmup, settings.batch) / images))
    peaks = [settings.learning_rate]
    if latent is not None:
        peaks.append(latent.learning_rate if step < first else latent.joint_learning_rate)
    return [share * peak for peak in peaks]
