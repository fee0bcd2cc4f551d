"""Strong orders of the solvers that declare one, along paths that are known exactly.

For Gaussian data the reverse SDE is linear with additive noise, and in decreasing time, t to u,

    z_u - m_u = Phi(u, t) (z_t - m_t) + I,      Phi(u, t) = Sigma_u Psi(t, u)^T Sigma_t^{-1},

with I the integral of Phi(u, tau) G(tau) dW over the step. Over each cell of the finest grid, I and
the increments of W are drawn together from their joint law: the first give the exact path, the
second, summed over its steps, are what a solver sees. The reference uses none of the package's
kernels: all follows from exponentials of the matrices of the processes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.stats import t as student

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    ReverseProcess,
    solvers,
)
from cldsde.solvers.authoring import Solver

Array = np.ndarray[Any, np.dtype[np.float64]]

MEAN, VARIANCE = 0.3, 0.25
DATA = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])
START, END = 1.0, 0.05
LEVELS = (64, 128, 256, 512, 1024)
TIMES = np.linspace(START, END, LEVELS[-1] + 1)
BATCHES, SAMPLES = 10, 200


class Schedule(NamedTuple):
    """A rate beta(t) and its integral from 0 to t."""

    rate: Callable[[Array], Array]
    integral: Callable[[Array], Array]


def linear(low: float, high: float) -> Schedule:
    slope = high - low
    return Schedule(lambda t: low + slope * t, lambda t: low * t + slope * t**2 / 2)


def geometric(low: float, high: float) -> Schedule:
    r = math.log(high / low)
    return Schedule(
        lambda t: 2 * r * (low * np.exp(r * t)) ** 2,
        lambda t: low**2 * np.expm1(2 * r * t),
    )


class Exact(NamedTuple):
    """F = beta A, G = sqrt(beta) root; ``auxiliary`` is the covariance of z_0 given the data."""

    A: Array
    root: Array
    auxiliary: Array
    schedule: Schedule

    def psi(self, s: Array, t: Array) -> Array:
        clock = self.schedule.integral(t) - self.schedule.integral(s)
        result: Array = expm(self.A * clock[..., None, None])
        return result

    def mean(self, t: Array) -> Array:
        return MEAN * self.psi(np.zeros_like(t), t)[..., 0]

    def covariance(self, t: Array) -> Array:
        """Solution of the Lyapunov equation: (vec Sigma, 1) obeys one with a constant matrix."""
        k = len(self.A)
        generator = np.zeros((k * k + 1, k * k + 1))
        generator[:-1, :-1] = np.kron(self.A, np.eye(k)) + np.kron(np.eye(k), self.A)
        generator[:-1, -1] = (self.root @ self.root.T).ravel()
        initial = self.auxiliary.copy()
        initial[0, 0] += VARIANCE
        flow = expm(generator * self.schedule.integral(t)[..., None, None])
        state: Array = flow @ np.append(initial.ravel(), 1.0)
        return state[..., :-1].reshape(*t.shape, k, k)

    def phi(self, u: Array, t: Array) -> Array:
        """Transition of the reverse SDE from t to the earlier u."""
        gain = np.linalg.solve(self.covariance(t), self.psi(u, t) @ self.covariance(u))
        return transposed(gain)


def transposed(x: np.ndarray[Any, Any]) -> Array:
    return np.swapaxes(x, -1, -2)


class Cells(NamedTuple):
    """Over each cell of a grid: Phi, and the joint root of I, of W and of the clock's increments.

    The last are the integrals of sqrt(beta) dW.
    """

    phi: Array
    root: Array


def cells(exact: Exact, times: Array, nodes: int) -> Cells:
    t, u = times[:-1, None], times[1:, None]
    x, weights = np.polynomial.legendre.leggauss(nodes)
    tau = u + (t - u) * (x + 1) / 2
    rate = np.sqrt(exact.schedule.rate(tau))[..., None, None]
    noise = rate * (exact.phi(np.broadcast_to(u, tau.shape), tau) @ exact.root)
    eye = np.broadcast_to(np.eye(exact.root.shape[1]), (*tau.shape, *[exact.root.shape[1]] * 2))
    columns = np.concatenate([noise, eye, rate * eye], axis=-2)
    columns = columns * np.sqrt((t - u) * weights / 2)[..., None, None]
    rows = transposed(columns).reshape(len(t), -1, columns.shape[-2])
    upper: Array = np.linalg.qr(rows).R
    return Cells(exact.phi(u[:, 0], t[:, 0]), transposed(upper))


def scalar(slope: float, initial: float, schedule: Schedule) -> Exact:
    return Exact(np.array([[slope]]), np.eye(1), np.array([[initial]]), schedule)


def langevin(schedule: Schedule) -> Exact:
    A, root = np.array([[0.0, 4.0], [-1.0, -4.0]]), np.array([[0.0], [math.sqrt(2)]])
    return Exact(A, root, np.diag([0.0, 0.01]), schedule)


def psld() -> Exact:
    A, root = np.array([[-0.005, 2.0], [-0.5, -2.005]]), np.diag(np.sqrt([0.01, 0.25 * 4.01]))
    return Exact(A, root, np.diag([0.0, 0.01]), linear(8.0, 8.0))


def hold() -> Exact:
    g, xi = 2 * math.sqrt(2), 3 * math.sqrt(3)
    A = np.array([[0, 1, 0], [-1, 0, g], [0, -g, -xi]])
    root = np.array([[0.0], [0.0], [math.sqrt(2 * xi)]])
    return Exact(A, root, np.diag([0.0, 0.04, 0.04]), linear(4.0, 4.0))


PROCESSES: dict[str, Callable[[], tuple[LinearSDE, Exact]]] = {
    "VP": lambda: (VPSDE(8.0, 8.0), scalar(-0.5, 0.0, linear(8.0, 8.0))),
    "VP, linear": lambda: (VPSDE(0.1, 8.0), scalar(-0.5, 0.0, linear(0.1, 8.0))),
    "VE": lambda: (VESDE(0.1, 5.0), scalar(0.0, 0.01, geometric(0.1, 5.0))),
    "CLD": lambda: (CLD(), langevin(linear(4.0, 4.0))),
    "CLD, linear": lambda: (CLD((1.0, 7.0)), langevin(linear(1.0, 7.0))),
    "PSLD": lambda: (PSLD(), psld()),
    "HOLD": lambda: (HOLD(), hold()),
}
SOLVERS: dict[str, Solver] = {
    "Euler-Maruyama": solvers.EulerMaruyama(),
    "Heun": solvers.StochasticHeun(),
}
CASES = [(method, name, "W") for method, name in itertools.product(SOLVERS, PROCESSES)]
# Heun's noise has the law of the integral of G dW, and may be that integral.
CASES += [("Heun", name, "clock") for name in ("VP, linear", "VE", "CLD, linear")]

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_case = pytest.mark.parametrize(("method", "name", "increments"), CASES)


@functools.cache
def finest(name: str) -> Cells:
    return cells(PROCESSES[name]()[1], TIMES, 8)


class Paths(NamedTuple):
    """Both ends, (k, samples), and the noise of the finest cells, (cell, row, samples)."""

    start: Array
    end: Array
    noise: Array


@functools.cache
def paths(name: str) -> Paths:
    exact, (phi, root) = PROCESSES[name]()[1], finest(name)
    k, n = len(exact.A), BATCHES * SAMPLES
    rng = np.random.default_rng(1)
    noise = root @ rng.standard_normal((len(phi), root.shape[-1], n))
    start = np.linalg.cholesky(exact.covariance(TIMES[0])) @ rng.standard_normal((k, n))
    mean = exact.mean(TIMES[[0, -1]])[..., None]
    return Paths(mean[0] + start, mean[1] + follow(phi, start, noise[:, :k]), noise)


def follow(phi: Array, z: Array, integrals: Array) -> Array:
    for step, jump in zip(phi, integrals, strict=True):
        z = step @ z + jump
    return z


def summed(x: Array, n: int) -> Array:
    """Sums over the finest cells in each of n steps."""
    total: Array = x.reshape(n, -1, *x.shape[1:]).sum(1)
    return total


@functools.cache
def solved(method: str, name: str, increments: str, n: int) -> Array:
    """Where the solver's paths end after n steps, (k, samples)."""
    (sde, exact), path = PROCESSES[name](), paths(name)
    k, r = exact.root.shape
    times = TIMES[:: LEVELS[-1] // n].copy()
    if increments == "W":
        variance, rows = times[:-1] - times[1:], slice(k, k + r)
    else:
        clock = exact.schedule.integral(times)
        variance, rows = clock[:-1] - clock[1:], slice(k + r, None)
    xi = summed(path.noise[:, rows], n) / np.sqrt(variance)[:, None, None]
    draws = torch.from_numpy(np.moveaxis(xi, -1, 1).copy())[..., None]
    solution = solvers.solve(
        ReverseProcess(sde, DATA.score(sde)),
        SOLVERS[method],
        torch.from_numpy(path.start.T.copy())[..., None],
        torch.from_numpy(times),
        noise=solvers.RecordedNoise(list(draws)),
    )
    assert solution.success
    state: Array = solution.state[..., 0].numpy().T
    return state


@functools.cache
def slopes(method: str, name: str, increments: str) -> Array:
    """Orders of the root mean square error over the levels, one a batch of samples."""
    end = paths(name).end
    errors = np.stack([solved(method, name, increments, n) - end for n in LEVELS])
    square = np.square(errors).sum(1).reshape(len(LEVELS), BATCHES, SAMPLES).mean(-1)
    result: Array = -np.polyfit(np.log(LEVELS), np.log(square) / 2, 1)[0]
    return result


def interval(sample: Array) -> tuple[float, float]:
    """Confidence interval of a mean at 99 %."""
    middle, error = sample.mean(), sample.std(ddof=1) / math.sqrt(len(sample))
    half = student.ppf(0.995, len(sample) - 1) * error
    return float(middle - half), float(middle + half)


def declared(method: str) -> float:
    value = SOLVERS[method].facts.strong_order
    assert value is not None
    return value


# The slopes are near their limit, and a declaration that is off by a half is more than this away.
CLOSE = 0.25


class TestOrders:
    """Errors of single paths fall to the order declared."""

    @every_case
    def test_the_order_is_that_of_the_declaration(
        self, method: str, name: str, increments: str
    ) -> None:
        low, high = interval(slopes(method, name, increments))
        assert declared(method) - CLOSE < low < high < declared(method) + CLOSE

    @pytest.mark.parametrize("wrong", [-0.5, 0.5])
    @every_case
    def test_a_declaration_off_by_a_half_would_be_seen(
        self, method: str, name: str, increments: str, wrong: float
    ) -> None:
        low, high = interval(slopes(method, name, increments))
        value = declared(method) + wrong
        assert high < value - CLOSE or low > value + CLOSE

    @pytest.mark.parametrize("method", list(SOLVERS))
    @every_process
    def test_it_is_the_path_that_converges(self, method: str, name: str) -> None:
        # Against the end of another sample's path the error is that of independent states.
        end, n = paths(name).end, LEVELS[-1]
        found = solved(method, name, "W", n)
        own, other = (np.square(found - x).sum(0).mean() for x in (end, np.roll(end, 1, axis=1)))
        spread = 2 * np.trace(PROCESSES[name]()[1].covariance(TIMES[-1]))
        # 5 standard errors, at most sqrt(3 / 2000) of the value each: a sample is in two pairs.
        assert abs(other / spread - 1) < 0.2
        assert own < 1e-2 * other


class TestReference:
    """The exact paths have the law of the process, and are the same on every grid."""

    @every_process
    def test_it_is_the_process_of_the_package(self, name: str) -> None:
        sde, exact = PROCESSES[name]()
        initial = sde.initial_covariance.clone()
        initial[0, 0] += VARIANCE
        kernel = sde.marginal(torch.from_numpy(TIMES), initial_covariance=initial)
        # Sums of exponentials of matrices: far above the rounding of either side.
        assert abs(MEAN * kernel.mean[..., 0].numpy() - exact.mean(TIMES)).max() < 1e-12
        assert abs(kernel.covariance.numpy() - exact.covariance(TIMES)).max() < 1e-12

    @pytest.mark.parametrize("n", [LEVELS[0], LEVELS[-1]])
    @every_process
    def test_moments_reach_the_exact_marginal(self, name: str, n: int) -> None:
        exact, coarse = PROCESSES[name]()[1], TIMES[:: LEVELS[-1] // n]
        phi, root = finest(name) if n == LEVELS[-1] else cells(exact, coarse, 20)
        k = len(exact.A)
        C = exact.covariance(TIMES[0])
        for step, noise in zip(phi, root[:, :k], strict=True):
            C = step @ C @ step.T + noise @ noise.T
        assert abs(C - exact.covariance(TIMES[-1])).max() < 1e-10

    @pytest.mark.parametrize("n", [LEVELS[0], LEVELS[-2]])
    @every_process
    def test_cells_compose(self, name: str, n: int) -> None:
        exact, fine = PROCESSES[name]()[1], finest(name)
        k = len(exact.A)
        coarse = cells(exact, TIMES[:: LEVELS[-1] // n], 20)
        phi, joint, carry = np.eye(k), np.zeros_like(coarse.root), np.eye(fine.root.shape[1])
        carry = np.repeat(carry[None], n, axis=0)
        stride = LEVELS[-1] // n
        for i in range(stride):
            # What is integrated is carried on by Phi, the increments are added.
            carry[:, :k, :k], root = fine.phi[i::stride], fine.root[i::stride]
            joint = carry @ joint @ transposed(carry) + root @ transposed(root)
            phi = fine.phi[i::stride] @ phi
        assert abs(phi - coarse.phi).max() < 1e-10
        expected = coarse.root @ transposed(coarse.root)
        assert abs(joint - expected).max() < 1e-10

    @pytest.mark.parametrize("n", LEVELS[:-1:2])
    @every_process
    def test_paths_do_not_depend_on_the_grid(self, name: str, n: int) -> None:
        exact, path = PROCESSES[name]()[1], paths(name)
        k = len(exact.A)
        times = TIMES[:: LEVELS[-1] // n]
        # Each fine integral is carried from the end of its cell to that of its step.
        ends = np.repeat(times[1:], LEVELS[-1] // n)
        carried = exact.phi(ends, TIMES[1:]) @ path.noise[:, :k]
        mean = exact.mean(TIMES[[0, -1]])[..., None]
        z = follow(exact.phi(times[1:], times[:-1]), path.start - mean[0], summed(carried, n))
        assert abs(mean[1] + z - path.end).max() < 1e-10
