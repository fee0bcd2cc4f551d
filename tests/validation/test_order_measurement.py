"""Measured orders and their references, against closed forms and against sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.linalg import expm

from cldsde import CLD, HOLD, VPSDE, GaussianMixture
from cldsde.solvers import (
    SSCS,
    EulerMaruyama,
    ExponentialMultistep,
    GottaGoFast,
    ProbabilityFlow,
    StochasticHeun,
    TorchDiffEq,
    TorchSDE,
    solve,
    uniform_times,
)
from cldsde.solvers.authoring import Facts, PathNoise, Solver
from cldsde.validation import (
    GaussianReference,
    Problem,
    moment_error,
    ode_order,
    orders,
    problems,
    propagate_moments,
    reference_kernel,
    strong_order,
    weak_order,
)
from cldsde.validation.cases import FlowCase, PathCase
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.problems import forward_processes

Array = np.ndarray[Any, np.dtype[np.float64]]

PROBLEMS = problems()
PASS, FAIL = Verdict.PASS, Verdict.FAIL
DIGITS = 30
TOLERANCE = 1e-11
MEAN, VARIANCE = 0.3, 0.25
CLD_RATE = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_array(matrix: mp.matrix) -> Array:
    return np.array(matrix.tolist(), dtype=np.float64)


# Closed forms, with 30 digits. B is the integral of the rate.


def vp_clock(s: float, t: float) -> mp.mpf:
    low, high = mp.mpf(VPSDE().drift(0.0).item()) * -2, mp.mpf(VPSDE().drift(1.0).item()) * -2
    s, t = mp.mpf(s), mp.mpf(t)
    return low * (t - s) + (high - low) * (t**2 - s**2) / 2


def vp_kernel(s: float, t: float) -> tuple[Array, Array]:
    B = vp_clock(s, t)
    return as_array(mp.matrix([[mp.exp(-B / 2)]])), as_array(mp.matrix([[-mp.expm1(-B)]]))


def cld_kernel(s: float, t: float) -> tuple[Array, Array]:
    """Ψ = exp(A B) and Q = S − Ψ S Ψᵀ with the stationary S = diag(1, M)."""
    A, S = mp.matrix([[0, 4], [-1, -4]]), mp.matrix([[1, 0], [0, mp.mpf(1) / 4]])
    psi = mp.expm(A * (CLD_RATE * (mp.mpf(t) - mp.mpf(s))), method="taylor")
    return as_array(psi), as_array(S - psi * S * psi.T)


def turn(angle: mp.mpf) -> mp.matrix:
    return mp.matrix([[mp.cos(angle), -mp.sin(angle)], [mp.sin(angle), mp.cos(angle)]])


def turning_kernel(s: float, t: float) -> tuple[Array, Array]:
    """F(t) = R(3t) D R(3t)ᵀ: in the turning frame the drift is constant, D − 3J."""
    frame = mp.matrix([[mp.mpf(-1) / 2, 3], [-3, -4]])

    def psi(u: mp.mpf) -> mp.matrix:
        return turn(3 * mp.mpf(t)) * mp.expm(frame * (mp.mpf(t) - u)) * turn(3 * u).T

    def density(u: mp.mpf) -> mp.matrix:
        moved = psi(u) * mp.matrix([[1 + u, 0], [u, 1 - u / 2]])
        return moved * moved.T

    # Gauss–Legendre with 20 nodes: the integrand is entire and grows by e⁸ at most.
    x, w = np.polynomial.legendre.leggauss(20)
    half = (t - s) / 2
    Q = sum(
        (density(mp.mpf(s + half * (1 + a))) * mp.mpf(b * half) for a, b in zip(x, w, strict=True)),
        mp.zeros(2),
    )
    return as_array(psi(mp.mpf(s))), as_array(Q)


KERNELS = {"VP": vp_kernel, "CLD, critical": cld_kernel, "non-commuting": turning_kernel}


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(DIGITS):
        yield


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.01), (0.3, 0.35), (0.1, 0.9), (0.0, 1.0)])
def test_the_reference_kernel_is_the_closed_form(name, s, t):
    psi, Q = reference_kernel(forward_processes()[name](), s, t)
    exact_psi, exact_Q = KERNELS[name](s, t)
    np.testing.assert_allclose(psi, exact_psi, rtol=0, atol=TOLERANCE)
    scale = np.sqrt(np.outer(np.diag(exact_Q), np.diag(exact_Q)))
    np.testing.assert_array_less(np.abs(Q.numpy() - exact_Q), TOLERANCE * scale)


def gaussian_problem(name: str) -> Problem:
    data = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])
    return Problem(name, forward_processes()[name](), data)


class Closed:
    """Moments of a problem from its closed kernel."""

    def __init__(self, problem: Problem) -> None:
        self.kernel = KERNELS[problem.name]
        self.start = problem.sde.initial_covariance.numpy().copy()
        self.start[0, 0] += VARIANCE

    def moments(self, t: float) -> tuple[Array, Array]:
        psi, Q = self.kernel(0.0, t)
        return psi[:, :1] * MEAN, psi @ self.start @ psi.T + Q


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("many", [False, True])
def test_laws_and_flows_of_the_reference_are_the_closed_forms(name, many):
    """Also where times are many and are reached in one go.

    The flow takes the law at t to that at u.
    """
    problem = gaussian_problem(name)
    closed, k = Closed(problem), problem.sde.components
    wanted = [0.05, 0.2, 0.6, 1.0]
    between = np.linspace(0.05, 1.0, 101).tolist() if many else []
    reference = GaussianReference(problem, torch.tensor([*wanted, *between], dtype=torch.float64))
    for t in wanted:
        mean, covariance = closed.moments(t)
        found = reference.moments(t)
        np.testing.assert_allclose(found[0], mean, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found[1], covariance, rtol=0, atol=TOLERANCE)
    eye = torch.eye(k, dtype=torch.float64).unsqueeze(-1)
    for t, u in [(1.0, 0.05), (0.6, 0.2), (0.2, 0.05), (0.6, 0.6)]:
        psi = KERNELS[name](u, t)[0] if t > u else np.eye(k)
        (m_t, C_t), (m_u, C_u) = closed.moments(t), closed.moments(u)
        # Inverses of Ψ and Σ cost their condition.
        loss = np.linalg.cond(C_t) * np.linalg.cond(psi)
        # The flow as an affine map, from where it takes the mean and unit vectors.
        origin = reference.flow(torch.from_numpy(m_t)[None], t, u)[0]
        np.testing.assert_allclose(origin, m_u, rtol=0, atol=TOLERANCE)
        flow = (reference.flow(eye + torch.from_numpy(m_t), t, u)[..., 0] - origin[:, 0]).T.numpy()
        np.testing.assert_allclose(flow @ C_t @ flow.T, C_u, rtol=0, atol=TOLERANCE * loss)
        if k == 1:
            np.testing.assert_allclose(flow, np.sqrt(C_u / C_t), rtol=TOLERANCE)


def test_the_flow_of_cld_is_that_of_its_differential_equation():
    """Magnus steps of order 4, extrapolated, against the reference."""
    problem = gaussian_problem("CLD, critical")
    A, Q, S = np.array([[0, 4], [-1, -4]]), np.diag([0, 2]), np.diag([1, 0.25])
    start = np.diag([VARIANCE, 0.01])

    def slope(t: Array) -> Array:
        psi = expm(CLD_RATE * A * t[:, None, None])
        covariance = S - psi @ (S - start) @ psi.mT
        return CLD_RATE * (A + Q @ np.linalg.inv(covariance) / 2)

    def flow(n: int) -> Array:
        times = np.geomspace(1.0, 0.05, n + 1)
        h = np.diff(times)
        first, second = (
            slope(times[:-1] + h * c) for c in (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6)
        )
        h = h[:, None, None]
        bracket = second @ first - first @ second
        result = np.eye(2)
        for step in expm(h / 2 * (first + second) + math.sqrt(3) / 12 * h**2 * bracket):
            result = step @ result
        return result

    coarse, fine, finest = flow(250), flow(500), flow(1000)
    exact = (16 * finest - fine) / 15
    # What is left after extrapolation is of order 6.
    rest = np.abs(exact - (16 * fine - coarse) / 15).max()
    assert rest < 1e-10
    reference = GaussianReference(problem, torch.tensor([0.05, 1.0], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64).unsqueeze(-1)
    origin = reference.flow(torch.zeros(1, 2, 1, dtype=torch.float64), 1.0, 0.05)
    found = (reference.flow(eye, 1.0, 0.05) - origin)[..., 0].T
    np.testing.assert_allclose(found, exact, rtol=0, atol=rest / 16 + TOLERANCE)


@pytest.mark.parametrize("name", ["CLD, three modes", "CLD, ring"])
def test_the_reference_is_for_gaussian_data_of_one_dimension(name):
    with pytest.raises(ValueError, match="Gaussian data of one dimension"):
        GaussianReference(PROBLEMS[name], torch.tensor([0.05, 1.0], dtype=torch.float64))


def test_the_flow_of_a_mixture_keeps_shares_in_one_dimension():
    """The flow in one dimension is monotone: it takes quantiles to quantiles."""
    problem = PROBLEMS["VP, three modes"]
    case = FlowCase(problem, 20, generator())

    def share(x: torch.Tensor, t: float) -> torch.Tensor:
        law = problem.sde.marginal(t)
        scale, noise = float(law.mean), float(law.covariance)
        total = torch.zeros_like(x)
        weights = problem.data.weights / problem.data.weights.sum()
        for w, m, C in zip(weights, problem.data.means, problem.data.covariances, strict=True):
            z = (x - scale * m) / (scale**2 * C.item() + noise) ** 0.5
            total += w * torch.special.ndtr(z)
        return total

    start, end = case.start.flatten(), case.end.flatten()
    torch.testing.assert_close(share(end, 0.05), share(start, 1.0), rtol=0, atol=1e-10)
    # Not the identity.
    assert float((start - end).abs().max()) > 0.1


# Euler–Maruyama for Gaussian data is a recursion for mean and covariance: with a = −F − GGᵀ Σ⁻¹,
# m ← m + h [a (m − m_t) − F m_t] and C ← (I + h a) C (I + h a)ᵀ + h GGᵀ.
def euler_error(
    moments: Callable[[float], tuple[Array, Array]],
    drift: Callable[[float], Array],
    noise: Callable[[float], Array],
    times: Array,
) -> float:
    m, C = moments(times[0])
    for t, u in itertools.pairwise(times):
        h, (mean, covariance) = t - u, moments(t)
        F, N = drift(t), noise(t)
        a = -F - N @ np.linalg.inv(covariance)
        m = m + h * (a @ (m - mean) - F @ mean)
        X = np.eye(len(F)) + h * a
        C = X @ C @ X.T + h * N
    mean, covariance = moments(times[-1])
    return float(max(np.abs(m - mean).max(), np.abs(C - covariance).max()))


def vp_law(t: float) -> tuple[Array, Array]:
    B = 0.1 * t + 7.9 * t**2 / 2
    psi = math.exp(-B / 2)
    return np.array([[psi * MEAN]]), np.array([[psi**2 * VARIANCE - math.expm1(-B)]])


def cld_law(t: float) -> tuple[Array, Array]:
    psi = expm(CLD_RATE * t * np.array([[0.0, 4.0], [-1.0, -4.0]]))
    S = np.diag([1, 0.25])
    return psi[:, :1] * MEAN, S - psi @ (S - np.diag([VARIANCE, 0.01])) @ psi.T


@pytest.mark.parametrize("n", [32, 200])
def test_the_moment_error_of_euler_maruyama_is_that_of_its_recursion(n):
    times = uniform_times(1.0, 0.05, n)
    for name, law, drift, noise in (
        (
            "VP",
            vp_law,
            lambda t: np.array([[-(0.1 + 7.9 * t) / 2]]),
            lambda t: np.array([[0.1 + 7.9 * t]]),
        ),
        (
            "CLD",
            cld_law,
            lambda t: CLD_RATE * np.array([[0.0, 4.0], [-1.0, -4.0]]),
            lambda t: CLD_RATE * np.diag([0.0, 2.0]),
        ),
    ):
        exact = euler_error(law, drift, noise, times.numpy())
        found = moment_error(EulerMaruyama(), PROBLEMS[name], times)
        assert exact > 1e-4
        assert abs(found - exact) <= 1e-12
        reference = GaussianReference(PROBLEMS[name], times[[0, -1]])
        assert moment_error(EulerMaruyama(), PROBLEMS[name], times, reference) == found


@pytest.mark.parametrize("name", ["CLD", "VE"])
def test_torchdiffeq_s_methods_with_fixed_steps_have_exact_moments(name):
    times = uniform_times(1.0, 0.05, 8)
    found = moment_error(TorchDiffEq(method="rk4"), PROBLEMS[name], times)
    # Of order 4, with nothing else in the way: half the steps have 16 times the error in the limit.
    finer = moment_error(TorchDiffEq(method="rk4"), PROBLEMS[name], uniform_times(1.0, 0.05, 16))
    assert 8 < found / finer < 32


def test_orders_of_a_solver_that_diverges_come_without_a_warning():
    class Diverging(EulerMaruyama):
        def step(self, z, *arguments):
            return super().step(z, *arguments)[0] / 0, ()

    found = strong_order(Diverging(), PROBLEMS["VP"], steps=(8, 16, 32), samples=100)
    assert not any(math.isfinite(level.error) for level in found.levels)


def sampled_moments(
    solver: Solver, problem: Problem, times: torch.Tensor, n: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    g, chunk = generator(seed), 100_000
    first, second = 0.0, 0.0
    for _ in range(n // chunk):
        z = solve(problem.process, solver, problem.sample(chunk, g), times, generator=g).state
        z = z[..., 0]
        first, second = first + z.sum(0), second + z.T @ z
    mean = first / n
    return mean, second / n - torch.outer(mean, mean)


@pytest.mark.parametrize(
    "solver", [EulerMaruyama(), SSCS(), ExponentialMultistep(order=2, stochasticity=1.0)]
)
def test_probed_moments_are_those_of_samples(solver):
    problem, n = PROBLEMS["CLD"], 1_000_000
    times = uniform_times(1.0, 0.05, 8)
    reference = GaussianReference(problem, times[[0, -1]])
    mean, covariance = propagate_moments(problem.process, solver, times, *reference.moments(1.0))
    sampled_mean, sampled_covariance = sampled_moments(solver, problem, times, n, seed=3)
    # Standard errors of Gaussian samples.
    variance = covariance.diagonal()
    mean_error = (variance / n).sqrt()
    covariance_error = ((torch.outer(variance, variance) + covariance**2) / n).sqrt()
    assert bool(((sampled_mean - mean[:, 0]).abs() <= 5 * mean_error).all())
    assert bool(((sampled_covariance - covariance).abs() <= 5 * covariance_error).all())
    # The samples tell this law from the exact one.
    exact = reference.moments(0.05)[1]
    assert bool(((sampled_covariance - exact).abs() > 10 * covariance_error).any())


def declaring(solver: Solver, **orders: float) -> Solver:
    """The same solver with other facts."""

    class Declaring(type(solver)):  # type: ignore[misc]
        @property
        def facts(self) -> Facts:
            return replace(super().facts, **orders)

    fields = {name: getattr(solver, name) for name in solver.__dataclass_fields__}  # type: ignore[attr-defined]
    made: Solver = Declaring(**fields)
    return made


QUICK = (32, 64, 128, 256)


@pytest.mark.parametrize(
    ("solver", "problem", "order"),
    [
        (EulerMaruyama(), "CLD", 1),
        (SSCS(), "VP", 1),
        (SSCS(score_step="midpoint"), "CLD, linear schedule", 2),
        (StochasticHeun(), "VE", 2),
        (ExponentialMultistep(order=2, stochasticity=1.0), "VP", 2),
        (TorchSDE(method="euler"), "CLD", 1),
        (TorchSDE(method="srk"), "CLD", 2),
    ],
    ids=repr,
)
def test_weak_orders_are_those_declared_and_no_higher(solver, problem, order):
    assert solver.facts.weak_order == order
    found = weak_order(solver, PROBLEMS[problem], steps=QUICK)
    assert found.verdict is PASS
    assert found.order == pytest.approx(order, abs=0.15)
    assert [level.step for level in found.levels] == [1 / n for n in QUICK]
    errors = [level.error for level in found.levels]
    times = uniform_times(1.0, 0.05, QUICK[1])
    assert errors[1] == pytest.approx(moment_error(solver, PROBLEMS[problem], times), rel=1e-6)
    wrong = weak_order(declaring(solver, weak_order=order + 1), PROBLEMS[problem], steps=QUICK)
    assert wrong.verdict is FAIL
    assert wrong.order == found.order


@pytest.mark.parametrize(
    ("solver", "problem"), [(EulerMaruyama(), "CLD"), (StochasticHeun(), "VP")], ids=repr
)
def test_strong_orders_are_those_declared_and_no_higher(solver, problem):
    assert solver.facts.strong_order == 1
    times = uniform_times(1.0, 0.05, 256)
    paths = PathCase(PROBLEMS[problem], times, 1000, generator(1))
    found = strong_order(solver, PROBLEMS[problem], steps=QUICK, case=paths)
    assert found.verdict is PASS
    assert found.order == pytest.approx(1, abs=0.1)
    assert all(0 < level.standard_error < 0.2 * level.error for level in found.levels)
    wrong = declaring(solver, strong_order=1.5)
    assert strong_order(wrong, PROBLEMS[problem], steps=QUICK, case=paths).verdict is FAIL


@pytest.mark.parametrize(
    ("name", "law", "rate"), [("VP", vp_law, None), ("CLD", cld_law, CLD_RATE)]
)
def test_exact_paths_end_in_the_law_and_hang_together_with_their_noise(name, law, rate):
    """The end is N(m, Σ), and its covariance with the path's increments ∫Φ_1 G over each of them.

    Once more Φ_1(u, t) = Σ_u Ψ(t, u)ᵀ Σ_t⁻¹.
    """
    problem, n, cells = PROBLEMS[name], 20_000, 64
    times = uniform_times(1.0, 0.05, cells)
    case = PathCase(problem, times, n, generator(2))
    mean, covariance = law(0.05)
    z = case.end[..., 0].numpy()
    deviation = np.sqrt(np.diag(covariance))
    error = 5 / math.sqrt(n)
    assert (np.abs(z.mean(0) - mean[:, 0]) <= error * deviation).all()
    scale = np.outer(deviation, deviation)
    assert (np.abs(np.cov(z.T).reshape(scale.shape) - covariance) <= 2**0.5 * error * scale).all()

    def pull(t: float) -> Array:
        if rate is None:
            psi = np.array([[math.exp(-(0.1 * (t - 0.05) + 7.9 * (t**2 - 0.05**2) / 2) / 2)]])
            G = np.array([[math.sqrt(0.1 + 7.9 * t)]])
        else:
            psi = expm(rate * (t - 0.05) * np.array([[0.0, 4.0], [-1.0, -4.0]]))
            G = np.array([[0.0], [math.sqrt(2 * rate)]])
        return covariance @ psi.T @ np.linalg.inv(law(t)[1]) @ G

    x, w = np.polynomial.legendre.leggauss(40)
    for every in (4, 16):
        count = cells // every
        noise = EulerMaruyama().path_noise(problem.process, times[::every])
        draws = torch.cat(case.draws(noise, every), dim=1)[..., 0].numpy()
        assert draws.shape == (n, count)
        # Increments over different steps are independent and, over √h, of unit variance.
        np.testing.assert_allclose(np.cov(draws.T), np.eye(count), rtol=0, atol=2**0.5 * error)
        together = (z - z.mean(0)).T @ draws / n
        ends = times[::every].tolist()
        for i, (t, u) in enumerate(itertools.pairwise(ends)):
            half = (t - u) / 2
            weighted = (b * half * pull(u + half * (1 + a)) for a, b in zip(x, w, strict=True))
            expected = sum(weighted) / math.sqrt(t - u)
            found = together[:, i]
            assert (np.abs(found - expected[:, 0]) <= 2**0.5 * error * deviation).all()
    # The last increment says a good deal about where a path ends.
    assert (np.abs(expected[:, 0]) > 3 * error * deviation).any()


@pytest.mark.parametrize(
    ("solver", "problem", "order", "near"),
    [
        (TorchDiffEq(method="rk4"), "VE", 4, 0.15),
        (TorchDiffEq(method="heun2"), "VP", 2, 0.1),
        # Those that choose their times take even steps here.
        (TorchDiffEq(method="dopri5"), "VE", 5, 0.3),
        (ProbabilityFlow(method="bosh3"), "VP", 3, 0.3),
        (ExponentialMultistep(order=2), "VP", 2, 0.1),
        (ExponentialMultistep(order=3), "CLD", 3, 0.1),
    ],
    ids=repr,
)
def test_ode_orders_are_those_declared_and_no_higher(solver, problem, order, near):
    assert solver.facts.ode_order == order
    case = FlowCase(PROBLEMS[problem], 20, generator(1))
    # Of the fifth order there is little above rounding at 256 steps.
    steps = (16, 32, 64, 128) if order == 5 else QUICK
    found = ode_order(solver, PROBLEMS[problem], steps=steps, case=case)
    assert found.verdict is PASS
    assert found.order == pytest.approx(order, abs=near)
    assert [level.step for level in found.levels] == [1 / n for n in steps]
    wrong = declaring(solver, ode_order=order + 1)
    assert ode_order(wrong, PROBLEMS[problem], steps=steps, case=case).verdict is FAIL


def test_srk_is_of_strong_order_two_along_lines_and_of_three_halves_where_the_score_bends():
    """Along lines what limits it to 3/2, the second derivative of the drift, is nought."""
    solver = TorchSDE(method="srk")
    assert solver.facts.strong_order == 1.5
    straight = strong_order(solver, PROBLEMS["VP"], steps=QUICK, samples=1000)
    assert straight.verdict is PASS
    assert straight.order == pytest.approx(2, abs=0.1)
    wrong = declaring(solver, strong_order=2.5)
    assert strong_order(wrong, PROBLEMS["VP"], steps=QUICK, samples=1000).verdict is FAIL
    bent = {"steps": (16, 32, 64, 128, 256), "samples": 3000}
    assert strong_order(solver, PROBLEMS["VP, three modes"], **bent).verdict is PASS
    more = declaring(solver, strong_order=2)
    assert strong_order(more, PROBLEMS["VP, three modes"], **bent).verdict is FAIL


def test_a_strong_order_on_a_mixture_is_that_of_distances_between_levels():
    problem = PROBLEMS["VP, three modes"]
    paths = PathCase(problem, uniform_times(1.0, 0.05, 128), 1000, generator(3))
    assert paths.end is None
    steps = (8, 16, 32, 64, 128)
    found = strong_order(EulerMaruyama(), problem, steps=steps, case=paths)
    assert [level.step for level in found.levels] == [1 / n for n in steps[:-1]]
    assert found.order == pytest.approx(1, abs=0.25)
    wrong = declaring(EulerMaruyama(), strong_order=1.5)
    assert strong_order(wrong, problem, steps=steps, case=paths).verdict is FAIL


class TwoNormals(EulerMaruyama):
    """Shows the increment of each step over √h, and its time integral over √(h³/3)."""

    def path_noise(self, process, times):
        plain = super().path_noise(process, times)
        h = -times.diff()[:, None, None]
        zero = torch.zeros_like(plain.increment)
        return PathNoise(
            torch.cat([plain.increment, zero], dim=1),
            torch.cat([plain.integral, plain.integral], dim=1),
            torch.cat([zero, math.sqrt(3) / h * plain.increment], dim=1),
        )


@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_time_integral_of_a_path_hangs_together_with_its_increment(every):
    """W and U of a step have the covariance h, h²/2, h³/3, whatever cells it is made of."""
    problem, n = PROBLEMS["CLD"], 20_000
    times = uniform_times(1.0, 0.05, 32)
    case = PathCase(problem, times, n, generator(5))
    noise = TwoNormals().path_noise(problem.process, times[::every])
    draws = torch.stack(case.draws(noise, every))[..., 0].numpy()
    expected = np.array([[1, math.sqrt(3) / 2], [math.sqrt(3) / 2, 1]])
    for step in draws:
        assert np.abs(np.cov(step.T) - expected).max() <= 5 * math.sqrt(2 / n)
    # Over different steps they are independent.
    assert np.abs(draws[0].T @ draws[-1] / n).max() <= 5 / math.sqrt(n)


def test_srk_sees_of_a_path_what_its_method_is_made_for():
    """ΔW/√h and (U/h − ΔW/2)/√(h/12): independent standard normals."""
    problem, n = PROBLEMS["VP"], 20_000
    times = uniform_times(1.0, 0.05, 16)
    case = PathCase(problem, times, n, generator(6))
    noise = TorchSDE(method="srk").path_noise(problem.process, times[::4])
    draws = torch.cat(case.draws(noise, 4), dim=1)[..., 0].numpy()
    assert draws.shape == (n, 8)
    assert np.abs(np.cov(draws.T) - np.eye(8)).max() <= 5 * math.sqrt(2 / n)


def test_an_order_of_eight_shows_where_the_flow_turns():
    problem = PROBLEMS["CLD, rotation"]
    case = FlowCase(problem, 10, generator(1))
    solver, steps = ProbabilityFlow(method="dopri8"), (20, 28, 40, 57, 80)
    found = ode_order(solver, problem, steps=steps, case=case)
    assert found.verdict is PASS
    assert found.order == pytest.approx(8, abs=0.15)
    # All far above rounding.
    assert min(level.error for level in found.levels) > 1e4 * case.accuracy
    wrong = declaring(solver, ode_order=9)
    assert ode_order(wrong, problem, steps=steps, case=case).verdict is FAIL


def test_the_rotation_is_stationary_and_its_flow_keeps_what_it_turns():
    """Φ of the flow keeps zᵀ Σ⁻¹ z with Σ = diag(1, M)."""
    problem = PROBLEMS["CLD, rotation"]
    ends = torch.tensor([problem.end, problem.start], dtype=torch.float64)
    reference = GaussianReference(problem, ends)
    scale = torch.tensor([1.0, 0.25], dtype=torch.float64)
    case = FlowCase(problem, 50, generator(1))
    sizes = []
    for z, t in ((case.start, problem.start), (case.end, problem.end)):
        mean, covariance = reference.moments(t)
        torch.testing.assert_close(covariance, scale.diag(), rtol=0, atol=TOLERANCE)
        sizes.append(((z - mean)[..., 0].square() / scale).sum(1))
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0, atol=20 * TOLERANCE)
    assert float((case.start - case.end).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["VP", "VE", "CLD", "CLD, rotation", "VP, three modes"])
def test_the_end_of_a_flow_is_as_accurate_as_it_says(name):
    """Against a solver of the package at a tolerance near rounding, for each sample."""
    problem = PROBLEMS[name]
    case = FlowCase(problem, 10, generator(2))
    strict = ProbabilityFlow(method="dopri8", rtol=3e-14, atol=3e-14, pace="sample")
    found = solve(problem.process, strict, case.start, uniform_times(1.0, 0.05, 1))
    error = float((found.state - case.end).square().mean().sqrt())
    steps = found.nfev / strict.facts.nfe_per_step
    assert error <= case.accuracy + 1e-15 * math.sqrt(steps)


def test_the_start_of_a_flow_is_of_the_exact_law_and_its_end_of_the_flow():
    problem = PROBLEMS["CLD"]
    case = FlowCase(problem, 10, generator(1))
    strict = ProbabilityFlow(method="dopri8", rtol=1e-10, atol=1e-10)
    found = solve(problem.process, strict, case.start, uniform_times(1.0, 0.05, 1))
    assert float((found.state - case.end).abs().max()) < 1e-7


class Drifting(EulerMaruyama):
    """Euler–Maruyama with a drift that is off by a small multiple of z: it has its own law."""

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        (stage,), h = tables.stages, -times.diff()[:, None, None]
        state = torch.tensor(stage.state, dtype=torch.float64)
        eye = torch.eye(state.shape[-1], dtype=torch.float64)
        moved = stage._replace(state=(state - 0.2 * h * eye).tolist())
        return tables._replace(stages=(moved,))


class Ending(EulerMaruyama):
    """Euler–Maruyama whose last step goes half a unit too far."""

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return z + 0.5 * (i == len(tables.stages[0].state) - 1), memory


# Of a declared 1.2 an order of 1 is neither confirmed nor refuted; of 1 it is confirmed.
@pytest.mark.parametrize("declared", [1.0, 1.2])
def test_samples_of_another_law_fail_whatever_the_order_is(monkeypatch, declared):
    monkeypatch.setattr(orders, "_EXACT_SAMPLES", 100_000)
    problem, few = PROBLEMS["VP, three modes"], {"steps": (16, 32, 64, 128), "samples": 20_000}
    found = weak_order(declaring(Ending(), weak_order=declared), problem, **few)
    assert found.verdict is FAIL
    assert "wrong distribution" in found.message
    assert "wrong distribution" not in weak_order(EulerMaruyama(), problem, **few).message


MIXTURE: dict[str, Any] = {"steps": (16, 32, 64, 128, 256, 512), "samples": 40_000}


@pytest.mark.slow
def test_the_weak_order_on_a_mixture_is_measured_along_shared_paths():
    problem = PROBLEMS["VP, three modes"]
    good = weak_order(EulerMaruyama(), problem, **MIXTURE)
    assert good.verdict is PASS
    assert good.order == pytest.approx(1, abs=0.25)
    assert len(good.levels) == 5
    claimed = weak_order(declaring(EulerMaruyama(), weak_order=2), problem, **MIXTURE)
    assert claimed.verdict is FAIL
    # It converges, at order 1, to another law.
    drifting = weak_order(Drifting(), problem, **MIXTURE)
    assert drifting.order == pytest.approx(1, abs=0.25)
    assert drifting.verdict is FAIL
    assert "wrong distribution" in drifting.message


@pytest.mark.parametrize(
    ("measure", "solver", "problem", "error", "words"),
    [
        (strong_order, SSCS(), "CLD", TypeError, "must have `path_noise`"),
        (strong_order, GottaGoFast(), "CLD", TypeError, "fixed grid"),
        (strong_order, TorchDiffEq(method="rk4"), "CLD", TypeError, "must have `path_noise`"),
        (weak_order, SSCS(), "CLD, three modes", TypeError, "shared Brownian paths"),
        (weak_order, GottaGoFast(), "CLD", TypeError, "fixed grid"),
        (weak_order, ProbabilityFlow(), "VP, three modes", TypeError, "fixed grid"),
        (weak_order, SSCS(), "VE", ValueError, "SSCS needs"),
        (moment_error, SSCS(), "VE", ValueError, "SSCS needs"),
        (ode_order, GottaGoFast(), "CLD", ValueError, "steps of one length"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, solver, problem, error, words):
    extra: Any = [uniform_times(1.0, 0.05, 8)] if measure is moment_error else []
    with pytest.raises(error, match=words):
        measure(solver, PROBLEMS[problem], *extra)


@pytest.mark.parametrize("measure", [strong_order, weak_order, ode_order])
def test_a_problem_is_not_its_name(measure):
    with pytest.raises(TypeError, match=r"problem must be a Problem, .*; got 'CLD'"):
        measure(EulerMaruyama(), "CLD")


@pytest.mark.parametrize(
    ("measure", "problem"),
    [
        (strong_order, "VP"),
        (strong_order, "VP, three modes"),
        (weak_order, "VP, three modes"),
    ],
)
def test_steps_that_do_not_divide_the_finest_are_refused(measure, problem):
    """Over 30 steps there is no grid of the 128 cells."""
    with pytest.raises(ValueError, match="30"):
        measure(EulerMaruyama(), PROBLEMS[problem], steps=(30, 64, 128), samples=20)


@pytest.mark.parametrize("measure", [weak_order, strong_order, ode_order])
@pytest.mark.parametrize("steps", [(), (64, 32), (32, 32), (0, 32), (32, 64.5)])
def test_steps_that_do_not_increase_are_refused(measure, steps):
    solver = ExponentialMultistep() if measure is ode_order else EulerMaruyama()
    with pytest.raises(ValueError, match="steps must be positive integers that increase"):
        measure(solver, PROBLEMS["VP"], steps=steps)


@pytest.mark.parametrize("measure", [weak_order, strong_order])
def test_samples_that_are_too_few_for_an_error_are_refused(measure):
    with pytest.raises(ValueError, match="samples must be at least 20"):
        measure(EulerMaruyama(), PROBLEMS["VP, three modes"], samples=5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [3.0, 10.0])
def test_the_law_of_wide_modes_is_met_within_the_scatter_of_their_own(scale):
    """Squares of data vary by the fourth power of their scale."""
    data = GaussianMixture(
        [0.5, 0.2, 0.3], [[-scale], [0.2 * scale], [1.2 * scale]], [[[(0.35 * scale) ** 2]]] * 3
    )
    problem = Problem("wide", VPSDE(0.1, 8.0), data)
    found = weak_order(StochasticHeun(), problem, **MIXTURE)
    assert "wrong distribution" not in found.message


@pytest.mark.parametrize(("variance", "reason"), [(1.0, ""), (1e8, "below rounding")])
def test_rounding_is_relative_to_the_size_of_moments(monkeypatch, variance, reason):
    """An error of 1e-9 is beyond the digits of moments of 1e8 alone."""
    monkeypatch.setattr(orders, "moment_error", lambda *arguments: 1e-9)
    data = GaussianMixture([1.0], [[0.0]], [[[variance]]])
    problem = Problem("wide", VPSDE(0.1, 8.0), data)
    found = weak_order(EulerMaruyama(), problem, steps=(32, 64))
    assert [level.reason for level in found.levels] == [reason, reason]


def test_a_time_that_a_reference_was_not_made_for_is_refused():
    reference = GaussianReference(PROBLEMS["VP"], torch.tensor([0.05, 1.0], dtype=torch.float64))
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        reference.moments(0.5)
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        moment_error(EulerMaruyama(), PROBLEMS["VP"], uniform_times(1.0, 0.5, 8), reference)


def test_problems_are_of_the_law_that_they_say():
    g, n = generator(4), 200_000
    problem = PROBLEMS["CLD"]
    z = problem.sample(n, g)[..., 0].numpy()
    mean, covariance = cld_law(1.0)
    error = 5 * math.sqrt(2 / n)
    assert np.abs(z.mean(0) - mean[:, 0]).max() <= error
    assert np.abs(np.cov(z.T) - covariance).max() <= error
    z = problem.sample(n, g, at=0.05)[..., 0].numpy()
    mean, covariance = cld_law(0.05)
    assert np.abs(z.mean(0) - mean[:, 0]).max() <= error
    assert np.abs(np.cov(z.T) - covariance).max() <= error
    assert isinstance(problem.sde, CLD)
    assert isinstance(PROBLEMS["HOLD"].sde, HOLD)
    assert {name: p.name for name, p in PROBLEMS.items()} == {name: name for name in PROBLEMS}
    modes = {name for name, p in PROBLEMS.items() if not p.gaussian}
    kinds = ("two points", "three modes", "three modes", "three modes", "ring", "ring")
    assert sorted(name.split(", ")[1] for name in modes) == sorted(kinds)
