"""Comparison of models and samplers on one data set: a loop over training and evaluation.

Runs of the models are kept in ``models``, results in ``evaluations`` as `Evaluation` keeps them.
The file `RESULTS` is made of these after every cell, and the report of it after every row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cldsde.images.compare.config import ComparisonConfig, RowConfig, check_comparison
from cldsde.images.compare.report import FORMAT, RESULTS, read_comparison, write_report
from cldsde.images.data.pixels import is_whole_picture, save_grid
from cldsde.images.evaluate.evaluation import Evaluation, Measurements
from cldsde.images.evaluate.results import Result, check_comparable
from cldsde.images.model import TrainedModel, load_model
from cldsde.images.networks import parameter_count
from cldsde.images.runs import METRICS, RunFolder, check_folder
from cldsde.images.sample.sampler import ImageSampler, make_plan
from cldsde.images.train.loop import train
from cldsde.progress import progress_bar

_FOLDERS = ("models", "evaluations", "samples")
_COLUMNS = 16  # images per line of a picture of samples
_BITS = ("bits_per_dim", "standard_error", "images", "is_bound", "quantity", "nfev")


class Comparison:
    """A comparison in its folder, which the constructor checks and opens; `run` does the work."""

    def __init__(
        self, config: ComparisonConfig, out: Path, *, device: str = "cpu", progress: bool = False
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.data = check_comparison(config, device=device)
        how: Any = {x.name: getattr(config, x.name) for x in dataclasses.fields(Measurements)}
        how |= {"folder": out, "first_seed": config.first_seed}
        how["weights"] = None if config.weights is None else config.weights.expanduser()
        self.evaluation = Evaluation(data=self.data, device=device, **how)
        self.evaluation.check()
        for name, run in config.runs.items():  # before any folder is made
            check_folder(out / "models" / name, run.to_dict(), free=run.FREE)
        self.folder = RunFolder(out, config.shared(), parts=["models"])
        before = read_comparison(out / RESULTS) if (out / RESULTS).exists() else {}
        self.is_finished = before.get("complete") and before["config"] == config.to_dict()
        for name in _FOLDERS:
            (out / name).mkdir(exist_ok=True)
        runs = ((name, run.to_dict(), run.FREE) for name, run in config.runs.items())
        self.runs = {x: RunFolder(out / "models" / x, run, free=free) for x, run, free in runs}
        self.reported = before.get("rows", [])
        self.rows = [_row(row, {}) for row in config.rows]
        self.models: dict[str, Any] = {}
        self.found: list[Result] = []

    def run(self) -> dict[str, Any]:
        """Train and measure everything that is missing; return the content of `RESULTS`."""
        try:
            if not self.is_finished:
                # Everything depends on the features: their errors come before any training.
                self.evaluation.prepare(progress=self.progress)
            for name, config in self.config.runs.items():
                folder, device = self.runs[name], self.device
                train(config, self.data, folder, device=device, progress=self.progress)
                self._evaluate(name, load_model(folder.path, device, trust=True))
            return self._write(complete=True)
        finally:
            if (self.folder / RESULTS).exists():
                write_report(self.folder.path)
            for folder in (self.folder, *self.runs.values()):
                folder.close()

    def _evaluate(self, name: str, model: TrainedModel) -> None:
        file = self.folder / f"evaluations/{name}.jsonl"
        self.models[name] = {**self._described(name, model), "bits": None}
        rows = [(i, row) for i, row in enumerate(self.config.rows) if row.model == name]
        total = sum(len(row.budgets) for _, row in rows)
        with progress_bar(None, shown=self.progress, total=total, desc=name, unit="cell") as bar:
            for i, row in rows:
                cells: dict[float, dict[str, Any]] = {}
                for budget, recipe in zip(row.budgets, row.recipes(), strict=True):
                    bar.set_postfix_str(f"{row.label}, {budget:g}")
                    found = self.evaluation.of_recipe(model, recipe, file)
                    self.found += found
                    cells[budget] = _cell(found)
                    self.rows[i] = _row(row, cells)
                    self._write()
                    bar.update()
                self.rows[i] = _row(row, cells, self._draw(row, model))
                self._write()
                # Written after every row: a killed process has no time for a report at its end.
                if self.rows[i] not in self.reported:
                    write_report(self.folder.path)
        if "bpd" in self.config.metrics:
            [result] = self.evaluation.of_density(model, file)
            self.found.append(result)
            self.models[name]["bits"] = {"reason": result.failed}
            if result.failed is None:
                about = result.about
                bits = {**{key: about[key] for key in _BITS}, "t_min": about["settings"]["t_min"]}
                self.models[name]["bits"] = bits
            self._write()

    def _draw(self, row: RowConfig, model: TrainedModel) -> str:
        """Keep a picture of a row's first images, one line per budget; return its name."""
        recipes = row.recipes()
        plans = [make_plan(model.score, x, shape=model.data_shape) for x in recipes]
        parts = f"{model.digest} {recipes} {[made.described() for made in plans]}"
        digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
        words = "".join(x if x.isalnum() else " " for x in row.label.lower())
        name = f"samples/{row.model}-{'-'.join(words.split())}-{digest}.png"
        if is_whole_picture(self.folder / name):
            return name
        first, count = self.config.first_seed, min(_COLUMNS, self.config.samples)
        size = (len(recipes), count, *model.space.shape)
        sheet = torch.zeros(size, dtype=torch.uint8, device="cpu")
        for line, recipe in zip(sheet, recipes, strict=True):
            kept = self.evaluation.first_images.get((model.digest, repr(recipe)), sheet[:0])
            if len(kept) >= count:
                line[:] = kept[:count]
                continue
            sampler = ImageSampler.of(model, recipe, batch=self.config.batch)
            with suppress(FloatingPointError):  # a failure stays black
                line[:] = sampler.sample(range(first, first + count)).images
        images, levels = sheet.flatten(0, 1), model.space.levels
        self.folder.write(name, lambda file: save_grid(file, images, levels, columns=count))
        return name

    def _described(self, name: str, model: TrainedModel) -> dict[str, Any]:
        config, vae = model.config, model.vae
        first = config.pretraining_steps * config.training.batch
        options = ", ".join(f"{key}={value}" for key, value in config.process.options.items())
        parts = {"score": model.score, "autoencoder": vae or torch.nn.Identity()}
        return {
            "process": f"{config.process.name}({options})",
            "parameters": {name: parameter_count(part) for name, part in parts.items()},
            "weights": model.digest,
            "images": model.images_seen,
            "prior_images": None if vae is None else max(0, model.images_seen - first),
            "seconds": _training_seconds(self.runs[name] / METRICS),
        }

    def _write(self, *, complete: bool = False) -> dict[str, Any]:
        """Write `RESULTS`; raise if distances of models cannot be compared."""
        check_comparable(self.found, self.folder / "evaluations")
        origins = [dict(result.origin) for result in self.found]
        distances = (x.about for x in self.found if x.metric == "fd" and x.failed is None)
        keys = ("features", "reference_samples", "reference_sha256")
        results = {
            "format": FORMAT,
            "complete": complete,
            "made": [one for i, one in enumerate(origins) if one not in origins[:i]],
            "reference": next(({key: about[key] for key in keys} for about in distances), None),
            "models": {name: self.models[name] for name in self.runs if name in self.models},
            "rows": self.rows,
            "config": self.config.to_dict(),
        }
        self.folder.write_json(RESULTS, results)
        return results


def _row(
    row: RowConfig, cells: dict[float, dict[str, Any]], picture: str | None = None
) -> dict[str, Any]:
    return {
        "model": row.model,
        "label": row.label,
        "solver": "settings" if row.settings else row.solver,
        "adaptive": bool(row.tolerances),
        "fixed": row.fixed if row.tolerances else {},
        "picture": picture,
        "cells": [{"budget": x, **cells.get(x, {"repeats": 0})} for x in row.budgets],
    }


def _cell(found: list[Result]) -> dict[str, Any]:
    """Costs and numbers of complete repeats of a recipe, and the reason of the first failure."""
    repeats = [list(repeat) for _, repeat in groupby(found, lambda result: result.seeds)]
    done = [repeat for repeat in repeats if all(result.failed is None for result in repeat)]
    cell: dict[str, Any] = {"repeats": len(done), "sampler": found[0].sampler}
    if done:
        cell["nfe"] = statistics.mean(repeat[0].nfe or 0 for repeat in done)
        cell["seconds"] = round(sum(repeat[0].seconds or 0 for repeat in done), 3)
        numbers = [{k: x for one in repeat for k, x in one.numbers.items()} for repeat in done]
        cell["measures"] = {name: [one[name] for one in numbers] for name in numbers[0]}
    reason = next((result.failed for result in found if result.failed is not None), None)
    return cell if reason is None else {**cell, "reason": reason}


def _training_seconds(metrics: Path) -> float | None:
    """Seconds of a training, from the last line of its metrics."""
    try:
        return float(json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["seconds"])
    except (OSError, LookupError, TypeError, ValueError):
        return None
