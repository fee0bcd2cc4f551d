"""A convolutional variational autoencoder, made of parts of the library diffusers.

The encoder returns a Gaussian `Posterior` q(z | x) over maps z of latent channels. The decoder
returns the parameters of a distribution p(x | z) of the image. With a prior p(z),

    log p(x) ≥ E_q log p(x | z) − KL(q(z | x) ‖ p(z)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from cldsde.images.checks import check_groups, check_levels
from cldsde.images.latent.likelihoods import (
    Bernoulli,
    DiscretisedLogistic,
    fine,
    soft_clamp,
    total,
)
from cldsde.images.schema import Channels, Count, Levels, Shape, checked
from cldsde.linear.elementary import exponential_rest
from cldsde.linear.random import Generators, standard_normal

# Bound on the posterior's mean and on the logarithm of its standard deviation.
_BOUND = 5.0


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

    Images are ``(C, H, W)`` of ``levels`` grey levels, H and W divisible by 2 to the number of
    levels of the network less one. ``channels`` are those of each level, from full resolution down,
    halving H and W; each of the ``groups`` of the normalisation has two or more. The decoder has
    one residual block more per level than the encoder, ``blocks``. Latent maps have the shape
    ``latent_shape`` = ``(latent_channels, h, w)``. The ``likelihood`` is "logistic",
    `DiscretisedLogistic`, or "bernoulli", `Bernoulli`: a distribution of images of two levels, and
    only an objective for others.

    Notes
    -----
    Mean and log standard deviation of the posterior are bounded smoothly, both by ±5
    (`soft_clamp`): neither the posterior nor its divergence from the prior can diverge in training.

    References
    ----------
    A. Vahdat and J. Kautz, *NVAE: a deep hierarchical variational autoencoder*, 2020. A. Vahdat,
    K. Kreis and J. Kautz, *Score-based generative modeling in latent space*, 2021.

    Examples
    --------
    >>> vae = VAE((1, 28, 28), 256, channels=(16, 32))
    >>> x = torch.zeros(5, 1, 28, 28)
    >>> z = vae.encode(x).sample()
    >>> z.shape, vae.log_likelihood(x, z).shape, vae.images(z).shape
    (torch.Size([5, 4, 14, 14]), torch.Size([5]), torch.Size([5, 1, 28, 28]))
    """

    @checked
    def __init__(
        self,
        shape: Shape,
        levels: Levels,
        *,
        latent_channels: Count = 4,
        channels: Channels = (32, 64),
        blocks: Count = 1,
        groups: Count = 8,
        likelihood: Literal["logistic", "bernoulli"] = "logistic",
    ) -> None:
        check_levels(shape, channels)
        check_groups(groups, channels)
        super().__init__()
        data, height, width = shape
        factor = 2 ** (len(channels) - 1)
        self.shape = (data, height, width)
        self.latent_shape = (latent_channels, height // factor, width // factor)
        logistic = likelihood == "logistic"
        self.likelihood = DiscretisedLogistic(levels=levels) if logistic else Bernoulli()
        sizes: Any = {"block_out_channels": tuple(channels), "layers_per_block": blocks}
        sizes |= {"norm_num_groups": groups, "mid_block_add_attention": False}
        down, up = (f"{kind}Block2D" for kind in ("DownEncoder", "UpDecoder"))
        kinds = {"down_block_types": (down,) * len(channels), "double_z": True}
        self.encoder = Encoder(data, latent_channels, **kinds, **sizes)
        width, kinds = self.likelihood.width, {"up_block_types": (up,) * len(channels)}
        self.decoder = Decoder(latent_channels, width * data, **kinds, **sizes)

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x) of images ``(B, C, H, W)`` in [−1, 1], its parameters float32 and within ±5."""
        _check_shape(x, self.shape, "x")
        out: Tensor = self.encoder(x)
        # Under autocast the network returns half precision.
        return Posterior(*soft_clamp(fine(out), _BOUND).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """Parameters ``(B, likelihood.width · C, H, W)`` of the distribution of the pixels."""
        _check_shape(z, self.latent_shape, "z")
        out: Tensor = self.decoder(z)
        return out

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-likelihood of each image given its latent map in nats, ``(B,)``."""
        return self.likelihood.log_likelihood(self.decode(z), x)

    def images(self, z: Tensor) -> Tensor:
        """Mean images of latent maps, ``(B, C, H, W)`` in [−1, 1]."""
        return self.likelihood.mean(self.decode(z))


def _check_shape(x: Tensor, shape: Sequence[int], name: str) -> None:
    if x.shape[1:] != torch.Size(shape):
        wanted = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name} must have shape (B, {wanted}); got {tuple(x.shape)}")
