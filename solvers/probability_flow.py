"""The probability-flow ODE with adaptive steps, each sample at its own pace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import check_at_least, check_positive
from cldsde.linear.sde import LinearSDE

from .base import AdaptiveSolver, Facts, Integration, TimedScore
from .combine import per_sample
from .noise import NoiseSource

__all__ = ["ProbabilityFlow"]

_METHODS = ("bosh3", "dopri5", "dopri8")


def _tableau(method: str) -> Any:
    """Butcher tableau and error weights as scipy has them."""
    from scipy.integrate import DOP853, RK23, RK45  # slow to import, and seldom wanted

    return dict(zip(_METHODS, (RK23, RK45, DOP853), strict=True))[method]


@dataclass(frozen=True, kw_only=True)
class ProbabilityFlow(AdaptiveSolver):
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

    Raises
    ------
    ValueError
        If an option is out of range.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfev: int = 10_000

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if self.method not in _METHODS:
            names = ", ".join(map(repr, _METHODS))
            msg = f"method must be one of {names}; got {self.method!r}"
            raise ValueError(msg)
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_at_least(self.max_nfev, 1, "max_nfev")

    @property
    def facts(self) -> Facts:
        """Every linear SDE; order of the method; stages for each attempt of a step."""
        tableau = _tableau(self.method)
        return Facts(
            applies_to="every linear SDE", nfe_per_step=tableau.n_stages, ode_order=tableau.order
        )

    def integrate(
        self,
        sde: LinearSDE,
        z: Tensor,
        start: float,
        end: float,
        score: TimedScore,
        noise: NoiseSource,
    ) -> Integration:
        """Run each sample from ``start`` down to ``end``."""
        tableau = _tableau(self.method)
        flow = _Flow(sde, score)
        if self.max_nfev < 2:
            message = f"max_nfev: {self.max_nfev} evaluations do not give a first step"
            return Integration(z, torch.zeros(len(z), dtype=torch.int64), False, message, {})
        n = len(z)
        out, nfev = z.clone(), torch.zeros(n, dtype=torch.int64)
        rows = torch.arange(n)  # samples that are still on their way
        t = torch.full((n,), start, dtype=torch.float64)
        f = flow(z, t)
        h, probed = self._first_step(flow, z, t, f, end, tableau)
        nfev += 1 + probed
        rejected = torch.zeros(n, dtype=torch.bool)
        attempts = 0
        message = "reached the end of the interval"
        while len(rows):
            if int(nfev[rows].max()) + tableau.n_stages > self.max_nfev:
                message = f"max_nfev: {self.max_nfev} evaluations did not reach the end"
                break
            attempts += 1
            left = t - end
            last = h >= left
            h = torch.minimum(h, left)
            if bool((~last & ~(h >= 1e-14 * t)).any()):
                message = (
                    "the step length underflowed: the score is not finite, or rtol and atol "
                    "cannot be met"
                )
                break
            stages = [f]
            dt = per_sample(h, z)
            for a, c in zip(tableau.A[1:], tableau.C[1:], strict=True):
                move = _weighted(a, stages) * dt
                stages.append(flow(z - move, (t - float(c) * h).clamp_min(end)))
            new = z - _weighted(tableau.B, stages) * dt
            after = torch.where(last, end, t - h)
            stages.append(flow(new, after))
            nfev[rows] += tableau.n_stages
            error = self._error(tableau, stages, dt, z, new).cpu().to(torch.float64)
            accept = error <= 1
            growth = _growth(error, tableau.error_estimator_order, after_rejection=rejected)
            keep = per_sample(accept, z)
            z = torch.where(keep, new, z)
            f = torch.where(keep, stages[-1], f)
            t = torch.where(accept, after, t)
            h, rejected = h * growth, ~accept
            out[rows.to(z.device)] = z
            going = t > end
            if not bool(going.all()):
                rows, t, h, rejected = rows[going], t[going], h[going], rejected[going]
                on_device = going.to(z.device)
                z, f = z[on_device], f[on_device]
        return Integration(out, nfev, not len(rows), message, {"attempts": attempts})

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

    def _first_step(
        self, flow: _Flow, z: Tensor, t: Tensor, f: Tensor, end: float, tableau: Any
    ) -> tuple[Tensor, int]:
        """Step length from the size of the slope and its change (Hairer et al. 1993, II.4)."""
        scale = self.atol + self.rtol * z.abs()

        def size(x: Tensor) -> Tensor:
            return (x / scale).square().flatten(1).mean(1).sqrt().cpu().to(torch.float64)

        d0, d1 = size(z), size(f)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # A slope that is not finite is found out by the first step.
        h0 = torch.minimum(h0.nan_to_num(1e-6), t - end)
        d2 = size(flow(z - f * per_sample(h0, z), t - h0) - f) / h0
        steepest = torch.maximum(d1, d2)
        order = tableau.error_estimator_order + 1
        h1 = torch.where(
            steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / order)
        )
        return torch.minimum(100 * h0, h1), 1


def _growth(error: Tensor, order: int, *, after_rejection: Tensor) -> Tensor:
    """Factor of the next step length for an error in units of the tolerance."""
    growth = 0.9 * error.clamp_min(1e-10) ** (-1 / (order + 1))
    growth = growth.nan_to_num(0.2).clamp(0.2, 10.0)
    # A rejected step shrinks; and not to grow right after keeps the two from alternating.
    return torch.where((error <= 1) & ~after_rejection, growth, growth.clamp_max(1.0))


class _Flow:
    """Velocity of the flow at a time for each sample."""

    def __init__(self, sde: LinearSDE, score: TimedScore) -> None:
        self._sde = sde
        self._score = score

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        # All samples at one time share their coefficients.
        shared = t[0] if len(t) and bool((t == t[0]).all()) else t
        G = self._sde.diffusion(shared)
        pull = 0.5 * (G @ G.mT)[..., list(self._sde.driven)]
        return apply_blocks(self._sde.drift(shared), z) - apply_blocks(pull, self._score(z, t))


def _weighted(weights: Any, stages: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, stage in zip(weights.tolist(), stages, strict=False):
        if weight:
            total = stage * weight if total is None else total.add_(stage, alpha=weight)
    return torch.zeros_like(stages[0]) if total is None else total
