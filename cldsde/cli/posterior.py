"""``cldsde validate --posterior``: posterior samplers against exact posteriors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from jsonargparse import Namespace

from cldsde.messages import imported
from cldsde.progress import progress_bar
from cldsde.validation.posterior_error import PosteriorError
from cldsde.validation.posterior_methods import PosteriorSampler
from cldsde.validation.posterior_problems import posterior_problems
from cldsde.validation.posterior_suite import PosteriorReport, posterior_errors, posterior_runs


def check_problems(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise a ValueError for a problem that does not exist."""
    for name in names:
        if name not in known:
            msg = f"--problem must be one of {', '.join(map(repr, known))}; got {name!r}"
            raise ValueError(msg)


def prepare_posterior(options: Namespace) -> Callable[[], None]:
    """Find the samplers and return the work that is left."""
    if not options.posterior:
        raise ValueError("--sampler names a posterior sampler; add --posterior")
    for option in ("solver", "out"):
        if getattr(options, option):
            raise ValueError(f"--{option} does not go with --posterior; leave one of them out")
    check_problems(options.problem, posterior_problems())
    named: dict[str, PosteriorSampler] = {name: imported(name) for name in options.sampler}
    for name, sampler in named.items():
        if not callable(sampler):
            msg = f"--sampler {name!r} must be a function; got {type(sampler).__name__}"
            raise ValueError(msg)  # noqa: TRY004 an option's value, not a caller's type

    def work() -> None:
        runs = posterior_runs(quick=options.quick, problems=options.problem or None, named=named)
        found: list[PosteriorError] = []
        made = posterior_errors(runs, seed=options.seed, named=named)
        try:
            for error in progress_bar(made, shown=True, total=len(runs), desc="posteriors"):
                found.append(error)  # noqa: PERF402 one by one, for an interruption
        finally:
            report = PosteriorReport(found)
            if options.json is not None:
                report.write_json(options.json)
            print(report.to_text(), flush=True)
        lines = report.failures()
        if lines:
            print("\n" + "\n".join(lines), file=sys.stderr)
            raise ArithmeticError(f"{len(lines)} of {len(found)} measurements are not as claimed")

    return work
