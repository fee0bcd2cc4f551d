"""Measurement of solvers against exact answers."""

from .checks import Check
from .metrics import bures_wasserstein, mode_spread_error, sliced_wasserstein
from .moments import propagate_moments
from .order_estimate import Level, OrderEstimate, Verdict, estimate_order
from .orders import moment_error, ode_order, strong_order, weak_order
from .problems import Problem, forward_processes, problems
from .reference import GaussianReference, reference_kernel
from .report import Report
from .suite import checks, summarise
from .work_precision import WorkPrecision, WorkPrecisionPoint, work_precision

__all__ = [
    "Check",
    "GaussianReference",
    "Level",
    "OrderEstimate",
    "Problem",
    "Report",
    "Verdict",
    "WorkPrecision",
    "WorkPrecisionPoint",
    "bures_wasserstein",
    "checks",
    "estimate_order",
    "forward_processes",
    "mode_spread_error",
    "moment_error",
    "ode_order",
    "problems",
    "propagate_moments",
    "reference_kernel",
    "sliced_wasserstein",
    "strong_order",
    "summarise",
    "weak_order",
    "work_precision",
]
