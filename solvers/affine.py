"""Steps that are affine in state, score and noise, with one score evaluation each."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from cldsde.score import ReverseProcess

from .base import Memory, ScoreAt, Solver, Stepper
from .combine import Block, Combine, CombineInTurn, combine
from .noise import NoiseSource

__all__ = ["Affine", "AffineSolver"]


class Affine(NamedTuple):
    """Blocks of steps z ← state z + score s(z, t) + noise ξ, one of each a step.

    Blocks of noise may have no columns: then none is drawn.
    """

    state: list[Block]
    score: list[Block]
    noise: list[Block]


class AffineSolver(Solver):
    """A solver that asks for the score at each step's start; a subclass gives the blocks."""

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
        self,
        z: Tensor,
        memory: Memory,
        tables: Affine,
        i: int,
        score: ScoreAt,
        noise: NoiseSource,
        combine: Combine = combine,
    ) -> tuple[Tensor, Memory]:
        """One step."""
        columns = len(tables.noise[i][0])
        if not columns:
            return combine((tables.state[i], z), (tables.score[i], score(z, i))), ()
        xi = noise.normal(z, columns)
        terms = (tables.state[i], z), (tables.score[i], score(z, i)), (tables.noise[i], xi)
        return combine(*terms), ()

    def stepper(self, z: Tensor, tables: Affine, score: ScoreAt, noise: NoiseSource) -> Stepper:
        """`step` that writes states into two pieces of memory in turn, and noise into one."""
        in_turn, noise = CombineInTurn(z), noise.in_turn()
        return lambda z, memory, i: self.step(z, memory, tables, i, score, noise, in_turn)
