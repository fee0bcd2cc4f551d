"""Validation of solvers, step by step: a report after each check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from cldsde.errors import require
from cldsde.progress import progress_bar
from cldsde.solvers import find_solver, named_solvers
from cldsde.solvers.authoring import Solver
from cldsde.solvers.named import canonical_name

from .checks import Check, Outcome, checked
from .order_estimate import Verdict
from .problems import Problem, check_names, problems
from .report import Report
from .suite import checks, count, declares_order, rejection
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

    ``solvers`` are names, or ``module:ClassName``; by default all solvers and the transition
    kernels. ``cases`` names problems; by default all problems, or those of a quick validation,
    which also has fewer levels and samples. With ``draw`` diagrams of work and
    precision are measured, too, of solvers that pass. A name that is unknown, or a problem without
    a check for the solvers, raises a ValueError at once.
    """
    names = [canonical_name(name) for name in solvers or named_solvers()]
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
