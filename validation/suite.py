"""Validation suite: checks of solvers against their facts, and a report after each check."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from cldsde.errors import require
from cldsde.messages import one_line
from cldsde.progress import progress_bar
from cldsde.solvers import find_solver
from cldsde.solvers.authoring import Solver
from cldsde.solvers.grids import quadratic_times, uniform_times
from cldsde.solvers.named import canonical_name, validated_solvers

from .cases import FlowCase, PathCase
from .checks import (
    NOT_APPLICABLE,
    Check,
    NotApplicableError,
    Outcome,
    bias_check,
    checked,
    count_check,
    declares_order,
    facts_fault,
    kernel_check,
    stiff_check,
)
from .distribution import DistributionCase, distribution_check
from .order_estimate import OrderEstimate, Verdict
from .orders import ode_order, strong_order, weak_order
from .problems import Problem, check_names, forward_processes, problems
from .reference import GaussianReference
from .report import Report
from .work_precision import WorkPrecision, work_precision


def reports(
    solvers: Sequence[str] = (),
    cases: Sequence[str] = (),
    *,
    quick: bool = False,
    draw: bool = False,
    seed: int = 0,
) -> Iterator[Report]:
    """Check solvers: an empty report, again after each check, and a complete one at the end.

    ``solvers`` are names, or ``module:ClassName``; by default `validated_solvers` and the
    transition kernels. ``cases`` are names of problems. If it is empty, all problems are taken, or
    fewer with ``quick``, which also takes fewer levels and samples. With ``draw`` diagrams of work
    and precision are measured, too, of solvers that pass. A name that is unknown, or a problem
    without a check for the solvers, raises a ValueError at once.
    """
    names = [canonical_name(name) for name in solvers or validated_solvers()]
    chosen, known = {name: find_solver(name) for name in names}, problems()
    check_names(cases, known)
    for name in cases:
        msg = f"{name!r} has no check for {', '.join(chosen)}; choose another problem or solver"
        found = count(chosen, {name: known[name]}, kernels=False, quick=quick)
        require(found > 0, "problem", msg)
    usual = [name for name, problem in known.items() if problem.quick or not quick]
    taken = {name: known[name] for name in cases or usual}

    def made() -> Iterator[Report]:
        found, tables = list[Check](), list[WorkPrecision]()
        growing = Report(found, tables, complete=False, solvers=chosen)
        yield growing
        options = {"kernels": not solvers, "quick": quick}
        total = count(chosen, taken, **options)
        with progress_bar(None, shown=True, total=total, desc="checks") as bar:
            for check in checks(chosen, taken, **options, seed=seed):
                found.append(check)
                bar.set_postfix_str(check.subject)
                bar.update()
                yield growing
        if draw:
            summary = growing.summary()
            passed = {name: x for name, x in chosen.items() if summary.get(name) is Verdict.PASS}
            for problem in taken.values():
                if "work and precision" in problem.checks:
                    found += _add_diagram(tables, problem, passed, quick=quick)
        yield Report(found, tables, solvers=chosen)

    return made()


def _add_diagram(
    tables: list[WorkPrecision], problem: Problem, chosen: Mapping[str, Solver], *, quick: bool
) -> list[Check]:
    """Add a problem's table of work and precision, for solvers on a grid; return failed checks."""
    options: dict[str, Any] = {}
    if not problem.gaussian:
        # On mixtures the modes' spread distinguishes solvers long after distances between
        # distributions have reached their floor.
        samples = 512 if quick else 2048
        options = {"metric": "spread", "budgets": (10, 20, 50, 100), "samples": samples}
    fitting = [
        name
        for name, solver in chosen.items()
        if not solver.facts.adaptive
        and not rejection(solver, problem)
        # A solver without an order has no exact moments.
        and (options or declares_order(solver))
    ]
    made = list[WorkPrecision]()

    def measure(name: str) -> Outcome:
        made.append(work_precision(problem, {name: chosen[name]}, **options))
        return Outcome(None, None, None, "")

    found = [
        checked("work and precision", name, problem.name, partial(measure, name))
        for name in progress_bar(fitting, shown=True, desc=f"work–precision, {problem.name}")
    ]
    if made:
        tables.append(WorkPrecision.joined(made))
    return [check for check in found if check.verdict is Verdict.FAIL]


def checks(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Check]:
    """Check transition kernels, and each solver on each problem; see `reports`.

    If a solver rejects a problem, a check of the kind ``"not applicable"`` has the reason. This
    check fails if the solver declares that it applies to every linear SDE.
    """
    if kernels:
        for name, make in forward_processes().items():
            yield checked("kernel", name, "transition", partial(kernel_check, make()))
    shared = _Cases(quick=quick, seed=seed)
    for name, solver in chosen.items():
        fault = facts_fault(solver)
        if fault:
            yield Check("facts", name, "", None, None, Verdict.FAIL, fault, 0.0)
            continue
        for problem in cases.values():
            kinds = _kinds(solver, problem, quick=quick)
            if kinds and (reason := rejection(solver, problem, 64 if quick else 512)):
                verdict = None
                if solver.facts.applies_to == "every linear SDE":
                    verdict = Verdict.FAIL
                    reason = f"declared for every linear SDE, but rejects it: {reason}"
                yield Check(NOT_APPLICABLE, name, problem.name, None, None, verdict, reason, 0.0)
                continue
            for kind in kinds:
                measure = partial(_measure, kind, solver, problem, shared)
                yield checked(kind, name, problem.name, measure)


def count(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
) -> int:
    """Largest number of checks, for a progress bar."""
    made = len(forward_processes()) if kernels else 0
    for solver in chosen.values():
        fault = facts_fault(solver)
        made += 1 if fault else sum(len(_kinds(solver, x, quick=quick)) for x in cases.values())
    return made


_HIGH = 5  # orders above this need a flow with large errors

# The seed of a check depends on its kind. This name keeps the random numbers of earlier reports.
_SEED_NAMES = {"distribution": "law"}


def _kinds(solver: Solver, problem: Problem, *, quick: bool) -> list[str]:
    """Kinds of the problem's checks that measure a solver, in their order."""
    facts, planar = solver.facts, problem.dimension > 1
    grid, ordered = not facts.adaptive, declares_order(solver)
    low, high = problem.quick_ode_orders if quick else problem.ode_orders
    # Step lengths per sample are slow with velocities.
    sampled = not quick or (planar and (grid or problem.sde.components == 1))
    # With modes the score is nonlinear: weak orders are sampled along Brownian paths, and strong
    # orders may be lower.
    followed = grid and (problem.gaussian or _has_path(solver, problem))
    measured = {
        # A corrector uses the norm of a score, which needs several dimensions.
        "distribution": sampled and (planar or facts.adaptive or ordered),
        "ODE order": low < (facts.ode_order or 0) <= high,
        "weak order": facts.weak_order and followed and (problem.gaussian or not quick),
        "strong order": facts.strong_order and followed,
        "bias": facts.adaptive and facts.ode_order is None,
        # A step that depends on the norm of its noise, as a corrector's, has no exact moments.
        "error at 100 steps": grid and ordered,
        "NFE per step": grid,
    }
    return [kind for kind, fits in measured.items() if fits and kind in problem.checks]


def _measure(kind: str, solver: Solver, problem: Problem, shared: _Cases) -> Outcome:
    """Make one check of a solver that does not reject the problem."""
    quick = shared.quick
    g = generator_of(shared.seed, f"{_SEED_NAMES.get(kind, kind)} of a solver")
    if kind == "distribution":
        steps = 128 if not quick else 64 if problem.sde.components > 1 else 32
        samples = 2400 if quick else 12_000 if problem.dimension > 1 else 20_000
        if solver.facts.adaptive:  # step lengths per sample are slow
            samples = 500 if quick else 1000
        make = partial(DistributionCase, problem, samples)
        case = shared.get(f"{_SEED_NAMES[kind]} of {samples}", problem, make)
        return distribution_check(solver, problem, case, g, steps=steps)
    if kind == "bias":
        return bias_check(solver, problem, g, quick=quick)
    if kind == "error at 100 steps":
        return stiff_check(solver, problem)
    if kind == "NFE per step":
        return count_check(solver, problem)
    sampled = kind == "strong order" or (kind == "weak order" and not problem.gaussian)
    no_path = _no_path(solver, problem) if sampled else ""
    if no_path and kind == "weak order":
        raise NotApplicableError(f"a weak order with modes needs a Brownian path, and {no_path}")
    if no_path:
        order = solver.facts.strong_order
        claim = f"`strong_order={order:g}` is declared but {no_path}"
        message = f"{claim}: implement it or drop the claim"
        return Outcome(order, None, Verdict.INCONCLUSIVE, message)
    found = _estimate(kind, solver, problem, shared, g)
    verdict, message = found.verdict, found.message
    if not math.isfinite(found.levels[-1].error):
        verdict = Verdict.FAIL
        message = "diverges: the error at the finest level is not finite"
    order = found.order if math.isfinite(found.order) else None
    return Outcome(found.expected, order, verdict, message, found)


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Random generator for one purpose; two purposes with one seed would share their samples."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class _Cases:
    """Exact answers that all solvers share on a problem, computed on first use."""

    def __init__(self, *, quick: bool, seed: int) -> None:
        self.quick, self.seed = quick, seed
        self._made: dict[tuple[str, str], Any] = {}

    def get(self, kind: str, problem: Problem, make: Callable[[torch.Generator], Any]) -> Any:
        """Result of ``make`` with a generator of its own, computed once."""
        key = (kind, problem.name)
        if key not in self._made:
            self._made[key] = make(generator_of(self.seed, kind))
        return self._made[key]


def _estimate(
    kind: str, solver: Solver, problem: Problem, cases: _Cases, generator: torch.Generator
) -> OrderEstimate:
    finest = _FINEST_QUICK if cases.quick else _FINEST
    if kind == "ODE order":
        samples = 20 if cases.quick else 200
        flow = cases.get(kind, problem, lambda g: FlowCase(problem, samples, g))
        finer = None
        fast = cases.quick and (solver.facts.ode_order or 0) > 3  # and soon at rounding
        steps = _halved(finest[kind] // (2 if fast else 1), 5 if cases.quick else 6)
        if solver.facts.adaptive:
            # With halved steps few levels of a high order are above rounding, so take denser steps.
            if (solver.facts.ode_order or 0) > _HIGH:
                steps = _denser(20, 5 if cases.quick else 7)
                return ode_order(solver, problem, steps=steps, case=flow)
            # With velocities the asymptotic range starts later; without them rounding comes sooner.
            coarsest = 32 if problem.sde.components > 1 else 16
            steps = _denser(8 if cases.quick else coarsest, 7)
            finer = _denser(16 if cases.quick else 2 * coarsest, 7)
        return _refined(lambda n: ode_order(solver, problem, steps=n, case=flow), steps, finer)
    if kind == "strong order":
        times = uniform_times(problem.start, problem.end, finest[kind])
        samples = 3000 if cases.quick else 6000
        paths = cases.get(kind, problem, lambda g: PathCase(problem, times, samples, g))
        # Without exact ends the finest level has no finer neighbour to be compared with.
        steps = _halved(finest[kind], 5 if problem.exact else 6)
        return strong_order(solver, problem, steps=steps, case=paths)
    if problem.gaussian:
        ends = torch.tensor([problem.start, problem.end], dtype=torch.float64, device="cpu")
        reference = cases.get(kind, problem, lambda g: GaussianReference(problem, ends))
        steps = _halved(finest[kind], 5 if cases.quick else 6)
        return _refined(lambda n: weak_order(solver, problem, steps=n, reference=reference), steps)
    grid, last, samples = _SAMPLED[problem.sde.components > 1, (solver.facts.weak_order or 0) >= 2]
    return weak_order(
        solver, problem, steps=_halved(last, 5), grid=grid, samples=samples, generator=generator
    )


def _refined(
    measure: Callable[[Sequence[int]], OrderEstimate],
    steps: Sequence[int],
    finer: Sequence[int] | None = None,
) -> OrderEstimate:
    """Estimate an order from exact errors; repeat with finer steps if it is inconclusive."""
    estimate = measure(steps)
    if estimate.verdict is Verdict.INCONCLUSIVE and math.isfinite(estimate.levels[-1].error):
        again = measure(finer or _denser(steps[-1] // 4, 9))
        return again if math.isfinite(again.order) else estimate
    return estimate


_FINEST = {"ODE order": 512, "strong order": 512, "weak order": 1024}
_FINEST_QUICK = {"ODE order": 256, "strong order": 256, "weak order": 256}

# Grid, finest steps and samples for a mixture. The key says whether the process has velocities, and
# whether the weak order is at least 2. Velocities are stiff near the data, where quadratic grids
# have more steps. For order 2 differences are small compared with their spread, which has the
# strong order, so steps must be long and samples many.
_SAMPLED = {
    (False, False): (uniform_times, 256, 100_000),
    (False, True): (uniform_times, 64, 200_000),
    (True, False): (quadratic_times, 1024, 60_000),
    (True, True): (uniform_times, 256, 200_000),
}


def _denser(coarsest: int, levels: int) -> list[int]:
    """Numbers of steps, doubling every second time."""
    return [round(coarsest * 2 ** (level / 2)) for level in range(levels)]


def _halved(finest: int, levels: int) -> list[int]:
    """Numbers of steps, doubling up to the finest."""
    return [finest // 2**level for level in reversed(range(levels))]


def rejection(solver: Solver, problem: Problem, steps: int = 512) -> str:
    """Reason why a solver rejects a problem's process on a grid; empty if it does not.

    Some processes are rejected at single times only, which fine grids contain. Only ValueError
    counts as a rejection; the checks report other errors.
    """
    try:
        solver.prepare(problem.process, uniform_times(problem.start, problem.end, steps))
    except ValueError as error:
        return one_line(error) or "without a reason"
    except (Exception, SystemExit):  # noqa: BLE001 a user's solver may raise anything
        return ""
    return ""


_MISSING = "`path_noise` is missing"


def _no_path(solver: Solver, problem: Problem) -> str:
    """Reason why a solver's normals are not functionals of a Brownian path; empty if they are."""
    try:
        found = solver.path_noise(problem.process, uniform_times(problem.start, problem.end, 8))
    except ValueError as error:
        return f"`path_noise` rejects the problem ({one_line(error)})"
    return _MISSING if found is None else ""


def _has_path(solver: Solver, problem: Problem) -> bool:
    """Whether a solver has `path_noise`; the checks report an error that it raises."""
    try:
        return _no_path(solver, problem) != _MISSING
    except (Exception, SystemExit):  # noqa: BLE001 a user's solver may raise anything
        return True
