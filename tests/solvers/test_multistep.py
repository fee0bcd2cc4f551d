"""`ExponentialMultistep`: exact on point data, and methods that it contains.

On data that are one point x0 the distribution at t is N(psi x0, Sigma), whatever the polynomials'
weights.
"""

import itertools

import numpy as np
import pytest
import torch

from cldsde import GaussianMixture, ReverseProcess, solvers
from cldsde.solvers import ExponentialMultistep as Multistep
from cldsde.solvers import RecordedNoise
from gaussian_data import PROCESSES, moments
from probes import PUBLISHED, generator, name_of_case, start
from score import cases
from score.cases import MODES
from tolerances import rounding

ONE = GaussianMixture([1.0], [[0.7]], [[[0.0]]])
# Scores convert to predictions with an error of some 1e-13 of states of size 10. The slope of the
# prediction between the modes raises it.
CONVERSION = rounding(64, 1e4)


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
VARIANTS += [{"order": k, "corrector": True, **PUBLISHED} for k in (1, 2)]


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


# With one component it does the same as the schedulers of the library diffusers.
N = 9
VP = PROCESSES["VP"][0]
TIMES = solvers.root_times(1.0, 0.02, N)


def scheduled(kind, **options):
    """A scheduler of diffusers on the grid, and draws."""
    diffusers = pytest.importorskip("diffusers")
    options = {"prediction_type": "sample", "lower_order_final": False, **options}
    scheduler = getattr(diffusers, f"{kind}MultistepScheduler")(**options)
    scheduler.set_timesteps(N)
    kernel = VP.marginal(TIMES)
    scheduler.sigmas = (kernel.root / kernel.mean)[:, 0, 0]
    scheduler.timesteps = torch.arange(N)
    return scheduler, list(torch.randn(N, 6, 1, 2, generator=generator(3), dtype=torch.float64))


def predicted(x, i):
    return MODES.posterior_mean(VP, x.unsqueeze(1), float(TIMES[i]))


def check_scheduled(x, draws, **options):
    process, z, noise = ReverseProcess(VP, MODES.score(VP)), start(VP, (6, 2)), RecordedNoise(draws)
    found = solvers.solve(process, Multistep(**options), z, TIMES, noise=noise).data
    assert x.dtype == torch.float64
    assert (found - x).abs().max() <= CONVERSION


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("midpoint", {"order": 1}),
        ("midpoint", {"order": 2, **PUBLISHED}),
        ("heun", {"order": 2, "variable": "kappa"}),
    ],
)
def test_dpm_solver_of_diffusers_computes_the_same(kind, options, stochasticity):
    order, name = options["order"], "sde-dpmsolver++" if stochasticity else "dpmsolver++"
    options = {**options, "stochasticity": stochasticity}
    scheduler, draws = scheduled(
        "DPMSolver", solver_order=order, algorithm_type=name, solver_type=kind
    )
    # Its `step` rounds the state to single precision; the formulas that it chooses do not.
    first = scheduler.dpm_solver_first_order_update
    second = scheduler.multistep_dpm_solver_second_order_update
    x, outputs = start(VP, (6, 2))[:, 0], []
    for i, draw in enumerate(draws):
        scheduler._step_index = i
        outputs.append(predicted(x, i))
        if order == 1 or i == 0:
            x = first(outputs[-1], sample=x, noise=draw[:, 0])
        else:
            x = second(outputs, sample=x, noise=draw[:, 0])
    check_scheduled(x, draws, **options)


@pytest.mark.parametrize("order", [1, 2])
def test_unipc_of_diffusers_computes_the_same(order):
    scheduler, draws = scheduled("UniPC", solver_order=order, solver_type="bh2")
    x = start(VP, (6, 2))[:, 0]
    for i in range(N):
        x = scheduler.step(predicted(x, i), i, x).prev_sample
    check_scheduled(x, draws, order=order, corrector=True, **PUBLISHED)
