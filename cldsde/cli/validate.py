"""Measure the convergence order of every solver against what it declares.

Checks the transition kernels, and each solver on each reference problem that it applies to, against
answers that are known exactly. The exit code is 1 where a check fails, where nothing confirms what
a solver declares or shows what it samples, where a solver that was named could be measured nowhere,
and where the table could not be printed or a file not be written. A solver of one's own is named as
module:ClassName. Results so far are kept when the command is interrupted.

With --posterior it measures samplers of inverse problems instead, against exact posteriors. The
exit code is 1 if a sampler that claims the exact posterior misses it, or a planted wrong one is not
found.
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
    refusal,
    summarise,
)

from .posterior import prepare_posterior

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]


INTERRUPTED = "interrupted; results so far are in the file of --json and the page of --out"

# What work–precision diagrams are drawn of: problems, and how errors are measured. Of samples with
# modes their spread tells solvers apart long after distances between laws are at their floor.
_DIAGRAMS: dict[str, dict[str, Any]] = {
    "VP": {},
    "CLD": {},
    "CLD, ring": {"metric": "spread", "budgets": (10, 20, 50, 100), "samples": 2048},
}
_FEW_SAMPLES = 512  # in a quick validation


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde validate``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer problems, levels and samples, in two to five minutes",
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
    parser.add_argument(
        "--posterior",
        action="store_true",
        help="posterior samplers of inverse problems instead of solvers, against exact posteriors",
    )
    parser.add_argument(
        "--sampler",
        type=str,
        action="append",
        metavar="MODULE:FUNCTION",
        help="posterior sampler of one's own for --posterior, again for more",
    )


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and return the work that is left.

    Raises
    ------
    ImportError
        If a page is wanted and the extra ``validation`` is not installed.
    ValueError
        If a solver or a problem does not exist, nothing is measured on a problem that was asked
        for, or the seed is out of range.
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
    asked = options.problem or (QUICK_PROBLEMS if options.quick else known)
    cases = {name: known[name] for name in asked}
    idle = [
        name
        for name in options.problem or ()
        if not count(chosen, {name: known[name]}, kernels=False, quick=options.quick)
    ]
    if idle:
        msg = (
            f"--problem {idle[0]!r}: there is nothing to measure on it of "
            f"{', '.join(chosen)}; take another problem or solver"
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
            # First what lasts: a terminal may be gone, or not know the letters of a table.
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
    """Print what stdout has letters for; that nobody reads it is no error, another fault is."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            errors.append(f"the table cannot be printed: {in_words(error)}")
        # Python would complain once more when it flushes stdout at its end.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _judge(report: Report, named: Sequence[str], unwritten: Sequence[str]) -> None:
    """Say on stderr what is not as declared, and raise ArithmeticError if anything is.

    A solver that was named and measured nowhere, a declared order that was confirmed nowhere, and a
    file that could not be written are no success, either.
    """
    summary = report.summary()
    unsure = [f"{counted} of {name}" for name, counted in report.inconclusive().items()]
    if unsure:
        print(f"\nChecks without a conclusion: {', '.join(unsure)}", file=sys.stderr)
    lines = [*report.refusals(named), *report.unmeasured(), *report.failures()]
    if lines:
        print("\n" + "\n".join(lines), file=sys.stderr)
    complaints = []
    for name in named:
        if name not in summary:
            reasons = [check.message for check in report.checks if check.subject == name]
            why = next(iter(reasons), "it declares nothing that these problems measure")
            complaints.append(f"--solver {name}: no problem to measure it on: {why}")
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
            f"{len(doubtful)} of {len(summary)} neither passed nor failed, as nothing confirmed "
            f"what they declare: {', '.join(doubtful)}"
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
    """Work and precision of solvers on a grid; what one raises becomes a check that fails."""
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
            and not refusal(solver, problem)
            and ("metric" in options or declares_order(solver))  # else it has no exact moments
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
    """Where results go. What cannot be written is said once, and again when the work is done."""

    def __init__(self, file: Path | None, folder: Path | None) -> None:
        self._file, self._folder = file, folder
        self._warned = False
        self.errors: list[str] = []
        self.page: Path | None = None

    def save(self, report: Report) -> None:
        """Write what there is so far."""
        if self._file is None or self._warned:
            return
        try:
            report.write_json(self._file)
        except OSError as error:
            self._warned = True
            print(
                f"\n--json cannot be written now and is tried again at the end: {error}",
                file=sys.stderr,
            )

    def finish(self, report: Report) -> None:
        """Write all that can be written."""
        if self._file is not None:
            self._try("--json", report.write_json, self._file)
        if self._folder is not None and self._try("--out", report.write_html, self._folder):
            self.page = (self._folder / PAGE).resolve()

    def _try(self, option: str, write: Callable[[Path], object], where: Path) -> bool:
        try:
            write(where)
        except Exception as error:  # noqa: BLE001 one file must not cost the other
            self.errors.append(f"{option} cannot be written: {in_words(error)}")
            return False
        return True


def _writable(out: str | None, json: str | None) -> tuple[Path | None, Path | None]:
    """Where results go; folders that are made are removed where anything is refused."""
    where = Path(out or "").expanduser().absolute()
    made = [folder for folder in (where, *where.parents) if not folder.exists()]
    try:
        # The file may lie in the folder.
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
        msg = f"--json must be the name of a file; got {name!r}"
        raise ValueError(msg)
    _try_to_write(file)
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
    page = folder / PAGE
    if page.exists() and not page.is_file():
        msg = f"--out must be a folder for a page; {str(page)!r} is no file"
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
