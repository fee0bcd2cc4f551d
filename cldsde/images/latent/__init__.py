"""Latent spaces of images: laws of pixels, given what a decoder returns.

Images are numbers in [−1, 1], level j of L grey levels being 2j/(L − 1) − 1, as
`cldsde.images.data.to_unit` makes them.
"""

from cldsde.images.latent.likelihoods import Bernoulli, DiscretisedLogistic, PixelLikelihood
from cldsde.images.latent.soft_clamp import soft_clamp

__all__ = ["Bernoulli", "DiscretisedLogistic", "PixelLikelihood", "soft_clamp"]
