"""Every solver on every problem that it applies to, against what it declares."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cldsde import solvers
from cldsde.linear import LinearSDE
from cldsde.solvers import Integrator, PathDriven, Solver, solve
from cldsde.solvers.grids import quadratic_times, uniform_times

from .order_estimate import OrderEstimate, Verdict
from .orders import FlowCase, PathCase, moment_error, ode_order, strong_order, weak_order
from .plain import plain
from .problems import Problem, forward_processes
from .reference import GaussianReference, reference_kernel

__all__ = [
    "QUICK_PROBLEMS",
    "Check",
    "checks",
    "count",
    "declared_too_low",
    "find_solver",
    "named_solvers",
    "refusal",
    "summarise",
]

QUICK_PROBLEMS = ("VP", "VE", "CLD", "CLD, linear schedule", "VP, two points")
"""What there is time for in a quick validation: a problem of each kind of difficulty."""


_KERNEL_TOLERANCE = 1e-10


def named_solvers() -> dict[str, Solver | Integrator]:
    """The solvers of the package that are validated, by the name the command knows them by."""
    multistep = solvers.ExponentialMultistep
    return {
        "euler-maruyama": solvers.EulerMaruyama(),
        "stochastic-heun": solvers.StochasticHeun(),
        "exponential-euler": solvers.ExponentialEuler(),
        "sscs": solvers.SSCS(),
        "sscs-midpoint": solvers.SSCS(score_step="midpoint"),
        "sscs-gaussian": solvers.SSCS(score_step="gaussian"),
        **{
            f"splitting-{word.lower()}": solvers.Splitting(scheme=word)
            for word in ("OBA", "BAO", "OBAB", "BAOAB", "OABAO")
        },
        "splitting-obab-shared": solvers.Splitting(scheme="OBAB", shared_score=True),
        "reverse-diffusion": solvers.ReverseDiffusion(),
        "ancestral": solvers.Ancestral(),
        "multistep-1-sde": multistep(order=1, stochasticity=1.0),
        "multistep-2-sde": multistep(order=2, stochasticity=1.0),
        "multistep-3-sde": multistep(order=3, stochasticity=1.0),
        "multistep-1": multistep(order=1),
        "multistep-2": multistep(order=2),
        "multistep-3": multistep(order=3),
        "multistep-1-corrector": multistep(order=1, corrector=True),
        "multistep-2-corrector": multistep(order=2, corrector=True),
        "multistep-3-corrector": multistep(order=3, corrector=True),
        "multistep-2-noise": multistep(order=2, prediction="noise"),
        "edm-heun": solvers.EDMHeun(),
        "edm-heun-churn": solvers.EDMHeun(churn=10.0),
        "probability-flow": solvers.ProbabilityFlow(),
        "probability-flow-bosh3": solvers.ProbabilityFlow(method="bosh3"),
        "probability-flow-dopri8": solvers.ProbabilityFlow(method="dopri8"),
        "gotta-go-fast": solvers.GottaGoFast(),
        "torchsde-euler": solvers.TorchSDE(method="euler"),
        "torchsde-srk": solvers.TorchSDE(method="srk"),
        "torchdiffeq-rk4": solvers.TorchDiffEq(method="rk4"),
        "torchdiffeq-dopri5": solvers.TorchDiffEq(method="dopri5"),
    }


def find_solver(name: str) -> Solver | Integrator:
    """A solver by its name, or a user's by ``module:ClassName``, made without arguments.

    Raises
    ------
    ValueError
        If there is none of that name, or what is there is no solver.
    """
    if ":" not in name:
        known = named_solvers()
        if name not in known:
            msg = f"solver must be module:ClassName or one of {', '.join(known)}; got {name!r}"
            raise ValueError(msg)
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        solver: object = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        msg = f"solver {name!r} cannot be loaded and made without arguments: {error}"
        raise ValueError(msg) from error
    if isinstance(solver, Solver | Integrator):
        return solver
    msg = f"solver {name!r} must be a Solver or an Integrator of cldsde.solvers; got {solver!r}"
    raise ValueError(msg)


@dataclass(frozen=True)
class Check:
    """One measurement against what is declared.

    Attributes
    ----------
    kind
        ``"kernel"``, ``"weak order"``, ``"strong order"``, ``"ODE order"``, ``"NFE a step"``,
        ``"bias"`` or ``"error at 100 steps"``.
    subject
        Name of the solver, or of the process whose kernel it is.
    problem
        Name of the problem.
    declared, measured
        Numbers: orders, or errors; None where there is none.
    verdict
        PASS, FAIL or INCONCLUSIVE; None for what is only reported.
    message
        What was found, in words.
    seconds
        Time it took.
    estimate
        The levels behind an order; None for other kinds.
    """

    kind: str
    subject: str
    problem: str
    declared: float | None
    measured: float | None
    verdict: Verdict | None
    message: str
    seconds: float
    estimate: OrderEstimate | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        estimate = None if self.estimate is None else self.estimate.to_dict()
        result: dict[str, Any] = plain({**asdict(self), "estimate": estimate})
        return result


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
            yield _kernel_check(name, make())
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


def _kernel_check(name: str, sde: LinearSDE) -> Check:
    began, found = time.perf_counter(), []
    for s, t in ((0.0, 0.01), (0.3, 0.35), (0.1, 0.9), (0.0, 1.0)):
        psi, covariance = reference_kernel(sde, s, t)
        kernel = sde.transition(s, t)
        deviation = covariance.diagonal().sqrt()
        scale = torch.outer(deviation, deviation)
        errors = (
            (kernel.mean - psi).abs() / psi.abs().max(),
            (kernel.covariance - covariance).abs() / torch.where(scale > 0, scale, 1.0),
        )
        found.append(torch.stack([error.max() for error in errors]).max())
    # Not Python's max, which would drop what is not a number.
    worst = float(torch.stack(found).max())
    passed = worst <= _KERNEL_TOLERANCE
    return Check(
        kind="kernel",
        subject=name,
        problem="transition",
        declared=_KERNEL_TOLERANCE,
        measured=worst,
        verdict=Verdict.PASS if passed else Verdict.FAIL,
        message=f"relative error {worst:.1e} against the differential equations",
        seconds=time.perf_counter() - began,
    )


_STIFF, _BIASED = "CLD, stiff end", "VP, two points"
_RINGS = ("CLD, ring", "VP, ring")  # for work and precision: single samples rule their errors
_SLOW = ("four components", "non-commuting")  # flows of general processes take minutes
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
    kinds = []
    if facts.ode_order is not None and problem.name not in _SLOW:
        kinds.append("ODE order")
    if isinstance(solver, Solver) and problem.gaussian and facts.weak_order is not None:
        kinds.append("weak order")
    if isinstance(solver, Solver) and not problem.gaussian and problem.dimension == 1 and not quick:
        kinds += ["weak order"] if isinstance(solver, PathDriven) and facts.weak_order else []
    if isinstance(solver, Solver) and problem.gaussian and facts.strong_order is not None:
        kinds.append("strong order")
    if isinstance(solver, Solver) and problem.name in _COUNTED:
        kinds.append("NFE a step")
    return kinds


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
            return _bias_check(name, solver, problem, g, began, quick=quick)
        if kind in _SIMPLE:
            return _SIMPLE[kind](name, solver, problem, began)
        followed = kind != "strong order" or _follows(solver, problem)
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
        return bool(self.get(f"refusal of {name}", problem, lambda g: refusal(solver, problem)))

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
        steps = _halved(finest[kind], 5 if cases.quick else 6)
        if solver.facts.adaptive:
            # Of high orders halved steps leave few levels above rounding.
            coarsest = 16 if (solver.facts.ode_order or 0) <= 5 else 8
            levels = range(6 if cases.quick else 9)
            steps = [round(coarsest * 2 ** (level / 2)) for level in levels]
        return ode_order(solver, problem, steps=steps, case=flow)
    assert isinstance(solver, Solver)
    if kind == "strong order":
        times = uniform_times(problem.start, problem.end, finest[kind])
        samples = 500 if cases.quick else 2000
        paths = cases.get(kind, problem, lambda g: PathCase(problem, times, samples, g))
        return strong_order(solver, problem, steps=_halved(finest[kind], 4), case=paths)
    if problem.gaussian:
        ends = torch.tensor([problem.start, problem.end], dtype=torch.float64)
        reference = cases.get(kind, problem, lambda g: GaussianReference(problem, ends))
        steps = _halved(finest[kind], 4 if cases.quick else 6)
        return weak_order(solver, problem, steps=steps, reference=reference)
    return weak_order(solver, problem, steps=_halved(128, 5), generator=generator)


_FINEST = {"ODE order": 512, "strong order": 512, "weak order": 1024}
_FINEST_QUICK = {"ODE order": 256, "strong order": 256, "weak order": 512}


def _halved(finest: int, levels: int) -> list[int]:
    """Numbers of steps, doubling up to the finest."""
    return [finest // 2**level for level in reversed(range(levels))]


def _stiff_check(name: str, solver: Solver | Integrator, problem: Problem, began: float) -> Check:
    """Near the data orders show at unaffordable steps only; what counts is the error itself."""
    assert isinstance(solver, Solver)
    error = moment_error(solver, problem, quadratic_times(problem.start, problem.end, 100))
    return Check(
        kind="error at 100 steps",
        subject=name,
        problem=problem.name,
        declared=None,
        measured=error,
        verdict=None,
        message=f"moments off by {error:.1e}",
        seconds=time.perf_counter() - began,
    )


def _count_check(name: str, solver: Solver | Integrator, problem: Problem, began: float) -> Check:
    """Whether a solver asks for the score as often as it says."""
    steps, g = 8, torch.Generator().manual_seed(0)
    times = quadratic_times(problem.start, problem.end, steps)
    found = solve(problem.process, solver, problem.sample(2, g), times, generator=g)
    declared, measured = solver.facts.nfe_per_step, found.nfev / steps
    return Check(
        kind="NFE a step",
        subject=name,
        problem=problem.name,
        declared=declared,
        measured=measured,
        verdict=Verdict.PASS if measured == declared else Verdict.FAIL,
        message=f"{found.nfev} evaluations in {steps} steps",
        seconds=time.perf_counter() - began,
    )


def _bias_check(
    name: str,
    solver: Solver | Integrator,
    problem: Problem,
    g: torch.Generator,
    began: float,
    *,
    quick: bool,
) -> Check:
    """Whether an adaptive solver with noise leaves two points where they are."""
    n = 5000 if quick else 40_000
    strict = dataclasses.replace(solver, rtol=0.01, atol=0.002)  # type: ignore[type-var]
    ends = torch.tensor([problem.start, problem.end], dtype=torch.float64)
    found = solve(problem.process, strict, problem.sample(n, g), ends, generator=g)
    x = found.data.abs() / float(problem.sde.marginal(problem.end).mean)
    ratio, spread = float(x.mean()), float(x.std()) / math.sqrt(n)
    # What such tolerances leave is a thousandth.
    passed = found.success and abs(ratio - 1) <= 5 * spread + 1e-3
    return Check(
        kind="bias",
        subject=name,
        problem=problem.name,
        declared=1.0,
        measured=ratio,
        verdict=Verdict.PASS if passed else Verdict.FAIL,
        message=f"E|x| is {ratio:.4f} ± {spread:.4f} of its value; {found.message}",
        seconds=time.perf_counter() - began,
    )


_SIMPLE = {"error at 100 steps": _stiff_check, "NFE a step": _count_check}


def refusal(solver: Solver | Integrator, problem: Problem) -> str:
    """Why a solver does not take a problem's process; empty where it does."""
    if isinstance(solver, Solver):
        try:
            solver.prepare(problem.process, uniform_times(problem.start, problem.end, 512))
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
    problem; PASS where some check passed and none failed.
    """
    summary = {}
    for subject in dict.fromkeys(_group(check) for check in found):
        own = [check for check in found if _group(check) == subject]
        verdicts = {check.verdict for check in own}
        if Verdict.FAIL in verdicts or declared_too_low(own):
            summary[subject] = Verdict.FAIL
        else:
            summary[subject] = Verdict.PASS if Verdict.PASS in verdicts else Verdict.INCONCLUSIVE
    return summary


def _group(check: Check) -> str:
    return "kernels" if check.kind == "kernel" else check.subject


def declared_too_low(own: Sequence[Check]) -> str:
    """Which kind of order of a solver is above what it declares wherever it is known; or empty."""
    for kind in ("weak order", "strong order", "ODE order"):
        estimates = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
        conclusive = [e for e in estimates if e.verdict is not Verdict.INCONCLUSIVE]
        if len(conclusive) > 1 and all(e.exceeds for e in conclusive):
            return kind
    return ""
