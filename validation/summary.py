"""Verdicts of a validation: a summary of the checks of each solver."""

from __future__ import annotations

from collections.abc import Sequence

from .checks import NOT_APPLICABLE, Check
from .order_estimate import Verdict

ORDERS = ("weak order", "strong order", "ODE order")


def summarise(found: Sequence[Check]) -> dict[str, Verdict]:
    """A verdict for each measured solver, and for the kernels.

    - FAIL: a check failed, or an order is declared below the measured order on every problem.
    - PASS: every kind of order that was measured passed on some problem. If no order was measured,
      another check of the samples must pass; the number of score evaluations does not count.
    - INCONCLUSIVE: otherwise.
    """
    summary = {}
    measured = [c for c in found if c.kind != NOT_APPLICABLE or c.verdict is not None]
    for subject in dict.fromkeys(subject_of(check) for check in measured):
        own = [check for check in found if subject_of(check) == subject]
        passed = {check.kind for check in own if check.verdict is Verdict.PASS}
        if any(check.verdict is Verdict.FAIL for check in own) or declared_too_low(own):
            summary[subject] = Verdict.FAIL
        else:
            orders = {check.kind for check in own} & set(ORDERS)
            settled = orders <= passed if orders else bool(passed - {"NFE per step"})
            summary[subject] = Verdict.PASS if settled else Verdict.INCONCLUSIVE
    return summary


def subject_of(check: Check) -> str:
    """The solver of a check; all kernels are one subject."""
    return "kernels" if check.kind == "kernel" else check.subject


def declared_too_low(own: Sequence[Check]) -> str:
    """Kind of order that exceeds the declared order on every conclusive problem; empty if none."""
    for kind in ORDERS:
        estimates = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
        conclusive = [e for e in estimates if e.verdict is not Verdict.INCONCLUSIVE]
        if len(conclusive) > 1 and all(e.exceeds for e in conclusive):
            return kind
    return ""
