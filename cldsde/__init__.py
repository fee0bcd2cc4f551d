"""Numerical work with linear SDEs and the diffusion models built on them.

Three layers, each using the ones before it: linear SDEs and their kernels (`cldsde.linear`),
scores and the reverse process (`cldsde.score`), solvers (`cldsde.solvers`) with their validation
(`cldsde.validation`). The image layer (`cldsde.images`) is imported when asked for.
"""

from importlib.metadata import version

from cldsde import linear, score, solvers, validation
from cldsde.linear import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    Gaussian,
    Kernel,
    LinearSDE,
    Posterior,
    Schedule,
    SubVPSDE,
)
from cldsde.score import GaussianMixture, MixedScore, ReverseProcess

__version__ = version("cldsde")

__all__ = [
    "CLD",
    "HOLD",
    "PSLD",
    "VESDE",
    "VPSDE",
    "Gaussian",
    "GaussianMixture",
    "Kernel",
    "LinearSDE",
    "MixedScore",
    "Posterior",
    "ReverseProcess",
    "Schedule",
    "SubVPSDE",
    "linear",
    "score",
    "solvers",
    "validation",
]
