"""Measured orders, exact moments and their references, against closed forms and sampling."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
from cldsde.solvers import SSCS, EulerMaruyama, ExponentialMultistep, ProbabilityFlow, uniform_times
from cldsde.validation import GaussianReference, moment_error, orders, problems
from cldsde.validation.cases import FlowCase, PathCase
from cldsde.validation.moments import propagate_moments
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.orders import ode_order, strong_order, weak_order
from faulty_solvers import altered, declaring
from gaussian_data import PROCESSES as GAUSSIAN
from gaussian_data import reverse
from probes import check_normal, generator, normals, tensor
from tolerances import rounding, standard_error_of_variance

PROBLEMS = problems()
PASS, FAIL = Verdict.PASS, Verdict.FAIL
# scipy's method of order 8 at a relative tolerance of 1e-13, over a hundred steps.
INTEGRATED = 1e-11


@pytest.mark.parametrize("name", ["VE", "HOLD"])
def test_moments_and_flows_of_the_reference_are_the_exact_ones(name):
    exact, wanted = GAUSSIAN[name][1], [0.05, 0.2, 0.6, 1.0]
    reference = GaussianReference(PROBLEMS[name], tensor(wanted))
    for t in wanted:
        mean, covariance = (moment.numpy() for moment in reference.moments(t))
        assert abs(mean[:, 0] - exact.mean(t)).max() <= INTEGRATED
        assert abs(covariance - exact.covariance(t)).max() <= INTEGRATED * abs(covariance).max()
    away = normals(0, 5, len(exact.A))
    for t, u in [(1.0, 0.05), (0.2, 0.05), (0.6, 0.6)]:
        z = torch.from_numpy(exact.mean(t)) + away
        move = exact.flow(t, u)[-1] if u < t else np.eye(len(exact.A))
        expected = exact.mean(u) + away.numpy() @ move.T
        # Inverses of the flow from 0.05 cost their condition.
        loss = np.linalg.cond(exact.flow(1.0, 0.05)[-1])
        found = reference.flow(z.unsqueeze(-1), t, u)[..., 0].numpy()
        assert abs(found - expected).max() <= INTEGRATED * loss


@pytest.mark.parametrize("time", [1.0, 0.05])
def test_problems_are_of_the_distribution_that_they_say(time):
    exact, z = GAUSSIAN["CLD"][1], PROBLEMS["CLD"].sample(20_000, generator(4), at=time)
    covariance, mean = (torch.from_numpy(x) for x in (exact.covariance(time), exact.mean(time)))
    check_normal(z[..., 0], covariance, mean)


def test_increments_of_paths_have_unit_variance():
    """Solvers converge to the ends of paths whatever the common scale of both is."""
    problem, times = PROBLEMS["CLD"], uniform_times(1.0, 0.05, 64)
    case = PathCase(problem, times, 5000, generator(2))
    draws = torch.cat(case.draws(EulerMaruyama().path_noise(problem.process, times), 1))
    error = standard_error_of_variance(1.0, draws.numel(), number=5)
    assert float(draws.square().mean()) == pytest.approx(1, abs=error)


VERDICT = 0.25  # by which a measured order may fall short of the declared one
EM = EulerMaruyama()
EXPONENTIAL = declaring(solvers.ExponentialEuler(), strong_order=1)
FEWER, MODES = (16, 32, 64, 128), "VP, three modes"

# Measure, solver, problem, order, steps, and a claim that is to fail, or None: once for each kind
# of errors, since the estimate of the order is tested by itself, and orders with the solvers.
ORDERS: list[Any] = [
    (weak_order, EM, "CLD", 1, FEWER, 2),
    (weak_order, ExponentialMultistep(order=2, stochasticity=1.0), "VP", 2, FEWER, None),
    # Adaptive, it takes even steps here.
    (ode_order, ProbabilityFlow(method="bosh3"), "VP", 3, FEWER, None),
    (ode_order, ExponentialMultistep(order=3), "CLD", 3, FEWER, 4),
    (ode_order, ExponentialMultistep(order=2), MODES, 2, FEWER, None),
    # A solver converges to the exact ends of paths only if all of a case hangs together:
    # increments, stochastic integrals for ExponentialEuler, time integrals for SRK, and the ends.
    (strong_order, EM, "CLD", 1, FEWER, 1.5),
    (strong_order, EXPONENTIAL, "CLD, linear schedule", 1, FEWER, None),
    (strong_order, solvers.StochasticHeun(), "PSLD", 1, (*FEWER[1:], 256), None),  # two noises
    # Along lines the term that limits SRK to 3/2, the second derivative of the drift, is zero.
    (strong_order, solvers.TorchSDE(method="srk"), "VP", 2, FEWER, None),
    (strong_order, solvers.TorchSDE(method="srk"), MODES, 1.5, (*FEWER, 256), None),
    (strong_order, EM, MODES, 1, (8, *FEWER), 2),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("measure", "solver", "name", "order", "steps", "wrong"), ORDERS)
def test_orders_are_those_declared_and_no_higher(measure, solver, name, order, steps, wrong):
    problem, claim, options = PROBLEMS[name], measure.__name__, {"steps": steps}
    if measure is ode_order:
        options["case"] = FlowCase(problem, 6, generator(1))
    if measure is strong_order:
        times, samples = uniform_times(1.0, 0.05, steps[-1]), 3000 if order == 1.5 else 1000
        options["case"] = PathCase(problem, times, samples, generator(1))
    found = measure(solver, problem, **options)
    assert (found.verdict, found.expected) == (PASS, getattr(solver.facts, claim))
    assert measure is strong_order or found.expected == order
    # At these steps h d / (2 log 2), what the next term of the error leaves of a local order, is
    # below 0.15; adaptive solvers and samples have a little more.
    loose = solver.facts.adaptive or measure is strong_order
    assert found.order == pytest.approx(order, abs=VERDICT if loose else 0.15)
    if measure is strong_order:
        assert all(0 < level.standard_error < 0.2 * level.error for level in found.levels)
    # Strong errors on a mixture are distances between levels.
    apart = measure is strong_order and not problem.gaussian
    assert [level.step for level in found.levels] == [1 / n for n in steps[: len(steps) - apart]]
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


REJECTED: list[Any] = [
    (strong_order, SSCS(), "CLD", {}, TypeError, "must have `path_noise`"),
    (weak_order, solvers.GottaGoFast(), "CLD", {}, TypeError, "fixed grid"),
    (weak_order, SSCS(), "CLD, three modes", {}, TypeError, "shared Brownian paths"),
    (weak_order, SSCS(), "VE", {}, ValueError, "SSCS needs"),
    (ode_order, solvers.GottaGoFast(), "VP", {}, ValueError, "steps of one length"),
    (ode_order, EM, "CLD", {}, ValueError, "must be deterministic"),
    # Over 30 steps there is no grid of the 128 cells.
    (strong_order, EM, "VP", {"steps": (30, 128)}, ValueError, "divisors of the finest, 128.* 30"),
    (weak_order, EM, MODES, {"steps": (30, 128)}, ValueError, "divisors of the finest, 128.* 30"),
    (weak_order, EM, MODES, {"samples": 5}, ValueError, "at least 20"),
    (weak_order, EM, "VP", {"steps": (32, 32)}, ValueError, "positive integers that increase"),
    (weak_order, EM, "VP", {"grid": "root"}, TypeError, "grid must be a function"),
    (ode_order, ExponentialMultistep(), "VP", {"samples": 0}, ValueError, "must be at least 1"),
]


@pytest.mark.parametrize(("measure", "solver", "problem", "options", "error", "words"), REJECTED)
def test_impossible_measurements_are_rejected(measure, solver, problem, options, error, words):
    with pytest.raises(error, match=words):
        measure(solver, PROBLEMS[problem], **options)


ARGUMENTS: list[Any] = [
    ({"data": [0.3]}, TypeError, r"data must be a GaussianMixture; got \[0.3\]"),
    ({"start": 2}, ValueError, r"start must lie in \[0, 1\]; got 2"),
    ({"end": 0.5, "start": 0.5}, ValueError, "end must be below start, 0.5; got 0.5"),
    ({"checks": "weak order"}, TypeError, "checks must be a collection of kinds; got 'weak order'"),
    ({"checks": ["order"]}, ValueError, "checks must be one of 'ODE order', .*; got 'order'"),
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


@pytest.mark.parametrize(
    ("kind", "steps", "known"), [("uniform", 1, True), ("root", 7, False), ("quadratic", 25, True)]
)
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
    valid = {"process": reverse("CLD"), "solver": EM, "times": uniform_times(1.0, 0.1, 3)}
    valid |= {"mean": torch.zeros(2, 1), "covariance": torch.eye(2)}
    with pytest.raises(error, match=message):
        propagate_moments(*(valid | changes).values())
