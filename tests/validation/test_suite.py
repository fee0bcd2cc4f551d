"""The suite against planted faults: each must fail, and the healthy solver must pass the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cldsde import VPSDE
from cldsde.linear import Kernel
from cldsde.solvers import (
    SSCS,
    Ancestral,
    EulerMaruyama,
    ExponentialMultistep,
    GottaGoFast,
    NoiseSource,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Splitting,
    StochasticHeun,
    named_solvers,
)
from cldsde.solvers.authoring import Facts
from cldsde.validation import estimate_order, problems, suite
from cldsde.validation.distribution import DistributionCase
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.problems import forward_processes
from cldsde.validation.report import Report
from cldsde.validation.suite import checks
from cldsde.validation.summary import summarise
from tolerances import rounding, standard_error, standard_error_of_variance

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
PROBLEMS = problems()
VP, CLD, LINEAR, POINTS = "VP", "CLD", "CLD, linear schedule", "VP, two points"
WEAK, STRONG, ODE, COUNT = "weak order", "strong order", "ODE order", "NFE per step"


def run(solvers, names, **options):
    """The quick checks of solvers on problems."""
    cases = {p: PROBLEMS[p] for p in names}
    return list(checks(solvers, cases, kernels=False, **({"quick": True} | options)))


def measured(solver, names):
    """The same for one solver and without counts of evaluations, which have tests of their own."""
    return [check for check in run({"it": solver}, names) if check.kind != COUNT]


def verdicts(found):
    return {(check.kind, check.problem, check.verdict) for check in found}


def scaled(block, factor):
    return [[factor * x for x in row] for row in block]


def declaring(solver, **orders):
    """The same solver with other facts."""

    class Declaring(solver):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, **orders)

    return Declaring


class NoiseByLength(EulerMaruyama):
    """Euler–Maruyama with noise h G ξ where √h G ξ belongs."""

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        (stage,), roots = tables.stages, (-times.diff()).sqrt().tolist()
        noise = [scaled(block, root) for block, root in zip(stage.noise, roots, strict=True)]
        return tables._replace(stages=(stage._replace(noise=noise),))


class WrongWeights(ExponentialMultistep):
    """The second weight of each step is 10 % too large."""

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        return tables._replace(
            weights=[
                [scaled(block, 1.1) if j == 1 else block for j, block in enumerate(blocks)]
                for blocks in tables.weights
            ]
        )


class WrongShares(ExponentialMultistep):
    """The second weight is 10 % too large and the first makes up for it: still of order 1."""

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        wrong = []
        for blocks in tables.weights:
            if len(blocks) > 1:
                first, second, *others = (torch.tensor(b, dtype=torch.float64) for b in blocks)
                new = [first - 0.1 * second, 1.1 * second, *others]
                wrong.append([block.tolist() for block in new])
            else:
                wrong.append(blocks)
        return tables._replace(weights=wrong)


class WrongPart(SSCS):
    """The closing half-step moves over the time of the opening one.

    Where the schedule is constant the two are alike. An order of 1 would not show it either: the
    clocks of the halves of a step differ by O(h²).
    """

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        middle = (times[:-1] + times[1:]) / 2
        closing = process.sde.stationary_reversal.transition(times[1:], middle).mean
        opens, *others, last = tables.stages
        wrong = torch.tensor(opens.state, dtype=torch.float64) @ torch.linalg.inv(closing)
        moved = {
            name: (wrong @ torch.tensor(getattr(last, name), dtype=torch.float64)).tolist()
            for name in ("state", "score", "base")
        }
        last = last._replace(**moved, noise=opens.noise)
        return tables._replace(stages=(opens, *others, last))


SDE = {"order": 2, "stochasticity": 1.0}
SPLIT: dict[str, Any] = {"score_step": "midpoint", "merge": False}
# Solver with a fault, without it, kinds of orders, problems that show the fault, and that do not.
FAULTS: list[Any] = [
    (NoiseByLength(), EulerMaruyama(), [WEAK, STRONG], [VP], []),
    (declaring(SSCS, weak_order=2)(), SSCS(), [WEAK], [CLD], []),
    (WrongWeights(), ExponentialMultistep(), [ODE], [VP], []),
    (WrongShares(), ExponentialMultistep(), [ODE], [CLD], []),
    (WrongWeights(**SDE), ExponentialMultistep(**SDE), [WEAK], [VP], []),
    (WrongPart(**SPLIT), SSCS(**SPLIT), [WEAK], [LINEAR], [CLD]),
]


@pytest.mark.parametrize(("faulty", "healthy", "kinds", "failing", "passing"), FAULTS)
def test_a_planted_fault_fails_and_the_healthy_solver_passes(
    faulty, healthy, kinds, failing, passing
):
    found = measured(faulty, [*failing, *passing])
    assert summarise(found) == {"it": FAIL}
    expected = [*((p, FAIL) for p in failing), *((p, PASS) for p in passing)]
    assert verdicts(found) == {(kind, p, verdict) for kind in kinds for p, verdict in expected}
    found = measured(healthy, [*failing, *passing])
    assert summarise(found) == {"it": PASS}
    assert verdicts(found) == {(k, p, PASS) for k in kinds for p in [*failing, *passing]}


def test_noise_redrawn_after_a_rejection_is_biased_and_a_bridge_is_not():
    fresh, bridge = (
        measured(GottaGoFast(noise_on_reject=how), [POINTS]) for how in ("fresh", "bridge")
    )
    assert verdicts(fresh) == {("bias", POINTS, FAIL)}
    assert verdicts(bridge) == {("bias", POINTS, PASS)}
    assert summarise(fresh) == {"it": FAIL}
    # Small increments are accepted more often: too little noise, so that points stay further out.
    assert fresh[0].measured > 1.005 > bridge[0].measured


@pytest.mark.parametrize(
    ("mean", "root", "verdict"),
    [
        (-2e-10, 0.0, FAIL),  # twice the tolerance
        (5e-11, 0.0, PASS),
        (0.0, 5e-7, FAIL),  # 1e-6 of the covariance
        (math.nan, 0.0, FAIL),
        (0.0, math.nan, FAIL),
        (math.inf, 0.0, FAIL),
    ],
)
def test_a_kernel_with_a_small_error_or_none_at_all_fails(monkeypatch, mean, root, verdict):
    class Perturbed(VPSDE):
        def transition(self, s, t):
            exact = super().transition(s, t)
            return Kernel(exact.mean * (1 + mean), exact.root * (1 + root))

    processes = {"healthy": VPSDE, "perturbed": Perturbed}
    monkeypatch.setattr(suite, "forward_processes", lambda: processes)
    healthy, found = checks({}, {})
    assert (healthy.subject, healthy.verdict) == ("healthy", PASS)
    assert (found.kind, found.subject, found.verdict) == ("kernel", "perturbed", verdict)
    assert summarise([healthy, found]) == {"kernels": verdict}


def test_an_error_of_one_entry_of_a_kernel_is_seen_at_its_own_scale(monkeypatch):
    """Over a short time CLD's position has a tiny variance."""

    class Perturbed(forward_processes()["CLD, critical"]):
        def transition(self, s, t):
            exact = super().transition(s, t)
            root = exact.root.clone()
            root[..., 0, :] *= 1 + 1e-6
            return Kernel(exact.mean, root)

    monkeypatch.setattr(suite, "forward_processes", lambda: {"perturbed": Perturbed})
    (found,) = checks({}, {})
    assert found.verdict is FAIL
    # A difference of covariances is rounded.
    assert found.measured == pytest.approx((1 + 1e-6) ** 2 - 1, rel=rounding(64, 1e6))


@dataclass(frozen=True, kw_only=True)
class Broken(EulerMaruyama):
    """Euler–Maruyama whose tables, path or step goes wrong."""

    how: Callable[[Any], Any]
    where: str = "step"

    def prepare(self, process, times):
        tables = super().prepare(process, times)
        return self.how(tables) if self.where == "prepare" else tables

    def path_noise(self, process, times):
        path = super().path_noise(process, times)
        return self.how(path) if self.where == "path" else path

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return (self.how(z) if self.where == "step" else z), memory


def raising(kind):
    def fail(z):
        raise kind("no such step\nin two lines")

    return fail


TWICE = "the same state and noise gave two different results; does the solver draw"
# Solver, and words of its reasons if they are its own.
BROKEN: list[tuple[Broken, str]] = [
    (Broken(how=lambda z: z * math.nan), ""),
    (Broken(how=lambda z: z * 1e3), ""),
    (Broken(how=lambda z: z * 3), ""),
    (Broken(how=lambda z: z / 0.0), ""),
    (Broken(how=lambda z: z + 0.1 * torch.randn_like(z)), TWICE),
    (Broken(how=raising(ValueError)), "no such step in two lines"),
    (Broken(how=raising(SystemExit)), "no such step in two lines"),
    (Broken(how=raising(TypeError), where="prepare"), "no such step in two lines"),
    (Broken(how=raising(TypeError), where="path"), "no such step in two lines"),
]


@pytest.mark.parametrize(("broken", "words"), BROKEN)
def test_a_solver_that_breaks_does_not_pass_and_the_others_are_measured(broken, words):
    found = [c for c in run({"broken": broken, "healthy": SSCS()}, [VP]) if c.kind != COUNT]
    assert [(c.subject, c.kind, c.verdict) for c in found[-1:]] == [("healthy", WEAK, PASS)]
    failed = [check for check in found if check.verdict is FAIL]
    assert {check.subject for check in failed} == {"broken"}
    assert all(len(check.message.splitlines()) == 1 for check in failed)
    assert any(words in check.message for check in failed)
    if broken.where == "step" and not words:
        assert {check.kind for check in failed} == {WEAK, STRONG}
    assert summarise(found) == {"broken": FAIL, "healthy": PASS}
    json.dumps(Report(found).to_dict(), allow_nan=False)


def test_an_interruption_is_no_failure_of_a_solver():
    with pytest.raises(KeyboardInterrupt):
        measured(Broken(how=raising(KeyboardInterrupt)), [VP])


class Declaring(EulerMaruyama):
    """Facts as they come."""

    def __init__(self, declared: Any) -> None:
        object.__setattr__(self, "declared", declared)

    @property
    def facts(self) -> Any:
        if isinstance(self.declared, type):
            raise self.declared("no\nfacts")
        return self.declared


FACTS = EulerMaruyama().facts


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (RuntimeError, "facts cannot be read: RuntimeError: no facts"),
        (None, "facts must be a cldsde.solvers.authoring.Facts; got None"),
        (replace(FACTS, weak_order="1"), "facts.weak_order must be a positive number or None; got"),
        (replace(FACTS, strong_order=math.nan), "facts.strong_order must be"),
        (replace(FACTS, ode_order=math.inf), "facts.ode_order must be"),
        (replace(FACTS, nfe_per_step=1.5), "facts.nfe_per_step must be a positive integer"),
        (replace(FACTS, applies_to=None), "facts.applies_to must be a text"),
    ],
)
def test_facts_that_cannot_be_used_fail_once_by_name_and_the_others_are_measured(declared, words):
    solvers = {"broken": Declaring(declared), "healthy": SSCS()}
    found = run(solvers, [VP])
    assert len(found) == suite.count(solvers, {VP: PROBLEMS[VP]}, kernels=False, quick=True)
    assert [(c.kind, c.verdict) for c in found if c.subject == "broken"] == [("facts", FAIL)]
    assert found[0].message.startswith(words)
    assert len(found[0].message.splitlines()) == 1
    assert summarise(found) == {"broken": FAIL, "healthy": PASS}
    report = Report(found, solvers=solvers)
    assert report.failures() == [f"broken, facts: {found[0].message}"]
    assert [row["solver"] for row in report.solver_table()] == [repr(SSCS())]


def test_a_solver_is_not_measured_where_it_does_not_apply():
    (rejected,) = measured(SSCS(), ["VE"])
    assert (rejected.kind, rejected.problem, rejected.verdict) == ("not applicable", "VE", None)
    assert "SSCS needs" in rejected.message
    assert summarise([rejected]) == {}
    found = measured(SSCS(), ["VE", VP])
    assert {c.problem for c in found if c.kind != "not applicable"} == {VP}
    report = Report(found, solvers={"it": SSCS()})
    assert report.to_text().splitlines()[1].startswith("it: not applicable")
    assert rejected.message in report.to_text()
    assert report.rejections(["it"]) == [f"it is not measured on VE: {rejected.message}"]
    assert report.rejections(["another"]) == report.failures() == []
    assert report.to_dict()["checks"][0]["kind"] == "not applicable"


def test_a_rejection_by_a_solver_that_is_declared_for_every_process_fails():
    class Rejecting(EulerMaruyama):
        def prepare(self, process, times):
            if process.sde.components == 2:
                msg = "a slip,\nnot a reason"
                raise ValueError(msg)
            return super().prepare(process, times)

    found = measured(Rejecting(), [VP, CLD, LINEAR])
    rejected = [c for c in found if c.kind == "not applicable"]
    assert [(c.problem, c.verdict) for c in rejected] == [(CLD, FAIL), (LINEAR, FAIL)]
    assert rejected[0].message == (
        "declared for every linear SDE, but rejects it: a slip, not a reason"
    )
    assert summarise(found) == {"it": FAIL}


SINGLE = {"VP", "sub-VP", "VE"}
PAIRS = {"CLD", "CLD, linear schedule", "CLD, underdamped", "CLD, overdamped", "PSLD"}
ALL = SINGLE | PAIRS | {"HOLD", "four components", "non-commuting"}
# The families of problems that each family of solvers is for.
APPLIES = {
    "sscs": ALL - {"sub-VP", "VE", "non-commuting"},
    "splitting": PAIRS,
    "reverse-diffusion": ALL - {"CLD, underdamped"},
    "predictor-corrector": ALL - {"CLD, underdamped"},
    "ancestral": ALL - {"CLD, underdamped"},
    "multistep": ALL - {"CLD, underdamped"},
    "edm-heun": SINGLE,
}


@pytest.mark.parametrize("name", named_solvers())
def test_solvers_of_the_package_reject_processes_that_they_are_not_for_alone(name):
    solver = named_solvers()[name]
    expected = next((found for start, found in APPLIES.items() if name.startswith(start)), ALL)
    # An underdamped process is out of reach at single times, which few steps may miss.
    steps = {"CLD, underdamped": 64}
    rejected = {p for p in ALL if suite.rejection(solver, PROBLEMS[p], steps=steps.get(p, 8))}
    assert rejected == ALL - expected
    assert (solver.facts.applies_to == "every linear SDE") == (expected == ALL)


class SharedAmongDimensions(EulerMaruyama):
    """One noise for all dimensions, which data of one do not show."""

    def step(self, z, memory, tables, i, score, noise):
        class Shared(NoiseSource):
            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                return noise.normal(z[..., :1], rows).expand(-1, -1, z.shape[-1]).clone()

        return super().step(z, memory, tables, i, score, Shared())


def straightened(solver, share=1.0):
    """The same solver with a score of which a share is the line through those at 0 and z/2."""

    class Straightened(declaring(solver, nfe_per_step=3)):
        def step(self, z, memory, tables, i, score, noise):
            def bent(z, i):
                line = 2 * score(z / 2, i) - score(0 * z, i)
                return (1 - share) * score(z, i) + share * line

            return super().step(z, memory, tables, i, bent, noise)

    return Straightened


class Kicked(declaring(SSCS, nfe_per_step=4)):
    """A kick by the nonlinear part of the score in each step, without its length."""

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        bend = 2 * score(z / 2, i) - score(0 * z, i) - score(z, i)
        z = z.clone()
        z[:, -bend.shape[1] :] += 0.02 * bend
        return z, memory


class Nothing(EulerMaruyama):
    """Declares no order, and ends at 0."""

    @property
    def facts(self) -> Facts:
        return Facts(applies_to="every linear SDE", nfe_per_step=1)

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return 0 * z, memory


CURVED: list[Any] = [
    (SharedAmongDimensions(), EulerMaruyama(), "VP, ring"),
    (straightened(SSCS)(), SSCS(), "CLD, ring"),
    (straightened(Ancestral)(), Ancestral(), "VP, ring"),
    (straightened(Splitting)(), Splitting(), "CLD, ring"),
    (straightened(ExponentialMultistep)(**SDE), ExponentialMultistep(**SDE), "VP, ring"),
]


@pytest.mark.parametrize(("faulty", "healthy", "problem"), CURVED)
def test_faults_that_linear_scores_do_not_show_change_the_distribution(faulty, healthy, problem):
    (found,) = measured(faulty, [problem])
    assert (found.kind, found.verdict) == ("distribution", FAIL)
    assert "wrong distribution" in found.message
    (good,) = measured(healthy, [problem])
    assert (good.kind, good.verdict, good.declared) == ("distribution", PASS, None)
    assert found.measured > 1 > good.measured  # of the allowed error


@pytest.mark.parametrize(
    ("solver", "problem", "verdict", "words"),
    [
        (Kicked(), "VP, ring", FAIL, ["errors grow as steps shrink"]),
        (Kicked(), "CLD, ring", FAIL, ["errors grow as steps shrink"]),
        # Of an order of 1/10 nearly 14 times the difference of two grids is left.
        (
            declaring(EulerMaruyama, weak_order=0.1)(),
            "VP, ring",
            INCONCLUSIVE,
            ["differ by as much as the distribution", "128 evaluations"],
        ),
        # Reverse diffusion with 32 steps has twice the variances.
        (ReverseDiffusion(), "CLD, ring", PASS, ["128 evaluations"]),
        (declaring(EulerMaruyama, weak_order=None)(), "VP, ring", PASS, []),
        (straightened(declaring(EulerMaruyama, weak_order=None))(), "VP, ring", FAIL, []),
    ],
)
def test_distributions_are_compared_on_grids_that_tell(solver, problem, verdict, words):
    (found,) = measured(solver, [problem])
    assert (found.kind, found.verdict) == ("distribution", verdict)
    assert all(text in found.message for text in words)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["CLD, ring", "VP, ring"])
def test_a_full_validation_sees_a_score_without_a_tenth_of_its_bend(problem):
    solvers = {"faulty": straightened(SSCS, 0.1)(), "healthy": SSCS()}
    found = [c for c in run(solvers, [problem], quick=False) if c.kind == "distribution"]
    assert [(c.subject, c.verdict) for c in found] == [("faulty", FAIL), ("healthy", PASS)]


def test_a_solver_that_declares_no_order_is_held_to_the_distribution_as_a_whole():
    """A corrector of a set size has an error that no grid reduces, and does not end anywhere."""
    problems = [VP, "VP, ring", "CLD, ring", "VP, three modes"]
    found = measured(PredictorCorrector(), problems)
    assert summarise(found) == {"it": PASS}
    distributions = [c for c in found if c.kind == "distribution"]
    assert {c.problem for c in distributions} == {"VP, ring", "CLD, ring"}
    assert all("declares no order" in c.message for c in distributions)
    found = measured(Nothing(), problems)
    assert {c.verdict for c in found if c.kind == "distribution"} == {FAIL}
    assert summarise(found) == {"it": FAIL}


@pytest.mark.parametrize("solver", [PredictorCorrector(), Nothing()])
def test_counts_of_evaluations_say_nothing_of_the_samples(solver):
    found = run({"it": solver}, [VP, CLD, "CLD, stiff end"])
    assert {(c.kind, c.verdict) for c in found} == {(COUNT, PASS)}
    assert summarise(found) == {"it": INCONCLUSIVE}


def test_starts_of_a_solver_have_nothing_to_do_with_the_exact_samples():
    problem, n = PROBLEMS["VP, ring"], 4000
    kept = {}
    suite._Cases(quick=True, seed=0).get(
        "law", problem, lambda g: kept.update(exact=problem.sample(n, g, at=problem.end))
    )
    kept["start"] = problem.sample(n, suite.generator_of(0, "law of a solver"))
    rows = torch.cat([kept["exact"].flatten(1), kept["start"].flatten(1)], 1).T
    assert torch.corrcoef(rows)[:2, 2:].abs().max() < standard_error(1.0, n, number=5)


def test_a_distribution_is_compared_by_moments_shares_and_spreads_with_errors_that_cover():
    """Exact samples of another seed deviate by standard errors, as normal numbers do."""
    problem = PROBLEMS["CLD, ring"]
    case = DistributionCase(problem, 1200, torch.Generator().manual_seed(0))
    assert len(case.names) == len(case.expected) == 4 + 10 + 8 + 8
    g = torch.Generator().manual_seed(1)
    drawn = torch.stack(
        [case.statistics(problem.sample(1200, g, at=problem.end)) for _ in range(40)]
    )
    ratios = (drawn - case.expected) / case.error
    # Of 1200 numbers none beyond 4.5 in 99 of 100 runs; their mean square is 1 within 5 standard
    # errors, most statistics of one sample being nearly independent.
    assert float(ratios.abs().max()) < 4.5
    assert float(ratios.square().mean()) == pytest.approx(
        1, abs=standard_error_of_variance(1.0, 1200, number=5)
    )
    # Moments of the mixture: unit variance, the variance of a mode, and no correlation.
    psi = float(problem.sde.marginal(problem.end).mean[0, 0])
    noise = float(problem.sde.marginal(problem.end).covariance[0, 0])
    value = dict(zip(case.names, case.expected.tolist(), strict=True))
    error = dict(zip(case.names, case.error.tolist(), strict=True))
    exact = psi**2 * 1.04 + noise
    # A batch of 60 divides by 60 where 59 is unbiased.
    assert value["covariance 1,1"] == pytest.approx(
        exact * 59 / 60, abs=5 * error["covariance 1,1"]
    )
    assert value["covariance 1,2"] == pytest.approx(0, abs=5 * error["covariance 1,2"])
    assert value["share of mode 3"] == pytest.approx(1 / 8, abs=5 * error["share of mode 3"])


def test_an_adaptive_solver_needs_tolerances_for_its_distribution():
    class Fixed(ProbabilityFlow):
        @property
        def rtol(self):
            raise AttributeError

        @rtol.setter
        def rtol(self, value):
            pass

    (found,) = measured(object.__new__(Fixed), ["VP, ring"])
    assert found.verdict is FAIL
    assert "rtol and atol" in found.message


def test_there_are_as_many_checks_as_are_counted_for_a_solver_that_applies_everywhere():
    solvers, names = {"multistep": ExponentialMultistep()}, (VP, "CLD, stiff end", "CLD, ring")
    cases = {name: PROBLEMS[name] for name in names}
    made = run(solvers, names)
    assert len(made) == suite.count(solvers, cases, kernels=False, quick=True)
    assert suite.count({}, cases, kernels=True) == len(forward_processes())
    (stiff,) = (c for c in made if c.kind == "error at 100 steps")
    assert stiff.verdict is None
    assert 0 < stiff.measured < 1


@dataclass(frozen=True, kw_only=True)
class OffNearTheData(EulerMaruyama):
    """The last step is off by a factor."""

    factor: float

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return (self.factor * z if i == 99 else z), memory


@pytest.mark.parametrize(
    ("solver", "verdict"),
    [
        (OffNearTheData(factor=math.nan), FAIL),
        (OffNearTheData(factor=3.0), FAIL),
        (ReverseDiffusion(), None),
    ],
)
def test_moments_near_the_data_that_are_off_by_their_size_or_no_numbers_fail(solver, verdict):
    (found,) = measured(solver, ["CLD, stiff end"])
    assert found.verdict is verdict


def test_evaluations_are_counted_against_the_declaration():
    orders = {"weak_order": None, "strong_order": None}
    solvers = {
        "em": declaring(EulerMaruyama, **orders)(),
        "heun": declaring(StochasticHeun, **orders)(),
        "modest": declaring(EulerMaruyama, **orders, nfe_per_step=2)(),
    }
    made = run(solvers, [VP])
    counted = {c.subject: (c.declared, c.measured, c.verdict) for c in made if c.kind == COUNT}
    assert counted == {"em": (1, 1, PASS), "heun": (2, 2, PASS), "modest": (2, 1, FAIL)}


def test_a_strong_order_that_cannot_be_measured_is_inconclusive():
    made = run({"sscs": declaring(SSCS, strong_order=3)()}, [VP])
    (strong,) = [check for check in made if check.kind == STRONG]
    assert strong.verdict is INCONCLUSIVE
    assert strong.message == (
        "`strong_order=3` is declared but `path_noise` is missing: implement it or drop the claim"
    )
    assert summarise(made) == {"sscs": INCONCLUSIVE}


def test_a_high_order_is_measured_where_it_rises_above_rounding():
    high, low = ProbabilityFlow(method="dopri8"), ProbabilityFlow()
    for solver, name, expected in (
        (high, "CLD, rotation", [ODE]),
        (low, "CLD, rotation", []),
        (high, CLD, []),
        (low, CLD, []),
        (low, "VE", [ODE]),
    ):
        assert suite._kinds(solver, PROBLEMS[name], quick=True) == expected
    assert suite._kinds(low, PROBLEMS[CLD], quick=False) == [ODE]
    # It is measured for nonlinear scores, too.
    assert suite._kinds(high, PROBLEMS["VP, three modes"], quick=False) == ["distribution", ODE]


@pytest.mark.parametrize(
    ("order", "diverging", "looks"), [(0.75, False, 2), (0.75, True, 1), (1.0, False, 1)]
)
def test_exact_errors_are_looked_at_once_more_if_they_are_inconclusive(order, diverging, looks):
    """An order of 3/4 lies at the limit of what passes."""
    asked = []

    def measure(steps):
        asked.append(list(steps))
        errors = [(1 / n) ** order for n in steps]
        errors[-1] = math.nan if diverging else errors[-1]
        return estimate_order([1 / n for n in steps], errors, expected=1, spacing=1.0)

    grids = [[32, 64, 128, 256], [64, 91, 128, 181, 256, 362, 512, 724, 1024]]
    found = suite._refined(measure, grids[0])
    assert asked == grids[:looks]
    assert [1 / level.step for level in found.levels] == asked[-1]
    asked.clear()
    suite._refined(measure, [8, 16, 32], [16, 32, 64])
    assert asked == [[8, 16, 32], [16, 32, 64]][:looks]


@pytest.mark.slow
def test_an_order_of_five_is_settled_on_denser_grids():
    """Velocities make errors settle later than 16 steps."""
    case = suite._Cases(quick=False, seed=0)
    problem, solver = PROBLEMS["CLD, underdamped"], ProbabilityFlow()
    found = suite._estimate(ODE, solver, problem, case, torch.Generator())
    assert found.verdict is PASS
    assert 1 / found.levels[0].step == 32


@pytest.mark.slow
def test_a_solver_that_rejects_a_path_has_no_weak_order_on_a_mixture_and_does_not_fail():
    class Rejecting(EulerMaruyama):
        def path_noise(self, process, times):
            msg = "no path with these options"
            raise ValueError(msg)

    made = run({"it": Rejecting()}, ["VP, three modes"], quick=False)
    expected = [("distribution", PASS), ("not applicable", None), (STRONG, INCONCLUSIVE)]
    assert [(c.kind, c.verdict) for c in made] == expected
    reason = "`path_noise` rejects the problem (no path with these options)"
    assert made[1].message == f"a weak order with modes needs a Brownian path, and {reason}"
    assert made[2].message.startswith(f"`strong_order=1` is declared but {reason}: implement it")


def test_the_seed_decides_what_is_sampled():
    solvers = {"em": declaring(EulerMaruyama, weak_order=None)()}
    first, again, other = (run(solvers, [VP], seed=seed)[0] for seed in (3, 3, 4))
    assert first.kind == STRONG
    assert first.measured == again.measured != other.measured


@pytest.mark.slow
def test_every_solver_of_the_package_passes_the_quick_suite():
    cases = {name: PROBLEMS[name] for name in suite.QUICK_PROBLEMS}
    found = list(checks(named_solvers(), cases, quick=True))
    assert [c for c in found if c.verdict is FAIL] == []
    summary = summarise(found)
    assert FAIL not in summary.values()
    assert set(summary) == {"kernels", *named_solvers()}
    # Of each kind of order that it declares.
    for name, solver in named_solvers().items():
        facts = solver.facts
        declared = {WEAK: facts.weak_order, STRONG: facts.strong_order, ODE: facts.ode_order}
        passed = {c.kind for c in found if c.subject == name and c.verdict is PASS}
        assert {kind for kind, order in declared.items() if order is not None} <= passed
