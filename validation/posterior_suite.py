"""The measurement of posterior samplers behind ``cldsde validate --posterior``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cldsde.errors import require
from cldsde.linear import CLD, PSLD, VPSDE, LinearSDE
from cldsde.messages import imported
from cldsde.progress import progress_bar
from cldsde.score import Observation

from .order_estimate import Verdict
from .plain import text_table, write_json
from .posterior_error import PosteriorError, posterior_error
from .posterior_methods import PosteriorSampler, guided, posterior_methods
from .posterior_problems import posterior_problems
from .problems import check_names

# At smaller noise the error comes from the number of steps, about which samplers claim nothing.
_JUDGED_NOISE = 0.1


def planted_samplers() -> dict[str, PosteriorSampler]:
    """Wrong samplers that a measurement has to find: moment matching, exact for one Gaussian."""
    options: dict[str, Any] = {"iterations": 10, "data_variance": 1.0}
    return {
        "noise_std × 1.5": guided(
            "moments", lambda o: Observation(o.forward, o.y, 1.5 * o.noise_std, o.shape), **options
        ),
        "adjoint transposed": guided(
            "moments", lambda o: _Transposed(o.forward, o.y, o.noise_std, o.shape), **options
        ),
    }


class _Transposed(Observation):
    """An observation by a square matrix that takes A for its transpose."""

    def adjoint(self, v: Tensor, shape: Sequence[int]) -> Tensor:
        return self.forward(v)


def posterior_runs(
    *,
    quick: bool,
    problems: Sequence[str] = (),
    named: Mapping[str, PosteriorSampler] | None = None,
) -> list[tuple[str, str, float, dict[str, Any]]]:
    """Measurements of a validation, and of planted samplers; see `posterior_reports`.

    Each is a method, a problem, the noise, and options of `posterior_error`.
    """
    methods = tuple(named or posterior_methods())
    cases: list[tuple[LinearSDE, float]] = [(CLD(), 0.1)]
    if not quick:
        cases += [(CLD(), 1.0), (CLD(), 0.01), (VPSDE(), 0.1), (PSLD(), 0.1)]
    runs = [
        (method, problem, level, {"sde": sde, "samples": 1000, "repeats": 2 if quick else 3})
        for sde, level in cases
        for problem in problems or posterior_problems()
        for method in methods
    ]
    few = {"sde": CLD(), "samples": 500, "repeats": 2}
    return [*runs, *((name, "one Gaussian", 0.1, few) for name in planted_samplers())]


def posterior_reports(
    samplers: Sequence[str] = (),
    problems: Sequence[str] = (),
    *,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[PosteriorReport]:
    """Measure posterior samplers: a report that grows, at the beginning and after each measurement.

    ``samplers`` are ``module:function``, to measure in place of the package's. ``problems`` are
    names; none: all. ``quick`` takes one process and one noise only. A name that is unknown or not
    of a function raises a ValueError at once.
    """
    check_names(problems, posterior_problems())
    named: dict[str, PosteriorSampler] = {name: imported(name) for name in samplers}
    for name, sampler in named.items():
        msg = f"{name!r} must be a function; got {type(sampler).__name__}"
        require(callable(sampler), "sampler", msg)
    runs = posterior_runs(quick=quick, problems=problems, named=named)
    known = {**named, **planted_samplers()}

    def made() -> Iterator[PosteriorReport]:
        found = list[PosteriorError]()
        growing = PosteriorReport(found)
        yield growing
        for method, name, noise_std, options in progress_bar(runs, shown=True, desc="posteriors"):
            sampler, problem = known.get(method, method), posterior_problems(noise_std)[name]
            found.append(posterior_error(sampler, problem, **options, seed=seed, name=method))
            yield growing

    return made()


@dataclass(frozen=True)
class PosteriorReport:
    """Measurements of posterior samplers, and the failures among them."""

    errors: Sequence[PosteriorError]

    def failures(self) -> list[str]:
        """Samplers that are not what they claim, and planted ones that were not found; in words."""
        planted, lines = planted_samplers(), []
        for error in self.errors:
            where = f"{error.method} on {error.problem!r}, noise {error.noise_std:g}"
            if error.method in planted:
                if error.verdict is not Verdict.FAIL:
                    lines.append(f"the planted wrong sampler {where}, was not found")
            elif error.verdict is Verdict.FAIL and error.noise_std >= _JUDGED_NOISE:
                lines.append(f"{where}, {error.process}: not the exact posterior that it claims")
        return lines

    def judgement(self, names: Sequence[str] = ()) -> tuple[list[str], list[str]]:
        """Lines about the failures, and a complaint if there are some."""
        lines = self.failures()
        msg = f"{len(lines)} of {len(self.errors)} measurements are not as claimed"
        return lines, [msg] if lines else []

    def to_text(self) -> str:
        """A table, one line per measurement."""
        head = "problem noise process method distance modes mean spread seconds verdict"
        rows, planted = [tuple(head.split())], planted_samplers()
        for error in self.errors:
            verdict = "" if error.verdict is None else str(error.verdict)
            if error.method in planted:
                verdict = f"{verdict} (planted: must fail)"
            elif error.noise_std < _JUDGED_NOISE and verdict:
                verdict = f"({verdict}, not judged at this noise)"
            case = error.problem, f"{error.noise_std:g}", error.process, error.method
            distance = f"{_short(error.distance)} ± {_short(error.distance_std)}"
            moments = _short(error.mean_error), _short(error.spread_error)
            modes, seconds = f"{error.mode_error:.3f}", f"{error.seconds:.1f}"
            rows.append((*case, distance, modes, *moments, seconds, verdict))
        return (
            "Distance (sliced W₂), mean and spread are over their values for exact samples.\n"
            "Modes: total variation distance of the component weights. Lower is better.\n\n"
            + text_table(rows)
        )

    def write_json(self, file: Path) -> None:
        """Write all numbers to a file."""
        write_json(file, {"posterior": [error.to_dict() for error in self.errors]})


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"
