"""What the author of a solver or of a noise source needs.

A solver whose steps are affine in states, scores and noise derives from `AffineSolver` (one score
evaluation, at the start of the step) or `StagedSolver`, and gives the blocks of its stages. Any
other solver on a grid derives from `GridSolver` and gives tables and a step. A solver that chooses
its times derives from `Solver` and gets a `Run`.
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
