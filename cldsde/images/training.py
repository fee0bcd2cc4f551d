"""Training of a score model on images: one loop, resumable to the bit."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cldsde.images.runs import RunFolder
from cldsde.linear.checks import check_at_least, check_between, check_positive
from cldsde.score import MixedScore, PerturbedData, TimeSampler
from cldsde.solvers.progress import progress_bar

__all__ = ["STATE", "TrainingConfig", "train"]

STATE = "training.safetensors"
"""File of a run that holds the state of its training until it is done."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a score model is trained.

    Attributes
    ----------
    steps
        Optimiser steps.
    batch
        Images a step.
    learning_rate
        Peak of Adam's, reached after ``warmup`` steps and brought to 0 along a cosine.
    warmup
        Steps of linear warm-up.
    ema_decay
        Decay of the exponential moving average of the weights.
    t_min
        Smallest time of training; the loss is the mean over [t_min, 1].
    log_every, save_every
        Steps between lines of metrics, and between training states saved for resumption.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    ema_decay: float
    t_min: float
    log_every: int
    save_every: int

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name in ("steps", "batch", "log_every", "save_every"):
            check_at_least(getattr(self, name), 1, name)
        check_positive(self.learning_rate, "learning_rate")
        check_at_least(self.warmup, 0, "warmup")
        check_between(self.ema_decay, 0, 1, "ema_decay")
        check_between(self.t_min, 1e-8, 0.5, "t_min")
        if self.save_every % self.log_every:
            msg = (
                f"save_every must be a multiple of log_every; got {self.save_every} and "
                f"{self.log_every}"
            )
            raise ValueError(msg)


def train(
    model: MixedScore,
    images: Tensor,
    held_out: Tensor,
    config: TrainingConfig,
    run: RunFolder,
    *,
    seed: int,
    progress: bool = False,
) -> MixedScore:
    """Train by hybrid score matching; return the model with averaged weights.

    Writes ``metrics.jsonl`` and, every ``save_every`` steps, the whole training state. A run that
    was interrupted goes on from the last state and ends with the same bits, on the same machine,
    as one that was not.

    Parameters
    ----------
    model
        The score, on the device to train on; changed in place.
    images, held_out
        ``(N, C, H, W)`` float32 on the host.
    config
        How to train.
    run
        Where to write.
    seed
        Of batches, times and noise.
    progress
        Show a progress bar with loss and time left on stderr.

    Returns
    -------
    MixedScore
        The exponential moving average of the model, in evaluation mode.

    Raises
    ------
    FloatingPointError
        If the loss is not finite; the last state saved stays.
    """
    device = model.data_mean.device
    decay = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=decay)
    averaged = cast(MixedScore, average.module)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    data, evaluation = images.to(device), held_out.to(device)
    sampler = TimeSampler(model.residual_variance, config.t_min)
    state = _State(model, average, optimiser, generator)
    start, seconds = state.load(run) if (run / STATE).exists() else (0, 0.0)
    run.forget_metrics_after(start)

    began = time.monotonic() - seconds
    total = torch.zeros((), device=device)
    bar = progress_bar(
        range(start, config.steps),
        shown=progress,
        initial=start,
        total=config.steps,
        desc="training",
    )
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(config, step)
        rows = torch.randint(len(data), (config.batch,), generator=generator).to(device)
        t, weight = sampler.sample(config.batch, generator=generator)
        losses = _losses(model, data[rows], t, generator)
        loss = (weight.to(losses) * losses).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        average.update_parameters(model)
        total += loss.detach()

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            span = (done - 1) % config.log_every + 1
            mean = float(total) / span
            total.zero_()
            if not math.isfinite(mean):
                msg = f"the training loss became {mean} before step {done}; lower learning_rate"
                raise FloatingPointError(msg)
            validation = held_out_loss(averaged, evaluation, sampler)
            run.log(
                {
                    "step": done,
                    "loss": mean,
                    "held_out_loss": validation,
                    "learning_rate": optimiser.param_groups[0]["lr"],
                    "seconds": round(time.monotonic() - began, 3),
                }
            )
            bar.set_postfix(loss=f"{mean:.4f}", held_out=f"{validation:.4f}")
        if done % config.save_every == 0 and done < config.steps:
            state.save(run, done, time.monotonic() - began)
    return averaged.eval().requires_grad_(False)


@torch.no_grad()
def held_out_loss(model: MixedScore, images: Tensor, sampler: TimeSampler) -> float:
    """Loss on images that were not trained on, at times and noise that never change."""
    was_training = model.training
    model.eval()
    n = len(images)
    # Neighbours in the data set get times that are far apart.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    t, weight = sampler.quantiles((order + 0.5) / n)
    generator = torch.Generator().manual_seed(1)
    losses = _losses(model, images, t, generator)
    model.train(was_training)
    return float((weight.to(losses) * losses).mean())


def _losses(model: MixedScore, x0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Reweighted hybrid score matching, ``(B,)``."""
    pair = PerturbedData.draw(model.sde, x0, t, generator=generator)
    return pair.loss(model(pair.z, pair.t, prediction="noise"), "noise")


def _learning_rate(config: TrainingConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@dataclass(frozen=True)
class _State:
    """Everything that training depends on, to and from one file without code in it."""

    model: MixedScore
    average: AveragedModel
    optimiser: torch.optim.Adam
    generator: torch.Generator

    def save(self, run: RunFolder, step: int, seconds: float) -> None:
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        tensors |= {f"average.{name}": x for name, x in self.average.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": x for name, x in values.items()}
        tensors["generator"] = self.generator.get_state()
        run.save_tensors(STATE, tensors, {"step": str(step), "seconds": str(seconds)})

    def load(self, run: RunFolder) -> tuple[int, float]:
        tensors, metadata = run.load_tensors(STATE)

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if name.startswith(prefix)
            }

        try:
            self.model.load_state_dict(part("model."))
            self.average.load_state_dict(part("average."))
            optimiser = self.optimiser.state_dict()
            for key, x in part("optimiser.").items():
                index, name = key.split(".")
                optimiser["state"].setdefault(int(index), {})[name] = x
            self.optimiser.load_state_dict(optimiser)
            self.generator.set_state(tensors["generator"])
            return int(metadata["step"]), float(metadata["seconds"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(run.damaged(STATE, error)) from error
