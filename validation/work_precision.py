"""Error against work: what a number of score evaluations, or of seconds, buys."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cldsde.progress import progress_bar
from cldsde.solvers import quadratic_times, solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.base import check_solver

from .metrics import bures_wasserstein, mode_spread_error, sliced_wasserstein
from .moments import propagate_moments
from .orders import moment_error
from .plain import plain
from .plots import canvas
from .problems import Problem, check_problem
from .reference import GaussianReference

__all__ = ["WorkPrecision", "WorkPrecisionPoint", "work_precision"]

Grid = Callable[[float, float, int], Tensor]

# What is on the axis of a diagram; data of the reference problems have no unit.
_METRICS = {
    "moments": "largest error of mean and covariance",
    "bures": "Wasserstein-2 distance",
    "sliced": "sliced Wasserstein-2 distance",
    "spread": "relative error of the modes' standard deviations",
}


@dataclass(frozen=True)
class WorkPrecisionPoint:
    """One solver at one budget.

    Attributes
    ----------
    solver
        Its name.
    nfe
        Score evaluations used.
    seconds
        Time of a solve of ``samples`` states.
    error, standard_error
        In the metric of the table; the standard error is 0 where the error is exact.
    pareto
        Whether no other point has less error for as few evaluations.
    """

    solver: str
    nfe: int
    seconds: float
    error: float
    standard_error: float
    pareto: bool = False


@dataclass(frozen=True)
class WorkPrecision:
    """A work–precision table.

    Attributes
    ----------
    problem
        Name of the problem.
    metric
        What the errors are.
    points
        One for each solver and budget.
    floor
        Error of exact samples of the same number, below which errors say nothing; None where errors
        are exact.
    """

    problem: str
    metric: str
    points: tuple[WorkPrecisionPoint, ...]
    floor: float | None = None

    @classmethod
    def joined(cls, tables: Sequence[WorkPrecision]) -> WorkPrecision:
        """One table of several, of one problem and metric, with the front of all."""
        points = [point for table in tables for point in table.points]
        floors = [table.floor for table in tables if table.floor is not None]
        floor = sum(floors) / len(floors) if floors else None
        return cls(tables[0].problem, tables[0].metric, tuple(_with_front(points)), floor)

    def to_json(self) -> str:
        """The table as JSON; null for an error that is not finite."""
        return json.dumps(plain(asdict(self)), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """The table as Markdown: a line a solver, a column a budget; Pareto points are bold.

        Where errors are of samples the last line is the floor.
        """
        budgets = sorted({point.nfe for point in self.points})
        names = list(dict.fromkeys(point.solver for point in self.points))
        cells = {(point.solver, point.nfe): point for point in self.points}
        lines = [
            f"| {self.metric} at NFE | " + " | ".join(map(str, budgets)) + " |",
            "| --- |" + " ---: |" * len(budgets),
        ]
        for name in names:
            row = []
            for budget in budgets:
                point = cells.get((name, budget))
                text = "" if point is None else f"{point.error:.1e}"
                row.append(f"**{text}**" if point is not None and point.pareto else text)
            lines.append(f"| {name} | " + " | ".join(row) + " |")
        if self.floor is not None:
            lines.append(f"| exact samples |{f' {self.floor:.1e} |' * len(budgets)}")
        return "\n".join(lines)

    def plot(
        self,
        file: Path | str | BinaryIO,
        *,
        against: str = "nfe",
        file_format: str | None = None,
    ) -> None:
        """Draw error against work on logarithmic axes.

        Parameters
        ----------
        file
            Where to, e.g. ``work.svg``.
        against
            ``"nfe"`` or ``"seconds"``.
        file_format
            ``"svg"``, ``"png"``, …; None goes by the file's suffix.

        Raises
        ------
        ValueError
            If ``against`` is neither.
        ImportError
            If matplotlib is not installed; it comes with the extra ``validation``.
        """
        if against not in ("nfe", "seconds"):
            msg = f"against must be 'nfe' or 'seconds'; got {against!r}"
            raise ValueError(msg)
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
    """Measure errors of solvers at budgets of score evaluations.

    Parameters
    ----------
    problem
        Where to measure.
    solvers
        Names to solvers. Those that choose their times are run once, at their tolerance.
    budgets
        Score evaluations; a solver takes as many steps as they allow.
    grid
        Function of (T, ε, n) that makes the grids.
    metric
        ``"moments"``: the largest error of mean and covariance, or ``"bures"``: the Wasserstein-2
        distance of the Gaussian that comes out, both exact and for Gaussian data and solvers on a
        grid; ``"sliced"``: the sliced Wasserstein-2 distance of samples, which does not fall below
        that of two exact samples; ``"spread"``: the error of the modes' standard deviations, of
        samples too. None is the first that applies.
    samples, repeats, generator
        Samples that are timed, and measured where the metric is of samples; repeats of these, which
        give the standard error; and where they come from.
    progress
        Show a progress bar on stderr.

    Raises
    ------
    ValueError
        If the metric is unknown or does not fit the problem, a solver does not apply, a budget is
        no positive integer or allows a solver no step, or there are no samples or repeats.
    TypeError
        If the problem is no `Problem`, or solvers are no mapping of names to solvers.

    Examples
    --------
    >>> from cldsde import solvers, validation
    >>> table = validation.work_precision(
    ...     validation.problems()["CLD"],
    ...     {"EM": solvers.EulerMaruyama(), "SSCS": solvers.SSCS()},
    ...     budgets=(50, 100),
    ... )
    >>> [point.pareto for point in table.points]
    [False, False, True, True]
    """
    _check_arguments(problem, solvers, budgets, samples, repeats)
    exact = problem.gaussian and problem.dimension == 1
    chosen = metric if metric is not None else "moments" if exact else "sliced"
    if chosen not in _METRICS:
        msg = f"metric must be 'moments', 'bures', 'sliced' or 'spread'; got {metric!r}"
        raise ValueError(msg)
    sampled = chosen in ("sliced", "spread")
    if not sampled and not exact:
        msg = f"metric={chosen!r} is for Gaussian data of one dimension; take 'sliced'"
        raise ValueError(msg)
    own = [name for name, solver in solvers.items() if solver.facts.adaptive]
    if own and not sampled:
        msg = (
            f"metric={chosen!r} is exact for solvers on a grid alone, and {own[0]!r} chooses its "
            "times; take metric='sliced' for all"
        )
        raise ValueError(msg)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    ends = grid(problem.start, problem.end, 1)
    reference = None if sampled else GaussianReference(problem, ends)
    points: list[WorkPrecisionPoint] = []
    cells = [
        (name, solver, budget)
        for name, solver in solvers.items()
        for budget in (budgets[:1] if solver.facts.adaptive else budgets)
    ]
    evaluations = {name: _evaluations(solver, problem) for name, solver in solvers.items()}
    for name, solver, budget in cells:
        if budget < evaluations[name] and not solver.facts.adaptive:
            msg = (
                f"budgets must allow each solver a step; {name!r} takes {evaluations[name]} "
                f"evaluations, got {budget}"
            )
            raise ValueError(msg)
    floor = _floor(problem, chosen, samples, repeats, g) if sampled else None
    for name, solver, budget in progress_bar(cells, shown=progress, desc="work–precision"):
        steps = max(budget // evaluations[name], 1)
        times = grid(problem.start, problem.end, steps)
        if reference is not None:
            if chosen == "moments":
                error = moment_error(solver, problem, times, reference)
            else:
                law = reference.moments(float(times[0]))
                found = propagate_moments(problem.process, solver, times, *law)
                mean, covariance = reference.moments(float(times[-1]))
                error = bures_wasserstein(found[0][:, 0], found[1], mean[:, 0], covariance)
            start = problem.sample(samples, g)
            began = time.perf_counter()
            nfe = solve(problem.process, solver, start, times, generator=g, warn=False).nfev
            seconds = time.perf_counter() - began
            points.append(WorkPrecisionPoint(name, nfe, seconds, error, 0.0))
        else:
            points.append(_sampled(name, solver, problem, times, chosen, samples, repeats, g))
    return WorkPrecision(problem.name, chosen, tuple(_with_front(points)), floor)


def _check_arguments(
    problem: object, solvers: object, budgets: object, samples: object, repeats: object
) -> None:
    check_problem(problem)
    if not isinstance(solvers, Mapping) or not all(isinstance(name, str) for name in solvers):
        msg = f"solvers must be a mapping of names to solvers; got {solvers!r}"
        raise TypeError(msg)
    for name, solver in solvers.items():
        check_solver(solver, f"solvers[{name!r}]")
    valid = isinstance(budgets, Sequence) and len(budgets) > 0
    if not valid or not all(isinstance(n, Integral) and int(n) > 0 for n in budgets):  # type: ignore[attr-defined]
        msg = f"budgets must be positive integers, at least one; got {budgets!r}"
        raise ValueError(msg)
    for name, value in (("samples", samples), ("repeats", repeats)):
        if not (isinstance(value, Integral) and int(value) > 0):
            msg = f"{name} must be a positive integer; got {value!r}"
            raise ValueError(msg)


def _evaluations(solver: Solver, problem: Problem) -> int:
    """Score evaluations per step, which may depend on the process."""
    times = quadratic_times(problem.start, problem.end, 8)
    asked = solver.evaluation_times(problem.process, times)
    return solver.facts.nfe_per_step if asked is None else -(-len(asked) // 8)


def _sampled(
    name: str,
    solver: Solver,
    problem: Problem,
    times: Tensor,
    metric: str,
    samples: int,
    repeats: int,
    g: torch.Generator,
) -> WorkPrecisionPoint:
    errors, nfe, seconds = [], 0, 0.0
    for _ in range(repeats):
        start = problem.sample(samples, g)
        began = time.perf_counter()
        found = solve(problem.process, solver, start, times, generator=g, warn=False)
        seconds += (time.perf_counter() - began) / repeats
        nfe = max(nfe, found.nfev)
        if not found.success:
            errors.append(math.nan)
        else:
            errors.append(_error(problem, metric, found.data, g))
    values = torch.tensor(errors, dtype=torch.float64)
    spread = float(values.std() / math.sqrt(repeats)) if repeats > 1 else 0.0
    return WorkPrecisionPoint(name, nfe, seconds, float(values.mean()), spread)


def _error(problem: Problem, metric: str, x: Tensor, g: torch.Generator) -> float:
    """Of samples ``(n, D)``, in a metric of samples."""
    if metric == "sliced":
        exact = problem.sample(len(x), g, at=problem.end)[:, 0]
        return sliced_wasserstein(x, exact, generator=g)
    law = problem.sde.marginal(problem.end)
    scale, noise = float(law.mean[0, 0]), float(law.covariance[0, 0])
    return mode_spread_error(x, problem.data, scale, noise)


def _floor(problem: Problem, metric: str, samples: int, repeats: int, g: torch.Generator) -> float:
    """Mean error of exact samples."""
    drawn = (problem.sample(samples, g, at=problem.end)[:, 0] for _ in range(repeats))
    return sum(_error(problem, metric, x, g) for x in drawn) / repeats


def _with_front(points: list[WorkPrecisionPoint]) -> list[WorkPrecisionPoint]:
    def dominated(point: WorkPrecisionPoint) -> bool:
        return any(
            other.nfe <= point.nfe
            and other.error <= point.error
            and (other.nfe, other.error) != (point.nfe, point.error)
            for other in points
        )

    return [
        replace(point, pareto=math.isfinite(point.error) and not dominated(point))
        for point in points
    ]
