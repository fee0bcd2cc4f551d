"""Work–precision diagrams of a validation, for solvers on a grid."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from cldsde.messages import in_words
from cldsde.progress import progress_bar
from cldsde.solvers.authoring import Solver

from .checks import Check
from .order_estimate import Verdict
from .problems import Problem
from .suite import declares_order, rejection
from .work_precision import WorkPrecision, work_precision

# Problems of the diagrams, with their metrics. On mixtures the modes' spread distinguishes solvers
# long after distances between distributions have reached their floor.
_DIAGRAMS: dict[str, dict[str, Any]] = {
    "VP": {},
    "CLD": {},
    "CLD, ring": {"metric": "spread", "budgets": (10, 20, 50, 100), "samples": 2048},
}
_FEW_SAMPLES = 512  # samples of a diagram in a quick validation


def diagrams(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    *,
    quick: bool,
) -> Iterator[WorkPrecision | Check]:
    """Table of each problem with a diagram; an error that a solver raises is a failed check."""
    for problem in cases.values():
        if problem.name not in _DIAGRAMS:
            continue
        options = dict(_DIAGRAMS[problem.name])
        if quick and "samples" in options:
            options["samples"] = _FEW_SAMPLES
        tables = []
        fitting = [
            name
            for name, solver in chosen.items()
            if not solver.facts.adaptive
            and not rejection(solver, problem)
            # A solver without an order has no exact moments.
            and ("metric" in options or declares_order(solver))
        ]
        for name in progress_bar(fitting, shown=True, desc=f"work–precision, {problem.name}"):
            began = time.perf_counter()
            try:
                tables.append(work_precision(problem, {name: chosen[name]}, **options))
            except (Exception, SystemExit) as error:  # noqa: BLE001 a user's solver may raise anything
                kind, text = "work and precision", in_words(error)
                seconds = time.perf_counter() - began
                yield Check(kind, name, problem.name, None, None, Verdict.FAIL, text, seconds)
        if tables:
            yield WorkPrecision.joined(tables)
