"""Results of evaluations as lines of JSON, and their table.

Lines are appended under a lock, so that several evaluations may share a file. Of two lines about
the same measurement the later one counts. A line that was cut off is ignored and written again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from cldsde.files import file_lock, writing
from cldsde.images.config import RECOMMENDED
from cldsde.images.evaluate.distances import package_versions
from cldsde.messages import one_line
from cldsde.solvers import named_solvers
from cldsde.tables import Entry, Table, mean_and_spread

_SHOWN = 8  # levels of a sampler that a table lists
_BEGINNING = b'{"model": "'  # of each line
_ELSEWHERE = "delete it, or write to another file"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A metric of some images or of a model: its numbers, or the reason why it has none."""

    model: str  # digest of the weights, or of images from a file
    recipe: Mapping[str, Any] = field(default_factory=dict)  # sampling settings in JSON types
    seeds: tuple[int, int] | None = None  # of the first and the last image
    solver: str = ""  # with all its options
    sampler: Mapping[str, Any]  # `Plan.described`: recipes omit choices, which may change
    metric: str
    against: str  # name of what the metric compares with: features and part of the data
    features: str = ""  # their name, with a hash of their weights
    reference: str = ""  # hash of the images compared with
    numbers: Mapping[str, float] = field(default_factory=dict)  # by their names
    nfe: float | None = None  # mean score evaluations per image
    seconds: float | None = None  # of sampling
    about: Mapping[str, Any] = field(default_factory=dict)  # all else that the numbers depend on
    origin: Mapping[str, Any] = field(default_factory=dict)  # see the function `origin`
    failed: str | None = None  # reason of a failure

    @property
    def key(self) -> str:
        """Everything that tells a measurement from others in its file."""
        parts = (self.recipe, self.seeds, self.sampler, self.metric, self.against)
        return json.dumps(parts, sort_keys=True)


_LINE = TypeAdapter(Result)


def read_results(file: Path, model: str | None = None) -> dict[str, Result]:
    """Results in a file by their keys, of a model if given; raise if it holds others."""
    found = {}
    for number, line in enumerate(_whole_lines(file).splitlines(), 1):
        if b'"sampler": ' not in line and b'"numbers": ' in line:
            msg = f"{file} holds results of an older cldsde, which do not say their noise levels; "
            raise ValueError(msg + _ELSEWHERE)
        try:
            result = _LINE.validate_json(line)
        except ValueError as error:
            msg = f"{file} is damaged (line {number}: {one_line(error)}); delete it to have it "
            raise ValueError(f"{msg}made again") from error
        if model not in {None, result.model}:
            raise ValueError(f"{file} holds results of other weights or images; {_ELSEWHERE}")
        found[result.key] = result
    return found


def add_results(file: Path, made: Sequence[Result]) -> None:
    """Append results to a file; raise if they cannot be compared with the others there."""
    lines = [json.dumps(dataclasses.asdict(result)) + "\n" for result in made]
    with file_lock(file, wait=True):
        check_comparable([*read_results(file, made[0].model).values(), *made], file)
        whole = len(_whole_lines(file))
        with writing(file, "results before these are kept"), file.open("ab") as target:
            target.truncate(whole)
            target.write("".join(lines).encode())
            target.flush()
            os.fsync(target.fileno())


def _whole_lines(file: Path) -> bytes:
    """Content of a file up to its last line break."""
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    # The rest is cut off, unless the file is of something else.
    for part in (content, content[end:]):
        if not part.startswith(_BEGINNING[: len(part)]):
            msg = f"{file} holds something else than results of cldsde; write to another file"
            raise ValueError(msg)
    return content[:end]


def check_comparable(results: Iterable[Result], place: Path) -> None:
    """Raise if results of one metric are in other features or compared with other images."""
    firsts: dict[tuple[str, str], Result] = {}
    for result in results:
        first = firsts.setdefault((result.metric, result.against), result)
        if (result.features, result.reference) != (first.features, first.reference):
            msg = f"{place} holds {result.metric} to other images than the present data set has, "
            raise ValueError(f"{msg}or in the features of different classifiers; {_ELSEWHERE}")


def origin(device: str) -> dict[str, Any]:
    """Versions, machine, device and threads, on which numbers depend beside their settings."""
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    versions = {"python": platform.python_version(), **package_versions("cldsde", "torch")}
    place = {"device": device, "threads": torch.get_num_threads()}
    return {"versions": versions, "machine": platform.platform(), **place}


def markdown_table(results: Collection[Result]) -> str:
    """Table of recipes and numbers of images against means over repetitions, with their spread.

    Left out are results of a recipe whose solver or levels have changed since, and those that share
    seeds with others. Below the table are the choices of the recommended solver, and the accuracy
    of the classifier of distances.
    """
    samplers = {json.dumps(result.recipe): result.sampler for result in results}
    rows: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        name, (first, last) = json.dumps(result.recipe), result.seeds or (0, 0)
        if result.recipe and result.sampler == samplers[name]:
            rows.setdefault((name, last - first), []).append(result)
    names = dict.fromkeys(name for row in rows.values() for one in row for name in _named(one))
    # A solver with two names, as DDIM, is called by the first.
    known = {repr(solver): name for name, solver in reversed(named_solvers().items())}
    lines, remarks = [], dict[str, None]()
    for row in rows.values():
        recipe, sampler = row[0].recipe, row[0].sampler
        if recipe["solver"] == RECOMMENDED:
            short = known.get(row[0].solver) or _in_words(sampler)
            remarks[f"{RECOMMENDED}, {recipe['nfe']} evaluations: {short}."] = None
        if kappa := sampler.get("kappa"):
            few = len(kappa) <= _SHOWN
            shown = [f"{x:.2f}" for x in (kappa if few else (kappa[0], kappa[-1]))]
            times = f"κ {(', ' if few else ' to ').join(shown)}"
        else:
            until = sampler["times"][-1] if "times" in sampler else recipe.get("t_end")
            end = "" if until is None else f"{until:.4g}"
            times = ", ".join(filter(None, (recipe.get("grid"), end)))
        for accuracy in (x.about["classifier_accuracy"] for x in row if "classes" in x.about):
            remarks[f"Classifier of fd: {accuracy:.1%} of held-out images right."] = None
        spent = [result.nfe for result in row if result.nfe is not None]
        nfe = f"{statistics.mean(spent):.4g}" if spent else str(recipe.get("nfe", ""))
        sizes = dict.fromkeys(str(x.about["samples"]) for x in row if "samples" in x.about)
        values = []
        for name in names:
            found = [x for x in row if name in _named(x)]
            values.append([_named(x)[name] for x in _apart(found)])
            if len(values[-1]) < len(found):
                remarks["The table leaves out repetitions that share seeds with another."] = None
        changed = recipe.get("options", {}).items()
        solver = ", ".join([recipe["solver"], *(f"{key}={x}" for key, x in changed)])
        line = [Entry(solver, number=False), Entry(nfe)]
        line += [Entry(times, number=False), Entry(", ".join(sizes))]
        lines.append([*line, *(Entry(mean_and_spread(x, 3)) for x in values)])
    head = ["solver", "NFE", "grid, ε", "images", *names]
    return Table("", head, lines, list(remarks)).markdown() if lines else ""


def _in_words(sampler: Mapping[str, Any]) -> str:
    """Order and stochasticity of settings, or the solver's class."""
    if "kappa" not in sampler:
        return str(sampler["solver"]).partition("(")[0]
    noise = sorted({f"{x:.3g}" for x in sampler["stochasticity"]}, key=float)
    words: str = (
        f"order {sampler['order']}, λ = {' to '.join(dict.fromkeys((noise[0], noise[-1])))}"
    )
    return f"{words}, corrector" if sampler["corrector"] else words


def _apart(results: Iterable[Result]) -> list[Result]:
    """Results that share no seeds with one of lower seeds."""
    kept, last = list[Result](), -1
    for one in sorted(results, key=lambda x: x.seeds or ()):
        first, end = one.seeds or (0, 0)
        if first > last:
            kept.append(one)
            last = end
    return kept


def bits_text(bits: Mapping[str, Any]) -> str:
    """Bits per dim with their standard error, if there is one; ``≤`` marks a bound."""
    spread = f" ± {bits['standard_error']:.3f}" if bits["standard_error"] is not None else ""
    return f"{'≤ ' if bits['is_bound'] else ''}{bits['bits_per_dim']:.3f}{spread}"


def _named(result: Result) -> dict[str, float]:
    """Numbers by their names in a table."""
    return {f"{name} {result.against}": value for name, value in result.numbers.items()}


def notes(results: Iterable[Result], *, dequantised: bool) -> list[str]:
    """Notes on results that mean little, for a model of ``dequantised`` levels or another."""
    found: dict[str, None] = {}
    for result in results:
        if result.metric in {"fd", "fid"} and result.about.get("singular"):
            sizes = f"{result.about['samples']} images in {result.about['feature_count']} features"
            found[f"Fréchet distances of {sizes} are strongly biased; use more images"] = None
        accuracy = result.about.get("classifier_accuracy")
        chance = 1 / result.about.get("classes", 1)
        if accuracy is not None and not accuracy >= chance + (1 - chance) / 4:
            msg = f"fd means little: its classifier names {accuracy:.0%} of held-out images right, "
            found[f"{msg}and chance {chance:.0%}; use other features, such as 'random'"] = None
        if result.metric == "bpd" and not dequantised:
            msg = "the model was trained without dequantisation, and has no useful density of "
            found[f"{msg}dequantised images"] = None
    return list(found)
