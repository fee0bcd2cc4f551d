"""Probability-flow ODE by Runge–Kutta methods with adaptive steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, per_sample
from cldsde.linear.checks import as_integer, check_positive, one_of
from cldsde.score import ReverseProcess
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes, on_device

from .adaptive import LOOSE, ActiveSamples
from .base import Facts, Integration, Run, Solver
from .combine import as_blocks, combine

Method = Literal["bosh3", "dopri5", "dopri8"]
Pace = Literal["batch", "sample"]


def _tableau(method: Method) -> Any:
    """Butcher tableau and error weights, from scipy's class of the method."""
    from scipy import integrate  # imported here because it is slow to import and seldom needed

    names = {"bosh3": "RK23", "dopri5": "RK45", "dopri8": "DOP853"}
    return getattr(integrate, names[method])


@dataclass(frozen=True, kw_only=True)
class ProbabilityFlow(Solver):
    r"""Adaptive Runge–Kutta solver of the probability-flow ODE dz/dt = F z − ½ GGᵀ s.

    The error of a step is divided elementwise by atol + rtol · max(\|before\|, \|after\|), as in
    scipy and torchdiffeq. Its root mean square, over batch or sample (``pace``), must be at most 1.
    The score is never evaluated outside [ε, T]. Options out of range raise a ValueError, and
    options of another type a TypeError.

    Parameters
    ----------
    method
        ``"dopri5"`` (Dormand and Prince, order 5), ``"bosh3"`` (Bogacki and Shampine, order 3) or
        ``"dopri8"`` (order 8), with scipy's coefficients.
    rtol, atol
        Relative and absolute tolerance, > 0.
    max_nfev
        Largest number of evaluations per sample, an integer ≥ 1. A sample that needs more
        has failed.
    first_step
        Length of the first step, > 0; None: estimated as in Hairer et al. 1993, II.4.
    max_step
        Length of the longest step, > 0.
    pace
        ``"batch"``: one step length for all samples. An exact score then computes its coefficients
        once per evaluation, but a sample depends on its batch, and a sample that fails stops all.
        ``"sample"``: errors and step lengths per sample. A result then does not depend on the other
        samples apart from rounding. The score gets the whole batch until the last sample arrives.
    """

    method: Method = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfev: int = 10_000
    first_step: float | None = None
    max_step: float = math.inf
    pace: Pace = "batch"

    def __post_init__(self) -> None:
        one_of(self.method, Method, "method")
        one_of(self.pace, Pace, "pace")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        as_integer(self.max_nfev, 1, "max_nfev")
        if self.first_step is not None:
            check_positive(self.first_step, "first_step")
        if self.max_step != math.inf:
            check_positive(self.max_step, "max_step")

    @property
    def facts(self) -> Facts:
        """Every linear SDE; the method's order and its number of stages."""
        tableau = _tableau(self.method)
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=tableau.n_stages,
            ode_order=tableau.order,
            state_on_grid=False,
            adaptive=True,
            encodes=True,
        )

    def with_step(self, h: float) -> ProbabilityFlow:
        """The same method with fixed steps of length h and without error control."""
        return replace(self, rtol=LOOSE, atol=LOOSE, first_step=h, max_step=h)

    def prepare(self, process: ReverseProcess, times: Tensor) -> Any:
        """Butcher tableau of the method."""
        return _tableau(self.method)

    def integrate(self, run: Run) -> Integration:
        """Integrate all samples to the end."""
        batch, (clock, sign) = len(run.state), _clock(run.times)
        # Samples that share their steps are integrated as one large sample.
        shared = self.pace == "batch" and batch > 0
        inner = run.callback

        def callback(n: int, u: Tensor, z: Tensor) -> object:
            assert inner is not None
            return inner(n, clock(u).expand(batch), z[0]) if shared else inner(n, clock(u), z)

        # Copy the state, because a score may write to its argument.
        state = run.state.clone(memory_format=torch.contiguous_format)
        run = replace(
            run,
            state=state.unsqueeze(0) if shared else state,
            times=clock(run.times),
            stops=clock(run.stops),
            callback=inner and callback,
        )
        samples = ActiveSamples(run, run.state, max_nfev=self.max_nfev, name=type(self).__name__)
        done = self._run(run, samples, _Flow(run.process, samples, clock, sign, shared))
        if not shared:
            return done
        return replace(
            done,
            state=done.state[0],
            states=done.states[:, 0],
            nfev=done.nfev.repeat(batch),
            success=done.success.repeat(batch),
        )

    def _run(self, run: Run, samples: ActiveSamples, flow: _Flow) -> Integration:
        """Integrate N states ``(N, …)``, each with step lengths of its own."""
        z, tableau, end = run.state, run.tables, float(run.times[-1])
        errors = [tableau.E5, tableau.E3] if hasattr(tableau, "E5") else [tableau.E]
        table = [*(a[:n] for n, a in enumerate(tableau.A[1:], start=1)), tableau.B, *errors]
        rows = on_device([torch.as_tensor(row, device="cpu") for row in table], z.dtype, z.device)
        # Weights of the slopes for each stage after the first, the step and its error estimates.
        *stages, step = rows[: tableau.n_stages]
        errors = rows[tableau.n_stages :]
        # Times of these stages, in units of the step length, (S, 1) on the CPU.
        nodes = torch.as_tensor(tableau.C[1:], device="cpu").unsqueeze(1)
        h, f, rejected = samples.t - end, z, torch.zeros(len(z), dtype=torch.bool, device="cpu")
        at_start = 2 if self.first_step is None else 1
        samples.screen(h, cost=at_start)
        if samples.on_their_way():
            samples.attempt(h)
            velocity, _ = flow(samples.t.unsqueeze(0), h, z)
            f = velocity(z, 0)
            h = torch.full_like(samples.t, self.first_step or 0.0)
            if self.first_step is None:
                h = self._first_step(flow, z, samples.t, f, end)
            samples.screen(h, tableau.n_stages)
        while samples.on_their_way():
            h, after = samples.attempt(h.clamp_max(self.max_step))
            within = (samples.t - nodes * h).clamp_min_(end)
            velocity, dt = flow(torch.cat([within, after.unsqueeze(0)]), h, z)
            slopes = _Slopes(f, tableau.n_stages + 1)
            for number, a in enumerate(stages):
                slopes.append(velocity(slopes.step(z, a, dt), number))
            new = slopes.step(z, step, dt)
            last = velocity(new, len(stages))
            slopes.append(last)
            sizes = self._error(errors, slopes, dt, z, new)
            del slopes  # so that its memory is free before the next attempt
            error = sizes.cpu().to(torch.float64)
            accept, accept_on_device = error <= 1, sizes <= 1
            growth = _growth(error, tableau.error_estimator_order, after_rejection=rejected)
            z = _where(accept, accept_on_device, new, z)
            f = _where(accept, accept_on_device, last, f)
            rejected = ~accept
            h = samples.settle(z, accept, accept_on_device, after, h * growth)
            samples.screen(h, tableau.n_stages)
        return samples.result()

    def _error(
        self, weights: list[Tensor], slopes: _Slopes, dt: Tensor, z: Tensor, new: Tensor
    ) -> Tensor:
        """Error of each sample in units of the tolerance, by scipy's estimate."""
        with torch.no_grad():
            scale = torch.maximum(z.abs(), new.abs()).mul_(self.rtol).add_(self.atol)
            sizes = [dt * _size(slopes.sum(one).div_(scale)) for one in weights]
        if len(sizes) == 1:
            return sizes[0]
        fifth, third = sizes
        total = (fifth.square() + 0.01 * third.square()).sqrt()
        return torch.where(total == 0, 0.0, fifth.square() / total)

    def _first_step(self, flow: _Flow, z: Tensor, t: Tensor, f: Tensor, end: float) -> Tensor:
        """Step length from the size of the slope and its change (Hairer et al. 1993, II.4)."""
        scale = self.atol + self.rtol * z.abs()
        d0, d1 = torch.stack([_size(z / scale), _size(f / scale)]).cpu().to(torch.float64)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # If a slope is not finite, the first step reports it.
        h0 = torch.minimum(h0.nan_to_num(1e-6), t - end)
        velocity, dt = flow((t - h0).unsqueeze(0), h0, z)
        nearby = velocity(z - f * per_sample(dt.to(z.dtype), z), 0)
        d2 = _size((nearby - f) / scale).cpu().to(torch.float64) / h0
        steepest = torch.maximum(d1, d2)
        order = _tableau(self.method).error_estimator_order + 1
        h1 = torch.where(
            steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / order)
        )
        return torch.minimum(100 * h0, h1)


def _clock(times: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Function from t to a time u that decreases along the grid, and back; the sign of dt/du."""
    if times[0] > times[-1]:
        return lambda t: t, 1
    low, high = float(times[0]), float(times[-1])
    # Rounding must not lead beyond the ends.
    return lambda t: (low + high - t).clamp(low, high), -1


class _Flow(NamedTuple):
    """The flow along the grid, dz/du for a decreasing time u."""

    process: ReverseProcess
    samples: ActiveSamples
    clock: Callable[[Tensor], Tensor]  # from u to t
    sign: int  # of dt/du
    shared: bool  # whether one sample stands for the batch

    def __call__(
        self, times: Tensor, h: Tensor, state: Tensor
    ) -> tuple[Callable[[Tensor, int], Tensor], Tensor]:
        """Velocity dz/du at times u ``(S, N)``, and h ``(N,)``, for states like this one."""
        process, samples, sde = self.process, self.samples, self.process.sde
        times = self.clock(times)
        samples.spend(process.score.evaluations(times).sum(0))
        F, G = self.sign * sde.drift(times), sde.diffusion(times)
        pull = -0.5 * self.sign * (G @ G.mT)[..., list(sde.driven)]
        if self.shared:
            at, dt = samples.moved([times, h])
            score = KnownScore(process, KnownTimes(times[:, 0]), state[0], at[:, 0])
            state_blocks, score_blocks = as_blocks(F[:, 0]), as_blocks(pull[:, 0])

            def shared_velocity(z: Tensor, i: int) -> Tensor:
                one = z[0]
                terms = (state_blocks[i], one), (score_blocks[i], score(one, i))
                return combine(*terms).unsqueeze(0)

            return shared_velocity, dt
        at, dt, drift, gain = samples.moved([times, h, F, pull])
        score = KnownScore(process, KnownTimes(times), state, at)

        def velocity(z: Tensor, i: int) -> Tensor:
            return apply_blocks(drift[i], z) + apply_blocks(gain[i], score(z, i))

        return velocity, dt


class _Slopes:
    """Slopes at the stages of a step, in one tensor unless gradients are recorded."""

    def __init__(self, first: Tensor, count: int) -> None:
        self._shape = first.shape
        self._count = 0
        # Autograd keeps each slope by itself, and must not see it written into another tensor.
        self._listed: list[Tensor] = []
        recorded = torch.is_grad_enabled()
        self._memory = None if recorded else first.new_empty(count, first.numel())
        self.append(first)

    def append(self, slope: Tensor) -> None:
        """Add the slope of the next stage."""
        if self._memory is None:
            self._listed.append(slope.flatten())
        else:
            self._memory[self._count] = slope.flatten()
        self._count += 1

    def sum(self, weights: Tensor) -> Tensor:
        """Σ weight · slope over the first slopes."""
        count = len(weights)
        known = torch.stack(self._listed[:count]) if self._memory is None else self._memory[:count]
        # Keep the precision of the slopes if the network runs under autocast.
        with torch.autocast(known.device.type, enabled=False):
            return (weights @ known).view(self._shape)

    def step(self, z: Tensor, weights: Tensor, dt: Tensor) -> Tensor:
        """The state that a step of length dt leads to."""
        return torch.addcmul(z, self.sum(weights), per_sample(dt.to(z.dtype), z), value=-1)


def _size(x: Tensor) -> Tensor:
    """Root mean square of each sample, in single precision at least."""
    # Squares of errors in units of the tolerance overflow half precision.
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = tuple(range(1, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dim=axes, dtype=wide)
    return norm / math.sqrt(max(x[0].numel(), 1))


def _where(accept: Tensor, accept_on_device: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """New states of accepted samples; launches no kernel if all or none are accepted."""
    if bool(accept.all()):
        return new
    if not bool(accept.any()):
        return old
    return torch.where(per_sample(accept_on_device, new), new, old)


def _growth(error: Tensor, order: int, *, after_rejection: Tensor) -> Tensor:
    """Factor for the next step length, from the error in units of the tolerance."""
    growth = 0.9 * error.clamp_min(1e-10) ** (-1 / (order + 1))
    growth = growth.nan_to_num(0.2).clamp(0.2, 10.0)
    # A rejected step shrinks. The step after it must not grow, or the two would alternate.
    return torch.where((error <= 1) & ~after_rejection, growth, growth.clamp_max(1.0))
