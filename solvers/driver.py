"""`solve`: run a solver on a reverse process over a grid, and say what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.checks import as_times, check_state
from cldsde.linear.sde import LinearSDE
from cldsde.score import Conversion, ReverseProcess
from cldsde.score.reverse import check_reverse_process

from .adaptive import Callback, Integrator
from .base import Memory, OffGrid, Solver, Stepper
from .combine import Block, batch_first, combine, component_first
from .noise import FreshNoise, GridNoise, NoiseSource, checked_noise
from .numbered_score import NumberedScore
from .progress import progress_bar

__all__ = ["Solution", "check_arguments", "checked_grid", "solve"]


@dataclass(frozen=True)
class Solution:
    """Result of `solve`, with scipy's names.

    Attributes
    ----------
    state
        Final state ``(B, k, *D)``.
    data
        ``(B, *D)``: the data component of the state, or what ``denoise`` asked for.
    t
        Times ``(S,)`` of the states in ``y``: the last time, or those of ``t_eval``.
    y
        States at these times, ``(S, B, k, *D)``; of a sample that gave up, NaN where it did not
        come.
    nfev
        Score evaluations of each sample, counted by wrapping the score; where samples differ, of
        the one with most, and ``stats["nfev"]`` holds all.
    status
        0 when every sample arrived; 1 when a state is not finite or a solver gave up; 2 when the
        callback asked to stop.
    message
        What happened, in words.
    stats
        Further numbers: ``success``, which samples arrived with finite numbers, ``(B,)``; of
        solvers on a grid ``steps``; of others ``nfev`` of each sample and ``attempts``.
    """

    state: Tensor
    data: Tensor
    t: Tensor
    y: Tensor
    nfev: int
    status: int
    message: str
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Whether every sample reached the end with finite numbers."""
        return self.status == 0

    def __repr__(self) -> str:
        """Facts in one line."""
        return (
            f"Solution(success={self.success}, nfev={self.nfev}, state={tuple(self.state.shape)}, "
            f"message={self.message!r})"
        )


def solve(
    process: ReverseProcess,
    solver: Solver | Integrator,
    state: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: NoiseSource | None = None,
    denoise: bool | Literal["step"] = False,
    t_eval: Tensor | None = None,
    callback: Callback | None = None,
    differentiable: bool = False,
    progress: bool = False,
) -> Solution:
    """Integrate a reverse process from ``times[0]`` down to ``times[-1]``.

    Parameters
    ----------
    process
        The reverse process: forward SDE and score.
    solver
        How to step, e.g. ``EulerMaruyama()``.
    state
        Start ``(B, k, *D)``, floating point, e.g. ``sde.prior.sample(...)``; it is not changed.
    times
        Decreasing grid ``(n + 1,)`` in [0, T], e.g. ``quadratic_times(sde.T, 1e-3, 50)``; solvers
        that choose their times use its two ends.
    generator
        Source of the noise; the same seed gives the same bits on the same machine.
    noise
        A noise source in place of ``generator``.
    denoise
        How to finish. True: with the data prediction E[x_0 | z] at the last time. ``"step"``: with
        the data of one Euler step of the reverse SDE to time 0 without its noise, as published
        code does; it removes no noise from data that none drives. Either costs one evaluation.
    t_eval
        Times at which states are wanted, decreasing; of the grid, or, for solvers that choose
        their times, any between its ends. None keeps the last state only. What a solver mends of a
        state with the next step, as a corrector does, is not seen; and one that merges moves across
        grid times, as `SSCS`, draws more noise where its state is wanted there.
    callback
        Called after each step as ``callback(step, t, z)``, with the number of steps so far, the
        time and the state, not to be changed, and to be cloned if kept; where each sample has its
        own time, after each attempt and with all times ``(B,)``. Stops the solve by returning True.
    differentiable
        Record gradients, of the state and of the score's parameters; coefficients of the process
        are constants. Memory then grows with the number of steps.
    progress
        Show a progress bar on stderr: of steps, or of samples that have arrived.

    Returns
    -------
    Solution
        ``success`` is False, with a message, where the state is not finite.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If the state does not fit the process, the grid does not decrease, ``t_eval`` is not of the
        grid, the solver does not apply to the process, or both ``generator`` and ``noise`` are
        given. Nothing is evaluated before all arguments are checked.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> data = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    >>> g = torch.Generator().manual_seed(0)
    >>> times = solvers.quadratic_times(sde.T, 1e-3, 50)
    >>> start = sde.prior.sample((1000, 1), generator=g)
    >>> process = ReverseProcess(sde, data.score(sde))
    >>> solvers.solve(process, solvers.SSCS(), start, times, generator=g)
    Solution(success=True, nfev=50, state=(1000, 2, 1), message='reached the end of the grid')
    >>> solvers.solve(process, solvers.SSCS(), start, times, t_eval=times[::10]).y.shape
    torch.Size([6, 1000, 2, 1])
    """
    check_arguments(process, solver)
    sde = process.sde
    if not bool(_finite(check_state(state, sde.components, "state")).all()):
        msg = "state must be finite; it holds NaN or infinity"
        raise ValueError(msg)
    if callback is not None and not callable(callback):
        msg = f"callback must be a callable (step, t, z); got {callback!r}"
        raise TypeError(msg)
    grid = checked_grid(times, sde.T)
    kept = _checked_stops(t_eval, grid, of_grid=not solver.facts.adaptive)
    source = _noise_source(generator, noise)
    final = _final(sde, grid[-1], denoise)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        if isinstance(solver, Solver):
            watched = callback is not None or (kept is not None and bool((kept > grid[-1]).any()))
            if watched and isinstance(solver, OffGrid):
                solver = solver.on_grid()
            last = grid[-1:] if final is not None else grid[:0]
            run = _step_through(
                process, solver, state, grid, source, kept, callback, progress, last
            )
        else:
            z = state.clone()
            run = _integrate(process, solver, z, grid, source, kept, callback, progress)
        return _finish(run, final)


class _Final(NamedTuple):
    """The data as state · z + score · s(z), at the last time."""

    state: Block
    score: Block

    def __call__(self, z: Tensor, score: Tensor) -> Tensor:
        return combine((self.state, z), (self.score, score))[:, 0]


def _final(sde: LinearSDE, t: Tensor, denoise: object) -> _Final | None:
    if denoise is False:
        return None
    if denoise is not True and not (isinstance(denoise, str) and denoise == "step"):
        msg = f"denoise must be True, False or 'step'; got {denoise!r}"
        raise ValueError(msg)
    if float(t) == 0:
        msg = (
            f"times must end above 0 where denoise={denoise!r}: the law given x_0 has no density "
            "at t = 0; take t > 0"
        )
        raise ValueError(msg)
    if denoise == "step":
        F, G = sde.drift(t), sde.diffusion(t)
        state = torch.eye(sde.components, dtype=torch.float64) - t * F
        score = t * (G @ G.mT)[:, list(sde.driven)]
    else:
        prediction = Conversion.at(sde, t, "score", "data")
        state, score = prediction.state, prediction.value
    return _Final(state[:1].tolist(), score[:1].tolist())


class _Run(NamedTuple):
    """What became of a batch before its data are read off."""

    state: Tensor
    t: Tensor
    y: Tensor
    nfev: Tensor
    arrived: Tensor
    stopped: bool
    message: str
    stats: dict[str, Any]
    last_score: Callable[[Tensor], Tensor]


def _step_through(
    process: ReverseProcess,
    solver: Solver,
    start: Tensor,
    grid: Tensor,
    noise: NoiseSource,
    kept: Tensor | None,
    callback: Callback | None,
    progress: bool,
    also_asked: Tensor,
) -> _Run:
    if isinstance(noise, GridNoise):
        noise = noise.along(process, solver, grid)
    noise = checked_noise(noise)
    noise.check(start)
    tables = solver.prepare(process, grid)
    asked = solver.evaluation_times(process, grid)
    score = NumberedScore(process, torch.cat([asked, also_asked]), start)
    instants = grid.tolist()
    wanted = set(instants[-1:] if kept is None else kept.tolist())

    # A copy, so that not even a score that writes to its argument changes the caller's state.
    z = component_first(start)
    memory: Memory = ()
    saved = [(instants[0], batch_first(z).clone())] if instants[0] in wanted else []
    in_turn = None if callback is not None else _stepper(solver, z, tables, score, noise)
    steps, stopped = 0, False
    for i in progress_bar(range(len(grid) - 1), shown=progress, desc=type(solver).__name__):
        # Handed over, not held, so that a step can let go of the state that it starts from.
        held = [z]
        del z
        if in_turn is None:
            z, memory = solver.step(held.pop(), memory, tables, i, score, noise)
        else:
            z, memory = in_turn(held.pop(), memory, i)
        steps, at = i + 1, instants[i + 1]
        last = steps == len(grid) - 1
        if at in wanted and not last:
            saved.append((at, batch_first(z).clone()))  # the memory may be used again
        if callback is not None and callback(steps, at, batch_first(z)):
            stopped = not last
            break
    # With it goes the memory that steps took in turn, before the state is copied.
    del in_turn
    z = batch_first(z)
    if last and at in wanted:
        saved.append((at, z))
    return _Run(
        state=z,
        t=torch.tensor([t for t, _ in saved], dtype=torch.float64),
        y=_stacked([y for _, y in saved], z),
        nfev=torch.full((len(z),), score.nfev),
        arrived=torch.full((len(z),), not stopped),
        stopped=stopped,
        message=f"stopped by the callback after {steps} steps"
        if stopped
        else "reached the end of the grid",
        stats={"steps": steps},
        last_score=lambda z: score(z, len(asked)),
    )


def _stepper(
    solver: Solver, z: Tensor, tables: Any, score: NumberedScore, noise: NoiseSource
) -> Stepper | None:
    """The solver's `Solver.stepper`, unless a score of the user's might keep states."""

    def first_with(name: str) -> type:
        return next(kind for kind in type(solver).__mro__ if name in vars(kind))

    # A class with a `step` of its own, but not a `stepper`, means the former.
    if score.tabulated and issubclass(first_with("stepper"), first_with("step")):
        return solver.stepper(z, tables, score, noise)
    return None


def _integrate(
    process: ReverseProcess,
    solver: Integrator,
    z: Tensor,
    grid: Tensor,
    noise: NoiseSource,
    kept: Tensor | None,
    callback: Callback | None,
    progress: bool,
) -> _Run:
    wanted = grid[-1:] if kept is None else kept
    ahead = wanted[wanted < grid[0]]
    if not len(ahead) or ahead[-1] > grid[-1]:
        ahead = torch.cat([ahead, grid[-1:]])
    if isinstance(noise, GridNoise):
        noise = noise.along(process, solver, grid)
    noise = checked_noise(noise)
    noise.check(z)
    result = solver.integrate(
        process,
        z,
        grid,
        noise,
        stops=ahead,
        callback=callback,
        progress=progress,
    )
    states = torch.cat([z.unsqueeze(0), result.states])
    times = torch.cat([grid[:1], ahead])
    return _Run(
        state=result.state,
        t=wanted,
        y=states[torch.isin(times, wanted).to(z.device)],
        nfev=result.nfev,
        arrived=result.success,
        stopped=result.stopped,
        message=result.message,
        stats={**result.stats, "nfev": result.nfev},
        last_score=lambda z: process.evaluate(z, grid[-1]),
    )


def _finish(run: _Run, final: _Final | None) -> Solution:
    nfev, z = run.nfev, batch_first(run.state)
    data = z[:, 0]
    if final is not None and bool(run.arrived.any()):
        nfev = nfev + run.arrived
        if bool(run.arrived.all()):
            data = final(z, run.last_score(z))
        else:
            rows = run.arrived.to(z.device)
            data = data.clone()
            data[rows] = final(z[rows], run.last_score(z[rows]))
    success = run.arrived & (_finite(z) & _finite(data)).cpu()
    message = run.message
    if bool(run.arrived.all()) and not bool(success.all()):
        message = "the state is not finite: the score is not, or the steps are too long"
    stats = {**run.stats, "success": success}
    if "nfev" in stats:
        stats["nfev"] = nfev
    return Solution(
        state=z,
        data=data,
        t=run.t,
        y=run.y,
        nfev=int(nfev.max()) if len(nfev) else 0,
        status=2 if run.stopped else 0 if bool(success.all()) else 1,
        message=message,
        stats=stats,
    )


def _stacked(states: list[Tensor], like: Tensor) -> Tensor:
    """States in a new axis; of a single one no copy."""
    if len(states) == 1:
        return states[0].unsqueeze(0)
    return torch.stack(states) if states else like.new_empty(0, *like.shape)


def _finite(x: Tensor) -> Tensor:
    """Which samples hold finite numbers only, ``(B,)``, without a tensor of the size of x."""
    if not x.numel():
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    # NaN is the least and the largest of numbers that it is among.
    low, high = x.reshape(len(x), -1).aminmax(dim=1)
    return low.isfinite() & high.isfinite()


def _checked_stops(t_eval: object, grid: Tensor, *, of_grid: bool) -> Tensor | None:
    """Turn times at which states are wanted into float64 on the host; raise otherwise."""
    if t_eval is None:
        return None
    if not isinstance(t_eval, Tensor):
        msg = f"t_eval must be a tensor (S,) of decreasing times; got {type(t_eval).__name__}"
        raise TypeError(msg)
    if t_eval.ndim != 1 or not len(t_eval):
        msg = f"t_eval must be a tensor (S,) of times, S ≥ 1; got shape {tuple(t_eval.shape)}"
        raise ValueError(msg)
    stops = t_eval.detach().to("cpu", torch.float64)
    if bool((stops.diff() >= 0).any()):
        msg = f"t_eval must decrease; got {stops.tolist()}"
        raise ValueError(msg)
    start, end = float(grid[0]), float(grid[-1])
    outside = ~torch.isin(stops, grid) if of_grid else ~((stops <= start) & (stops >= end))
    if bool(outside.any()):
        allowed = "be times of the grid" if of_grid else f"lie in [{end:g}, {start:g}]"
        msg = f"t_eval must {allowed}; got {stops[outside].tolist()}"
        raise ValueError(msg)
    return stops


def check_arguments(process: object, solver: object) -> None:
    """Raise TypeError unless the arguments are a `ReverseProcess` and a solver."""
    check_reverse_process(process)
    if not isinstance(solver, Solver | Integrator):
        hint = " (write it with parentheses)" if isinstance(solver, type) else ""
        msg = f"solver must be a Solver, such as SSCS(); got {solver!r}{hint}"
        raise TypeError(msg)


def _noise_source(generator: object, noise: object) -> NoiseSource:
    if generator is not None and not isinstance(generator, torch.Generator):
        msg = f"generator must be a torch.Generator; got {generator!r}"
        raise TypeError(msg)
    if noise is None:
        return FreshNoise(generator)
    if not isinstance(noise, NoiseSource):
        msg = f"noise must be a NoiseSource, such as FreshNoise(generator); got {noise!r}"
        raise TypeError(msg)
    if generator is not None:
        msg = "generator and noise are alternatives; got both"
        raise ValueError(msg)
    return noise


def checked_grid(times: Tensor, end: float) -> Tensor:
    """Turn a decreasing grid in [0, end] into float64 on the host; raise otherwise."""
    if not isinstance(times, Tensor) or times.ndim != 1 or len(times) < 2:
        got = tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__
        msg = f"times must be a tensor (n + 1,) of a decreasing grid, n ≥ 1; got {got}"
        raise ValueError(msg)
    grid = as_times(times, "times", end)
    rising = (grid.diff() >= 0).nonzero()
    if len(rising):
        i = int(rising[0])
        msg = (
            f"times must decrease from T to ε; got {float(grid[i]):g} before {float(grid[i + 1]):g}"
        )
        raise ValueError(msg)
    return grid
