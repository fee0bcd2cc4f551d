r"""What models of images are trained for: score matching, and bounds of latent models.

A latent model (Vahdat, Kreis and Kautz 2021) draws z_0 ~ q(z_0 | x), and its process starts there.
Its negative evidence lower bound

.. math::
    \mathbb{E}_q[−\log p(x | z_0)] − H(q(z_0 | x)) + \mathrm{CE}(q(z_0 | x) ‖ p(z_0))

trains encoder and decoder; the cross-entropy is `cldsde.score.cross_entropy`, the same for every
process, and its gradient goes through the states into the encoder, with the weights of the score
held fast. The score itself is trained on the same latent variables, which are constants then, with
a weighting of its own, so that either loss has gradients in one part of the model alone. In the
first stage the prior is standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cldsde.images.config import RunConfig, TrainingConfig
from cldsde.images.model import DiffusionModel
from cldsde.linear.random import Generators
from cldsde.pretrained import PublishedScore
from cldsde.score import (
    MixedScore,
    PerturbedData,
    TimeSampler,
    cross_entropy,
    log_snr_density,
    logit_normal_density,
    mode_density,
)
from cldsde.score.matching import Measured, Weighting

__all__ = [
    "Batch",
    "LatentObjective",
    "Objective",
    "PartLoss",
    "ScoreMatching",
    "Times",
    "bit_per_dim",
    "make_objective",
    "negative_evidence_lower_bound",
]


class Times(NamedTuple):
    """Times ``(B,)``, float64 on the host, and the weights that undo their density."""

    t: Tensor
    weight: Tensor

    def take(self, rows: slice | Tensor) -> Times:
        """Those of some images."""
        return Times(self.t[rows], self.weight[rows])


class Batch(NamedTuple):
    """Images in [−1, 1] ``(B, C, H, W)``, their classes ``(B,)``, and times by each sampler."""

    images: Tensor
    labels: Tensor | None
    times: tuple[Times, ...]


class PartLoss(NamedTuple):
    """Losses of each image, ``(B,)``, and the part of the model that they train."""

    part: Literal["score", "autoencoder"]
    losses: Tensor


class Objective(Protocol):
    """What a training minimises.

    Attributes
    ----------
    samplers
        Of the times that a batch brings.
    """

    samplers: tuple[TimeSampler, ...]

    def losses(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        frozen_score: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[PartLoss]:
        """Losses whose gradients add up, one for each part that is trained at that step.

        Each is to be differentiated before the next is asked for: within ``frozen_score`` the
        weights of the score are constants.
        """

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int
    ) -> Tensor:
        """What is reported of each image not trained on, ``(B,)``."""


class ScoreMatching:
    """Score matching on images."""

    def __init__(self, model: DiffusionModel, config: RunConfig) -> None:
        self._matching = _Matching(model.score, config)
        self.samplers: tuple[TimeSampler, ...] = (self._matching.sampler,)

    def losses(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        frozen_score: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[PartLoss]:
        """See `Objective.losses`."""
        del frozen_score
        yield PartLoss("score", self.held_out(model, batch, generator, step))

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int
    ) -> Tensor:
        """Weighted loss; see `Objective.held_out`."""
        del step
        return self._matching.losses(model, batch.images, batch, generator)


class LatentObjective:
    """Bounds of a latent model: first with a standard normal prior, then with the learnt one."""

    def __init__(self, model: DiffusionModel, config: RunConfig) -> None:
        assert config.latent is not None
        self._settings, self._latent = config.training, config.latent
        self._pretraining = config.pretraining_steps
        self._matching = _Matching(model.score, config)
        t_min = self._settings.t_min
        self.samplers: tuple[TimeSampler, ...] = (
            self._matching.sampler,
            TimeSampler.importance(model.score.sde, t_min, weighting="likelihood"),
        )

    def losses(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        frozen_score: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[PartLoss]:
        """See `Objective.losses`: the bound in bits a dimension, and the loss of the score."""
        unit = bit_per_dim(batch.images)
        if step < self._pretraining:
            seen = (step + 1) * self._settings.batch
            share = min(1.0, seen / max(1, self._latent.annealing))
            bound, _ = _bound(model, batch, generator, kl_share=share)
            yield PartLoss("autoencoder", unit * bound)
            return
        with frozen_score():
            bound, z0 = _bound(model, batch, generator, t_min=self._settings.t_min)
            yield PartLoss("autoencoder", unit * bound)
        yield PartLoss("score", self._matching.losses(model, z0.detach(), batch, generator))

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int
    ) -> Tensor:
        """Negative evidence lower bound in bits a dimension; see `Objective.held_out`."""
        learnt = step >= self._pretraining
        bound = negative_evidence_lower_bound(
            model, batch, generator, self._settings.t_min, learnt_prior=learnt
        )
        return bit_per_dim(batch.images) * bound


def make_objective(model: DiffusionModel, config: RunConfig) -> Objective:
    """What a configuration trains its model for."""
    return (ScoreMatching if config.latent is None else LatentObjective)(model, config)


def bit_per_dim(images: Tensor) -> float:
    """A nat an image ``(B, C, H, W)`` in bits a dimension."""
    return 1 / (math.prod(images.shape[1:]) * math.log(2))


def negative_evidence_lower_bound(
    model: DiffusionModel,
    batch: Batch,
    generator: Generators,
    t_min: float,
    *,
    learnt_prior: bool = True,
) -> Tensor:
    """Unbiased estimate of a latent model's bound on −log p(x), ``(B,)`` nats.

    Parameters
    ----------
    model
        A model with an autoencoder.
    batch
        Images, and times as `LatentObjective` has them drawn.
    generator
        Source of the latent variables and the noise.
    t_min
        Time at which the prior's process ends.
    learnt_prior
        Whether the prior is that of the process; else it is standard normal.
    """
    bound, _ = _bound(model, batch, generator, t_min=t_min if learnt_prior else None)
    return bound


def _bound(
    model: DiffusionModel,
    batch: Batch,
    generator: Generators,
    *,
    t_min: float | None = None,
    kl_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The bound, ``(B,)`` nats, and the latent variables that it was estimated with.

    With ``t_min`` the prior is that of the process; without, it is standard normal, and its term
    counts by ``kl_share``.
    """
    vae = model.vae
    assert vae is not None
    posterior = vae.encode(batch.images)
    z0 = posterior.sample(generator)
    reconstruction = -vae.log_likelihood(batch.images, z0)
    if t_min is None:
        return reconstruction + kl_share * posterior.kl_to_standard_normal(), z0
    bound = _prior_bound(model, z0, batch, generator, t_min)
    return reconstruction - posterior.entropy() + bound, z0


def _prior_bound(
    model: DiffusionModel, z0: Tensor, batch: Batch, generator: Generators, t_min: float
) -> Tensor:
    """Bound on −E log p(z_0), ``(B,)`` nats."""
    t, weight = batch.times[1]
    pair = PerturbedData.draw(model.score.sde, z0, t, generator=generator)
    losses = model.score.loss(pair, weighting="likelihood", condition=batch.labels)
    return cross_entropy(pair, losses, weight, t_min=t_min, of="data")


class _Matching:
    """Score matching as a configuration has it, on images or latent variables."""

    def __init__(self, score: MixedScore | PublishedScore, config: RunConfig) -> None:
        settings = config.training
        self._sums = settings.reduction == "sum"
        self._conditioning = settings.conditioning
        self._prediction: Measured = config.score.prediction
        self._weighting: Weighting
        even = settings.times == "uniform"
        sampler: TimeSampler | None
        if settings.weighting == "log_snr":
            mean, std = settings.log_snr_mean, settings.log_snr_std
            self._weighting = score.log_snr_weighting(mean=mean, std=std)
            self._prediction = "noise"  # in whose units the weighting is
            density_of_times = log_snr_density(score.sde, mean=mean, std=std)
            sampler = None if even else TimeSampler(density_of_times, settings.t_min)
        elif settings.times in ("logit_normal", "mode"):
            self._weighting = density = _density(settings)
            sampler = TimeSampler(density, settings.t_min)
        else:
            self._weighting = settings.weighting
            sampler = None if even else _importance(score, settings, self._prediction)
        self.sampler = sampler or TimeSampler(torch.ones_like, settings.t_min)

    def losses(
        self, model: DiffusionModel, x0: Tensor, batch: Batch, generator: Generators
    ) -> Tensor:
        """Weighted loss of each sample, ``(B,)``."""
        t, weight = batch.times[0]
        pair = PerturbedData.draw(
            model.score.sde, x0, t, conditioning=self._conditioning, generator=generator
        )
        losses = model.score.loss(
            pair,
            prediction=self._prediction,
            weighting=self._weighting,
            condition=batch.labels,
        )
        if self._sums:
            losses = math.prod(x0.shape[1:]) * losses
        return weight.to(losses) * losses


def _density(settings: TrainingConfig) -> Callable[[Tensor], Tensor]:
    if settings.times == "mode":
        return mode_density(settings.mode_scale)
    return logit_normal_density(mean=settings.logit_mean, std=settings.logit_std)


def _importance(score: MixedScore, settings: TrainingConfig, prediction: Measured) -> TimeSampler:
    assert settings.weighting != "log_snr"
    if settings.conditioning == "data" and settings.weighting == "reweighted":
        density = partial(score.residual_variance, prediction=prediction)
        return TimeSampler(density, settings.t_min)
    return TimeSampler.importance(
        score.sde,
        settings.t_min,
        data_variance=float(score.data_variance.mean()),
        conditioning=settings.conditioning,
        weighting=settings.weighting,
    )
