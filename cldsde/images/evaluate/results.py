"""Files of results of an evaluation: what was measured, cell by cell, and what with.

A file is JSON. It holds the digest of the weights, ``likelihood``, and ``recipes``: of each its
``sampling`` and its ``cells``, one for each range of seeds. A cell holds its measures by their
names, `SAMPLING`, which says what its images cost and were made with, and `FAILED` where they could
not be drawn.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cldsde.images.config import SamplingConfig
from cldsde.images.evaluate.shared import package_versions
from cldsde.images.files import file_lock, write_whole
from cldsde.images.sample.sampler import make_solver

SAMPLING = "sampling"
"""Key of a cell for what its images cost, and what they were made with."""
FAILED = "failed"
"""Key of a cell, or of a likelihood, for why it could not be measured."""


def stored_results(results: Path, digest: str) -> dict[str, Any]:
    """What `Evaluation.of_run` has written so far."""
    fresh: dict[str, Any] = {"model": digest, "likelihood": None, "recipes": []}
    if not results.exists():
        return fresh
    try:
        found = json.loads(results.read_text())
        _check(found)
    except ValueError as error:
        msg = f"{results} is damaged ({error}); delete it to have it made again"
        raise ValueError(msg) from error
    if found["model"] != digest:
        msg = f"{results} holds results of other weights; delete it, or write to another file"
        raise ValueError(msg)
    return {**fresh, **found}


@contextmanager
def changed_results(results: Path, digest: str) -> Iterator[dict[str, Any]]:
    """What the file holds now, to be changed in the block; then written, whole or not at all.

    Nobody else changes it meanwhile, so that several evaluations may share a file.
    """
    with file_lock(results, wait=True):
        found = stored_results(results, digest)
        yield found
        text = json.dumps(found, indent=1) + "\n"
        write_whole(results, lambda path: path.write_text(text))


def cells_of(found: dict[str, Any], recipe: SamplingConfig) -> dict[str, Any]:
    """Cells of a recipe among results, by `seeds_key`; put there if there are none."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for row in found["recipes"]:
        if row["sampling"] == settings:
            stored: dict[str, Any] = row["cells"]
            return stored
    cells: dict[str, Any] = {}
    found["recipes"].append({"sampling": settings, "cells": cells})
    return cells


def seeds_key(seeds: range) -> str:
    """Key of a cell."""
    return f"{seeds[0]}-{seeds[-1]}"


def resolved_solver(recipe: SamplingConfig) -> str:
    """The solver of a recipe with all its options: a recipe leaves defaults out, which change."""
    return repr(make_solver(recipe))


def origin(device: str) -> dict[str, Any]:
    """What numbers of this process depend on beside their settings."""
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "versions": {"python": platform.python_version(), **package_versions("cldsde", "torch")},
        "machine": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def with_origin(cell: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
    """Origins of a cell's measures, among them that of those which are going to be added."""
    before: list[Any] = cell.get(SAMPLING, {}).get("made", [])
    return before if own in before else [*before, own]


def joined(own: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A cell with what others have measured of its images, those of the same solver, meanwhile."""
    made, before = own[SAMPLING], stored.get(SAMPLING, {})
    if before.get("solver") != made["solver"]:
        return dict(own)
    origins = [one for one in before.get("made", []) if one not in made["made"]]
    measures = {key: value for key, value in stored.items() if key != FAILED}
    return {**measures, **own, SAMPLING: {**made, "made": [*origins, *made["made"]]}}


def cell_numbers(cell: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a cell, by what they are called in a table."""
    numbers = {}
    for key, measure in cell.items():
        if key in {SAMPLING, FAILED}:
            continue
        metric, _, rest = key.partition(" ")
        if metric == "fd":
            numbers[key] = float(measure["frechet_distance"])
            continue
        for name in ("precision", "recall") if metric == "prc" else (metric,):
            numbers[f"{name} {rest}"] = float(measure["metrics"][name]["value"])
    return numbers


def _check(found: object) -> None:
    """Raise ValueError for anything else than what is written here."""
    _need(found, {"model": str}, "it")
    assert isinstance(found, dict)
    bits, recipes = found.get("likelihood"), found.get("recipes", [])
    if bits is not None:
        numbers = {"bits_per_dim": float, "is_bound": bool, "quantity": str, "settings": dict}
        failed = isinstance(bits, dict) and FAILED in bits
        _need(bits, {"asked": int, **({FAILED: str} if failed else numbers)}, "likelihood")
    for i, row in enumerate(_list(recipes, "recipes")):
        _need(row, {"sampling": dict, "cells": dict}, f"recipes[{i}]")
        for key, cell in row["cells"].items():
            _check_cell(cell, f"recipes[{i}].cells.{key}")


def _check_cell(cell: object, name: str) -> None:
    _need(cell, {SAMPLING: dict}, name)
    assert isinstance(cell, dict)
    failed = FAILED in cell
    _need(cell, {FAILED: str} if failed else {}, name)
    _need(cell[SAMPLING], {} if failed else {"nfe": float, "seconds": float}, f"{name}.{SAMPLING}")
    for one in _list(cell[SAMPLING].get("made", []), f"{name}.{SAMPLING}.made"):
        kinds = {"versions": dict, "machine": str, "device": str, "threads": int}
        _need(one, kinds, f"{name}.{SAMPLING}.made")
    for key, measure in cell.items():
        if key.startswith("fd "):
            kinds = {"frechet_distance": float, "features": str, "reference_sha256": str}
            _need(measure, kinds, f"{name}.{key}")
        elif key.partition(" ")[0] in {"fid", "kid", "prc"}:
            _need(measure, {"reference_sha256": str}, f"{name}.{key}")
    try:
        cell_numbers(cell)
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{name} holds a measure that is none"
        raise ValueError(msg) from error


def _need(value: object, kinds: Mapping[str, type], name: str) -> None:
    if not isinstance(value, dict):
        msg = f"{name} is no section"
        raise ValueError(msg)  # noqa: TRY004 one kind of error for whatever a file holds
    for key, kind in kinds.items():
        number = (int, float) if kind is float else kind
        if not isinstance(value.get(key), number):
            msg = f"{name}.{key} is missing" if key not in value else f"{name}.{key} is wrong"
            raise ValueError(msg)  # noqa: TRY004


def _list(value: object, name: str) -> Iterable[Any]:
    if not isinstance(value, list):
        msg = f"{name} is no list"
        raise ValueError(msg)  # noqa: TRY004
    return value


def markdown_table(found: Mapping[str, Any]) -> str:
    """Recipes against measures: means over repetitions, with their spread.

    NFE is what an image took in the mean, where that was measured.
    """
    rows = found["recipes"]
    numbers = [[cell_numbers(cell) for cell in row["cells"].values()] for row in rows]
    names = list(dict.fromkeys(name for row in numbers for cell in row for name in cell))
    lines = [
        "| solver | NFE | grid, ε | images | " + " | ".join(names) + " |",
        "| --- | ---: | --- | ---: |" + " ---: |" * len(names),
    ]
    for row, found_numbers in zip(rows, numbers, strict=True):
        cells = []
        for name in names:
            values = [cell[name] for cell in found_numbers if name in cell]
            if len(values) > 1:
                cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
            else:
                cells.append("".join(f"{value:.3f}" for value in values))
        sampling = row["sampling"]
        end = sampling.get("t_end")
        ends = "" if end is None else f", {end:g}"
        times = f"{sampling['grid']}{ends}" if "grid" in sampling else ""
        costs = [cell.get(SAMPLING, {}) for cell in row["cells"].values()]
        spent = [cost["nfe"] for cost in costs if "nfe" in cost]
        nfe = f"{statistics.mean(spent):.4g}" if spent else str(sampling["nfe"])
        sizes = dict.fromkeys(
            str(measure["samples"])
            for cell in row["cells"].values()
            for measure in cell.values()
            if isinstance(measure, dict) and "samples" in measure
        )
        head = [sampling["solver"], nfe, times, ", ".join(sizes)]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines)
