"""Reference processes and distributions, written without the package's kernels.

`kernels`: transition kernels with 110 digits (mpmath).  `float64`: the same processes in float64
with Gaussian data, from matrix exponentials (numpy, scipy).  `mixtures`: densities, scores and
guidance of Gaussian mixtures.  `interpolants`: the package's, beside alpha and sigma.
"""

from references.float64 import Dense as Dense
from references.float64 import dense as dense
from references.kernels import DIGITS as DIGITS
from references.kernels import Homogeneous as Homogeneous
from references.kernels import Kernel as Kernel
from references.kernels import Polynomial as Polynomial
from references.kernels import Reference as Reference
from references.kernels import as_tensors as as_tensors
from references.kernels import cholesky as cholesky
from references.kernels import cld as cld
from references.kernels import clock_of as clock_of
from references.kernels import hold as hold
from references.kernels import linear_clock as linear_clock
from references.kernels import matrix as matrix
from references.kernels import psld as psld
from references.kernels import squared_sine_clock as squared_sine_clock
from references.kernels import sub_vp as sub_vp
from references.kernels import ve as ve
from references.kernels import vp as vp
from references.mixtures import Mixed as Mixed
from references.mixtures import guided_prediction as guided_prediction
from references.mixtures import mixed as mixed
from references.mixtures import wide_mixture as wide_mixture
