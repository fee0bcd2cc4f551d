"""Base classes and helpers for writing a solver or a noise source.

Choose the base class by the method:

- `AffineSolver`: one score evaluation per step, at its start. The new state is affine in state,
  score and noise.
- `StagedSolver`: several such stages per step.
- `GridSolver`: any other solver on a fixed grid. It writes tables and a step.
- `Solver`: an adaptive solver, or one with a loop of its own. It gets a `Run`.
"""

from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes

from .base import (
    Facts,
    GridSolver,
    Integration,
    Memory,
    Run,
    ScoreAt,
    ShiftedScore,
    Solver,
    check_solver,
)
from .combine import Block, as_blocks, combine
from .noise import NoiseSource, PathNoise
from .staged import AffineSolver, Stage, StagedSolver, Stages

__all__ = [
    "AffineSolver",
    "Block",
    "Facts",
    "GridSolver",
    "Integration",
    "KnownScore",
    "KnownTimes",
    "Memory",
    "NoiseSource",
    "PathNoise",
    "Run",
    "ScoreAt",
    "ShiftedScore",
    "Solver",
    "Stage",
    "StagedSolver",
    "Stages",
    "as_blocks",
    "check_solver",
    "combine",
]
