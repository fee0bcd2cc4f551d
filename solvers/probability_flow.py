"""The probability-flow ODE with adaptive steps, each sample at its own pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import check_at_least, check_positive
from cldsde.score import ReverseProcess

from .adaptive import LOOSE, ActiveSamples, Callback, Integration, Integrator, common_time
from .base import Facts
from .combine import per_sample
from .noise import NoiseSource

__all__ = ["ProbabilityFlow"]

Velocity = Callable[[Tensor, Tensor], Tensor]

_METHODS = ("bosh3", "dopri5", "dopri8")


def _tableau(method: str) -> Any:
    """Butcher tableau and error weights as scipy has them."""
    from scipy.integrate import DOP853, RK23, RK45  # slow to import, and seldom wanted

    return dict(zip(_METHODS, (RK23, RK45, DOP853), strict=True))[method]


@dataclass(frozen=True, kw_only=True)
class ProbabilityFlow(Integrator):
    r"""Embedded Runge–Kutta method for dz/dt = F z − ½ GGᵀ s, with a step size for each sample.

    Each sample of the batch is accepted, rejected and stepped by its own error, the root mean
    square over its numbers of the error in units of atol + rtol times the larger of the state
    before and after, so that its result does not depend on the others but for rounding. Samples
    that have arrived drop out of the batch. No time outside [ε, T] is evaluated. ``Solution.nfev``
    is the largest number of evaluations of a sample, ``stats["nfev"]`` has all.

    Parameters
    ----------
    method
        ``"dopri5"`` (Dormand and Prince, order 5), ``"bosh3"`` (Bogacki and Shampine, 3) or
        ``"dopri8"`` (order 8), with scipy's coefficients.
    rtol, atol
        Tolerances, > 0.
    max_nfev
        Evaluations of a sample after which to give up.
    first_step
        Length of the first step, > 0; None chooses one.
    max_step
        Length of the longest step, > 0.

    Raises
    ------
    ValueError
        If an option is out of range.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfev: int = 10_000
    first_step: float | None = None
    max_step: float = math.inf

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if self.method not in _METHODS:
            names = ", ".join(map(repr, _METHODS))
            msg = f"method must be one of {names}; got {self.method!r}"
            raise ValueError(msg)
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_at_least(self.max_nfev, 1, "max_nfev")
        if self.first_step is not None:
            check_positive(self.first_step, "first_step")
        if self.max_step != math.inf:
            check_positive(self.max_step, "max_step")

    @property
    def facts(self) -> Facts:
        """Every linear SDE; order of the method; stages for each attempt of a step."""
        tableau = _tableau(self.method)
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=tableau.n_stages,
            ode_order=tableau.order,
            adaptive=True,
        )

    def with_step(self, h: float) -> ProbabilityFlow:
        """The same method with steps of length h and no control of its error."""
        return replace(self, rtol=LOOSE, atol=LOOSE, first_step=h, max_step=h)

    def integrate(
        self,
        process: ReverseProcess,
        z: Tensor,
        times: Tensor,
        noise: NoiseSource,
        *,
        stops: Tensor,
        callback: Callback | None,
        progress: bool,
    ) -> Integration:
        """Run each sample from ``times[0]`` down to ``times[-1]``."""
        tableau = _tableau(self.method)
        start, end = float(times[0]), float(times[-1])

        def flow(z: Tensor, t: Tensor) -> Tensor:
            return process.probability_flow(z, common_time(t))

        samples = ActiveSamples(
            z,
            start,
            stops,
            max_nfev=self.max_nfev,
            callback=callback,
            progress=progress,
            name=type(self).__name__,
        )
        f, h = torch.zeros_like(z), samples.t - end
        rejected = torch.zeros(len(z), dtype=torch.bool)
        at_start = 2 if self.first_step is None else 1
        going = samples.screen(h, cost=at_start)
        if samples.on_their_way():
            samples.spend(at_start)
            f = flow(z, samples.t)
            if self.first_step is None:
                h = self._first_step(flow, z, samples.t, f, end)
            else:
                h = torch.full_like(samples.t, self.first_step)
            going = samples.screen(h, tableau.n_stages)
        while samples.on_their_way():
            if going is not None:
                on_device = going.to(z.device)
                h, rejected, z, f = h[going], rejected[going], z[on_device], f[on_device]
            h, after = samples.attempt(h.clamp_max(self.max_step))
            samples.spend(tableau.n_stages)
            stages, dt = [f], per_sample(h, z)
            for a, c in zip(tableau.A[1:], tableau.C[1:], strict=True):
                at = (samples.t - float(c) * h).clamp_min(end)
                stages.append(flow(z - _weighted(a, stages) * dt, at))
            new = z - _weighted(tableau.B, stages) * dt
            stages.append(flow(new, after))
            error = self._error(tableau, stages, dt, z, new).detach().cpu().to(torch.float64)
            accept = error <= 1
            growth = _growth(error, tableau.error_estimator_order, after_rejection=rejected)
            keep = per_sample(accept, z)
            z, f = torch.where(keep, new, z), torch.where(keep, stages[-1], f)
            rejected = ~accept
            h = samples.settle(z, torch.where(accept, after, samples.t), h * growth)
            going = samples.screen(h, tableau.n_stages)
        return samples.result()

    def _error(
        self, tableau: Any, stages: list[Tensor], dt: Tensor, z: Tensor, new: Tensor
    ) -> Tensor:
        """Error of each sample in units of the tolerance, as scipy estimates it."""
        scale = self.atol + self.rtol * torch.maximum(z.abs(), new.abs())

        def size(weights: Any) -> Tensor:
            return (_weighted(weights, stages) * dt / scale).square().flatten(1).mean(1).sqrt()

        if self.method != "dopri8":
            return size(tableau.E)
        fifth, third = size(tableau.E5), size(tableau.E3)
        total = (fifth.square() + 0.01 * third.square()).sqrt()
        return torch.where(total == 0, 0.0, fifth.square() / total)

    def _first_step(self, flow: Velocity, z: Tensor, t: Tensor, f: Tensor, end: float) -> Tensor:
        """Step length from the size of the slope and its change (Hairer et al. 1993, II.4)."""
        scale = self.atol + self.rtol * z.abs()

        def size(x: Tensor) -> Tensor:
            return (x / scale).square().flatten(1).mean(1).sqrt().detach().cpu().to(torch.float64)

        d0, d1 = size(z), size(f)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # A slope that is not finite is found out by the first step.
        h0 = torch.minimum(h0.nan_to_num(1e-6), t - end)
        d2 = size(flow(z - f * per_sample(h0, z), t - h0) - f) / h0
        steepest = torch.maximum(d1, d2)
        order = _tableau(self.method).error_estimator_order + 1
        h1 = torch.where(
            steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / order)
        )
        return torch.minimum(100 * h0, h1)


def _growth(error: Tensor, order: int, *, after_rejection: Tensor) -> Tensor:
    """Factor of the next step length for an error in units of the tolerance."""
    growth = 0.9 * error.clamp_min(1e-10) ** (-1 / (order + 1))
    growth = growth.nan_to_num(0.2).clamp(0.2, 10.0)
    # A rejected step shrinks; and not to grow right after keeps the two from alternating.
    return torch.where((error <= 1) & ~after_rejection, growth, growth.clamp_max(1.0))


def _weighted(weights: Any, stages: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, stage in zip(weights.tolist(), stages, strict=False):
        if weight:
            total = stage * weight if total is None else total.add_(stage, alpha=weight)
    return torch.zeros_like(stages[0]) if total is None else total
