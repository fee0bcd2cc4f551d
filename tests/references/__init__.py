"""Reference processes and distributions, written without the package's kernels.

`kernels`: transition kernels with 110 digits (mpmath).  `float64`: the same processes in float64
with Gaussian data, from matrix exponentials (numpy, scipy).  `mixtures`: densities, scores and
guidance of Gaussian mixtures.  `interpolants`: the package's, beside alpha and sigma.
"""

from references.float64 import *  # noqa: F403
from references.kernels import *  # noqa: F403
from references.mixtures import *  # noqa: F403
