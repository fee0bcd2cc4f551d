"""torchdiffeq: its methods as solvers here, and processes here as its right-hand sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import check_at_least, check_positive
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .adaptive import Callback, Integration, Integrator
from .base import Facts
from .noise import NoiseSource
from .progress import progress_bar

__all__ = ["TorchDiffEq", "as_torchdiffeq"]

# Order and evaluations a step.
_ADAPTIVE = {
    "dopri8": (8, 13),
    "dopri5": (5, 6),
    "bosh3": (3, 3),
    "fehlberg2": (2, 2),
    "adaptive_heun": (2, 1),
}
_FIXED = {
    "euler": (1, 1),
    "midpoint": (2, 2),
    "heun2": (2, 2),
    "heun3": (3, 3),
    "rk4": (4, 4),
}
_METHODS = (*_ADAPTIVE, *_FIXED, "scipy_solver")


class _MaxNfevError(Exception):
    """Raised inside torchdiffeq's loop, which has no other way out."""


class _CallbackError(Exception):
    """Raised inside torchdiffeq's loop, which has no other way out."""


@dataclass(frozen=True, kw_only=True)
class TorchDiffEq(Integrator):
    """The probability flow by a method of torchdiffeq (Chen et al. 2018).

    Methods with fixed steps step through the grid that is given; adaptive ones, with one step size
    for the whole batch, use its ends, and are made to step onto each time that is wanted instead of
    past it. The score is never asked outside the grid's ends. torchdiffeq reads numbers back from
    the device at every step; `ProbabilityFlow` has a step size for each sample and less overhead.

    Parameters
    ----------
    method
        ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"`` or ``"adaptive_heun"``, with
        adaptive steps; ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"`` or ``"rk4"``, with
        fixed ones; ``"scipy_solver"``, with ``options={"solver": "LSODA"}``, say. Its Adams methods
        assume even steps over all of the interval and are left out.
    rtol, atol
        Tolerances of adaptive methods, > 0.
    options
        Further options of torchdiffeq.
    max_nfev
        Evaluations after which to give up.

    Raises
    ------
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> start = sde.prior.sample((8, 1), generator=torch.Generator().manual_seed(0))
    >>> times = solvers.root_times(sde.T, 1e-3, 20)
    >>> solvers.solve(process, solvers.TorchDiffEq(method="rk4"), start, times).nfev
    80
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict)
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
        own = {"step_t", "step_size", "grid_constructor"} & set(self.options)
        if own:
            msg = f"options must leave {', '.join(sorted(own))} to the grid; got {self.options!r}"
            raise ValueError(msg)

    @property
    def facts(self) -> Facts:
        """Every linear SDE; order of the method."""
        order, evaluations = {**_ADAPTIVE, **_FIXED}.get(self.method, (None, 1))
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=evaluations,
            ode_order=order,
            adaptive=self.method not in _FIXED,
        )

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
        """Run all samples from ``times[0]`` down to ``times[-1]`` by one call of torchdiffeq."""
        from torchdiffeq import odeint  # slow to import, and seldom wanted

        options = dict(self.options)
        asked = torch.cat([times[:1], stops]).to(z.device)
        if self.method in _ADAPTIVE:
            options["step_t"] = stops.to(z.device)
        elif self.method in _FIXED:
            grid = times.to(z.device)
            options["grid_constructor"] = lambda func, y0, t: grid
        with progress_bar(None, shown=progress, desc=f"TorchDiffEq {self.method}") as bar:
            flow = _WatchedFlow(process, z, times, self.max_nfev, callback, bar)
            message = "reached the end of the interval"
            states = z.new_full((len(stops), *z.shape), torch.nan)
            state, arrived, stopped = z, True, False
            try:
                states = odeint(
                    flow,
                    z,
                    asked,
                    rtol=self.rtol,
                    atol=self.atol,
                    method=self.method,
                    options=options,
                )[1:]
                state = states[-1]
                flow.note(times[-1], state)
            except _MaxNfevError:
                message = f"max_nfev: {self.max_nfev} evaluations did not reach the end"
                state, arrived = flow.state, False
            except _CallbackError:
                message = "stopped by the callback"
                state, arrived, stopped = flow.state, flow.at_end, not flow.at_end
            except AssertionError as error:
                # What torchdiffeq says of an underflow of its step or of numbers not finite.
                message = f"torchdiffeq gave up: {str(error).splitlines()[0][:100]}"
                state, arrived = flow.state, False
        n = len(z)
        return Integration(
            state=state,
            states=states,
            nfev=torch.full((n,), flow.nfev),
            success=torch.full((n,), arrived),
            message=message,
            stopped=stopped,
            stats={"steps": flow.steps},
        )


class _WatchedFlow:
    """The flow within its interval, counted, with the last state that was stepped to."""

    def __init__(
        self,
        process: ReverseProcess,
        z: Tensor,
        times: Tensor,
        max_nfev: int,
        callback: Callback | None,
        bar: Any,
    ) -> None:
        self._process, self._times, self._max_nfev = process, times, max_nfev
        self._callback, self._bar = callback, bar
        self._last = times[0]
        self.state, self.nfev, self.steps = z, 0, 0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.nfev == self._max_nfev:
            raise _MaxNfevError
        self.nfev += 1
        # Times come in the state's precision, and may be rounded past the ends.
        at = t.detach().to("cpu", torch.float64).clamp(self._times[-1], self._times[0])
        return self._process.probability_flow(z, at)

    def callback_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        """Torchdiffeq's call before each attempt, with the state that it starts from."""
        self.note(t.detach().to("cpu", torch.float64), z)

    @property
    def at_end(self) -> bool:
        return bool(self._last <= self._times[-1])

    def note(self, t: Tensor, z: Tensor) -> None:
        """Remember a state that was stepped to."""
        if not bool(t < self._last):
            return
        self._last, self.state = t, z
        self.steps += 1
        self._bar.update()
        if self._callback is not None and self._callback(self.steps, float(t), z):
            raise _CallbackError


def as_torchdiffeq(process: LinearSDE | ReverseProcess) -> torch.nn.Module:
    """A process as the function (t, z) that ``torchdiffeq.odeint`` integrates.

    Of a `ReverseProcess` the probability flow, to be run over decreasing times; of a `LinearSDE`
    the flow of the mean, F(t) z. Parameters of the score, where it is a module, are the module's,
    as ``odeint_adjoint`` wants them.

    Parameters
    ----------
    process
        The process.

    Raises
    ------
    TypeError
        If it is neither.

    Examples
    --------
    >>> import torch, torchdiffeq
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> z = sde.prior.sample((8, 1), generator=torch.Generator().manual_seed(0))
    >>> times = torch.tensor([1.0, 1e-3])
    >>> torchdiffeq.odeint(solvers.as_torchdiffeq(process), z, times, method="rk4").shape
    torch.Size([2, 8, 2, 1])
    """
    return _Flow(process)


class _Flow(torch.nn.Module):
    def __init__(self, process: LinearSDE | ReverseProcess) -> None:
        super().__init__()
        if not isinstance(process, LinearSDE | ReverseProcess):
            msg = f"process must be a LinearSDE or a ReverseProcess; got {type(process).__name__}"
            raise TypeError(msg)
        self._process = process
        if isinstance(process, ReverseProcess) and isinstance(process.score, torch.nn.Module):
            self.score = process.score

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        at = t.detach().to("cpu", torch.float64)
        if isinstance(self._process, LinearSDE):
            return apply_blocks(self._process.drift(at), z)
        return self._process.probability_flow(z, at)
