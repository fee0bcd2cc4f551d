"""Reference processes and distributions, written without the package's kernels.

`kernels`: transition kernels with 110 digits (mpmath).  `float64`: the same processes in float64
with Gaussian data, from matrix exponentials (numpy, scipy).  `mixtures`: densities, scores and
guidance of Gaussian mixtures.
"""

from references.float64 import Dense, dense
from references.kernels import (
    DIGITS,
    Homogeneous,
    Kernel,
    Polynomial,
    Reference,
    as_tensors,
    cholesky,
    cld,
    clock_of,
    geometric_clock,
    hold,
    linear_clock,
    matrix,
    psld,
    squared_sine_clock,
    sub_vp,
    ve,
    vp,
)
from references.mixtures import Mixed, guided_prediction, mixed, wide_mixture

__all__ = [
    "DIGITS",
    "Dense",
    "Homogeneous",
    "Kernel",
    "Mixed",
    "Polynomial",
    "Reference",
    "as_tensors",
    "cholesky",
    "cld",
    "clock_of",
    "dense",
    "geometric_clock",
    "guided_prediction",
    "hold",
    "linear_clock",
    "matrix",
    "mixed",
    "psld",
    "squared_sine_clock",
    "sub_vp",
    "ve",
    "vp",
    "wide_mixture",
]
