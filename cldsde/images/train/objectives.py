"""Training objectives of image models: score matching, and bounds of latent models.

The bound of `cldsde.images.latent` trains encoder and decoder, with fixed weights of the score. The
score is trained on the same latent variables as constants, with its own weighting. So each loss has
gradients in one part of the model alone (Vahdat, Kreis and Kautz 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.images.config import RunConfig
from cldsde.images.latent import Batch, bit_per_dim, negative_evidence_lower_bound
from cldsde.images.model import DiffusionModel
from cldsde.linear.random import Generators
from cldsde.score import (
    PerturbedData,
    TimeSampler,
    kappa_density,
    logit_normal_density,
    mode_density,
)


class Objective:
    """The losses of a configuration. ``samplers`` draw the times of a batch."""

    def __init__(self, model: DiffusionModel, config: RunConfig) -> None:
        self._config, settings = config, config.training
        score: Any = model.score
        normal = {"mean": settings.kappa_mean, "std": settings.kappa_std}
        self._how: dict[str, Any] = {"prediction": config.score.prediction}
        self._how["weighting"] = settings.weighting
        if settings.weighting == "kappa":  # in units of the noise
            weighting = score.kappa_weighting(**normal)
            self._how = {"prediction": "noise", "weighting": weighting}
        density: Callable[[Tensor], Tensor] | None = None
        if settings.times == "uniform":
            density = torch.ones_like
        elif settings.times == "logit_normal":
            density = logit_normal_density(mean=settings.logit_mean, std=settings.logit_std)
            self._how["weighting"] = density
        elif settings.times == "mode":
            self._how["weighting"] = density = mode_density(settings.mode_scale)
        elif settings.weighting == "kappa":
            density = kappa_density(score.sde, **normal)
        elif settings.weighting == "reweighted" and settings.conditioning == "data":
            density = partial(score.residual_variance, prediction=self._how["prediction"])
        t_min = settings.t_min
        if density is None:
            how: Any = {"conditioning": settings.conditioning, "weighting": settings.weighting}
            how["data_variance"] = float(score.data_variance.mean())
            self.samplers = [TimeSampler.importance(score.sde, t_min, **how)]
        else:
            self.samplers = [TimeSampler(density, t_min)]
        if config.latent is not None:
            bound = TimeSampler.importance(score.sde, t_min, weighting="likelihood")
            self.samplers.append(bound)

    def losses(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        frozen_score: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[tuple[Literal["score", "autoencoder"], Tensor]]:
        """Losses ``(B,)``, each with the part of the model that it trains; gradients add up.

        Differentiate each before the next is asked for: in between the weights of the score are
        constants, in a context of ``frozen_score``.
        """
        x0, latent = batch.images, self._config.latent
        if latent is not None:
            is_first = step < self._config.pretraining_steps
            seen = (step + 1) * self._config.training.batch
            with nullcontext() if is_first else frozen_score():
                share = min(1.0, seen / max(1, latent.annealing))
                bound, z0 = self._bound(model, batch, generator, step, share)
                yield "autoencoder", bound
            if is_first:
                return
            x0 = z0.detach()
        yield "score", self._score_loss(model, x0, batch, generator)

    def held_out(
        self, model: DiffusionModel, batch: Batch, generator: Generators, step: int
    ) -> Tensor:
        """The score's loss of each held-out image, or a latent model's bound, ``(B,)``."""
        if self._config.latent is None:
            return self._score_loss(model, batch.images, batch, generator)
        return self._bound(model, batch, generator, step)[0]

    def _score_loss(
        self, model: DiffusionModel, x0: Tensor, batch: Batch, generator: Generators
    ) -> Tensor:
        settings, (t, weight) = self._config.training, batch.times[0].unbind()
        how: Any = {"conditioning": settings.conditioning, "generator": generator}
        pair = PerturbedData.draw(model.score.sde, x0, t, **how)
        losses: Tensor = model.score.loss(pair, condition=batch.labels, **self._how)
        if settings.reduction == "sum":
            losses = math.prod(x0.shape[1:]) * losses
        return weight.to(losses) * losses

    def _bound(
        self,
        model: DiffusionModel,
        batch: Batch,
        generator: Generators,
        step: int,
        kl_share: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The bound of the stage in bits per dim, ``(B,)``, and latent variables."""
        is_first = step < self._config.pretraining_steps
        t_min = None if is_first else self._config.training.t_min
        bound, z0 = negative_evidence_lower_bound(model, batch, generator, t_min, kl_share)
        return bit_per_dim(batch.images) * bound, z0
