"""Latent spaces of images: variational autoencoders and the distributions of their pixels.

A `VAE` encodes an image as a Gaussian `Posterior` over latent maps. It decodes a latent map to the
parameters of a distribution of the pixels, `DiscretisedLogistic` or `Bernoulli`. Images are numbers
in [−1, 1]: `to_unit` maps level j of L grey levels to 2j/(L − 1) − 1.
"""

from cldsde.images.latent.likelihoods import (
    Bernoulli,
    DiscretisedLogistic,
    PixelLikelihood,
    soft_clamp,
)
from cldsde.images.latent.vae import VAE, Posterior

__all__ = ["VAE", "Bernoulli", "DiscretisedLogistic", "PixelLikelihood", "Posterior", "soft_clamp"]
