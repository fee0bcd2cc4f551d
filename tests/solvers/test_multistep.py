"""`ExponentialMultistep` is exact on point data.

On data that are one point x0 the distribution at t is N(psi x0, Sigma), whatever the polynomials'
weights.
"""

import itertools

import numpy as np
import pytest

from cldsde import GaussianMixture, solvers
from cldsde.solvers import ExponentialMultistep as Multistep
from gaussian_data import PROCESSES, moments
from probes import PUBLISHED, name_of_case
from score import cases

ONE = GaussianMixture([1.0], [[0.7]], [[[0.0]]])


def early(t):
    return 1.5 * (t > 0.4)


VARIANTS = [
    {"order": k, "corrector": c, "stochasticity": x}
    for k, c, x in itertools.product((1, 2, 3), (False, True), (0.0, 1.0, early))
]
VARIANTS += [{"order": 3, "corrector": c, "stochasticity": 0.5} for c in (False, True)]
VARIANTS += [{"order": k, "prediction": "noise"} for k in (1, 2, 3)]
VARIANTS += [
    {"order": k, "corrector": True, "variable": "kappa", "stochasticity": x}
    for k, x in itertools.product((2, 3), (0.0, 1.0))
]
VARIANTS += [{"order": k, "corrector": True, **PUBLISHED} for k in (1, 2, 3)]
VARIANTS += [
    {"order": 3, "variable": "kappa", "weights": "dpm_solver_3m", "stochasticity": x}
    for x in (0.0, 1.0)
]
VARIANTS += [
    {"order": k, "corrector": True, "variable": "kappa", "weights": "sa_solver", "stochasticity": x}
    for k, x in ((1, 1.0), (2, 1.0), (3, 0.5))
]


# The covariance of HOLD given the data grades like t^2, t^4, t^6: below 1e-2 its inverse and the
# reference's is of little use.
@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("name", "steps", "end"),
    [("VP", 5, 1e-3), ("CLD, linear", 1, 1e-3), ("PSLD", 5, 1e-3), ("HOLD", 1, 1e-2)],
)
@pytest.mark.parametrize("options", VARIANTS, ids=name_of_case)
def test_the_distribution_given_a_point_is_kept(options, name, steps, end):
    sde, exact = PROCESSES[name]
    exact = exact._replace(data_mean=0.7, data_variance=0.0)
    if "prediction" in options:
        # Polynomials through the noise invert a root at every step, whose condition squares the
        # rounding: one step, and not near the data, in both directions.
        steps, end = 1, 0.3
    times = solvers.root_times(1.0, end, steps)
    for grid in (times, times.flip(0)) if "prediction" in options else (times,):
        mean, covariance = moments(Multistep(**options), (sde, exact), grid, ONE)
        expected = exact.covariance(grid[-1])
        spread = np.sqrt(np.diag(expected))
        # Rounding of the score, in units of the spread; each step may add its own.
        size = 100 * steps * cases.score_rounding(sde, end)
        assert (abs(mean - exact.mean(grid[-1])) <= size * (spread + 1)).all()
        assert (abs(covariance - expected) <= size * np.outer(spread, spread)).all()
