"""What the author of a solver or of a noise source needs.

A solver with one score evaluation per step, whose step is affine, derives from `AffineSolver` and
gives its blocks. Any other solver on a grid derives from `GridSolver` and gives tables and a step.
A solver that chooses its times derives from `Solver` and gets a `Run`.
"""

from .affine import Affine, AffineSolver
from .base import (
    Facts,
    GridSolver,
    Integration,
    KnownScore,
    Memory,
    Run,
    ScoreAt,
    Solver,
    check_solver,
)
from .combine import as_blocks, combine
from .noise import NoiseSource, PathNoise
from .plan import checked_grid

__all__ = [
    "Affine",
    "AffineSolver",
    "Facts",
    "GridSolver",
    "Integration",
    "KnownScore",
    "Memory",
    "NoiseSource",
    "PathNoise",
    "Run",
    "ScoreAt",
    "Solver",
    "as_blocks",
    "check_solver",
    "checked_grid",
    "combine",
]
