"""Solvers of the reverse process: `solve` runs one over a time grid."""

from .adaptive import EvenSteps, Integration, Integrator
from .affine import Affine, AffineSolver
from .base import Facts, Memory, OffGrid, PathDriven, PathNoise, Solver
from .brownian import BrownianPath
from .combine import as_blocks, combine
from .driver import Solution, solve
from .edm_heun import EDMHeun
from .euler_maruyama import EulerMaruyama
from .exponential_euler import ExponentialEuler
from .exponential_multistep import ExponentialMultistep
from .gotta_go_fast import GottaGoFast
from .grids import (
    karras_times,
    log_snr_times,
    logistic_times,
    quadratic_times,
    root_times,
    times_of_log_snr,
    uniform_times,
)
from .named import canonical_name, find_solver, named_solvers
from .noise import FreshNoise, GridNoise, NoiseSource, RecordedNoise, SampleNoise
from .predictor_corrector import Langevin, PredictorCorrector
from .predictors import Ancestral, ReverseDiffusion
from .probability_flow import ProbabilityFlow
from .splitting import Splitting
from .sscs import SSCS
from .stochastic_heun import StochasticHeun
from .with_torchdiffeq import TorchDiffEq, as_torchdiffeq
from .with_torchsde import TorchSDE, as_torchsde

__all__ = [
    "SSCS",
    "Affine",
    "AffineSolver",
    "Ancestral",
    "BrownianPath",
    "EDMHeun",
    "EulerMaruyama",
    "EvenSteps",
    "ExponentialEuler",
    "ExponentialMultistep",
    "Facts",
    "FreshNoise",
    "GottaGoFast",
    "GridNoise",
    "Integration",
    "Integrator",
    "Langevin",
    "Memory",
    "NoiseSource",
    "OffGrid",
    "PathDriven",
    "PathNoise",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RecordedNoise",
    "ReverseDiffusion",
    "SampleNoise",
    "Solution",
    "Solver",
    "Splitting",
    "StochasticHeun",
    "TorchDiffEq",
    "TorchSDE",
    "as_blocks",
    "as_torchdiffeq",
    "as_torchsde",
    "canonical_name",
    "combine",
    "find_solver",
    "karras_times",
    "log_snr_times",
    "logistic_times",
    "named_solvers",
    "quadratic_times",
    "root_times",
    "solve",
    "times_of_log_snr",
    "uniform_times",
]
