"""Distributions of the pixels of an image, given the output of a decoder.

Images are numbers in [−1, 1]: level j of L grey levels is x_j = 2j/(L − 1) − 1. Given the decoder's
output, the numbers of an image are independent, so that log-likelihoods are sums, in nats.
Computations are in single precision at least, and no method waits for a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cldsde.images.schema import Levels, section

# The floor of log s in the code of Salimans et al. (2017): a ninth of a bin of bytes.
_LOG_SCALE_BOUND = 7.0


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """Bound numbers smoothly, b tanh(x/b): slope 1 at 0, and within ±b (Vahdat and Kautz 2020)."""
    return bound * torch.tanh(x / bound)


class PixelLikelihood(ABC):
    """A distribution of images ``(B, C, H, W)`` whose parameters are the output of a decoder.

    ``levels`` is the number of grey levels over which its probabilities sum to 1. ``width`` is the
    number of channels of the output for each channel of the images.
    """

    levels: int
    width: int

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood in nats, summed over the image, ``(B,)``; raise if shapes do not fit."""
        wanted = (len(x), self.width * x.shape[1], *x.shape[2:])
        if output.shape != wanted:
            msg = f"output must have shape {wanted} for images of shape {tuple(x.shape)}; got "
            raise ValueError(f"{msg}{tuple(output.shape)}")
        return total(self._log_p(fine(output), x))

    @abstractmethod
    def _log_p(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of each number; the gradient is finite."""

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """Mean image, ``(B, C, H, W)`` in [−1, 1], float32 at least."""


@section
class DiscretisedLogistic(PixelLikelihood):
    r"""A logistic distribution of mean μ and scale s, cut into one bin per grey level.

    .. math::
        P(x_j) = σ\Big(\frac{x_j + h - μ}{s}\Big) - σ\Big(\frac{x_j - h - μ}{s}\Big), \qquad
        h = \frac{1}{L - 1}

    The bins of the first and the last level extend to ∓∞, so that the sum over levels is 1. The
    first C channels of the output are μ; the others, bounded by ±7 (`soft_clamp`), are log s.

    Notes
    -----
    A logarithm of a probability in single precision, u = 2⁻²⁴, has an error of at most
    ``24u |log P| + 4u (1 + (1 + |μ|)/s)``. The first part comes from s and elementary functions,
    the second from the rounding of x and of differences from it, in units of s.

    References
    ----------
    D. P. Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016.
    T. Salimans et al., *PixelCNN++*, 2017, eq. 2, of which this is a single component.

    Examples
    --------
    >>> pixels = DiscretisedLogistic(levels=3)
    >>> x = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    >>> pixels.log_likelihood(torch.zeros(3, 2, 1, 1), x).exp()
    tensor([0.3775, 0.2449, 0.3775])
    """

    levels: Levels = 256
    width = 2

    def _log_p(self, output: Tensor, x: Tensor) -> Tensor:
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
        return log_p + width.masked_fill(first | last, 0.0)

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the discretised distribution, which differs from μ near ±1 and in narrow bins."""
        mean, scale = self._parameters(output)
        # E j = Σ_j P(level > j), a sum of numbers that are not negative.
        level = torch.zeros_like(mean)
        for j in range(self.levels - 1):
            edge = (2 * j + 1) / (self.levels - 1) - 1
            level += torch.sigmoid((mean - edge) / scale)
        return 2 * level / (self.levels - 1) - 1  # in the order of `to_unit`, to the same bits

    def _parameters(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = fine(output).chunk(2, dim=1)
        return mean, soft_clamp(log_scale, _LOG_SCALE_BOUND).exp()


@dataclass(frozen=True)
class Bernoulli(PixelLikelihood):
    r"""Black or white pixels, white with probability π; the output is the logit of π.

    .. math::
        \log p(x) = w \log π + (1 - w) \log(1 - π), \qquad w = \frac{x + 1}{2}

    For images of 2 levels this is their log-likelihood. A grey level w is read as the probability
    of white: that can be trained with, but it does not sum to 1 over all grey levels, and no bound
    on their bits follows from it. A logarithm in single precision, u = 2⁻²⁴, has an error of at
    most ``16u |log p| + u |logit|``.
    """

    levels = 2
    width = 1

    def _log_p(self, output: Tensor, x: Tensor) -> Tensor:
        white = (fine(x) + 1) / 2
        # Neither term is positive, whereas the library's cross-entropy subtracts.
        return white * F.logsigmoid(output) + (1 - white) * F.logsigmoid(-output)

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
