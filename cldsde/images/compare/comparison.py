"""Comparison of models and samplers on one data set: a loop over training and evaluation.

Runs of the models are kept in ``models``, cells in ``evaluations`` as `Evaluation` keeps them. The
file `RESULTS` is made of these after every cell, and the report of it after every row. A comparison
that is interrupted resumes, and keeps its cells if rows or models are added.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldsde.errors import SettingError
from cldsde.images.compare.config import ComparisonConfig, RowConfig, check_comparison
from cldsde.images.compare.report import FORMAT, RESULTS, read_comparison, write_report
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import Result, check_comparable, read_results
from cldsde.images.figures import is_whole_picture, save_grid
from cldsde.images.model import MODEL, ImageModel, load_model
from cldsde.images.runs import METRICS, RunFolder, check_folder
from cldsde.images.sample.sampler import ImageSampler, make_solver
from cldsde.images.train.loop import TRAINING, train
from cldsde.progress import progress_bar

_FOLDERS = ("models", "evaluations", "samples")
_COLUMNS = 16  # images per line of a picture of samples
_BITS = ("bits_per_dim", "standard_error", "images", "is_bound", "quantity", "nfev")


class Comparison:
    """A comparison in its folder.

    The constructor checks everything and opens the folders; `run` does the work.
    """

    def __init__(
        self, config: ComparisonConfig, out: Path, *, device: str = "cpu", progress: bool = False
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.data = check_comparison(config, device=device)
        names = ("metrics", "samples", "repeats", "first_seed", "batch", "features")
        self.evaluation = Evaluation(
            data=self.data,
            weights=None if config.weights is None else Path(config.weights).expanduser(),
            folder=out,
            device=device,
            **{name: getattr(config, name) for name in (*names, "likelihood_images")},
        )
        self.evaluation.check()
        # All folders are checked before any is made.
        for name in _FOLDERS:
            if (out / name).exists() and not (out / name).is_dir():
                raise SettingError("out", f"{out / name} is not a folder; move it away")
        for name, run in config.runs.items():
            check_folder(out / "models" / name, run.to_dict(), free=run.FREE)
        self.folder = RunFolder(out, config.shared(), parts=["models"])
        if (out / RESULTS).exists():
            read_comparison(out / RESULTS)
        for name in _FOLDERS:
            (out / name).mkdir(exist_ok=True)
        self.runs = {
            name: RunFolder(out / "models" / name, run.to_dict(), free=run.FREE)
            for name, run in config.runs.items()
        }
        self.models: dict[str, dict[str, Any]] = {}
        for name, folder in self.runs.items():
            if (folder / MODEL).exists():
                try:
                    model = load_model(folder.path, trust=True)
                except ValueError as error:
                    raise ValueError(folder.damaged(MODEL, error, cost=TRAINING)) from error
                training = config.runs[name].training
                if model.images_seen == training.steps * training.batch:
                    self._add_model(name, model)
        self.results = self._collected()

    def run(self) -> dict[str, Any]:
        """Train and measure everything that is missing; return the content of `RESULTS`."""
        try:
            if not self._is_filled(self.results["rows"]):
                # Everything depends on the features: their errors come before any training.
                self.evaluation.prepare(progress=self.progress)
            for name, config in self.config.runs.items():
                folder, device = self.runs[name], self.device
                train(config, self.data, folder, device=device, progress=self.progress)
                model = load_model(folder.path, self.device, trust=True)
                self._add_model(name, model)
                self._evaluate(name, model)
        finally:
            if (self.folder / RESULTS).exists():
                write_report(self.folder.path)
        return self.results

    def _evaluate(self, name: str, model: ImageModel) -> None:
        """Measure the cells of a model's rows, then its bits per dim."""
        rows = [row for row in self.config.rows if row.model == name]
        total = sum(len(row.budgets) for row in rows)
        with progress_bar(None, shown=self.progress, total=total, desc=name, unit="cell") as bar:
            for row in rows:
                before = self.results["rows"]
                for budget, recipe in zip(row.budgets, row.recipes(), strict=True):
                    bar.set_postfix_str(f"{row.label}, {budget:g}")
                    self.evaluation.of_recipe(model, recipe, self._file(name))
                    self._write()
                    bar.update()
                self._draw(row, model)
                self._write()
                # Written after every row: a killed process has no time for a report at its end.
                if self.results["rows"] != before:
                    write_report(self.folder.path)
        if "bpd" in self.config.metrics:
            self.evaluation.of_density(model, self._file(name))
            self._write()

    def _draw(self, row: RowConfig, model: ImageModel) -> None:
        """Keep a picture of a row's first images, one line per budget."""
        name = _picture_name(row, model.digest)
        if is_whole_picture(self.folder / name):
            return
        first, count = self.config.first_seed, min(_COLUMNS, self.config.samples)
        seeds = range(first, first + count)
        lines: list[Tensor] = []
        for recipe in row.recipes():
            try:
                sampler = ImageSampler.of(model, recipe, batch=self.config.batch)
                lines.append(sampler.sample(seeds).images)
            except FloatingPointError:
                lines.append(torch.zeros(count, *model.space.shape, dtype=torch.uint8))
        sheet, levels = torch.cat(lines), model.space.levels
        self.folder.write(name, lambda file: save_grid(file, sheet, levels, columns=count))

    def _file(self, name: str) -> Path:
        """File of a model's results."""
        return self.folder / f"evaluations/{name}.jsonl"

    def _add_model(self, name: str, model: ImageModel) -> None:
        """Add a trained model to the results; raise if they are of other weights."""
        read_results(self._file(name), model.digest)
        config, vae = model.config, model.vae
        first = config.pretraining_steps * config.training.batch
        options = ", ".join(f"{key}={value}" for key, value in config.process.options.items())
        parts = {"score": model.score, "autoencoder": vae}
        self.models[name] = {
            "process": f"{config.process.name}({options})",
            "parameters": {
                key: 0 if part is None else sum(x.numel() for x in part.parameters())
                for key, part in parts.items()
            },
            "weights": model.digest,
            "shape": list(model.space.shape),
            "latent_shape": None if vae is None else list(vae.latent_shape),
            "images": model.images_seen,
            "prior_images": None if vae is None else max(0, model.images_seen - first),
            "seconds": _training_seconds(self.runs[name] / METRICS),
        }

    def _write(self) -> None:
        self.results = self._collected()
        self.folder.write_json(RESULTS, self.results)

    def _collected(self) -> dict[str, Any]:
        """The content of `RESULTS`: the results of all models so far."""
        config, models = self.config, {}
        found = {name: read_results(self._file(name)) for name in self.models}
        measured = [self._measured(row, found.get(row.model, {})) for row in config.rows]
        used = [one for row in measured for repeats in row for repeat in repeats for one in repeat]
        for name in (name for name in config.models if name in self.models):
            bits = None
            if "bpd" in config.metrics:
                [wanted] = self.evaluation.bits(self.models[name]["weights"])
                bits = found[name].get(wanted.key)
            used += [] if bits is None else [bits]
            models[name] = {**self.models[name], "bits": None if bits is None else _bits(bits)}
        check_comparable(used, self.folder / "evaluations")
        origins = [dict(result.origin) for result in used]
        distances = (result for result in used if result.metric == "fd" and result.failed is None)
        rows = list(map(self._row, config.rows, measured))
        return {
            "format": FORMAT,
            "complete": len(models) == len(config.models)
            and self._is_filled(rows)
            and ("bpd" not in config.metrics or all(model["bits"] for model in models.values())),
            "made": [one for i, one in enumerate(origins) if one not in origins[:i]],
            "reference": next(map(_reference, distances), None),
            "models": models,
            "rows": rows,
            "config": config.to_dict(),
        }

    def _is_filled(self, rows: list[dict[str, Any]]) -> bool:
        cells = [cell for row in rows for cell in row["cells"]]
        return all(cell["repeats"] == self.config.repeats or "reason" in cell for cell in cells)

    def _measured(self, row: RowConfig, found: Mapping[str, Result]) -> list[list[list[Result]]]:
        """Results of a row so far, for each budget and repeat."""
        weights = self.models[row.model]["weights"] if row.model in self.models else ""
        return [
            [
                [found[wanted.key] for wanted in repeat if wanted.key in found]
                for repeat in self.evaluation.cells(weights, recipe)
            ]
            for recipe in row.recipes()
        ]

    def _row(self, row: RowConfig, measured: list[list[list[Result]]]) -> dict[str, Any]:
        model, count = self.models.get(row.model), len({*self.config.metrics} - {"bpd"})
        picture = None if model is None else _picture_name(row, model["weights"])
        return {
            "model": row.model,
            "label": row.label,
            "solver": row.solver,
            "adaptive": not row.nfe,
            "fixed": {} if row.nfe else row.fixed,
            "picture": picture if picture and (self.folder / picture).exists() else None,
            "cells": [
                {"budget": budget, **_cell(repeats, count)}
                for budget, repeats in zip(row.budgets, measured, strict=True)
            ],
        }


def _cell(repeats: list[list[Result]], metrics: int) -> dict[str, Any]:
    """Costs and numbers of complete repeats, and the reason of the first failure."""
    failures = [one.failed for repeat in repeats for one in repeat if one.failed is not None]
    done = [x for x in repeats if len(x) == metrics and all(one.failed is None for one in x)]
    cell: dict[str, Any] = {"repeats": len(done)}
    if done:
        cell["nfe"] = statistics.mean(repeat[0].nfe or 0 for repeat in done)
        cell["seconds"] = round(sum(repeat[0].seconds or 0 for repeat in done), 3)
        numbers = [{k: x for one in repeat for k, x in one.numbers.items()} for repeat in done]
        cell["measures"] = {name: [one[name] for one in numbers] for name in numbers[0]}
    return cell | ({"reason": failures[0]} if failures else {})


def _bits(result: Result) -> dict[str, Any]:
    """Bits per dim of a model, or the reason why it has none."""
    if result.failed is not None:
        return {"reason": result.failed}
    about = result.about
    return {**{key: about[key] for key in _BITS}, "t_min": about["settings"]["t_min"]}


def _reference(result: Result) -> dict[str, Any]:
    """Features and images of a distance."""
    keys = ("features", "reference_samples", "reference_sha256")
    return {key: result.about[key] for key in keys}


def _training_seconds(metrics: Path) -> float | None:
    """Seconds of a training, from the last line of its metrics."""
    try:
        return float(json.loads(metrics.read_text().splitlines()[-1])["seconds"])
    except (OSError, LookupError, TypeError, ValueError):
        return None


def _picture_name(row: RowConfig, weights: str) -> str:
    """File of a row's picture, which depends on recipes and weights."""
    recipes = row.recipes()
    parts = f"{weights} {recipes} {[make_solver(recipe) for recipe in recipes]}"
    digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
    words = "".join(x if x.isalnum() else " " for x in row.label.lower())
    return f"samples/{row.model}-{'-'.join(words.split())}-{digest}.png"
