"""Files of results of an evaluation, cell by cell, and their table.

A file is JSON. It holds the digest of the weights, ``likelihood``, and ``recipes``: per recipe its
``sampling`` and its ``cells``, one per range of seeds. A cell holds its measures by their names,
`SAMPLING`, the cost and origin of its images, and `FAILED` if they could not be sampled.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from cldsde.files import file_lock, write_whole
from cldsde.images.config import SamplingConfig
from cldsde.images.evaluate.distances import package_versions
from cldsde.images.sample.sampler import make_solver
from cldsde.messages import one_line
from cldsde.tables import Entry, Table, mean_and_spread

SAMPLING = "sampling"
"""Key of a cell for the cost and the origin of its images."""
FAILED = "failed"
"""Key of a cell, or of a likelihood, for the reason why it could not be measured."""


class _Sampling(TypedDict, total=False):
    nfe: float
    seconds: float
    solver: str
    made: list[dict[str, Any]]


class _Cell(TypedDict):
    sampling: _Sampling
    failed: NotRequired[str]


class _Recipe(TypedDict):
    sampling: dict[str, Any]
    cells: dict[str, _Cell]


class _Bits(TypedDict):
    asked: int
    failed: NotRequired[str]


class _Results(TypedDict):
    model: str
    likelihood: NotRequired[_Bits | None]
    recipes: NotRequired[list[_Recipe]]


def stored_results(results: Path, digest: str) -> dict[str, Any]:
    """Results of an evaluation so far, from their file."""
    found: dict[str, Any] = {"model": digest}
    if results.exists():
        try:
            found = json.loads(results.read_text())
            _check(found)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            msg = f"{results} is damaged ({one_line(error)}); delete it to have it made again"
            raise ValueError(msg) from error
    if found["model"] != digest:
        msg = f"{results} holds results of other weights; delete it, or write to another file"
        raise ValueError(msg)
    return {"likelihood": None, "recipes": [], **found}


def _check(found: Any) -> None:
    TypeAdapter(_Results).validate_python(found)
    needs: list[tuple[Mapping[str, Any], set[str]]] = []
    bits = found.get("likelihood")
    if bits is not None and FAILED not in bits:
        needs.append((bits, {"bits_per_dim", "is_bound", "quantity", "settings"}))
    for cell in (cell for row in found.get("recipes", []) for cell in row["cells"].values()):
        needs.append((cell[SAMPLING], set() if FAILED in cell else {"nfe", "seconds"}))
        for key in cell.keys() - {SAMPLING, FAILED}:
            # The Inception score takes no reference.
            keys = set() if key.startswith("isc ") else {"reference_sha256"}
            needs.append((cell[key], keys | ({"features"} if key.startswith("fd ") else set())))
        cell_numbers(cell)
    for values, keys in needs:
        if not keys <= values.keys():
            raise ValueError(f"{', '.join(sorted(keys - values.keys()))} is missing")


@contextmanager
def changed_results(results: Path, digest: str) -> Iterator[dict[str, Any]]:
    """Results in their file now, to be changed in the block and then written.

    The file is locked meanwhile, so that several evaluations may share it.
    """
    with file_lock(results, wait=True):
        found = stored_results(results, digest)
        yield found
        text = json.dumps(found, indent=1) + "\n"
        write_whole(results, lambda path: path.write_text(text))


def cells_of(found: dict[str, Any], recipe: SamplingConfig) -> dict[str, Any]:
    """Cells of a recipe among results, by `seeds_key`; added if there are none."""
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
    """The solver of a recipe with all its options: recipes omit defaults, which may change."""
    return repr(make_solver(recipe))


def origin(device: str) -> dict[str, Any]:
    """Versions, machine, device and threads, on which numbers depend beside their settings."""
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "versions": {"python": platform.python_version(), **package_versions("cldsde", "torch")},
        "machine": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def joined(own: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A cell, joined with measures that others stored meanwhile for images of the same solver."""
    made, before = own[SAMPLING], stored.get(SAMPLING, {})
    if before.get("solver") != made["solver"]:
        return dict(own)
    origins = [one for one in before.get("made", []) if one not in made["made"]]
    measures = {key: value for key, value in stored.items() if key != FAILED}
    return {**measures, **own, SAMPLING: {**made, "made": [*origins, *made["made"]]}}


def cell_numbers(cell: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a cell, by their names in a table."""
    numbers = {}
    for key, measure in cell.items():
        metric, _, rest = key.partition(" ")
        if metric == "fd":
            numbers[key] = float(measure["frechet_distance"])
        elif key not in {SAMPLING, FAILED}:
            for name in ("precision", "recall") if metric == "prc" else (metric,):
                numbers[f"{name} {rest}"] = float(measure["metrics"][name]["value"])
    return numbers


def markdown_table(found: Mapping[str, Any]) -> str:
    """Table of recipes against measures: means over repetitions, with their spread.

    NFE is the mean number of score evaluations of an image, if it was measured.
    """
    numbers = [[cell_numbers(cell) for cell in row["cells"].values()] for row in found["recipes"]]
    names = list(dict.fromkeys(name for row in numbers for cell in row for name in cell))
    rows = []
    for row, own in zip(found["recipes"], numbers, strict=True):
        sampling, cells = row["sampling"], row["cells"].values()
        end = sampling.get("t_end")
        times = sampling.get("grid", "") + ("" if end is None else f", {end:g}")
        spent = [cell[SAMPLING]["nfe"] for cell in cells if "nfe" in cell.get(SAMPLING, {})]
        nfe = f"{statistics.mean(spent):.4g}" if spent else str(sampling["nfe"])
        measures = [x for cell in cells for x in cell.values() if isinstance(x, dict)]
        sizes = dict.fromkeys(str(x["samples"]) for x in measures if "samples" in x)
        values = [[cell[name] for cell in own if name in cell] for name in names]
        rows.append(
            [
                *(Entry(sampling["solver"], number=False), Entry(nfe)),
                *(Entry(times, number=False), Entry(", ".join(sizes))),
                *(Entry(mean_and_spread(some, 3)) for some in values),
            ]
        )
    return Table("", ["solver", "NFE", "grid, ε", "images", *names], rows, []).markdown()


def notes(found: Mapping[str, Any], *, dequantised: bool) -> list[str]:
    """Notes on results that mean little, for a model of ``dequantised`` levels or another."""
    cells = [cell for row in found["recipes"] for cell in row["cells"].values()]
    measures = [measure for cell in cells for key, measure in cell.items() if key[:3] == "fd "]
    few = [measure for measure in measures if measure["singular"]]
    sizes = f"{few[0]['samples']} images in {few[0]['feature_count']} features" if few else ""
    biased = f"Fréchet distances of {sizes} are strongly biased; use more images than features"
    undefined = "the model was trained without dequantisation, and has no useful density of "
    density = (
        [] if dequantised or found["likelihood"] is None else [f"{undefined}dequantised images"]
    )
    return [*([biased] if few else []), *density]
