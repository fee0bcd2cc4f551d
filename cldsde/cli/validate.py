"""Measure the convergence order of every solver against what it declares.

Checks the transition kernels, and each solver on each reference problem that it applies to, against
answers that are known exactly. The exit code is 1 where a declared order fails. A solver of one's
own is named as module:ClassName. Results so far are kept when the command is interrupted.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.solvers import Integrator, Solver, find_solver, named_solvers
from cldsde.solvers.progress import progress_bar
from cldsde.validation import (
    Check,
    Problem,
    Report,
    Verdict,
    WorkPrecision,
    problems,
    work_precision,
)
from cldsde.validation.suite import (
    QUICK_PROBLEMS,
    checks,
    count,
    refusal,
    summarise,
)

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]


INTERRUPTED = "interrupted; results so far are in the file of --json and the page of --out"

_DIAGRAMS = ("VP", "CLD")  # problems that work–precision diagrams are drawn of


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde validate``."""
    parser.add_argument(
        "--quick", action="store_true", help="fewer problems, levels and samples, under two minutes"
    )
    parser.add_argument(
        "--solver",
        type=str,
        action="append",
        metavar="NAME",
        help="a solver's name or module:ClassName, again for more; all where not given",
    )
    parser.add_argument(
        "--problem",
        type=str,
        action="append",
        metavar="NAME",
        help="a problem's name, again for more; all where not given",
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="write all numbers to a file")
    parser.add_argument(
        "--out", type=str, metavar="DIR", help="write a page with plots to a folder"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of what is sampled")


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and return the work that is left.

    Raises
    ------
    ImportError
        If a page is wanted and the extra ``validation`` is not installed.
    ValueError
        If a solver or a problem does not exist, or the seed is out of range.
    OSError
        If a file or folder cannot be written.
    """
    if not 0 <= options.seed < 2**63:
        msg = f"--seed must lie between 0 and 2^63 - 1; got {options.seed}"
        raise ValueError(msg)
    if any(":" in name for name in options.solver or ()):
        sys.path.insert(0, "")  # modules are looked for where the user stands
    chosen = {name: find_solver(name) for name in options.solver or named_solvers()}
    known = problems()
    unknown = [name for name in options.problem or () if name not in known]
    if unknown:
        msg = f"--problem must be one of {', '.join(map(repr, known))}; got {unknown[0]!r}"
        raise ValueError(msg)
    asked = options.problem or (QUICK_PROBLEMS if options.quick else known)
    cases = {name: known[name] for name in asked}
    folder = _writable_folder(options.out)
    file = _writable_file(options.json)
    kernels = options.solver is None

    def work() -> None:
        found: list[Check] = []
        tables: list[WorkPrecision] = []
        complete = False
        total = count(chosen, cases, kernels=kernels, quick=options.quick)
        made = checks(chosen, cases, kernels=kernels, quick=options.quick, seed=options.seed)
        try:
            with progress_bar(None, shown=True, total=total, desc="checks") as bar:
                for check in made:
                    found.append(check)
                    bar.set_postfix_str(check.subject)
                    bar.update()
                    if file is not None:
                        Report(found, complete=False, solvers=chosen).write_json(file)
            if folder is not None:
                kept = summarise(found)
                drawn = {name: chosen[name] for name in chosen if kept.get(name) is Verdict.PASS}
                tables += _diagrams(drawn, cases)
            complete = True
        finally:
            report = Report(found, tables, complete, chosen)
            if file is not None:
                report.write_json(file)
            if folder is not None:
                report.write_html(folder)
                print(f"The page is {(folder / 'index.html').resolve()}")
            print(report.to_text())
        _judge(report, options.solver or [], cases)

    return work


def _judge(report: Report, named: list[str], cases: dict[str, Problem]) -> None:
    """Raise where a solver failed, or one that was named was not measured at all."""
    summary = report.summary()
    idle = [name for name in named if name not in summary]
    if idle:
        reasons = [refusal(report.solvers[idle[0]], problem) for problem in cases.values()]
        why = next(filter(None, reasons), "it declares nothing that these problems measure")
        msg = f"--solver {idle[0]}: no problem to measure it on: {why}"
        raise ValueError(msg)
    failed = [name for name, verdict in summary.items() if verdict is Verdict.FAIL]
    if failed:
        print("\n" + "\n".join(report.failures()), file=sys.stderr)
        msg = f"{len(failed)} of {len(summary)} failed: {', '.join(failed)}"
        raise ArithmeticError(msg)
    open_ones = [name for name, verdict in summary.items() if verdict is Verdict.INCONCLUSIVE]
    if open_ones:
        print(f"\nNeither passed nor failed: {', '.join(open_ones)}", file=sys.stderr)


def _diagrams(
    chosen: dict[str, Solver | Integrator], cases: dict[str, Problem]
) -> list[WorkPrecision]:
    tables = []
    for problem in cases.values():
        if problem.name in _DIAGRAMS:
            fitting = {
                name: solver
                for name, solver in chosen.items()
                if isinstance(solver, Solver) and not refusal(solver, problem)
            }
            tables.append(work_precision(problem, fitting, progress=True))
    return tables


def _writable_file(name: str | None) -> Path | None:
    if name is None:
        return None
    file = Path(name).expanduser().resolve()
    if not name.strip() or (file.exists() and not file.is_file()):
        msg = f"--json must be the name of a file; got {name!r}"
        raise ValueError(msg)
    _try_to_write(file.parent)
    return file


def _writable_folder(name: str | None) -> Path | None:
    if name is None:
        return None
    if not name.strip():
        msg = "--out must be the name of a folder; got an empty one"
        raise ValueError(msg)
    if importlib.util.find_spec("matplotlib") is None:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg)
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        msg = f"--out must be the name of a folder; {name!r} is a file"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    _try_to_write(folder)
    return folder


def _try_to_write(folder: Path) -> None:
    """Raise OSError now rather than after the work."""
    if not folder.is_dir():
        msg = f"{folder} is no folder"
        raise NotADirectoryError(msg)
    with tempfile.TemporaryFile(dir=folder):
        pass
