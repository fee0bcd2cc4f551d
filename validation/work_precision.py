"""Work–precision diagrams: error against score evaluations or seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_callable
from cldsde.messages import counted
from cldsde.progress import progress_bar
from cldsde.solvers import quadratic_times, solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.base import check_solver
from cldsde.tables import Entry, Table

from .metrics import bures_wasserstein, mode_spread_error, sliced_wasserstein
from .moments import propagate_moments
from .orders import Grid, moment_error
from .plain import canvas
from .problems import Problem, check_problem
from .reference import GaussianReference

# Labels of a diagram's axis. Data of the reference problems have no unit.
_METRICS = {
    "moments": "largest error of mean and covariance",
    "bures": "Wasserstein-2 distance",
    "sliced": "sliced Wasserstein-2 distance",
    "spread": "relative error of the modes' standard deviations",
}
_SAMPLED = ("sliced", "spread")


@dataclass(frozen=True)
class WorkPrecisionPoint:
    """One solver at one budget."""

    solver: str
    nfe: int  #: Number of score evaluations per sample.
    seconds: float  #: Time of a solve of ``samples`` states.
    error: float  #: Error in the metric of the table.
    standard_error: float  #: 0 for exact errors.
    #: Whether the point is on the Pareto front: no other solver reaches a smaller error with as few
    #: evaluations.
    pareto: bool = False


@dataclass(frozen=True)
class WorkPrecision:
    """A work–precision table; the result of `work_precision`."""

    problem: str
    metric: str
    points: tuple[WorkPrecisionPoint, ...]  #: One point for each solver and budget.
    #: Error of the same number of exact samples, below which errors are not significant; None if
    #: errors are exact.
    floor: float | None = None

    @classmethod
    def joined(cls, tables: Sequence[WorkPrecision]) -> WorkPrecision:
        """Join tables of one problem and metric, with the Pareto front of all."""
        points = [point for table in tables for point in table.points]
        floors = [table.floor for table in tables if table.floor is not None]
        floor = sum(floors) / len(floors) if floors else None
        return cls(tables[0].problem, tables[0].metric, tuple(_with_front(points)), floor)

    def to_markdown(self) -> str:
        """Convert the table to Markdown: one line per solver, one column per budget.

        Bold marks the Pareto front. If errors are measured on samples, the last line is the floor.
        """
        budgets = sorted({point.nfe for point in self.points})
        cells = {(p.solver, p.nfe): Entry(f"{p.error:.1e}", best=p.pareto) for p in self.points}
        rows = [
            [Entry(name, number=False), *(cells.get((name, n), Entry("")) for n in budgets)]
            for name in dict.fromkeys(point.solver for point in self.points)
        ]
        if self.floor is not None:
            floor = Entry(f"{self.floor:.1e}")
            rows.append([Entry("exact samples", number=False), *[floor] * len(budgets)])
        return Table("", [f"{self.metric} at NFE", *map(str, budgets)], rows, []).markdown()

    def plot(
        self, file: Path | str | BinaryIO, *, against: str = "nfe", file_format: str | None = None
    ) -> None:
        """Plot error against work on logarithmic axes.

        Raises an ImportError without matplotlib, which comes with the extra ``validation``.

        Parameters
        ----------
        file
            File to write, e.g. ``work.svg``.
        against
            Horizontal axis: ``"nfe"`` or ``"seconds"``; ValueError for another name.
        file_format
            ``"svg"``, ``"png"``, …; None: from the file's suffix.
        """
        if against not in ("nfe", "seconds"):
            raise ValueError(f"against must be 'nfe' or 'seconds'; got {against!r}")
        figure, axes = canvas(7, 4.5)
        for i, name in enumerate(dict.fromkeys(point.solver for point in self.points)):
            own = [p for p in self.points if p.solver == name and 0 < p.error < math.inf]
            if not own:
                continue
            axes.errorbar(
                [getattr(point, against) for point in own],
                [point.error for point in own],
                yerr=[point.standard_error for point in own],
                marker="osD^v<>PX*"[i % 10],
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        if self.floor is not None:
            axes.axhline(self.floor, color="grey", linestyle="--", label="exact samples")
        axes.set(ylabel=_METRICS.get(self.metric, self.metric), title=self.problem)
        axes.set_xlabel("score evaluations" if against == "nfe" else "time of a solve (seconds)")
        axes.grid(visible=True, which="major", alpha=0.3)
        if axes.has_data():
            axes.set(xscale="log", yscale="log")
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(file, format=file_format)


def work_precision(
    problem: Problem,
    solvers: Mapping[str, Solver],
    budgets: Sequence[int] = (10, 20, 50, 100, 200),
    *,
    grid: Grid = quadratic_times,
    metric: str | None = None,
    samples: int = 8192,
    repeats: int = 4,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> WorkPrecision:
    """Measure a work–precision table: errors of solvers at budgets of score evaluations.

    Parameters
    ----------
    problem, grid
        See `weak_order`.
    solvers
        Solvers by name. Adaptive solvers are run once, at their tolerance.
    budgets
        Numbers of score evaluations; a solver takes as many steps as a budget allows.
    metric
        ``"moments"``, largest error of mean and covariance, or ``"bures"``, Wasserstein-2
        distance: exact, for Gaussian data of one dimension and solvers on a grid. ``"sliced"``,
        sliced Wasserstein-2 distance, or ``"spread"``, relative error of the modes' standard
        deviations: measured on samples. None: ``"moments"`` if it applies, or else ``"sliced"``.
    samples, repeats, generator, progress
        Number of samples per solve, number of repeats for the standard error, and random generator;
        whether to show a progress bar on stderr.

    Raises
    ------
    ValueError
        If the metric is unknown or does not fit the problem, a solver does not apply, a budget is
        not a positive integer or allows no step, or there are no samples or repeats.
    TypeError
        If an argument has the wrong type.

    Examples
    --------
    >>> from cldsde import solvers, validation
    >>> table = validation.work_precision(
    ...     validation.problems()["CLD"],
    ...     {"EM": solvers.EulerMaruyama(), "SSCS": solvers.SSCS()},
    ...     budgets=(20, 40),
    ... )
    >>> [point.pareto for point in table.points]
    [False, False, True, True]
    """
    _check_arguments(problem, solvers, budgets, samples, repeats)
    check_callable(grid, "grid", "a function of (T, ε, n)")
    metric = _checked_metric(metric, problem, solvers)
    cells = _cells(problem, solvers, budgets)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    reference = floor = None
    if metric in _SAMPLED:
        exact = (problem.sample(samples, g, at=problem.end)[:, 0] for _ in range(repeats))
        floor = sum(_error(problem, metric, x, g) for x in exact) / repeats
    else:
        reference, repeats = GaussianReference(problem, grid(problem.start, problem.end, 1)), 1
    points = []
    for name, solver, steps in progress_bar(cells, shown=progress, desc="work–precision"):
        times = grid(problem.start, problem.end, steps)
        errors, nfe, seconds = [], 0, 0.0
        for _ in range(repeats):
            start = problem.sample(samples, g)
            began = time.perf_counter()
            found = solve(problem.process, solver, start, times, generator=g, warn=False)
            seconds += time.perf_counter() - began
            nfe = max(nfe, found.nfev)
            if reference is not None:
                errors.append(_exact_error(solver, problem, times, metric, reference))
            else:
                errors.append(_error(problem, metric, found.data, g) if found.success else math.nan)
        values = torch.tensor(errors, dtype=torch.float64, device="cpu")
        spread = float(values.std() / math.sqrt(repeats)) if repeats > 1 else 0.0
        mean = float(values.mean())
        points.append(WorkPrecisionPoint(name, nfe, seconds / repeats, mean, spread))
    return WorkPrecision(problem.name, metric, tuple(_with_front(points)), floor)


def _check_arguments(
    problem: object, solvers: object, budgets: object, samples: object, repeats: object
) -> None:
    check_problem(problem)
    if not isinstance(solvers, Mapping) or not all(isinstance(name, str) for name in solvers):
        raise TypeError(f"solvers must be a mapping of names to solvers; got {solvers!r}")
    for name, solver in solvers.items():
        check_solver(solver, f"solvers[{name!r}]")
    valid = isinstance(budgets, Sequence) and len(budgets) > 0
    if not valid or not all(isinstance(n, Integral) and int(n) > 0 for n in budgets):  # type: ignore[attr-defined]
        raise ValueError(f"budgets must be positive integers, at least one; got {budgets!r}")
    as_integer(samples, 1, "samples")
    as_integer(repeats, 1, "repeats")


def _checked_metric(metric: str | None, problem: Problem, solvers: Mapping[str, Solver]) -> str:
    """The metric, by default the first that applies; raise a ValueError if it does not fit."""
    adaptive = [name for name, solver in solvers.items() if solver.facts.adaptive]
    default = "moments" if problem.exact and not adaptive else "sliced"
    chosen = default if metric is None else metric
    if chosen not in _METRICS:
        raise ValueError(f"metric must be 'moments', 'bures', 'sliced' or 'spread'; got {metric!r}")
    if chosen not in _SAMPLED and (adaptive or not problem.exact):
        case = "unless the data are Gaussian of one dimension"
        if problem.exact:
            case = f"for adaptive solvers such as {adaptive[0]!r}"
        raise ValueError(f"metric must be 'sliced' or 'spread' {case}; got {chosen!r}")
    return chosen


def _cells(
    problem: Problem, solvers: Mapping[str, Solver], budgets: Sequence[int]
) -> list[tuple[str, Solver, int]]:
    """Name, solver and number of steps of each point; ValueError if a budget allows no step."""
    cells = []
    for name, solver in solvers.items():
        adaptive, evaluations = solver.facts.adaptive, _evaluations(solver, problem)
        for budget in budgets[:1] if adaptive else budgets:
            if budget < evaluations and not adaptive:
                raise ValueError(
                    f"budgets must allow at least one step, which takes "
                    f"{counted(evaluations, 'evaluation')} for {name!r}; got {budget}"
                )
            cells.append((name, solver, max(budget // evaluations, 1)))
    return cells


def _evaluations(solver: Solver, problem: Problem) -> int:
    """Score evaluations per step, which may depend on the process."""
    times = quadratic_times(problem.start, problem.end, 8)
    score_times = solver.evaluation_times(problem.process, times)
    return solver.facts.nfe_per_step if score_times is None else -(-len(score_times) // 8)


def _exact_error(
    solver: Solver, problem: Problem, times: Tensor, metric: str, reference: GaussianReference
) -> float:
    if metric == "moments":
        return moment_error(solver, problem, times, reference)
    start, end = (reference.moments(float(t)) for t in times[[0, -1]])
    mean, covariance = propagate_moments(problem.process, solver, times, *start)
    return bures_wasserstein(mean[:, 0], covariance, end[0][:, 0], end[1])


def _error(problem: Problem, metric: str, x: Tensor, g: torch.Generator) -> float:
    """Error of samples ``(n, D)`` in a metric of samples."""
    if metric == "sliced":
        exact = problem.sample(len(x), g, at=problem.end)[:, 0]
        return sliced_wasserstein(x, exact, generator=g)
    kernel = problem.sde.marginal(problem.end)
    scale, noise = float(kernel.mean[0, 0]), float(kernel.covariance[0, 0])
    return mode_spread_error(x, problem.data, scale, noise)


def _with_front(points: list[WorkPrecisionPoint]) -> list[WorkPrecisionPoint]:
    def dominates(other: WorkPrecisionPoint, point: WorkPrecisionPoint) -> bool:
        two = (other.nfe, other.error), (point.nfe, point.error)
        return other.nfe <= point.nfe and other.error <= point.error and two[0] != two[1]

    return [
        replace(p, pareto=math.isfinite(p.error) and not any(dominates(o, p) for o in points))
        for p in points
    ]
