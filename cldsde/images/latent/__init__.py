"""Latent spaces of images: variational autoencoders and the laws of their pixels.

A `VAE` encodes an image as a Gaussian `Posterior` over latent maps, and decodes a latent map into
the parameters of a law of the pixels, `DiscretisedLogistic` or `Bernoulli`. Images are numbers in
[−1, 1], level j of L grey levels being 2j/(L − 1) − 1, as `cldsde.images.data.to_unit` makes them.
"""

from cldsde.images.latent.likelihoods import Bernoulli, DiscretisedLogistic, PixelLikelihood
from cldsde.images.latent.soft_clamp import soft_clamp
from cldsde.images.latent.vae import VAE, Posterior

__all__ = [
    "VAE",
    "Bernoulli",
    "DiscretisedLogistic",
    "PixelLikelihood",
    "Posterior",
    "soft_clamp",
]
