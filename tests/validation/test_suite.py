"""The suite against planted faults: each must fail, and the healthy solver must pass the same."""

import functools
import json
import math
from typing import Any

import pytest
import torch

from cldsde import solvers
from cldsde.linear import Kernel
from cldsde.solvers import SSCS, EulerMaruyama, ExponentialMultistep, ProbabilityFlow
from cldsde.validation import estimate_order, problems, suite
from cldsde.validation.distribution import DistributionCase
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.problems import forward_processes
from cldsde.validation.report import Report
from cldsde.validation.suite import checks
from faulty_solvers import altered
from probes import generator, tensor
from tolerances import standard_error_of_variance

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
PROBLEMS = problems()
VP, CLD, POINTS, STIFF = "VP", "CLD", "VP, two points", "CLD, stiff end"
WEAK, STRONG, ODE, COUNT = "weak order", "strong order", "ODE order", "NFE per step"


@pytest.fixture(autouse=True, scope="module")
def shared_cases():
    """All tests take the same exact answers, which are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_Cases", functools.cache(suite._Cases))
        yield


@pytest.fixture
def coarse(monkeypatch):
    """Weak and ODE orders are measured with half of the steps."""
    for kind in (WEAK, ODE):
        monkeypatch.setitem(suite._FINEST_QUICK, kind, 128)


def run(chosen, names):
    """The quick checks of solvers on problems."""
    cases = {p: PROBLEMS[p] for p in names}
    return list(checks(chosen, cases, kernels=False, quick=True))


def measured(solver, names):
    """The same for one solver and without counts of evaluations, which have tests of their own."""
    return [check for check in run({"it": solver}, names) if check.kind != COUNT]


# Declares no order, and ends at 0.
Nothing = altered(EulerMaruyama, step=lambda z, *_: 0 * z, weak_order=None, strong_order=None)


def noise_by_length(tables, times):
    """Noise h G ξ in place of √h G ξ."""
    (stage,), roots = tables.stages, (-times.diff()).sqrt()[:, None, None]
    noise = (roots * tensor(stage.noise)).tolist()
    return tables._replace(stages=(stage._replace(noise=noise),))


# Solver with a fault, without it, kinds of orders, and the problem that shows the fault.
FAULTS: list[Any] = [
    (altered(EulerMaruyama, tables=noise_by_length)(), EulerMaruyama(), [WEAK, STRONG], VP),
    (altered(SSCS, weak_order=2)(), SSCS(), [WEAK], CLD),
    (altered(ExponentialMultistep, ode_order=3)(), ExponentialMultistep(), [ODE], CLD),
]


@pytest.mark.usefixtures("coarse")
@pytest.mark.one_in(3)
@pytest.mark.parametrize(("faulty", "healthy", "kinds", "problem"), FAULTS)
def test_a_planted_fault_fails_and_the_healthy_solver_passes(faulty, healthy, kinds, problem):
    for solver, verdict in ((faulty, FAIL), (healthy, PASS)):
        found = measured(solver, [problem])
        assert Report(found).summary() == {"it": verdict}
        assert [(check.kind, check.verdict) for check in found] == [(x, verdict) for x in kinds]


# Process, factors of its mean and of the rows of its root, and the verdict; 1e-10 is allowed.
KERNELS: list[Any] = [
    ("VP", 1 - 2e-10, [1.0], FAIL),
    ("VP", 1 + 5e-11, [1.0], PASS),
    ("VP", 1.0, [math.nan], FAIL),
    # Over a short time CLD's position has a tiny variance.
    ("CLD, critical", 1.0, [1 + 1e-6, 1.0], FAIL),
]


@pytest.mark.parametrize(("process", "mean", "root", "verdict"), KERNELS)
def test_a_kernel_with_a_small_error_fails(monkeypatch, process, mean, root, verdict):
    class Perturbed(forward_processes()[process]):
        def transition(self, s, t):
            exact = super().transition(s, t)
            return Kernel(exact.mean * mean, tensor(root)[:, None] * exact.root)

    monkeypatch.setattr(suite, "forward_processes", lambda: {"perturbed": Perturbed})
    (found,) = checks({}, {})
    assert (found.kind, found.subject, found.verdict) == ("kernel", "perturbed", verdict)
    assert Report([found]).summary() == {"kernels": verdict}


def raising(kind):
    def fail(*_):
        raise kind("no such step\nin two lines")

    return fail


TWICE = "the same state and noise gave two different results; does the solver draw"
RAISED = "no such step in two lines"
# Where Euler–Maruyama goes wrong, how, and words of its reasons if they are its own.
BROKEN: list[tuple[str, Any, str]] = [
    ("step", lambda z, *_: z * math.nan, ""),
    ("step", lambda z, *_: z * 3, ""),
    ("path", raising(TypeError), RAISED),
    ("step", lambda z, *_: z + 0.1 * torch.randn_like(z), TWICE),
    ("tables", raising(TypeError), RAISED),
    ("step", raising(SystemExit), RAISED),
]


@pytest.mark.usefixtures("coarse")
@pytest.mark.one_in(2)
@pytest.mark.parametrize(("where", "how", "words"), BROKEN)
def test_a_solver_that_breaks_fails_and_the_others_are_measured(where, how, words):
    broken = altered(EulerMaruyama, **{where: how})()
    *found, healthy = run({"broken": broken, "healthy": Nothing()}, [VP])
    assert (healthy.subject, healthy.kind, healthy.verdict) == ("healthy", COUNT, PASS)
    failed = [check for check in found if check.verdict is FAIL]
    assert all(len(check.message.splitlines()) == 1 for check in failed)
    assert any(words in check.message for check in failed)
    if not words:
        assert {check.kind for check in failed} == {WEAK, STRONG}
    assert Report(found).summary() == {"broken": FAIL}
    json.dumps(Report(found).to_dict(), allow_nan=False)


class Unreadable(EulerMaruyama):
    facts = property(raising(RuntimeError))  # type: ignore[assignment]


BAD_FACTS = [
    (Unreadable(), "facts cannot be read: RuntimeError: no such step"),
    (altered(EulerMaruyama, weak_order="1")(), "facts.weak_order must be a positive number"),
    (altered(EulerMaruyama, nfe_per_step=1.5)(), "facts.nfe_per_step must be a positive integer"),
]


@pytest.mark.parametrize(("broken", "words"), BAD_FACTS)
def test_facts_that_cannot_be_used_fail_once_by_name(broken, words):
    chosen = {"broken": broken, "healthy": Nothing()}
    found = run(chosen, [VP])
    assert len(found) == suite.count(chosen, {VP: PROBLEMS[VP]}, kernels=False, quick=True)
    kinds = [(c.kind, c.subject, c.verdict) for c in found]
    assert kinds == [("facts", "broken", FAIL), (COUNT, "healthy", PASS)]
    assert found[0].message.startswith(words)


# Distributions of two-dimensional data ---------------------------------------------------------


class Shared(solvers.NoiseSource):
    """One noise for all dimensions, which data of one do not show."""

    def __init__(self, noise: solvers.NoiseSource) -> None:
        self.noise = noise

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        return self.noise.normal(z[..., :1], rows).expand(-1, -1, z.shape[-1]).clone()


SharedAmongDimensions = altered(EulerMaruyama, inputs=lambda score, noise: (score, Shared(noise)))


def straightened(solver, **facts):
    """The same solver with the line through the scores at 0 and z/2."""

    def inputs(score, noise):
        return lambda z, i: 2 * score(z / 2, i) - score(0 * z, i), noise

    return altered(solver, inputs=inputs, nfe_per_step=3, **facts)


def kick(z, i, score, _):
    """A kick by the nonlinear part of the score in each step, without its length."""
    bend = 2 * score(z / 2, i) - score(0 * z, i) - score(z, i)
    still = torch.zeros_like(z[:, : z.shape[1] - bend.shape[1]])
    return z + 0.02 * torch.cat([still, bend], dim=1)


Kicked = altered(SSCS, step=kick, nfe_per_step=4)
SDE: dict[str, Any] = {"order": 2, "stochasticity": 1.0}
SIMILAR = "exceeds a quarter of the distribution's width"
OTHER, NO_PATH = "wrong distribution", "`strong_order=3` is declared but `path_noise` is missing: "


def off_at_the_end(factor):
    return altered(EulerMaruyama, step=lambda z, i, *_: factor * z if i == 99 else z)()


class NoTolerance(ProbabilityFlow):
    rtol = property()  # type: ignore[assignment]


# A solver, and the problem, the verdict and words of its only check.
CHECKS: list[Any] = [
    (SharedAmongDimensions(), "VP, ring", FAIL, OTHER),
    (EulerMaruyama(), "VP, ring", PASS, ""),
    (straightened(ExponentialMultistep)(**SDE), "VP, ring", FAIL, OTHER),
    (ExponentialMultistep(**SDE), "VP, ring", PASS, ""),
    (Kicked(), "VP, ring", FAIL, "errors grow as steps shrink"),
    # Of an order of 1/10 nearly 14 times the difference of two grids is left.
    (altered(EulerMaruyama, weak_order=0.1)(), "VP, ring", INCONCLUSIVE, SIMILAR),
    (object.__new__(NoTolerance), "VP, ring", FAIL, "rtol and atol"),
    # Noise that is redrawn after a rejection is biased, and a Brownian bridge is not.
    (solvers.GottaGoFast(noise_on_reject="fresh"), POINTS, FAIL, "E|x| is 1.0"),
    (solvers.GottaGoFast(noise_on_reject="bridge"), POINTS, PASS, "E|x| is "),
    (off_at_the_end(math.nan), STIFF, FAIL, ""),
    (off_at_the_end(1.0), STIFF, None, ""),
    # Reverse diffusion with 32 steps has twice the variances.
    (solvers.ReverseDiffusion(), "CLD, ring", PASS, "128 evaluations"),
    (altered(SSCS, weak_order=None, strong_order=3)(), VP, INCONCLUSIVE, NO_PATH),
    (altered(EulerMaruyama, tables=raising(ValueError))(), CLD, FAIL, f"but rejects it: {RAISED}"),
]
KINDS = {POINTS: "bias", STIFF: "error at 100 steps", VP: STRONG, CLD: "not applicable"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("solver", "problem", "verdict", "words"), CHECKS)
def test_the_verdict_and_the_reason_of_a_single_check(solver, problem, verdict, words):
    (found,) = measured(solver, [problem])
    assert (found.kind, found.verdict) == (KINDS.get(problem, "distribution"), verdict)
    assert words in found.message
    assert Report([found]).summary() == {"it": verdict or INCONCLUSIVE}
    if problem == POINTS:  # too little noise, so that points stay further out
        assert (found.measured > 1.005) is (verdict is FAIL)


def test_a_solver_that_declares_no_order_is_judged_by_the_distribution_as_a_whole():
    """A corrector of a set size has an error that no grid reduces, and does not end anywhere."""
    names = [VP, "VP, ring", "CLD, ring", "VP, three modes"]
    wide = straightened(EulerMaruyama, weak_order=None, strong_order=None)()
    for solver, verdict in ((solvers.PredictorCorrector(), PASS), (wide, FAIL), (Nothing(), FAIL)):
        found = measured(solver, names)
        assert Report(found).summary() == {"it": verdict}
        compared = {(c.problem, c.verdict) for c in found if c.kind == "distribution"}
        assert compared == {("VP, ring", verdict), ("CLD, ring", verdict)}
        assert verdict is FAIL or all("declares no order" in c.message for c in found)


def test_a_distribution_is_compared_by_moments_shares_and_spreads_with_errors_that_cover():
    """Exact samples of another seed deviate by standard errors, as normal numbers do."""
    problem = PROBLEMS["CLD, ring"]
    case = DistributionCase(problem, 1200, generator(0))
    assert len(case.names) == len(case.expected) == 4 + 10 + 8 + 8
    g = generator(1)
    draws = (problem.sample(1200, g, at=problem.end) for _ in range(40))
    drawn = torch.stack([case.statistics(z) for z in draws])
    ratios = (drawn - case.expected) / case.error
    # Of 1200 numbers none beyond 4.5 in 99 of 100 runs; their mean square is 1 within 5 standard
    # errors, most statistics of one sample being nearly independent.
    assert float(ratios.abs().max()) < 4.5
    error = standard_error_of_variance(1.0, 1200, number=5)
    assert float(ratios.square().mean()) == pytest.approx(1, abs=error)
    # Moments of the mixture: unit variance, the variance of a mode, and no correlation.
    kernel = problem.sde.marginal(problem.end)
    exact = float(kernel.mean[0, 0] ** 2 * 1.04 + kernel.covariance[0, 0])
    # A batch of 60 divides by 60; 59 would be unbiased.
    value = {"covariance 1,1": exact * 59 / 60, "covariance 1,2": 0.0, "share of mode 3": 1 / 8}
    for name, found, error in zip(case.names, case.expected, case.error, strict=True):
        assert name not in value or abs(found - value[name]) <= 5 * error


# Kinds of checks -------------------------------------------------------------------------------


def test_evaluations_are_counted_against_the_declaration():
    orders = {"weak_order": None, "strong_order": None}
    modest = altered(EulerMaruyama, **orders, nfe_per_step=2)()
    chosen = {"heun": altered(solvers.StochasticHeun, **orders)(), "modest": modest}
    found = [(c.kind, c.declared, c.measured, c.verdict) for c in run(chosen, [VP])]
    assert found == [(COUNT, 2, 2, PASS), (COUNT, 2, 1, FAIL)]


@pytest.mark.parametrize(("order", "looks"), [(0.75, 2), (1.0, 1)])
def test_exact_errors_are_looked_at_once_more_if_they_are_inconclusive(order, looks):
    """An order of 3/4 lies at the limit of what passes."""
    asked = []

    def measure(steps):
        asked.append(list(steps))
        errors = [(1 / n) ** order for n in steps]
        return estimate_order([1 / n for n in steps], errors, expected=1, spacing=1.0)

    suite._refined(measure, [8, 16, 32], [16, 32, 64])
    assert asked == [[8, 16, 32], [16, 32, 64]][:looks]
