"""Base classes and helpers for writing a solver or a noise source.

Choose the base class by the method:

- `AffineSolver`: one score evaluation per step, at its start. The new state is affine in state,
  score and noise.
- `StagedSolver`: several such stages per step.
- `GridSolver`: any other solver on a fixed grid. It writes tables and a step.
- `Solver`: an adaptive solver, or one with a loop of its own. It gets a `Run`.
"""

from .base import Facts, GridSolver, Integration, Memory, Run, ScoreAt, Solver
from .combine import as_blocks, combine
from .noise import NoiseSource, PathNoise
from .staged import AffineSolver, Stage, StagedSolver, Stages

__all__ = [
    "AffineSolver",
    "Facts",
    "GridSolver",
    "Integration",
    "Memory",
    "NoiseSource",
    "PathNoise",
    "Run",
    "ScoreAt",
    "Solver",
    "Stage",
    "StagedSolver",
    "Stages",
    "as_blocks",
    "combine",
]
