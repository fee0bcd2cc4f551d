"""Strong orders of the package's own solvers that declare one, along paths that are known exactly.

For Gaussian data the reverse SDE is linear with additive noise, and in decreasing time, t to u,

    z_u - m_u = Phi(u, t) (z_t - m_t) + I,      Phi(u, t) = Sigma_u Psi(t, u)^T Sigma_t^{-1},

with I the integral of Phi(u, tau) G(tau) dW over the step. Over each cell of the finest grid, I and
the increments of W are drawn together from their joint distribution: the first give the exact path,
the second, summed over its steps, are the noise of a solver.
"""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from cldsde import solvers
from gaussian_data import EVERY, PROCESSES, SLOPE, reverse
from references.float64 import transposed

LEVELS = (64, 256)
TIMES = np.linspace(1.0, 0.05, LEVELS[-1] + 1)
BATCHES, SAMPLES = 10, 100

# The orders of torchsde's methods are measured in validation/test_order_measurement.py.
NAMED = solvers.named_solvers()
OWN = [x for x in NAMED if NAMED[x].facts.strong_order and not x.startswith("torchsde")]


@functools.cache
def paths(name):
    """Both ends, (k, samples), and the noise of the cells, (cell, row, samples).

    The rows are I, the increments of W, and the increments of the clock, ∫ sqrt(beta) dW.
    """
    exact = PROCESSES[name][1]
    k, r = exact.Q_root.shape
    t, u = TIMES[:-1, None], TIMES[1:, None]
    x, weights = np.polynomial.legendre.leggauss(12)
    tau = u + (t - u) * (x + 1) / 2
    rate = np.sqrt(exact.clock.rate(tau))[..., None, None]
    integrand = rate * (exact.backward(np.broadcast_to(u, tau.shape), tau) @ exact.Q_root)
    eye = np.broadcast_to(np.eye(r), (*tau.shape, r, r))
    columns = np.concatenate([integrand, eye, rate * eye], axis=-2)
    columns = columns * np.sqrt((t - u) * weights / 2)[..., None, None]
    rows = transposed(columns).reshape(len(t), -1, k + 2 * r)
    root = transposed(np.linalg.qr(rows).R)

    rng, n = np.random.default_rng(1), BATCHES * SAMPLES
    noise = root @ rng.standard_normal((len(t), root.shape[-1], n))
    start = z = np.linalg.cholesky(exact.covariance(TIMES[0])) @ rng.standard_normal((k, n))
    for phi, jump in zip(exact.backward(u[:, 0], t[:, 0]), noise, strict=True):
        z = phi @ z + jump[:k]
    first, last = exact.mean(TIMES[[0, -1]])[..., None]
    return first + start, last + z, noise


def errors(method, name, increments, n):
    """Squared errors of the solver's paths after n steps, (samples,)."""
    exact, (begin, end, cells) = PROCESSES[name][1], paths(name)
    k, r = exact.Q_root.shape
    times = TIMES[:: LEVELS[-1] // n].copy()
    variance, rows = times[:-1] - times[1:], slice(k, k + r)
    if increments == "clock":
        variance, rows = exact.clock.integral(times[1:], times[:-1]), slice(k + r, None)
    summed = cells[:, rows].reshape(n, -1, r, BATCHES * SAMPLES).sum(1)
    xi = summed / np.sqrt(variance)[:, None, None]
    draws = torch.from_numpy(np.moveaxis(xi, -1, 1).copy())[..., None]
    noise, start = solvers.RecordedNoise(list(draws)), torch.from_numpy(begin.T[..., None])
    times = torch.from_numpy(times)
    found = solvers.solve(reverse(name), NAMED[method], start, times, noise=noise).state
    return np.square(found[..., 0].numpy().T - end).sum(0)


@pytest.mark.parametrize(
    ("method", "name", "increments"),
    # Heun's noise has the distribution of the integral of G dW, and may be that integral.
    [(method, name, "W") for method in OWN for name in EVERY]
    + [("stochastic-heun", name, "clock") for name in ("CLD, linear", "VE")],
)
@pytest.mark.one_in(3)
def test_the_order_is_the_declared_one(method, name, increments):
    squares = [errors(method, name, increments, n) for n in LEVELS]
    means = np.stack([x.reshape(BATCHES, SAMPLES).mean(1) for x in squares])
    slopes = np.log(means[0] / means[1]) / 2 / math.log(LEVELS[1] / LEVELS[0])
    # Confidence interval at 99 %.
    half = student.ppf(0.995, BATCHES - 1) * slopes.std(ddof=1) / math.sqrt(BATCHES)
    assert abs(slopes.mean() - NAMED[method].facts.strong_order) + half < SLOPE
    # It is the path itself that converges: independent states are at a distance of order one.
    assert squares[1].mean() < 1e-2 * 2 * np.trace(PROCESSES[name][1].covariance(TIMES[-1]))
