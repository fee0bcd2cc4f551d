"""Validation suite: checks every solver on every applicable problem against its declared facts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cldsde.messages import in_words, one_line
from cldsde.solvers.authoring import Solver
from cldsde.solvers.grids import quadratic_times, uniform_times

from .cases import FlowCase, PathCase
from .checks import (
    NOT_APPLICABLE,
    Check,
    bias_check,
    count_check,
    facts_fault,
    kernel_check,
    stiff_check,
)
from .distribution import DistributionCase, distribution_check
from .order_estimate import OrderEstimate, Verdict
from .orders import ode_order, strong_order, weak_order
from .problems import Problem, forward_processes
from .reference import GaussianReference

QUICK_PROBLEMS = (
    *(
        "VP",
        "VE",
        "rectified flow",
        "CLD",
        "CLD, linear schedule",
        "CLD, rotation",
        "VP, two points",
    ),
    *("VP, three modes", "CLD, ring", "VP, ring"),
)
"""Problems of a quick validation: one for each kind of difficulty."""


def checks(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Check]:
    """Check kernels, and each solver on each problem that it applies to.

    If a solver rejects a problem, a check of the kind ``"not applicable"`` has the reason. This
    check fails if the solver declares that it applies to every linear SDE.

    Parameters
    ----------
    chosen, cases
        Solvers and problems by name.
    kernels
        Whether to check transition kernels, too.
    quick
        Whether to use fewer levels and samples.
    seed
        Seed of all samples.

    Yields
    ------
    Check
        One check after the other.
    """
    if kernels:
        for name, make in forward_processes().items():
            yield kernel_check(name, make())
    shared = _Cases(quick=quick, seed=seed)
    for name, solver in chosen.items():
        fault = facts_fault(solver)
        if fault:
            yield Check("facts", name, "", None, None, Verdict.FAIL, fault, 0.0)
            continue
        for problem in cases.values():
            kinds = _kinds(solver, problem, quick=quick)
            rejected = _rejected(name, solver, problem, quick=quick) if kinds else None
            if rejected is not None:
                yield rejected
                continue
            for kind in kinds:
                yield _check(kind, name, solver, problem, shared, quick=quick, seed=seed)


def count(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    *,
    kernels: bool = True,
    quick: bool = False,
) -> int:
    """Largest number of checks, for a progress bar."""
    ours = sum(
        1
        if facts_fault(solver)
        else sum(len(_kinds(solver, problem, quick=quick)) for problem in cases.values())
        for solver in chosen.values()
    )
    return ours + (len(forward_processes()) if kernels else 0)


_STIFF, _BIASED = "CLD, stiff end", "VP, two points"
_RINGS = ("CLD, ring", "VP, ring")  # two-dimensional data, for distributions only
_SLOW = ("four components", "non-commuting")  # flows of general processes take minutes
_ROTATION, _HIGH = "CLD, rotation", 5  # for orders above 5
_FLOWS, _LONG = ("VP", "CLD", "VP, three modes"), ("VE",)  # in a quick validation
_COUNTED = ("VP", "CLD")  # problems on which evaluations are counted

# The seed of a check depends on its kind. This name keeps the random numbers of earlier reports.
_SEED_NAMES = {"distribution": "law"}


def _kinds(solver: Solver, problem: Problem, *, quick: bool) -> list[str]:
    """Kinds of checks of a solver on a problem."""
    facts = solver.facts
    noisy = facts.adaptive and facts.ode_order is None
    if problem.name == _BIASED:
        return ["bias"] if noisy else []
    modes = not problem.gaussian
    # The distribution of a solver without an order is checked on rings only: a corrector uses the
    # norm of a score, which needs several dimensions.
    checkable = problem.name in _RINGS or facts.adaptive or declares_order(solver)
    skipped = quick and _skipped_if_quick(solver, problem)
    kinds = ["distribution"] if modes and checkable and not skipped else []
    if noisy or problem.name in _RINGS:
        return kinds
    if problem.name == _STIFF:
        # A step that depends on the norm of its noise, as a corrector's, has no exact moments.
        exact = not facts.adaptive and declares_order(solver)
        return ["error at 100 steps"] if exact else []
    if problem.name == _ROTATION:
        return ["ODE order"] if _high_order(solver) else []
    # With Gaussian data the range between pre-asymptotic errors and rounding is too small for high
    # orders.
    measurable = problem.name not in _SLOW
    if quick:
        # Order 5 is visible on long flows, with numbers of steps that are too large for others.
        measurable = problem.name in (_LONG if (facts.ode_order or 0) > 4 else _FLOWS)
    if facts.ode_order is not None and measurable:
        kinds += ["ODE order"] if modes or not _high_order(solver) else []
    if not facts.adaptive and problem.dimension == 1:
        followed = _has_path(solver, problem)
        if facts.weak_order is not None and (not modes or (followed and not quick)):
            kinds.append("weak order")
        # With modes the score is nonlinear, which may reduce the strong order.
        if facts.strong_order is not None and (not modes or followed):
            kinds.append("strong order")
    if not facts.adaptive and problem.name in _COUNTED:
        kinds.append("NFE per step")
    return kinds


def declares_order(solver: Solver) -> bool:
    """Whether a solver declares an order of any kind."""
    facts = solver.facts
    return (facts.weak_order or facts.strong_order or facts.ode_order) is not None


def _skipped_if_quick(solver: Solver, problem: Problem) -> bool:
    """Whether a quick validation skips a distribution; step lengths per sample are slow."""
    return problem.name not in (("VP, ring",) if solver.facts.adaptive else _RINGS)


def _high_order(solver: Solver) -> bool:
    return (solver.facts.ode_order or 0) > _HIGH


def _check(
    kind: str,
    name: str,
    solver: Solver,
    problem: Problem,
    shared: _Cases,
    *,
    quick: bool,
    seed: int,
) -> Check:
    """Make one check of a solver that does not reject the problem."""
    began = time.perf_counter()
    g = generator_of(seed, f"{_SEED_NAMES.get(kind, kind)} of a solver")
    try:
        if kind == "distribution":
            steps = 128 if not quick else 64 if problem.sde.components > 1 else 32
            case = shared.distribution(problem, _sample_count(solver, problem, quick=quick))
            return distribution_check(name, solver, problem, case, g, began, steps=steps)
        if kind == "bias":
            return bias_check(name, solver, problem, g, began, quick=quick)
        if kind in _SIMPLE:
            return _SIMPLE[kind](name, solver, problem, began)
        sampled = kind == "strong order" or (kind == "weak order" and not problem.gaussian)
        no_path = _no_path(solver, problem) if sampled else ""
        if no_path and kind == "weak order":
            text = f"a weak order with modes needs a Brownian path, and {no_path}"
            return Check(NOT_APPLICABLE, name, problem.name, None, None, None, text, 0.0)
        estimate = None if no_path else _estimate(kind, solver, problem, shared, g)
    except (Exception, SystemExit) as error:  # noqa: BLE001 a user's solver may raise anything
        seconds = time.perf_counter() - began
        return Check(kind, name, problem.name, None, None, Verdict.FAIL, in_words(error), seconds)
    verdict: Verdict | None
    if estimate is None:
        declared, order = solver.facts.strong_order, None
        verdict = Verdict.INCONCLUSIVE
        message = (
            f"`strong_order={declared:g}` is declared but {no_path}: implement it or drop the claim"
        )
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


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Random generator for one purpose; two purposes with one seed would share their samples."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class _Cases:
    """Exact answers that all solvers share on a problem, computed on first use."""

    def __init__(self, *, quick: bool, seed: int) -> None:
        self.quick, self._seed = quick, seed
        self._made: dict[tuple[str, str], Any] = {}

    def distribution(self, problem: Problem, samples: int) -> DistributionCase:
        """Statistics of the exact distribution for a number of samples."""
        kind = f"{_SEED_NAMES['distribution']} of {samples}"
        found: DistributionCase = self.get(
            kind, problem, lambda g: DistributionCase(problem, samples, g)
        )
        return found

    def get(self, kind: str, problem: Problem, make: Callable[[torch.Generator], Any]) -> Any:
        """Result of ``make`` with a generator of its own, computed once."""
        key = (kind, problem.name)
        if key not in self._made:
            self._made[key] = make(generator_of(self._seed, kind))
        return self._made[key]


def _estimate(
    kind: str,
    solver: Solver,
    problem: Problem,
    cases: _Cases,
    generator: torch.Generator,
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
            if _high_order(solver):
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
        # Without exact ends the finest level is the reference for the others.
        steps = _halved(finest[kind], 5 if problem.exact else 6)
        return strong_order(solver, problem, steps=steps, case=paths)
    if problem.gaussian:
        ends = torch.tensor([problem.start, problem.end], dtype=torch.float64, device="cpu")
        reference = cases.get(kind, problem, lambda g: GaussianReference(problem, ends))
        steps = _halved(finest[kind], 5 if cases.quick else 6)
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


def _sample_count(solver: Solver, problem: Problem, *, quick: bool) -> int:
    """Number of samples for a distribution; step lengths per sample and many modes are slow."""
    if solver.facts.adaptive:
        return 500 if quick else 1000
    if quick:
        return 2400
    return 12_000 if problem.name in _RINGS else 20_000


_SIMPLE = {"error at 100 steps": stiff_check, "NFE per step": count_check}


_EVERYWHERE = "every linear SDE"  # the value of `Facts.applies_to` for all processes


def _rejected(name: str, solver: Solver, problem: Problem, *, quick: bool) -> Check | None:
    """Check with a solver's reason to reject a problem; None if it does not reject it."""
    began = time.perf_counter()
    text = rejection(solver, problem, 64 if quick else 512)
    if not text:
        return None
    verdict = None
    if solver.facts.applies_to == _EVERYWHERE:
        verdict, text = Verdict.FAIL, f"declared for {_EVERYWHERE}, but rejects it: {text}"
    seconds = time.perf_counter() - began
    return Check(NOT_APPLICABLE, name, problem.name, None, None, verdict, text, seconds)


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
    times = uniform_times(problem.start, problem.end, 8)
    try:
        found = solver.path_noise(problem.process, times)
    except ValueError as error:
        return f"`path_noise` rejects the problem ({' '.join(str(error).split())})"
    return _MISSING if found is None else ""


def _has_path(solver: Solver, problem: Problem) -> bool:
    """Whether a solver has `path_noise`; the checks report an error that it raises."""
    try:
        return _no_path(solver, problem) != _MISSING
    except (Exception, SystemExit):  # noqa: BLE001 a user's solver may raise anything
        return True
