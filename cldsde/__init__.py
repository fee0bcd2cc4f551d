"""Numerical work with linear SDEs and the diffusion models built on them.

Three layers, each using the ones before it: linear SDEs and their kernels (`cldsde.linear`),
scores and the reverse process (`cldsde.score`), solvers (`cldsde.solvers`) with their validation
(`cldsde.validation`). The image layer (`cldsde.images`) is imported when asked for.
"""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

if find_spec("cldsde.solvers") is None:
    raise ImportError(
        f"cldsde is imported from {__path__[0]}, a part of its source: start Python in another "
        "folder, or install the source with pip install -e ."
    )

# In the command, threads sleep while they wait: threads that spin take the CPU from those that they
# wait for. OpenMP reads the variable when torch is imported. While Python looks for a module to
# run, argv[0] is -m.
if Path(*sys.argv[:1]).stem in {"cldsde", "-m"}:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cldsde import linear, pretrained, score, solvers, validation
from cldsde.linear import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    CosineVP,
    Gaussian,
    Kernel,
    LinearSDE,
    Posterior,
    RectifiedFlow,
    Schedule,
    SubVPSDE,
)
from cldsde.score import (
    DenoiserScore,
    GaussianMixture,
    GuidedScore,
    MixedScore,
    NoisePath,
    Observation,
    PosteriorScore,
    PredictionDenoiser,
    ReverseProcess,
)
from cldsde.solvers import sample

__version__ = version("cldsde")

__all__ = [
    "CLD",
    "HOLD",
    "PSLD",
    "VESDE",
    "VPSDE",
    "CosineVP",
    "DenoiserScore",
    "Gaussian",
    "GaussianMixture",
    "GuidedScore",
    "Kernel",
    "LinearSDE",
    "MixedScore",
    "NoisePath",
    "Observation",
    "Posterior",
    "PosteriorScore",
    "PredictionDenoiser",
    "RectifiedFlow",
    "ReverseProcess",
    "Schedule",
    "SubVPSDE",
    "linear",
    "pretrained",
    "sample",
    "score",
    "solvers",
    "validation",
]
