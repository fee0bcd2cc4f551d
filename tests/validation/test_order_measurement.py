"""Measured orders and their references, against closed forms and against sampling."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

import references
from cldsde import HOLD, VPSDE, GaussianMixture, LinearSDE
from cldsde.solvers import (
    SSCS,
    EulerMaruyama,
    ExponentialEuler,
    ExponentialMultistep,
    GottaGoFast,
    ProbabilityFlow,
    StochasticHeun,
    TorchDiffEq,
    TorchSDE,
    solve,
    uniform_times,
)
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
from faulty_solvers import altered, declaring
from probes import generator, tensor
from references import dense
from tolerances import rounding, standard_error, standard_error_of_variance

PROBLEMS = problems()
PASS, FAIL = Verdict.PASS, Verdict.FAIL
# scipy's method of order 8 at a relative tolerance of 1e-13, over a hundred steps.
INTEGRATED = 1e-11
GAUSSIAN = GaussianMixture([1.0], [[0.3]], [[[0.25]]])


def functions():
    """Matrices that do not commute, as polynomials."""
    A = [[-0.5, 3.0], [-3.0, -4.0]], [[0.25, 3.0], [-4.0, 0.5]]
    G = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, -0.5]]
    first, second = (lambda t, m=matrices: tensor(m[0]) + t * tensor(m[1]) for matrices in (A, G))
    sde = LinearSDE.from_functions(first, second, initial_covariance=[[0.0, 0.0], [0.0, 0.04]])
    exact = references.Polynomial(A, G)
    exact.own = references.matrix([[0.0, 0.0], [0.0, 0.04]])
    return sde, exact


KERNELS: dict[str, Any] = {
    "VE": lambda: (PROBLEMS["VE"].sde, references.ve(0.1, 5.0)),
    "HOLD": lambda: (HOLD(), references.hold()),
    "functions": functions,
}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_moments_and_flows_of_the_reference_are_the_exact_ones(name, many):
    """The flow takes the distribution at t to the one at u; also if times are many."""
    sde, exact = KERNELS[name]()
    for s, t in [(0.0, 0.01), (0.3, 0.35), (0.0, 1.0)]:
        psi, Q = reference_kernel(sde, s, t)
        mean, covariance, _ = (x[0] for x in references.as_tensors([exact.transition(s, t)]))
        assert (psi - mean).abs().max() <= INTEGRATED
        deviation = covariance.diagonal().sqrt()
        assert ((Q - covariance).abs() <= INTEGRATED * torch.outer(deviation, deviation)).all()
    initial = references.matrix(exact.own).copy()
    initial[0, 0] += 0.25
    wanted = [0.05, 0.2, 0.6, 1.0]
    between = np.linspace(0.05, 1.0, 101).tolist() if many else []
    reference = GaussianReference(Problem(name, sde, GAUSSIAN), tensor([*wanted, *between]))
    means, covariances, _ = references.as_tensors([exact.marginal(t, initial) for t in wanted])
    moments = dict(zip(wanted, zip(0.3 * means[..., :1], covariances, strict=True), strict=True))
    for t, (mean, covariance) in moments.items():
        found = reference.moments(t)
        size = float(covariance.abs().max())
        assert (found[0] - mean).abs().max() <= INTEGRATED
        assert (found[1] - covariance).abs().max() <= INTEGRATED * size
    eye = torch.eye(sde.components, dtype=torch.float64).unsqueeze(-1)
    for t, u in [(1.0, 0.05), (0.2, 0.05), (0.6, 0.6)]:
        (m_t, C_t), (m_u, C_u) = moments[t], moments[u]
        psi = references.as_tensors([exact.transition(u, t)])[0][0]
        # Inverses of Ψ and Σ cost their condition.
        loss = float(torch.linalg.cond(C_t) * torch.linalg.cond(psi) * C_t.abs().max())
        # The flow as an affine map, from its values at the mean and at unit vectors.
        origin = reference.flow(m_t[None], t, u)[0]
        assert (origin - m_u).abs().max() <= INTEGRATED
        flow = (reference.flow(eye + m_t, t, u)[..., 0] - origin[:, 0]).T
        assert (flow @ C_t @ flow.T - C_u).abs().max() <= INTEGRATED * loss


def test_the_reference_is_for_gaussian_data_at_its_own_times():
    for name in ("CLD, three modes", "CLD, ring"):
        with pytest.raises(ValueError, match="Gaussian data of one dimension"):
            GaussianReference(PROBLEMS[name], tensor([0.05, 1.0]))
    reference = GaussianReference(PROBLEMS["VP"], tensor([0.05, 1.0]))
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        reference.moments(0.5)
    with pytest.raises((ValueError, KeyError), match=r"0\.5"):
        moment_error(EulerMaruyama(), PROBLEMS["VP"], uniform_times(1.0, 0.5, 8), reference)


# Cases: paths and flows of a problem -----------------------------------------------------------


@functools.cache
def flow_case(name, samples=6):
    """A few samples, whose flow is found to rounding once for all tests."""
    return FlowCase(PROBLEMS[name], samples, generator(1))


@pytest.mark.parametrize("name", ["VE", "CLD", "CLD, rotation", "VP, three modes"])
def test_the_end_of_a_flow_is_as_accurate_as_it_says(name):
    """Against a solver of the package at a tolerance near rounding, for each sample."""
    problem, case = PROBLEMS[name], flow_case(name)
    strict = ProbabilityFlow(method="dopri8", rtol=3e-14, atol=3e-14, pace="sample")
    found = solve(problem.process, strict, case.start, uniform_times(1.0, 0.05, 1))
    error = float((found.state - case.end).square().mean().sqrt())
    steps = found.nfev / strict.facts.nfe_per_step
    # Its steps err by the tolerance each, which add up like a random walk.
    assert error <= case.accuracy + strict.rtol * math.sqrt(steps)


SAMPLES = 20_000
ONE = standard_error(1.0, SAMPLES, number=5)
# A covariance of normals of unit variance has at most √2 of the error of a mean.
TWO = math.sqrt(2) * ONE


@pytest.mark.parametrize("time", [1.0, 0.05])
def test_problems_are_of_the_distribution_that_they_say(time):
    exact, z = dense(references.cld()), PROBLEMS["CLD"].sample(SAMPLES, generator(4), at=time)
    # Standard deviations are at most 1.
    assert np.abs(z[..., 0].numpy().mean(0) - exact.mean(time)).max() <= ONE
    assert np.abs(np.cov(z[..., 0].numpy().T) - exact.covariance(time)).max() <= TWO
    assert all(problem.name == name for name, problem in PROBLEMS.items())


def test_increments_of_paths_have_unit_variance():
    """Solvers converge to the ends of paths whatever the common scale of both is."""
    problem, times = PROBLEMS["CLD"], uniform_times(1.0, 0.05, 64)
    case = PathCase(problem, times, 5000, generator(2))
    draws = torch.cat(case.draws(EulerMaruyama().path_noise(problem.process, times), 1))
    error = standard_error_of_variance(1.0, draws.numel(), number=5)
    assert float(draws.square().mean()) == pytest.approx(1, abs=error)


# Orders ----------------------------------------------------------------------------------------

VERDICT = 0.25  # by which a measured order may fall short of the declared one
QUICK = (32, 64, 128, 256)
FEWER = (16, 32, 64, 128)


# At these steps h d / (2 log 2), what the next term of the error leaves of a local order, is below
# the last number of a row.
WEAK: list[Any] = [
    (EulerMaruyama(), "CLD", 1, 0.15),
    (SSCS(score_step="midpoint"), "CLD, linear schedule", 2, 0.15),
    (StochasticHeun(), "VE", 2, 0.15),
    (ExponentialMultistep(order=2, stochasticity=1.0), "VP", 2, 0.15),
]
ODE: list[Any] = [
    (TorchDiffEq(method="rk4"), "VE", 4, 0.15),
    # Adaptive solvers take even steps here.
    (TorchDiffEq(method="dopri5"), "VE", 5, 0.3),
    (ProbabilityFlow(method="bosh3"), "VP", 3, 0.3),
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
    error = moment_error(solver, PROBLEMS[problem], uniform_times(1.0, 0.05, QUICK[1]))
    # Moments to rounding, of which an error of the second order is 1e-5.
    assert found.levels[1].error == pytest.approx(error, rel=rounding(64 * 40, 1e5))
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


# A solver converges to the exact ends of paths only if all of a case hangs together: increments,
# their time integrals for SRK, stochastic integrals for ExponentialEuler, and the ends.
STRONG: list[Any] = [
    (EulerMaruyama(), "CLD", 1, 1.5, QUICK),
    (declaring(ExponentialEuler(), strong_order=1), "CLD, linear schedule", 1, 1.5, QUICK),
    # Along lines the term that limits SRK to 3/2, the second derivative of the drift, is zero.
    (TorchSDE(method="srk"), "VP", 2, 2.5, QUICK),
    (TorchSDE(method="srk"), "VP, three modes", 1.5, 2, (*FEWER, 256)),
    (EulerMaruyama(), "VP, three modes", 1, 2, (8, *FEWER)),
]


@pytest.mark.parametrize(("solver", "problem", "order", "wrong", "steps"), STRONG)
def test_strong_orders_are_those_declared_and_no_higher(solver, problem, order, wrong, steps):
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
    diverging = altered(EulerMaruyama, step=lambda z, *_: z / 0)()
    found = strong_order(diverging, PROBLEMS["VP"], steps=(8, 16, 32), samples=100)
    assert not any(math.isfinite(level.error) for level in found.levels)


def further(z, i, score, tables):
    """The last step goes half a unit too far."""
    return z + 0.5 * (i == len(tables.stages[0].state) - 1)


# Of a declared 1.2 an order of 1 is neither confirmed nor refuted; of 1 it is confirmed.
@pytest.mark.parametrize("declared", [1.0, 1.2])
def test_samples_of_another_distribution_fail_whatever_the_order_is(monkeypatch, declared):
    monkeypatch.setattr(orders, "_EXACT_SAMPLES", 30_000)
    problem, few = PROBLEMS["VP, three modes"], {"steps": FEWER, "samples": 3000}
    found = weak_order(altered(EulerMaruyama, step=further, weak_order=declared)(), problem, **few)
    assert found.verdict is FAIL
    assert "wrong distribution" in found.message
    if declared == 1:
        assert "wrong distribution" not in weak_order(EulerMaruyama(), problem, **few).message


def drifting(tables, times):
    """A drift that is off by a small multiple of z."""
    (stage,), h = tables.stages, -times.diff()[:, None, None]
    state = tensor(stage.state)
    state = state - 0.2 * h * torch.eye(state.shape[-1], dtype=torch.float64)
    return tables._replace(stages=(stage._replace(state=state.tolist()),))


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
    wrong = weak_order(altered(EulerMaruyama, tables=drifting)(), problem, **MIXTURE)
    for found in (good, wrong):
        assert found.order == pytest.approx(1, abs=VERDICT)
    assert wrong.verdict is FAIL
    assert "wrong distribution" in wrong.message
    # Squares of data vary by the fourth power of their scale.
    data = GaussianMixture([0.5, 0.2, 0.3], [[-10.0], [2.0], [12.0]], [[[12.25]]] * 3)
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
PATH, FIXED, INCREASE = "must have `path_noise`", "fixed grid", "positive integers that increase"
EM, MODES = EulerMaruyama(), "VP, three modes"
MEASURES = ((weak_order, EM), (strong_order, EM), (ode_order, ExponentialMultistep()))
REJECTED: list[Any] = [
    *((strong_order, x, "CLD", {}, TypeError, PATH) for x in (SSCS(), TorchDiffEq(method="rk4"))),
    *(
        (measure, GottaGoFast(), "CLD", {}, TypeError, FIXED)
        for measure in (strong_order, weak_order)
    ),
    (weak_order, SSCS(), "CLD, three modes", {}, TypeError, "shared Brownian paths"),
    (weak_order, ProbabilityFlow(), MODES, {}, TypeError, FIXED),
    (weak_order, SSCS(), "VE", {}, ValueError, "SSCS needs"),
    (moment_error, SSCS(), "VE", {"times": tensor([1.0, 0.5])}, ValueError, "SSCS needs"),
    (ode_order, GottaGoFast(), "CLD", {}, ValueError, "steps of one length"),
    # Over 30 steps there is no grid of the 128 cells.
    (strong_order, EM, "VP", FINEST, ValueError, "30"),
    *((measure, EM, MODES, FINEST, ValueError, "30") for measure in (strong_order, weak_order)),
    (weak_order, EM, MODES, {"samples": 5}, ValueError, "at least 20"),
    (strong_order, EM, MODES, {"samples": 5}, ValueError, "at least 20"),
    *(
        (measure, solver, "VP", {"steps": steps}, ValueError, INCREASE)
        for measure, solver in MEASURES
        for steps in ((), (64, 32), (32, 32), (0, 32), (32, 64.5))
    ),
]


@pytest.mark.parametrize(("measure", "solver", "problem", "options", "error", "words"), REJECTED)
def test_measurements_that_cannot_be_made_are_rejected(
    measure, solver, problem, options, error, words
):
    with pytest.raises(error, match=words):
        measure(solver, PROBLEMS[problem], **options)


@pytest.mark.parametrize(("measure", "solver"), MEASURES)
def test_names_are_no_problems(measure, solver):
    with pytest.raises(TypeError, match=r"problem must be a Problem, .*; got 'CLD'"):
        measure(solver, "CLD")
