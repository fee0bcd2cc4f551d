"""Single checks of a solver against its declared facts, or of a process's kernel."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from cldsde.linear import LinearSDE
from cldsde.messages import counted, in_words, one_line
from cldsde.solvers import plan, solve
from cldsde.solvers.authoring import Facts, Solver
from cldsde.solvers.grids import quadratic_times

from .moments import check_repeated
from .order_estimate import OrderEstimate, Verdict
from .orders import moment_error
from .plain import plain
from .problems import Problem
from .reference import GaussianReference, reference_kernel

NOT_APPLICABLE = "not applicable"
_KERNEL_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Check:
    """One measurement compared with the declared value."""

    #: ``"kernel"``, ``"weak order"``, ``"strong order"``, ``"ODE order"``, ``"distribution"``,
    #: ``"NFE per step"``, ``"bias"`` or ``"error at 100 steps"``. If nothing could be measured:
    #: ``"facts"``, ``"not applicable"`` or ``"work and precision"``.
    kind: str
    subject: str  #: Name of the solver, or of the process of a kernel.
    problem: str
    declared: float | None  #: Order or error.
    #: Order or error. For a distribution the worst ratio of a statistic's error to the allowed
    #: error; at most 1 passes.
    measured: float | None
    verdict: Verdict | None  #: None for a check that is only reported.
    message: str  #: Result in words, on one line.
    seconds: float  #: Duration of the check.
    estimate: OrderEstimate | None = field(default=None, repr=False)  #: None for other kinds.

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        estimate = None if self.estimate is None else self.estimate.to_dict()
        return {**plain(self), "estimate": estimate}


class Outcome(NamedTuple):
    """Numbers, verdict and message of a `Check`."""

    declared: float | None
    measured: float | None
    verdict: Verdict | None
    message: str
    estimate: OrderEstimate | None = None


class NotApplicableError(Exception):
    """A check cannot be made of this solver on this problem."""


def checked(kind: str, subject: str, problem: str, measure: Callable[[], Outcome]) -> Check:
    """Make a check. An error of the solver, which a user may have written, fails it."""
    began = time.perf_counter()
    try:
        outcome = measure()
    except NotApplicableError as reason:
        kind, outcome = NOT_APPLICABLE, Outcome(None, None, None, str(reason))
    except (Exception, SystemExit) as error:  # noqa: BLE001 a user's solver may raise anything
        outcome = Outcome(None, None, Verdict.FAIL, in_words(error))
    return Check(kind, subject, problem, seconds=time.perf_counter() - began, **outcome._asdict())


def facts_fault(solver: Solver) -> str:
    """Describe a fault in a solver's declared facts; empty if there is none."""
    try:
        facts: object = solver.facts
    except (Exception, SystemExit) as error:  # noqa: BLE001 a user's solver may raise anything
        return f"facts cannot be read: {in_words(error)}"
    if not isinstance(facts, Facts):
        return one_line(f"facts must be a cldsde.solvers.authoring.Facts; got {facts!r}")
    for name in ("weak_order", "strong_order", "ode_order"):
        order = getattr(facts, name)
        if order is not None and not (isinstance(order, Real) and 0 < float(order) < math.inf):
            return one_line(f"facts.{name} must be a positive number or None; got {order!r}")
    count: object = facts.nfe_per_step
    if not (isinstance(count, Integral) and int(count) > 0):
        return one_line(f"facts.nfe_per_step must be a positive integer; got {count!r}")
    applies_to: object = facts.applies_to
    if not isinstance(applies_to, str):
        return one_line(f"facts.applies_to must be a text; got {applies_to!r}")
    return ""


def declares_order(solver: Solver) -> bool:
    """Whether a solver declares an order of any kind."""
    facts = solver.facts
    return (facts.weak_order or facts.strong_order or facts.ode_order) is not None


def kernel_check(sde: LinearSDE) -> Outcome:
    """Check that a process's transition kernels solve its differential equations."""
    found = []
    # If drift and diffusion diverge at the end, the equations are solved up to t = 0.99.
    end = 1.0 if sde.regular_until == 1 else 0.99
    for s, t in ((0.0, 0.01), (0.3, 0.35), (0.1, 0.9), (0.0, end)):
        psi, covariance = reference_kernel(sde, s, t)
        kernel = sde.transition(s, t)
        std = covariance.diagonal().sqrt()
        scale = torch.outer(std, std)
        off = (kernel.covariance - covariance).abs() / torch.where(scale > 0, scale, 1.0)
        found += [(kernel.mean - psi).abs().max() / psi.abs().max(), off.max()]
    # Use torch's max, because Python's max would ignore NaN.
    worst = float(torch.stack(found).max())
    verdict = Verdict.PASS if worst <= _KERNEL_TOLERANCE else Verdict.FAIL
    message = f"relative error {worst:.1e} against the differential equations"
    return Outcome(_KERNEL_TOLERANCE, worst, verdict, message)


def stiff_check(solver: Solver, problem: Problem) -> Outcome:
    """Report a solver's error near the data, where orders would need unaffordably many steps.

    The check fails if the error is larger than the moments, or is not a number.
    """
    times = quadratic_times(problem.start, problem.end, 100)
    reference = GaussianReference(problem, times[[0, -1]])
    error = moment_error(solver, problem, times, reference)
    size = max(float(moment.abs().max()) for moment in reference.moments(float(times[-1])))
    message = f"error of the moments {error:.1e}, largest moment {size:.1e}"
    return Outcome(None, error, None if error <= size else Verdict.FAIL, message)


def count_check(solver: Solver, problem: Problem) -> Outcome:
    """Check a solver's number of score evaluations per step."""
    steps, g = 8, torch.Generator().manual_seed(0)
    sampler = plan(problem.process, solver, quadratic_times(problem.start, problem.end, steps))
    start = problem.sample(2, g)
    found, again = (sampler.solve(start, generator=g.manual_seed(1), warn=False) for _ in range(2))
    check_repeated(found.state, again.state)
    declared, measured = solver.facts.nfe_per_step, found.nfev / steps
    verdict = Verdict.PASS if measured == declared else Verdict.FAIL
    message = f"{counted(found.nfev, 'evaluation')} in {counted(steps, 'step')}"
    return Outcome(declared, measured, verdict, message)


def bias_check(solver: Solver, problem: Problem, g: torch.Generator, *, quick: bool) -> Outcome:
    """Check that an adaptive solver with noise has no bias on data of two points."""
    n = 5000 if quick else 40_000
    strict = dataclasses.replace(solver, rtol=0.01, atol=0.002)  # type: ignore[type-var]
    ends = torch.tensor([problem.start, problem.end], dtype=torch.float64, device="cpu")
    found = solve(problem.process, strict, problem.sample(n, g), ends, generator=g, warn=False)
    x = found.data.abs() / float(problem.sde.marginal(problem.end).mean)
    ratio, spread = float(x.mean()), float(x.std()) / math.sqrt(n)
    # With 200,000 samples at these tolerances the bias is 0.0000 ± 0.0001 with a Brownian bridge.
    # With fresh noise it is 0.017 (benchmarks/gotta_go_fast_bias.py). The limit separates them.
    passed = found.success and abs(ratio - 1) <= 5 * spread + 1e-3
    message = f"E|x| is {ratio:.4f} ± {spread:.4f} of its value; {found.message}"
    return Outcome(1.0, ratio, Verdict.PASS if passed else Verdict.FAIL, message)
