"""torchdiffeq and torchsde: their methods as solvers, and processes as their right-hand sides.

The references use none of the package's kernels. For F = beta(t) A and G = sqrt(beta(t)) R with
Gaussian data, covariances follow from an exponential of the Lyapunov equation's matrix, the
probability flow is a linear ODE that scipy solves, and the reverse SDE has exact paths,

    z_u - m_u = Phi(u, t) (z_t - m_t) + I,      Phi(u, t) = Sigma_u Psi(t, u)^T Sigma_t^{-1}.
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
import torchsde
from scipy.integrate import solve_ivp
from scipy.interpolate import make_interp_spline
from scipy.linalg import expm
from torchdiffeq import odeint, odeint_adjoint

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.solvers import (
    BrownianPath,
    EulerMaruyama,
    NoiseSource,
    ProbabilityFlow,
    RecordedNoise,
    SampleNoise,
    Solution,
    StochasticHeun,
    TorchDiffEq,
    TorchSDE,
    as_torchdiffeq,
    as_torchsde,
    root_times,
    solve,
    uniform_times,
)
from cldsde.solvers.authoring import Solver
from cldsde.validation import propagate_moments
from probes import Recording, generator, known_score, start, untouchable

Array = np.ndarray[Any, np.dtype[np.float64]]

MEAN, VARIANCE = 0.3, 0.25
DATA = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
# Such that each takes some ten to a thousand steps.
TOLERANCES = {
    "dopri8": 1e-8,
    "dopri5": 1e-7,
    "bosh3": 1e-5,
    "fehlberg2": 1e-6,
    "adaptive_heun": 1e-4,
}
STOCHASTIC = ("euler", "milstein", "srk", "heun", "euler_heun", "midpoint")
CALCULUS = {
    "euler": "ito",
    "milstein": "ito",
    "srk": "ito",
    "heun": "stratonovich",
    "euler_heun": "stratonovich",
    "midpoint": "stratonovich",
}

# Slopes are near their limit, and a declaration that is off by a half is more than this away.
CLOSE = 0.25


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

    def psi(self, s: Any, t: Any) -> Array:
        clock = self.schedule.integral(np.asarray(t)) - self.schedule.integral(np.asarray(s))
        result: Array = expm(self.A * clock[..., None, None])
        return result

    def mean(self, t: Any) -> Array:
        return MEAN * self.psi(np.zeros_like(t), t)[..., 0]

    def covariance(self, t: Any) -> Array:
        """Solution of the Lyapunov equation: (vec Sigma, 1) obeys one with a constant matrix."""
        k = len(self.A)
        matrix = np.zeros((k * k + 1, k * k + 1))
        matrix[:-1, :-1] = np.kron(self.A, np.eye(k)) + np.kron(np.eye(k), self.A)
        matrix[:-1, -1] = (self.root @ self.root.T).ravel()
        initial = self.auxiliary.copy()
        initial[0, 0] += VARIANCE
        flow = expm(matrix * self.schedule.integral(np.asarray(t))[..., None, None])
        state: Array = flow @ np.append(initial.ravel(), 1.0)
        return state[..., :-1].reshape(*np.shape(t), k, k)

    def phi(self, u: Array, t: Array) -> Array:
        """Transition of the reverse SDE from t to the earlier u."""
        gain = np.linalg.solve(self.covariance(t), self.psi(u, t) @ self.covariance(u))
        return transposed(gain)

    def slope(self, t: float) -> Array:
        """Matrix of the probability flow about the mean, F + G G^T Sigma^-1 / 2."""
        pull = self.root @ self.root.T @ np.linalg.inv(self.covariance(t))
        result: Array = self.schedule.rate(np.asarray(t)) * (self.A + 0.5 * pull)
        return result

    def velocity(self, t: float, z: Array) -> Array:
        """Of the probability flow, for states (B, k, D)."""
        m = self.mean(t)[:, None]
        drift = self.schedule.rate(np.asarray(t)) * (self.A @ m)
        result: Array = drift + self.slope(t) @ (z - m)
        return result


def transposed(x: np.ndarray[Any, Any]) -> Array:
    return np.swapaxes(x, -1, -2)


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
CONSTANT = ("VP", "CLD", "PSLD", "HOLD")

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_fixed = pytest.mark.parametrize("method", FIXED)
every_adaptive = pytest.mark.parametrize("method", ADAPTIVE)
every_ode_method = pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
every_sde_method = pytest.mark.parametrize("method", STOCHASTIC)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def reverse(name: str) -> ReverseProcess:
    sde = PROCESSES[name]()[0]
    return ReverseProcess(sde, DATA.score(sde))


def flowing(name: str) -> ReverseProcess:
    """The same with a score written in closed form."""
    sde, exact = PROCESSES[name]()

    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at = float(t[0])
        precision = torch.from_numpy(np.linalg.inv(exact.covariance(at))).to(z)
        mean = torch.from_numpy(exact.mean(at)).to(z)[:, None]
        return torch.einsum("ij,bjd->bid", -precision[list(sde.driven)], z - mean)

    return ReverseProcess(sde, score)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def largest(x: torch.Tensor | Array) -> float:
    return float(abs(x).max())


class Flow(NamedTuple):
    """What the probability flow does to z - m, and by how much it may lengthen an error."""

    matrix: Array
    growth: float


@functools.cache
def flow(name: str, T: float, end: float) -> Flow:
    _, exact = PROCESSES[name]()
    k = len(exact.A)
    solution = solve_ivp(
        lambda t, y: (exact.slope(t) @ y.reshape(k, k)).ravel(),
        (T, end),
        np.eye(k).ravel(),
        "DOP853",
        np.linspace(T, end, 50),
        rtol=1e-13,
        atol=1e-14,
    )
    assert solution.success
    moves = solution.y.T.reshape(-1, k, k)
    growth = np.linalg.norm(moves[-1] @ np.linalg.inv(moves), 2, axis=(1, 2)).max()
    return Flow(moves[-1], float(growth))


def flown(name: str, z: torch.Tensor, T: float, end: float) -> torch.Tensor:
    """Where the probability flow takes states (B, k, 1) of time T."""
    _, exact = PROCESSES[name]()
    before, after = exact.mean(T)[:, None], exact.mean(end)[:, None]
    return torch.from_numpy(after + flow(name, T, end).matrix @ (z.double().numpy() - before))


def allowed(solution: Solution, tolerance: float, z: torch.Tensor, growth: float) -> float:
    """Largest error of an adaptive solution.

    Each accepted step errs by at most the tolerance in units of 1 + |z|, a root mean square over
    all numbers of the batch, and the flow lengthens that by no more than ``growth``.
    """
    size = (1 + largest(z)) * math.sqrt(z.numel())
    return float(solution.stats["steps"] * tolerance * size * growth)


# Stage times and coefficients as in textbooks, weights last; torchdiffeq's "rk4" is the 3/8 rule.
TABLEAUX: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun2": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "heun3": ([0, 1 / 3, 2 / 3], [[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "rk4": (
        [0, 1 / 3, 2 / 3, 1],
        [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    ),
}


def runge_kutta(method: str, exact: Exact, z: Array, times: Array) -> Array:
    c, a, b = TABLEAUX[method]
    for t, u in itertools.pairwise(times):
        h, k = u - t, []
        for shift, row in zip(c, a, strict=True):
            at = z + h * sum(w * f for w, f in zip(row, k, strict=True))
            k.append(exact.velocity(t + shift * h, at))
        z = z + h * sum(w * f for w, f in zip(b, k, strict=True))
    return z


class TestFixedSteps:
    """Methods with fixed steps step through the grid that they are given."""

    @every_process
    @every_fixed
    def test_a_step_is_that_of_the_textbook(self, method: str, name: str) -> None:
        sde, exact = PROCESSES[name]()
        score = Recording(flowing(name).score)
        state, times = start(sde, (4, 1)), root_times(1.0, 0.05, 9)
        solver = TorchDiffEq(method=method)
        found = solve(ReverseProcess(sde, score), solver, state, times)
        expected = torch.from_numpy(runge_kutta(method, exact, state.numpy(), times.numpy()))
        assert found.success
        # Rounding in nine steps, and that of two ways to a covariance.
        assert largest(found.state - expected) <= 1e-12 * (1 + largest(expected))
        assert found.nfev == score.calls == 9 * solver.facts.nfe_per_step
        assert found.stats["steps"] == 9
        assert torch.equal(found.data, found.state[:, 0])

    @pytest.mark.parametrize("name", ["VP, linear", "VE", "CLD", "HOLD"])
    @every_fixed
    def test_the_order_is_that_of_the_declaration(self, method: str, name: str) -> None:
        solver = TorchDiffEq(method=method)
        state = start(PROCESSES[name]()[0], (4, 1))
        expected = flown(name, state, 1.0, 0.2)
        coarse = 40 if method == "rk4" else 80
        errors = [
            float((solve(flowing(name), solver, state, grid).state - expected).norm())
            for grid in (uniform_times(1.0, 0.2, n) for n in (coarse, 2 * coarse))
        ]
        # The reference is good to some 1e-12.
        assert errors[-1] > 2e-11
        assert solver.facts.ode_order is not None
        assert abs(math.log2(errors[0] / errors[1]) - solver.facts.ode_order) < CLOSE
        assert solver.facts.weak_order is solver.facts.strong_order is None

    @every_fixed
    def test_states_on_the_grid_are_those_of_shorter_grids(self, method: str) -> None:
        times, solver = root_times(1.0, 0.05, 9), TorchDiffEq(method=method)
        state = start(CLD(), (4, 1))
        found = solve(flowing("CLD"), solver, state, times, t_eval=times[[0, 3, 7, 9]])
        assert torch.equal(found.t, times[[0, 3, 7, 9]])
        assert torch.equal(found.y[0], state)
        assert found.nfev == 9 * solver.facts.nfe_per_step
        for y, n in zip(found.y[1:], (3, 7, 9), strict=True):
            assert torch.equal(y, solve(flowing("CLD"), solver, state, times[: n + 1]).state)
        assert torch.equal(found.y[-1], found.state)

    @every_dtype
    def test_several_data_axes_equal_flattened_ones(self, dtype: torch.dtype) -> None:
        sde = CLD()
        state = start(sde, (3, 2, 2), dtype)
        process = ReverseProcess(sde, lambda z, t: -4 * z[:, 1:])
        times, solver = root_times(1.0, 0.05, 9), TorchDiffEq(method="rk4")
        found = solve(process, solver, state, times)
        flat = solve(process, solver, state.flatten(2), times)
        assert found.state.dtype == found.data.dtype == dtype
        assert found.state.shape == (3, 2, 2, 2)
        assert torch.equal(found.state.flatten(2), flat.state)


class TestAdaptiveSteps:
    """Methods with adaptive steps find the flow, to their tolerance."""

    @pytest.mark.parametrize("name", ["VP, linear", "VE", "CLD", "HOLD"])
    @every_adaptive
    def test_it_is_the_linear_flow_of_gaussian_data(self, method: str, name: str) -> None:
        end, tolerance = 0.05, TOLERANCES[method]
        state = start(PROCESSES[name]()[0], (4, 1))
        score = Recording(flowing(name).score)
        solver = TorchDiffEq(method=method, rtol=tolerance, atol=tolerance)
        process = ReverseProcess(PROCESSES[name]()[0], score)
        found = solve(process, solver, state, double(1.0, end))
        assert found.success
        bound = allowed(found, tolerance, state, flow(name, 1.0, end).growth)
        error = largest(found.state - flown(name, state, 1.0, end))
        assert error <= bound
        assert bound < 0.5 * largest(state)
        # Two at the start, then all stages but the first of each attempt.
        assert found.nfev == score.calls
        attempts, left = divmod(found.nfev - 2, solver.facts.nfe_per_step)
        assert left == 0
        assert attempts >= found.stats["steps"] > 5
        assert found.stats["nfev"].tolist() == [found.nfev] * 4

    @pytest.mark.parametrize("name", ["VP, linear", "CLD"])
    @every_adaptive
    def test_a_smaller_tolerance_gives_a_smaller_error(self, method: str, name: str) -> None:
        state = start(PROCESSES[name]()[0], (4, 1))
        expected = flown(name, state, 1.0, 0.05)
        errors = []
        for tolerance in (TOLERANCES[method], TOLERANCES[method] / 30):
            solver = TorchDiffEq(method=method, rtol=tolerance, atol=tolerance)
            found = solve(flowing(name), solver, state, double(1.0, 0.05))
            errors.append(largest(found.state - expected))
        # The error is as large as the tolerance, or to the power p / (p + 1) of it, p from 1.
        assert errors[1] < errors[0] / 4

    @pytest.mark.parametrize("name", ["VP, linear", "CLD"])
    @every_adaptive
    def test_the_order_is_that_of_the_declaration(self, method: str, name: str) -> None:
        if name != "CLD" and method.startswith("dopri"):
            pytest.skip("of one component it is at rounding before it is at its limit")
        state, end = start(PROCESSES[name]()[0], (4, 1)), 0.2
        expected = flown(name, state, 1.0, end)
        coarse = 12 if method == "dopri8" else 40
        errors = []
        for n in (coarse, 2 * coarse):
            h = (1 - end) / n
            # A step of the least length is accepted, one of the greatest does not grow.
            solver = TorchDiffEq(method=method, options={"min_step": h, "max_step": h})
            found = solve(flowing(name), solver, state, double(1.0, end))
            assert abs(found.stats["steps"] - n) <= 1
            errors.append(float((found.state - expected).norm()))
        order = solver.facts.ode_order
        assert order is not None
        assert errors[-1] > 1e-11
        # dopri8 takes few steps, or rounding shows: its next term is larger, of either sign.
        margin = 0.45 if method == "dopri8" else CLOSE
        assert abs(math.log2(errors[0] / errors[1]) - order) < margin

    @pytest.mark.parametrize("name", ["VP, linear", "CLD"])
    @every_adaptive
    def test_it_is_the_flow_with_a_step_size_for_each_sample(self, method: str, name: str) -> None:
        end, tolerance = 0.05, TOLERANCES[method]
        state = start(PROCESSES[name]()[0], (4, 1))
        options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
        found = solve(flowing(name), TorchDiffEq(method=method, **options), state, double(1.0, end))
        each = ProbabilityFlow(**options, pace="sample")
        other = solve(reverse(name), each, state, double(1.0, end))
        # It takes no more steps, of an order at least as high or a tolerance that is the same.
        steps = found.stats["steps"] + other.stats["attempts"]
        size = (1 + largest(state)) * math.sqrt(state.numel())
        bound = steps * tolerance * size * flow(name, 1.0, end).growth
        assert largest(found.state - other.state) <= bound

    @pytest.mark.parametrize("name", ["VP, linear", "CLD"])
    @every_adaptive
    def test_it_steps_onto_the_times_that_are_wanted(self, method: str, name: str) -> None:
        tolerance = TOLERANCES[method]
        state = start(PROCESSES[name]()[0], (4, 1))
        solver = TorchDiffEq(method=method, rtol=tolerance, atol=tolerance)
        seen: dict[float, torch.Tensor] = {}
        wanted = double(1.0, 0.77, 0.3, 0.1)
        found = solve(
            flowing(name),
            solver,
            state,
            double(1.0, 0.05),
            t_eval=wanted,
            callback=lambda step, t, z: seen.update({t: z}),
        )
        assert found.success
        assert torch.equal(found.t, wanted)
        assert torch.equal(found.y[0], state)
        for t, y in zip(wanted[1:].tolist(), found.y[1:], strict=True):
            # torchdiffeq reads its interpolant at the end of the step.
            assert largest(y - seen[t]) <= 1e-12 * (1 + largest(y))
            alone = solve(flowing(name), solver, state, double(1.0, t))
            growth = flow(name, 1.0, t).growth
            bound = allowed(found, tolerance, state, growth)
            assert largest(y - flown(name, state, 1.0, t)) <= bound
            assert largest(y - alone.state) <= bound + allowed(alone, tolerance, state, growth)
        bound = allowed(found, tolerance, state, flow(name, 1.0, 0.05).growth)
        assert largest(found.state - flown(name, state, 1.0, 0.05)) <= bound

    def test_single_precision_states_agree_with_double(self) -> None:
        state = start(CLD(), (4, 1), torch.float32)
        solver = TorchDiffEq(rtol=1e-4, atol=1e-4)
        found = solve(flowing("CLD"), solver, state, double(1.0, 0.05))
        assert found.state.dtype == found.data.dtype == torch.float32
        # The tolerance is far above rounding, 6e-8.
        bound = 2 * allowed(found, 1e-4, state, flow("CLD", 1.0, 0.05).growth)
        assert largest(found.state - flown("CLD", state, 1.0, 0.05)) <= bound


class TestTimes:
    """The score is asked within the interval."""

    @every_dtype
    @every_ode_method
    def test_times_stay_in_the_interval(self, method: str, dtype: torch.dtype) -> None:
        sde = CLD()
        # Few and long steps, that end where single precision rounds up or down.
        for eps in torch.logspace(-3, -0.5, 4, dtype=torch.float64).tolist():
            score = Recording(flowing("CLD").score)
            solver = TorchDiffEq(method=method, rtol=0.1, atol=0.1)
            grid = root_times(1.0, eps, 5)
            solve(
                ReverseProcess(sde, score),
                solver,
                start(sde, (4, 1), dtype),
                grid,
                t_eval=grid[1:3] if method in FIXED else double(0.9, 0.7),
            )
            times = torch.cat(score.times)
            assert times.dtype == dtype
            assert times.max().item() == 1.0
            assert times.min().item() >= double(eps).to(dtype).item()

    @every_dtype
    def test_torchdiffeq_by_itself_leaves_it(self, dtype: torch.dtype) -> None:
        state, eps = start(CLD(), (4, 1), dtype), 0.3
        alone, within = Recording(flowing("CLD").score), Recording(flowing("CLD").score)
        odeint(
            as_torchdiffeq(ReverseProcess(CLD(), alone)),
            state,
            double(1.0, eps),
            method="dopri5",
            rtol=1e-3,
            atol=1e-3,
        )
        process = ReverseProcess(CLD(), within)
        found = solve(process, TorchDiffEq(rtol=1e-3, atol=1e-3), state, double(1.0, eps))
        assert min(float(t.min()) for t in alone.times) < eps - 1e-3
        assert min(float(t.min()) for t in within.times) >= double(eps).to(dtype).item()
        assert found.success


class TestCallback:
    """Called once a step, with the state that was stepped to."""

    @every_fixed
    def test_it_is_called_at_each_time_of_the_grid(self, method: str) -> None:
        times = root_times(1.0, 0.05, 9)
        calls: list[tuple[int, float, torch.Tensor]] = []
        found = solve(
            flowing("CLD"),
            TorchDiffEq(method=method),
            start(CLD(), (4, 1)),
            times,
            t_eval=times,
            callback=lambda step, t, z: calls.append((step, t, z.clone())),
        )
        assert [step for step, _, _ in calls] == list(range(1, 10))
        assert [t for _, t, _ in calls] == times[1:].tolist()
        assert torch.equal(torch.stack([z for _, _, z in calls]), found.y[1:])

    @every_adaptive
    def test_it_is_called_at_decreasing_times(self, method: str) -> None:
        calls: list[tuple[int, float, torch.Tensor]] = []
        solver = TorchDiffEq(method=method, rtol=1e-4, atol=1e-4)
        found = solve(
            flowing("CLD"),
            solver,
            start(CLD(), (4, 1)),
            double(1.0, 0.05),
            callback=lambda step, t, z: calls.append((step, t, z.clone())),
        )
        assert [step for step, _, _ in calls] == list(range(1, found.stats["steps"] + 1))
        moments = [1.0, *[t for _, t, _ in calls]]
        assert all(later < earlier for earlier, later in itertools.pairwise(moments))
        assert moments[-1] == 0.05
        assert torch.equal(calls[-1][2], found.state)
        plain = solve(flowing("CLD"), solver, start(CLD(), (4, 1)), double(1.0, 0.05))
        assert torch.equal(plain.state, found.state)
        assert plain.nfev == found.nfev

    @every_ode_method
    def test_it_stops_the_solve(self, method: str) -> None:
        seen: list[torch.Tensor] = []

        def enough(step: int, t: float, z: torch.Tensor) -> bool:
            seen.append(z.clone())
            return step == 4

        score = Recording(flowing("CLD").score)
        found = solve(
            ReverseProcess(CLD(), score),
            TorchDiffEq(method=method),
            start(CLD(), (4, 1)),
            root_times(1.0, 0.05, 9),
            callback=enough,
            denoise=True,
        )
        assert found.status == 2
        assert not found.success
        assert "stopped by the callback" in found.message
        assert len(seen) == found.stats["steps"] == 4
        assert torch.equal(found.state, seen[-1])
        assert torch.equal(found.data, found.state[:, 0])
        assert found.nfev == score.calls
        assert found.y.shape == (1, 4, 2, 1)
        assert found.y.isnan().all()

    @every_ode_method
    def test_states_before_the_stop_are_kept(self, method: str) -> None:
        state, times = start(CLD(), (4, 1)), root_times(1.0, 0.05, 9)
        solver = TorchDiffEq(method=method, rtol=1e-3, atol=1e-3)
        found = solve(
            flowing("CLD"),
            solver,
            state,
            times,
            t_eval=times[[0, 2, 4, 9]],
            callback=lambda step, t, z: t <= times[4],
        )
        assert found.status == 2
        every = solve(flowing("CLD"), solver, state, times, t_eval=times[[0, 2, 4, 9]])
        assert torch.equal(found.t, every.t)
        assert torch.equal(found.y[0], state)
        # torchdiffeq reads its interpolant at the end of the step.
        assert largest(found.y[1:3] - every.y[1:3]) <= 1e-12 * (1 + largest(state))
        assert torch.equal(found.state, found.y[2])
        assert found.y[3].isnan().all()

    @every_ode_method
    def test_stopping_at_the_end_is_arriving(self, method: str) -> None:
        found = solve(
            flowing("CLD"),
            TorchDiffEq(method=method),
            start(CLD(), (4, 1)),
            root_times(1.0, 0.05, 9),
            callback=lambda step, t, z: t == 0.05,
        )
        assert found.success
        assert found.status == 0
        assert found.message == "reached the end of the interval"
        assert torch.equal(found.y[-1], found.state)


def sick(since: float) -> ReverseProcess:
    """Of a score that is NaN from a time on."""

    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where((t <= since)[:, None, None], math.nan, -4 * z[:, 1:])

    return ReverseProcess(CLD(), score)


@pytest.mark.filterwarnings("ignore:the solve failed")
class TestFailure:
    """What cannot be done is said, without an exception."""

    @every_fixed
    @pytest.mark.parametrize("denoise", [False, True])
    def test_too_few_evaluations_for_the_grid(self, method: str, denoise: bool) -> None:
        state, times = start(CLD(), (4, 1)), root_times(1.0, 0.05, 9)
        each = TorchDiffEq(method=method).facts.nfe_per_step
        for most in (1, 5 * each, 5 * each + 1, 9 * each - 1):
            score = Recording(flowing("CLD").score)
            solver = TorchDiffEq(method=method, max_nfev=most)
            found = solve(ReverseProcess(CLD(), score), solver, state, times, denoise=denoise)
            assert found.status == 1
            assert f"max_nfev: {most}" in found.message
            assert found.nfev == score.calls == most
            whole = most // each
            assert found.stats["steps"] == whole
            reached = (
                solve(flowing("CLD"), solver, state, times[: whole + 1]).state if whole else state
            )
            assert torch.equal(found.state, reached)
            assert torch.equal(found.data, found.state[:, 0])
        enough = TorchDiffEq(method=method, max_nfev=9 * each)
        assert solve(flowing("CLD"), enough, state, times).success

    @every_adaptive
    @pytest.mark.parametrize("most", [1, 2, 3, 40])
    def test_too_few_evaluations_for_the_tolerance(self, method: str, most: int) -> None:
        score = Recording(flowing("CLD").score)
        solver = TorchDiffEq(method=method, rtol=1e-10, atol=1e-10, max_nfev=most)
        seen = [start(CLD(), (4, 1))]
        found = solve(
            ReverseProcess(CLD(), score),
            solver,
            seen[0],
            double(1.0, 0.05),
            callback=lambda step, t, z: seen.append(z.clone()),
        )
        assert found.status == 1
        assert f"max_nfev: {most}" in found.message
        assert found.nfev == score.calls == most
        assert torch.equal(found.state, seen[-1])
        assert found.state.isfinite().all()
        assert found.y.isnan().all()

    @every_adaptive
    def test_enough_evaluations_are_enough(self, method: str) -> None:
        state, times = start(CLD(), (4, 1)), double(1.0, 0.05)
        options: dict[str, Any] = {"method": method, "rtol": 1e-4, "atol": 1e-4}
        needed = solve(flowing("CLD"), TorchDiffEq(**options), state, times).nfev
        for most, success in ((needed, True), (needed - 1, False)):
            solver = TorchDiffEq(**options, max_nfev=most)
            assert solve(flowing("CLD"), solver, state, times).success == success

    @every_ode_method
    def test_states_that_were_passed_are_kept(self, method: str) -> None:
        state, times = start(CLD(), (4, 1)), root_times(1.0, 0.05, 9)
        options: dict[str, Any] = {"method": method, "rtol": 1e-3, "atol": 1e-3}
        every = solve(flowing("CLD"), TorchDiffEq(**options), state, times, t_eval=times)
        reached = solve(flowing("CLD"), TorchDiffEq(**options), state, times[:4], t_eval=times[:4])
        # As many evaluations as take it to the third time, and not to the fourth.
        solver = TorchDiffEq(**options, max_nfev=reached.nfev)
        found = solve(flowing("CLD"), solver, state, times, t_eval=times)
        assert found.status == 1
        assert f"max_nfev: {reached.nfev}" in found.message
        assert largest(found.y[:4] - every.y[:4]) <= 1e-12 * (1 + largest(state))
        assert torch.equal(found.state, found.y[3])
        assert found.y[4:].isnan().all()

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_a_limit_between_two_numbers_is_one(self, method: str) -> None:
        solver = TorchDiffEq(method=method, max_nfev=10.5)  # type: ignore[arg-type]
        found = solve(flowing("CLD"), solver, start(CLD(), (4, 1)), root_times(1.0, 0.05, 9))
        assert found.status == 1
        assert found.nfev == 10

    @pytest.mark.parametrize("denoise", [False, True])
    @every_ode_method
    def test_a_score_that_is_not_finite_is_reported(self, method: str, denoise: bool) -> None:
        times = root_times(1.0, 0.05, 9)
        solver = TorchDiffEq(method=method, rtol=1e-3, atol=1e-3, max_nfev=500)
        found = solve(sick(0.5), solver, start(CLD(), (4, 1)), times, denoise=denoise)
        assert found.status == 1
        assert not found.success
        if method in FIXED:
            assert "not finite" in found.message
        else:
            # torchdiffeq's step becomes NaN, and then nothing.
            assert "torchdiffeq failed: underflow" in found.message
            assert found.state.isfinite().all()
            assert found.nfev < 500
            assert torch.equal(found.data, found.state[:, 0])

    @every_ode_method
    def test_a_score_that_is_never_finite_is_reported(self, method: str) -> None:
        state = start(CLD(), (4, 1))
        found = solve(sick(1.0), TorchDiffEq(method=method), state, root_times(1.0, 0.05, 9))
        assert found.status == 1
        assert not found.success
        assert "not finite" in found.message
        if method in ADAPTIVE:
            assert torch.equal(found.state, state)
            assert found.y.isnan().all()

    @every_adaptive
    @every_dtype
    def test_tolerances_out_of_reach_end(self, method: str, dtype: torch.dtype) -> None:
        solver = TorchDiffEq(method=method, rtol=1e-17, atol=1e-17, max_nfev=300)
        state = start(CLD(), (4, 1), dtype)
        found = solve(flowing("CLD"), solver, state, double(1.0, 0.05))
        assert found.status == 1
        assert "max_nfev" in found.message or "underflow" in found.message
        assert found.nfev <= 300
        assert found.state.isfinite().all()

    def test_a_step_that_underflows_is_reported(self) -> None:
        # No step is short enough for noise: each asks for a shorter one.
        g = generator()

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 1e30 * torch.randn(z[:, 1:].shape, generator=g, dtype=z.dtype)

        state = start(CLD(), (4, 1))
        process = ReverseProcess(CLD(), score)
        found = solve(process, TorchDiffEq(), state, double(1.0, 0.05))
        assert found.status == 1
        assert "torchdiffeq failed: underflow in dt" in found.message
        assert found.state.isfinite().all()

    def test_torchdiffeq_s_own_limit_is_reported(self) -> None:
        solver = TorchDiffEq(options={"max_num_steps": 3})
        found = solve(flowing("CLD"), solver, start(CLD(), (4, 1)), double(1.0, 0.05))
        assert found.status == 1
        assert "torchdiffeq failed: max_num_steps" in found.message
        assert found.state.isfinite().all()

    @pytest.mark.parametrize("error", [ValueError, RuntimeError, AssertionError])
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_errors_of_the_score_are_its_own(self, method: str, error: type[Exception]) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            raise error("mine")

        process = ReverseProcess(CLD(), score)
        with pytest.raises(error, match="mine"):
            solve(process, TorchDiffEq(method=method), start(CLD(), (4, 1)), double(1.0, 0.05))

    @every_ode_method
    def test_an_empty_batch_stays_empty(self, method: str) -> None:
        state = torch.zeros(0, 2, 1)
        for denoise in (False, True):
            found = solve(
                reverse("CLD"),
                TorchDiffEq(method=method),
                state,
                root_times(1.0, 0.05, 9),
                denoise=denoise,
            )
            assert found.success
            assert found.state.shape == (0, 2, 1)
            assert found.data.shape == (0, 1)
            assert found.nfev == 0


class TestDenoising:
    """The last step to the data."""

    @every_ode_method
    def test_it_is_the_data_prediction_and_counts_one_evaluation(self, method: str) -> None:
        state, times = start(CLD(), (4, 1)), root_times(1.0, 0.05, 9)
        score = Recording(reverse("CLD").score)
        solver = TorchDiffEq(method=method, rtol=1e-3, atol=1e-3)
        plain = solve(reverse("CLD"), solver, state, times)
        found = solve(ReverseProcess(CLD(), score), solver, state, times, denoise=True)
        assert torch.equal(found.state, plain.state)
        expected = reverse("CLD").data_prediction(found.state, times[-1])
        assert torch.allclose(found.data, expected, rtol=1e-12, atol=1e-12)
        assert found.nfev == score.calls == plain.nfev + 1
        assert torch.equal(found.stats["nfev"], plain.stats["nfev"] + 1)


class Pulling(torch.nn.Module):
    """A score that bends, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = torch.nn.Parameter(double(1.3))

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -(1 + t[:, None, None]) * (self.strength * z[:, 1:] + 0.5 * z[:, :1].sin())


def total(
    solver: Any, state: torch.Tensor, score: Pulling, noise: NoiseSource | None = None
) -> Any:
    """A number that depends on all of the solution, with gradients."""
    times = root_times(1.0, 0.2, 9)
    process = ReverseProcess(CLD(), score)
    found = solve(process, solver, state, times, differentiable=True, noise=noise)
    return (found.state * torch.arange(1.0, 1 + found.state.numel()).view_as(found.state)).sum()


class TestGradients:
    """Derivatives of a solution are those of its number."""

    @pytest.mark.parametrize(
        "solver",
        [
            TorchDiffEq(method="rk4"),
            TorchDiffEq(method="dopri5", rtol=1e-10, atol=1e-10, options={"first_step": 1e-3}),
            TorchDiffEq(method="dopri5", rtol=1e-10, atol=1e-10),
            TorchDiffEq(method="dopri8", rtol=1e-10, atol=1e-10),
            TorchDiffEq(method="bosh3", rtol=1e-8, atol=1e-8),
            TorchSDE(method="srk"),
            TorchSDE(method="heun"),
        ],
        ids=["rk4", "dopri5 from a given step", "dopri5", "dopri8", "bosh3", "srk", "heun"],
    )
    def test_they_are_finite_differences(self, solver: Any) -> None:
        state, score, h = start(CLD(), (1, 1)), Pulling(), 1e-5
        rows = 2 if isinstance(solver, TorchSDE) and solver.method == "srk" else 1
        draws = list(torch.randn(9, 1, rows, 1, generator=generator(), dtype=torch.float64))

        def value(z: torch.Tensor) -> Any:
            noise = RecordedNoise(draws) if isinstance(solver, TorchSDE) else None
            return total(solver, z, score, noise)

        state.requires_grad_()
        value(state).backward()
        found = [*state.grad.flatten().tolist(), score.strength.grad.item()]  # type: ignore[union-attr]
        differences = []
        with torch.no_grad():
            for i in range(state.numel()):
                step = torch.zeros(state.numel(), dtype=torch.float64)
                step[i] = h
                step = step.view_as(state)
                differences.append(float(value(state + step) - value(state - step)) / (2 * h))
            ends = []
            for sign in (1, -1):
                score.strength += sign * h
                ends.append(float(value(state)))
                score.strength -= sign * h
            differences.append((ends[0] - ends[1]) / (2 * h))
        # h^2 = 1e-10 times third derivatives, large with long steps; for dopri5, its tolerance of
        # 1e-10 over h.
        scale = max(map(abs, differences))
        assert scale > 0.1
        assert np.allclose(found, differences, rtol=0, atol=1e-5 * scale)

    def test_none_are_recorded_unless_asked_for(self) -> None:
        state = start(CLD(), (2, 1))
        for solver in (TorchDiffEq(method="rk4"), TorchSDE()):
            process = ReverseProcess(CLD(), Pulling())
            found = solve(process, solver, state, root_times(1.0, 0.2, 9), generator=generator())
            assert not found.state.requires_grad


class TestRefusals:
    """Options and uses that are refused."""

    @pytest.mark.parametrize(
        "method",
        [
            "RK45",
            "scipy_solver",
            "explicit_adams",
            "implicit_adams",
            "fixed_adams",
            "Dopri5",
            "",
            None,
        ],
    )
    def test_unknown_ode_methods(self, method: Any) -> None:
        with pytest.raises(ValueError, match="method must be one of 'dopri8', 'dopri5'"):
            TorchDiffEq(method=method)

    @pytest.mark.parametrize("method", ["reversible_heun", "log_ode", "adjoint", "Euler", "", None])
    def test_unknown_sde_methods(self, method: Any) -> None:
        with pytest.raises(ValueError, match="method must be one of 'euler', 'milstein', 'srk'"):
            TorchSDE(method=method)

    @pytest.mark.parametrize("option", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [0.0, -1e-5, math.nan, math.inf])
    def test_tolerances_that_are_not_positive(self, option: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{option} must be finite and positive"):
            TorchDiffEq(**{option: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("option", ["rtol", "atol", "max_nfev"])
    @pytest.mark.parametrize("value", ["1", None, True])
    def test_options_that_are_no_numbers(self, option: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{option} must be a real number"):
            TorchDiffEq(**{option: value})

    @pytest.mark.parametrize("value", [0, -1])
    def test_less_than_one_evaluation(self, value: int) -> None:
        with pytest.raises(ValueError, match="max_nfev must be"):
            TorchDiffEq(max_nfev=value)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @pytest.mark.parametrize("option", ["step_t", "step_size", "grid_constructor"])
    def test_options_that_are_the_grid_s(self, option: str, method: str) -> None:
        with pytest.raises(ValueError, match=f"options must not set {option}"):
            TorchDiffEq(method=method, options={option: 0.1, "first_step": 0.1})

    @pytest.mark.parametrize("make", [TorchDiffEq, TorchSDE])
    def test_options_without_a_name(self, make: Any) -> None:
        with pytest.raises(TypeError, match="positional"):
            make("euler")

    @pytest.mark.parametrize("solver", [TorchDiffEq(), TorchSDE(method="srk")], ids=["ode", "srk"])
    def test_a_path_where_its_increments_are_not_drawn(self, solver: Any) -> None:
        sde, times = CLD(), root_times(1.0, 0.05, 9)
        path = BrownianPath(sde, times, (4, 1), generator=generator())
        with pytest.raises(ValueError, match="noise must not be a BrownianPath"):
            solve(ReverseProcess(sde, untouchable), solver, start(sde, (4, 1)), times, noise=path)

    def test_moments_are_for_grids(self) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match="fixed grid; TorchDiffEq is adaptive"):
            propagate_moments(
                process,
                TorchDiffEq(),  # type: ignore[arg-type]
                double(1.0, 0.05),
                torch.zeros(2, 1),
                torch.eye(2),
            )

    @pytest.mark.parametrize("solver", [TorchDiffEq(), TorchDiffEq(method="rk4"), TorchSDE()])
    def test_scores_of_another_shape(self, solver: Any) -> None:
        process = ReverseProcess(CLD(), lambda z, t: torch.zeros_like(z))
        with pytest.raises(ValueError, match=r"score must return shape \(4, 1, 1\)"):
            solve(process, solver, start(CLD(), (4, 1)), double(1.0, 0.05))

    @pytest.mark.parametrize("t_eval", [double(1.1, 0.5), double(0.5, 0.01), double(0.5, 0.5)])
    def test_times_out_of_the_interval(self, t_eval: torch.Tensor) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(ValueError, match="t_eval must"):
            solve(process, TorchDiffEq(), start(CLD(), (4, 1)), double(1.0, 0.05), t_eval=t_eval)

    @every_fixed
    @pytest.mark.parametrize("t_eval", [double(0.9, 0.7), double(0.05 + 1e-15)], ids=str)
    def test_times_off_the_grid_of_fixed_steps(self, t_eval: torch.Tensor, method: str) -> None:
        process, times = ReverseProcess(CLD(), untouchable), root_times(1.0, 0.05, 9)
        solver = TorchDiffEq(method=method)
        with pytest.raises(ValueError, match="t_eval must be times of the grid"):
            solve(process, solver, start(CLD(), (4, 1)), times, t_eval=t_eval)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_times_that_are_no_tensor(self, method: str) -> None:
        process, t_eval = ReverseProcess(CLD(), untouchable), [1.0, 0.05]
        with pytest.raises(TypeError, match="t_eval must be a tensor"):
            solve(
                process,
                TorchDiffEq(method=method),
                start(CLD(), (4, 1)),
                double(1.0, 0.05),
                t_eval=t_eval,  # type: ignore[arg-type]
            )

    @pytest.mark.parametrize("process", [None, CLD, "CLD", DATA])
    def test_what_is_no_process(self, process: Any) -> None:
        with pytest.raises(TypeError, match="process must be a LinearSDE or a ReverseProcess"):
            as_torchdiffeq(process)
        with pytest.raises(TypeError, match="process must be a LinearSDE or a ReverseProcess"):
            as_torchsde(process, (1,))

    @pytest.mark.parametrize("calculus", ["Ito", "", None])
    def test_unknown_calculus(self, calculus: Any) -> None:
        with pytest.raises(ValueError, match="calculus must be 'ito' or 'stratonovich'"):
            as_torchsde(CLD(), (1,), calculus=calculus)

    @pytest.mark.parametrize("shape", [(4, 2), (4, 1, 3), (4, 2, 3, 1), (4, 3, 2), (2,), (4, 2, 4)])
    def test_states_of_another_shape_than_the_form_s(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"state must have shape \(B, 2, 3\)"):
            as_torchsde(CLD(), (3,)).pack(torch.zeros(shape))

    def test_solvers_are_values(self) -> None:
        assert TorchDiffEq(rtol=1e-3) == TorchDiffEq(rtol=1e-3) != TorchDiffEq()
        assert TorchSDE(method="srk") == TorchSDE(method="srk") != TorchSDE()
        assert hash(TorchSDE(method="srk")) == hash(TorchSDE(method="srk"))

    def test_values_have_a_hash(self) -> None:
        assert hash(TorchDiffEq(rtol=1e-3)) == hash(TorchDiffEq(rtol=1e-3))
        one, same = (TorchDiffEq(options={"first_step": 1e-3}) for _ in range(2))
        assert {one: 1}[same] == 1
        assert one != TorchDiffEq()


class TestFunctionForTorchdiffeq:
    """A process as torchdiffeq's right-hand side."""

    @pytest.mark.parametrize("name", ["VP, linear", "CLD", "HOLD"])
    def test_a_reverse_process_flows_backward(self, name: str) -> None:
        state, tolerance = start(PROCESSES[name]()[0], (4, 1)), 1e-9
        found = odeint(
            as_torchdiffeq(reverse(name)),
            state,
            double(1.0, 0.4, 0.1),
            method="dopri8",
            rtol=tolerance,
            atol=tolerance,
        )
        for y, t in zip(found[1:], (0.4, 0.1), strict=True):
            # At most 200 steps, and an interpolant of order four only.
            assert largest(y - flown(name, state, 1.0, t)) <= 1e-5 * (1 + largest(state))

    @every_process
    def test_a_process_flows_with_its_mean(self, name: str) -> None:
        sde, exact = PROCESSES[name]()
        state = start(sde, (4, 2))
        found = odeint(
            as_torchdiffeq(sde),
            state,
            double(0.0, 1.0),
            method="dopri8",
            rtol=1e-10,
            atol=1e-10,
            options={"step_t": double(1.0)},
        )
        expected = torch.from_numpy(exact.psi(0.0, 1.0)) @ state
        # At most 100 steps of 1e-10, lengthened fivefold.
        assert largest(found[-1] - expected) <= 1e-7 * (1 + largest(state))

    def test_single_precision_is_kept(self) -> None:
        state = start(CLD(), (4, 1), torch.float32)
        found = odeint(as_torchdiffeq(CLD()), state, torch.linspace(0, 1, 40), method="rk4")
        assert found.dtype == torch.float32
        expected = torch.from_numpy(PROCESSES["CLD"]()[1].psi(0.0, 1.0)) @ state.double()
        # (8 / 40)^5 a step is 3e-4, and 39 steps.
        assert largest(found[-1] - expected) <= 39 * 3e-4 * largest(state)

    def test_adjoint_gradients_are_those_of_backpropagation(self) -> None:
        state = start(CLD(), (3, 1))
        gradients = []
        for integrate in (odeint, odeint_adjoint):
            score, z = Pulling(), state.clone().requires_grad_()
            form = as_torchdiffeq(ReverseProcess(CLD(), score))
            assert [name for name, _ in form.named_parameters()] == ["score.strength"]
            y = integrate(form, z, double(1.0, 0.2), method="rk4", options={"step_size": 0.005})
            (y[-1] ** 2).sum().backward()
            assert z.grad is not None
            assert score.strength.grad is not None
            gradients.append(torch.cat([z.grad.flatten(), score.strength.grad]))
        scale = largest(gradients[0])
        assert scale > 0.1
        assert gradients[0][-1] != 0
        # The adjoint equation has errors of its own, (rate h)^4 with a rate of 30 at most.
        assert largest(gradients[0] - gradients[1]) <= 0.15**4 * scale

    def test_a_plain_score_has_no_parameters(self) -> None:
        assert not list(as_torchdiffeq(reverse("CLD")).parameters())
        assert not list(as_torchsde(reverse("CLD"), (1,)).parameters())


class Increments:
    """One step's increments of W and its integral U as torchsde's Brownian motion, (B, m)."""

    levy_area_approximation = "space-time"

    def __init__(self, W: torch.Tensor, U: torch.Tensor | None = None) -> None:
        self.W, self.U, self.shape = W, U, W.shape

    def __call__(self, s: Any, t: Any, *, return_U: bool = False) -> Any:
        return (self.W, self.U) if return_U else self.W


def one_step(form: Any, method: str, s: Any, y: torch.Tensor, bm: Increments) -> torch.Tensor:
    """From ``s[0]`` to ``s[1]`` by torchsde itself; a longer step is cut at the end."""
    result: torch.Tensor = torchsde.sdeint(form, y, s, bm=bm, method=method, dt=2.0)[-1]
    return result


def columns(name: str) -> int:
    return PROCESSES[name]()[1].root.shape[1]


def rows(method: str, name: str) -> int:
    """Normals of a step."""
    return columns(name) * (2 if method == "srk" else 1)


def recorded(
    method: str, name: str, steps: int, batch: tuple[int, ...] = (4, 1), dtype: Any = torch.float64
) -> list[torch.Tensor]:
    shape = (steps, batch[0], rows(method, name), *batch[1:])
    return list(torch.randn(shape, generator=generator(3), dtype=dtype))


class TestSteps:
    """A step of `TorchSDE` is one of torchsde's."""

    TIMES = root_times(1.0, 0.05, 9)

    @every_process
    @every_sde_method
    def test_steps_are_those_of_sdeint(self, method: str, name: str) -> None:
        process = reverse(name)
        form = as_torchsde(process, (1,), calculus=CALCULUS[method])
        state, draws = start(process.sde, (4, 1)), recorded(method, name, 9)
        found = solve(
            process,
            TorchSDE(method=method),
            state,
            self.TIMES,
            noise=RecordedNoise(draws),
            t_eval=self.TIMES,
        )
        z, m = state, columns(name)
        for i, xi in enumerate(draws):
            s = form.clock(self.TIMES[i : i + 2])
            h = float(s[1] - s[0])
            W = math.sqrt(h) * xi[:, :m, 0]
            U = h * (W / 2 + math.sqrt(h / 12) * xi[:, m:, 0]) if method == "srk" else None
            z = form.unpack(one_step(form, method, s, form.pack(z), Increments(W, U)))
            assert largest(found.y[i + 1] - z) <= 1e-12 * (1 + largest(z))

    @every_process
    @pytest.mark.parametrize("method", ["euler", "milstein"])
    def test_euler_is_euler_maruyama(self, method: str, name: str) -> None:
        process = reverse(name)
        state, draws = start(process.sde, (4, 1)), recorded(method, name, 9)
        found, expected = (
            solve(process, solver, state, self.TIMES, noise=RecordedNoise(draws)).state
            for solver in (TorchSDE(method=method), EulerMaruyama())
        )
        assert largest(found - expected) <= 1e-12 * (1 + largest(expected))
        assert TorchSDE(method=method).facts == TorchSDE().facts

    @pytest.mark.parametrize("name", CONSTANT)
    def test_heun_is_stochastic_heun_where_the_rate_is_constant(self, name: str) -> None:
        process = reverse(name)
        state, draws = start(process.sde, (4, 1)), recorded("heun", name, 9)
        found, expected = (
            solve(process, solver, state, self.TIMES, noise=RecordedNoise(draws)).state
            for solver in (TorchSDE(method="heun"), StochasticHeun())
        )
        assert largest(found - expected) <= 1e-12 * (1 + largest(expected))

    @pytest.mark.parametrize("name", ["VP", "CLD", "PSLD"])
    @pytest.mark.parametrize("method", [m for m in STOCHASTIC if m != "srk"])
    def test_a_path_s_increments_are_its_noise(self, method: str, name: str) -> None:
        process = reverse(name)
        path = BrownianPath(
            process.sde, self.TIMES, (4, 1), generator=generator(), dtype=torch.float64
        )
        reference = EulerMaruyama() if method in {"euler", "milstein"} else TorchSDE(method=method)
        increments: list[torch.Tensor] = []

        class Watched(NoiseSource):
            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                increments.append(along.normal(z, rows))
                return increments[-1]

        state = start(process.sde, (4, 1))
        along = path.along(
            process.sde, self.TIMES, lambda: reference.path_noise(process, self.TIMES)
        )
        expected = solve(process, reference, state, self.TIMES, noise=Watched()).state
        found = solve(process, TorchSDE(method=method), state, self.TIMES, noise=path).state
        assert len(increments) == 9
        assert largest(found - expected) <= 1e-12 * (1 + largest(expected))

    @pytest.mark.parametrize("name", ["VP, linear", "CLD", "PSLD"])
    @every_sde_method
    def test_evaluations_are_counted_and_stay_in_the_interval(self, method: str, name: str) -> None:
        sde, solver = PROCESSES[name]()[0], TorchSDE(method=method)
        for dtype, denoise in ((torch.float64, False), (torch.float32, True)):
            score = Recording(DATA.score(sde))
            found = solve(
                ReverseProcess(sde, score),
                solver,
                start(sde, (4, 1), dtype),
                self.TIMES,
                generator=generator(),
                denoise=denoise,
            )
            assert found.success
            assert found.state.dtype == dtype
            assert found.nfev == score.calls == 9 * solver.facts.nfe_per_step + denoise
            times = torch.cat(score.times)
            assert times.max().item() == 1.0
            assert times.min().item() >= double(0.05).to(dtype).item()

    @pytest.mark.parametrize("name", ["VE", "CLD", "PSLD"])
    @every_sde_method
    def test_several_data_axes_equal_flattened_ones(self, method: str, name: str) -> None:
        sde = PROCESSES[name]()[0]
        driven = list(sde.driven)
        process = ReverseProcess(sde, lambda z, t: -z[:, driven] - 0.1 * z[:, driven].sin())
        state = start(sde, (3, 2, 2), torch.float32)
        draws = recorded(method, name, 9, (3, 2, 2), torch.float32)
        found = solve(
            process, TorchSDE(method=method), state, self.TIMES, noise=RecordedNoise(draws)
        )
        flat = solve(
            process,
            TorchSDE(method=method),
            state.flatten(2),
            self.TIMES,
            noise=RecordedNoise([xi.flatten(2) for xi in draws]),
        )
        assert found.state.shape == state.shape
        assert found.state.dtype == torch.float32
        assert torch.equal(found.state.flatten(2), flat.state)

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    @every_sde_method
    def test_single_precision_agrees_with_double(self, method: str, name: str) -> None:
        process, draws = reverse(name), recorded(method, name, 9)
        state = start(process.sde, (4, 1))
        found, expected = (
            solve(
                process,
                TorchSDE(method=method),
                state.to(dtype),
                self.TIMES,
                noise=RecordedNoise(draws),
            ).state
            for dtype in (torch.float32, torch.float64)
        )
        # Roundings of 6e-8, a few in each of nine steps that may lengthen them tenfold together.
        assert largest(found - expected) <= 1e-4 * (1 + largest(expected))

    @every_dtype
    @every_sde_method
    def test_bits_are_those_of_the_seed_in_any_company(
        self, method: str, dtype: torch.dtype
    ) -> None:
        sde, seeds = CLD(), [11, 3, 2**31, 0]
        process = ReverseProcess(sde, lambda z, t: -(z[:, 1:] + 0.1 * z[:, 1:].sin()))

        def sample(chosen: list[int]) -> torch.Tensor:
            noise = SampleNoise([seeds[i] for i in chosen])
            state = noise.start(sde, (3, 5), dtype=dtype)
            return solve(process, TorchSDE(method=method), state, self.TIMES, noise=noise).state

        together = sample([0, 1, 2, 3])
        for chosen in ([2], [3, 0], [3, 2, 1, 0]):
            assert torch.equal(sample(chosen), together[chosen])
        assert (together[0] != together[1]).all()

    @every_sde_method
    def test_one_seed_gives_the_same_bits_and_no_global_generator_is_touched(
        self, method: str
    ) -> None:
        before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        found = [
            solve(
                reverse("CLD"),
                TorchSDE(method=method),
                start(CLD(), (4, 1)),
                self.TIMES,
                generator=generator(seed),
            ).state
            for seed in (1, 1, 2)
        ]
        assert torch.equal(found[0], found[1])
        assert (found[0] != found[2]).any()
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002

    @every_sde_method
    def test_an_empty_batch_stays_empty(self, method: str) -> None:
        state = start(CLD(), (4, 1))[:0]
        found = solve(
            reverse("CLD"), TorchSDE(method=method), state, self.TIMES, generator=generator()
        )
        assert found.success
        assert found.state.shape == (0, 2, 1)

    def test_the_state_is_not_changed(self) -> None:
        for method in STOCHASTIC:
            state = start(CLD(), (4, 1))
            before = state.clone()
            solve(reverse("CLD"), TorchSDE(method=method), state, self.TIMES, generator=generator())
            assert torch.equal(state, before)


def moments(solver: Solver, name: str, times: torch.Tensor) -> tuple[Array, Array]:
    """Moments at the end of the grid, started from the exact ones."""
    _, exact = PROCESSES[name]()
    m, C = propagate_moments(
        reverse(name),
        solver,
        times,
        torch.from_numpy(exact.mean(float(times[0])))[:, None],
        torch.from_numpy(exact.covariance(float(times[0]))),
    )
    return m[:, 0].numpy(), C.numpy()


def off(name: str, t: float, m: Array, C: Array) -> float:
    """A norm of the moments' errors that is smooth in the steps."""
    _, exact = PROCESSES[name]()
    return float(
        np.hypot(np.linalg.norm(m - exact.mean(t)), np.linalg.norm(C - exact.covariance(t)))
    )


MODES = ((0.4, -1.0), (0.6, 0.7))
WIDTH = 0.3


@functools.cache
def curved_error(method: str, n: int, T: float = 0.5, end: float = 0.05) -> float:
    """Error of E[x^2] on VP with data of two modes, after n steps from their exact law at T.

    The expectation is carried back step by step as a function of the state, a spline through the
    states of a fine grid; that over a step's normals is Gauss-Hermite quadrature.
    """
    data = GaussianMixture(
        [w for w, _ in MODES], [[x] for _, x in MODES], [[[WIDTH**2]]] * len(MODES)
    )
    sde, solver, reach = VPSDE(4.0, 4.0), TorchSDE(method=method), 7.0
    process, times = ReverseProcess(sde, data.score(sde)), uniform_times(T, end, n)
    tables = solver.prepare(process, times)
    nodes, weights = np.polynomial.hermite_e.hermegauss(14)
    weights = weights / weights.sum()
    if method == "srk":
        normals = np.stack([x.ravel() for x in np.meshgrid(nodes, nodes)], axis=1)
        weights = np.outer(weights, weights).ravel()
    else:
        normals = nodes[:, None]
    states = np.linspace(-reach, reach, 561)
    z = torch.from_numpy(np.repeat(states, len(weights)))[:, None, None]
    score = known_score(process, solver, times, z)
    xi = torch.from_numpy(np.tile(normals, (len(states), 1)))[..., None]
    value: Any = np.square
    for i in reversed(range(n)):
        after, _ = solver.step(z, (), tables, i, score, RecordedNoise([xi]))
        ends = np.clip(after.flatten().numpy(), -reach, reach)
        value = make_interp_spline(states, value(ends).reshape(len(states), -1) @ weights, k=5)

    def law(t: float) -> tuple[float, float]:
        decay = math.exp(-4 * t)
        return math.sqrt(decay), 1 - decay + decay * WIDTH**2

    x, weight = np.polynomial.hermite_e.hermegauss(60)
    (a, v), (b, u) = law(T), law(end)
    found = sum(w * value(a * m + math.sqrt(v) * x) @ weight / weight.sum() for w, m in MODES)
    return float(found - sum(w * ((b * m) ** 2 + u) for w, m in MODES))


class TestWeakOrders:
    """Halving the steps divides the errors of moments by two to the declared order."""

    @pytest.mark.parametrize("name", ["VP, linear", "VE", "CLD, linear", "PSLD", "HOLD"])
    @pytest.mark.parametrize("method", ["euler", "srk", "heun", "euler_heun", "midpoint"])
    def test_the_order_on_gaussian_data(self, method: str, name: str) -> None:
        solver = TorchSDE(method=method)
        errors = [
            off(name, 0.05, *moments(solver, name, uniform_times(1.0, 0.05, n))) for n in (160, 320)
        ]
        slope = math.log2(errors[0] / errors[1])
        # In the middle of a step "midpoint" has half the variance due there, which only a score
        # that bends feels.
        expected = 2 if method == "midpoint" else solver.facts.weak_order
        assert expected is not None
        assert abs(slope - expected) < CLOSE

    @pytest.mark.parametrize("method", ["euler", "srk", "heun", "euler_heun", "midpoint"])
    def test_the_order_on_data_of_two_modes(self, method: str) -> None:
        solver = TorchSDE(method=method)
        assert solver.facts.weak_order is not None
        coarse = 20 if method == "srk" else 40
        slope = math.log2(abs(curved_error(method, coarse) / curved_error(method, 2 * coarse)))
        assert abs(slope - solver.facts.weak_order) < CLOSE


LEVELS = (32, 64, 128, 256, 512)
CELLS = np.linspace(1.0, 0.05, LEVELS[-1] + 1)
SAMPLES = 1000


class Paths(NamedTuple):
    """Both ends, (k, samples), and W and U of the finest cells, (cell, m, samples)."""

    start: Array
    end: Array
    W: Array
    U: Array


@functools.cache
def paths(name: str) -> Paths:
    """Exact paths of the reverse SDE: the cells' I, W and U are drawn from their joint law.

    In the reverse clock, over a cell from t down to u, U = int (W - W_t) = int (tau - u) dW(tau).
    """
    _, exact = PROCESSES[name]()
    k, m = exact.root.shape
    t, u = CELLS[:-1, None], CELLS[1:, None]
    x, weights = np.polynomial.legendre.leggauss(8)
    tau = u + (t - u) * (x + 1) / 2
    rate = np.sqrt(exact.schedule.rate(tau))[..., None, None]
    jump = rate * (exact.phi(np.broadcast_to(u, tau.shape), tau) @ exact.root)
    eye = np.broadcast_to(np.eye(m), (*tau.shape, m, m))
    # U in units of the cell, so that all rows are of one size.
    share = ((tau - u) / (t - u))[..., None, None]
    stacked = np.concatenate([jump, eye, share * eye], axis=-2)
    stacked = stacked * np.sqrt((t - u) * weights / 2)[..., None, None]
    flat = transposed(stacked).reshape(len(t), -1, stacked.shape[-2])
    root = transposed(np.linalg.qr(flat).R)
    rng = np.random.default_rng(1)
    noise = root @ rng.standard_normal((len(t), root.shape[-1], SAMPLES))
    begin = np.linalg.cholesky(exact.covariance(1.0)) @ rng.standard_normal((k, SAMPLES))
    z = begin
    for step, I in zip(exact.phi(u[:, 0], t[:, 0]), noise[:, :k], strict=True):  # noqa: E741
        z = step @ z + I
    mean = exact.mean(np.array([1.0, 0.05]))[..., None]
    cell = (t - u)[..., None]
    return Paths(mean[0] + begin, mean[1] + z, noise[:, k : k + m], cell * noise[:, k + m :])


@functools.cache
def strong_error(method: str, name: str, n: int) -> float:
    """Root mean square distance from the exact end after n steps."""
    path, stride = paths(name), LEVELS[-1] // n
    times = CELLS[::stride].copy()
    h = (times[:-1] - times[1:])[:, None, None]
    W = path.W.reshape(n, stride, *path.W.shape[1:])
    # What has come so far goes on for the rest of the step.
    rest = (CELLS[1:] - np.repeat(times[1:], stride)).reshape(n, stride, 1, 1)
    U = path.U.reshape(W.shape) + rest * W
    W, U = W.sum(1), U.sum(1)
    xi = W / np.sqrt(h)
    if method == "srk":
        xi = np.concatenate([xi, (U / h - W / 2) / np.sqrt(h / 12)], axis=1)
    draws = torch.from_numpy(np.moveaxis(xi, -1, 1).copy())[..., None]
    found = solve(
        reverse(name),
        TorchSDE(method=method),
        torch.from_numpy(path.start.T.copy())[..., None],
        torch.from_numpy(times),
        noise=RecordedNoise(list(draws)),
    )
    return float(np.sqrt(np.square(found.state[..., 0].numpy().T - path.end).sum(0).mean()))


CURVED, FINEST = (32, 64, 128), 1024


@functools.cache
def curved_end(method: str, n: int) -> torch.Tensor:
    """Ends on VP with data of two modes, of one Brownian path on all grids."""
    h = 0.45 / FINEST
    xi = np.random.default_rng(2).standard_normal((2, FINEST, SAMPLES))
    W = math.sqrt(h) * xi[0]
    U = h * (W / 2 + math.sqrt(h / 12) * xi[1])
    stride, H = FINEST // n, 0.45 / n
    W, U = W.reshape(n, stride, -1), U.reshape(n, stride, -1)
    # What has come so far goes on for the rest of the step.
    rest = h * np.arange(stride - 1, -1, -1)[:, None]
    W, U = W.sum(1), (U + rest * W).sum(1)
    normals = [W / math.sqrt(H)]
    if method == "srk":
        normals.append((U / H - W / 2) / math.sqrt(H / 12))
    draws = torch.from_numpy(np.stack(normals, axis=-1))[..., None]
    data = GaussianMixture(
        [w for w, _ in MODES], [[x] for _, x in MODES], [[[WIDTH**2]]] * len(MODES)
    )
    sde = VPSDE(4.0, 4.0)
    state = 0.8 * torch.randn(SAMPLES, 1, 1, generator=generator(), dtype=torch.float64)
    return solve(
        ReverseProcess(sde, data.score(sde)),
        TorchSDE(method=method),
        state,
        uniform_times(0.5, 0.05, n),
        noise=RecordedNoise(list(draws)),
    ).state


def curved_distance(method: str, n: int) -> float:
    """Root mean square distance from the ends on a fine grid, by the method of highest order."""
    return float((curved_end(method, n) - curved_end("srk", FINEST)).square().mean().sqrt())


class TestStrongOrders:
    """Errors of single paths fall to the declared order."""

    @pytest.mark.parametrize("name", ["VP, linear", "CLD"])
    @pytest.mark.parametrize("method", ["euler", "srk", "heun", "euler_heun", "midpoint"])
    def test_the_order_is_that_of_the_declaration(self, method: str, name: str) -> None:
        errors = [strong_error(method, name, n) for n in LEVELS[1:]]
        slope = -np.polyfit(np.log(LEVELS[1:]), np.log(errors), 1)[0]
        declared = TorchSDE(method=method).facts.strong_order
        assert declared is not None
        # What limits "srk" to 3/2 is the bend of the score; here there is none.
        assert abs(slope - (2 if method == "srk" else declared)) < CLOSE

    @pytest.mark.parametrize("method", ["euler", "srk", "heun", "euler_heun", "midpoint"])
    def test_the_order_on_data_of_two_modes(self, method: str) -> None:
        errors = [curved_distance(method, n) for n in CURVED]
        slope = -np.polyfit(np.log(CURVED), np.log(errors), 1)[0]
        declared = TorchSDE(method=method).facts.strong_order
        assert declared is not None
        assert abs(slope - declared) < CLOSE

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_the_integral_is_that_of_the_path(self, name: str) -> None:
        # W and U of a step have the covariance h, h^2/2, h^3/3.
        path = paths(name)
        h = CELLS[0] - CELLS[1]
        scaled = np.stack([path.W / math.sqrt(h), path.U / h**1.5])[:, :, 0]
        found = np.einsum("ics,jcs->ij", scaled, scaled) / scaled[0].size
        # 5 standard errors of a variance, sqrt(2 / numbers).
        expected = [[1, 1 / 2], [1 / 2, 1 / 3]]
        assert np.allclose(found, expected, rtol=0, atol=5 * math.sqrt(2 / scaled[0].size))


def sdeint_moments(
    form: Any, method: str, s: torch.Tensor, m: Array, C: Array, noises: int
) -> tuple[Array, Array]:
    """Exact moments of torchsde's steps, which are affine in the state and the normals."""
    k = len(m)
    size = noises * (2 if method == "srk" else 1)
    for i in range(len(s) - 1):
        h = float(s[i + 1] - s[i])
        W = torch.zeros(1 + k + size, noises, dtype=torch.float64)
        W[1 + k : 1 + k + noises] = math.sqrt(h) * torch.eye(noises, dtype=torch.float64)
        U = h / 2 * W
        U[1 + k + noises :] = (
            h * math.sqrt(h / 12) * torch.eye(size - noises, noises, dtype=torch.float64)
        )
        y = torch.cat([torch.zeros(1, k), torch.eye(k), torch.zeros(size, k)]).double()
        out = one_step(form, method, s[i : i + 2], y, Increments(W, U)).numpy()
        b, X, N = out[0], (out[1 : 1 + k] - out[0]).T, (out[1 + k :] - out[0]).T
        m, C = b + X @ m, X @ C @ X.T + N @ N.T
    return m, C


class TestFormForTorchsde:
    """A process as torchsde's SDE."""

    METHODS = ("euler", "srk", "heun", "midpoint")

    @pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 8, 8)])
    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_packing_is_undone(self, name: str, shape: tuple[int, ...]) -> None:
        sde = PROCESSES[name]()[0]
        form = as_torchsde(sde, shape)
        state = torch.randn(3, sde.components, *shape, generator=generator())
        y = form.pack(state)
        assert y.shape == (3 * math.prod(shape), sde.components)
        assert torch.equal(form.unpack(y), state)
        several = torch.stack([y, 2 * y, 3 * y, 4 * y])
        assert torch.equal(form.unpack(several), torch.stack([i * state for i in (1, 2, 3, 4)]))

    def test_a_row_holds_the_components_of_one_number(self) -> None:
        state = torch.randn(3, 2, 4, 5, generator=generator())
        y = as_torchsde(CLD(), (4, 5)).pack(state)
        for b, i, j in itertools.product(range(3), range(4), range(5)):
            assert torch.equal(y[20 * b + 5 * i + j], state[b, :, i, j])

    def test_the_clock_increases(self) -> None:
        times = double(1.0, 0.4, 0.05)
        assert torch.equal(as_torchsde(reverse("CLD"), (1,)).clock(times), -times)
        assert torch.equal(as_torchsde(CLD(), (1,)).clock(times.flip(0)), times.flip(0))

    @every_process
    @pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
    def test_drift_and_noise_are_those_of_the_process(self, calculus: Any, name: str) -> None:
        sde, exact = PROCESSES[name]()
        k, m = exact.root.shape
        z, t = start(sde, (4, 1)), 0.37
        rate = float(exact.schedule.rate(np.asarray(t)))
        covariance = exact.covariance(t)
        forward = as_torchsde(sde, (1,), calculus=calculus)
        backward = as_torchsde(reverse(name), (1,), calculus=calculus)
        y = z[..., 0]
        expected = rate * y.numpy() @ exact.A.T
        score = -(y.numpy() - exact.mean(t)) @ np.linalg.inv(covariance)
        pull = rate * score @ (exact.root @ exact.root.T)
        for form, s, drift in ((forward, t, expected), (backward, -t, pull - expected)):
            assert form.noise_type == "additive"
            assert form.sde_type == calculus
            f, g = form.f(double(s)[0], form.pack(z)), form.g(double(s)[0], form.pack(z))
            assert largest(f.numpy() - drift) <= 1e-11 * (1 + largest(drift))
            assert g.shape == (4, k, m)
            found = g @ g.mT
            noise = rate * exact.root @ exact.root.T
            assert largest(found.numpy() - noise) <= 1e-12 * (1 + largest(noise))

    @pytest.mark.parametrize("name", ["CLD, linear", "PSLD"])
    @pytest.mark.parametrize("method", METHODS)
    def test_forward_moments_converge_to_the_marginal(self, method: str, name: str) -> None:
        sde, exact = PROCESSES[name]()
        form = as_torchsde(sde, (1,), calculus=CALCULUS[method])
        errors = []
        for n in (80, 160):
            s = form.clock(torch.linspace(0, 0.6, n + 1, dtype=torch.float64))
            m, C = sdeint_moments(
                form, method, s, exact.mean(0.0), exact.covariance(0.0), columns(name)
            )
            errors.append(off(name, 0.6, m, C))
        order = 1 if method == "euler" else 2
        assert abs(math.log2(errors[0] / errors[1]) - order) < CLOSE

    @every_process
    @pytest.mark.parametrize("method", METHODS)
    def test_reverse_moments_are_those_of_the_solver(self, method: str, name: str) -> None:
        _, exact = PROCESSES[name]()
        times = uniform_times(1.0, 0.05, 25)
        form = as_torchsde(reverse(name), (1,), calculus=CALCULUS[method])
        m, C = sdeint_moments(
            form, method, form.clock(times), exact.mean(1.0), exact.covariance(1.0), columns(name)
        )
        expected = moments(TorchSDE(method=method), name, times)
        for found, value in ((m, expected[0]), (C, expected[1])):
            assert largest(found - value) <= 1e-10 * (1 + largest(value))

    @pytest.mark.parametrize(
        ("method", "dtype"),
        [
            ("euler", torch.float32),
            ("srk", torch.float64),
            ("heun", torch.float32),
            ("midpoint", torch.float64),
        ],
    )
    def test_samples_of_images_have_the_moments(self, method: str, dtype: torch.dtype) -> None:
        # Of 12800 numbers, by torchsde's own loop and Brownian motion; there and back.
        sde, exact = PROCESSES["CLD"]()
        n, batch, end = 48, 200, 0.05
        matrices = {
            float(t): (exact.mean(t), np.linalg.inv(exact.covariance(t))[1]) for t in (1.0, end)
        }

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            at = float(t[0])
            if at not in matrices:
                matrices[at] = exact.mean(at), np.linalg.inv(exact.covariance(at))[1]
            mean, row = matrices[at]
            pulled = row[0] * (z[:, :1] - mean[0]) + row[1] * (z[:, 1:] - mean[1])
            return -pulled

        x = MEAN + math.sqrt(VARIANCE) * torch.randn(batch, 1, 8, 8, generator=generator())
        begin = sde.augment(x, generator=generator(1)).to(dtype)
        for process, span in ((sde, (0.0, 1.0)), (ReverseProcess(sde, score), (1.0, end))):
            form = as_torchsde(process, (1, 8, 8), calculus=CALCULUS[method])
            ts = form.clock(torch.tensor(span, dtype=dtype))
            y = form.pack(begin)
            bm = torchsde.BrownianInterval(
                t0=ts[0],
                t1=ts[-1],
                size=(len(y), 1),
                dtype=dtype,
                entropy=5,
                levy_area_approximation="space-time",
            )
            step = abs(span[1] - span[0]) / n
            with torch.no_grad():
                out = form.unpack(
                    torchsde.sdeint(form, y, ts, bm=bm, dt=step * (1 + 1e-6), method=method)
                )
            assert out.shape == (2, batch, 2, 1, 8, 8)
            assert out.dtype == dtype
            assert torch.equal(out[0], begin)
            times = torch.linspace(*span, n + 1, dtype=torch.float64)
            m, C = sdeint_moments(
                as_torchsde(
                    process if process is sde else reverse("CLD"), (1,), calculus=CALCULUS[method]
                ),
                method,
                form.clock(times),
                exact.mean(span[0]),
                exact.covariance(span[0]),
                1,
            )
            begin = out[1]
            numbers = out[1].double().movedim(1, 0).flatten(1).numpy()
            deviation = np.sqrt(np.diag(C))
            # 5 standard errors, of a mean and of a covariance in units of the deviations; the
            # exact way back starts from samples that have errors of their own.
            error = 5 / math.sqrt(numbers.shape[1])
            factor = 1 if process is sde else 2
            assert (abs(numbers.mean(1) - m) <= factor * error * deviation).all()
            away = abs(np.cov(numbers) - C) / np.outer(deviation, deviation)
            assert (away <= factor * error * math.sqrt(2)).all()

    def test_gradients_reach_a_score_s_parameters(self) -> None:
        score = Pulling()
        form = as_torchsde(ReverseProcess(CLD(), score), (1,))
        assert [name for name, _ in form.named_parameters()] == ["score.strength"]
        y, W = form.pack(start(CLD(), (4, 1))), double(0.1, -0.2, 0.3, 0.1)[:, None]
        one_step(form, "euler", double(-1.0, -0.9), y, Increments(W)).sum().backward()
        # One step's derivative: h G G^T ds/dstrength, with G G^T = 8 and ds = -(1 + t) v.
        assert score.strength.grad is not None
        expected = -0.1 * 8 * 2 * float(y[:, 1].sum())
        assert abs(score.strength.grad.item() - expected) <= 1e-12 * (1 + abs(expected))
