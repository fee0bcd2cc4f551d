"""The suite against planted faults: each must fail, and the healthy solver must pass the same."""

from __future__ import annotations

import base64
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cldsde import VPSDE, LinearSDE
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
    find_solver,
    named_solvers,
)
from cldsde.solvers.authoring import Facts, Solver
from cldsde.solvers.named import canonical_name
from cldsde.validation import OrderEstimate, WorkPrecision, estimate_order, problems, suite
from cldsde.validation.checks import Check
from cldsde.validation.distribution import DistributionCase
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.problems import forward_processes
from cldsde.validation.report import Report
from cldsde.validation.suite import checks
from cldsde.validation.summary import summarise
from cldsde.validation.work_precision import WorkPrecisionPoint

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
PROBLEMS = problems()
VP, CLD, LINEAR, POINTS = "VP", "CLD", "CLD, linear schedule", "VP, two points"

Block = list[list[float]]


def measured(solver: Any, names: Sequence[str], name: str = "it") -> list[Check]:
    """The quick checks of one solver."""
    return list(checks({name: solver}, {p: PROBLEMS[p] for p in names}, kernels=False, quick=True))


def of_orders(found: Sequence[Check]) -> list[Check]:
    """Without counts of evaluations, which have tests of their own."""
    return [check for check in found if check.kind != "NFE per step"]


def verdicts(found: Sequence[Check]) -> set[tuple[str, str, Verdict | None]]:
    return {(check.kind, check.problem, check.verdict) for check in of_orders(found)}


def scaled(block: Block, factor: float) -> Block:
    return [[factor * x for x in row] for row in block]


def declaring(solver: type[Solver], **orders: float) -> type[Solver]:
    """The same solver with other facts."""

    class Declaring(solver):  # type: ignore[misc, valid-type]
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


SPLIT: dict[str, Any] = {"score_step": "midpoint", "merge": False}
WEAK, STRONG, ODE = "weak order", "strong order", "ODE order"


@pytest.mark.parametrize(
    ("faulty", "healthy", "kinds", "failing", "passing"),
    [
        (NoiseByLength(), EulerMaruyama(), [WEAK, STRONG], [VP, LINEAR], []),
        (declaring(SSCS, weak_order=2)(), SSCS(), [WEAK], [VP, CLD], []),
        (WrongWeights(), ExponentialMultistep(), [ODE], [VP], []),
        (WrongShares(), ExponentialMultistep(), [ODE], [CLD], []),
        (
            WrongWeights(stochasticity=1.0),
            ExponentialMultistep(stochasticity=1.0),
            [WEAK],
            [VP, CLD],
            [],
        ),
        (WrongPart(**SPLIT), SSCS(**SPLIT), [WEAK], [LINEAR], [CLD]),
    ],
    ids=["noise", "claim", "weights", "shares", "weights of the SDE", "part of a step"],
)
def test_a_planted_fault_fails_and_the_healthy_solver_passes(
    faulty, healthy, kinds, failing, passing
):
    found = measured(faulty, [*failing, *passing])
    assert summarise(found) == {"it": FAIL}
    assert verdicts(found) == {
        (kind, problem, verdict)
        for kind in kinds
        for problem, verdict in [*((p, FAIL) for p in failing), *((p, PASS) for p in passing)]
    }
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


def perturbed(mean: float, root: float) -> LinearSDE:
    """VP whose kernel is off by relative amounts."""

    class Perturbed(VPSDE):
        def transition(self, s, t):
            exact = super().transition(s, t)
            return Kernel(exact.mean * (1 + mean), exact.root * (1 + root))

    return Perturbed()


@pytest.mark.parametrize(
    ("mean", "root", "verdict"),
    [
        (0.0, 0.0, PASS),
        (1e-6, 0.0, FAIL),
        (0.0, 5e-7, FAIL),  # 1e-6 of the covariance
        (-2e-10, 0.0, FAIL),  # twice the tolerance
        (5e-11, 0.0, PASS),
        (math.nan, 0.0, FAIL),
        (0.0, math.nan, FAIL),
        (math.inf, 0.0, FAIL),
    ],
)
def test_a_kernel_with_a_small_error_or_none_at_all_fails(monkeypatch, mean, root, verdict):
    monkeypatch.setattr(
        suite,
        "forward_processes",
        lambda: {"healthy": VPSDE, "perturbed": lambda: perturbed(mean, root)},
    )
    healthy, found = checks({}, {})
    assert (healthy.subject, healthy.verdict) == ("healthy", PASS)
    assert (found.kind, found.subject, found.verdict) == ("kernel", "perturbed", verdict)
    assert summarise([healthy, found]) == {"kernels": verdict}


def test_an_error_of_one_entry_of_a_kernel_is_seen_at_its_own_scale(monkeypatch):
    """The variance of CLD's position over a short time is tiny beside that of its velocity."""

    class Perturbed(forward_processes()["CLD, critical"]):  # type: ignore[misc]
        def transition(self, s, t):
            exact = super().transition(s, t)
            root = exact.root.clone()
            root[..., 0, :] *= 1 + 1e-6
            return Kernel(exact.mean, root)

    monkeypatch.setattr(suite, "forward_processes", lambda: {"perturbed": Perturbed})
    (found,) = checks({}, {})
    assert found.verdict is FAIL
    assert found.measured == pytest.approx(2e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("solver", "orders"),
    [(EulerMaruyama, {"weak_order": 0.5}), (StochasticHeun, {"weak_order": 1.5})],
)
def test_an_order_that_is_declared_a_half_too_low_on_every_problem_fails(solver, orders):
    found = measured(declaring(solver, **orders)(), [VP, CLD])
    assert summarise(found) == {"it": FAIL}
    assert summarise(measured(solver(), [VP, CLD])) == {"it": PASS}


H = [2.0**-level for level in range(4, 10)]


def estimated(order: float | None, expected: float) -> OrderEstimate:
    """An estimate of a given order; None for one that comes to no conclusion."""
    errors = [math.nan] * len(H) if order is None else [h**order for h in H]
    return estimate_order(H, errors, expected=expected)


def check(
    order: float | None, expected: float, *, kind: str = WEAK, problem: str = "p", name: str = "it"
) -> Check:
    estimate = estimated(order, expected)
    value = estimate.order if math.isfinite(estimate.order) else None
    return Check(
        kind, name, problem, expected, value, estimate.verdict, estimate.message, 0.1, estimate
    )


@pytest.mark.parametrize(
    ("orders", "expected", "verdict"),
    [
        ([2, 2, 2], 2, PASS),
        ([2, 2, 1], 2, FAIL),
        ([3, 3, 3], 2, FAIL),
        ([2.5, 2.5, 2.5], 2, FAIL),
        ([3, 3, 2], 2, PASS),  # some problems are easy
        ([3, 3, None], 2, FAIL),
        ([3, None, None], 2, PASS),  # of one problem it cannot be said
        ([None, None], 2, INCONCLUSIVE),
        ([2, None], 2, PASS),
    ],
)
def test_a_summary_is_made_of_all_problems(orders, expected, verdict):
    found = [check(order, expected, problem=str(i)) for i, order in enumerate(orders)]
    assert summarise(found) == {"it": verdict}


def test_kinds_of_orders_are_not_mixed_and_solvers_are_apart():
    found = [
        check(3, 2, kind=WEAK, problem="a"),
        check(3, 2, kind=STRONG, problem="a"),
        check(1, 2, kind=ODE, name="other"),
        Check("error at 100 steps", "third", "p", None, 0.1, None, "off", 0.1),
    ]
    assert summarise(found) == {"it": PASS, "other": FAIL, "third": INCONCLUSIVE}
    assert summarise([]) == {}


@dataclass(frozen=True, kw_only=True)
class Broken(EulerMaruyama):
    """Euler–Maruyama whose step goes wrong."""

    how: Callable[[torch.Tensor], torch.Tensor]

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return self.how(z), memory


ERRORS = (
    ValueError,
    RuntimeError,
    ZeroDivisionError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
)


def raising(kind: type[BaseException]) -> Callable[[torch.Tensor], torch.Tensor]:
    def fail(z: torch.Tensor) -> torch.Tensor:
        raise kind("no such step\nin two lines")

    return fail


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda z: z * math.nan, id="NaN"),
        pytest.param(lambda z: z * 1e3, id="diverging"),
        pytest.param(lambda z: z * 3, id="diverging slowly"),
        pytest.param(lambda z: z / 0.0, id="infinite"),
        *(pytest.param(raising(kind), id=kind.__name__) for kind in ERRORS),
        pytest.param(raising(SystemExit), id="SystemExit"),
    ],
)
def test_a_solver_that_breaks_does_not_pass_and_the_others_go_on(how):
    solvers = {"broken": Broken(how=how), "healthy": SSCS()}
    found = of_orders(list(checks(solvers, {VP: PROBLEMS[VP]}, kernels=False, quick=True)))
    assert [(c.subject, c.kind) for c in found] == [
        ("broken", WEAK),
        ("broken", STRONG),
        ("healthy", WEAK),
    ]
    for broken in found[:2]:
        assert broken.verdict is FAIL
        assert len(broken.message.splitlines()) == 1
        if broken.estimate is None:
            assert "no such step" in broken.message or "finite" in broken.message
    assert {c.verdict for c in found[2:]} == {PASS}
    assert summarise(found) == {"broken": FAIL, "healthy": PASS}
    strict(Report(found).to_dict())


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
        (SystemExit, "facts cannot be read: SystemExit: no facts"),
        (None, "facts must be a cldsde.solvers.authoring.Facts; got None"),
        (replace(FACTS, weak_order="1"), "facts.weak_order must be a positive number or None; got"),
        (replace(FACTS, weak_order=0), "facts.weak_order must be"),
        (replace(FACTS, strong_order=math.nan), "facts.strong_order must be"),
        (replace(FACTS, ode_order=math.inf), "facts.ode_order must be"),
        (replace(FACTS, nfe_per_step=1.5), "facts.nfe_per_step must be a positive integer"),
        (replace(FACTS, nfe_per_step=0), "facts.nfe_per_step must be a positive integer"),
        (replace(FACTS, applies_to=None), "facts.applies_to must be a text"),
    ],
)
def test_facts_that_cannot_be_used_fail_once_by_name_and_the_others_go_on(declared, words):
    solvers = {"broken": Declaring(declared), "healthy": SSCS()}
    cases = {name: PROBLEMS[name] for name in (VP, CLD)}
    found = list(checks(solvers, cases, kernels=False, quick=True))
    assert len(found) == suite.count(solvers, cases, kernels=False, quick=True)
    assert [(c.kind, c.verdict) for c in found if c.subject == "broken"] == [("facts", FAIL)]
    assert found[0].message.startswith(words)
    assert len(found[0].message.splitlines()) == 1
    assert summarise(found) == {"broken": FAIL, "healthy": PASS}
    report = Report(found, solvers=solvers)
    strict(report.to_dict())
    assert report.failures() == [f"broken, facts: {found[0].message}"]
    assert [row["solver"] for row in report.solver_table()] == [repr(SSCS())]


class Unprepared(EulerMaruyama):
    def prepare(self, process, times):
        msg = "no tables"
        raise TypeError(msg)


class Pathless(EulerMaruyama):
    def path_noise(self, process, times):
        msg = "no path"
        raise TypeError(msg)


class Undecided(EulerMaruyama):
    """Draws more noise where a state is not 0."""

    def step(self, z, memory, tables, i, score, noise):
        if bool((z != 0).any()):
            noise.normal(z, 1)
        return super().step(z, memory, tables, i, score, noise)


class OwnNoise(EulerMaruyama):
    """Adds noise that it draws itself."""

    def step(self, z, *arguments):
        z, memory = super().step(z, *arguments)
        return z + 0.1 * torch.randn_like(z), memory


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Unprepared(), "no tables"),
        (Pathless(), "no path"),
        (Undecided(), "solver must draw the same noise for every state"),
        (OwnNoise(), "the same state and noise gave two different results; does the solver draw"),
    ],
)
def test_a_solver_that_breaks_elsewhere_does_not_pass_and_the_others_go_on(broken, words):
    solvers = {"broken": broken, "healthy": SSCS()}
    found = list(checks(solvers, {VP: PROBLEMS[VP]}, kernels=False, quick=True))
    summary = summarise(found)
    assert summary["broken"] is FAIL
    assert summary["healthy"] is PASS
    reasons = [c.message for c in found if c.subject == "broken" and c.verdict is FAIL]
    assert any(reason and words in reason for reason in reasons)


def test_an_interruption_is_no_failure_of_a_solver():
    with pytest.raises(KeyboardInterrupt):
        measured(Broken(how=raising(KeyboardInterrupt)), [VP])


def test_a_solver_is_not_measured_where_it_does_not_apply():
    (refused,) = measured(SSCS(), ["VE"])
    assert (refused.kind, refused.problem, refused.verdict) == ("not applicable", "VE", None)
    assert "SSCS needs" in refused.message
    assert summarise([refused]) == {}
    found = measured(SSCS(), ["VE", VP])
    assert {c.problem for c in found if c.kind != "not applicable"} == {VP}
    report = Report(found, solvers={"it": SSCS()})
    assert report.to_text().splitlines()[1].startswith("it: not applicable")
    assert refused.message in report.to_text()
    assert report.rejections(["it"]) == [f"it is not measured on VE: {refused.message}"]
    assert report.rejections(["another"]) == report.failures() == []
    assert strict(report.to_dict())["checks"][0]["kind"] == "not applicable"


def test_a_refusal_of_a_solver_that_is_declared_for_every_process_fails():
    class Refusing(EulerMaruyama):
        def prepare(self, process, times):
            if process.sde.components == 2:
                msg = "a slip,\nnot a reason"
                raise ValueError(msg)
            return super().prepare(process, times)

    found = measured(Refusing(), [VP, CLD, LINEAR])
    refused = [c for c in found if c.kind == "not applicable"]
    assert [(c.problem, c.verdict) for c in refused] == [(CLD, FAIL), (LINEAR, FAIL)]
    assert refused[0].message == (
        "declared for every linear SDE, but rejects it: a slip, not a reason"
    )
    assert summarise(found) == {"it": FAIL}


SINGLE = {"VP", "sub-VP", "VE"}
PAIRS = {"CLD", "CLD, linear schedule", "CLD, underdamped", "CLD, overdamped", "PSLD"}
ALL = SINGLE | PAIRS | {"HOLD", "four components", "non-commuting"}
# What each family of solvers is for, by the families of problems.
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
def test_solvers_of_the_package_refuse_what_they_are_not_for_and_nothing_else(name):
    solver = named_solvers()[name]
    expected = next((found for start, found in APPLIES.items() if name.startswith(start)), ALL)
    # An underdamped process is out of reach at single times, which few steps may miss.
    steps = {"CLD, underdamped": 64}
    refused = {p for p in ALL if suite.rejection(solver, PROBLEMS[p], steps=steps.get(p, 8))}
    assert refused == ALL - expected
    assert (solver.facts.applies_to == "every linear SDE") == (expected == ALL)


class SharedAmongDimensions(EulerMaruyama):
    """One noise for all dimensions, which data of one do not show."""

    def step(self, z, memory, tables, i, score, noise):
        class Shared(NoiseSource):
            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                return noise.normal(z[..., :1], rows).expand(-1, -1, z.shape[-1]).clone()

        return super().step(z, memory, tables, i, score, Shared())


def straightened(solver: type[Solver], share: float = 1) -> type[Solver]:
    """The same solver with a score of which a share is the line through those at 0 and z/2."""

    class Straightened(solver):  # type: ignore[misc, valid-type]
        @property
        def facts(self) -> Facts:
            return replace(super().facts, nfe_per_step=3)

        def step(self, z, memory, tables, i, score, noise):
            def bent(z: torch.Tensor, i: int) -> torch.Tensor:
                line = 2 * score(z / 2, i) - score(0 * z, i)
                return (1 - share) * score(z, i) + share * line

            return super().step(z, memory, tables, i, bent, noise)

    return Straightened


class Kicked(SSCS):
    """A kick by what bends of the score in each step, without its length: errors go as 1/h."""

    @property
    def facts(self) -> Facts:
        return replace(super().facts, nfe_per_step=4)

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


@pytest.mark.parametrize(
    ("faulty", "healthy", "problem"),
    [
        (SharedAmongDimensions(), EulerMaruyama(), "VP, ring"),
        (straightened(SSCS)(), SSCS(), "CLD, ring"),
        (straightened(Ancestral)(), Ancestral(), "VP, ring"),
        (straightened(Splitting)(), Splitting(), "CLD, ring"),
        (
            straightened(ExponentialMultistep)(order=2, stochasticity=1.0),
            ExponentialMultistep(order=2, stochasticity=1.0),
            "VP, ring",
        ),
    ],
    ids=["shared noise", "SSCS", "ancestral", "splitting", "multistep"],
)
def test_faults_that_lines_do_not_show_change_the_law_with_modes(faulty, healthy, problem):
    (found,) = measured(faulty, [problem])
    assert (found.kind, found.verdict) == ("distribution", FAIL)
    assert "wrong distribution" in found.message
    assert found.measured > 1 > measured(healthy, [problem])[0].measured  # of what is allowed
    (found,) = measured(healthy, [problem])
    assert (found.kind, found.verdict, found.declared) == ("distribution", PASS, None)


@pytest.mark.parametrize("problem", ["VP, ring", "CLD, ring"])
def test_an_error_that_grows_as_steps_shrink_is_not_allowed_for(problem):
    """What is left, by an order, of the difference of two such grids is more than the error."""
    (found,) = measured(Kicked(), [problem])
    assert found.verdict is FAIL
    assert "errors grow as steps shrink" in found.message


def test_grids_that_differ_by_as_much_as_the_law_is_wide_say_nothing():
    """Of an order of 1/10 nearly 14 times the difference of two grids is left."""
    (found,) = measured(declaring(EulerMaruyama, weak_order=0.1)(), ["VP, ring"])
    assert found.verdict is INCONCLUSIVE
    assert "differ by as much as the distribution" in found.message
    assert "128 evaluations" in found.message


def test_finer_grids_are_looked_at_where_coarse_ones_say_too_little():
    """Reverse diffusion with 32 steps has twice the variances."""
    (found,) = measured(ReverseDiffusion(), ["CLD, ring"])
    assert found.verdict is PASS
    assert "128 evaluations" in found.message


@pytest.mark.parametrize("problem", ["CLD, ring", "VP, ring"])
def test_a_full_validation_sees_a_score_without_a_tenth_of_its_bend(problem):
    cases = {problem: PROBLEMS[problem]}
    solvers = {"faulty": straightened(SSCS, 0.1)(), "healthy": SSCS()}
    found = [c for c in checks(solvers, cases, kernels=False) if c.kind == "distribution"]
    assert [(c.subject, c.verdict) for c in found] == [("faulty", FAIL), ("healthy", PASS)]


def test_a_linear_score_passes_where_the_score_is_a_line():
    assert summarise(of_orders(measured(straightened(SSCS)(), [CLD]))) == {"it": PASS}


def test_a_solver_that_declares_no_order_is_held_to_the_law_as_a_whole():
    """A corrector of a set size has an error that no grid reduces, and does not end anywhere."""
    problems = [VP, "VP, ring", "CLD, ring", "VP, three modes"]
    found = measured(PredictorCorrector(), problems)
    assert summarise(found) == {"it": PASS}
    laws = [c for c in found if c.kind == "distribution"]
    assert {c.problem for c in laws} == {"VP, ring", "CLD, ring"}
    assert all("declares no order" in c.message for c in laws)
    found = measured(Nothing(), problems)
    assert {c.verdict for c in found if c.kind == "distribution"} == {FAIL}
    assert summarise(found) == {"it": FAIL}


@pytest.mark.parametrize("solver", [PredictorCorrector(), Nothing()])
def test_how_often_the_score_is_asked_says_nothing_of_what_is_sampled(solver):
    found = measured(solver, [VP, CLD, "CLD, stiff end"])
    assert {(c.kind, c.verdict) for c in found} == {("NFE per step", PASS)}
    assert summarise(found) == {"it": INCONCLUSIVE}


def test_a_strong_order_is_held_to_the_law_too():
    class Along(EulerMaruyama):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, weak_order=None)

    (found,) = measured(Along(), ["VP, ring"])
    assert (found.kind, found.verdict) == ("distribution", PASS)
    (found,) = measured(straightened(Along)(), ["VP, ring"])
    assert found.verdict is FAIL


def test_starts_of_a_solver_have_nothing_to_do_with_the_exact_samples():
    """Of 4000 pairs a correlation is 1/63 off in its standard error."""
    problem, n = PROBLEMS["VP, ring"], 4000
    kept = {}
    suite._Cases(quick=True, seed=0).get(
        "law", problem, lambda g: kept.update(exact=problem.sample(n, g, at=problem.end))
    )
    kept["start"] = problem.sample(n, suite.generator_of(0, "law of a solver"))
    rows = torch.cat([kept["exact"].flatten(1), kept["start"].flatten(1)], 1).T
    assert float(torch.corrcoef(rows)[:2, 2:].abs().max()) < 5 / math.sqrt(n)


def test_a_law_is_of_moments_shares_and_spreads_with_errors_that_cover():
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
    assert float(ratios.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 1200))
    # Moments of the mixture: unit variance but for that of the modes, and no correlation.
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


def test_a_solver_that_chooses_its_times_needs_tolerances_for_its_law():
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
    solvers = {"em": EulerMaruyama(), "multistep": ExponentialMultistep()}
    cases = {name: PROBLEMS[name] for name in (VP, "CLD, stiff end", POINTS, "CLD, ring")}
    made = list(checks(solvers, cases, kernels=False, quick=True))
    assert len(made) == suite.count(solvers, cases, kernels=False, quick=True) == 9
    assert suite.count({}, cases, kernels=True) == len(forward_processes())
    stiff = [c for c in made if c.kind == "error at 100 steps"]
    assert [c.verdict for c in stiff] == [None, None]
    assert all(0 < c.measured < 1 for c in stiff if c.measured is not None)


class LostNearTheData(EulerMaruyama):
    """A step of its own near the data, which is off by a factor or no number."""

    factor = math.nan

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return (self.factor * z if i == 99 else z), memory


class OffNearTheData(LostNearTheData):
    factor = 3.0


@pytest.mark.parametrize(
    ("solver", "verdict"),
    [(LostNearTheData(), FAIL), (OffNearTheData(), FAIL), (ReverseDiffusion(), None)],
)
def test_moments_near_the_data_that_are_off_by_their_size_or_no_numbers_fail(solver, verdict):
    (found,) = measured(solver, ["CLD, stiff end"])
    assert found.verdict is verdict


def test_evaluations_are_counted_against_the_declaration():
    class Modest(EulerMaruyama):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, nfe_per_step=2)

    solvers = {"em": EulerMaruyama(), "heun": StochasticHeun(), "modest": Modest()}
    made = checks(solvers, {VP: PROBLEMS[VP]}, kernels=False, quick=True)
    counted = {
        c.subject: (c.declared, c.measured, c.verdict) for c in made if c.kind == "NFE per step"
    }
    assert counted == {"em": (1, 1, PASS), "heun": (2, 2, PASS), "modest": (2, 1, FAIL)}


def test_a_strong_order_that_cannot_be_measured_is_not_passed_over():
    class Claims(SSCS):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, strong_order=3)

    made = list(checks({"sscs": Claims()}, {VP: PROBLEMS[VP]}, kernels=False, quick=True))
    (strong,) = [check for check in made if check.kind == STRONG]
    assert strong.verdict is INCONCLUSIVE
    assert strong.message == (
        "`strong_order=3` is declared but `path_noise` is missing: implement it or drop the claim"
    )


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
    # Where the score bends it is looked at, too.
    assert suite._kinds(high, PROBLEMS["VP, three modes"], quick=False) == ["distribution", ODE]


def test_exact_errors_are_looked_at_once_more_where_they_are_inconclusive():
    asked = []

    def measure(order: float, *, diverging: bool) -> Callable[[Sequence[int]], OrderEstimate]:
        def run(steps: Sequence[int]) -> OrderEstimate:
            asked.append(list(steps))
            errors = [(1 / n) ** order for n in steps]
            if diverging:
                errors[-1] = math.nan
            return estimate_order([1 / n for n in steps], errors, expected=1, spacing=1.0)

        return run

    assert suite._refined(measure(0.75, diverging=False), [8, 16, 32], [16, 32, 64]).order < 1
    assert asked == [[8, 16, 32], [16, 32, 64]]
    steps = [32, 64, 128, 256]
    finer = [64, 91, 128, 181, 256, 362, 512, 724, 1024]
    # An order of 3/4 lies at the limit of what passes.
    for order, diverging, looks in (
        (0.75, False, [steps, finer]),
        (0.75, True, [steps]),
        (1.0, False, [steps]),
        (0.5, False, [steps]),
    ):
        asked.clear()
        found = suite._refined(measure(order, diverging=diverging), steps)
        assert asked == looks
        assert [1 / level.step for level in found.levels] == looks[-1]


@pytest.mark.slow
def test_an_order_of_five_is_settled_on_denser_grids():
    """Velocities make errors settle later than 16 steps."""
    case = suite._Cases(quick=False, seed=0)
    problem, solver = PROBLEMS["CLD, underdamped"], ProbabilityFlow()
    found = suite._estimate(ODE, solver, problem, case, torch.Generator())
    assert found.verdict is PASS
    assert 1 / found.levels[0].step == 32


@pytest.mark.slow
def test_a_solver_that_refuses_a_path_has_no_weak_order_on_a_mixture_and_does_not_fail():
    class Refusing(EulerMaruyama):
        def path_noise(self, process, times):
            msg = "no path with these options"
            raise ValueError(msg)

    made = list(checks({"it": Refusing()}, {"m": PROBLEMS["VP, three modes"]}, kernels=False))
    assert [(c.kind, c.verdict) for c in made] == [
        ("distribution", PASS),
        ("not applicable", None),
        (STRONG, INCONCLUSIVE),
    ]
    reason = "`path_noise` rejects the problem (no path with these options)"
    assert made[1].message == f"a weak order with modes needs a Brownian path, and {reason}"
    assert made[2].message.startswith(f"`strong_order=1` is declared but {reason}: implement it")


def test_the_seed_decides_what_is_sampled():
    def run(seed: int) -> list[float | None]:
        made = checks(
            {"em": EulerMaruyama()}, {VP: PROBLEMS[VP]}, kernels=False, quick=True, seed=seed
        )
        return [c.measured for c in made]

    first, again, other = run(3), run(3), run(4)
    assert first == again
    assert first[0] == other[0]  # exact moments
    assert first[1] != other[1]  # sampled paths


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


def test_the_published_report_is_of_all_solvers_and_all_kinds_of_checks():
    """``cldsde validate --json docs/data/validation.json`` makes it anew."""
    file = Path(__file__).parents[2] / "docs" / "data" / "validation.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["complete"] is True
    assert set(report["summary"]) == {"kernels", *named_solvers()}
    assert {row["solver"] for row in report["solvers"]} == {*map(repr, named_solvers().values())}
    kinds = {
        "kernel",
        WEAK,
        STRONG,
        ODE,
        "distribution",
        "bias",
        "error at 100 steps",
        "NFE per step",
    }
    assert {check["kind"] for check in report["checks"]} == {*kinds, "not applicable"}
    law = {check["subject"] for check in report["checks"] if check["kind"] == "distribution"}
    assert law == set(named_solvers())


def test_every_name_finds_its_solver():
    for name, solver in named_solvers().items():
        assert find_solver(name) == solver
        assert isinstance(solver, Solver)


def test_short_names_find_their_solvers_and_stand_for_full_ones():
    for short, full in (("em", "euler-maruyama"), ("multistep", "multistep-2-sde")):
        assert find_solver(short) == find_solver(full)
        assert canonical_name(short) == full
        assert short not in named_solvers()
    assert canonical_name("sscs") == "sscs"


def test_a_solver_is_found_by_its_class_or_as_an_object(tmp_path, monkeypatch):
    (tmp_path / "my_solvers_found.py").write_text(
        "from cldsde.solvers import SSCS\nmine = SSCS(score_step='midpoint')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_solver("cldsde.solvers:StochasticHeun") == StochasticHeun()
    assert find_solver("my_solvers_found:mine") == SSCS(score_step="midpoint")
    sys.modules.pop("my_solvers_found")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eulr", ["'eulr'", "module:ClassName", "euler-maruyama", "gotta-go-fast"]),
        ("ssc", ["'ssc'; did you mean sscs?"]),
        ("multi-step", ["'multi-step'; did you mean multistep?"]),
        ("", ["''", "module:ClassName"]),
        ("no_such_module_here:Solver", ["no_such_module_here", "cannot be loaded"]),
        ("cldsde.solvers:NoSuchSolver", ["NoSuchSolver", "cannot be loaded"]),
        (":SSCS", [":SSCS"]),
        ("json:JSONDecoder", ["must be a solver"]),
        ("json:loads", ["must be a solver"]),
        ("cldsde.solvers.authoring:Solver", ["cldsde.solvers.authoring:Solver"]),  # abstract
        (".solvers:SSCS", [".solvers:SSCS"]),
    ],
)
def test_what_is_no_solver_is_refused(name, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as refusal:
        find_solver(name)
    assert all(word in str(refusal.value) for word in words)


def test_a_file_that_cannot_be_read_as_python_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my_broken_solvers.py").write_text("class Mine(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="my_broken_solvers"):
        find_solver("my_broken_solvers:Mine")


def strict(content: Any) -> Any:
    """Through JSON as the standard has it: no NaN, no infinity."""

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is no JSON")

    return json.loads(json.dumps(content), parse_constant=refuse)


@functools.cache
def diverse() -> tuple[Check, ...]:
    """Checks of every sort: passed, failed, without conclusion, only reported, and of a kernel."""
    return (
        Check("kernel", "VP", "transition", 1e-10, 3e-14, PASS, "fine", 0.1),
        Check("kernel", "VE", "transition", 1e-10, 5e-13, PASS, "fine", 0.1),
        check(1, 1, problem=VP, name="first"),
        check(1.2, 1, problem=CLD, name="first"),
        check(2, 2, problem=CLD, kind=STRONG, name="first"),
        check(0.5, 1, problem=CLD, name="second"),
        check(None, 1, problem=VP, name="third"),
        Check("error at 100 steps", "third", "CLD, stiff end", None, 0.25, None, "off", 0.1),
        Check("error at 100 steps", "fourth", "CLD, stiff end", None, math.nan, None, "off", 0.1),
        Check("bias", "fifth", POINTS, 1.0, 1.004, FAIL, "E|x| is off", 0.1),
    )


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_a_report_goes_through_json_and_back_whole_or_in_part(tmp_path, count, complete):
    found = diverse()[:count]
    points = (WorkPrecisionPoint("first", 10, 0.1, 0.2, 0.0, pareto=True),)
    report = Report(found, [WorkPrecision(CLD, "moments", points)], complete)
    file = tmp_path / "report.json"
    report.write_json(file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    read = strict(json.loads(file.read_text()))
    assert read["complete"] is complete
    assert read["summary"] == {name: str(v) for name, v in summarise(found).items()}
    assert len(read["checks"]) == count
    for entry, made in zip(read["checks"], found, strict=True):
        fields = ("kind", "subject", "problem", "declared", "message", "seconds")
        assert all(entry[name] == getattr(made, name) for name in fields)
        assert entry["verdict"] == (None if made.verdict is None else str(made.verdict))
        if made.measured is not None and math.isfinite(made.measured):
            assert entry["measured"] == made.measured
        else:
            assert entry["measured"] is None
        if made.estimate is None:
            assert entry["estimate"] is None
        else:
            levels = [level["error"] for level in entry["estimate"]["levels"]]
            assert len(levels) == len(H)
    assert read["work_precision"][0]["points"][0]["error"] == 0.2
    assert {"cldsde", "torch", "machine"} <= set(read)


def test_an_error_that_is_no_number_is_null_in_a_table(tmp_path):
    points = (
        WorkPrecisionPoint("first", 10, 0.1, math.nan, 0.0),
        WorkPrecisionPoint("first", 20, 0.1, math.inf, math.nan),
    )
    table = WorkPrecision(CLD, "moments", points)
    read = strict(json.loads(table.to_json()))
    assert [point["error"] for point in read["points"]] == [None, None]
    strict(Report((), [table]).to_dict())


def test_a_report_that_cannot_be_made_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    file.write_text("before")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Report(diverse()).write_json(file)
    assert file.read_text() == "before"


def test_the_text_has_a_line_for_each_solver_and_kind():
    table, reasons, closing = Report(diverse()).to_text().split("\n\n")
    assert closing == "2 of 6 pass."
    assert reasons.startswith("third, weak order on VP: An order needs")
    lines = table.splitlines()
    assert lines[0].split() == ["declared", "measured", "on", "verdict"]
    heads = [line.split("  ")[0] for line in lines[1:]]
    assert heads == [
        "kernels",
        "first: weak order",
        "first: strong order",
        "second: weak order",
        "third: weak order",
        "third: error at 100 steps",
        "fourth: error at 100 steps",
        "fifth: bias",
    ]
    text = dict(zip(heads, lines[1:], strict=True))
    assert "5e-13" in text["kernels"]
    assert "2 processes" in text["kernels"]
    assert "1.00 … 1.20" in text["first: weak order"]
    assert "2 PASS" in text["first: weak order"]
    assert "VP, CLD" in text["first: weak order"]
    assert "1 FAIL" in text["second: weak order"]
    assert "1 INCONCLUSIVE" in text["third: weak order"]
    assert "0.25" in text["third: error at 100 steps"]
    header, _, closing = Report(()).to_text().splitlines()
    assert header.split() == ["declared", "measured", "on", "verdict"]
    assert closing == "0 of 0 pass."


def test_reasons_why_nothing_confirms_a_declared_order_are_below_the_table_once():
    claim = (
        "`strong_order=1` is declared but `path_noise` is missing: implement it or drop the claim"
    )
    found = [
        *(Check(STRONG, "it", p, 1, None, INCONCLUSIVE, claim, 0.1) for p in (VP, CLD)),
        check(1, 1, problem=VP),
        check(None, 1, problem=CLD),  # confirmed on VP
        check(None, 1, problem=VP, name="other"),
    ]
    report = Report(found)
    first, second = report.unconfirmed()
    assert first == f"it, strong order on VP, CLD: {claim}"
    assert second == f"other, weak order on VP: {found[-1].message}"
    assert report.to_text().split("\n\n")[1:] == [
        f"{first}\n{second}",
        "0 of 2 pass.",
    ]


def test_failures_are_named_with_their_message():
    lines = Report(diverse()).failures()
    assert [line.split(",")[0] for line in lines] == ["second", "fifth"]
    assert lines[1] == f"fifth, bias on {POINTS}: E|x| is off"


def test_the_table_for_the_documentation_has_declared_beside_measured():
    solvers = {"first": StochasticHeun(), "third": ExponentialMultistep(), "unmeasured": SSCS()}
    table = Report(diverse(), solvers=solvers).solver_table()
    assert [row["solver"] for row in table] == [repr(solver) for solver in solvers.values()]
    first, third, unmeasured = table
    assert first["NFE per step"] == "2"
    assert first["applies to"] == "every linear SDE"
    assert (first[WEAK], first[STRONG], first[ODE]) == ("2", "1", "")
    low = min(estimated(order, 1).low for order in (1, 1.2))
    high = max(estimated(order, 1).high for order in (1, 1.2))
    assert first[f"{WEAK}, measured"] == f"1.00 … 1.20 [{low:.2f}, {high:.2f}]"
    assert first[f"{STRONG}, measured"].startswith("2.00 [")
    assert first[f"{ODE}, measured"] == first["error at 100 steps"] == ""
    assert (third[WEAK], third[ODE]) == ("", "2")
    assert third[f"{WEAK}, measured"] == "—"
    assert third["error at 100 steps"] == "2.5e-01"
    assert unmeasured[WEAK] == "1"
    assert unmeasured[f"{WEAK}, measured"] == unmeasured["error at 100 steps"] == ""
    assert Report(diverse()).solver_table() == []


def test_a_broken_solver_keeps_its_place_on_the_page(tmp_path):
    """A check without a level that could be drawn, and tables with errors that are not finite."""
    points = (WorkPrecisionPoint("third", 10, 0.1, math.nan, math.nan),)
    report = Report([check(None, 1, name="third")], [WorkPrecision(CLD, "moments", points)])
    page = report.write_html(tmp_path).read_text(encoding="utf-8")
    assert "INCONCLUSIVE" in page
    assert "third" in page


def test_the_page_names_the_axes_and_gives_sentences_room(tmp_path):
    """Of a law it has the worst statistic as a part of its limit, and nothing as declared."""
    law = Check("distribution", "first", "VP, ring", None, 0.634, PASS, "sliced W₂ 0.05", 0.1)
    page = Report([*diverse()[2:4], law]).write_html(tmp_path).read_text(encoding="utf-8")
    assert "0.63 of the allowed error" in page
    assert ".words { min-width" in page
    assert '<td class="words">sliced W₂ 0.05</td>' in page
    (image,) = re.findall('svg\\+xml;base64,([^"]+)', page)
    drawn = base64.b64decode(image).decode()
    # Glyphs are drawn as paths, with what they say as a comment.
    assert "1 / number of steps" in drawn
    assert "error of moments or states" in drawn


def test_a_page_is_written_with_a_plot_of_each_order(tmp_path):
    points = (WorkPrecisionPoint("first", 10, 0.1, 0.2, 0.0),)
    found = [c for c in diverse() if c.subject != "third"]
    report = Report(found, [WorkPrecision("<CLD>", "moments", points)], complete=False)
    file = report.write_html(tmp_path)
    page = file.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]
    # A diagram of work, and errors of the two solvers with an order.
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "interrupted, incomplete" in page
    assert "&lt;CLD&gt;" in page
    assert "<CLD>" not in page


@pytest.mark.parametrize(
    ("solver", "claim"),
    [
        (EulerMaruyama(), {"weak_order": 1.25, "strong_order": 1.25}),
        (SSCS(), {"strong_order": 3}),
    ],
)
def test_a_solver_none_of_whose_orders_of_a_kind_is_conclusive_does_not_pass(solver, claim):
    class Claims(type(solver)):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, **claim)

    assert summarise(measured(Claims(), [VP])) == {"it": INCONCLUSIVE}


def test_levels_that_do_not_differ_have_no_order():
    class Still(EulerMaruyama):
        def step(self, z, memory, tables, i, score, noise):
            noise.normal(z, 1)
            return z, memory

    assert all(check.verdict is not PASS for check in of_orders(measured(Still(), [VP])))
