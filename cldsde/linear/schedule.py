"""Noise schedules: a rate β(t) ≥ 0 and its integral.

Consider a process with drift β(t) A and squared diffusion β(t) Q̄. It is the process with constant A
and Q̄ at the rescaled time B(s, t) = ∫_s^t β. The integral is a function of the pair (s, t), because
B(t) − B(s) would cancel for small t − s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import (
    Parameter,
    as_parameter,
    check_between,
    check_callable,
    checked_values,
    parameter_at_least,
    parameter_value,
    positive_parameter,
)
from cldsde.linear.reprs import shown


@lru_cache
@torch.inference_mode(False)
def gauss_legendre(n: int, panels: int = 1) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the n-point Gauss–Legendre rule on equal panels of [0, 1], float64."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    starts = torch.arange(panels, device="cpu", dtype=torch.float64).unsqueeze(1)
    x = (starts + torch.from_numpy((nodes + 1) / 2)) / panels
    return x.flatten(), torch.from_numpy(weights / 2 / panels).repeat(panels)


class Schedule:
    r"""Noise schedule: a rate β(t) on [0, 1] with its integral over any [s, t].

    Raises a ValueError if the rate is negative, infinite or NaN at one of 1,025 times, returns
    another shape or dtype, or is not resolved by the quadrature; or if ``integral`` is not its
    integral. Raises a TypeError if one of them is not a function.

    Parameters
    ----------
    rate
        β, a function of a float64 tensor of times that returns float64 of the same shape, finite
        and ≥ 0 on [0, 1].
    integral
        Function of (s, t) that returns :math:`\int_s^t β`, for tensors s ≤ t that broadcast. Write
        it without a difference that cancels. None: Gauss–Legendre quadrature with 8 panels of 16
        nodes, which is exact to rounding for rates that are smooth on the scale of (t − s)/8.

    Examples
    --------
    >>> import torch
    >>> beta = Schedule(lambda t: 1 + torch.sin(3 * t) ** 2)
    >>> s, t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> f"{beta.integral(s, t):.12f}"
    '1.523284624850'
    """

    def __init__(
        self,
        rate: Callable[[Tensor], Tensor],
        integral: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_callable(rate, "rate", "a function of times")
        if integral is not None:
            check_callable(integral, "integral", "a function of two times")
        grid = torch.linspace(0, 1, 1025, device="cpu", dtype=torch.float64)
        checked_values(rate, grid, "rate", signed=False)
        self._made_by = ""
        self._rate = rate
        self._integral = integral if integral is not None else self._quadrature
        self._check_integral(given=integral is not None)

    def __repr__(self) -> str:
        """One line with the constructor and its parameters."""
        return self._made_by or f"Schedule(rate={shown(self._rate)})"

    def _by(self, maker: str, *parameters: Parameter) -> Schedule:
        self._made_by = f"Schedule.{maker}({', '.join(map(shown, parameters))})"
        return self

    def rate(self, t: Tensor) -> Tensor:
        """β(t), of the shape of t."""
        return self._rate(t)

    def integral(self, s: Tensor, t: Tensor) -> Tensor:
        r""":math:`\int_s^t β`, of the broadcast shape of s and t."""
        return self._integral(s, t)

    def _quadrature(self, s: Tensor, t: Tensor) -> Tensor:
        nodes, weights = gauss_legendre(16, panels=8)
        span = (t - s).unsqueeze(-1)
        return (span * self._rate(s.unsqueeze(-1) + span * nodes) * weights).sum(-1)

    def _check_integral(self, *, given: bool) -> None:
        """Raise if the quadrature does not resolve the rate, or the integral is of another rate."""
        # Cut at irrational points, where kinks are unlikely.
        cuts = torch.tensor([0.0, 2**0.5 - 1, 3**0.5 - 1, 1.0], device="cpu", dtype=torch.float64)
        start, end = cuts[0], cuts[-1]
        whole = self._quadrature(start, end).detach()
        halves = self._quadrature(cuts[:-1], cuts[1:]).detach().sum()
        resolved = bool((whole - halves).abs() <= 1e-12 * halves.abs())
        if given and resolved:
            stated = torch.as_tensor(self._integral(start, end), device="cpu").detach()
            if not bool((stated - halves).abs() <= 1e-8 * halves.abs()):
                raise ValueError(
                    f"integral must be the integral of rate over [0, 1], {float(halves):g}; got "
                    f"{float(stated):g}"
                )
        if not given and not resolved:
            raise ValueError(
                "rate must be smooth enough for numerical integration; got the integrals "
                f"{float(whole):.17g} and {float(halves):.17g} over [0, 1] by two quadratures. "
                "Pass integral"
            )

    @classmethod
    def of(cls, value: Schedule | Parameter | Sequence[Parameter]) -> Schedule:
        """Create a schedule from a number (constant), a pair (β(0), β(1)) (linear) or a Schedule.

        Raises a TypeError for anything else.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return cls.constant(value)  # type: ignore[arg-type]
        if isinstance(value, Sequence | Tensor) and not isinstance(value, str) and len(value) == 2:
            return cls.linear(value[0], value[1])
        raise TypeError(
            f"schedule must be a number, a pair (β(0), β(1)) or a Schedule"
            f"{', as Schedule(rate) for a function' if callable(value) else ''}; got {value!r}"
        )

    @classmethod
    def constant(cls, beta: Parameter) -> Schedule:
        """Constant schedule β(t) = ``beta`` > 0."""
        positive_parameter(beta, "beta")
        made = cls(partial(_constant_rate, beta), partial(_constant_integral, beta))
        return made._by("constant", beta)

    @classmethod
    def linear(cls, start: Parameter, end: Parameter) -> Schedule:
        """Linear schedule β(t) = start + (end − start) t; both ends ≥ 0 and not both zero."""
        first = parameter_at_least(start, 0.0, "beta(0)")
        last = parameter_at_least(end, 0.0, "beta(1)")
        positive_parameter(first + last, "beta(0) + beta(1)")
        made = cls(partial(_linear_rate, start, end), partial(_linear_integral, start, end))
        return made._by("linear", start, end)

    @classmethod
    def cosine(cls, offset: Parameter = 0.008, stop: Parameter = 0.9946) -> Schedule:
        """Cosine noise schedule (Nichol and Dhariwal 2021, eq. 17).

        The signal of a variance-preserving process, e^{−B(0,t)/2}, is cos θ(t) / cos θ(0) with the
        angle θ(t) = (stop · t + offset) / (1 + offset) · π/2. The rate diverges at θ = π/2.
        ``stop`` ends the schedule before, as published samplers do, at a signal of 0.0084.

        Parameters
        ----------
        offset
            s ≥ 0. If it is above 0, the rate at t = 0 does not vanish.
        stop
            Fraction of the schedule that [0, 1] covers, 0 < stop ≤ 1 − 1e-6.
        """
        first = parameter_at_least(offset, 0.0, "offset")
        last = as_parameter(stop, "stop")
        check_between(parameter_value(last), 1e-300, 1 - 1e-6, "stop")
        turn = math.pi / 2 / (1 + first)
        angles = (turn * first, turn * last)
        made = cls(partial(_cosine_rate, *angles), partial(_cosine_integral, *angles))
        return made._by("cosine", offset, stop)

    @classmethod
    def geometric(cls, sigma_min: Parameter, sigma_max: Parameter) -> Schedule:
        """Geometric schedule of VE: β = dσ²/dt with σ(t) = σ_min (σ_max/σ_min)^t.

        Its integral is σ(t)² − σ(s)² = σ(s)² (e^{2r(t−s)} − 1) with r = log(σ_max/σ_min).
        """
        low = positive_parameter(sigma_min, "sigma_min")
        high = positive_parameter(sigma_max, "sigma_max")
        if low >= high:
            msg = f"sigma_max must be above sigma_min; got {float(high)} and {float(low)}"
            raise ValueError(msg)
        ratio = high / low
        log_ratio = ratio.log() if isinstance(ratio, Tensor) else math.log(ratio)
        made = cls(
            partial(_geometric_rate, low, log_ratio), partial(_geometric_integral, low, log_ratio)
        )
        return made._by("geometric", sigma_min, sigma_max)


# These are module-level functions, so that a process can be pickled and copied.


def _constant_rate(beta: Parameter, t: Tensor) -> Tensor:
    # Convert at each call, so that a parameter that is updated in place takes effect.
    return as_parameter(beta, "beta") * torch.ones_like(t)


def _constant_integral(beta: Parameter, s: Tensor, t: Tensor) -> Tensor:
    return as_parameter(beta, "beta") * (t - s)


def _linear_rate(start: Parameter, end: Parameter, t: Tensor) -> Tensor:
    first, last = as_parameter(start, "beta(0)"), as_parameter(end, "beta(1)")
    # first + (last − first)·t might round below zero at t = 1.
    return first * (1 - t) + last * t


def _linear_integral(start: Parameter, end: Parameter, s: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (t - s) * (_linear_rate(start, end, s) + _linear_rate(start, end, t))


def _cosine_rate(start: Parameter, turn: Parameter, t: Tensor) -> Tensor:
    return 2 * turn * torch.tan(start + turn * t)


def _cosine_integral(start: Parameter, turn: Parameter, s: Tensor, t: Tensor) -> Tensor:
    # Compute −2 log(cos b / cos a) with b = a + d. Near π/2 write cosines as sines of π/2 minus the
    # angle. For short steps use cos b / cos a = 1 − (2 sin²(d/2) + tan a sin d).
    a, d = start + turn * s, turn * (t - s)
    loss = 2 * torch.sin(d / 2).square() + torch.tan(a) * torch.sin(d)
    short = loss < 0.5
    left = math.pi / 2 - start
    ratio = torch.sin(left - turn * t) / torch.sin(left - turn * s)
    return -2 * torch.where(short, torch.log1p(-torch.where(short, loss, 0.0)), ratio.log())


def _geometric_variance(sigma_min: Parameter, log_ratio: Parameter, t: Tensor) -> Tensor:
    return sigma_min**2 * torch.exp(2 * log_ratio * t)


def _geometric_rate(sigma_min: Parameter, log_ratio: Parameter, t: Tensor) -> Tensor:
    return 2 * log_ratio * _geometric_variance(sigma_min, log_ratio, t)


def _geometric_integral(sigma_min: Parameter, log_ratio: Parameter, s: Tensor, t: Tensor) -> Tensor:
    return _geometric_variance(sigma_min, log_ratio, s) * torch.expm1(2 * log_ratio * (t - s))
