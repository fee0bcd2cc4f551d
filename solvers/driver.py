"""`solve`: run a solver on a reverse process over a grid, and say what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import as_times, check_state
from cldsde.score import Conversion, ReverseProcess, TabulatedScore
from cldsde.score.reverse import check_reverse_process, checked_score, score_argument

from .adaptive import AdaptiveSolver
from .base import Memory, Solver
from .noise import FreshNoise, NoiseSource
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
        ``(B, *D)``: the data component of the state, or, with ``denoise=True``, E[x_0 | state].
    nfev
        Score evaluations of each sample, counted by wrapping the score; where samples differ, of
        the one with most, and ``stats["nfev"]`` holds all.
    status
        0 when the end was reached; 1 when the state is not finite or a solver gave up.
    message
        What happened, in words.
    stats
        Further numbers, e.g. ``steps``.
    """

    state: Tensor
    data: Tensor
    nfev: int
    status: int
    message: str
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Whether the end was reached with finite numbers."""
        return self.status == 0

    def __repr__(self) -> str:
        """Facts in one line."""
        return (
            f"Solution(success={self.success}, nfev={self.nfev}, state={tuple(self.state.shape)}, "
            f"message={self.message!r})"
        )


class _CountedScore:
    """The score at numbered times; counts its evaluations and checks what it returns."""

    def __init__(self, process: ReverseProcess, times: Tensor, z: Tensor) -> None:
        self.nfev = 0
        self._driven = len(process.sde.driven)
        score = process.score
        if isinstance(score, TabulatedScore):
            self._evaluate = score.tabulate(times, z)
        else:
            table = score_argument(times, z)
            self._evaluate = lambda z, i: score(z, table[i].expand(len(z)))

    def __call__(self, z: Tensor, i: int) -> Tensor:
        self.nfev += 1
        return checked_score(self._evaluate(z, i), z, self._driven)


@torch.no_grad()
def solve(
    process: ReverseProcess,
    solver: Solver | AdaptiveSolver,
    state: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: NoiseSource | None = None,
    denoise: bool = False,
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
        Decreasing grid ``(n + 1,)`` in [0, T], e.g. ``quadratic_times(sde.T, 1e-3, 50)``; adaptive
        solvers use its two ends.
    generator
        Source of the noise; the same seed gives the same bits on the same machine.
    noise
        A noise source in place of ``generator``.
    denoise
        Finish with the data prediction E[x_0 | z] at the last time; its evaluation counts.
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
        If the state does not fit the process, the grid does not decrease, the solver does not
        apply to the process, or both ``generator`` and ``noise`` are given. Nothing is evaluated
        before all arguments are checked.

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
    """
    check_arguments(process, solver)
    sde = process.sde
    # A copy, so that not even a score that writes to its argument changes the caller's state.
    z = check_state(state, sde.components, "state").clone()
    if not bool(z.isfinite().all()):
        msg = "state must be finite; it holds NaN or infinity"
        raise ValueError(msg)
    grid = checked_grid(times, sde.T)
    source = _noise_source(generator, noise)

    if denoise and float(grid[-1]) == 0:
        msg = (
            "times must end above 0 where denoise=True: the law given x_0 has no density at t = 0; "
            "take t > 0"
        )
        raise ValueError(msg)
    prediction = Conversion.at(sde, grid[-1], "score", "data") if denoise else None
    if isinstance(solver, AdaptiveSolver):
        return _solve_adaptive(process, solver, z, grid, source, prediction, progress=progress)
    steps = len(grid) - 1
    tables = solver.prepare(process, grid)
    asked = solver.evaluation_times(grid)
    score = _CountedScore(process, torch.cat([asked, grid[-1:]]) if denoise else asked, z)

    memory: Memory = ()
    for i in progress_bar(range(steps), shown=progress, desc=type(solver).__name__):
        z, memory = solver.step(z, memory, tables, i, score, source)
    data = z[:, 0] if prediction is None else prediction(z, score(z, len(asked)))
    finite = bool(z.isfinite().all() and data.isfinite().all())
    return Solution(
        state=z,
        data=data,
        nfev=score.nfev,
        status=0 if finite else 1,
        message="reached the end of the grid"
        if finite
        else "the state is not finite: the score is not, or the steps are too long",
        stats={"steps": steps},
    )


def _solve_adaptive(
    process: ReverseProcess,
    solver: AdaptiveSolver,
    z: Tensor,
    grid: Tensor,
    noise: NoiseSource,
    prediction: Conversion | None,
    *,
    progress: bool,
) -> Solution:
    start, end = float(grid[0]), float(grid[-1])
    result = solver.integrate(process, z, start, end, noise, progress=progress)
    state, nfev, data = result.state, result.nfev, result.state[:, 0]
    if prediction is not None and result.success:
        data = prediction(state, process.evaluate(state, grid[-1]))
        nfev = nfev + 1
    finite = bool(state.isfinite().all() and data.isfinite().all())
    message = result.message
    if result.success and not finite:
        message = "the state is not finite: the score is not"
    return Solution(
        state=state,
        data=data,
        nfev=int(nfev.max()) if len(nfev) else 0,
        status=0 if result.success and finite else 1,
        message=message,
        stats={**result.stats, "nfev": nfev},
    )


def check_arguments(process: object, solver: object) -> None:
    """Raise TypeError unless the arguments are a `ReverseProcess` and a solver."""
    check_reverse_process(process)
    if not isinstance(solver, Solver | AdaptiveSolver):
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
