"""Importance sampling of training times, and densities to sample them from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cldsde.linear.checks import as_number, as_times, check_between, check_positive
from cldsde.linear.random import check_generator
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import Conditioning, WhitenedKernel, whiten
from cldsde.score.matching import Weighting, likelihood_rows, optimal_loss

_KNOTS = 2001


class TimeSampler:
    """Importance sampler of training times: draws times from a density, with weights.

    The mean of weight · loss is an unbiased estimate of the mean loss over times uniform on
    [t_min, 1], for any loss.

    The density is tabulated at 2,001 times uniform in log t. The density of the draws is constant
    between these knots, and the weights belong to this density exactly. Each interval between knots
    gets at least 1e-13 of the draws.

    Parameters
    ----------
    density
        Function of float64 times ``(n,)`` that returns values ``(n,)``, finite and positive, at
        both ends also 0. It need not be normalised. The best density is the root of the loss's
        second moment at each time. A density proportional to the loss makes the expected weighted
        loss constant in time. Other values raise a ValueError.
    t_min
        Smallest time, in (0, ½]; ValueError otherwise.

    Examples
    --------
    >>> import torch
    >>> sampler = TimeSampler(lambda t: 1 / t, t_min=1e-3)
    >>> t, weight = sampler.sample(1000, generator=torch.Generator().manual_seed(0))
    >>> f"{t.median():.2f}, {(weight * t).mean():.2f}"  # uniform in log t; E t of a uniform t
    '0.03, 0.50'
    """

    def __init__(self, density: Callable[[Tensor], Tensor], t_min: float) -> None:
        check_between(t_min, 1e-300, 0.5, "t_min")
        self._knots = torch.logspace(
            math.log10(t_min), 0, _KNOTS, dtype=torch.float64, device="cpu"
        )
        self._knots[0], self._knots[-1] = t_min, 1.0
        values = torch.as_tensor(density(self._knots), dtype=torch.float64, device="cpu")
        fits = values.shape == self._knots.shape and bool((values.isfinite() & (values >= 0)).all())
        # The density may be zero at an end, as the best loss is if nothing of the data is left.
        if not fits or not bool((values[1:-1] > 0).all()):
            raise ValueError(
                "density must return one finite, positive value per time, shape "
                f"{tuple(self._knots.shape)}; got shape {tuple(values.shape)} and values {values}"
            )
        widths = self._knots.diff()
        mass = 0.5 * (values[1:] + values[:-1]) * widths
        # A smaller mass would be lost in sums near 1, and a time without mass has no weight.
        mass = mass.clamp_min(1e-13 * float(mass.sum()))
        self._cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
        self._cumulative[-1] = 1.0
        self._weights = widths / self._cumulative.diff() / (1 - t_min)

    @classmethod
    def importance(
        cls,
        sde: LinearSDE,
        t_min: float,
        *,
        data_variance: float = 1.0,
        conditioning: Conditioning = "data",
        weighting: Weighting = "reweighted",
    ) -> TimeSampler:
        """Importance sampler for Gaussian data: the density is the loss of the best score.

        See `cldsde.score.optimal_loss` for the arguments.
        """
        density = partial(
            optimal_loss,
            sde,
            data_variance=data_variance,
            conditioning=conditioning,
            weighting=weighting,
        )
        return cls(density, t_min)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` times, one in each n-th of the distribution, and their weights.

        Both are ``(n,)`` float64 on the CPU. The order of the strata is random, so each time by
        itself has the density.
        """
        check_generator(generator, several=False)
        device = torch.device("cpu") if generator is None else generator.device
        precision = torch.float32 if device.type == "mps" else torch.float64
        shift = torch.rand(n, generator=generator, dtype=precision, device=device).cpu().double()
        part = torch.randperm(n, generator=generator, device=device).cpu()
        return self.quantiles((part + shift) / n)

    def quantiles(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles of the times at u ∈ [0, 1], and their weights; ValueError for other numbers."""
        if not bool(((u >= 0) & (u <= 1)).all()):
            msg = f"u must lie in [0, 1]; got values from {float(u.min()):g} to {float(u.max()):g}"
            raise ValueError(msg)
        bins = torch.searchsorted(self._cumulative, u, right=True) - 1
        bins = bins.clamp(0, len(self._weights) - 1)
        start, end = self._cumulative[bins], self._cumulative[bins + 1]
        fraction = (u - start) / (end - start)
        return self._knots[bins].lerp(self._knots[bins + 1], fraction), self._weights[bins]


def kappa_density(
    sde: LinearSDE, *, mean: float = 1.2, std: float = 1.2
) -> Callable[[Tensor], Tensor]:
    r"""EDM's density of training times: κ = ½ log SNR is normally distributed.

    For any noise schedule, with κ(t) = ½ log ψᵀΣ⁻¹ψ (`LinearSDE.kappa`),

    .. math:: p(t) = N(κ(t);\ \text{mean}, \text{std}^2)\,|\dot κ(t)|, \qquad
              −\dot κ = \frac{|G^⊤ Σ^{−1} ψ|^2}{2\,ψ^⊤ Σ^{−1} ψ}.

    Parameters
    ----------
    mean, std
        Mean and standard deviation of κ = −log σ with the noise level σ. The defaults are from
        Karras et al. (2022, table 1), who train on images in [−1, 1] with a standard deviation of
        about ½. For data with standard deviation s take mean − log 2s. If ``std`` is not positive
        or a number is not finite, a ValueError is raised.

    Returns
    -------
    callable
        Function of float64 times of any shape in (0, 1] that returns values of that shape. Use it
        with `TimeSampler`, and with `MixedScore.kappa_weighting` for a loss by noise levels.
    """
    check_process(sde)
    check_normal(mean, std)
    return partial(_kappa_normal, sde=sde, mean=mean, std=std)


def _kappa_normal(t: Tensor, sde: LinearSDE, mean: float, std: float) -> Tensor:
    times = as_times(t, "t")
    return normal_kappa(sde, whiten(sde, sde.marginal(times), times), mean, std)


def normal_kappa(sde: LinearSDE, whitened: WhitenedKernel, mean: float, std: float) -> Tensor:
    """The density of `kappa_density` at times whose whitened kernel is known."""
    information = whitened.information()
    driven = whitened.signal[..., -len(sde.driven) :, :]
    pulled = likelihood_rows(sde, whitened) @ driven
    rate = pulled.square().sum((-2, -1)) / torch.where(information == 0, 1.0, 2 * information)
    return rate * _normal(0.5 * information.log(), mean, std)


def logit_normal_density(*, mean: float = 0.0, std: float = 1.0) -> Callable[[Tensor], Tensor]:
    r"""Density of times whose logit log t/(1 − t) is normal (Esser et al. 2024, equation 19).

    For `cldsde.RectifiedFlow` the logit is −κ, so the density equals `kappa_density` with the
    mean −``mean``.

    Parameters
    ----------
    mean, std
        Mean and standard deviation of the logit. A negative mean prefers times near the data. See
        `kappa_density` for the result and errors.
    """
    check_normal(mean, std)
    return partial(_logit_normal, mean=mean, std=std)


def _logit_normal(t: Tensor | float, mean: float, std: float) -> Tensor:
    times = as_times(t, "t").clamp(1e-12, 1 - 1e-12)
    return _normal(times.logit(), mean, std) / (times * (1 - times))


def mode_density(scale: float = 1.29) -> Callable[[Tensor], Tensor]:
    r"""Density of times with a mode in the middle and heavy tails (Esser et al. 2024, equation 20).

    Times are t = 1 − u − s (cos²(πu/2) − 1 + u) of a uniform u.

    Parameters
    ----------
    scale
        s in (−1, 2/(π − 2)), ValueError otherwise. 0 is uniform; a positive s prefers the middle, a
        negative s the ends. See `kappa_density` for the result; times 0 are allowed.
    """
    check_between(scale, -1 + 1e-9, 2 / (math.pi - 2) - 1e-9, "scale")
    return partial(_mode, scale=scale)


def _mode(t: Tensor | float, scale: float) -> Tensor:
    times = as_times(t, "t")
    low, high = torch.zeros_like(times), torch.ones_like(times)
    for _ in range(60):  # bisection; t decreases with u
        u = (low + high) / 2
        curve = (math.pi / 2 * u).cos().square() - 1 + u
        above = 1 - u - scale * curve > times
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    u = (low + high) / 2
    return 1 / (1 + scale * (1 - math.pi / 2 * (math.pi * u).sin()))


def check_normal(mean: float, std: float) -> None:
    """Raise ValueError unless the numbers are the moments of a normal distribution."""
    check_positive(std, "std")
    if not math.isfinite(as_number(mean, "mean")):
        raise ValueError(f"mean must be finite; got {mean!r}")


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    """Normal density, clamped at 30 standard deviations, because weights divide by it."""
    distance = ((x - mean) / std).clamp(-30, 30)
    return torch.exp(-0.5 * distance.square()) / (std * math.sqrt(2 * math.pi))
