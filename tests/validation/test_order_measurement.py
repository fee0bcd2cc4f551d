"""Measured orders, exact moments and their references, against closed forms and sampling."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import references
from cldsde import CLD, HOLD, GaussianMixture, LinearSDE, ReverseProcess, solvers
from cldsde.solvers import SSCS, EulerMaruyama, ExponentialMultistep, ProbabilityFlow, uniform_times
from cldsde.validation import GaussianReference, Problem, moment_error, orders, problems
from cldsde.validation.cases import FlowCase, PathCase
from cldsde.validation.moments import propagate_moments
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.orders import ode_order, strong_order, weak_order
from cldsde.validation.reference import reference_kernel
from faulty_solvers import altered, declaring
from gaussian_data import DATA, reverse
from gaussian_data import PROCESSES as GAUSSIAN
from probes import check_normal, generator, tensor, untouchable
from references import dense
from tolerances import rounding, standard_error, standard_error_of_variance

PROBLEMS = problems()
PASS, FAIL = Verdict.PASS, Verdict.FAIL
# scipy's method of order 8 at a relative tolerance of 1e-13, over a hundred steps.
INTEGRATED = 1e-11

# Matrices that do not commute, as polynomials.
OWN, A = [[0.0, 0.0], [0.0, 0.04]], ([[-0.5, 3.0], [-3.0, -4.0]], [[0.25, 3.0], [-4.0, 0.5]])
G = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, -0.5]]
FIRST, SECOND = (lambda t, m=matrices: tensor(m[0]) + t * tensor(m[1]) for matrices in (A, G))
KERNELS: dict[str, Any] = {
    "VE": (PROBLEMS["VE"].sde, references.ve(0.1, 5.0)),
    "HOLD": (HOLD(), references.hold()),
    "functions": (
        LinearSDE.from_functions(FIRST, SECOND, initial_covariance=OWN),
        references.Polynomial(A, G, OWN),
    ),
}


@pytest.mark.parametrize("name", ["VE", "HOLD", pytest.param("functions", marks=pytest.mark.slow)])
def test_kernels_moments_and_flows_of_the_reference_are_the_exact_ones(name):
    """The flow takes the distribution at t to the one at u."""
    sde, exact = KERNELS[name]
    for s, t in [(0.0, 0.01), (0.3, 0.35), (0.0, 1.0)]:
        psi, Q = reference_kernel(sde, s, t)
        mean, covariance, _ = (x[0] for x in references.as_tensors([exact.transition(s, t)]))
        assert (psi - mean).abs().max() <= INTEGRATED
        deviation = covariance.diagonal().sqrt()
        assert ((Q - covariance).abs() <= INTEGRATED * torch.outer(deviation, deviation)).all()
    initial = references.matrix(exact.own).copy()
    initial[0, 0] += 0.25
    wanted = [0.05, 0.2, 0.6, 1.0]
    reference = GaussianReference(Problem(name, sde, DATA), tensor(wanted))
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


@functools.cache
def flow_case(name, samples=6):
    """A few samples, whose flow is found to rounding once for all tests."""
    return FlowCase(PROBLEMS[name], samples, generator(1))


@functools.cache
def path_case(name, cells=128, samples=1000):
    """Paths over a fine grid, drawn once for all solvers and levels."""
    return PathCase(PROBLEMS[name], uniform_times(1.0, 0.05, cells), samples, generator(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLD, rotation", "VP, three modes"])
def test_the_end_of_a_flow_is_as_accurate_as_it_says(name):
    """Against a solver of the package at a tolerance near rounding, for each sample."""
    problem, case = PROBLEMS[name], flow_case(name)
    strict = ProbabilityFlow(method="dopri8", rtol=3e-14, atol=3e-14, pace="sample")
    found = solvers.solve(problem.process, strict, case.start, uniform_times(1.0, 0.05, 1))
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


VERDICT = 0.25  # by which a measured order may fall short of the declared one
EM = EulerMaruyama()
FEWER, MODES = (16, 32, 64, 128), "VP, three modes"

# Solver, problem, order, steps, and a claim that is to fail, or None: once for each kind of errors,
# since the estimate of the order is tested by itself.
WEAK: list[Any] = [
    (EulerMaruyama(), "CLD", 1, FEWER, 2),
    (ExponentialMultistep(order=2, stochasticity=1.0), "VP", 2, FEWER, None),
]
ODE: list[Any] = [
    (ProbabilityFlow(method="bosh3"), "VP", 3, FEWER, None),  # adaptive: takes even steps here
    (ExponentialMultistep(order=3), "CLD", 3, FEWER, 4),
]
FIRST_ORDER = ("euler", "euler_heun", "midpoint")  # milstein is euler for additive noise
# A solver converges to the exact ends of paths only if all of a case hangs together: increments,
# their time integrals for SRK, stochastic integrals for ExponentialEuler, and the ends.
STRONG: list[Any] = [
    (EulerMaruyama(), "CLD", 1, FEWER, 1.5),
    (declaring(solvers.ExponentialEuler(), strong_order=1), "CLD, linear schedule", 1, FEWER, None),
    # Along lines the term that limits SRK to 3/2, the second derivative of the drift, is zero.
    (solvers.TorchSDE(method="srk"), "VP", 2, FEWER, None),
    (solvers.TorchSDE(method="srk"), MODES, 1.5, (*FEWER, 256), None),
    (solvers.TorchSDE(method="heun"), "VP", 1, FEWER, None),
    (EulerMaruyama(), MODES, 1, (8, *FEWER), 2),
    (EulerMaruyama(), "VE", 1, FEWER, None),
    (EulerMaruyama(), "HOLD", 1, FEWER, None),
    (solvers.StochasticHeun(), "VP", 1, FEWER, 1.5),
    (solvers.StochasticHeun(), "CLD, linear schedule", 1, (*FEWER, 256), None),
    (solvers.StochasticHeun(), "PSLD", 1, (*FEWER[1:], 256), None),  # has two sources of noise
]
# More solvers and problems. Of the fifth order there is little above rounding at 256 steps, of the
# eighth at 80.
MORE: list[Any] = [
    (weak_order, SSCS(score_step="midpoint"), "CLD, linear schedule", 2, FEWER),
    (weak_order, solvers.StochasticHeun(), "VE", 2, FEWER),
    (ode_order, solvers.TorchDiffEq(method="rk4"), "VE", 4, FEWER),
    (ode_order, solvers.TorchDiffEq(method="dopri5"), "VE", 5, FEWER),
    (ode_order, ProbabilityFlow(method="dopri8"), "CLD, rotation", 8, (20, 28, 40, 57, 80)),
    *((strong_order, solvers.TorchSDE(method=x), "VP", 1, FEWER) for x in FIRST_ORDER),
    *(
        (strong_order, solvers.TorchSDE(method=x), MODES, 1, (8, *FEWER, 256))
        for x in ("heun", *FIRST_ORDER)
    ),
]
ORDERS = [
    *((weak_order, *row) for row in WEAK),
    *((ode_order, *row) for row in ODE),
    *((strong_order, *row) for row in STRONG),
    *(pytest.param(*row, None, marks=pytest.mark.slow) for row in MORE),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("measure", "solver", "name", "order", "steps", "wrong"), ORDERS)
def test_orders_are_those_declared_and_no_higher(measure, solver, name, order, steps, wrong):
    problem, claim, options = PROBLEMS[name], measure.__name__, {"steps": steps}
    if measure is ode_order:
        options["case"] = flow_case(name, 10 if order == 8 else 6)
    if measure is strong_order:
        options["case"] = path_case(name, steps[-1], 3000 if order == 1.5 else 1000)
    found = measure(solver, problem, **options)
    assert (found.verdict, found.expected) == (PASS, getattr(solver.facts, claim))
    assert measure is strong_order or found.expected == order
    # At these steps h d / (2 log 2), what the next term of the error leaves of a local order, is
    # below 0.15; adaptive solvers and samples have a little more.
    loose = solver.facts.adaptive or measure is strong_order
    assert found.order == pytest.approx(order, abs=VERDICT if loose else 0.15)
    if measure is strong_order:
        assert all(0 < level.standard_error < 0.2 * level.error for level in found.levels)
    # On a mixture errors are distances between levels.
    mixture = not problem.gaussian
    assert [level.step for level in found.levels] == [1 / n for n in steps[: len(steps) - mixture]]
    if measure is weak_order:
        error = moment_error(solver, problem, uniform_times(1.0, 0.05, steps[1]))
        # Moments to rounding, of which an error of the second order is 1e-5.
        assert found.levels[1].error == pytest.approx(error, rel=rounding(64 * 40, 1e5), abs=0)
    if wrong is not None:  # a claim is read from the facts, whatever the solver
        failed = measure(declaring(solver, **{claim: wrong}), problem, **options)
        assert (failed.verdict, failed.order) == (FAIL, found.order)


def further(z, i, score, tables):
    """The last step goes 0.2 too far; five standard errors and four errors allow 0.15."""
    return z + 0.2 * (i == len(tables.stages[0].state) - 1)


@pytest.mark.slow
@pytest.mark.one_in(2)
def test_samples_of_another_distribution_fail_whatever_the_order_is(monkeypatch):
    monkeypatch.setattr(orders, "_EXACT_SAMPLES", 30_000)
    problem, few = PROBLEMS[MODES], {"steps": (8, 16, 32, 64), "samples": 3000}
    found = weak_order(altered(EulerMaruyama, step=further)(), problem, **few)
    assert found.verdict is FAIL
    assert "wrong distribution" in found.message
    assert "wrong distribution" not in weak_order(EM, problem, **few).message


@pytest.mark.slow
def test_the_weak_order_on_a_mixture_is_measured_along_shared_paths():
    for claim, verdict in ((1, PASS), (2, FAIL)):
        solver = declaring(EulerMaruyama(), weak_order=claim)
        found = weak_order(solver, PROBLEMS[MODES], steps=(*FEWER, 256, 512), samples=40_000)
        assert (found.verdict, len(found.levels)) == (verdict, 5)
        assert found.order == pytest.approx(1, abs=VERDICT)


PATH, FIXED, INCREASE = "must have `path_noise`", "fixed grid", "positive integers that increase"
MEASURES = ((weak_order, EM), (strong_order, EM), (ode_order, ExponentialMultistep()))
REJECTED: list[Any] = [
    (strong_order, SSCS(), "CLD", {}, TypeError, PATH),
    (weak_order, solvers.GottaGoFast(), "CLD", {}, TypeError, FIXED),
    (weak_order, SSCS(), "CLD, three modes", {}, TypeError, "shared Brownian paths"),
    (weak_order, SSCS(), "VE", {}, ValueError, "SSCS needs"),
    (ode_order, solvers.GottaGoFast(), "VP", {}, ValueError, "steps of one length"),
    (ode_order, EM, "CLD", {}, ValueError, "must be deterministic"),
    # Over 30 steps there is no grid of the 128 cells.
    (strong_order, EM, "VP", {"steps": (30, 64, 128), "samples": 20}, ValueError, "30"),
    (weak_order, EM, MODES, {"samples": 5}, ValueError, "at least 20"),
    *((f, x, "VP", {"steps": (32, 32)}, ValueError, INCREASE) for f, x in MEASURES),
    *((f, x, "VP", {"steps": 32}, ValueError, INCREASE) for f, x in MEASURES),
    *((f, x, "VP", {"grid": "root"}, TypeError, "grid must be a function") for f, x in MEASURES),
    (ode_order, ExponentialMultistep(), "VP", {"samples": 0}, ValueError, "must be at least 1"),
    (ode_order, "em", "VP", {}, TypeError, "solver must be a solver"),
]


@pytest.mark.parametrize(("measure", "solver", "problem", "options", "error", "words"), REJECTED)
def test_impossible_measurements_are_rejected(measure, solver, problem, options, error, words):
    with pytest.raises(error, match=words):
        measure(solver, PROBLEMS[problem], **options)


ARGUMENTS: list[Any] = [
    ({"name": 3}, TypeError, "name must be a str; got 3"),
    ({"sde": CLD}, TypeError, r"sde must be a LinearSDE; got CLD \(write it with parentheses"),
    ({"data": [0.3]}, TypeError, r"data must be a GaussianMixture; got \[0.3\]"),
    ({"end": "1e-3"}, TypeError, "end must be a real number; got '1e-3'"),
    ({"end": 0.0}, ValueError, "end must be finite and positive; got 0.0"),
    ({"start": 2}, ValueError, r"start must lie in \[0, 1\]; got 2"),
    ({"end": 0.5, "start": 0.5}, ValueError, "end must be below start, 0.5; got 0.5"),
    ({"checks": "weak order"}, TypeError, "checks must be a collection of kinds; got 'weak order'"),
    ({"checks": ["order"]}, ValueError, "checks must be one of 'ODE order', .*; got 'order'"),
    ({"quick": 1}, TypeError, "quick must be a bool; got 1"),
    ({"ode_orders": 5}, TypeError, "ode_orders must be two numbers; got 5"),
    ({"quick_ode_orders": (5, 4)}, ValueError, r"quick_ode_orders must lie in \[0, 4\]; got 5"),
]


@pytest.mark.parametrize(("changed", "error", "words"), ARGUMENTS)
def test_a_problem_names_an_argument_that_does_not_fit(changed, error, words):
    with pytest.raises(error, match=words):
        dataclasses.replace(PROBLEMS["CLD"], **changed)


# Exact moments of solvers with Gaussian data, against recursions from matrix exponentials

# The score is -C^-1 (z - m). The reverse drift per unit of falling time is a z + c with
# a = -F - G G^T C^-1. Kernels and references are both good to some 1e-14 here, and steps are mostly
# contractions: several exponentials of matrices of the size |A| B <= 40.
END, RECURSION = 0.05, rounding(64 * 40)


def euler_maruyama(exact, times):
    """m' = X m + b and C' = X C X^T + h G G^T."""
    m, C = exact.mean(times[0]), exact.covariance(times[0])
    for t, u in itertools.pairwise(times):
        kick = (t - u) * exact.clock.rate(t)
        pull = exact.Q @ np.linalg.inv(exact.covariance(t))
        X = np.eye(len(m)) - kick * (exact.A + pull)
        m = X @ m + kick * pull @ exact.mean(t)
        C = X @ C @ X.T + kick * exact.Q
    return m, C


GRIDS = [("uniform", 1, True), ("root", 7, False), ("quadratic", 25, True)]


@pytest.mark.parametrize(("kind", "steps", "known"), GRIDS)
@pytest.mark.parametrize("name", list(GAUSSIAN))
def test_a_solver_has_the_moments_of_its_recursion(name, kind, steps, known):
    times, (sde, exact) = getattr(solvers, f"{kind}_times")(1.0, END, steps), GAUSSIAN[name]
    # The score knows its times beforehand, or is told each.
    process = reverse(name, lambda score: score if known else lambda z, t: score(z, t.clone()))
    start = torch.from_numpy(exact.mean(1.0))[:, None], torch.from_numpy(exact.covariance(1.0))
    mean, covariance = propagate_moments(process, EM, times, *start)
    assert mean.dtype == covariance.dtype == torch.float64
    assert mean.shape == (sde.components, 1)
    m, C = euler_maruyama(exact, times.tolist())
    assert abs(mean[:, 0].numpy() - m).max() <= RECURSION * abs(C).max()
    assert abs(covariance.numpy() - C).max() <= RECURSION * abs(C).max()


@pytest.mark.parametrize("name", ["VE", "CLD, linear schedule"])
def test_the_moment_error_is_the_distance_of_the_recursion_from_the_exact_moments(name):
    times = uniform_times(1.0, END, 32)
    exact = GAUSSIAN[name.removesuffix(" schedule")][1]
    m, C = euler_maruyama(exact, times.tolist())
    distances = [abs(m - exact.mean(END)).max(), abs(C - exact.covariance(END)).max()]
    found = moment_error(EM, PROBLEMS[name], times)
    assert found == pytest.approx(max(distances), abs=RECURSION)


@pytest.mark.parametrize("solver", [EM, SSCS()])
def test_directions_of_the_data_are_kept_apart(solver):
    data = GaussianMixture([1.0], [[0.3, -1.0]], [[[0.25, 0.0], [0.0, 0.04]]])
    sde, times, zero = CLD(), solvers.quadratic_times(1.0, END, 6), torch.zeros(2, 2)
    start = torch.kron(sde.prior.covariance, torch.eye(2, dtype=torch.float64))
    process = ReverseProcess(sde, data.score(sde))
    mean, covariance = propagate_moments(process, solver, times, zero, start)
    blocks = covariance.reshape(2, 2, 2, 2)
    for i, (m, v) in enumerate([(0.3, 0.25), (-1.0, 0.04)]):
        alone = GaussianMixture([1.0], [[m]], [[[v]]])
        process, start = ReverseProcess(sde, alone.score(sde)), sde.prior.covariance
        one, single = propagate_moments(process, solver, times, zero[:, :1], start)
        # A rotation by the eigenvectors, and otherwise the same operations.
        assert (mean[:, i] - one[:, 0]).abs().max() <= rounding(64)
        assert (blocks[:, i, :, i] - single).abs().max() <= rounding(64)
    assert blocks[:, 0, :, 1].abs().max() <= rounding(64)


SAMPLED = [(SSCS(), "PSLD"), (ExponentialMultistep(order=2, stochasticity=1.0), "HOLD")]


@pytest.mark.parametrize(("solver", "name"), SAMPLED)
def test_samples_have_the_propagated_moments(solver, name):
    sde, n = GAUSSIAN[name][0], 50_000
    times, g = solvers.quadratic_times(1.0, END, 8), torch.Generator().manual_seed(0)
    state = sde.prior.sample((n, 1), generator=g, dtype=torch.float64)
    z = solvers.solve(reverse(name), solver, state, times, generator=g).state[..., 0]
    start = torch.zeros(sde.components, 1), sde.prior.covariance
    mean, C = propagate_moments(reverse(name), solver, times, *start)
    check_normal(z, C, mean[:, 0])
    # The samples tell these moments from the exact ones.
    with pytest.raises(AssertionError):
        check_normal(z, torch.from_numpy(GAUSSIAN[name][1].covariance(END)), mean[:, 0])


GRID = uniform_times(1.0, 0.1, 3)
START = {"mean": torch.zeros(2, 1), "covariance": torch.eye(2)}
OwnNoise = altered(EulerMaruyama, step=lambda z, *_: z + torch.randn_like(z))
TWO_MODES = GaussianMixture([1.0, 1.0], [[-1.0], [1.0]], [[[0.01]], [[0.01]]])
TWICE = "the same state and noise gave two different results; does the solver draw noise outs"
MIXED = ReverseProcess(CLD(), TWO_MODES.score(CLD()))
NO_MOMENTS: list[Any] = [
    ({"mean": torch.zeros(2, 2)}, ValueError, r"mean must be \(2, D\)"),
    ({"covariance": torch.eye(3)}, ValueError, r"mean must be \(2, D\)"),
    ({"times": tensor([0.1, 0.5, 1.0])}, ValueError, "times"),
    ({"solver": SSCS}, TypeError, "solver must be a solver"),
    ({"process": CLD()}, TypeError, "process must be a ReverseProcess"),
    ({"solver": OwnNoise()}, ValueError, TWICE),
    ({"solver": solvers.GottaGoFast()}, TypeError, "a fixed grid; GottaGoFast is adaptive"),
    *(({"solver": solver, "process": MIXED}, ValueError, "affine") for solver in (EM, SSCS())),
]


@pytest.mark.parametrize(("changes", "error", "message"), NO_MOMENTS)
def test_solvers_and_arguments_without_exact_moments_are_rejected(changes, error, message):
    valid = {"process": reverse("CLD"), "solver": EM, "times": GRID, **START}
    with pytest.raises(error, match=message):
        propagate_moments(*(valid | changes).values())


def test_steps_that_do_not_divide_the_finest_are_rejected_before_paths_are_drawn(monkeypatch):
    monkeypatch.setattr(orders, "PathCase", untouchable)
    for measure in (weak_order, strong_order):
        with pytest.raises(ValueError, match="steps must be divisors of the finest, 256; got 96"):
            measure(solvers.EulerMaruyama(), PROBLEMS["VP, three modes"], steps=(16, 64, 96, 256))


def test_reference_moments_take_times_of_the_grid():
    problem = PROBLEMS["VP"]
    times = solvers.uniform_times(problem.start, problem.end, 2)
    reference = GaussianReference(problem, times)
    for t in times:
        for own, other in zip(reference.moments(t), reference.moments(float(t)), strict=True):
            assert torch.equal(own, other)
