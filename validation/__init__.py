"""Measurement of solvers against exact answers."""

from .metrics import bures_wasserstein, sliced_wasserstein
from .moments import propagate_moments
from .order_estimate import OrderEstimate, estimate_order
from .orders import moment_error, ode_order, strong_order, weak_order
from .posterior_error import calibration_ranks, posterior_error
from .posterior_methods import posterior_methods
from .posterior_problems import posterior_problems
from .problems import Problem, problems
from .reference import GaussianReference, reference_kernel
from .work_precision import WorkPrecision, work_precision

__all__ = [
    "GaussianReference",
    "OrderEstimate",
    "Problem",
    "WorkPrecision",
    "bures_wasserstein",
    "calibration_ranks",
    "estimate_order",
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
    "weak_order",
    "work_precision",
]
