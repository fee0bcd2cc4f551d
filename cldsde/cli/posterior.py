"""``cldsde validate --posterior``: posterior samplers against exact posteriors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from cldsde.progress import progress_bar
from cldsde.validation.posterior_error import PosteriorError
from cldsde.validation.posterior_methods import PosteriorSampler
from cldsde.validation.posterior_problems import posterior_problems
from cldsde.validation.posterior_suite import PosteriorReport, posterior_errors, posterior_runs

__all__ = ["prepare_posterior"]


def prepare_posterior(options: Namespace, file: Path | None) -> Callable[[], None]:
    """Find the samplers and return the work that is left.

    Raises
    ------
    ValueError
        If an option does not go with ``--posterior``, a problem does not exist, or a sampler cannot
        be loaded.
    """
    if not options.posterior:
        msg = "--sampler names a posterior sampler; add --posterior"
        raise ValueError(msg)
    for option in ("solver", "out"):
        if getattr(options, option):
            msg = f"--{option} does not go with --posterior; leave one of them out"
            raise ValueError(msg)
    known = tuple(posterior_problems())
    unknown = [name for name in options.problem or () if name not in known]
    if unknown:
        msg = f"--problem must be one of {', '.join(map(repr, known))}; got {unknown[0]!r}"
        raise ValueError(msg)
    named = {name: _find_sampler(name) for name in options.sampler or ()}

    def work() -> None:
        runs = posterior_runs(quick=options.quick, problems=options.problem, named=named)
        found: list[PosteriorError] = []
        made = posterior_errors(runs, seed=options.seed, named=named)
        try:
            for error in progress_bar(made, shown=True, total=len(runs), desc="posteriors"):
                found.append(error)  # noqa: PERF402 one by one, for an interruption
        finally:
            report = PosteriorReport(found)
            if file is not None:
                report.write_json(file)
            print(report.to_text(), flush=True)
        lines = report.failures()
        if lines:
            print("\n" + "\n".join(lines), file=sys.stderr)
            msg = f"{len(lines)} of {len(found)} measurements are not as claimed"
            raise ArithmeticError(msg)

    return work


def _find_sampler(name: str) -> PosteriorSampler:
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"--sampler {name!r} cannot be loaded as module:function: {reason}"
        raise ValueError(msg) from error
    if not callable(found):
        msg = f"--sampler {name!r} must be a function; got {type(found).__name__}"
        raise ValueError(msg)  # noqa: TRY004 an option's value, not a caller's type
    sampler: PosteriorSampler = found
    return sampler
