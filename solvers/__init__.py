"""Solvers of the reverse process: `solve` runs one over a time grid."""

from .base import Facts, Memory, Solver
from .driver import Solution, solve
from .euler_maruyama import EulerMaruyama
from .grids import quadratic_times, root_times, uniform_times
from .noise import FreshNoise, NoiseSource, RecordedNoise
from .sscs import SSCS

__all__ = [
    "SSCS",
    "EulerMaruyama",
    "Facts",
    "FreshNoise",
    "Memory",
    "NoiseSource",
    "RecordedNoise",
    "Solution",
    "Solver",
    "quadratic_times",
    "root_times",
    "solve",
    "uniform_times",
]
