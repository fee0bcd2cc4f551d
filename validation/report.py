"""Validation reports: a table for the terminal, JSON, and an HTML page with plots."""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cldsde.files import write_whole
from cldsde.solvers.authoring import Solver
from cldsde.solvers.named import canonical_name

from .checks import NOT_APPLICABLE, Check, facts_fault
from .order_estimate import OrderEstimate, Verdict
from .page import data_uri, figure_uri, render_page
from .plots import canvas
from .suite import declares_order
from .summary import declared_too_low, inconclusive, summarise
from .work_precision import WorkPrecision

PAGE = "index.html"


@dataclass(frozen=True)
class Report:
    """Report of a validation.

    Attributes
    ----------
    checks
        The checks, in their order.
    tables
        Work–precision tables.
    complete
        Whether all checks were made.
    solvers
        The solvers by name, for their declared facts.
    """

    checks: Sequence[Check]
    tables: Sequence[WorkPrecision] = ()
    complete: bool = True
    solvers: Mapping[str, Solver] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with versions and the machine."""
        return {
            "cldsde": version("cldsde"),
            "torch": torch.__version__,
            "machine": platform.platform(),
            "complete": self.complete,
            "summary": {name: str(verdict) for name, verdict in summarise(self.checks).items()},
            "inconclusive": inconclusive(self.checks),
            "solvers": self.solver_table(),
            "checks": [check.to_dict() for check in self.checks],
            "work_precision": [json.loads(table.to_json()) for table in self.tables],
        }

    def write_json(self, file: Path) -> None:
        """Write the report to a file; on failure the old file stays."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))

    def to_text(self) -> str:
        """Text for the terminal: a table, reasons of unconfirmed orders, and the number of passes.

        The table has a line for each solver and kind of check.
        """
        rows = [("", "declared", "measured", "on", "verdict")]
        summary = summarise(self.checks)
        for subject in dict.fromkeys([*summary, *(c.subject for c in self._not_applicable())]):
            own = [check for check in self.checks if check.subject == subject]
            if subject == "kernels":
                own = [check for check in self.checks if check.kind == "kernel"]
                worst = float(np.max([check.measured for check in own]))
                rows.append(
                    (
                        "kernels",
                        "≤ 1e-10",
                        f"{worst:.0e}",
                        f"{len(own)} processes",
                        str(summary[subject]),
                    )
                )
                continue
            rows += [
                _row(subject, [check for check in own if check.kind == kind])
                for kind in dict.fromkeys(check.kind for check in own)
            ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
        passed = [name for name, verdict in summary.items() if verdict is Verdict.PASS]
        closing = f"{len(passed)} of {len(summary)} pass"
        if not self.complete:
            closing += ", among the checks before the interruption"
        table = "\n".join(line.rstrip() for line in lines)
        return "\n\n".join(filter(None, [table, "\n".join(self.unconfirmed()), f"{closing}."]))

    def unconfirmed(self) -> list[str]:
        """Reasons why no problem confirms a declared order, one line each."""
        passed = {(c.subject, c.kind) for c in self.checks if c.verdict is Verdict.PASS}
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for c in self.checks:
            if c.verdict is Verdict.INCONCLUSIVE and (c.subject, c.kind) not in passed:
                reasons.setdefault((c.subject, c.kind, c.message), []).append(c.problem)
        return [
            f"{subject}, {kind} on {', '.join(names)}: {message}"
            for (subject, kind, message), names in reasons.items()
        ]

    def summary(self) -> dict[str, Verdict]:
        """A verdict for each measured solver and for the kernels."""
        return summarise(self.checks)

    def inconclusive(self) -> dict[str, str]:
        """Numbers of inconclusive checks, as "2 of 9", for solvers that have some."""
        return inconclusive(self.checks)

    def rejections(self, names: Sequence[str]) -> list[str]:
        """Problems to which the named solvers do not apply, one line per solver and reason."""
        problems: dict[tuple[str, str], list[str]] = {}
        for check in [check for check in self._not_applicable() if check.subject in names]:
            problems.setdefault((check.subject, check.message), []).append(check.problem)
        return [
            f"{subject} is not measured on {', '.join(names)}: {reason}"
            for (subject, reason), names in problems.items()
        ]

    def _not_applicable(self) -> list[Check]:
        return [c for c in self.checks if c.kind == NOT_APPLICABLE and c.verdict is None]

    def unmeasured(self) -> list[str]:
        """Solvers without an order whose samples were not checked, one line each."""
        return [
            f"{name} declares no order, and its samples were not checked on these problems; add "
            "the problem 'VP, ring' or 'CLD, ring', which checks their distribution"
            for name, verdict in summarise(self.checks).items()
            if name in self.solvers and verdict is Verdict.INCONCLUSIVE
            for solver in [self.solvers[name]]
            if not declares_order(solver) and not solver.facts.adaptive
        ]

    def failures(self) -> list[str]:
        """Failed checks, one line each."""
        lines = [
            f"{check.subject}, {check.kind}{place}: {check.message}"
            for check in self.checks
            for place in [f" on {check.problem}" if check.problem else ""]
            if check.verdict is Verdict.FAIL
        ]
        for name in self.solvers:
            kind = declared_too_low([check for check in self.checks if check.subject == name])
            if kind:
                lines.append(f"{name}, {kind}: above the declared order on every problem")
        return lines

    def judgement(self, names: Sequence[str] = ()) -> tuple[list[str], list[str]]:
        """Lines about the checks, and complaints if the validation did not succeed.

        Solvers in ``names`` were named by the user: each of them must have been measured.
        """
        names = [canonical_name(name) for name in names]
        unsure = [f"{counted} of {name}" for name, counted in self.inconclusive().items()]
        lines = [f"Inconclusive checks: {', '.join(unsure)}"] if unsure else []
        lines += [*self.rejections(names), *self.unmeasured(), *self.failures()]
        return lines, [*self.not_measured(names), *self.complaints()]

    def not_measured(self, names: Sequence[str]) -> list[str]:
        """The named solvers without a verdict, and the reason, one clause each."""
        summary, clauses = self.summary(), []
        for name in names:
            if name not in summary:
                reasons = [check.message for check in self.checks if check.subject == name]
                why = next(iter(reasons), "these problems have no check for its declared facts")
                clauses.append(f"{name} was not measured: {why}")
        return clauses

    def complaints(self) -> list[str]:
        """The solvers that failed, and those whose order no problem confirmed, one clause each."""
        summary = self.summary()
        judged = {check.subject for check in self.checks if check.verdict is not None}
        kinds = {
            "failed": [name for name, verdict in summary.items() if verdict is Verdict.FAIL],
            "are inconclusive, because no problem confirmed a declared order": [
                name
                for name, verdict in summary.items()
                if verdict is Verdict.INCONCLUSIVE and name in judged
            ],
        }
        return [
            f"{len(names)} of {len(summary)} {what}: {', '.join(names)}"
            for what, names in kinds.items()
            if names
        ]

    def solver_table(self) -> list[dict[str, str]]:
        """Declared facts and measured orders of each solver, for the documentation."""
        rows = []
        for name, solver in self.solvers.items():
            own = [check for check in self.checks if check.subject == name]
            if facts_fault(solver):
                continue
            facts = solver.facts
            row = {
                "solver": repr(solver),
                "applies to": facts.applies_to,
                "NFE per step": str(facts.nfe_per_step),
            }
            for kind, declared in (
                ("weak order", facts.weak_order),
                ("strong order", facts.strong_order),
                ("ODE order", facts.ode_order),
            ):
                found = [c.estimate for c in own if c.kind == kind and c.estimate is not None]
                row[kind] = "" if declared is None else f"{declared:g}"
                row[f"{kind}, measured"] = _span(found, intervals=True)
            row["error at 100 steps"] = next(
                (f"{c.measured:.1e}" for c in own if c.kind == "error at 100 steps" and c.measured),
                "",
            )
            rows.append(row)
        return rows

    def write_html(self, folder: Path) -> Path:
        """Write ``index.html`` with tables and plots into an existing folder.

        Raises
        ------
        ImportError
            If matplotlib is not installed; it comes with the extra ``validation``.
        """
        report = self.to_dict()
        page = render_page(
            f"Validation of cldsde {report['cldsde']}",
            _BODY,
            report=report,
            summary=summarise(self.checks),
            inconclusive=self.inconclusive(),
            rows=[_html_row(check) for check in self.checks],
            curves=[
                (subject, _curves(subject, self.checks))
                for subject in summarise(self.checks)
                if any(c.subject == subject and _drawable(c) for c in self.checks)
            ],
            diagrams=[(f"{t.problem}, {t.metric}", _diagram(t)) for t in self.tables],
        )
        write_whole(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
        return folder / PAGE


def _row(subject: str, own: Sequence[Check]) -> tuple[str, str, str, str, str]:
    kind = own[0].kind
    declared = {check.declared for check in own if check.declared is not None}
    estimates = [check.estimate for check in own if check.estimate is not None]
    values = [check.measured for check in own if check.measured is not None]
    measured = _span(estimates) if estimates else ", ".join(f"{value:.4g}" for value in values)
    if kind == NOT_APPLICABLE and own[0].verdict is None:
        reasons = "; ".join(dict.fromkeys(check.message for check in own))
        return f"{subject}: {kind}", "", "", _names(own), reasons
    if kind == "distribution" and values:
        measured = f"{_range(values, '.2f')} of the allowed error"
    verdicts = [str(check.verdict) for check in own if check.verdict is not None]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return (
        f"{subject}: {kind}",
        ", ".join(f"{value:g}" for value in sorted(declared)),
        measured,
        _names(own),
        counted,
    )


def _names(own: Sequence[Check]) -> str:
    return ", ".join(dict.fromkeys(check.problem for check in own))


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


def _html_row(check: Check) -> dict[str, str]:
    estimate = check.estimate
    measured = "" if check.measured is None else f"{check.measured:.4g}"
    if check.kind == "distribution" and measured:
        measured = f"{check.measured:.2f} of the allowed error"
    if estimate is not None and math.isfinite(estimate.order):
        measured = f"{estimate.order:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    return {
        "subject": check.subject,
        "kind": check.kind,
        "problem": check.problem,
        "declared": "" if check.declared is None else f"{check.declared:g}",
        "measured": measured,
        "verdict": "" if check.verdict is None else str(check.verdict),
        "message": check.message,
        "seconds": f"{check.seconds:.1f}",
    }


def _drawable(check: Check) -> bool:
    """Whether there is a level to draw."""
    levels = () if check.estimate is None else check.estimate.levels
    return any(math.isfinite(level.error) and level.error > 0 for level in levels)


def _curves(subject: str, found: Sequence[Check]) -> str:
    """Plot of a solver's errors against steps, with hollow markers for dropped levels."""
    figure, axes = canvas(8, 3.6)
    own = [c for c in found if c.subject == subject and _drawable(c)]
    for i, check in enumerate(own):
        assert check.estimate is not None
        levels = [x for x in check.estimate.levels if math.isfinite(x.error) and x.error > 0]
        kept = [level for level in levels if level.kept]
        colour, marker = f"C{i % 10}", "osD^v<>"[i % 7]
        axes.plot(
            [level.step for level in levels],
            [level.error for level in levels],
            marker,
            color=colour,
            markerfacecolor="none",
            markersize=4,
        )
        axes.plot(
            [level.step for level in kept],
            [level.error for level in kept],
            marker + "-",
            color=colour,
            markersize=4,
            linewidth=1,
            label=f"{check.kind} on {check.problem}: {check.estimate.order:.2f}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="1 / number of steps",
        ylabel="error of moments or states",
        title=subject,
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure_uri(figure)


def _diagram(table: WorkPrecision) -> str:
    buffer = io.BytesIO()
    table.plot(buffer, file_format="svg")
    return data_uri(buffer.getvalue(), "image/svg+xml")


_BODY = """\
<p>{{ report.checks | length }} checks{% if not report.complete %} (interrupted, incomplete)
{% endif %}, with torch {{ report.torch }} on {{ report.machine }}. Orders have confidence
intervals. An order passes if its interval is narrow and at most a quarter below the declared order.
For a distribution the table has the largest error of a statistic, divided by the allowed error.</p>
<h2>Summary</h2>
<div class="scroll"><table>
{% for name, verdict in summary.items() %}
<tr><td>{{ name }}</td><td class="{{ verdict }}">{{ verdict }}</td>
<td>{% if name in inconclusive %}{{ inconclusive[name] }} checks inconclusive{% endif %}</td></tr>
{% endfor %}
</table></div>
<h2>Checks</h2>
<div class="scroll"><table>
<tr><th>solver</th><th>check</th><th>problem</th><th>declared</th><th>measured</th>
<th>verdict</th><th>message</th><th>seconds</th></tr>
{% for row in rows %}
<tr><td>{{ row.subject }}</td><td>{{ row.kind }}</td><td>{{ row.problem }}</td>
<td class="number">{{ row.declared }}</td><td class="number">{{ row.measured }}</td>
<td class="{{ row.verdict }}">{{ row.verdict }}</td><td class="words">{{ row.message }}</td>
<td class="number">{{ row.seconds }}</td></tr>
{% endfor %}
</table></div>
{% if diagrams %}<h2>Work and precision</h2>{% endif %}
{% for name, image in diagrams %}
<p><img src="{{ image }}" alt="Error against score evaluations on {{ name }}"></p>
{% endfor %}
{% if curves %}<h2>Errors against steps</h2>
<p>Hollow markers are levels that the estimate dropped.</p>{% endif %}
{% for name, image in curves %}
<p><img src="{{ image }}" alt="Errors of {{ name }} against the step"></p>
{% endfor %}
"""
