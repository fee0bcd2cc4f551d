"""Interpolants as processes: rectified flow, the cosine path, and tables of ``alphas_cumprod``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import safe_sqrt
from cldsde.linear.checks import as_float64, check_alphas_cumprod
from cldsde.linear.sde import LinearSDE
from cldsde.linear.signal_noise import SignalNoiseDynamics


class RectifiedFlow(LinearSDE):
    r"""Rectified flow, the linear interpolant of flow matching: x_t = (1 − t) x_0 + t n.

    The SDE with these marginals (Liu et al. 2023) is

    .. math:: dx = −\frac{x}{1 − t}\,dt + \sqrt{\frac{2t}{1 − t}}\,dw.

    The prior is N(0, 1). Drift and diffusion diverge at t = 1, but distributions are finite there.
    `ExponentialMultistep` can start at t = 1 if the score predicts the data, and other solvers at
    `LinearSDE.regular_until`. ``ExponentialMultistep(order=1)`` is Euler's method for the
    flow-matching ODE.

    References
    ----------
    X. Liu, C. Gong and Q. Liu, *Flow straight and fast*, 2023; Y. Lipman et al., *Flow matching for
    generative modeling*, 2023; N. Ma et al., *SiT*, 2024, for stochastic sampling.
    """

    def __init__(self) -> None:
        super().__init__(SignalNoiseDynamics(falling, rising, gain=_linear_gain))


class CosineVP(LinearSDE):
    r"""Trigonometric interpolant: x_t = cos(πt/2) x_0 + sin(πt/2) n.

    It is VP with β = π tan(πt/2): the cosine noise schedule without the offset at t = 0 and without
    the cut before t = 1 (`Schedule.cosine` has both). Drift and diffusion diverge at t = 1, but
    distributions are finite there; see `RectifiedFlow`.

    References
    ----------
    M. Albergo, N. Boffi and E. Vanden-Eijnden, *Stochastic interpolants*, 2023.
    """

    def __init__(self) -> None:
        super().__init__(
            SignalNoiseDynamics(cosine, sine, gain=_sine_gain, variance_preserving=True)
        )


class TableProcess(LinearSDE):
    """Process of a table ``alphas_cumprod``; see `VPSDE.from_alphas_cumprod`."""

    def __init__(self, table: Tensor | Sequence[float]) -> None:
        try:
            values = as_float64(table).clone()
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"table must be a sequence of real numbers; got {type(table).__name__}"
            raise TypeError(msg) from error
        if values.ndim != 1 or not len(values):
            raise ValueError(
                f"table must have one axis and at least one entry; got shape {tuple(values.shape)}"
            )
        check_alphas_cumprod(values.detach())
        path = AlphasCumprod(values)
        # Between entries a level has the rounding error of the number of entries times t.
        super().__init__(
            SignalNoiseDynamics(path.signal, path.noise, gain=path.gain, variance_preserving=True)
        )
        self._entries = len(values)

    @override
    def __repr__(self) -> str:
        """One line with the number of entries."""
        return f"VPSDE.from_alphas_cumprod(<{self._entries} entries>)"


class AlphasCumprod:
    """Signal and noise through a table ᾱ, with κ = log α/σ linear in time between its entries.

    The times are evenly spaced: the data are at ``start``, the last entry is at ``end``. κ is
    infinite at the data and at ᾱ = 0. In an interval with such an end the angle atan(σ/α) is
    linear.
    """

    def __init__(self, table: Tensor, start: float = 0.0, end: float = 1.0) -> None:
        full = torch.cat([table.new_ones(1), table])
        self._start, self._span = start, end - start
        self._alpha, self._sigma = safe_sqrt(full), safe_sqrt(1 - full)
        # Both angles are stored, because π/2 minus one of them would cancel.
        self._falling = torch.atan2(self._alpha, self._sigma)
        self._rising = torch.atan2(self._sigma, self._alpha)
        finite = (full > 0) & (full < 1)
        self._kappa = torch.where(finite, 0.5 * torch.where(finite, full, 0.5).logit(), 0.0)
        self._bent = ~(finite[:-1] & finite[1:])

    def signal(self, t: Tensor) -> Tensor:
        """α, of the shape of t."""
        return self._level(t, self._falling, 2.0)

    def noise(self, t: Tensor) -> Tensor:
        """σ, of the shape of t."""
        return self._level(t, self._rising, -2.0)

    def inverse(self, kappa: Tensor) -> Tensor:
        """Times of values of κ between finite entries."""
        last = len(self._bent) - 1
        piece = torch.searchsorted(-self._kappa[1:], -kappa).clamp(1, last)
        low, high = self._kappa[piece], self._kappa[piece + 1]
        return self._knot(piece + (low - kappa) / (low - high))

    def gain(self, s: Tensor, t: Tensor) -> Tensor:
        """σ(t) α(s) − σ(s) α(t) for s ≤ t, as a sum of positive terms.

        For times s < m < t of a path α(m) gain(s, t) = α(t) gain(s, m) + α(s) gain(m, t). Here m is
        the end of the first interval and the start of the last one.
        """
        (first, *_), (last, *_) = self._place(s), self._place(t)
        same = first == last
        inner = torch.where(same, first, first + 1)
        before = self._gain_within(first, s, torch.where(same, t, self._knot(inner)))
        after = self._gain_within(last, torch.where(same, t, self._knot(last)), t)
        alpha, kappa = self._alpha[inner], self._kappa
        between = self._sigma[inner] * torch.expm1(kappa[inner] - kappa[last])
        alpha_t = self.signal(t)
        rest = between * alpha_t + after * alpha / self._alpha[last]
        return torch.where(same, before, (before * alpha_t + rest * self.signal(s)) / alpha)

    def _gain_within(self, piece: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The gain between two times of one interval."""
        share = (t - s) * len(self._bent) / self._span
        rise, fall = self._rising.diff()[piece], -self._falling.diff()[piece]
        angle = torch.where(piece == 0, rise, fall) * share  # the angle that is 0 at one end
        growth = torch.expm1(-self._kappa.diff()[piece] * share)
        log_linear = self.noise(s) * self.signal(t) * growth
        return torch.where(self._bent[piece], torch.sin(angle), log_linear)

    def _level(self, t: Tensor, angles: Tensor, twice: float) -> Tensor:
        piece, left, right = self._place(t)
        angle, kappa = (x[piece] * left + x[piece + 1] * right for x in (angles, self._kappa))
        return torch.where(self._bent[piece], torch.sin(angle), torch.sigmoid(twice * kappa).sqrt())

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Interval of each time, and its distances from the interval's ends as fractions."""
        n = len(self._bent)
        piece = ((t.detach() - self._start) * n / self._span).floor().clamp(0, n - 1).long()
        # The distances are differences of times, because t·n would be rounded.
        left, right = self._knot(piece + 1) - t, t - self._knot(piece)
        return piece, left * n / self._span, right * n / self._span

    def _knot(self, place: Tensor) -> Tensor:
        return self._start + place.to(torch.float64) * self._span / len(self._bent)


# These are module-level functions, so that a process can be pickled and copied.


def falling(t: Tensor) -> Tensor:
    """Signal of the linear path."""
    return 1 - t


def rising(t: Tensor) -> Tensor:
    """Noise of the linear path."""
    return t.clone()


def _linear_gain(s: Tensor, t: Tensor) -> Tensor:
    return t - s


def cosine(t: Tensor) -> Tensor:
    """Signal of the trigonometric path."""
    # cos(πt/2) would have no relative accuracy near t = 1.
    return torch.sin(math.pi / 2 * (1 - t))


def sine(t: Tensor) -> Tensor:
    """Noise of the trigonometric path."""
    return torch.sin(math.pi / 2 * t)


def _sine_gain(s: Tensor, t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * (t - s))
