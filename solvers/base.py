"""Solver interface: base classes, the declaration of orders and costs, and the step loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.messages import counted
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes

from .combine import Block
from .noise import CheckedNoise, NoiseSource, PathNoise
from .path_density import PathDensity

Memory = tuple[Tensor, ...]
"""Tensors ``(B, rows, *D)`` that a step passes to the next step.

They are affine in state and noise if the score is affine."""


class ScoreAt(Protocol):
    """Score of the driven components, called with a state and the index of an evaluation time."""

    def __call__(self, z: Tensor, number: int, /) -> Tensor:
        """Score ``(B, d, *D)``."""

    def data_prediction(self, z: Tensor, number: int, /) -> Tensor:
        """E[x_0 | z_t] ``(B, 1, *D)`` from the score's own ``data_prediction``."""


@dataclass(frozen=True)
class ShiftedScore:
    """A score whose evaluation indices are shifted, for a solver that calls another solver."""

    score: ScoreAt
    shift: int

    def __call__(self, z: Tensor, number: int, /) -> Tensor:
        """Score ``(B, d, *D)``."""
        return self.score(z, self.shift + number)

    def data_prediction(self, z: Tensor, number: int, /) -> Tensor:
        """E[x_0 | z_t] ``(B, 1, *D)`` from the score's own ``data_prediction``."""
        return self.score.data_prediction(z, self.shift + number)


Callback = Callable[[int, Any, Tensor], object]
"""Function that `solve` calls after each step with the number of steps so far, time and state."""

DATA_DETERMINED = (
    "every linear SDE, at times at which the driven score determines the data "
    "(not at all times if underdamped with noise in one component)"
)
"""``applies_to`` of solvers that derive the data or the full score from the driven score."""


@dataclass(frozen=True)
class Facts:
    """Requirements and claimed orders of a solver; documentation and order tests read them."""

    applies_to: str  #: Processes that the solver works for, in words.
    nfe_per_step: int  #: Score evaluations per step; `Splitting` takes more if positions are noisy.
    weak_order: float | None = None  #: Order in distribution for the reverse SDE, if claimed.
    strong_order: float | None = None  #: Order along paths for the reverse SDE, if claimed.
    ode_order: float | None = None  #: Order for the probability flow; None if stochastic.
    #: Whether `GridSolver.step` ends at a grid time, so that another method may work on the state.
    state_on_grid: bool = True
    #: Whether the solver adapts its steps to ``rtol`` and ``atol`` and uses only the grid's ends.
    adaptive: bool = False
    #: Whether the solver also runs on increasing grids, from data to noise.
    encodes: bool = False
    #: Whether each step evaluates the score once, at its start, on the state that it receives.
    score_at_start: bool = False


@dataclass(frozen=True, eq=False)
class Run:
    """Arguments of one integration."""

    process: ReverseProcess
    tables: Any  #: Result of `Solver.prepare`.
    score_times: KnownTimes | None  #: Result of `Solver.evaluation_times`.
    state: Tensor  #: States ``(B, k, *D)`` at ``times[0]``; must not be changed in place.
    times: Tensor  #: Float64 grid ``(n + 1,)`` on the CPU; it increases only if the solver encodes.
    stops: Tensor  #: Requested times after ``times[0]``, ``(S,)``; the last time is included.
    noise: CheckedNoise
    callback: Callback | None  #: Called after each step or attempt; returns whether to stop.
    progress: bool  #: Whether to show a progress bar on stderr.
    density: PathDensity | None = None  #: Densities of the steps, if they are requested.


@dataclass(frozen=True, eq=False)
class Integration:
    """Result of `Solver.integrate`."""

    state: Tensor  #: Final states, ``(B, k, *D)``.
    states: Tensor  #: States at the stops, ``(S, B, k, *D)``; NaN if a sample did not reach one.
    nfev: Tensor  #: Score evaluations of each sample until it stopped, ``(B,)`` int64 on the CPU.
    success: Tensor  #: Which samples arrived, ``(B,)`` bool on the CPU.
    message: str
    stopped: bool = False  #: Whether the callback stopped the solve.
    stats: dict[str, Any] = field(default_factory=dict)
    log_probs: Tensor | None = None  #: Log-densities of the steps ``(n, B)``, if requested.


class Solver(ABC):
    """Base class of all solvers; a solver on a fixed grid derives from `GridSolver` instead.

    A subclass is a frozen, keyword-only dataclass whose fields are its options. It raises
    ValueError for an option out of range.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Requirements and claimed orders for these options."""

    @abstractmethod
    def prepare(self, process: ReverseProcess, times: Tensor) -> Any:
        """Compute everything that depends on the process and the grid ``(n + 1,)`` alone.

        It raises a ValueError if the solver does not apply to the process. The message says why and
        names an alternative.
        """

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor | None:
        """Times of all score evaluations on a grid, in order; None for an adaptive solver."""
        return None

    @abstractmethod
    def integrate(self, run: Run) -> Integration:
        """Integrate the states from ``run.times[0]`` to ``run.times[-1]``."""

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise | None:
        """Normals of each step as functionals of a Brownian path; None if there are no such."""
        return None

    def noise_roots(self, tables: Any) -> Sequence[Block] | None:
        """Noise roots L of Gaussian steps z' = m + L ξ with a mean m independent of ξ.

        One k×r block per step, from the tables of `prepare`; None if steps have another form.
        """
        return None

    def on_grid(self) -> Self:
        """The same method without merged steps, so that its state belongs to each grid time."""
        return self

    def part(self, samples: slice, shape: Sequence[int]) -> Self:
        """The solver for some samples of data ``(B, *D)``, if it has data of its own per sample."""
        return self

    def with_step(self, h: float) -> Solver:
        """The same adaptive method with fixed steps of length h and without error control."""
        raise ValueError(f"solver must define with_step to take steps of one length; got {self!r}")


class GridSolver(Solver):
    """Base class of solvers on a fixed grid.

    `prepare` computes the tables once per grid, in float64. `step` does tensor arithmetic only and
    depends on nothing but its arguments.
    """

    @abstractmethod
    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Float64 times of all score evaluations on a grid, in the order of their use."""

    @abstractmethod
    def step(
        self, z: Tensor, memory: Memory, tables: Any, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Advance the state from ``times[i]`` to ``times[i + 1]``.

        Parameters
        ----------
        z
            State ``(B, k, *D)``; must not be changed in place.
        memory
            Memory that the previous step returned, ``()`` at the first step and for one-step
            solvers. It is returned with the state.
        tables
            Result of `prepare`.
        i
            Index of the step.
        score, noise
            Sources of the score and of standard normals.
        """

    def integrate(self, run: Run) -> Integration:
        """Step through the grid."""
        assert run.score_times is not None
        score = KnownScore(run.process, run.score_times, run.state)
        times, stops = run.times.tolist(), set(run.stops.tolist())
        # Copy the state, because a score may write to its argument.
        z = run.state.clone(memory_format=torch.contiguous_format)
        memory: Memory = ()
        saved: list[Tensor] = []
        log_probs: list[Tensor] = []
        stopped = False
        for i in progress_bar(range(len(times) - 1), shown=run.progress, desc=type(self).__name__):
            # Pass the only reference, so that `step` can free the state.
            only_reference = [z]
            del z
            z, memory = self._checked(
                self.step(only_reference.pop(), memory, run.tables, i, score, run.noise), run.state
            )
            if run.density is not None:
                log_probs.append(run.density.log_prob(i, z, run.noise.last))
                # The density is a function of the parameters at a fixed path.
                z = z.detach()
            if times[i + 1] in stops:
                saved.append(z if i + 2 == len(times) else z.clone())
            if run.callback is not None and run.callback(i + 1, times[i + 1], z.contiguous()):
                stopped = i + 2 < len(times)
                break
        states = saved + [torch.full_like(z, torch.nan)] * (len(stops) - len(saved))
        return Integration(
            state=z,
            states=z.unsqueeze(0) if len(states) == 1 and saved else torch.stack(states),
            nfev=torch.full((len(z),), score.nfev, device="cpu"),
            success=torch.full((len(z),), not stopped, device="cpu"),
            message=f"stopped by the callback after {i + 1} steps"
            if stopped
            else "reached the end of the grid",
            stopped=stopped,
            log_probs=torch.stack(log_probs) if log_probs else None,
            stats={"steps": i + 1},
        )

    def _checked(self, result: Any, like: Tensor) -> tuple[Tensor, Memory]:
        """Return the result of `step` after checking that it is a state and a memory."""
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)):
            raise TypeError(
                f"{type(self).__name__}.step must return (state, memory) with memory a tuple of "
                f"tensors, () if there is none; got {type(result).__name__}"
            )
        z = result[0]
        check_same_kind(z, like, f"{type(self).__name__}.step")
        return z, result[1]


def check_regular(sde: LinearSDE, times: Tensor, solver: str) -> None:
    """Raise ValueError if a grid starts too near a time at which drift and diffusion diverge."""
    end, until = float(times.max()), sde.regular_until
    # Allow for times rounded to float32 or to the digits that an error message shows.
    if end - until > 1e-2 * (1 - until):
        raise ValueError(
            f"times must not reach t = {end:.15g} for {solver}, because drift and diffusion "
            f"diverge at t = 1; take t ≤ {until:.15g}, or ExponentialMultistep"
        )


def check_same_kind(z: object, like: Tensor, name: str) -> None:
    """Raise ValueError unless ``z`` is a state with the shape, dtype and device of ``like``."""
    kind = (like.dtype, like.device)
    if isinstance(z, Tensor) and z.shape == like.shape and (z.dtype, z.device) == kind:
        return
    got = (tuple(z.shape), z.dtype, z.device) if isinstance(z, Tensor) else type(z).__name__
    raise ValueError(
        f"{name} must return a state of shape {tuple(like.shape)} and {like.dtype} on "
        f"{like.device}; got {got}"
    )


def check_solver(solver: object, name: str = "solver") -> Solver:
    """Return the argument if it is a `Solver`; otherwise raise TypeError."""
    if not isinstance(solver, Solver):
        hint = " (write it with parentheses)" if isinstance(solver, type) else ""
        raise TypeError(f"{name} must be a solver, such as SSCS(); got {solver!r}{hint}")
    return solver


def check_state_on_grid(solver: Solver, name: str, advice: str) -> None:
    """Raise ValueError unless each step ends at a grid time, so that its state can be changed."""
    if not (solver.facts.state_on_grid and isinstance(solver, GridSolver)):
        raise ValueError(
            f"{name} must have a state at each grid time, which is changed before the next step; "
            f"{solver!r} does not. Use {advice}"
        )


def evaluations_per_step(
    solver: GridSolver, process: ReverseProcess, times: Tensor, name: str
) -> int:
    """Score evaluations of each step; raise ValueError if steps differ in their number."""
    evaluations, steps = len(solver.evaluation_times(process, times)), len(times) - 1
    if evaluations % steps:
        raise ValueError(
            f"{name} must evaluate the score equally often in each step; {solver!r} takes "
            f"{counted(evaluations, 'evaluation')} in {counted(steps, 'step')}. A grid that ends "
            "above t = 0 may help"
        )
    return evaluations // steps
