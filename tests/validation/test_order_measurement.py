"""Measured orders and their references, against closed forms and against sampling."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import references
from cldsde import CLD, HOLD, VPSDE, GaussianMixture, LinearSDE
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
from cldsde.solvers.authoring import Facts, PathNoise
from cldsde.validation import (
    GaussianReference,
    Problem,
    moment_error,
    ode_order,
    orders,
    problems,
    reference_kernel,
    strong_order,
    weak_order,
)
from cldsde.validation.cases import FlowCase, PathCase
from cldsde.validation.order_estimate import Verdict
from references import dense
from tolerances import rounding, standard_error

PROBLEMS = problems()
PASS, FAIL = Verdict.PASS, Verdict.FAIL
# scipy's method of order 8 at a relative tolerance of 1e-13, over a hundred steps.
INTEGRATED = 1e-11
GAUSSIAN = GaussianMixture([1.0], [[0.3]], [[[0.25]]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def functions():
    """Matrices that do not commute, as polynomials."""
    A = [[-0.5, 3.0], [-3.0, -4.0]], [[0.25, 3.0], [-4.0, 0.5]]
    G = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, -0.5]]
    first, second = (lambda t, m=matrices: tensor(*m[0]) + t * tensor(*m[1]) for matrices in (A, G))
    sde = LinearSDE.from_functions(first, second, initial_covariance=[[0.0, 0.0], [0.0, 0.04]])
    exact = references.Polynomial(A, G)
    exact.own = references.matrix([[0.0, 0.0], [0.0, 0.04]])
    return sde, exact


KERNELS: dict[str, Any] = {
    "VP": lambda: (VPSDE(0.1, 8.0), references.vp(0.1, 8.0)),
    "VE": lambda: (PROBLEMS["VE"].sde, references.ve(0.1, 5.0)),
    "CLD": lambda: (CLD(), references.cld()),
    "HOLD": lambda: (HOLD(), references.hold()),
    "functions": functions,
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.01), (0.3, 0.35), (0.1, 0.9), (0.0, 1.0)])
@every_kernel
def test_the_reference_kernel_is_the_exact_one(name, s, t):
    sde, exact = KERNELS[name]()
    psi, Q = reference_kernel(sde, s, t)
    mean, covariance, _ = (x[0] for x in references.as_tensors([exact.transition(s, t)]))
    assert (psi - mean).abs().max() <= INTEGRATED
    deviation = covariance.diagonal().sqrt()
    assert ((Q - covariance).abs() <= INTEGRATED * torch.outer(deviation, deviation)).all()


@pytest.mark.parametrize("many", [False, True])
@every_kernel
def test_moments_and_flows_of_the_reference_are_the_exact_ones(name, many):
    """The flow takes the distribution at t to the one at u; also where times are many."""
    sde, exact = KERNELS[name]()
    initial = references.matrix(exact.own).copy()
    initial[0, 0] += 0.25
    wanted = [0.05, 0.2, 0.6, 1.0]
    between = np.linspace(0.05, 1.0, 101).tolist() if many else []
    reference = GaussianReference(Problem(name, sde, GAUSSIAN), tensor(*wanted, *between))
    means, covariances, _ = references.as_tensors([exact.marginal(t, initial) for t in wanted])
    moments = dict(zip(wanted, zip(0.3 * means[..., :1], covariances, strict=True), strict=True))
    for t, (mean, covariance) in moments.items():
        found = reference.moments(t)
        size = float(covariance.abs().max())
        assert (found[0] - mean).abs().max() <= INTEGRATED
        assert (found[1] - covariance).abs().max() <= INTEGRATED * size
    eye = torch.eye(sde.components, dtype=torch.float64).unsqueeze(-1)
    for t, u in [(1.0, 0.05), (0.6, 0.2), (0.2, 0.05), (0.6, 0.6)]:
        (m_t, C_t), (m_u, C_u) = moments[t], moments[u]
        psi = references.as_tensors([exact.transition(u, t)])[0][0]
        # Inverses of Ψ and Σ cost their condition.
        loss = float(torch.linalg.cond(C_t) * torch.linalg.cond(psi) * C_t.abs().max())
        # The flow as an affine map, from its values at the mean and at unit vectors.
        origin = reference.flow(m_t[None], t, u)[0]
        assert (origin - m_u).abs().max() <= INTEGRATED
        flow = (reference.flow(eye + m_t, t, u)[..., 0] - origin[:, 0]).T
        assert (flow @ C_t @ flow.T - C_u).abs().max() <= INTEGRATED * loss


@pytest.mark.parametrize("name", ["CLD", "HOLD"])
def test_the_flow_of_the_reference_solves_its_differential_equation(name):
    sde, exact = KERNELS[name]()
    reference = GaussianReference(Problem(name, sde, GAUSSIAN), tensor(0.05, 1.0))
    eye = torch.eye(sde.components, dtype=torch.float64).unsqueeze(-1)
    origin = reference.flow(torch.zeros_like(eye[:1]), 1.0, 0.05)
    found = (reference.flow(eye, 1.0, 0.05) - origin)[..., 0].T
    expected = torch.from_numpy(dense(exact).flow(1.0, 0.05)[-1])
    # Both integrate at 1e-13; a flow lengthens errors by at most its own norm.
    assert (found - expected).abs().max() <= INTEGRATED * (1 + float(expected.norm()))


def test_the_reference_is_for_gaussian_data_at_its_own_times():
    for name in ("CLD, three modes", "CLD, ring"):
        with pytest.raises(ValueError, match="Gaussian data of one dimension"):
            GaussianReference(PROBLEMS[name], tensor(0.05, 1.0))
    reference = GaussianReference(PROBLEMS["VP"], tensor(0.05, 1.0))
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        reference.moments(0.5)
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        moment_error(EulerMaruyama(), PROBLEMS["VP"], uniform_times(1.0, 0.5, 8), reference)


# Cases: paths and flows of a problem -----------------------------------------------------------


@functools.cache
def flow_case(name, samples=6):
    """A few samples, whose flow is found to rounding once for all tests."""
    return FlowCase(PROBLEMS[name], samples, generator(1))


def test_the_flow_of_a_mixture_keeps_shares_in_one_dimension():
    """The flow in one dimension is monotone: it takes quantiles to quantiles."""
    problem = PROBLEMS["VP, three modes"]
    case = flow_case(problem.name)

    def share(x, t):
        kernel = problem.sde.marginal(t)
        scale, noise = float(kernel.mean), float(kernel.covariance)
        total = torch.zeros_like(x)
        weights = problem.data.weights / problem.data.weights.sum()
        for w, m, C in zip(weights, problem.data.means, problem.data.covariances, strict=True):
            total += w * torch.special.ndtr((x - scale * m) / (scale**2 * C.item() + noise) ** 0.5)
        return total

    start, end = case.start.flatten(), case.end.flatten()
    # The integrator's tolerance, times a density that the flow may multiply by ten.
    assert (share(end, 0.05) - share(start, 1.0)).abs().max() <= 10 * INTEGRATED
    assert float((start - end).abs().max()) > 0.1  # not the identity


@pytest.mark.parametrize("name", ["VP", "VE", "CLD", "CLD, rotation", "VP, three modes"])
def test_the_end_of_a_flow_is_as_accurate_as_it_says(name):
    """Against a solver of the package at a tolerance near rounding, for each sample."""
    problem = PROBLEMS[name]
    case = flow_case(name)
    strict = ProbabilityFlow(method="dopri8", rtol=3e-14, atol=3e-14, pace="sample")
    found = solve(problem.process, strict, case.start, uniform_times(1.0, 0.05, 1))
    error = float((found.state - case.end).square().mean().sqrt())
    steps = found.nfev / strict.facts.nfe_per_step
    # Its steps err by the tolerance each, which add up like a random walk.
    assert error <= case.accuracy + strict.rtol * math.sqrt(steps)


def test_the_rotation_is_stationary_and_its_flow_keeps_what_it_turns():
    """Φ of the flow keeps zᵀ Σ⁻¹ z with Σ = diag(1, M)."""
    problem = PROBLEMS["CLD, rotation"]
    reference = GaussianReference(problem, tensor(problem.end, problem.start))
    scale, case, sizes = tensor(1.0, 0.25), flow_case(problem.name), []
    for z, t in ((case.start, problem.start), (case.end, problem.end)):
        mean, covariance = reference.moments(t)
        assert (covariance - scale.diag()).abs().max() <= INTEGRATED
        sizes.append(((z - mean)[..., 0].square() / scale).sum(1))
    # Squares of states below 4.
    assert (sizes[0] - sizes[1]).abs().max() <= 2 * 16 * INTEGRATED
    assert float((case.start - case.end).abs().max()) > 0.1


SAMPLES = 20_000
ONE = standard_error(1.0, SAMPLES, number=5)
# A covariance of normals of unit variance has at most √2 of the error of a mean.
TWO = math.sqrt(2) * ONE


@pytest.mark.parametrize("name", ["VP", "CLD"])
def test_exact_paths_end_in_the_distribution_and_hang_together_with_their_noise(name):
    """The end is N(m, Σ), and its covariance with the path's increments ∫Φ_1 G over each of them.

    Once more Φ_1(u, t) = Σ_u Ψ(t, u)ᵀ Σ_t⁻¹.
    """
    problem, cells, exact = PROBLEMS[name], 64, dense(KERNELS[name]()[1])
    times = uniform_times(1.0, 0.05, cells)
    case = PathCase(problem, times, SAMPLES, generator(2))
    covariance, z = exact.covariance(0.05), case.end[..., 0].numpy()
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(z.mean(0) - exact.mean(0.05)) <= ONE * deviation).all()
    scale = np.outer(deviation, deviation)
    assert (np.abs(np.cov(z.T).reshape(scale.shape) - covariance) <= TWO * scale).all()
    x, w = np.polynomial.legendre.leggauss(40)
    for every in (4, 16):
        count, ends = cells // every, times[::every].tolist()
        noise = EulerMaruyama().path_noise(problem.process, times[::every])
        draws = torch.cat(case.draws(noise, every), dim=1)[..., 0].numpy()
        # Increments over different steps are independent and, over √h, of unit variance.
        assert np.abs(np.cov(draws.T) - np.eye(count)).max() <= TWO
        together = (z - z.mean(0)).T @ draws / SAMPLES
        for i, (t, u) in enumerate(itertools.pairwise(ends)):
            nodes = u + (t - u) * (1 + x) / 2
            G = np.sqrt(exact.clock.rate(nodes))[:, None, None] * exact.Q_root
            pull = exact.backward(np.full_like(nodes, 0.05), nodes) @ G
            expected = (w[:, None, None] * pull).sum(0)[:, 0] * math.sqrt(t - u) / 2
            assert (np.abs(together[:, i] - expected) <= TWO * deviation).all()
    # The last increment says a good deal about the end of a path.
    assert (np.abs(expected) > 3 * ONE * deviation).any()


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
    times = uniform_times(1.0, 0.05, 32)
    case = PathCase(PROBLEMS["CLD"], times, SAMPLES, generator(5))
    noise = TwoNormals().path_noise(PROBLEMS["CLD"].process, times[::every])
    draws = torch.stack(case.draws(noise, every))[..., 0].numpy()
    expected = np.array([[1, math.sqrt(3) / 2], [math.sqrt(3) / 2, 1]])
    for step in draws:
        assert np.abs(np.cov(step.T) - expected).max() <= TWO
    # Over different steps they are independent.
    assert np.abs(draws[0].T @ draws[-1] / SAMPLES).max() <= ONE
    # SRK takes ΔW/√h and (U/h − ΔW/2)/√(h/12): independent standard normals.
    case = PathCase(PROBLEMS["VP"], times, SAMPLES, generator(6))
    noise = TorchSDE(method="srk").path_noise(PROBLEMS["VP"].process, times[::every])
    draws = torch.cat(case.draws(noise, every), dim=1)[..., 0].numpy()
    assert np.abs(np.cov(draws.T) - np.eye(len(draws.T))).max() <= TWO


def test_problems_are_of_the_distribution_that_they_say():
    exact, one = dense(references.cld()), standard_error(1.0, SAMPLES, number=5)
    for time in (1.0, 0.05):
        z = PROBLEMS["CLD"].sample(SAMPLES, generator(4), at=time)[..., 0].numpy()
        # Standard deviations are at most 1.
        assert np.abs(z.mean(0) - exact.mean(time)).max() <= one
        assert np.abs(np.cov(z.T) - exact.covariance(time)).max() <= math.sqrt(2) * one
    assert {name: p.name for name, p in PROBLEMS.items()} == {name: name for name in PROBLEMS}
    modes = {name for name, p in PROBLEMS.items() if not p.gaussian}
    kinds = ("two points", "three modes", "three modes", "three modes", "ring", "ring")
    assert sorted(name.split(", ")[1] for name in modes) == sorted(kinds)


# Orders ----------------------------------------------------------------------------------------

VERDICT = 0.25  # by which a measured order may fall short of the declared one
QUICK = (32, 64, 128, 256)
FEWER = (16, 32, 64, 128)


def declaring(solver, **orders):
    """The same solver with other facts."""

    class Declaring(type(solver)):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, **orders)

    return Declaring(**{name: getattr(solver, name) for name in solver.__dataclass_fields__})


# At these steps h d / (2 log 2), what the next term of the error leaves of a local order, is below
# the last number of a row.
WEAK: list[Any] = [
    (EulerMaruyama(), "CLD", 1, 0.15),
    (SSCS(), "VP", 1, 0.15),
    (SSCS(score_step="midpoint"), "CLD, linear schedule", 2, 0.15),
    (StochasticHeun(), "VE", 2, 0.15),
    (ExponentialMultistep(order=2, stochasticity=1.0), "VP", 2, 0.15),
    (TorchSDE(method="srk"), "VP", 2, 0.15),
]
ODE: list[Any] = [
    (TorchDiffEq(method="rk4"), "VE", 4, 0.15),
    (TorchDiffEq(method="heun2"), "VP", 2, 0.1),
    # Adaptive solvers take even steps here.
    (TorchDiffEq(method="dopri5"), "VE", 5, 0.3),
    (ProbabilityFlow(method="bosh3"), "VP", 3, 0.3),
    (ExponentialMultistep(order=2), "VP", 2, 0.1),
    (ExponentialMultistep(order=3), "CLD", 3, 0.1),
    (ProbabilityFlow(method="dopri8"), "CLD, rotation", 8, 0.15),
]


@pytest.mark.parametrize(("solver", "problem", "order", "near"), WEAK, ids=repr)
def test_weak_orders_are_those_declared_and_no_higher(solver, problem, order, near):
    assert solver.facts.weak_order == order
    found = weak_order(solver, PROBLEMS[problem], steps=QUICK)
    assert found.verdict is PASS
    assert found.order == pytest.approx(order, abs=near)
    assert [level.step for level in found.levels] == [1 / n for n in QUICK]
    errors = [moment_error(solver, PROBLEMS[problem], uniform_times(1.0, 0.05, n)) for n in QUICK]
    # Moments to rounding, of which an error of the second order is 1e-5.
    assert [x.error for x in found.levels] == pytest.approx(errors, rel=rounding(64 * 40, 1e5))
    if solver == EulerMaruyama():  # a claim is read from the facts, whatever the solver
        claim = declaring(solver, weak_order=order + 1)
        wrong = weak_order(claim, PROBLEMS[problem], steps=QUICK)
        assert (wrong.verdict, wrong.order) == (FAIL, found.order)


@pytest.mark.parametrize(("solver", "problem", "order", "near"), ODE, ids=repr)
def test_ode_orders_are_those_declared_and_no_higher(solver, problem, order, near):
    assert solver.facts.ode_order == order
    case = flow_case(problem, 10 if order == 8 else 6)
    # Of the fifth order there is little above rounding at 256 steps, of the eighth at 80.
    steps = {4: FEWER, 5: FEWER, 8: (20, 28, 40, 57, 80)}.get(order, QUICK)
    found = ode_order(solver, PROBLEMS[problem], steps=steps, case=case)
    assert found.verdict is PASS
    assert found.order == pytest.approx(order, abs=near)
    assert [level.step for level in found.levels] == [1 / n for n in steps]
    if solver == ExponentialMultistep(order=3):
        claim = declaring(solver, ode_order=order + 1)
        assert ode_order(claim, PROBLEMS[problem], steps=steps, case=case).verdict is FAIL


@pytest.mark.parametrize(
    ("solver", "problem", "order", "wrong", "options"),
    [
        (EulerMaruyama(), "CLD", 1, 1.5, {}),
        (StochasticHeun(), "VP", 1, 1.5, {}),
        # Along lines the term that limits SRK to 3/2, the second derivative of the drift, is zero.
        (TorchSDE(method="srk"), "VP", 2, 2.5, {}),
        (TorchSDE(method="srk"), "VP, three modes", 1.5, 2, {"steps": (*FEWER, 256)}),
        (EulerMaruyama(), "VP, three modes", 1, 2, {"steps": (8, *FEWER)}),
    ],
)
def test_strong_orders_are_those_declared_and_no_higher(solver, problem, order, wrong, options):
    steps = options.get("steps", QUICK)
    samples = 3000 if order == 1.5 else 1000
    paths = PathCase(PROBLEMS[problem], uniform_times(1.0, 0.05, steps[-1]), samples, generator(1))
    found = strong_order(solver, PROBLEMS[problem], steps=steps, case=paths)
    assert found.verdict is PASS
    assert found.order == pytest.approx(order, abs=VERDICT)
    assert all(0 < level.standard_error < 0.2 * level.error for level in found.levels)
    # On a mixture errors are distances between levels.
    mixture = not PROBLEMS[problem].gaussian
    assert [x.step for x in found.levels] == [1 / n for n in (steps[:-1] if mixture else steps)]
    claim = declaring(solver, strong_order=wrong)
    assert strong_order(claim, PROBLEMS[problem], steps=steps, case=paths).verdict is FAIL


def test_orders_of_a_solver_that_diverges_come_without_a_warning():
    class Diverging(EulerMaruyama):
        def step(self, z, *arguments):
            return super().step(z, *arguments)[0] / 0, ()

    found = strong_order(Diverging(), PROBLEMS["VP"], steps=(8, 16, 32), samples=100)
    assert not any(math.isfinite(level.error) for level in found.levels)


class Ending(EulerMaruyama):
    """Euler–Maruyama whose last step goes half a unit too far."""

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return z + 0.5 * (i == len(tables.stages[0].state) - 1), memory


# Of a declared 1.2 an order of 1 is neither confirmed nor refuted; of 1 it is confirmed.
@pytest.mark.parametrize("declared", [1.0, 1.2])
def test_samples_of_another_distribution_fail_whatever_the_order_is(monkeypatch, declared):
    monkeypatch.setattr(orders, "_EXACT_SAMPLES", 50_000)
    problem, few = PROBLEMS["VP, three modes"], {"steps": FEWER, "samples": 5000}
    found = weak_order(declaring(Ending(), weak_order=declared), problem, **few)
    assert found.verdict is FAIL
    assert "wrong distribution" in found.message
    if declared == 1:
        assert "wrong distribution" not in weak_order(EulerMaruyama(), problem, **few).message


class Drifting(EulerMaruyama):
    """Euler–Maruyama with a drift that is off by a small multiple of z."""

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        (stage,), h = tables.stages, -times.diff()[:, None, None]
        state = torch.tensor(stage.state, dtype=torch.float64)
        eye = torch.eye(state.shape[-1], dtype=torch.float64)
        moved = stage._replace(state=(state - 0.2 * h * eye).tolist())
        return tables._replace(stages=(moved,))


MIXTURE: dict[str, Any] = {"steps": (*FEWER, 256, 512), "samples": 40_000}


@pytest.mark.slow
def test_the_weak_order_on_a_mixture_is_measured_along_shared_paths():
    problem = PROBLEMS["VP, three modes"]
    good = weak_order(EulerMaruyama(), problem, **MIXTURE)
    assert good.verdict is PASS
    assert len(good.levels) == 5
    claimed = weak_order(declaring(EulerMaruyama(), weak_order=2), problem, **MIXTURE)
    assert claimed.verdict is FAIL
    # It converges, at order 1, to another distribution.
    drifting = weak_order(Drifting(), problem, **MIXTURE)
    for found in (good, drifting):
        assert found.order == pytest.approx(1, abs=VERDICT)
    assert drifting.verdict is FAIL
    assert "wrong distribution" in drifting.message
    # Squares of data vary by the fourth power of their scale.
    for scale in (3.0, 10.0):
        means = [[-scale], [0.2 * scale], [1.2 * scale]]
        data = GaussianMixture([0.5, 0.2, 0.3], means, [[[(0.35 * scale) ** 2]]] * 3)
        wide = Problem("wide", VPSDE(0.1, 8.0), data)
        assert "wrong distribution" not in weak_order(StochasticHeun(), wide, **MIXTURE).message


@pytest.mark.parametrize(("variance", "reason"), [(1.0, ""), (1e8, "below rounding")])
def test_rounding_is_relative_to_the_size_of_moments(monkeypatch, variance, reason):
    """An error of 1e-9 is beyond the digits of moments of 1e8 alone."""
    monkeypatch.setattr(orders, "moment_error", lambda *arguments: 1e-9)
    data = GaussianMixture([1.0], [[0.0]], [[[variance]]])
    problem = Problem("wide", VPSDE(0.1, 8.0), data)
    found = weak_order(EulerMaruyama(), problem, steps=(32, 64))
    assert [level.reason for level in found.levels] == [reason, reason]


FINEST = {"steps": (30, 64, 128), "samples": 20}
REJECTED: list[Any] = [
    (strong_order, SSCS(), "CLD", {}, TypeError, "must have `path_noise`"),
    (strong_order, GottaGoFast(), "CLD", {}, TypeError, "fixed grid"),
    (strong_order, TorchDiffEq(method="rk4"), "CLD", {}, TypeError, "must have `path_noise`"),
    (weak_order, SSCS(), "CLD, three modes", {}, TypeError, "shared Brownian paths"),
    (weak_order, GottaGoFast(), "CLD", {}, TypeError, "fixed grid"),
    (weak_order, ProbabilityFlow(), "VP, three modes", {}, TypeError, "fixed grid"),
    (weak_order, SSCS(), "VE", {}, ValueError, "SSCS needs"),
    (moment_error, SSCS(), "VE", {"times": tensor(1.0, 0.5)}, ValueError, "SSCS needs"),
    (ode_order, GottaGoFast(), "CLD", {}, ValueError, "steps of one length"),
    # Over 30 steps there is no grid of the 128 cells.
    (strong_order, EulerMaruyama(), "VP", FINEST, ValueError, "30"),
    (strong_order, EulerMaruyama(), "VP, three modes", FINEST, ValueError, "30"),
    (weak_order, EulerMaruyama(), "VP, three modes", FINEST, ValueError, "30"),
    *(
        (measure, EulerMaruyama(), "VP, three modes", {"samples": 5}, ValueError, "at least 20")
        for measure in (weak_order, strong_order)
    ),
    *(
        (measure, solver, "VP", {"steps": steps}, ValueError, "positive integers that increase")
        for measure, solver in (
            (weak_order, EulerMaruyama()),
            (strong_order, EulerMaruyama()),
            (ode_order, ExponentialMultistep()),
        )
        for steps in ((), (64, 32), (32, 32), (0, 32), (32, 64.5))
    ),
]


@pytest.mark.parametrize(("measure", "solver", "problem", "options", "error", "words"), REJECTED)
def test_measurements_that_cannot_be_made_are_rejected(
    measure, solver, problem, options, error, words
):
    with pytest.raises(error, match=words):
        measure(solver, PROBLEMS[problem], **options)
    if measure is not moment_error:
        with pytest.raises(TypeError, match=r"problem must be a Problem, .*; got 'CLD'"):
            measure(EulerMaruyama(), "CLD")
