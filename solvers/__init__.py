"""Solvers of the reverse process: `solve` runs one over a time grid, `plan` prepares many runs.

To write a solver, see `cldsde.solvers.authoring`.
"""

from cldsde.linear.kappa import times_of_kappa
from cldsde.renamed import old_attributes
from cldsde.score.adapters import as_torchdiffeq, as_torchsde

from .brownian import BrownianPath
from .edm_heun import EDMHeun
from .euler_maruyama import EulerMaruyama
from .exponential_euler import ExponentialEuler
from .exponential_multistep import ExponentialMultistep, LevelNoise
from .fitting import default_settings as default_settings  # an old name
from .fitting import fit_sampler
from .gotta_go_fast import GottaGoFast
from .grids import (
    kappa_times,
    karras_times,
    logistic_times,
    quadratic_times,
    root_times,
    uniform_times,
    vp_times,
)
from .imputation import Imputation
from .named import find_solver, named_solvers
from .noise import FreshNoise, NoiseSource, RecordedNoise, SampleNoise
from .planning import Plan, plan, solve
from .predictor_corrector import Ancestral, Langevin, PredictorCorrector, ReverseDiffusion
from .probability_flow import ProbabilityFlow
from .published import ddim, ddpm, deis, dpm_solver_pp, sa_solver, unipc
from .recommended import RECOMMENDED, recommend
from .sampling import sample
from .settings import SamplerSettings
from .solution import Solution, SolveWarning
from .splitting import Splitting
from .sscs import SSCS
from .stochastic_heun import StochasticHeun
from .twisted import sample_posterior
from .with_torchdiffeq import TorchDiffEq
from .with_torchsde import TorchSDE

__all__ = [
    "RECOMMENDED",
    "SSCS",
    "Ancestral",
    "BrownianPath",
    "EDMHeun",
    "EulerMaruyama",
    "ExponentialEuler",
    "ExponentialMultistep",
    "FreshNoise",
    "GottaGoFast",
    "Imputation",
    "Langevin",
    "LevelNoise",
    "NoiseSource",
    "Plan",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RecordedNoise",
    "ReverseDiffusion",
    "SampleNoise",
    "SamplerSettings",
    "Solution",
    "SolveWarning",
    "Splitting",
    "StochasticHeun",
    "TorchDiffEq",
    "TorchSDE",
    "as_torchdiffeq",
    "as_torchsde",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver_pp",
    "find_solver",
    "fit_sampler",
    "kappa_times",
    "karras_times",
    "logistic_times",
    "named_solvers",
    "plan",
    "quadratic_times",
    "recommend",
    "root_times",
    "sa_solver",
    "sample",
    "sample_posterior",
    "solve",
    "times_of_kappa",
    "uniform_times",
    "unipc",
    "vp_times",
]

__getattr__ = old_attributes(
    __name__, log_snr_times="kappa_times", times_of_log_snr="times_of_kappa"
)
