"""Laws of the pixels of an image, given what a decoder returns for it.

Images are numbers in [−1, 1]: level j of L grey levels is x_j = 2j/(L − 1) − 1. Given the decoder's
output, numbers of an image are independent, so that log-likelihoods are sums, in nats.

Computations are in single precision at least, whatever the dtype of the output, and no method waits
for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cldsde.images.data.checks import as_whole
from cldsde.images.latent.soft_clamp import soft_clamp

# The floor of log s in the code of Salimans et al. (2017): a ninth of a bin of bytes.
_LOG_SCALE_BOUND = 7.0


class PixelLikelihood(Protocol):
    """A law of images ``(B, C, H, W)`` whose parameters are the output of a decoder."""

    @property
    def levels(self) -> int:
        """Number of grey levels of the images over which its probabilities sum to 1."""
        ...

    def channels(self, data: int) -> int:
        """Channels of the output for images of ``data`` channels."""
        ...

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood in nats, summed over the image, ``(B,)``."""
        ...

    def mean(self, output: Tensor) -> Tensor:
        """Mean image, ``(B, C, H, W)`` in [−1, 1]."""
        ...

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images ``(B, C, H, W)`` drawn from the law: grey levels as numbers in [−1, 1]."""
        ...


@dataclass(frozen=True)
class DiscretisedLogistic:
    r"""A logistic law of mean μ and scale s, cut into one bin for each grey level.

    .. math::
        P(x_j) = σ\Big(\frac{x_j + h - μ}{s}\Big) - σ\Big(\frac{x_j - h - μ}{s}\Big), \qquad
        h = \frac{1}{L - 1}

    where the bins of the first and the last level extend to ∓∞, so that the sum over levels is 1.
    The first C channels of the output are μ; the others, bounded smoothly by ±7 (`soft_clamp`), are
    log s.

    Parameters
    ----------
    levels
        Number L of grey levels, 2 … 256.

    Raises
    ------
    TypeError
        If ``levels`` is no whole number.
    ValueError
        If it is out of range.

    Notes
    -----
    A logarithm of a probability in single precision, u = 2⁻²⁴, has an error of at most
    ``24u |log P| + 4u (1 + (1 + |μ|)/s)``. The first part is that of s and of elementary functions;
    the second is the rounding of x and of differences from it, seen in units of s: with μ in
    [−1, 1] at most 6e-4 nats for the narrowest scale, s = e⁻⁷, and 2e-6 for s = 0.3.

    References
    ----------
    D. P. Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016.
    T. Salimans et al., *PixelCNN++*, 2017, eq. 2, of which this is a single component.

    Examples
    --------
    >>> law = DiscretisedLogistic(levels=3)
    >>> x = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    >>> law.log_likelihood(torch.zeros(3, 2, 1, 1), x).exp()
    tensor([0.3775, 0.2449, 0.3775])
    """

    levels: int = 256

    def __post_init__(self) -> None:
        as_whole(self.levels, "levels", 2, 256)

    def channels(self, data: int) -> int:
        """Channels of the output for images of ``data`` channels: 2C."""
        return 2 * data

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood in nats, summed over the image.

        Parameters
        ----------
        output
            ``(B, 2C, H, W)``: means, then log-scales before they are bounded.
        x
            Images ``(B, C, H, W)``, each number a grey level 2j/(L − 1) − 1.

        Returns
        -------
        Tensor
            ``(B,)``, float32 at least. Its gradient is finite.

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        _check_output(output, x, self.channels(x.shape[1]))
        mean, scale = self._parameters(output)
        half = 1 / (self.levels - 1)
        centred = x - mean
        above, below = (centred + half) / scale, (centred - half) / scale
        first, last = x < half - 1, x > 1 - half
        # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b−a}): of its logarithms none is positive, so that
        # nothing cancels, and at an open end two of them vanish.
        log_p = F.logsigmoid(above).masked_fill(last, 0.0)
        log_p = log_p + F.logsigmoid(-below).masked_fill(first, 0.0)
        width = torch.log(-torch.expm1(-2 * half / scale))
        return _total(log_p + width.masked_fill(first | last, 0.0))

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the discretised law, which differs from μ near ±1 and within narrow bins.

        Parameters
        ----------
        output
            ``(B, 2C, H, W)``.

        Returns
        -------
        Tensor
            ``(B, C, H, W)`` in [−1, 1], float32 at least.
        """
        mean, scale = self._parameters(output)
        # E j = Σ_j P(level > j), a sum of numbers that are not negative.
        level = torch.zeros_like(mean)
        for j in range(self.levels - 1):
            edge = (2 * j + 1) / (self.levels - 1) - 1
            level += torch.sigmoid((mean - edge) / scale)
        return self._unit(level)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images: logistic numbers, rounded to the nearest level.

        Parameters
        ----------
        output
            ``(B, 2C, H, W)``.
        generator
            Source of B·C·H·W uniform numbers, drawn on its device.

        Returns
        -------
        Tensor
            ``(B, C, H, W)``, float32 at least.
        """
        mean, scale = self._parameters(output)
        # A uniform number may be 0; its logit −∞ goes to the first level.
        x = mean + scale * _uniform(mean, generator).logit()
        level = ((x + 1) / 2 * (self.levels - 1)).round().clamp(0, self.levels - 1)
        return self._unit(level)

    def _parameters(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = _fine(output).chunk(2, dim=1)
        return mean, soft_clamp(log_scale, _LOG_SCALE_BOUND).exp()

    def _unit(self, level: Tensor) -> Tensor:
        # In the order of `to_unit`, to the same bits.
        return 2 * level / (self.levels - 1) - 1


@dataclass(frozen=True)
class Bernoulli:
    r"""Black or white pixels, white with probability π, of which the output is the logit.

    .. math::
        \log p(x) = w \log π + (1 - w) \log(1 - π), \qquad w = \frac{x + 1}{2}

    For black and white images, of 2 levels, this is their log-likelihood. A grey level w in between
    is read as the probability of white: then it is the expected log-likelihood of the image with
    its pixels drawn black or white. That can be trained with, but over all grey levels it does not
    sum to 1, and no bound on their bits follows from it.

    Notes
    -----
    A logarithm in single precision, u = 2⁻²⁴, has an error of at most
    ``16u |log p| + u |logit|``. The second part is the rounding of w, and vanishes for black and
    white.

    Examples
    --------
    >>> x = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    >>> Bernoulli().log_likelihood(torch.ones(3, 1, 1, 1), x)
    tensor([-1.3133, -0.8133, -0.3133])
    """

    @property
    def levels(self) -> int:
        """Number of grey levels: 2."""
        return 2

    def channels(self, data: int) -> int:
        """Channels of the output for images of ``data`` channels: C."""
        return data

    def log_likelihood(self, output: Tensor, x: Tensor) -> Tensor:
        """Expected log-likelihood in nats, summed over the image.

        Parameters
        ----------
        output
            Logits ``(B, C, H, W)``.
        x
            Images ``(B, C, H, W)`` in [−1, 1].

        Returns
        -------
        Tensor
            ``(B,)``, float32 at least. Its gradient is finite.

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        _check_output(output, x, self.channels(x.shape[1]))
        logit, white = _fine(output), (_fine(x) + 1) / 2
        # Neither term is positive. The cross-entropy of the library subtracts to the same end.
        return _total(white * F.logsigmoid(logit) + (1 - white) * F.logsigmoid(-logit))

    def mean(self, output: Tensor) -> Tensor:
        """Mean image 2π − 1.

        Parameters
        ----------
        output
            ``(B, C, H, W)``.

        Returns
        -------
        Tensor
            ``(B, C, H, W)`` in [−1, 1], float32 at least.
        """
        return torch.tanh(_fine(output) / 2)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw black and white images.

        Parameters
        ----------
        output
            ``(B, C, H, W)``.
        generator
            Source of B·C·H·W uniform numbers, drawn on its device.

        Returns
        -------
        Tensor
            ``(B, C, H, W)``, each number −1 or 1, float32 at least.
        """
        probability = torch.sigmoid(_fine(output))
        white = _uniform(probability, generator) < probability
        return 2 * white.to(probability.dtype) - 1


def _fine(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _total(log_p: Tensor) -> Tensor:
    total: Tensor = log_p.flatten(1).sum(1)
    return total


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the generator's device."""
    source = like.device if generator is None else generator.device
    draws = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=source)
    return draws.to(like.device)


def _check_output(output: Tensor, x: Tensor, channels: int) -> None:
    wanted = (len(x), channels, *x.shape[2:])
    if output.shape != wanted:
        msg = (
            f"output must have shape {wanted} for images of shape {tuple(x.shape)}; got "
            f"{tuple(output.shape)}"
        )
        raise ValueError(msg)
