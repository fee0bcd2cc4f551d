"""Measure the convergence order of every solver and compare it with the declared order.

The command checks the transition kernels, and each solver on each applicable reference problem,
against exact answers. Name your own solver as module:ClassName. If the command is interrupted, it
keeps the results so far.

The command exits with 1 if a check fails, or if no problem confirms a declared order or checks a
solver's samples. It also exits with 1 if no problem applies to a named solver, or if a result
cannot be written.

With --posterior the command measures posterior samplers of inverse problems instead, against exact
posteriors. It exits with 1 if a sampler that claims the exact posterior misses it, or if a planted
wrong sampler is not detected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cldsde.progress import progress_bar
from cldsde.solvers import find_solver, named_solvers
from cldsde.solvers.authoring import Solver
from cldsde.solvers.named import canonical_name
from cldsde.validation import Problem, WorkPrecision, problems, work_precision
from cldsde.validation.checks import Check, in_words
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.report import PAGE, Report, part_of
from cldsde.validation.suite import (
    QUICK_PROBLEMS,
    checks,
    count,
    declares_order,
    rejection,
)
from cldsde.validation.summary import summarise

from .posterior import prepare_posterior

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]


INTERRUPTED = "interrupted; results so far are in the file of --json and the page of --out"

# Problems of the work–precision diagrams, with their metrics. On mixtures the modes' spread
# distinguishes solvers long after distances between distributions have reached their floor.
_DIAGRAMS: dict[str, dict[str, Any]] = {
    "VP": {},
    "CLD": {},
    "CLD, ring": {"metric": "spread", "budgets": (10, 20, 50, 100), "samples": 2048},
}
_FEW_SAMPLES = 512  # samples of a diagram in a quick validation


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde validate``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer problems, levels and samples; takes two to five minutes",
    )
    parser.add_argument(
        "--solver",
        type=str,
        action="append",
        metavar="NAME",
        help="name of a solver, or module:ClassName; may be repeated (default: all solvers)",
    )
    parser.add_argument(
        "--problem",
        type=str,
        action="append",
        metavar="NAME",
        help="name of a problem; may be repeated (default: all problems)",
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="file for all numbers, as JSON")
    parser.add_argument("--out", type=str, metavar="DIR", help="folder for an HTML page with plots")
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="random seed of all samples"
    )
    parser.add_argument(
        "--posterior",
        action="store_true",
        help="measure posterior samplers of inverse problems instead of solvers",
    )
    parser.add_argument(
        "--sampler",
        type=str,
        action="append",
        metavar="MODULE:FUNCTION",
        help="your own posterior sampler for --posterior; may be repeated",
    )


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and return a function that does the work.

    Raises
    ------
    ImportError
        If ``--out`` is given and the extra ``validation`` is not installed.
    ValueError
        If a solver or a problem does not exist, a named problem has no checks, or the seed is out
        of range.
    OSError
        If a file or folder cannot be written.
    """
    if not 0 <= options.seed < 2**63:
        msg = f"--seed must lie between 0 and 2^63 - 1; got {options.seed}"
        raise ValueError(msg)
    if options.posterior or options.sampler:
        return prepare_posterior(options, _writable_file(options.json))
    names = [canonical_name(name) for name in options.solver or named_solvers()]
    chosen = {name: find_solver(name) for name in names}
    known = problems()
    unknown = [name for name in options.problem or () if name not in known]
    if unknown:
        msg = f"--problem must be one of {', '.join(map(repr, known))}; got {unknown[0]!r}"
        raise ValueError(msg)
    selected = options.problem or (QUICK_PROBLEMS if options.quick else known)
    cases = {name: known[name] for name in selected}
    idle = [
        name
        for name in options.problem or ()
        if not count(chosen, {name: known[name]}, kernels=False, quick=options.quick)
    ]
    if idle:
        msg = (
            f"--problem {idle[0]!r} has no check for {', '.join(chosen)}; choose another problem "
            "or solver"
        )
        raise ValueError(msg)
    folder, file = _writable(options.out, options.json)
    kernels = options.solver is None

    def work() -> None:
        found: list[Check] = []
        tables: list[WorkPrecision] = []
        complete = False
        files = _Files(file, folder)
        total = count(chosen, cases, kernels=kernels, quick=options.quick)
        made = checks(chosen, cases, kernels=kernels, quick=options.quick, seed=options.seed)
        try:
            with progress_bar(None, shown=True, total=total, desc="checks") as bar:
                for check in made:
                    found.append(check)
                    bar.set_postfix_str(check.subject)
                    bar.update()
                    files.save(Report(found, complete=False, solvers=chosen))
            if folder is not None:
                kept = summarise(found)
                drawn = {name: chosen[name] for name in chosen if kept.get(name) is Verdict.PASS}
                for table in _diagrams(drawn, cases, found, quick=options.quick):
                    tables.append(table)  # noqa: PERF402 one by one, for an interruption
            complete = True
        finally:
            report = Report(found, tables, complete, chosen)
            # Write the files first, because printing to a closed terminal may fail.
            files.finish(report)
            _print(report.to_text(), files.errors)
            if files.page is not None:
                _print(f"The page is {files.page}", files.errors)
            if not complete:
                for error in files.errors:
                    print(error, file=sys.stderr)
        _judge(report, list(chosen) if options.solver else [], files.errors)

    return work


def _print(text: str, errors: list[str]) -> None:
    """Print with the characters that stdout supports; a closed pipe is not an error."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            errors.append(f"the table cannot be printed: {in_words(error)}")
        # Redirect stdout, because Python would raise again when it flushes stdout at exit.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _judge(report: Report, named: Sequence[str], unwritten: Sequence[str]) -> None:
    """Print failures to stderr, and raise ArithmeticError if the validation did not succeed.

    It did not succeed either if a named solver was not measured, no problem confirmed a declared
    order, or a file could not be written.
    """
    summary = report.summary()
    unsure = [f"{counted} of {name}" for name, counted in report.inconclusive().items()]
    if unsure:
        print(f"\nInconclusive checks: {', '.join(unsure)}", file=sys.stderr)
    lines = [*report.rejections(named), *report.unmeasured(), *report.failures()]
    if lines:
        print("\n" + "\n".join(lines), file=sys.stderr)
    complaints = []
    for name in named:
        if name not in summary:
            reasons = [check.message for check in report.checks if check.subject == name]
            why = next(iter(reasons), "these problems have no check for its declared facts")
            complaints.append(f"--solver {name} was not measured: {why}")
    failed = [name for name, verdict in summary.items() if verdict is Verdict.FAIL]
    if failed:
        complaints.append(f"{len(failed)} of {len(summary)} failed: {', '.join(failed)}")
    judged = {check.subject for check in report.checks if check.verdict is not None}
    doubtful = [
        name
        for name, verdict in summary.items()
        if verdict is Verdict.INCONCLUSIVE and name in judged
    ]
    if doubtful:
        complaints.append(
            f"{len(doubtful)} of {len(summary)} are inconclusive, because no problem confirmed a "
            f"declared order: {', '.join(doubtful)}"
        )
    complaints += unwritten
    if complaints:
        raise ArithmeticError("; ".join(complaints))


def _diagrams(
    chosen: Mapping[str, Solver],
    cases: Mapping[str, Problem],
    found: list[Check],
    *,
    quick: bool,
) -> Iterator[WorkPrecision]:
    """Work–precision tables of solvers on a grid; an error that one raises is a failed check."""
    for problem in cases.values():
        if problem.name not in _DIAGRAMS:
            continue
        options = dict(_DIAGRAMS[problem.name])
        if quick and "samples" in options:
            options["samples"] = _FEW_SAMPLES
        tables = []
        fitting = [
            name
            for name, solver in chosen.items()
            if not solver.facts.adaptive
            and not rejection(solver, problem)
            # A solver without an order has no exact moments.
            and ("metric" in options or declares_order(solver))
        ]
        for name in progress_bar(fitting, shown=True, desc=f"work–precision, {problem.name}"):
            began = time.perf_counter()
            try:
                tables.append(work_precision(problem, {name: chosen[name]}, **options))
            except (Exception, SystemExit) as error:  # noqa: BLE001 a user's solver may raise anything
                seconds = time.perf_counter() - began
                kind, text = "work and precision", in_words(error)
                found.append(
                    Check(kind, name, problem.name, None, None, Verdict.FAIL, text, seconds)
                )
        if tables:
            yield WorkPrecision.joined(tables)


class _Files:
    """Files of the results; a file that cannot be written is reported, and retried at the end."""

    def __init__(self, file: Path | None, folder: Path | None) -> None:
        self._file, self._folder = file, folder
        self._warned = False
        self.errors: list[str] = []
        self.page: Path | None = None

    def save(self, report: Report) -> None:
        """Write the results so far."""
        if self._file is None or self._warned:
            return
        try:
            report.write_json(self._file)
        except OSError as error:
            self._warned = True
            print(
                f"\n--json cannot be written now; it is retried at the end: {error}",
                file=sys.stderr,
            )

    def finish(self, report: Report) -> None:
        """Write all files."""
        if self._file is not None:
            self._try("--json", report.write_json, self._file)
        if self._folder is not None and self._try("--out", report.write_html, self._folder):
            self.page = (self._folder / PAGE).resolve()

    def _try(self, option: str, write: Callable[[Path], object], where: Path) -> bool:
        try:
            write(where)
        except Exception as error:  # noqa: BLE001 the other file must still be written
            self.errors.append(f"{option} cannot be written: {in_words(error)}")
            return False
        return True


def _writable(out: str | None, json: str | None) -> tuple[Path | None, Path | None]:
    """Check and create folder and file; on an error remove the created folders."""
    path = Path(out or "").expanduser().absolute()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        # Create the folder first, because the file may be in it.
        return _writable_folder(out), _writable_file(json)
    except (ValueError, OSError):
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
        raise


def _writable_file(name: str | None) -> Path | None:
    if name is None:
        return None
    file = Path(name).expanduser().resolve()
    if not name.strip() or (file.exists() and not file.is_file()):
        msg = f"--json must be a file name; got {name!r}"
        raise ValueError(msg)
    _try_to_write(file)
    return file


def _writable_folder(name: str | None) -> Path | None:
    if name is None:
        return None
    if not name.strip():
        msg = "--out must be a folder name; got an empty name"
        raise ValueError(msg)
    if importlib.util.find_spec("matplotlib") is None:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg)
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        msg = f"--out must be a folder name; {name!r} is a file"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    if page.exists() and not page.is_file():
        msg = (
            f"--out must be a folder in which the page can be written; {str(page)!r} is not a file"
        )
        raise ValueError(msg)
    _try_to_write(page)
    return folder


def _try_to_write(file: Path) -> None:
    """Raise OSError now rather than after the work, under the name that will be written to."""
    if not file.parent.is_dir():
        msg = f"{file.parent} is no folder"
        raise NotADirectoryError(msg)
    part = part_of(file)
    part.touch()
    part.unlink()
