"""Base classes and helpers for writing a solver or a noise source.

The page "Write a solver of your own" says which base class to choose, with an example of each.
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
