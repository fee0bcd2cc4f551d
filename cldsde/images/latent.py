"""Latent models: a variational autoencoder, distributions of pixels, and the bound to train with.

With the encoder's q(z | x), a prior p(z) and the decoder's distribution p(x | z) of the pixels,

    log p(x) ≥ E_q log p(x | z) − KL(q(z | x) ‖ p(z)) = E_q log p(x | z) + H(q) − CE(q ‖ p).

Images are numbers in [−1, 1]: level j of L grey levels is x_j = 2j/(L − 1) − 1. Log-likelihoods are
in nats, summed over pixels, which are independent given z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.nn import functional as F

from cldsde.images.checks import check_groups, check_levels
from cldsde.images.schema import Levels, section
from cldsde.images.training_config import LatentConfig
from cldsde.linear.blocks import exponential_rest
from cldsde.linear.random import Generators, standard_normal
from cldsde.score import PerturbedData, cross_entropy

if TYPE_CHECKING:
    from cldsde.images.model import DiffusionModel

# The floor of log s in the code of Salimans et al. (2017): a ninth of a bin of bytes.
_LOG_SCALE_BOUND = 7.0
# Bound on the posterior's mean and on the logarithm of its standard deviation: neither it nor its
# divergence from the prior can diverge in training.
_BOUND = 5.0


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """Bound numbers smoothly, b tanh(x/b): slope 1 at 0, and within ±b (Vahdat and Kautz 2020)."""
    return bound * torch.tanh(x / bound)


@section
class DiscretisedLogistic:
    r"""A logistic distribution of mean μ and scale s, cut into one bin per grey level.

    .. math::
        P(x_j) = σ\Big(\frac{x_j + h - μ}{s}\Big) - σ\Big(\frac{x_j - h - μ}{s}\Big), \qquad
        h = \frac{1}{L - 1}

    The bins of the first and the last level extend to ∓∞, so that the sum over levels is 1. The
    first C channels of the output are μ; the others, bounded by ±7 (`soft_clamp`), are log s.

    Notes
    -----
    A logarithm of a probability in single precision, u = 2⁻²⁴, has an error of at most
    ``24u |log P| + 4u (1 + (1 + |μ|)/s)``.

    References
    ----------
    D. P. Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016.
    T. Salimans et al., *PixelCNN++*, 2017, eq. 2, of which this is a single component.
    """

    levels: Levels = 256  # over which probabilities sum to 1
    width = 2  # channels of the output per channel of the images

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of images ``(B, C, H, W)``, ``(B,)``; its gradient is finite."""
        mean, scale = self._parameters(output)
        half = 1 / (self.levels - 1)
        centred = x - mean
        above, below = (centred + half) / scale, (centred - half) / scale
        first, last = x < half - 1, x > 1 - half
        # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b−a}): none of its logarithms is positive, so that
        # nothing cancels, and at an open end two of them vanish.
        log_p = F.logsigmoid(above).masked_fill(last, 0.0)
        log_p = log_p + F.logsigmoid(-below).masked_fill(first, 0.0)
        width = torch.log(-torch.expm1(-2 * half / scale))
        return total(log_p + width.masked_fill(first | last, 0.0))

    def mean(self, output: Tensor) -> Tensor:
        """Mean image, ``(B, C, H, W)`` in [−1, 1]: not μ near ±1 and in narrow bins."""
        mean, scale = self._parameters(output)
        # E j = Σ_j P(level > j), a sum of numbers that are not negative.
        level = torch.zeros_like(mean)
        for j in range(self.levels - 1):
            edge = (2 * j + 1) / (self.levels - 1) - 1
            level += torch.sigmoid((mean - edge) / scale)
        return 2 * (level / (self.levels - 1)) - 1  # in the order of `to_unit`

    def _parameters(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = fine(output).chunk(2, dim=1)
        return mean, soft_clamp(log_scale, _LOG_SCALE_BOUND).exp()


@dataclass(frozen=True)
class Bernoulli:
    r"""Black or white pixels, white with probability π; the output is the logit of π.

    .. math::
        \log p(x) = w \log π + (1 - w) \log(1 - π), \qquad w = \frac{x + 1}{2}

    A grey level w is read as the probability of white; over more than two levels the sum is not 1.
    A logarithm in single precision, u = 2⁻²⁴, has an error of at most ``16u |log p| + u |logit|``.
    """

    levels = 2
    width = 1

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of images ``(B, C, H, W)``, ``(B,)``; its gradient is finite."""
        output, white = fine(output), (fine(x) + 1) / 2
        # Neither term is positive, whereas the library's cross-entropy subtracts.
        return total(white * F.logsigmoid(output) + (1 - white) * F.logsigmoid(-output))

    def mean(self, output: Tensor) -> Tensor:
        """Mean image 2π − 1."""
        return torch.tanh(fine(output) / 2)


def fine(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total(terms: Tensor) -> Tensor:
    """Sums over each image or latent map, ``(B,)``."""
    sums: Tensor = terms.flatten(1).sum(1)
    return sums


class Posterior(NamedTuple):
    """q(z | x): independent normals ``(B, *D)``; logarithms are in nats, summed per image."""

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: Generators | None = None) -> Tensor:
        """Sample z = μ + σ n; several generators each serve an even share of the batch."""
        kind: Any = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = standard_normal(self.mean.shape, generator=generator, **kind)
        return self.mean + self.log_std.exp() * noise

    def entropy(self) -> Tensor:
        """H(q) = −E log q(z | x), ``(B,)``."""
        return total(self.log_std + 0.5 * math.log(2 * math.pi * math.e))

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q ‖ N(0, I)) = ½ Σ (μ² + σ² − 1 − log σ²), ``(B,)``; no term is negative."""
        return total(0.5 * (self.mean.square() + exponential_rest(-2 * self.log_std)))


class VAE(nn.Module):
    """A variational autoencoder of residual convolutional blocks, without attention.

    It encodes an image of ``shape`` (C, H, W) as a Gaussian `Posterior` over latent maps,
    ``(latent_channels, H/2ⁿ⁻¹, W/2ⁿ⁻¹)`` for n ``channels``, and decodes a latent map to the
    parameters of a distribution of the pixels: `DiscretisedLogistic` of ``levels``, or `Bernoulli`.

    References
    ----------
    A. Vahdat and J. Kautz, *NVAE: a deep hierarchical variational autoencoder*, 2020. A. Vahdat,
    K. Kreis and J. Kautz, *Score-based generative modeling in latent space*, 2021.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, config: LatentConfig) -> None:
        check_levels(shape, config.channels)
        check_groups(config.groups, config.channels)
        super().__init__()
        data, height, width = shape
        latent, factor = config.latent_channels, 2 ** (len(config.channels) - 1)
        self.latent_shape = (latent, height // factor, width // factor)
        logistic = config.likelihood == "logistic"
        self.likelihood = DiscretisedLogistic(levels=levels) if logistic else Bernoulli()
        sizes: Any = {"block_out_channels": config.channels, "layers_per_block": config.blocks}
        sizes |= {"norm_num_groups": config.groups, "mid_block_add_attention": False}
        down = ("DownEncoderBlock2D",) * len(config.channels)
        up = ("UpDecoderBlock2D",) * len(config.channels)
        self.encoder = Encoder(data, latent, down, double_z=True, **sizes)
        self.decoder = Decoder(latent, self.likelihood.width * data, up, **sizes)

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) of images ``(B, C, H, W)`` in [−1, 1], its parameters float32 and within ±5."""
        out: Tensor = self.encoder(x)
        # Under autocast the network returns half precision.
        return Posterior(*soft_clamp(fine(out), _BOUND).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Parameters ``(B, likelihood.width · C, H, W)`` of the distribution of the pixels."""
        out: Tensor = self.decoder(z)
        return out

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-likelihood of each image given its latent map in nats, ``(B,)``."""
        return self.likelihood.log_likelihood(self.decode(z), x)

    def images(self, z: Tensor) -> Tensor:
        """Mean images of latent maps, ``(B, C, H, W)`` in [−1, 1]."""
        return self.likelihood.mean(self.decode(z))


class Batch(NamedTuple):
    """Images in [−1, 1] ``(B, C, H, W)``, their classes ``(B,)``, and times of samplers.

    Times and the weights that divide by their density are ``(samplers, 2, B)``.
    """

    images: Tensor
    labels: Tensor | None
    times: Tensor


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
