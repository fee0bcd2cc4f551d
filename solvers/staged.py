"""Base classes of solvers whose stages are affine in states, scores and noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from cldsde.score import ReverseProcess

from .base import GridSolver, Memory, ScoreAt
from .combine import Block, add_to, as_blocks, combine
from .noise import NoiseSource


class Stage(NamedTuple):
    """One stage of each step: z ← state z + score s(z) + base z₀ + first s(z₀) + noise ξ.

    z₀ is the state at which the step evaluates the score first. If that stage has ``keep``, blocks
    K and L, then K z₀ + L s(z₀) replaces z₀ in later stages. Each field has one block per step.
    None leaves the term out. If a step's ``state`` is None, the step skips the stage.
    """

    state: Sequence[Block | None]
    score: Sequence[Block] | None = None
    noise: Sequence[Block] | None = None
    base: Sequence[Block] | None = None
    first: Sequence[Block] | None = None
    keep: tuple[Sequence[Block], Sequence[Block]] | None = None


class Stages(NamedTuple):
    """The stages of a solver, and the index of the first score evaluation of each step."""

    stages: tuple[Stage, ...]
    numbers: list[int]
    uses_base: bool
    uses_first: bool

    @classmethod
    def of(cls, *stages: Stage) -> Stages:
        """Create it from stages, and number their score evaluations."""
        steps = range(len(stages[0].state))
        counts = [
            sum(stage.score is not None and stage.state[i] is not None for stage in stages)
            for i in steps
        ]
        uses_base = any(stage.base is not None for stage in stages)
        uses_first = any(stage.first is not None for stage in stages)
        return cls(stages, [0, *accumulate(counts)], uses_base, uses_first)

    @classmethod
    def affine(cls, state: Tensor, score: Tensor, noise: Tensor) -> Stages:
        """Create one stage from tables ``(n, k, m)`` for n steps."""
        return cls.of(Stage(as_blocks(state), as_blocks(score), noise=as_blocks(noise)))


class StagedSolver(GridSolver):
    """Base class of solvers whose steps are stages; `prepare` returns `Stages`."""

    def step(
        self, z: Tensor, memory: Memory, tables: Stages, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Apply the stages one after the other."""
        number, base, first = tables.numbers[i], None, None
        for stage in tables.stages:
            state = stage.state[i]
            if state is None:
                continue
            terms = [(state, z)]
            if stage.score is not None:
                here = score(z, number)
                terms.append((stage.score[i], here))
                # Keep only what later stages use, so that at most three states are in memory.
                if number == tables.numbers[i]:
                    base = z if tables.uses_base else None
                    first = here if tables.uses_first else None
                    if stage.keep is not None:
                        base = combine((stage.keep[0][i], z), (stage.keep[1][i], here))
                number += 1
                del here
            if stage.base is not None and base is not None:
                terms.append((stage.base[i], base))
            if stage.first is not None and first is not None:
                terms.append((stage.first[i], first))
            z = combine(*terms)
            # Free the score before drawing the noise, to save memory.
            del terms
            if stage.noise is not None and (columns := len(stage.noise[i][0])):
                z = add_to(z, (stage.noise[i], noise.normal(z, columns)))
        return z, ()


class AffineSolver(StagedSolver):
    """Base class of solvers with one stage per step and the score at the step's start."""

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step."""
        return times[:-1]

    def noise_roots(self, tables: Stages) -> Sequence[Block] | None:
        """Noise blocks of the stage."""
        return tables.stages[0].noise
