"""Model, average and optimiser of a training, and one step of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet, augment
from cldsde.images.latent.bound import Batch, Times
from cldsde.images.model import ImageSpace, Statistics, make_model
from cldsde.images.streams import stream, stream_seed
from cldsde.images.train.feed import Feed, Part
from cldsde.images.train.meter import Meter
from cldsde.images.train.objectives import make_objective


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


class Learner:
    """Model, average and optimiser of one process of a training.

    ``parts`` are the parts of the model with losses and learning rates of their own.
    """

    def __init__(
        self, config: RunConfig, data: DataSet, statistics: Statistics, engine: Accelerator
    ) -> None:
        self.config, self.data, self.engine = config, data, engine
        self.statistics = statistics
        self.settings = settings = config.training
        self.space = ImageSpace.of(data.train, config)
        self.model = make_model(config, self.space, statistics).to(engine.device)
        self.averages = [
            copy.deepcopy(self.model).eval().requires_grad_(requires_grad=False)
            for _ in (settings.ema_decay, *settings.ema_decays)
        ]
        self.average = self.averages[0]
        self.objective = make_objective(self.model, config)
        feed = (config, data.train, self.space, self.objective.samplers)
        self.feed = Feed(*feed, process=engine.process_index, processes=engine.num_processes)
        score, vae = self.model.score, self.model.vae
        places: list[tuple[nn.Module, str]] = [(score, "network")]
        self.parts: dict[str, nn.Module] = {"score": score}
        if vae is not None:
            places += [(vae, "encoder"), (vae, "decoder")]
            self.parts["autoencoder"] = vae
        groups = [{"params": list(part.parameters())} for part in self.parts.values()]
        fused = settings.optimiser in {"Adam", "AdamW"} and engine.device.type in {"cpu", "cuda"}
        fused &= not {"fused", "foreach", "differentiable"} & {*settings.optimiser_options}
        optimiser = settings.make_optimiser(groups, **({"fused": True} if fused else {}))
        self.optimiser = engine.prepare_optimizer(optimiser)
        self.cores = [
            _Core(owner, name, network, engine.prepare_model(network))
            for owner, name in places
            for network in [getattr(owner, name)]
        ]
        within = {id(p) for core in self.cores for p in core.network.parameters()}
        self.unshared = [p for p in self.model.parameters() if id(p) not in within]
        self.meter = Meter(engine, list(self.parts))
        names = ["average", *(f"average{i}" for i in range(1, len(self.averages)))]
        self.modules = {"model": self.model, **dict(zip(names, self.averages, strict=True))}

    def step(self, step: int, parts: list[Part]) -> None:
        """Update the weights, and meter this process's mean losses and the gradients' norms."""
        seed, device = self.config.seed, self.engine.device
        self.model.train()
        for core in self.cores:
            core.use(core.wrapped)
        rates = learning_rates(self.config, step)
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimiser.zero_grad()
        totals = {name: torch.zeros((), device=device) for name in self.parts}
        for part in parts:
            count = len(part.batch.images)
            blocks = range(part.first // self.feed.block, (part.first + count) // self.feed.block)
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
        done = step_of_stage(self.config, step) + 1
        decays = (self.settings.ema_decay, *self.settings.ema_decays)
        for decay, average in zip(decays, self.averages, strict=True):
            update = get_ema_multi_avg_fn(min(decay, done / (done + 9)))  # type: ignore[no-untyped-call]
            update(list(average.parameters()), list(self.model.parameters()), None)
            for own, current in zip(average.buffers(), self.model.buffers(), strict=True):
                own.copy_(current)

    def _clip(self) -> dict[str, Tensor]:
        """Limit the gradient of each part; return its norm before.

        Together, the encoder's bound would rescale the step of the score, and vice versa.
        """
        bound = math.inf if self.settings.clip is None else self.settings.clip
        self.engine.unscale_gradients()
        return {
            name: nn.utils.clip_grad_norm_(part.parameters(), bound)
            for name, part in self.parts.items()
        }

    @contextmanager
    def _frozen_score(self) -> Iterator[None]:
        """Make the weights of the score constants, without sharing gradients, for a while."""
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
        labels = (
            batch.labels if batch.labels is None else batch.labels.to(device, non_blocking=True)
        )
        return batch._replace(images=batch.images.to(device, non_blocking=True), labels=labels)

    @torch.no_grad()
    def held_out(self, step: int) -> float | None:
        """Mean objective over held-out images, at fixed times and noise."""
        images = self.data.held_out
        if images is None:
            return None
        count = min(len(images), self.settings.held_out)
        # Neighbours in the data set get times that are far apart.
        order = torch.randperm(count, generator=stream(0, "held-out times"))
        times = [Times(*some.quantiles((order + 0.5) / count)) for some in self.objective.samplers]
        noise = stream(0, "held-out noise", device=self.engine.device)
        kind = {"flip": False, "dequantise": self.config.data.dequantise}
        draw = stream(0, "held-out presentation")
        sums = []
        for rows in torch.arange(count).split(self.feed.part_size):  # type: ignore[no-untyped-call]
            x = augment(images.load(rows), images.levels, generator=draw, **kind)
            conditional = self.space.classes is not None and images.labels is not None
            labels = cast(Tensor, images.labels)[rows] if conditional else None
            batch = self._to_device(Batch(x, labels, tuple(some.take(rows) for some in times)))
            sums.append(self.objective.held_out(self.average, batch, noise, step).double().sum())
        return float(torch.stack(sums).sum()) / count


def step_of_stage(config: RunConfig, step: int) -> int:
    """Steps since the stage began."""
    first = config.pretraining_steps
    return step if step < first else step - first


def learning_rates(config: RunConfig, step: int) -> list[float]:
    """Learning rates of the score, and of the autoencoder if there is one."""
    settings, latent, first = config.training, config.latent, config.pretraining_steps
    steps = first if step < first else settings.steps - first
    done = step_of_stage(config, step)
    share = min(1.0, (done + 1) * settings.batch / max(1, settings.warmup))
    if settings.decay == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * done / steps))
    if settings.decay == "inverse_square_root":
        first_images = max(settings.warmup, settings.batch)
        share *= min(1.0, math.sqrt(first_images / ((done + 1) * settings.batch)))
    peaks = [settings.learning_rate]
    if latent is not None:
        peaks.append(latent.learning_rate if step < first else latent.joint_learning_rate)
    return [share * peak for peak in peaks]
