"""Report of a validation: verdicts, a table for the terminal, JSON, and plots."""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cldsde.files import write_whole
from cldsde.solvers.authoring import Solver
from cldsde.solvers.named import canonical_name

from .checks import NOT_APPLICABLE, Check, declares_order, facts_fault
from .order_estimate import Level, OrderEstimate, Verdict
from .plain import canvas, plain, text_table, write_json
from .work_precision import WorkPrecision

TABLE = "report.txt"
"""Name of the file with the table in a folder of plots."""

_ORDERS = ("weak order", "strong order", "ODE order")
_ADVICE = (
    "Measure these orders in Python with more numbers of steps, or a longer range of them, such as "
    "weak_order(solver, problem, steps=(64, 128, …)) of cldsde.validation."
)


@dataclass(frozen=True)
class Report:
    """Report of a validation."""

    checks: Sequence[Check]
    tables: Sequence[WorkPrecision] = ()
    complete: bool = True  #: Whether all checks were made.
    solvers: Mapping[str, Solver] = field(default_factory=dict)  #: For their declared facts.

    def summary(self) -> dict[str, Verdict]:
        """A verdict for each measured solver, and for the kernels.

        - FAIL: a check failed, or an order is declared below the measured order on every problem.
        - PASS: every kind of order that was measured passed on some problem. If no order was
          measured, another check of the samples must pass; the number of score evaluations does not
          count.
        - INCONCLUSIVE: otherwise.
        """
        summary = {}
        measured = [c for c in self.checks if c.kind != NOT_APPLICABLE or c.verdict is not None]
        for subject in dict.fromkeys(_subject_of(check) for check in measured):
            own = self._own(subject)
            passed = {check.kind for check in own if check.verdict is Verdict.PASS}
            if any(check.verdict is Verdict.FAIL for check in own) or _declared_too_low(own):
                summary[subject] = Verdict.FAIL
            else:
                orders = {check.kind for check in own} & set(_ORDERS)
                settled = orders <= passed if orders else bool(passed - {"NFE per step"})
                summary[subject] = Verdict.PASS if settled else Verdict.INCONCLUSIVE
        return summary

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with versions and the machine."""
        return {
            "cldsde": version("cldsde"),
            "torch": torch.__version__,
            "machine": platform.platform(),
            "complete": self.complete,
            "summary": {name: str(verdict) for name, verdict in self.summary().items()},
            "inconclusive": self.inconclusive(),
            "solvers": self.solver_table(),
            "checks": [check.to_dict() for check in self.checks],
            "work_precision": plain(self.tables),
        }

    def write_json(self, file: Path) -> None:
        """Write the report to a file; on failure the old file stays."""
        write_json(file, self.to_dict())

    def to_text(self) -> str:
        """Text for the terminal: table, reasons of unconfirmed orders, and number of passes."""
        rows = [("", "declared", "measured", "on", "verdict")]
        summary = self.summary()
        for subject in dict.fromkeys([*summary, *(c.subject for c in self._not_applicable())]):
            own = self._own(subject)
            if subject == "kernels":
                errors = [c.measured for c in own if c.measured is not None]
                worst = f"{max(errors):.0e}" if errors else ""
                counted = f"{len(own)} processes", str(summary[subject])
                rows.append((subject, "≤ 1e-10", worst, *counted))
                continue
            rows += [
                _row(subject, [check for check in own if check.kind == kind])
                for kind in dict.fromkeys(check.kind for check in own)
            ]
        passed = [name for name, verdict in summary.items() if verdict is Verdict.PASS]
        closing = f"{len(passed)} of {len(summary)} pass"
        if not self.complete:
            closing += ", among the checks before the interruption"
        parts = [text_table(rows), "\n".join(self.unconfirmed()), f"{closing}."]
        return "\n\n".join(filter(None, parts))

    def unconfirmed(self) -> list[str]:
        """Reasons why no problem confirms a declared order, one line each, and what to do."""
        passed = {(c.subject, c.kind) for c in self.checks if c.verdict is Verdict.PASS}
        unsure = [c for c in self.checks if c.verdict is Verdict.INCONCLUSIVE]
        doubtful = [c for c in unsure if (c.subject, c.kind) not in passed]
        groups = _grouped(((c.subject, c.kind, c.message), c.problem) for c in doubtful)
        lines = [f"{subject}, {kind} on {on}: {message}" for (subject, kind, message), on in groups]
        return [*lines, _ADVICE] if any(c.estimate for c in doubtful) else lines

    def judgement(self, names: Sequence[str] = ()) -> tuple[list[str], list[str]]:
        """Lines about the checks, and complaints if the validation did not succeed.

        Solvers in ``names`` were named by the user: each of them must have been measured.
        """
        names = [canonical_name(name) for name in names]
        unsure = [f"{counted} of {name}" for name, counted in self.inconclusive().items()]
        lines = [f"Inconclusive checks: {', '.join(unsure)}"] if unsure else []
        lines += self.rejections(names)
        lines += [
            f"{name} declares no order, and its samples were not checked on these problems; add "
            "the problem 'VP, ring' or 'CLD, ring', which checks their distribution"
            for name, verdict in self.summary().items()
            if verdict is Verdict.INCONCLUSIVE and (solver := self.solvers.get(name)) is not None
            if not declares_order(solver) and not solver.facts.adaptive
        ]
        return [*lines, *self.failures()], self._complaints(names)

    def inconclusive(self) -> dict[str, str]:
        """Numbers of inconclusive checks, as "2 of 9", for solvers that have some."""
        counts = {}
        for subject in self.summary():
            own = [c.verdict for c in self._own(subject) if c.verdict is not None]
            if Verdict.INCONCLUSIVE in own:
                counts[subject] = f"{own.count(Verdict.INCONCLUSIVE)} of {len(own)}"
        return counts

    def rejections(self, names: Sequence[str]) -> list[str]:
        """Problems to which the named solvers do not apply, one line per solver and reason."""
        own = [((c.subject, c.message), c.problem) for c in self._not_applicable()]
        return [
            f"{subject} is not measured on {problems}: {reason}"
            for (subject, reason), problems in _grouped(own)
            if subject in names
        ]

    def failures(self) -> list[str]:
        """Failed checks, one line each."""
        lines = [
            f"{c.subject}, {c.kind}{f' on {c.problem}' if c.problem else ''}: {c.message}"
            for c in self.checks
            if c.verdict is Verdict.FAIL
        ]
        low = {name: _declared_too_low(self._own(name)) for name in self.solvers}
        words = "above the declared order on every problem"
        return [*lines, *(f"{name}, {kind}: {words}" for name, kind in low.items() if kind)]

    def _own(self, subject: str) -> list[Check]:
        return [check for check in self.checks if _subject_of(check) == subject]

    def _not_applicable(self) -> list[Check]:
        return [c for c in self.checks if c.kind == NOT_APPLICABLE and c.verdict is None]

    def _complaints(self, names: Sequence[str]) -> list[str]:
        """Named solvers without a verdict, failed ones, and inconclusive ones, one clause each."""
        summary = self.summary()
        missing = {name: self._own(name) for name in names if name not in summary}
        why = "these problems have no check for its declared facts"
        clauses = [
            f"{name} was not measured: {own[0].message if own else why}"
            for name, own in missing.items()
        ]
        judged = {_subject_of(check) for check in self.checks if check.verdict is not None}
        inconclusive = "are inconclusive, because no problem confirmed a declared order"
        for fault, words in ((Verdict.FAIL, "failed"), (Verdict.INCONCLUSIVE, inconclusive)):
            if found := [name for name, v in summary.items() if v is fault and name in judged]:
                clauses.append(f"{len(found)} of {len(summary)} {words}: {', '.join(found)}")
        return clauses

    def solver_table(self) -> list[dict[str, str]]:
        """Declared facts and measured orders of each solver, for the documentation."""
        rows = []
        sound = {name: x for name, x in self.solvers.items() if not facts_fault(x)}
        for name, solver in sound.items():
            own, facts = self._own(name), solver.facts
            row = {
                "solver": repr(solver),
                "applies to": facts.applies_to,
                "NFE per step": str(facts.nfe_per_step),
            }
            declarations = facts.weak_order, facts.strong_order, facts.ode_order
            for kind, declared in zip(_ORDERS, declarations, strict=True):
                found = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
                row[kind] = "" if declared is None else f"{declared:g}"
                row[f"{kind}, measured"] = _span(found, intervals=True)
            errors = (c.measured for c in own if c.kind == "error at 100 steps" and c.measured)
            row["error at 100 steps"] = next((f"{error:.1e}" for error in errors), "")
            rows.append(row)
        return rows

    def write_plots(self, folder: Path) -> None:
        """Write the table and plots into a folder, and remove `earlier_files` from it.

        The plots are a diagram of work and precision for each problem that has one, and the errors
        of each solver against the step.
        """
        left = set(earlier_files(folder))
        text = self.to_text() + "\n"
        files: dict[Path, Callable[[Path], object]] = {
            folder / TABLE: lambda path: path.write_text(text, encoding="utf-8")
        }
        for table in self.tables:
            files[folder / _file_name("work and precision", table.problem)] = table.plot
        for subject in self.summary():
            own = [check for check in self._own(subject) if _drawable_levels(check)]
            if own:
                figure = _order_curves(subject, own)
                files[folder / _file_name("orders", subject)] = figure.savefig
        for file, writer in files.items():
            write_whole(file, writer)
        for file in left - {*files}:
            file.unlink()


def _subject_of(check: Check) -> str:
    """The solver of a check; all kernels are one subject."""
    return "kernels" if check.kind == "kernel" else check.subject


def _declared_too_low(own: Sequence[Check]) -> str:
    """Kind of order that exceeds the declared order on every conclusive problem; empty if none."""
    for kind in _ORDERS:
        estimates = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
        conclusive = [e for e in estimates if e.verdict is not Verdict.INCONCLUSIVE]
        if len(conclusive) > 1 and all(e.exceeds for e in conclusive):
            return kind
    return ""


def earlier_files(folder: Path) -> list[Path]:
    """Files of a folder that have names of the table and plots of a report."""
    patterns = TABLE, "orders-*.svg", "work-and-precision-*.svg"
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _grouped(pairs: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Keys with the names that go with each, joined."""
    groups: dict[Any, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return [(key, ", ".join(names)) for key, names in groups.items()]


def _row(subject: str, own: Sequence[Check]) -> tuple[str, str, str, str, str]:
    kind = own[0].kind
    names = ", ".join(dict.fromkeys(check.problem for check in own))
    if kind == NOT_APPLICABLE and own[0].verdict is None:
        reasons = "; ".join(dict.fromkeys(check.message for check in own))
        return f"{subject}: {kind}", "", "", names, reasons
    orders = sorted({check.declared for check in own if check.declared is not None})
    declared = ", ".join(f"{order:g}" for order in orders)
    estimates = [check.estimate for check in own if check.estimate is not None]
    values = [check.measured for check in own if check.measured is not None]
    measured = _span(estimates) if estimates else ", ".join(f"{value:.4g}" for value in values)
    if kind == "distribution" and values:
        measured = f"{_range(values, '.2f')} of the allowed error"
    verdicts = Counter(str(check.verdict) for check in own if check.verdict is not None)
    counted = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    return f"{subject}: {kind}", declared, measured, names, counted


def _span(estimates: Sequence[OrderEstimate], *, intervals: bool = False) -> str:
    """Range of the orders measured on several problems."""
    found = [estimate for estimate in estimates if math.isfinite(estimate.order)]
    if not found:
        return "—" if estimates else ""
    text = _range([estimate.order for estimate in found], ".2f")
    if intervals:
        ends = min(estimate.low for estimate in found), max(estimate.high for estimate in found)
        text += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    return text


def _range(values: Sequence[float], digits: str) -> str:
    low, high = (f"{value:{digits}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def _drawable_levels(check: Check) -> list[Level]:
    """Levels that logarithmic axes can show."""
    levels = () if check.estimate is None else check.estimate.levels
    return [level for level in levels if 0 < level.error < math.inf]


def _order_curves(subject: str, own: Sequence[Check]) -> Any:
    """Plot of a solver's errors against steps, with hollow markers for dropped levels."""
    figure, axes = canvas(8, 3.6)
    for i, check in enumerate(own):
        assert check.estimate is not None
        levels = _drawable_levels(check)
        kept = [level for level in levels if level.kept]
        marker, style = "osD^v<>"[i % 7], {"color": f"C{i % 10}", "markersize": 4, "linewidth": 1}
        steps, errors = [x.step for x in levels], [x.error for x in levels]
        axes.plot(steps, errors, marker, **style, markerfacecolor="none")
        label = f"{check.kind} on {check.problem}: {check.estimate.order:.2f}"
        steps, errors = [x.step for x in kept], [x.error for x in kept]
        axes.plot(steps, errors, f"{marker}-", **style, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="1 / number of steps",
        ylabel="error of moments or states",
        title=subject,
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _file_name(kind: str, subject: str) -> str:
    return re.sub(r"\W+", "-", f"{kind} {subject}") + ".svg"
