"""`EDMHeun` is algorithm 2 of Karras et al. (2022), written again in numpy.

The reference works on data scaled to x/alpha, with the noise levels

    VE   low (high / low)^t,        VP   (e^B - 1)^1/2,        sub-VP   2 sinh(B / 2),

B the integral of beta from 0 to t and alpha = e^{-B/2} (1 for VE). The data prediction D of a
mixture has a closed form. The reference uses none of the package's formulas.
"""

import math

import numpy as np
import pytest
import torch

import cldsde
from cldsde import VESDE, ReverseProcess, SubVPSDE, solvers
from cldsde.solvers import EDMHeun, RecordedNoise
from probes import normals, start, tensor
from references import denoised
from score.cases import MODES
from tolerances import rounding


def clock(t):
    return 0.1 * t + 7.9 * t**2 / 2


def half(t):
    return np.exp(-clock(t) / 2)


# Each process with alpha and the noise level sigma = std / alpha as functions of time.
PROCESSES = {
    "VE": (VESDE(0.1, 5.0), np.ones_like, lambda t: 0.1 * 50.0**t),
    "VP": (cldsde.VPSDE(0.1, 8.0), half, lambda t: np.sqrt(np.expm1(clock(t)))),
    "sub-VP": (SubVPSDE(0.1, 8.0), half, lambda t: 2 * np.sinh(clock(t) / 2)),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))

N = 9
GRID = solvers.root_times(1.0, 0.02, N)
TO_ZERO = torch.cat([GRID, torch.zeros(1, dtype=torch.float64)])
# Scores convert to predictions with an error of some 1e-13 of states of size 10, which the slope of
# the prediction between the modes may raise.
CONVERSION = rounding(64, 1e4)


def denoise(x, sigma):
    return denoised(MODES, torch.from_numpy(x), tensor(sigma)).numpy()


def raised(levels, i, churn=0.0, churn_range=(0.0, math.inf), **_):
    """The level at which step i starts; none is raised above the first."""
    low, high = churn_range
    gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1) if low <= levels[i] <= high else 0.0
    return min(levels[i] * (1 + gamma), levels[0])


def algorithm(x, levels, draws=(), **options):
    """Algorithm 2."""
    draws = iter(draws)
    for i in range(len(levels) - 1):
        sigma = raised(levels, i, **options)
        if sigma > levels[i]:
            added = options.get("noise_scale", 1.0) * math.sqrt(sigma**2 - levels[i] ** 2)
            x = x + added * next(draws)
        slope = (x - denoise(x, sigma)) / sigma
        step = levels[i + 1] - sigma
        following = x + step * slope
        if levels[i + 1] > 0:
            other = (following - denoise(following, levels[i + 1])) / levels[i + 1]
            following = x + step * (slope + other) / 2
        x = following
    assert next(draws, None) is None
    return x


def check_algorithm(name, times, noisy=0, **options):
    """Compare with the algorithm, of which so many steps have noise."""
    (sde, alpha, sigma), t, draws = PROCESSES[name], times.numpy(), list(normals(3, noisy, 4, 1, 2))
    z, noise = start(sde, (4, 2)), RecordedNoise(draws)
    process = ReverseProcess(sde, MODES.score(sde))
    x = z[:, 0].numpy() / alpha(t)[0]
    expected = algorithm(x, sigma(t), [draw[:, 0].numpy() for draw in draws], **options)
    found = solvers.solve(process, EDMHeun(**options), z, times, noise=noise).data.numpy()
    with pytest.raises(ValueError, match="which are used up"):
        noise.normal(z, 1)
    assert found.dtype == expected.dtype == np.float64
    assert abs(found - alpha(t)[-1] * expected).max() <= CONVERSION


@every_process
@pytest.mark.parametrize("times", [GRID, GRID[[0, 4, 9]], TO_ZERO, TO_ZERO[[0, 10]]], ids=len)
def test_it_is_the_algorithm_without_churn(name, times):
    check_algorithm(name, times)


@every_process
@pytest.mark.parametrize("noise_scale", [1.0, 1.007])
@pytest.mark.parametrize("churn", [1.5, 1e3])
def test_it_is_the_algorithm_with_churn(name, churn, noise_scale):
    # All steps but the first have noise, as no level is raised above the first.
    check_algorithm(name, TO_ZERO, N, churn=churn, noise_scale=noise_scale)


@every_process
def test_it_is_the_algorithm_with_churn_in_a_range_of_levels(name):
    levels = PROCESSES[name][2](GRID.numpy())
    # Ends of the range between levels, and three levels inside.
    low, high = math.sqrt(levels[6] * levels[7]), math.sqrt(levels[3] * levels[4])
    ranges = {(low, high): 3, (0.0, low): 2, (high, math.inf): 3, (2 * levels[0], math.inf): 0}
    ranges[levels[6], levels[4]] = 3  # levels at the ends of the range belong to it
    for churn_range, count in ranges.items():
        check_algorithm(name, GRID, count, churn=1.5, noise_scale=1.007, churn_range=churn_range)
