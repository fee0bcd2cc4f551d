"""Steps that are affine in state, score and noise, with one score evaluation each."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from cldsde.score import ReverseProcess

from .base import GridSolver, Memory, ScoreAt
from .combine import Block, combine
from .noise import NoiseSource

__all__ = ["Affine", "AffineSolver"]


class Affine(NamedTuple):
    """Blocks of steps z ← state z + score s(z, t) + noise ξ, one of each per step.

    If blocks of noise have no columns, none is drawn.
    """

    state: list[Block]
    score: list[Block]
    noise: list[Block]


class AffineSolver(GridSolver):
    """A solver that evaluates the score at each step's start; a subclass gives the blocks."""

    @abstractmethod
    def prepare(self, process: ReverseProcess, times: Tensor) -> Affine:
        """Blocks of all steps.

        Raises
        ------
        ValueError
            If the solver does not apply to the process; says why and what to use.
        """

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step."""
        return times[:-1]

    def step(
        self, z: Tensor, memory: Memory, tables: Affine, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """One step."""
        terms = [(tables.state[i], z), (tables.score[i], score(z, i))]
        if columns := len(tables.noise[i][0]):
            terms.append((tables.noise[i], noise.normal(z, columns)))
        return combine(*terms), ()
