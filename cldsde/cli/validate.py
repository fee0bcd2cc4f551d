"""Measure the convergence order of every solver and compare it with the declared order.

The command checks each solver on each applicable reference problem against exact answers, and,
if no solver is named, the transition kernels. Published methods, such as unipc-2, are checked if
you name them. Name your own solver as module:ClassName. If the command is interrupted, it keeps
the results so far.

The command exits with 1 if a check fails, or if a solver stays inconclusive: no problem confirms an
order that it declares, or it declares no order and no problem checks its samples. It also exits
with 1 if no problem applies to a named solver, or if a result cannot be written.

With --posterior the command measures posterior samplers of inverse problems instead, against exact
posteriors. It exits with 1 if a sampler that claims the exact posterior misses it, or if a planted
wrong sampler is not detected.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from cldsde.cli.options import SEED, flag, option, reject, several
from cldsde.errors import SettingError
from cldsde.messages import brief
from cldsde.validation.files import AnyReport, ReportFiles
from cldsde.validation.posterior_suite import posterior_reports
from cldsde.validation.suite import reports

OPTIONS = (
    flag("--quick", "fewer problems, levels and samples; takes two to five minutes"),
    several("--solver NAME", "solver, or module:ClassName (default: all but published methods)"),
    several("--problem NAME", "name of a problem (default: all problems)"),
    option("--json FILE", Path, "file for all numbers, as JSON"),
    option("--out DIR", Path, "folder for the table and plots"),
    flag("--overwrite", "replace the table and plots of an earlier validation"),
    option("--seed N", SEED, "random seed of all samples", default=0),
    flag("--posterior", "measure posterior samplers of inverse problems instead of solvers"),
    several("--sampler MODULE:FUNCTION", "your own posterior sampler for --posterior"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and return a function that does the work."""
    made = _reports(options)
    files = ReportFiles(options.json, options.out, overwrite=options.overwrite)
    files.check()

    def validate() -> None:
        report: AnyReport = next(made)
        try:
            for report in made:
                try:
                    files.save(report)
                except SettingError as error:
                    print(f"\n--{error}; it is retried at the end", file=sys.stderr)
        except BaseException:
            print(*_finish(report, files, options.out), sep="\n", file=sys.stderr)
            raise
        errors = _finish(report, files, options.out)
        remarks, complaints = report.judgement(options.solver)
        if remarks:
            print("\n" + "\n".join(remarks), file=sys.stderr)
        if complaints or errors:
            raise ArithmeticError("; ".join([*complaints, *errors]))

    return validate


def _reports(options: Namespace) -> Iterator[AnyReport]:
    how = {"quick": options.quick, "seed": options.seed}
    if not options.posterior:
        reject(options, ["sampler"], "names a posterior sampler; add --posterior")
        return reports(options.solver, options.problem, draw=options.out is not None, **how)
    reject(options, ("solver", "out"), "does not go with --posterior; leave one of them out")
    return posterior_reports(options.sampler, options.problem, **how)


def _finish(report: AnyReport, files: ReportFiles, out: Path | None) -> list[str]:
    """Write all files, and then print the table; return the errors of the files."""
    failed, text = files.finish(report), report.to_text()
    if out is not None and all(error.key != "out" for error in failed):
        text += f"\nThe plots are in {out.resolve()}"
    errors = [f"--{error}" for error in failed]
    try:
        print(text, flush=True)
    except OSError as error:
        errors.append(f"the table cannot be printed: {brief(error)}")
    return errors
