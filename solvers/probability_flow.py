"""The probability-flow ODE with adaptive steps, each sample at its own pace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.linear.checks import check_at_least, check_positive
from cldsde.score import ReverseProcess

from .adaptive import LOOSE, ActiveSamples, Callback, Integration, Integrator
from .base import Facts
from .combine import as_blocks, combine, component_first, per_sample
from .noise import NoiseSource
from .numbered_score import NumberedScore

__all__ = ["ProbabilityFlow"]

Velocity = Callable[[Tensor, int, Tensor | None], Tensor]
"""dz/dt at a state, at the time of the given number, written to where it is told, if it is."""

Flow = Callable[[Tensor, Tensor], Velocity]
"""Its evaluation at times ``(S, N)`` of N states."""

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
        if self.pace == "sample" or not len(z):
            flow = partial(_flow, process)
            return self._run(flow, component_first(z), times, stops, callback, progress=progress)

        # Samples that share their steps are stepped as one.
        def together(times: Tensor, z: Tensor) -> Velocity:
            velocity = _flow(process, times, z[0])
            return lambda z, i, out: velocity(z[0], i, None if out is None else out[0]).view_as(z)

        def watch(attempts: int, t: Tensor, z: Tensor) -> object:
            assert callback is not None
            return callback(attempts, t.expand(z.shape[1]), z[0])

        one = self._run(
            together,
            component_first(z).unsqueeze(0),
            times,
            stops,
            None if callback is None else watch,
            progress=progress,
        )
        return replace(
            one,
            state=one.state[0],
            states=one.states[:, 0],
            nfev=one.nfev.repeat(len(z)),
            success=one.success.repeat(len(z)),
        )

    def _run(
        self,
        flow: Flow,
        z: Tensor,
        times: Tensor,
        stops: Tensor,
        callback: Callback | None,
        *,
        progress: bool,
    ) -> Integration:
        """Step states ``(N, ...)``, each at a pace of its own."""
        tableau = _tableau(self.method)
        weights = _Weights(tableau, z)
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
            f = flow(samples.t.unsqueeze(0), z)(z, 0, None)
            if self.first_step is None:
                h = self._first_step(flow, z, samples.t, f, end)
            else:
                h = torch.full_like(samples.t, self.first_step)
            going = samples.screen(h, tableau.n_stages)
        slopes = _Slopes(f, z, tableau.n_stages + 1)
        while samples.on_their_way():
            if going is not None:
                on_device = going.to(z.device)
                h, rejected = h[going], rejected[going]
                z, f = (component_first(x[on_device]) for x in (z, slopes.first))
                slopes = _Slopes(f, z, tableau.n_stages + 1)
            h, after = samples.attempt(h.clamp_max(self.max_step))
            samples.spend(tableau.n_stages)
            dt = per_sample(h, z)
            within = (samples.t - weights.nodes * h).clamp_min_(end)
            velocity = flow(torch.cat([within, after.unsqueeze(0)]), z)
            for number, a in enumerate(weights.stages):
                slopes.evaluate(velocity, slopes.step(z, a, dt), number)
            new = slopes.step(z, weights.step, dt)
            slopes.evaluate(velocity, new, len(weights.stages))
            error = self._error(weights, slopes, h, z, new)
            accept = error <= 1
            growth = _growth(error, tableau.error_estimator_order, after_rejection=rejected)
            z = _where(accept, new, z)
            slopes.settle(accept)
            rejected = ~accept
            h = samples.settle(z, torch.where(accept, after, samples.t), h * growth)
            going = samples.screen(h, tableau.n_stages)
        return samples.result()

    def _error(
        self, weights: _Weights, slopes: _Slopes, h: Tensor, z: Tensor, new: Tensor
    ) -> Tensor:
        """Error of each sample in units of the tolerance, as scipy estimates it."""
        with torch.no_grad():
            scale = torch.maximum(z.abs(), new.abs()).mul_(self.rtol).add_(self.atol)
            sizes = [h * _size(slopes.combined(one).div_(scale)) for one in weights.errors]
        if len(sizes) == 1:
            return sizes[0]
        fifth, third = sizes
        total = (fifth.square() + 0.01 * third.square()).sqrt()
        return torch.where(total == 0, 0.0, fifth.square() / total)

    def _first_step(
        self,
        flow: Flow,
        z: Tensor,
        t: Tensor,
        f: Tensor,
        end: float,
    ) -> Tensor:
        """Step length from the size of the slope and its change (Hairer et al. 1993, II.4)."""
        scale = self.atol + self.rtol * z.abs()
        d0, d1 = _size(z / scale), _size(f / scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # A slope that is not finite is found out by the first step.
        h0 = torch.minimum(h0.nan_to_num(1e-6), t - end)
        nearby = flow((t - h0).unsqueeze(0), z)(z - f * per_sample(h0, z), 0, None)
        d2 = _size((nearby - f) / scale) / h0
        steepest = torch.maximum(d1, d2)
        order = _tableau(self.method).error_estimator_order + 1
        h1 = torch.where(
            steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / order)
        )
        return torch.minimum(100 * h0, h1)


def _flow(process: ReverseProcess, times: Tensor, z: Tensor) -> Velocity:
    """The flow at times ``(S, N)``; where samples share them, with its coefficients ready."""
    shared = times[:, 0]
    if not bool((times == times[:, :1]).all()):

        def velocity(z: Tensor, i: int, out: Tensor | None) -> Tensor:
            found = process.probability_flow(z, times[i])
            return found if out is None else out.copy_(found)

        return velocity
    G = process.sde.diffusion(shared)
    state = as_blocks(process.sde.drift(shared))
    pull = as_blocks(-0.5 * (G @ G.mT)[..., list(process.sde.driven)])
    score = NumberedScore(process, shared, z)
    return lambda z, i, out: combine((state[i], z), (pull[i], score(z, i)), out=out)


class _Weights:
    """A Butcher tableau, its rows with the type and on the device of states.

    Attributes
    ----------
    nodes
        Times of the stages within a step but the first, in units of its length, ``(S, 1)`` on the
        host.
    stages, step, errors
        Weights of the slopes: for each of these stages, for the step, for the estimates of its
        error.
    """

    def __init__(self, tableau: Any, like: Tensor) -> None:
        def row(weights: Any) -> Tensor:
            return torch.as_tensor(weights).to(like)

        self.nodes = torch.as_tensor(tableau.C[1:]).unsqueeze(1)
        self.stages = [row(a[:number]) for number, a in enumerate(tableau.A[1:], start=1)]
        self.step = row(tableau.B)
        errors = (tableau.E5, tableau.E3) if hasattr(tableau, "E5") else (tableau.E,)
        self.errors = [row(one) for one in errors]


class _Slopes:
    """Slopes at the stages of a step, in one piece of memory, so that sums of them are products.

    Parameters
    ----------
    first
        That at the start of the step.
    like
        A state, whose layout in memory they take.
    count
        How many there are.
    """

    def __init__(self, first: Tensor, like: Tensor, count: int) -> None:
        self._grad = torch.is_grad_enabled()
        strides = like.stride()
        self._order = sorted(range(like.ndim), key=lambda axis: -strides[axis])
        self._sizes = [like.shape[axis] for axis in self._order]
        self._back = [self._order.index(axis) for axis in range(like.ndim)]
        self._stages = [first] * count
        if not self._grad:
            self._memory = first.new_empty(count, first.numel())
            self._stages = [self._piece(row) for row in self._memory]
            self._stages[0].copy_(first)

    @property
    def first(self) -> Tensor:
        """That at the start of the next step."""
        return self._stages[0]

    def evaluate(self, velocity: Velocity, z: Tensor, number: int) -> None:
        """Find the one of the time of a number; the first is known."""
        out = None if self._grad else self._stages[number + 1]
        self._stages[number + 1] = velocity(z, number, out)

    def combined(self, weights: Tensor) -> Tensor:
        """Σ weight · slope."""
        if not self._grad:
            return self._piece(_product(weights, self._memory[: len(weights)]))
        # The same product, to the bit, of what autograd follows.
        known = [x.permute(self._order).flatten() for x in self._stages[: len(weights)]]
        return self._piece(_product(weights, torch.stack(known)))

    def step(self, z: Tensor, weights: Tensor, dt: Tensor) -> Tensor:
        """The state that steps of length dt lead to."""
        return torch.addcmul(z, self.combined(weights), dt, value=-1)

    def settle(self, accept: Tensor) -> None:
        """The last is the first of the next step, of the samples whose step was accepted."""
        first = _where(accept, self._stages[-1], self._stages[0])
        if self._grad:
            self._stages[0] = first
        elif first is not self._stages[0]:
            self._stages[0].copy_(first)

    def _piece(self, flat: Tensor) -> Tensor:
        return flat.view(self._sizes).permute(self._back)


def _product(weights: Tensor, slopes: Tensor) -> Tensor:
    """Weights · slopes, in their own precision where a network runs in another."""
    kind = slopes.device.type
    if not torch.is_autocast_enabled(kind):
        return weights @ slopes
    with torch.autocast(kind, enabled=False):
        return weights @ slopes


def _size(x: Tensor) -> Tensor:
    """Root mean square of each sample, float64 on the host."""
    # Squares of errors in units of the tolerance leave the range of half precision.
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = tuple(range(1, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=axes, dtype=wide)
    return norm.cpu().to(torch.float64) / math.sqrt(x[0].numel())


def _where(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Those of the samples that are accepted; by a host's mask, so that none is copied for all."""
    if bool(accept.all()):
        return new
    if not bool(accept.any()):
        return old
    return torch.where(per_sample(accept, new), new, old)


def _growth(error: Tensor, order: int, *, after_rejection: Tensor) -> Tensor:
    """Factor of the next step length for an error in units of the tolerance."""
    growth = 0.9 * error.clamp_min(1e-10) ** (-1 / (order + 1))
    growth = growth.nan_to_num(0.2).clamp(0.2, 10.0)
    # A rejected step shrinks; and not to grow right after keeps the two from alternating.
    return torch.where((error <= 1) & ~after_rejection, growth, growth.clamp_max(1.0))
