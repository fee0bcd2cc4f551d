"""Methods of torchdiffeq as solvers of the probability flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_positive, one_of
from cldsde.messages import counted
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess

from .adaptive import LOOSE
from .base import Facts, Integration, Run, Solver

# Order, evaluations per step, and the stage times of methods with fixed steps.
_METHODS: dict[str, tuple[int, int, tuple[float, ...] | None]] = {
    "dopri8": (8, 13, None),
    "dopri5": (5, 6, None),
    "bosh3": (3, 3, None),
    "fehlberg2": (2, 2, None),
    "adaptive_heun": (2, 1, None),
    "euler": (1, 1, (0.0,)),
    "midpoint": (2, 2, (0.0, 1 / 2)),
    "heun2": (2, 2, (0.0, 1.0)),
    "heun3": (3, 3, (0.0, 1 / 3, 2 / 3)),
    "rk4": (4, 4, (0.0, 1 / 3, 2 / 3, 1.0)),
}


class _EndError(Exception):
    """Raised to leave torchdiffeq's loop early; the message says why."""


@dataclass(frozen=True, kw_only=True)
class TorchDiffEq(Solver):
    """Solver of the probability-flow ODE by a method of torchdiffeq (Chen et al. 2018).

    Methods with fixed steps use the given grid. Adaptive methods use its ends, with one step size
    for the whole batch, and step onto each requested time. The score is never evaluated outside the
    grid's ends. torchdiffeq reads numbers back from the device at every step, so `ProbabilityFlow`
    has less overhead. Options out of range raise a ValueError, and options of another type a
    TypeError.

    Parameters
    ----------
    method
        With adaptive steps: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"`` or
        ``"adaptive_heun"``. With fixed steps: ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``
        or ``"rk4"``. Adams methods are not supported, because they assume even steps.
        ``"scipy_solver"`` is not supported, because it leaves the device and records no gradients.
    rtol, atol
        Relative and absolute tolerance of adaptive methods, > 0.
    options
        Further options of torchdiffeq's method, except for options that set the grid.
    max_nfev
        Largest number of evaluations, an integer ≥ 1. A solve that needs more has failed.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    max_nfev: int = 10_000

    def __post_init__(self) -> None:
        one_of(self.method, tuple(_METHODS), "method")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        as_integer(self.max_nfev, 1, "max_nfev")
        own = {"step_t", "step_size", "grid_constructor", "dtype"} & set(self.options)
        if own:
            raise ValueError(
                f"options must not set {', '.join(sorted(own))}, because times sets the grid; got "
                f"{self.options!r}"
            )

    @property
    def facts(self) -> Facts:
        """Every linear SDE; order of the method."""
        order, evaluations, stages = _METHODS[self.method]
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=evaluations,
            ode_order=order,
            state_on_grid=False,
            adaptive=stages is None,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> None:
        """Return None, because torchdiffeq evaluates the flow at its own times."""

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor | None:
        """Stage times of each step for methods with fixed steps; None for adaptive methods."""
        *_, stages = _METHODS[self.method]
        if stages is None:
            return None
        return torch.stack([times[:-1] + c * times.diff() for c in stages], dim=1).flatten()

    def with_step(self, h: float) -> TorchDiffEq:
        """The same adaptive method with fixed steps of length h and without error control."""
        if not self.facts.adaptive:
            msg = f"method must be adaptive to take steps of one length; got {self.method!r}"
            raise ValueError(msg)
        options = {**self.options, "first_step": h, "max_step": h}
        return replace(self, rtol=LOOSE, atol=LOOSE, options=options)

    def integrate(self, run: Run) -> Integration:
        """Integrate all samples to the end by one call of torchdiffeq."""
        from torchdiffeq import odeint  # imported here because it is slow to import

        # Copy the state, because a score may write to its argument.
        z, times, stops = run.state.clone(), run.times, run.stops
        # Apple's GPUs have no float64.
        precision = torch.float32 if z.device.type == "mps" else torch.float64
        grid, ahead = times.to(z.device, precision), stops.to(z.device, precision)
        options = dict(self.options)
        if self.facts.adaptive:
            options.update(step_t=ahead, dtype=precision)
            if torch.is_grad_enabled():
                # torchdiffeq would differentiate its estimate of the first step.
                options.setdefault("first_step", 1e-3 * float(times[0] - times[-1]))
        else:
            options["grid_constructor"] = lambda func, y0, t: grid
        with progress_bar(None, shown=run.progress, desc=f"TorchDiffEq {self.method}") as bar:
            flow = _WatchedFlow(run, self.max_nfev, bar)
            message = "reached the end of the interval"
            try:
                if len(z):
                    found = odeint(
                        flow,
                        z,
                        torch.cat([grid[:1], ahead]),
                        rtol=self.rtol,
                        atol=self.atol,
                        method=self.method,
                        options=options,
                    )
                    flow.note(times[-1], found[-1])
                flow.arrived = True
            except _EndError as error:
                message = str(error)
            except AssertionError as error:
                if error is flow.raised:
                    raise
                # torchdiffeq asserts that its step does not underflow and that numbers are finite.
                message = f"torchdiffeq failed: {str(error).splitlines()[0][:100]}"
        return Integration(
            state=flow.state,
            states=torch.stack(flow.states),
            nfev=torch.full((len(z),), flow.nfev, device="cpu"),
            success=torch.full((len(z),), flow.arrived, device="cpu"),
            message=message,
            stopped=flow.stopped,
            stats={"steps": flow.steps},
        )


class _WatchedFlow:
    """The flow that torchdiffeq calls; it counts evaluations and saves accepted states."""

    def __init__(self, run: Run, max_nfev: int, bar: Any) -> None:
        self._process, self._times, self._max_nfev = run.process, run.times, max_nfev
        self._callback, self._bar = run.callback, bar
        self._stops: list[float] = run.stops.tolist()
        self._last = float(run.times[0])
        self.state, self.nfev, self.steps = run.state, 0, 0
        self.states = [torch.full_like(run.state, torch.nan) for _ in self._stops]
        self.arrived = self.stopped = False
        self.raised: AssertionError | None = None  # by the score

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.nfev + 1 > self._max_nfev:
            msg = f"max_nfev: {counted(self._max_nfev, 'evaluation')} did not reach the end"
            raise _EndError(msg)
        at = t.detach().to("cpu", torch.float64)
        if not bool(at.isfinite()):
            raise _EndError(
                "the step length is not finite: the score is not finite, or rtol and atol cannot "
                f"be met in {z.dtype}"
            )
        # torchdiffeq rounds times to the state's precision, possibly past the ends.
        at = at.clamp(self._times[-1], self._times[0])
        self.nfev += int(self._process.score.evaluations(at))
        try:
            return self._process.probability_flow(z, at)
        except AssertionError as error:
            self.raised = error
            raise

    def callback_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        """Torchdiffeq calls this before each attempted step with the state that it starts from."""
        self.note(t.detach(), z)

    def note(self, t: Tensor, z: Tensor) -> None:
        """Save an accepted state."""
        now = float(t)
        if not now < self._last:
            return
        self._last, self.state = now, z
        if now in self._stops:
            self.states[self._stops.index(now)] = z
        self.steps += 1
        self._bar.update()
        stop = self._callback is not None and self._callback(self.steps, now, z.contiguous())
        if stop and now > self._stops[-1]:
            self.stopped = True
            raise _EndError("stopped by the callback")
