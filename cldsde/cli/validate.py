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
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import SEED, flag, option
from cldsde.cli.posterior import check_problems, prepare_posterior
from cldsde.messages import in_words
from cldsde.progress import progress_bar
from cldsde.solvers import find_solver, named_solvers
from cldsde.solvers.named import canonical_name
from cldsde.validation import WorkPrecision, problems
from cldsde.validation.checks import Check
from cldsde.validation.diagrams import diagrams
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.report import PAGE, Report
from cldsde.validation.suite import QUICK_PROBLEMS, checks, count


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde validate``."""
    flag(parser, "--quick", "fewer problems, levels and samples; takes two to five minutes")
    text = "name of a solver, or module:ClassName; may be repeated (default: all solvers)"
    option(parser, "--solver", "NAME", text, action="append", default=[])
    text = "name of a problem; may be repeated (default: all problems)"
    option(parser, "--problem", "NAME", text, action="append", default=[])
    option(parser, "--json", "FILE", "file for all numbers, as JSON", kind=Path)
    option(parser, "--out", "DIR", "folder for an HTML page with plots", kind=Path)
    option(parser, "--seed", "N", "random seed of all samples", kind=SEED, default=0)
    flag(parser, "--posterior", "measure posterior samplers of inverse problems instead of solvers")
    text = "your own posterior sampler for --posterior; may be repeated"
    option(parser, "--sampler", "MODULE:FUNCTION", text, action="append", default=[])


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and return a function that does the work."""
    if options.posterior or options.sampler:
        work = prepare_posterior(options)
        _check_targets(options.out, options.json)
        return work
    names = [canonical_name(name) for name in options.solver or named_solvers()]
    chosen = {name: find_solver(name) for name in names}
    known, quick = problems(), options.quick
    check_problems(options.problem, known)
    for name in options.problem:
        if not count(chosen, {name: known[name]}, kernels=False, quick=quick):
            msg = (
                f"--problem {name!r} has no check for {', '.join(chosen)}; choose another problem "
            )
            raise ValueError(f"{msg}or solver")
    cases = {name: known[name] for name in options.problem or (QUICK_PROBLEMS if quick else known)}
    _check_targets(options.out, options.json)
    setting = {"kernels": not options.solver, "quick": quick}

    def validate() -> None:
        found: list[Check] = []
        tables: list[WorkPrecision] = []
        results = _Results(options.json, options.out)
        complete, total = False, count(chosen, cases, **setting)
        try:
            with progress_bar(None, shown=True, total=total, desc="checks") as bar:
                for check in checks(chosen, cases, seed=options.seed, **setting):
                    found.append(check)
                    bar.set_postfix_str(check.subject)
                    bar.update()
                    results.save(Report(found, complete=False, solvers=chosen))
            if options.out is not None:
                passed = [n for n, v in Report(found).summary().items() if v is Verdict.PASS]
                drawn = {name: chosen[name] for name in chosen if name in passed}
                for made in diagrams(drawn, cases, quick=quick):
                    if isinstance(made, Check):
                        found.append(made)
                    else:
                        tables.append(made)
            complete = True
        finally:
            report = Report(found, tables, complete, chosen)
            results.finish(report)
        results.judge(report, list(chosen) if options.solver else [])

    return validate


class _Results:
    """Files of the results, and their table; errors of one do not keep the others away."""

    def __init__(self, file: Path | None, folder: Path | None) -> None:
        self._file, self._folder = file, folder
        self._warned = False
        self._errors: list[str] = []

    def save(self, report: Report) -> None:
        """Write the results so far."""
        if self._file is None or self._warned:
            return
        try:
            report.write_json(self._file)
        except OSError as error:
            self._warned = True
            msg = f"\n--json cannot be written now; it is retried at the end: {error}"
            print(msg, file=sys.stderr)

    def finish(self, report: Report) -> None:
        """Write all files, and then the table: printing to a closed terminal may fail."""
        text = report.to_text()
        if self._file is not None:
            self._try("--json", report.write_json, self._file)
        if self._folder is not None and self._try("--out", report.write_html, self._folder):
            text += f"\nThe page is {(self._folder / PAGE).resolve()}"
        try:
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), flush=True)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self._errors.append(f"the table cannot be printed: {in_words(error)}")
            # Redirect stdout, because Python would raise again when it flushes stdout at exit.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not report.complete:
            print(*self._errors, sep="\n", end="\n" * bool(self._errors), file=sys.stderr)

    def _try(self, option: str, write: Callable[[Path], object], where: Path) -> bool:
        try:
            write(where)
        except Exception as error:  # noqa: BLE001 the other file must still be written
            self._errors.append(f"{option} cannot be written: {in_words(error)}")
            return False
        return True

    def judge(self, report: Report, named: Sequence[str]) -> None:
        """Print failures to stderr; raise an ArithmeticError if the validation did not succeed."""
        unsure = [f"{counted} of {name}" for name, counted in report.inconclusive().items()]
        if unsure:
            print(f"\nInconclusive checks: {', '.join(unsure)}", file=sys.stderr)
        lines = [*report.rejections(named), *report.unmeasured(), *report.failures()]
        if lines:
            print("\n" + "\n".join(lines), file=sys.stderr)
        missing = [f"--solver {reason}" for reason in report.not_measured(named)]
        complaints = [*missing, *report.complaints(), *self._errors]
        if complaints:
            raise ArithmeticError("; ".join(complaints))


def _check_targets(folder: Path | None, file: Path | None) -> None:
    """Make the folder, and raise unless the files can be written; then leave no folder behind."""
    made = [x for x in (folder, *folder.absolute().parents) if not x.exists()] if folder else []
    if folder is not None and importlib.util.find_spec("matplotlib") is None:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg)
    option = "--out"
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _try_to_write(folder / PAGE)
        option = "--json"
        if file is not None:
            _try_to_write(file)
    except OSError as error:
        for each in made:
            if each.is_dir():
                each.rmdir()
        raise ValueError(f"{option} cannot be written: {error}") from error


def _try_to_write(file: Path) -> None:
    """Raise an OSError now rather than after the work, under the name that will be written to."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    part = file.with_name(f"{file.name}.part")
    part.touch()
    part.unlink()
