"""Every solver on every problem that it applies to, against what it declares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cldsde.solvers import Integrator, PathDriven, Solver
from cldsde.solvers.grids import quadratic_times, uniform_times

from .cases import FlowCase, PathCase
from .checks import Check, bias_check, count_check, kernel_check, stiff_check
from .order_estimate import OrderEstimate, Verdict
from .orders import ode_order, strong_order, weak_order
from .problems import Problem, forward_processes
from .reference import GaussianReference

__all__ = [
    "QUICK_PROBLEMS",
    "checks",
    "count",
    "declared_too_low",
    "refusal",
    "summarise",
]

QUICK_PROBLEMS = (
    *("VP", "VE", "CLD", "CLD, linear schedule", "CLD, rotation", "VP, two points"),
    "VP, three modes",
)
"""What there is time for in a quick validation: a problem of each kind of difficulty."""


def checks(
    chosen: Mapping[str, Solver | Integrator],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Check]:
    """Measure kernels, and each solver on each problem that it applies to.

    Parameters
    ----------
    chosen, cases
        Names to solvers and to problems.
    kernels
        Whether to check transition kernels too.
    quick
        Fewer levels and samples.
    seed
        Of what is sampled.

    Yields
    ------
    Check
        As they come.
    """
    if kernels:
        for name, make in forward_processes().items():
            yield kernel_check(name, make())
    shared = _Cases(quick=quick, seed=seed)
    for name, solver in chosen.items():
        for problem in cases.values():
            for kind in _kinds(solver, problem, quick=quick):
                found = _check(kind, name, solver, problem, shared, quick=quick, seed=seed)
                if found is not None:
                    yield found


def count(
    chosen: Mapping[str, Solver | Integrator],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
) -> int:
    """How many checks there are at most, for a progress bar."""
    ours = sum(
        len(_kinds(solver, problem, quick=quick))
        for solver in chosen.values()
        for problem in cases.values()
    )
    return ours + (len(forward_processes()) if kernels else 0)


_STIFF, _BIASED = "CLD, stiff end", "VP, two points"
_RINGS = ("CLD, ring", "VP, ring")  # for work and precision: single samples rule their errors
_SLOW = ("four components", "non-commuting")  # flows of general processes take minutes
_ROTATION, _HIGH = "CLD, rotation", 5  # for orders above 5
_FLOWS, _LONG = ("VP", "CLD", "VP, three modes"), ("VE",)  # in a quick validation
_COUNTED = ("VP", "CLD")  # where evaluations are counted


def _kinds(solver: Solver | Integrator, problem: Problem, *, quick: bool) -> list[str]:
    """What there is to measure of a solver on a problem."""
    facts = solver.facts
    if problem.name == _BIASED:
        noisy = facts.adaptive and facts.ode_order is None
        return ["bias"] if noisy else []
    if facts.adaptive and facts.ode_order is None:
        return []
    if problem.name in _RINGS:
        return []
    if problem.name == _STIFF:
        return ["error at 100 steps"] if isinstance(solver, Solver) else []
    if problem.name == _ROTATION:
        return ["ODE order"] if _high_order(solver) else []
    kinds = []
    modes = not problem.gaussian
    # With lines high orders hardly show between the first asymptotic steps and rounding.
    wanted = problem.name not in _SLOW
    if quick:
        # Order 5 shows where the flow is long, at steps that would be too many elsewhere.
        wanted = problem.name in (_LONG if (facts.ode_order or 0) > 4 else _FLOWS)
    if facts.ode_order is not None and wanted:
        kinds += ["ODE order"] if modes or not _high_order(solver) else []
    if isinstance(solver, Solver) and problem.dimension == 1:
        followed = isinstance(solver, PathDriven)
        if facts.weak_order is not None and (not modes or (followed and not quick)):
            kinds.append("weak order")
        # With modes the score bends, which may cost a strong order that lines would not.
        if facts.strong_order is not None and (not modes or followed):
            kinds.append("strong order")
    if isinstance(solver, Solver) and problem.name in _COUNTED:
        kinds.append("NFE a step")
    return kinds


def _high_order(solver: Solver | Integrator) -> bool:
    return (solver.facts.ode_order or 0) > _HIGH


def _check(
    kind: str,
    name: str,
    solver: Solver | Integrator,
    problem: Problem,
    shared: _Cases,
    *,
    quick: bool,
    seed: int,
) -> Check | None:
    """One check; None where the solver says that it does not apply."""
    began = time.perf_counter()
    g = torch.Generator().manual_seed(seed)
    try:
        if shared.refused(name, solver, problem):
            return None
        if kind == "bias":
            return bias_check(name, solver, problem, g, began, quick=quick)
        if kind in _SIMPLE:
            return _SIMPLE[kind](name, solver, problem, began)
        sampled = kind == "strong order" or (kind == "weak order" and not problem.gaussian)
        followed = not sampled or _follows(solver, problem)
        if not followed and kind == "weak order":
            return None
        estimate = _estimate(kind, solver, problem, shared, g) if followed else None
    except Exception as error:  # noqa: BLE001 a user's solver may raise anything
        text = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
        return Check(kind, name, problem.name, None, None, Verdict.FAIL, text, seconds)
    verdict: Verdict | None
    if estimate is None:
        declared, order = solver.facts.strong_order, None
        verdict = Verdict.INCONCLUSIVE
        message = "declared, but not to be measured: it follows no Brownian path (path_noise)"
    else:
        declared, verdict, message = estimate.expected, estimate.verdict, estimate.message
        order = estimate.order if math.isfinite(estimate.order) else None
        if not math.isfinite(estimate.levels[-1].error):
            verdict = Verdict.FAIL
            message = "diverges: the error at the finest level is not finite"
    return Check(
        kind=kind,
        subject=name,
        problem=problem.name,
        declared=declared,
        measured=order,
        verdict=verdict,
        message=message,
        seconds=time.perf_counter() - began,
        estimate=estimate,
    )


class _Cases:
    """What solvers share on a problem, made when it is first wanted."""

    def __init__(self, *, quick: bool, seed: int) -> None:
        self.quick, self._seed = quick, seed
        self._made: dict[tuple[str, str], Any] = {}

    def refused(self, name: str, solver: Solver | Integrator, problem: Problem) -> bool:
        """Whether a solver does not take a problem, found out once."""
        steps = 64 if self.quick else 512
        return bool(
            self.get(f"refusal of {name}", problem, lambda g: refusal(solver, problem, steps))
        )

    def get(self, kind: str, problem: Problem, make: Callable[[torch.Generator], Any]) -> Any:
        """What ``make`` makes of a fresh generator, once."""
        key = (kind, problem.name)
        if key not in self._made:
            self._made[key] = make(torch.Generator().manual_seed(self._seed))
        return self._made[key]


def _estimate(
    kind: str,
    solver: Solver | Integrator,
    problem: Problem,
    cases: _Cases,
    generator: torch.Generator,
) -> OrderEstimate:
    finest = _FINEST_QUICK if cases.quick else _FINEST
    if kind == "ODE order":
        samples = 20 if cases.quick else 200
        flow = cases.get(kind, problem, lambda g: FlowCase(problem, samples, g))
        fast = cases.quick and (solver.facts.ode_order or 0) > 3  # and soon at rounding
        steps = _halved(finest[kind] // (2 if fast else 1), 5 if cases.quick else 6)
        if solver.facts.adaptive:
            # Of high orders halved steps leave few levels above rounding.
            high = _denser(20, 5 if cases.quick else 7)
            steps = high if _high_order(solver) else _denser(8, 7 if cases.quick else 9)
            return ode_order(solver, problem, steps=steps, case=flow)
        return _refined(lambda n: ode_order(solver, problem, steps=n, case=flow), steps)
    assert isinstance(solver, Solver)
    if kind == "strong order":
        times = uniform_times(problem.start, problem.end, finest[kind])
        samples = 3000 if cases.quick else 6000
        paths = cases.get(kind, problem, lambda g: PathCase(problem, times, samples, g))
        # Where there are no exact ends the finest level is what others are held against.
        steps = _halved(finest[kind], 5 if problem.exact else 6)
        return strong_order(solver, problem, steps=steps, case=paths)
    if problem.gaussian:
        ends = torch.tensor([problem.start, problem.end], dtype=torch.float64)
        reference = cases.get(kind, problem, lambda g: GaussianReference(problem, ends))
        steps = _halved(finest[kind], 4 if cases.quick else 6)
        return _refined(lambda n: weak_order(solver, problem, steps=n, reference=reference), steps)
    grid, last, samples = _SAMPLED[problem.sde.components > 1, (solver.facts.weak_order or 0) >= 2]
    return weak_order(
        solver,
        problem,
        steps=_halved(last, 5),
        grid=grid,
        samples=samples,
        generator=generator,
    )


def _refined(
    measure: Callable[[Sequence[int]], OrderEstimate], steps: Sequence[int]
) -> OrderEstimate:
    """An order from exact errors, once more at finer steps where the first are inconclusive."""
    estimate = measure(steps)
    if estimate.verdict is Verdict.INCONCLUSIVE and math.isfinite(estimate.levels[-1].error):
        finer = measure(_denser(steps[-1] // 4, 9))
        return finer if math.isfinite(finer.order) else estimate
    return estimate


_ORDERS = ("weak order", "strong order", "ODE order")
_FINEST = {"ODE order": 512, "strong order": 512, "weak order": 1024}
_FINEST_QUICK = {"ODE order": 256, "strong order": 256, "weak order": 256}


# For a mixture under a process with velocities or without, and a solver of weak order 2 or below:
# grid, finest steps, samples. Velocities are stiff near the data, where quadratic grids have more
# steps. Of order 2 differences are small beside their scatter, which is of the strong order: steps
# must be long, and samples many.
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


_SIMPLE = {"error at 100 steps": stiff_check, "NFE a step": count_check}


def refusal(solver: Solver | Integrator, problem: Problem, steps: int = 512) -> str:
    """Why a solver does not take a problem's process on a grid; empty where it does.

    Some processes are out of reach at single times only, which fine grids meet.
    """
    if isinstance(solver, Solver):
        try:
            solver.prepare(problem.process, uniform_times(problem.start, problem.end, steps))
        except ValueError as error:
            return str(error)
    return ""


def _follows(solver: Solver | Integrator, problem: Problem) -> bool:
    """Whether a solver follows the increments and integrals of a Brownian path."""
    if not isinstance(solver, PathDriven):
        return False
    try:
        solver.path_noise(problem.process, uniform_times(problem.start, problem.end, 8))
    except ValueError:
        return False
    return True


def summarise(found: Sequence[Check]) -> dict[str, Verdict]:
    """A verdict for each solver and for the kernels.

    FAIL where a check failed, or where an order is declared below what is measured on every
    problem; PASS where every kind of order that was looked at passed on some problem, or, where
    there is none, another check did.
    """
    summary = {}
    for subject in dict.fromkeys(_group(check) for check in found):
        own = [check for check in found if _group(check) == subject]
        passed = {check.kind for check in own if check.verdict is Verdict.PASS}
        if any(check.verdict is Verdict.FAIL for check in own) or declared_too_low(own):
            summary[subject] = Verdict.FAIL
        else:
            orders = {check.kind for check in own} & set(_ORDERS)
            settled = orders <= passed if orders else bool(passed)
            summary[subject] = Verdict.PASS if settled else Verdict.INCONCLUSIVE
    return summary


def _group(check: Check) -> str:
    return "kernels" if check.kind == "kernel" else check.subject


def declared_too_low(own: Sequence[Check]) -> str:
    """Which kind of order of a solver is above what it declares wherever it is known; or empty."""
    for kind in _ORDERS:
        estimates = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
        conclusive = [e for e in estimates if e.verdict is not Verdict.INCONCLUSIVE]
        if len(conclusive) > 1 and all(e.exceeds for e in conclusive):
            return kind
    return ""
