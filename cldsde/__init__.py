"""Numerical work with linear SDEs and the diffusion models built on them.

Three layers, each using the ones before it: linear SDEs and their kernels (`cldsde.linear`),
scores and the reverse process (`cldsde.score`), solvers (`cldsde.solvers`) with their validation
(`cldsde.validation`). The image layer (`cldsde.images`) is imported when asked for.
"""

from importlib.metadata import version
from importlib.util import find_spec

if find_spec("cldsde.solvers") is None:
    msg = (
        f"cldsde is imported from {__path__[0]}, a part of its source: start Python in another "
        "folder, or install the source with pip install -e ."
    )
    raise ImportError(msg)

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
from cldsde.score import (
    GaussianMixture,
    MixedScore,
    Observation,
    PosteriorScore,
    ReverseProcess,
)

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
    "Observation",
    "Posterior",
    "PosteriorScore",
    "ReverseProcess",
    "Schedule",
    "SubVPSDE",
    "linear",
    "score",
    "solvers",
    "validation",
]
