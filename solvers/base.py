"""What a solver is: options, a declaration of what it promises, tables and a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .noise import NoiseSource

__all__ = [
    "DATA_DETERMINED",
    "Facts",
    "Memory",
    "OffGrid",
    "PathDriven",
    "PathNoise",
    "ScoreAt",
    "Solver",
    "Stepper",
]

Memory = tuple[Tensor, ...]
"""What a step hands to the next one: tensors ``(B, rows, *D)``, affine in state and noise wherever
the score is affine."""

ScoreAt = Callable[[Tensor, int], Tensor]
"""Score of the driven components at a state, at the evaluation time of the given number."""


Stepper = Callable[[Tensor, Memory, int], tuple[Tensor, Memory]]
"""The step of a given number, from a state and what the step before handed on."""


@dataclass(frozen=True)
class Facts:
    """What a solver needs and promises; documentation and order tests are made from it.

    Attributes
    ----------
    applies_to
        The processes it works for, in words.
    nfe_per_step
        Score evaluations a step; `Splitting` takes more where positions are noisy, too.
    weak_order, strong_order
        Orders of convergence in law and along paths for the reverse SDE; None where not claimed.
    ode_order
        Order for the probability-flow ODE; None for stochastic solvers.
    state_on_grid
        Whether the state between two steps is that at the grid time, so that another method may
        work on it there.
    adaptive
        Whether it chooses its own times between the grid's ends, by its fields ``rtol`` and
        ``atol``.
    """

    applies_to: str
    nfe_per_step: int
    weak_order: float | None = None
    strong_order: float | None = None
    ode_order: float | None = None
    state_on_grid: bool = True
    adaptive: bool = False


class PathNoise(NamedTuple):
    """A step's normals as functionals of one Brownian path.

    ξ = increment ΔW + integral I + time_integral U with the increment ΔW of w over a step from t
    down to u, I = ∫Ψ(t, τ) G dw and U = ∫(τ − u) dw, the integral over the time of the step of what
    has come so far.

    Attributes
    ----------
    increment, integral
        ``(n, r, m)`` and ``(n, r, k)`` float64, one of each a step, for r normals, m columns of G
        and k components.
    time_integral
        ``(n, r, m)``; None where U does not enter. `BrownianPath` does not know U.
    """

    increment: Tensor
    integral: Tensor
    time_integral: Tensor | None = None

    @classmethod
    def increments(cls, sde: LinearSDE, times: Tensor, rotation: Tensor | None = None) -> PathNoise:
        """ξ = ΔW/√h, or a rotation ``(n, r, m)`` of it, for decreasing times ``(n + 1,)``."""
        h = -times.diff()[:, None, None]
        if rotation is None:
            columns = sde.diffusion(times[-1]).shape[-1]
            rotation = torch.eye(columns, dtype=torch.float64)
        scaled = rotation / h.sqrt()
        return cls(scaled, scaled.new_zeros(*scaled.shape[:2], sde.components))

    @classmethod
    def integrals(cls, root: Tensor, functional: Tensor) -> PathNoise:
        """ξ with root ξ = functional I; root is that of the covariance of functional I."""
        # Rows of a root differ by powers of the step; scaled alike none is taken for rounding.
        scale = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
        scale = torch.where(scale == 0, 1.0, scale)
        integral = torch.linalg.pinv(root / scale, rtol=1e-13) @ (functional / scale)
        return cls(integral.new_zeros(*integral.shape[:2], 0), integral)


DATA_DETERMINED = (
    "every linear SDE whose driven score determines the data "
    "(not underdamped with noise in one component)"
)
"""What solvers apply to that derive the data, or the full score, from the driven one."""


class Solver(ABC):
    """A solver on a fixed grid.

    A subclass is a frozen, keyword-only dataclass whose fields are its options. `prepare`
    computes everything that depends on the process and the grid alone, once, in float64. `step`
    is tensor arithmetic only and may look at nothing but its arguments.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What the solver needs and promises with these options."""

    @abstractmethod
    def prepare(self, process: ReverseProcess, times: Tensor) -> Any:
        """Tables for a decreasing grid ``(n + 1,)``; whatever `step` wants to receive.

        Raises
        ------
        ValueError
            If the solver does not apply to the process; says why and what to use.
        """

    @abstractmethod
    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Times at which the score is asked over a grid, float64, in the order of use."""

    @abstractmethod
    def step(
        self, z: Tensor, memory: Memory, tables: Any, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Advance the state from ``times[i]`` to ``times[i + 1]``.

        Parameters
        ----------
        z
            State ``(B, k, *D)``; not to be changed.
        memory
            What the step before returned, ``()`` at the first; one-step solvers return ``()``.
        tables
            What `prepare` returned.
        i
            Number of the step.
        score, noise
            Where the score and standard normals come from.
        """

    def stepper(self, z: Tensor, tables: Any, score: ScoreAt, noise: NoiseSource) -> Stepper | None:
        """`step` for one solve from z, overwriting z and states that came before the last.

        `solve` takes it where neither a callback nor a score of the user's sees states. None, as
        here, where there is no such thing.
        """
        return None


@runtime_checkable
class PathDriven(Protocol):
    """A solver whose normals are functionals of a Brownian path, as `BrownianPath` has them."""

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """One draw for each step of a decreasing grid ``(n + 1,)``.

        Raises
        ------
        ValueError
            If with these options they are none.
        """
        ...


@runtime_checkable
class OffGrid(Protocol):
    """A solver whose state between two steps may be at no grid time."""

    def on_grid(self) -> Solver:
        """The same solver with its state at each grid time, for who wants to see it there."""
        ...
