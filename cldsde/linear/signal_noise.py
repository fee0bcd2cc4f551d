r"""Interpolants x_t = α(t) x_0 + σ(t) n as linear SDEs with one component.

The signal α and the noise level σ determine

.. math::
    F = \frac{α'}{α}, \qquad G^2 = \frac{2σ\,w}{α}, \qquad
    Ψ(t,s) = \frac{α_t}{α_s}, \qquad
    Q(s,t) = σ_t^2 − Ψ^2 σ_s^2 = \frac{c(s,t)\,(σ_t α_s + σ_s α_t)}{α_s^2},

with the gain c(s, t) = σ_t α_s − σ_s α_t ≥ 0 and its slope w = ασ' − α'σ. The gain is never
computed by a subtraction that cancels. If α(1) = 0, F and G diverge at t = 1, but every
distribution is finite: Ψ(1, s) = 0 and Q(s, 1) = σ(1)².
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import safe_sqrt
from cldsde.linear.checks import check_callable, checked_values
from cldsde.linear.covariance import joint_root
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.reprs import shown
from cldsde.linear.schedule import gauss_legendre

OfTime = Callable[[Tensor], Tensor]
"""Function of float64 times of any shape that returns values of that shape."""

Gain = Callable[[Tensor, Tensor], Tensor]
"""Function of float64 times s ≤ t of one shape that returns values of that shape."""

_NODES, _PANELS = 16, 8
_CHECKED = 64  # panels of [0, 1] on which the quadrature of the gain is compared with differences
# VPSDE has this value at t = 1. Closer to the pole, solvers that freeze F and G over a step would
# need far shorter steps.
_LEAST_KAPPA = -5.0
_EPS = torch.finfo(torch.float64).eps


class SignalNoiseDynamics(Dynamics):
    """Dynamics of one component, from its signal α(t) and its noise level σ(t).

    Parameters
    ----------
    signal, noise
        See `LinearSDE.from_signal_noise`. If σ(0) > 0, the process should have the initial
        covariance σ(0)².
    gain
        Function of (s, t) that returns σ(t) α(s) − σ(s) α(t) for s ≤ t, without cancellation. None:
        by a quadrature of the derivatives of α and σ, which is exact to rounding for smooth
        functions.
    variance_preserving
        Whether α² + σ² = 1. If False, it is checked to rounding at 1,025 times.

    Examples
    --------
    A noise level whose rate jumps, with its exact gain:

    >>> import torch
    >>> from cldsde import LinearSDE
    >>> def noise(t):
    ...     return torch.where(t < 0.5, t, 3 * t - 1)
    >>> dynamics = SignalNoiseDynamics(
    ...     torch.ones_like, noise, gain=lambda s, t: noise(t) - noise(s)
    ... )
    >>> LinearSDE(dynamics).transition(0.0, 0.75).root.item()
    1.25
    """

    components = 1
    driven = (0,)

    def __init__(
        self,
        signal: OfTime,
        noise: OfTime,
        *,
        gain: Gain | None = None,
        variance_preserving: bool = False,
    ) -> None:
        for name, function in (("signal", signal), ("noise", noise), ("gain", gain)):
            if name != "gain" or function is not None:
                check_callable(function, name, "a function of times")
        self.signal, self.noise, self.gain = signal, noise, gain
        grid = torch.linspace(0, 1, 1025, dtype=torch.float64, device="cpu")
        alpha = _values(signal, grid, "signal")
        # Treat a signal at the end as zero if it is at the level of rounding, as cos(π/2).
        self._vanishes = abs(float(alpha[-1])) <= 8 * _EPS
        if self._vanishes:
            alpha[-1] = 0.0
        sigma = _values(noise, grid, "noise")
        self._check(grid, alpha, sigma)
        unit = alpha.square() + sigma.square()
        same = bool(((unit - 1).abs() <= 8 * _EPS).all())
        self._preserves_variance = variance_preserving or same
        # F and G have a pole at or near the end in two cases: the signal vanishes there, or
        # decreases by a factor of 16 within the last thousandth of the time.
        pole = 16 * float(alpha[-1]) < float(alpha[-2])
        self.regular_until = self._latest_regular() if pole else 1.0

    @override
    def __repr__(self) -> str:
        """One line with the names of the functions."""
        return f"SignalNoiseDynamics(signal={shown(self.signal)}, noise={shown(self.noise)})"

    @override
    def drift(self, t: Tensor) -> Tensor:
        (alpha, alpha_rate), _ = self._with_rates(t)
        return self._finite(alpha_rate / alpha, t, "drift")[..., None, None]

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return safe_sqrt(self._finite(self._squared_diffusion(t), t, "diffusion"))[..., None, None]

    @override
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, last = self._signal(s), self._signal(t)
        before, after = self.noise(s), self.noise(t)
        # α(s) is zero only if s = t = 1.
        gone = first == 0
        first = torch.where(gone, 1.0, first)
        psi = torch.where(gone, 1.0, last / first)
        variance = self._gain(s, t) * (after * first + before * last) / first.square()
        psi, root = psi[..., None, None], safe_sqrt(variance)[..., None, None]
        return psi, root if initial_root is None else joint_root(psi @ initial_root, root)

    @override
    def rates(self, t: Tensor, initial_variance: Tensor) -> tuple[Tensor, Tensor]:
        (alpha, alpha_rate), (sigma, sigma_rate) = self._with_rates(t)
        start = self.noise(torch.zeros_like(t)).square()
        # The variance is α² (initial − σ(0)²) + σ², of which the first term is usually zero.
        excess = initial_variance - start
        total = (sigma.square() + alpha.square() * excess).sqrt()
        return alpha_rate, (sigma * sigma_rate + alpha * alpha_rate * excess) / total

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        """Root of ∫G² by quadrature, uniform in log(1 − t) if G has a pole at 1.

        The relative error is at rounding level for smooth α and σ, and about 1e-4 across entries of
        a table. It is 1e-2 from a time at which the derivative of α or σ is infinite.
        `StochasticHeun`, `SSCS` and `Splitting` use it.
        """
        x, w = gauss_legendre(_NODES, _PANELS)
        start, span = s.unsqueeze(-1), (t - s).unsqueeze(-1)
        if self.regular_until < 1:
            self._finite(torch.where(t < 1, 0.0, torch.inf), t, "diffusion")
            log_ratio = torch.log1p(-span / (1 - start))
            nodes = start - (1 - start) * torch.expm1(log_ratio * x)
            measure = -log_ratio * (1 - start) * (log_ratio * x).exp() * w
        else:
            nodes, measure = start + span * x, span * w
        total = (self._squared_diffusion(nodes) * measure).sum(-1)
        return safe_sqrt(total)[..., None, None]

    @override
    def stationary_covariance(self) -> Tensor | None:
        eye = torch.eye(1, dtype=torch.float64, device="cpu")
        return eye if self._preserves_variance else None

    @override
    def stationary_reversal(self, covariance: Tensor) -> Dynamics | None:
        del covariance  # a process of one component is its own time reversal
        return self if self._preserves_variance else None

    def _signal(self, t: Tensor) -> Tensor:
        """α(t), exactly zero at the end if it vanishes there."""
        alpha = self.signal(t)
        return torch.where(t == 1, 0.0, alpha) if self._vanishes else alpha

    def _with_rates(self, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """α and α′, σ and σ′."""
        one = (torch.ones_like(t),)
        alpha, alpha_rate = torch.func.jvp(self.signal, (t,), one)[:2]
        sigma, sigma_rate = torch.func.jvp(self.noise, (t,), one)[:2]
        if self._vanishes:
            alpha = torch.where(t == 1, 0.0, alpha)
        return (alpha, alpha_rate), (sigma, sigma_rate)

    def _squared_diffusion(self, t: Tensor) -> Tensor:
        (alpha, alpha_rate), (sigma, sigma_rate) = self._with_rates(t)
        squared = 2 * sigma * (alpha * sigma_rate - alpha_rate * sigma) / alpha
        # If α/σ is constant, rounding may make this negative.
        return torch.where(squared.abs() <= 16 * _EPS * sigma.square(), 0.0, squared)

    def _gain(self, s: Tensor, t: Tensor) -> Tensor:
        if self.gain is not None:
            return self.gain(s, t)
        plus, direct = self._subtracted(s, t)
        # The subtraction loses at most two digits in the other cases.
        close = direct.detach() < 1e-2 * plus.detach()
        if not bool(close.any()):
            return direct
        return torch.where(close, self._quadrature(s, torch.where(close, t, s)), direct)

    def _subtracted(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """σ_t α_s + σ_s α_t and σ_t α_s − σ_s α_t."""
        later = self.noise(t) * self._signal(s)
        earlier = self.noise(s) * self._signal(t)
        return later + earlier, later - earlier

    def _quadrature(self, s: Tensor, t: Tensor) -> Tensor:
        """∫ (α_s σ′ − σ_s α′) over [s, t], with panels no longer than the checked ones."""
        span = (t - s).unsqueeze(-1)
        longest = float(span.detach().max()) if span.numel() else 0.0
        x, w = gauss_legendre(_NODES, max(1, math.ceil(longest * _CHECKED)))
        (_, alpha_rate), (_, sigma_rate) = self._with_rates(s.unsqueeze(-1) + span * x)
        signal, noise = self._signal(s).unsqueeze(-1), self.noise(s).unsqueeze(-1)
        slope = signal * sigma_rate - noise * alpha_rate
        return (span * w * slope).sum(-1)

    def _check(self, grid: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        if abs(float(alpha[0]) - 1) > 8 * _EPS:
            raise ValueError(
                f"signal must be 1 at t = 0, because the state is the data; got {float(alpha[0]):g}"
            )
        for name, bad, wanted in (
            ("signal", alpha[:-1] <= 0, "positive before t = 1"),
            ("signal", alpha < 0, "not negative"),
            ("noise", sigma < 0, "not negative"),
            ("noise", torch.cat([sigma[:1] < 0, sigma[1:] <= 0]), "positive for t > 0"),
        ):
            if bool(bad.any()):
                i = int(bad.nonzero()[0])
                value = float((alpha if name == "signal" else sigma)[i])
                msg = f"{name} must be {wanted}; got {value:g} at t = {float(grid[i]):g}"
                raise ValueError(msg)
        later, earlier = sigma[1:] * alpha[:-1], sigma[:-1] * alpha[1:]
        direct = later - earlier
        rising = direct < -4 * _EPS * (later + earlier)
        if bool(rising.any()) or not bool((direct > 0).any()):
            i = int(rising.nonzero()[0]) if bool(rising.any()) else 0
            raise ValueError(
                "signal and noise must have a ratio α/σ that decreases with t; got an increase "
                f"between t = {float(grid[i]):g} and {float(grid[i + 1]):g}"
            )
        if self.gain is not None:
            return
        coarse = grid[:: (len(grid) - 1) // _CHECKED]
        s, t = coarse[:-1], coarse[1:]
        plus, direct = (x.detach() for x in self._subtracted(s, t))
        close = direct < 0.25 * plus
        off = (self._quadrature(s[close], t[close]).detach() - direct[close]).abs()
        if not bool((off <= 64 * _EPS * plus[close]).all()):
            i = int(off.div(plus[close]).nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"signal and noise must be smooth near t = {float(s[close][i]):g}, because kernels "
                "over short steps need their derivatives; for functions that are not smooth pass "
                "the exact gain to SignalNoiseDynamics"
            )

    @torch.no_grad()
    def _latest_regular(self) -> float:
        """Latest time with log α/σ ≥ −5, rounded down to four digits of 1 − t."""
        low, high = 0.0, 1.0  # bracket of 1 − t
        for _ in range(200):
            middle = (low + high) / 2
            t = torch.tensor(1 - middle, dtype=torch.float64, device="cpu")
            ratio = self.signal(t) / self.noise(t)
            low, high = (middle, high) if float(ratio.log()) < _LEAST_KAPPA else (low, middle)
            if high - low <= 1e-3 * high:
                break
        digits = min(15, 3 - math.floor(math.log10(high)))
        return math.floor((1 - high) * 10.0**digits) / 10.0**digits

    def _finite(self, values: Tensor, t: Tensor, name: str) -> Tensor:
        bad = ~values.detach().isfinite()
        if bool(bad.any()):
            where = float(t.detach()[bad].max())
            advice = (
                "take t > 0"
                if where == 0
                else f"take t ≤ {self.regular_until:.15g}, or ExponentialMultistep with "
                "prediction='data', which does not evaluate it"
            )
            raise ValueError(f"the {name} of this process diverges at t = {where:.15g}; {advice}")
        return values


def _values(function: OfTime, grid: Tensor, name: str) -> Tensor:
    """`checked_values` on a grid; raise ValueError also if the function has no derivative."""
    values = checked_values(function, grid, name)
    try:
        torch.func.jvp(function, (grid,), (torch.ones_like(grid),))
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{name} must consist of torch's operations, because it is differentiated; it raised: "
            f"{error}"
        ) from error
    return values
