"""Solvers of the reverse process: `solve` runs one over a time grid."""

from .base import Facts, Memory, Solver
from .driver import Solution, solve
from .euler_maruyama import EulerMaruyama
from .exponential_euler import ExponentialEuler
from .exponential_multistep import ExponentialMultistep
from .grids import karras_times, log_snr_times, quadratic_times, root_times, uniform_times
from .noise import FreshNoise, NoiseSource, RecordedNoise, SampleNoise
from .predictors import Ancestral, ReverseDiffusion
from .sscs import SSCS
from .stochastic_heun import StochasticHeun

__all__ = [
    "SSCS",
    "Ancestral",
    "EulerMaruyama",
    "ExponentialEuler",
    "ExponentialMultistep",
    "Facts",
    "FreshNoise",
    "Memory",
    "NoiseSource",
    "RecordedNoise",
    "ReverseDiffusion",
    "SampleNoise",
    "Solution",
    "Solver",
    "StochasticHeun",
    "karras_times",
    "log_snr_times",
    "quadratic_times",
    "root_times",
    "solve",
    "uniform_times",
]
