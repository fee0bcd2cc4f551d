"""The evidence lower bound of a latent model, and batches of images and times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cldsde.linear.random import Generators
from cldsde.score import PerturbedData, cross_entropy

if TYPE_CHECKING:
    from cldsde.images.model import DiffusionModel


class Times(NamedTuple):
    """Times ``(B,)``, float64 on the CPU, and the weights that divide by their density."""

    t: Tensor
    weight: Tensor

    def take(self, rows: slice | Tensor) -> Times:
        """Times of some images."""
        return Times(self.t[rows], self.weight[rows])


class Batch(NamedTuple):
    """Images in [−1, 1] ``(B, C, H, W)``, their classes ``(B,)``, and times by each sampler."""

    images: Tensor
    labels: Tensor | None
    times: tuple[Times, ...]


def bit_per_dim(images: Tensor) -> float:
    """Bits per dim of one nat per image ``(B, C, H, W)``."""
    return 1 / (math.prod(images.shape[1:]) * math.log(2))


def negative_evidence_lower_bound(
    model: DiffusionModel,
    batch: Batch,
    generator: Generators,
    t_min: float | None,
    kl_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of a latent model's bound on −log p(x), ``(B,)`` nats; latent variables.

    The prior's process ends at ``t_min``; None takes a standard normal prior, whose divergence is
    multiplied by ``kl_share``.
    """
    vae, score = model.vae, model.score
    assert vae is not None
    posterior = vae.encode(batch.images)
    z0 = posterior.sample(generator)
    reconstruction = -vae.log_likelihood(batch.images, z0)
    if t_min is None:
        return reconstruction + kl_share * posterior.kl_to_standard_normal(), z0
    t, weight = batch.times[1]
    pair = PerturbedData.draw(score.sde, z0, t, generator=generator)
    losses = score.loss(pair, weighting="likelihood", condition=batch.labels)
    prior = cross_entropy(pair, losses, weight, t_min=t_min, of="data")
    return reconstruction - posterior.entropy() + prior, z0
