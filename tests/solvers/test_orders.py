"""Orders of the fixed-grid solvers, from exact moments, and their one-step maps written anew.

The reference uses none of the package's kernels. Both the reverse SDE and the probability flow
carry p_T to p_t, so that the moments of z_t are the exact answer for either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec, solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov

import references
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
from cldsde.solvers import ExponentialMultistep as Multistep
from cldsde.solvers.authoring import Solver
from cldsde.validation import propagate_moments
from references.float64 import Array, Dense, dense
from tolerances import KERNEL

DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
PROCESSES: dict[str, Callable[[], tuple[LinearSDE, Dense]]] = {
    "VP": lambda: (VPSDE(0.1, 8.0), dense(references.vp(0.1, 8.0))),
    "VE": lambda: (VESDE(0.1, 5.0), dense(references.ve(0.1, 5.0))),
    "CLD": lambda: (CLD(), dense(references.cld())),
    "CLD, linear": lambda: (CLD((1.0, 7.0)), dense(references.cld((1.0, 7.0)))),
    "PSLD": lambda: (PSLD(), dense(references.psld())),
    "HOLD": lambda: (HOLD(), dense(references.hold())),
}
GRIDS: dict[str, Callable[[float, float, int], torch.Tensor]] = {
    "uniform": solvers.uniform_times,
    "root": solvers.root_times,
}


def moments(solver: Solver, name: str, times: torch.Tensor) -> tuple[Array, Array]:
    """Moments at the end of the grid, started from the exact ones."""
    (sde, exact), T = PROCESSES[name](), float(times[0])
    start = torch.from_numpy(exact.mean(T))[:, None], torch.from_numpy(exact.covariance(T))
    m, C = propagate_moments(ReverseProcess(sde, DATA.score(sde)), solver, times, *start)
    return m[:, 0].numpy(), C.numpy()


@functools.cache
def error(
    solver: Solver, name: str, n: int, grid: str = "root", T: float = 1.0, end: float = 0.05
) -> float:
    # A norm that is smooth in the steps: the largest entry changes places.
    exact = PROCESSES[name]()[1]
    m, C = moments(solver, name, GRIDS[grid](T, end, n))
    difference = np.linalg.norm(m - exact.mean(end)), np.linalg.norm(C - exact.covariance(end))
    return float(np.hypot(*difference))


def order(solver: Solver, name: str, coarse: int = 160, factor: int = 2, **options: Any) -> float:
    """Slope of the error between ``coarse`` and ``factor * coarse`` steps."""
    first, last = (error(solver, name, n, **options) for n in (coarse, factor * coarse))
    return math.log(first / last) / math.log(factor)


def declared(solver: Solver) -> float:
    facts = solver.facts
    value = facts.weak_order if facts.ode_order is None else facts.ode_order
    assert value is not None
    assert (facts.weak_order is None) != (facts.ode_order is None)
    return value


# With errors c h^p (1 + d h + ...) the slope is p + d h / (2 log 2): a quarter leaves room for the
# second term, and a declaration that is off by a half is more than a quarter away.
CLOSE = 0.25


def level(t: torch.Tensor) -> torch.Tensor:
    """A stochasticity that falls with time."""
    return t


PUBLISHED: dict[str, Any] = {"variable": "log_snr", "weights": "published"}
EVERY = ["VP", "VE", "CLD, linear", "PSLD", "HOLD"]
SETTLED = 160  # steps from which the slope is close to its limit
EARLIER = {"CLD": 80, "CLD, linear": 80, "PSLD": 80}
# Solvers, and the processes on which the slope is the declared one.
TABLE: dict[str, tuple[Solver, list[str]]] = {
    "Euler-Maruyama": (solvers.EulerMaruyama(), EVERY),
    "Heun": (solvers.StochasticHeun(), EVERY),
    "exponential Euler": (solvers.ExponentialEuler(), ["VE", "CLD, linear", "HOLD"]),
    "reverse diffusion": (solvers.ReverseDiffusion(), ["VE", "CLD, linear"]),
    "ancestral": (solvers.Ancestral(), ["VE", "CLD, linear"]),
    "SSCS": (solvers.SSCS(), ["VP", "CLD, linear", "HOLD"]),
    "SSCS, midpoint": (solvers.SSCS(score_step="midpoint"), ["VP", "CLD, linear", "PSLD", "HOLD"]),
    "SSCS, wrong slope": (solvers.SSCS(score_step="gaussian", data_variance=1.0), ["CLD, linear"]),
    "1": (Multistep(order=1), ["VP", "VE"]),
    "2": (Multistep(order=2), ["VP", "CLD, linear", "PSLD", "HOLD"]),
    "3": (Multistep(order=3), ["CLD"]),
    "1 corrected": (Multistep(order=1, corrector=True), ["VE", "CLD"]),
    "2 corrected": (Multistep(order=2, corrector=True), ["VE", "CLD, linear"]),
    "3 corrected": (Multistep(order=3, corrector=True), []),
    "noise, 1": (Multistep(order=1, prediction="noise"), ["CLD"]),
    "noise, 2": (Multistep(order=2, prediction="noise"), ["VE", "CLD", "HOLD"]),
    "noise, 3": (Multistep(order=3, prediction="noise"), ["VE"]),
    "log-SNR, 2": (Multistep(order=2, variable="log_snr"), ["VP", "CLD"]),
    "log-SNR, 2 corrected": (Multistep(order=2, variable="log_snr", corrector=True), ["CLD"]),
    "log-SNR, 2 with noise": (Multistep(order=2, variable="log_snr", stochasticity=1.0), ["CLD"]),
    "published, 1": (Multistep(order=1, **PUBLISHED), ["CLD"]),
    "published, 2": (Multistep(order=2, **PUBLISHED), ["VP", "CLD"]),
    "published, 2 corrected": (Multistep(order=2, corrector=True, **PUBLISHED), ["VP", "CLD"]),
    "published, 2 with noise": (Multistep(order=2, stochasticity=1.0, **PUBLISHED), ["CLD"]),
    "2 at falling noise": (Multistep(order=2, stochasticity=level), ["VP", "CLD"]),
    "1 at 0.5": (Multistep(order=1, stochasticity=0.5), ["VP", "CLD"]),
    "1 corrected at 1": (Multistep(order=1, stochasticity=1.0, corrector=True), ["VP", "CLD"]),
    "2 at 0.5": (Multistep(order=2, stochasticity=0.5), ["CLD"]),
    "2 at 1": (Multistep(order=2, stochasticity=1.0), ["VP", "VE", "CLD, linear", "HOLD"]),
    "2 corrected at 1": (Multistep(order=2, stochasticity=1.0, corrector=True), []),
    "3 at 1": (Multistep(order=3, stochasticity=1.0), []),
    "3 corrected at 1": (Multistep(order=3, stochasticity=1.0, corrector=True), []),
}
SOLVERS = {method: solver for method, (solver, _) in TABLE.items()}


class TestOrders:
    """Halving the steps divides the error by two to the declared order."""

    @pytest.mark.parametrize(
        ("method", "name"), [(method, name) for method in TABLE for name in TABLE[method][1]]
    )
    def test_the_order_is_the_declared_one(self, method: str, name: str) -> None:
        slope = order(SOLVERS[method], name, EARLIER.get(name, SETTLED))
        assert abs(slope - declared(SOLVERS[method])) < CLOSE

    @pytest.mark.parametrize("name", ["VP", "CLD, linear"])
    def test_sscs_with_the_true_slope_is_of_order_two(self, name: str) -> None:
        # The frozen part vanishes: the kick is off by the middle time of its coefficients alone.
        solver = solvers.SSCS(score_step="gaussian", data_variance=0.25)
        assert declared(solver) == 1
        assert abs(order(solver, name) - 2) < CLOSE

    @pytest.mark.parametrize("method", ["2 corrected at 1", "3 at 1"])
    def test_with_noise_every_higher_order_ends_at_two(self, method: str) -> None:
        # The polynomial's error, h^3 or smaller, hides the error of the noise, h^2 with a small
        # constant, until the steps are short: on VP, away from the data, it shows.
        solver = SOLVERS[method]
        assert declared(solver) == 2
        assert abs(order(solver, "VP", 320, grid="uniform", T=0.5, end=0.2) - 2) < CLOSE

    @pytest.mark.parametrize("method", ["2 corrected at 1", "3 at 1", "3 corrected at 1"])
    def test_with_noise_a_process_with_velocity_is_no_worse(self, method: str) -> None:
        # The constant of h^2 is smaller still: over a factor of eight the slope is between the
        # declared order and the polynomial's order.
        solver = SOLVERS[method]
        assert order(solver, "CLD", 20, 8, T=1.0, end=0.2) > declared(solver) - CLOSE

    @pytest.mark.parametrize("method", ["3", "3 corrected", "noise, 3"])
    def test_the_first_steps_limit_the_order(self, method: str) -> None:
        # A first step of order q errs by h^(q+1), once. Near the limit from above.
        assert -CLOSE < order(SOLVERS[method], "VE", 320) - declared(SOLVERS[method]) < 2 * CLOSE

    @pytest.mark.parametrize("method", ["3 corrected", "noise, 3"])
    def test_processes_with_velocity_hide_the_first_steps(self, method: str) -> None:
        # Their data prediction hardly moves at T: one order more than declared is seen.
        assert order(SOLVERS[method], "CLD") > declared(SOLVERS[method]) + 1 - CLOSE


MODES = GaussianMixture(
    [0.3, 0.3, 0.4], [[-1.0, 0.2], [0.8, 0.8], [0.4, -1.0]], [[[0.1225, 0.0], [0.0, 0.1225]]] * 3
)


@functools.cache
def flow(name: str, T: float, end: float) -> tuple[torch.Tensor, torch.Tensor]:
    """States at T and where the probability flow takes them, by a Runge-Kutta rule of order 8."""
    sde, _ = PROCESSES[name]()
    process = ReverseProcess(sde, MODES.score(sde))
    g = torch.Generator().manual_seed(1)
    x = MODES.sample(12, generator=g, dtype=torch.float64)
    start = sde.perturb(x, T, generator=g)[0]

    def velocity(t: float, y: Array) -> Array:
        z = torch.from_numpy(y).reshape(start.shape)
        return process.probability_flow(z, t).flatten().numpy()

    solution = solve_ivp(
        velocity, (T, end), start.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12
    )
    assert solution.success
    return start, torch.from_numpy(solution.y[:, -1]).reshape(start.shape)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("2", "CLD"),
        ("3", "CLD"),
        ("noise, 2", "CLD"),
        ("2 corrected", "VP"),
        ("published, 2", "VP"),
    ],
)
def test_the_order_on_the_flow_of_three_modes(method: str, name: str) -> None:
    solver, end = SOLVERS[method], 0.1
    start, expected = flow(name, 1.0, end)
    sde, _ = PROCESSES[name]()
    process = ReverseProcess(sde, MODES.score(sde))
    errors = []
    for n in (160, 320):
        found = solvers.solve(process, solver, start, solvers.root_times(1.0, end, n)).state
        errors.append(float((found - expected).square().mean().sqrt()))
    assert errors[-1] > 1e-8  # the reference is good to 1e-10
    assert abs(math.log2(errors[0] / errors[1]) - declared(solver)) < CLOSE


# An affine score of the velocity that has nothing to do with any data.
def pull(t: float) -> Array:
    return np.array([[math.sin(3 * t), -2.0 - math.cos(5 * t)]])


def push(t: float) -> Array:
    return np.array([0.3 + t])


def made_up(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    at = float(t[0])
    linear = torch.einsum("ij,bjd->bid", torch.from_numpy(pull(at)), z)
    return linear + torch.from_numpy(push(at))[:, None]


class Step(NamedTuple):
    """z' = X z + b + noise of covariance C."""

    X: Array
    b: Array
    C: Array


def euler_maruyama(exact: Dense, t: float, u: float) -> Step:
    h, G = t - u, exact.clock.rate(t) * exact.Q
    X = np.eye(2) + h * (-exact.clock.rate(t) * exact.A + G[:, 1:] @ pull(t))
    return Step(X, h * G[:, 1:] @ push(t), h * G)


def heun(exact: Dense, t: float, u: float) -> Step:
    h, eye = t - u, np.eye(2)

    def drift(at: float) -> tuple[Array, Array]:
        G = exact.clock.rate(at) * exact.Q[:, 1:]
        return h * (-exact.clock.rate(at) * exact.A + G @ pull(at)), h * G @ push(at)

    (D, d), (E, e) = drift(t), drift(u)
    X = eye + (D + E @ (eye + D)) / 2
    jump = eye + E / 2
    return Step(X, (d + E @ d + e) / 2, jump @ (clock(exact, u, t) * exact.Q) @ jump.T)


def clock(exact: Dense, s: float, t: float) -> float:
    return float(exact.clock.integral(s, t))


def given(exact: Dense, t: float) -> Array:
    """Covariance of z_t given the data."""
    return exact._replace(data_variance=0.0).covariance(t)


def integral(f: Callable[[float], Array], u: float, t: float) -> Array:
    value, _ = quad_vec(f, u, t, epsabs=1e-14, epsrel=1e-13)
    result: Array = value
    return result


def exponential_euler(exact: Dense, t: float, u: float) -> Step:
    def back(at: float) -> Array:
        return np.linalg.inv(exact.psi(u, at))

    gain = integral(lambda at: back(at) @ (exact.clock.rate(at) * exact.Q), u, t)[:, 1:]
    C = integral(lambda at: back(at) @ (exact.clock.rate(at) * exact.Q) @ back(at).T, u, t)
    return Step(back(t) + gain @ pull(t), gain @ push(t), C)


def sscs_midpoint(exact: Dense, t: float, u: float) -> Step:
    S = solve_continuous_lyapunov(exact.A, -exact.Q)
    P, middle, eye = np.linalg.inv(S), (t + u) / 2, np.eye(2)
    H = S @ exact.A.T @ P

    def move(late: float, early: float) -> tuple[Array, Array]:
        # A point at ``at`` has the clock from ``early`` to ``at`` left.
        psi = expm(H * clock(exact, early, late))
        C = integral(
            lambda at: (
                expm(H * clock(exact, early, at))
                @ (exact.clock.rate(at) * exact.Q)
                @ expm(H * clock(exact, early, at)).T
            ),
            early,
            late,
        )
        return psi, C

    half, whole = (clock(exact, early, t) * exact.Q for early in (middle, u))
    K = half @ P + half[:, 1:] @ pull(t)
    N = whole @ P + whole[:, 1:] @ pull(middle)
    kick = eye + N @ (eye + K)
    shift = N @ half[:, 1:] @ push(t) + whole[:, 1:] @ push(middle)
    (first, noise), (last, late_noise) = move(t, middle), move(middle, u)
    return Step(
        last @ kick @ first,
        last @ shift,
        last @ kick @ noise @ kick.T @ last.T + late_noise,
    )


def data_prediction(exact: Dense, t: float) -> tuple[Array, Array]:
    """x0 = row z + shift: (Sigma s)_all = -(z - psi x0), of which the velocity's score is given."""
    precision = np.linalg.inv(given(exact, t))
    weight = precision @ exact.psi(0.0, t)[:, 0]
    return (pull(t)[0] + precision[1]) / weight[1], push(t) / weight[1]


def reverse_diffusion(exact: Dense, t: float, u: float) -> Step:
    precision, psi = np.linalg.inv(given(exact, t)), exact.psi(0.0, t)[:, :1]
    row, shift = data_prediction(exact, t)
    full = -precision @ (np.eye(2) - psi @ row[None])
    Q = integral(
        lambda at: exact.psi(at, t) @ (exact.clock.rate(at) * exact.Q) @ exact.psi(at, t).T, u, t
    )
    X = 2 * np.eye(2) - exact.psi(u, t) + Q @ full
    return Step(X, Q @ precision @ psi @ shift, Q)


def ancestral(exact: Dense, t: float, u: float) -> Step:
    before, after = given(exact, t), given(exact, u)
    K = after @ exact.psi(u, t).T @ np.linalg.inv(before)
    row, shift = data_prediction(exact, t)
    B = exact.psi(0.0, u)[:, :1] - K @ exact.psi(0.0, t)[:, :1]
    return Step(K + B @ row[None], B @ shift, after - K @ before @ K.T)


MAPS: dict[str, Callable[[Dense, float, float], Step]] = {
    "Euler-Maruyama": euler_maruyama,
    "Heun": heun,
    "exponential Euler": exponential_euler,
    "SSCS, midpoint": sscs_midpoint,
    "reverse diffusion": reverse_diffusion,
    "ancestral": ancestral,
}


@pytest.mark.parametrize("name", ["CLD", "CLD, linear"])
@pytest.mark.parametrize("ends", [(1.0, 0.7), (0.3, 0.05)])
@pytest.mark.parametrize("method", list(MAPS))
def test_a_step_is_its_formula(method: str, ends: Sequence[float], name: str) -> None:
    sde, exact = PROCESSES[name]()
    expected = MAPS[method](exact, *ends)
    process = ReverseProcess(sde, made_up)
    times = torch.tensor(ends, dtype=torch.float64)

    def step(start: Sequence[float]) -> tuple[Array, Array]:
        mean = torch.tensor(start, dtype=torch.float64)[:, None]
        m, C = propagate_moments(process, SOLVERS[method], times, mean, torch.zeros(2, 2))
        return m[:, 0].numpy(), C.numpy()

    b, C = step([0.0, 0.0])
    X = np.stack([step(unit)[0] - b for unit in ([1.0, 0.0], [0.0, 1.0])], axis=1)
    for found, value in ((X, expected.X), (b, expected.b), (C, expected.C)):
        # The references lose two digits of the kernels' at t = 0.05 to subtraction.
        assert abs(found - value).max() <= 100 * KERNEL * max(1.0, abs(value).max())
