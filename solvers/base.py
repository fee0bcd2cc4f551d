"""What a solver is: options, a declaration of what it promises, tables and a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cldsde.score import ReverseProcess

from .noise import NoiseSource

__all__ = [
    "DATA_DETERMINED",
    "Facts",
    "Memory",
    "ScoreAt",
    "Solver",
]

Memory = tuple[Tensor, ...]
"""What a step hands to the next one: tensors ``(B, rows, *D)``, affine in state and noise wherever
the score is affine."""

ScoreAt = Callable[[Tensor, int], Tensor]
"""Score of the driven components at a state, at the evaluation time of the given number."""


@dataclass(frozen=True)
class Facts:
    """What a solver needs and promises; documentation and order tests are made from it.

    Attributes
    ----------
    applies_to
        The processes it works for, in words.
    nfe_per_step
        Score evaluations a step.
    weak_order, strong_order
        Orders of convergence in law and along paths for the reverse SDE; None where not claimed.
    ode_order
        Order for the probability-flow ODE; None for stochastic solvers.
    state_on_grid
        Whether the state between two steps is that at the grid time, so that another method may
        work on it there.
    """

    applies_to: str
    nfe_per_step: int
    weak_order: float | None = None
    strong_order: float | None = None
    ode_order: float | None = None
    state_on_grid: bool = True


DATA_DETERMINED = "every linear SDE whose driven score determines the data (not underdamped)"
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
    def evaluation_times(self, times: Tensor) -> Tensor:
        """Times at which the score is asked, float64, numbered in the order of use."""

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
