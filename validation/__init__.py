"""Measurement of solvers against exact answers."""

from .calibration import Calibration, calibration_ranks
from .checks import Check
from .metrics import bures_wasserstein, mode_spread_error, sliced_wasserstein
from .moments import propagate_moments
from .order_estimate import Level, OrderEstimate, Verdict, estimate_order
from .orders import moment_error, ode_order, strong_order, weak_order
from .posterior_error import PosteriorError, posterior_error
from .posterior_methods import PosteriorMethod, PosteriorSampler, posterior_methods
from .posterior_problems import PosteriorProblem, posterior_problems
from .posterior_suite import PosteriorReport
from .problems import Problem, forward_processes, problems
from .reference import GaussianReference, reference_kernel
from .report import Report
from .suite import checks, summarise
from .work_precision import WorkPrecision, WorkPrecisionPoint, work_precision

__all__ = [
    "Calibration",
    "Check",
    "GaussianReference",
    "Level",
    "OrderEstimate",
    "PosteriorError",
    "PosteriorMethod",
    "PosteriorProblem",
    "PosteriorReport",
    "PosteriorSampler",
    "Problem",
    "Report",
    "Verdict",
    "WorkPrecision",
    "WorkPrecisionPoint",
    "bures_wasserstein",
    "calibration_ranks",
    "checks",
    "estimate_order",
    "forward_processes",
    "mode_spread_error",
    "moment_error",
    "ode_order",
    "posterior_error",
    "posterior_methods",
    "posterior_problems",
    "problems",
    "propagate_moments",
    "reference_kernel",
    "sliced_wasserstein",
    "strong_order",
    "summarise",
    "weak_order",
    "work_precision",
]
