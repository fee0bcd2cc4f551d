"""Comparison of models and samplers on one data set: a loop over training and evaluation.

Runs of the models are kept in ``models``, cells in ``evaluations`` as `Evaluation` keeps them. The
file `RESULTS` is made of these after every cell, and the report of it after every row. A comparison
that is interrupted resumes, and keeps its cells if rows or models are added.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldsde.errors import SettingError
from cldsde.images.compare.config import ComparisonConfig, RowConfig, check_comparison
from cldsde.images.compare.report import FORMAT, RESULTS, read_results, write_report
from cldsde.images.config import SamplingConfig
from cldsde.images.evaluate import results as stored
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.likelihoods import UndefinedLikelihoodError
from cldsde.images.evaluate.results import FAILED, SAMPLING
from cldsde.images.figures import is_whole_picture, save_grid
from cldsde.images.model import MODEL, ImageModel, load_model
from cldsde.images.runs import METRICS, RunFolder, check_folder
from cldsde.images.train.loop import TRAINING, train
from cldsde.progress import progress_bar

_FOLDERS = ("models", "evaluations", "samples")
_COLUMNS = 16  # images per line of a picture of samples


class Comparison:
    """A comparison in its folder.

    The constructor checks everything and opens the folders; `run` does the work.
    """

    def __init__(
        self, config: ComparisonConfig, out: Path, *, device: str = "cpu", progress: bool = False
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.data = check_comparison(config, device=device)
        self.distances = self._evaluation(out, *(x for x in config.metrics if x != "bpd"))
        # All folders are checked before any is made.
        for name in _FOLDERS:
            if (out / name).exists() and not (out / name).is_dir():
                raise SettingError("out", f"{out / name} is not a folder; move it away")
        for name, run in config.runs.items():
            check_folder(out / "models" / name, run.to_dict(), free=run.FREE)
        self.folder = RunFolder(out, config.shared(), parts=["models"])
        if (out / RESULTS).exists():
            read_results(out / RESULTS)
        for name in _FOLDERS:
            (out / name).mkdir(exist_ok=True)
        self.runs = {
            name: RunFolder(out / "models" / name, run.to_dict(), free=run.FREE)
            for name, run in config.runs.items()
        }
        self.models: dict[str, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.undefined: dict[str, str] = {}
        self.results: dict[str, Any] = {"rows": []}
        for name, folder in self.runs.items():
            if (folder / MODEL).exists():
                try:
                    model = load_model(folder.path, trust=True)
                except ValueError as error:
                    raise ValueError(folder.damaged(MODEL, error, cost=TRAINING)) from error
                training = config.runs[name].training
                if model.images_seen == training.steps * training.batch:
                    self._add_model(name, model)

    def run(self) -> dict[str, Any]:
        """Train and measure everything that is missing; return the content of `RESULTS`."""
        try:
            if not self._are_filled(map(self._row, self.config.rows)):
                # Everything depends on the features: their errors come before any training.
                self.distances.prepare(progress=self.progress)
            for name, config in self.config.runs.items():
                folder, how = self.runs[name], {"device": self.device, "progress": self.progress}
                train(config, self.data, folder, **how)  # type: ignore[arg-type]
                model = load_model(folder.path, self.device, trust=True)
                self._add_model(name, model)
                self._write()
                self._fill(name, model)
                if "bpd" in self.config.metrics:
                    self._measure(self._evaluation(self.folder.path, "bpd"), name, model, [])
        finally:
            if (self.folder / RESULTS).exists():
                write_report(self.folder.path)
        return read_results(self.folder / RESULTS)

    def _evaluation(self, out: Path, *metrics: str) -> Evaluation:
        config = self.config
        names = ("samples", "repeats", "first_seed", "batch", "features", "likelihood_images")
        evaluation = Evaluation(
            data=self.data,
            metrics=metrics,
            weights=None if config.weights is None else Path(config.weights).expanduser(),
            folder=out,
            device=self.device,
            **{name: getattr(config, name) for name in names},
        )
        evaluation.check()
        return evaluation

    def _add_model(self, name: str, model: ImageModel) -> None:
        """Add a trained model to the results, and its measures so far."""
        self.found[name] = stored.stored_results(self._evaluated(name), model.digest)
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

    def _fill(self, name: str, model: ImageModel) -> None:
        """Measure the cells of a model's rows."""
        rows = [row for row in self.config.rows if row.model == name]
        total = sum(len(row.budgets) for row in rows)
        with progress_bar(None, shown=self.progress, total=total, desc=name, unit="cell") as bar:
            for row in rows:
                before = self.results["rows"]
                for budget, recipe in zip(row.budgets, row.recipes(), strict=True):
                    bar.set_postfix_str(f"{row.label}, {budget:g}")
                    self._measure(self.distances, name, model, [recipe])
                    bar.update()
                self._draw(row, model)
                self._write()
                # Written after every row: a killed process has no time for a report at its end.
                if self.results["rows"] != before:
                    write_report(self.folder.path)

    def _measure(
        self, evaluation: Evaluation, name: str, model: ImageModel, recipes: list[SamplingConfig]
    ) -> None:
        try:
            self.found[name] = evaluation.of_run(model, recipes, self._evaluated(name))
        except UndefinedLikelihoodError as error:
            self.undefined[name] = str(error)
        except FloatingPointError:
            # The failure of a sampler at a budget is a result, too, and stored with the others.
            self.found[name] = stored.stored_results(self._evaluated(name), model.digest)
        self._write()

    def _draw(self, row: RowConfig, model: ImageModel) -> None:
        """Keep a picture of a row's first images, one line per budget."""
        name = _picture_name(row, model.digest)
        if is_whole_picture(self.folder / name):
            return
        first, count = self.distances.first_seed, min(_COLUMNS, self.config.samples)
        lines: list[Tensor] = []
        for recipe in row.recipes():
            try:
                found = self.distances.draw(model, recipe, range(first, first + count))
                lines.append(found.images)
            except FloatingPointError:
                lines.append(torch.zeros(count, *model.space.shape, dtype=torch.uint8))
        sheet, levels = torch.cat(lines), model.space.levels
        self.folder.write(name, lambda file: save_grid(file, sheet, levels, columns=count))

    def _evaluated(self, name: str) -> Path:
        return self.folder / f"evaluations/{name}.json"

    def _write(self) -> None:
        """Collect all results in `RESULTS`."""
        rows = [self._row(row) for row in self.config.rows]
        names = [name for name in self.config.models if name in self.models]
        bits = {name: self._bits(name) for name in names}
        measured = "bpd" not in self.config.metrics or None not in bits.values()
        complete = len(names) == len(self.config.models) and measured and self._are_filled(rows)
        self.results = {
            "format": FORMAT,
            "complete": complete,
            "made": self._origins(),
            "reference": self._reference(),
            "models": {name: {**self.models[name], "bits": bits[name]} for name in names},
            "rows": rows,
            "config": self.config.to_dict(),
        }
        self.folder.write_json(RESULTS, self.results)

    def _are_filled(self, rows: Iterable[dict[str, Any]]) -> bool:
        cells = [cell for row in rows for cell in row["cells"]]
        return all(cell["repeats"] == self.config.repeats or "reason" in cell for cell in cells)

    def _row(self, row: RowConfig) -> dict[str, Any]:
        cells = []
        found = self.found.get(row.model, {"recipes": []})
        for budget, recipe in zip(row.budgets, row.recipes(), strict=True):
            made = self.distances.cells(found, recipe)
            cell: dict[str, Any] = {"budget": budget, "repeats": len(made)}
            if made:
                cell["nfe"] = statistics.mean(one[SAMPLING]["nfe"] for one in made)
                cell["seconds"] = round(sum(one[SAMPLING]["seconds"] for one in made), 3)
                numbers = [stored.cell_numbers(one) for one in made]
                cell["measures"] = {
                    name.split()[0]: [one[name] for one in numbers] for name in numbers[0]
                }
            tried = self.distances.tried(found, recipe)
            failures = [one[FAILED] for one in tried if FAILED in one and one not in made]
            cell |= {"reason": failures[0]} if failures else {}
            cells.append(cell)
        model = self.models.get(row.model)
        picture = None if model is None else _picture_name(row, model["weights"])
        return {
            "model": row.model,
            "label": row.label,
            "solver": row.solver,
            "adaptive": not row.nfe,
            "fixed": {} if row.nfe else row.fixed,
            "picture": picture if picture and (self.folder / picture).exists() else None,
            "cells": cells,
        }

    def _bits(self, name: str) -> dict[str, Any] | None:
        found = self._likelihood(name)
        if found is None:
            return {"reason": self.undefined[name]} if name in self.undefined else None
        if FAILED in found:
            return {"reason": found[FAILED]}
        kept = ("bits_per_dim", "standard_error", "images", "is_bound", "quantity", "nfev")
        return {**{key: found[key] for key in kept}, "t_min": found["settings"]["t_min"]}

    def _likelihood(self, name: str) -> dict[str, Any] | None:
        """A model's stored likelihood, if it is of as many images as configured."""
        found: dict[str, Any] | None = self.found[name]["likelihood"]
        return found if found and found["asked"] == self.config.likelihood_images else None

    def _tried(self) -> Iterator[dict[str, Any]]:
        """All cells of the rows."""
        for row in self.config.rows:
            for recipe in row.recipes() if row.model in self.found else ():
                yield from self.distances.tried(self.found[row.model], recipe)

    def _origins(self) -> list[dict[str, Any]]:
        """The distinct versions, machines, devices and threads that computed the numbers."""
        records = [cell[SAMPLING] for cell in self._tried()]
        records += filter(None, map(self._likelihood, self.found))
        made = [one for record in records for one in record.get("made", [])]
        return [one for i, one in enumerate(made) if one not in made[:i]]

    def _reference(self) -> dict[str, Any] | None:
        """The reference and the features of all distances; raise if cells differ in them."""
        keys = ("features", "reference_samples", "reference_sha256")
        references = [
            {key: measure[key] for key in keys}
            for cell in self._tried()
            for name, measure in cell.items()
            if name.startswith("fd ")
        ]
        if any(one != references[0] for one in references):
            msg = f"{self.folder / 'evaluations'} holds distances in the features of different "
            msg += "classifiers; delete it to have them measured again"
            raise ValueError(msg)
        return references[0] if references else None


def _training_seconds(metrics: Path) -> float | None:
    """Seconds of a training, from the last line of its metrics."""
    try:
        return float(json.loads(metrics.read_text().splitlines()[-1])["seconds"])
    except (OSError, LookupError, TypeError, ValueError):
        return None


def _picture_name(row: RowConfig, weights: str) -> str:
    """File of a row's picture, which depends on recipes and weights."""
    recipes = row.recipes()
    parts = f"{weights} {recipes} {[stored.resolved_solver(recipe) for recipe in recipes]}"
    digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
    words = "".join(x if x.isalnum() else " " for x in row.label.lower())
    return f"samples/{row.model}-{'-'.join(words.split())}-{digest}.png"
