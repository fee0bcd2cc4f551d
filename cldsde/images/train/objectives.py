r"""Training objectives of image models: score matching, and bounds of latent models.

A latent model (Vahdat, Kreis and Kautz 2021) samples z_0 ~ q(z_0 | x), where its process starts.
Its negative evidence lower bound

.. math::
    \mathbb{E}_q[−\log p(x | z_0)] − H(q(z_0 | x)) + \mathrm{CE}(q(z_0 | x) ‖ p(z_0))

trains encoder and decoder, with fixed weights of the score in `cldsde.score.cross_entropy`. The
score is trained on the same latent variables as constants, with its own weighting. So each loss has
gradients in one part of the model alone. In the first stage the prior is standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.images.config import RunConfig
from cldsde.images.latent import Batch, bit_per_dim, negative_evidence_lower_bound
from cldsde.images.model import DiffusionModel
from cldsde.linear.random import Generators
from cldsde.pretrained.published_score import PublishedScore
from cldsde.score import (
    MixedScore,
    PerturbedData,
    TimeSampler,
    log_snr_density,
    logit_normal_density,
    mode_density,
)
from cldsde.score.conversion import Prediction
from cldsde.score.matching import Weighting

FrozenScore = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the weights of the score are constants."""


PartLoss = tuple[Literal["score", "autoencoder"], Tensor]
"""A part of the model, and the losses ``(B,)`` of each image that train it."""


class ScoreMatching:
    """Score matching on images or latent variables, with the weighting of a configuration.

    ``samplers`` draw the times of a batch.
    """

    def __init__(self, score: Any, config: RunConfig) -> None:
        settings = config.training
        self._reduction, self._conditioning = settings.reduction, settings.conditioning
        self._prediction: Prediction = config.score.prediction
        self._weighting: Weighting
        normal = {"mean": settings.log_snr_mean, "std": settings.log_snr_std}
        if settings.weighting == "log_snr":
            self._weighting = score.log_snr_weighting(**normal)
            self._prediction = "noise"  # the weighting is in its units
        else:
            self._weighting = settings.weighting
        density: Callable[[Tensor], Tensor] | None = None
        if settings.times == "uniform":
            density = torch.ones_like
        elif settings.times == "logit_normal":
            density = logit_normal_density(mean=settings.logit_mean, std=settings.logit_std)
            self._weighting = density
        elif settings.times == "mode":
            self._weighting = density = mode_density(settings.mode_scale)
        elif settings.weighting == "log_snr":
            density = log_snr_density(score.sde, **normal)
        elif settings.weighting == "reweighted" and settings.conditioning == "data":
            density = partial(score.residual_variance, prediction=self._prediction)
        if density is None:
            how: Any = {"conditioning": settings.conditioning, "weighting": settings.weighting}
            how["data_variance"] = float(score.data_variance.mean())
            sampler = TimeSampler.importance(score.sde, settings.t_min, **how)
        else:
            sampler = TimeSampler(density, settings.t_min)
        self.samplers: tuple[TimeSampler, ...] = (sampler,)

    def of(
        self, score: MixedScore | PublishedScore, x0: Tensor, batch: Batch, generator: Generators
    ) -> Tensor:
        """Weighted loss of each sample, ``(B,)``."""
        t, weight = batch.times[0]
        kind: dict[str, Any] = {"prediction": self._prediction, "weighting": self._weighting}
        conditioning = self._conditioning
        pair = PerturbedData.draw(score.sde, x0, t, conditioning=conditioning, generator=generator)
        losses = score.loss(pair, condition=batch.labels, **kind)
        if self._reduction == "sum":
            losses = math.prod(x0.shape[1:]) * losses
        return weight.to(losses) * losses

    def losses(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int, _: FrozenScore
    ) -> Iterator[PartLoss]:
        """The loss of the score."""
        yield "score", self.held_out(model, batch, generator, step)

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, _: int
    ) -> Tensor:
        """The weighted loss of each held-out image, ``(B,)``."""
        return self.of(model.score, batch.images, batch, generator)


class LatentObjective:
    """Bounds of a latent model: first with a standard normal prior, then with the learnt one."""

    def __init__(self, model: DiffusionModel, config: RunConfig) -> None:
        assert config.latent is not None
        self._batch, self._t_min = config.training.batch, config.training.t_min
        self._annealing, self._pretraining = config.latent.annealing, config.pretraining_steps
        self._matching = ScoreMatching(model.score, config)
        bound = TimeSampler.importance(model.score.sde, self._t_min, weighting="likelihood")
        self.samplers = (*self._matching.samplers, bound)

    def losses(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        frozen_score: FrozenScore,
    ) -> Iterator[PartLoss]:
        """The bound in bits per dim, and the loss of the score; their gradients add up.

        Differentiate each before the next is asked for: in between the score is frozen.
        """
        unit = bit_per_dim(batch.images)
        if step < self._pretraining:
            share = min(1.0, (step + 1) * self._batch / max(1, self._annealing))
            bound, _ = negative_evidence_lower_bound(model, batch, generator, None, share)
            yield "autoencoder", unit * bound
            return
        with frozen_score():
            bound, z0 = negative_evidence_lower_bound(model, batch, generator, self._t_min)
            yield "autoencoder", unit * bound
        yield "score", self._matching.of(model.score, z0.detach(), batch, generator)

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int
    ) -> Tensor:
        """The negative evidence lower bound of each held-out image in bits per dim, ``(B,)``."""
        t_min = self._t_min if step >= self._pretraining else None
        bound, _ = negative_evidence_lower_bound(model, batch, generator, t_min)
        return bit_per_dim(batch.images) * bound


def make_objective(model: DiffusionModel, config: RunConfig) -> ScoreMatching | LatentObjective:
    """The objective of a configuration."""
    latent = config.latent is not None
    return LatentObjective(model, config) if latent else ScoreMatching(model.score, config)
