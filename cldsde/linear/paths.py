r"""Noise paths: signal and noise of a network's training data, x_t = α(t) x_0 + σ(t) n."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor

from cldsde.linear.checks import check_alphas_cumprod, check_callable, shaped, two_increasing
from cldsde.linear.interpolants import AlphasCumprod, cosine, falling, rising, sine
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.reprs import constructor_repr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.linear.signal_noise import OfTime

_POINTS = 257  # times at which a path is checked
# With this many bisections a time of 1e-9 is found to the last digit.
_HALVINGS = 90


@dataclass(frozen=True, eq=False, repr=False)
class NoisePath:
    r"""Noise schedule of a network's training, as signal α(t) and noise σ(t).

    .. math:: x_t = α(t)\,x_0 + σ(t)\,n, \qquad n ∼ N(0, I)

    The ratio σ/α is the noise level that `PredictionDenoiser` receives. It must increase with t.
    Raises a ValueError otherwise, and if the interval is empty, a value is negative or not finite,
    or ``inverse`` is not the inverse. Raises a TypeError if a function cannot be called or does not
    return a tensor.

    Parameters
    ----------
    signal, noise
        α and σ, functions of float64 times ``(n,)`` on the CPU that return values ``(n,)``.
    interval
        Times that the network was trained on, from the least noise to the most.
    inverse
        Function of κ = log(α/σ) ``(n,)`` that returns the time with this κ. None: bisection.
    rates
        Function of times that returns (α', σ'), for networks that predict a flow. None: automatic
        differentiation.

    Examples
    --------
    The path of a network that was trained on σ between 0.002 and 80, with σ as its time:

    >>> import torch
    >>> path = NoisePath(torch.ones_like, lambda t: t, interval=(0.002, 80.0))
    >>> path.noise_levels
    (0.002, 80.0)
    >>> NoisePath.linear().time(torch.tensor([0.0], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    signal: OfTime
    noise: OfTime
    _: KW_ONLY
    interval: tuple[float, float] = (0.0, 1.0)
    inverse: OfTime | None = None
    rates: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        """Check the path on a grid of times."""
        start, end = two_increasing(self.interval, "interval")
        times = torch.linspace(start, end, _POINTS, dtype=torch.float64, device="cpu")
        signal = _values(self.signal, times, "signal")
        level = _values(self.noise, times, "noise") / signal
        falls = ~(level.diff() > 0)
        if bool(falls.any()):
            where = times[:-1][falls][0]
            raise ValueError(
                "signal and noise must have a ratio noise/signal that increases with t; got a "
                f"decrease after t = {where:.6g}"
            )
        if self.inverse is not None:
            inner = times[1:-1]
            off = (self.inverse(-level[1:-1].log()) - inner).abs()
            if not bool((off <= 1e-6 * (end - start)).all()):
                raise ValueError(
                    "inverse must map κ = log(signal/noise) to its time; got another time at the κ "
                    f"of t = {float(inner[off.nan_to_num(math.inf).argmax()]):.6g}"
                )

    def __repr__(self) -> str:
        """One line with functions and interval."""
        return constructor_repr(self)

    @classmethod
    def linear(cls) -> NoisePath:
        """Linear path of rectified flow and flow matching: α = 1 − t, σ = t on [0, 1]."""
        return cls(falling, rising, inverse=_linear_time)

    @classmethod
    def cosine(cls) -> NoisePath:
        """Cosine path: α = cos(πt/2), σ = sin(πt/2) on [0, 1]."""
        return cls(cosine, sine, inverse=_cosine_time)

    @classmethod
    def from_alphas_cumprod(cls, table: Tensor) -> NoisePath:
        r"""Path of a discrete diffusion model: α² = ᾱ_i and σ² = 1 − ᾱ_i at t = i.

        Between two levels log-SNR is linear in t, as under `VPSDE.from_alphas_cumprod` with its
        times (t + 1)/N. Levels with ᾱ = 0 at the end of the table, at which nothing of the data is
        left, are not part of the path.

        Parameters
        ----------
        table
            ᾱ_0, …, ᾱ_{N−1}, ``(N,)`` in [0, 1), decreasing; N ≥ 2. ValueError otherwise.
        """
        if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 2:
            raise ValueError(f"table must be a tensor (N,) with N ≥ 2; got {shaped(table)}")
        values = table.detach().cpu().to(torch.float64)
        check_alphas_cumprod(values)
        last = float((values > 0).sum()) - 1
        path = AlphasCumprod(values[values > 0], -1.0, last)
        return cls(path.signal, path.noise, interval=(0.0, last), inverse=path.inverse)

    @classmethod
    def of(cls, sde: LinearSDE, start: float = 1e-5) -> NoisePath:
        """Path of a process with one component, for networks trained on its perturbed data.

        Parameters
        ----------
        sde
            The process, such as `VPSDE` or `VESDE`; ValueError if it has several components, and
            TypeError for anything else.
        start
            Smallest time that the network was trained on, 0 < ``start`` < 1; ValueError otherwise.
        """
        check_process(sde)
        if sde.components != 1:
            raise ValueError(
                f"sde must have one component; got {sde!r} with {sde.components}. Use a "
                "MixedScore, or a score(z, t), for a network that was trained with it"
            )
        if not 0 < start < 1:
            raise ValueError(f"start must lie between 0 and 1; got {start:g}")
        return cls(
            partial(_process_signal, sde),
            partial(_process_noise, sde),
            interval=(start, 1.0),
            inverse=partial(times_of_kappa, sde, eps=start),
            rates=partial(_process_rates, sde),
        )

    @property
    def noise_levels(self) -> tuple[float, float]:
        """Smallest and largest noise level σ/α of the interval."""
        ends = torch.tensor(self.interval, dtype=torch.float64, device="cpu")
        low, high = (self.noise(ends) / self.signal(ends)).tolist()
        return low, high

    def time(self, kappa: Tensor) -> Tensor:
        """Times with given values of κ = log(α/σ), ``(n,)`` or ``()`` float64."""
        if self.inverse is not None:
            return self.inverse(kappa).clamp(*self.interval)
        low, high = (torch.full_like(kappa, end) for end in self.interval)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            early = self.signal(middle).log() - self.noise(middle).log() > kappa
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return 0.5 * (low + high)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives α' and σ' at times, of the shape of t."""
        if self.rates is not None:
            return self.rates(t)
        return _derivative(self.signal, t, "signal"), _derivative(self.noise, t, "noise")


def _derivative(function: OfTime, t: Tensor, name: str) -> Tensor:
    """Derivative of a function of times by automatic differentiation."""
    with torch.enable_grad():
        at = t.detach().clone().requires_grad_()
        values = function(at).sum()
        if values.requires_grad:
            return torch.autograd.grad(values, at)[0]
    if bool((function(t) != function(t + 1e-3 * (0.5 - t).sign())).any()):
        raise ValueError(
            f"{name} must consist of torch's operations to be differentiated; otherwise pass rates"
        )
    return torch.zeros_like(t)


# These are functions of the module, so that a path can be pickled.


def _linear_time(kappa: Tensor) -> Tensor:
    return torch.sigmoid(-kappa)


def _cosine_time(kappa: Tensor) -> Tensor:
    return (-kappa).exp().atan() * (2 / math.pi)


def _process_signal(sde: LinearSDE, t: Tensor) -> Tensor:
    return sde.marginal(t).mean[..., 0, 0]


def _process_noise(sde: LinearSDE, t: Tensor) -> Tensor:
    return sde.marginal(t).root[..., 0, 0]


def _process_rates(sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
    return sde.dynamics.rates(t, sde.initial_covariance[0, 0])


def _values(function: OfTime, times: Tensor, name: str) -> Tensor:
    """Values of a function at times; raise unless they are finite and not negative."""
    check_callable(function, name, "a function of times")
    values: object = function(times)
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must return a tensor; got {type(values).__name__}")
    if values.shape != times.shape:
        msg = f"{name} must return one value per time, {tuple(times.shape)}; got {values.shape}"
        raise ValueError(msg)
    bad = ~(values.isfinite() & (values >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be finite and not negative; got {float(values[bad][0]):.6g} at "
            f"t = {float(times[bad][0]):.6g}"
        )
    return values
