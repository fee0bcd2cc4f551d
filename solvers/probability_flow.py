"""The probability-flow ODE with adaptive steps, each sample at its own pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.linear.checks import check_at_least, check_positive
from cldsde.score import ReverseProcess

from .adaptive import LOOSE, ActiveSamples, Callback, Integration, Integrator
from .base import Facts
from .combine import as_blocks, combine, per_sample
from .noise import NoiseSource
from .numbered_score import NumberedScore

__all__ = ["ProbabilityFlow"]

Velocity = Callable[[Tensor, int], Tensor]
"""dz/dt at a state, at the time of the given number."""

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
    pace
        ``"sample"``: as above. ``"batch"``: one step size, by the root mean square over the whole
        batch, as scipy and torchdiffeq have it. Samples then depend on each other, and one that
        fails takes all with it; but they share their times, so that coefficients, of an exact score
        above all, are computed once a step and not for each sample.

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
    pace: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if self.method not in _METHODS:
            names = ", ".join(map(repr, _METHODS))
            msg = f"method must be one of {names}; got {self.method!r}"
            raise ValueError(msg)
        if self.pace not in ("sample", "batch"):
            msg = f"pace must be 'sample' or 'batch'; got {self.pace!r}"
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
            f = _flow(process, [samples.t], z)(z, 0)
            if self.first_step is None:
                h = self._first_step(process, z, samples.t, f, end)
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
            within = [(samples.t - float(c) * h).clamp_min(end) for c in tableau.C[1:]]
            flow = _flow(process, [*within, after], z)
            for number, a in enumerate(tableau.A[1:]):
                stages.append(flow(z - _weighted(a, stages) * dt, number))
            new = z - _weighted(tableau.B, stages) * dt
            stages.append(flow(new, len(within)))
            error = self._error(tableau, stages, dt, z, new)
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
            return self._size(_weighted(weights, stages) * dt / scale)

        if self.method != "dopri8":
            return size(tableau.E)
        fifth, third = size(tableau.E5), size(tableau.E3)
        total = (fifth.square() + 0.01 * third.square()).sqrt()
        return torch.where(total == 0, 0.0, fifth.square() / total)

    def _size(self, x: Tensor) -> Tensor:
        """Root mean square of each sample, or of all alike, float64 on the host."""
        # Squares of errors in units of the tolerance leave the range of half precision.
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        squares = x.square().flatten(1).mean(1).cpu().to(torch.float64)
        return (squares if self.pace == "sample" else squares.mean().expand(len(x))).sqrt()

    def _first_step(
        self, process: ReverseProcess, z: Tensor, t: Tensor, f: Tensor, end: float
    ) -> Tensor:
        """Step length from the size of the slope and its change (Hairer et al. 1993, II.4)."""
        scale = self.atol + self.rtol * z.abs()
        d0, d1 = self._size(z / scale), self._size(f / scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # A slope that is not finite is found out by the first step.
        h0 = torch.minimum(h0.nan_to_num(1e-6), t - end)
        nearby = _flow(process, [t - h0], z)(z - f * per_sample(h0, z), 0)
        d2 = self._size((nearby - f) / scale) / h0
        steepest = torch.maximum(d1, d2)
        order = _tableau(self.method).error_estimator_order + 1
        h1 = torch.where(
            steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / order)
        )
        return torch.minimum(100 * h0, h1)


def _flow(process: ReverseProcess, times: list[Tensor], z: Tensor) -> Velocity:
    """The flow at times ``(B,)`` each; where samples share them, with its coefficients ready."""
    if not all(bool((t == t[0]).all()) for t in times):
        return lambda z, i: process.probability_flow(z, times[i])
    shared = torch.stack([t[0] for t in times])
    G = process.sde.diffusion(shared)
    state = as_blocks(process.sde.drift(shared))
    pull = as_blocks(-0.5 * (G @ G.mT)[..., list(process.sde.driven)])
    score = NumberedScore(process, shared, z)
    return lambda z, i: combine((state[i], z), (pull[i], score(z, i)))


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
