"""Comparison of models and samplers: one data set, one feature space, one count of evaluations.

Whatever is done is in files at once: runs of the models in ``models``, cells as
`Evaluation` keeps them in ``evaluations``, the classifier whose features all models are compared
in. `RESULTS` is made of these after every cell, and the report of it alone, after every row; so a
comparison that is cut off anywhere goes on, and one whose rows or models are added to keeps what it
has.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cldsde.images.compare.config import ComparisonConfig, RowConfig, check_comparison
from cldsde.images.compare.report import FORMAT, RESULTS, read_results, write_report
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.errors import SettingError
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import (
    FAILED,
    SAMPLING,
    cell_numbers,
    resolved_solver,
    stored_results,
)
from cldsde.images.evaluate.shared import UndefinedLikelihoodError
from cldsde.images.figures import is_whole_picture, save_grid
from cldsde.images.model import MODEL, ImageModel, load_model
from cldsde.images.runs import METRICS, RunFolder, check_folder
from cldsde.images.train.loop import TRAINING, train
from cldsde.progress import progress_bar

_FOLDERS = ("models", "evaluations", "samples")
_COLUMNS = 16  # images of each line of a picture of samples


class Comparison:
    """A comparison in its folder.

    Making one checks everything and opens the folder, and those of the models; `run` does the work.
    """

    def __init__(
        self, config: ComparisonConfig, out: Path, *, device: str = "cpu", progress: bool = False
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.data = check_comparison(config, device=device)
        self.distances = self._evaluation(out, *(x for x in config.metrics if x != "bpd"))
        # All folders are looked at before any is made.
        for name in _FOLDERS:
            if (out / name).exists() and not (out / name).is_dir():
                raise SettingError("out", f"{out / name} is not a folder; move it away")
        for name, settings in config.runs.items():
            check_folder(out / "models" / name, settings.to_dict(), free=settings.FREE)
        self.folder = RunFolder(out, config.shared(), parts=["models"])
        if (out / RESULTS).exists():
            read_results(out / RESULTS)
        for name in _FOLDERS:
            (out / name).mkdir(exist_ok=True)
        self.runs = {
            name: RunFolder(out / "models" / name, settings.to_dict(), free=settings.FREE)
            for name, settings in config.runs.items()
        }
        self.models: dict[str, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.undefined: dict[str, str] = {}
        self.results: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}
        for name, run in self.runs.items():
            if (run / MODEL).exists():
                try:
                    model = load_model(run.path)
                except ValueError as error:
                    raise ValueError(run.damaged(MODEL, error, cost=TRAINING)) from error
                training = config.runs[name].training
                if model.images_seen == training.steps * training.batch:
                    self._take_up(name, model)

    def run(self) -> dict[str, Any]:
        """Train and measure what is missing; return what `RESULTS` then holds."""
        try:
            if not self._are_filled([self._row(row) for row in self.config.rows]):
                # All depends on the features: what is wrong with them is seen before any training.
                self.distances.prepare(progress=self.progress)
            for name in self.config.models:
                model = self._trained(name)
                self._fill(name, model)
                self._measure_bits(name, model)
        finally:
            if (self.folder / RESULTS).exists():
                write_report(self.folder.path)
        return read_results(self.folder / RESULTS)

    def _evaluation(self, out: Path, *metrics: str) -> Evaluation:
        config = self.config
        evaluation = Evaluation(
            data=self.data,
            metrics=metrics,
            samples=config.samples,
            repeats=config.repeats,
            first_seed=config.first_seed,
            batch=config.batch,
            features=config.features,
            weights=None if config.weights is None else Path(config.weights).expanduser(),
            likelihood_images=config.likelihood_images,
            folder=out,
            device=self.device,
        )
        evaluation.check()
        return evaluation

    def _trained(self, name: str) -> ImageModel:
        run = self.runs[name]
        train(self.config.runs[name], self.data, run, device=self.device, progress=self.progress)
        model = load_model(run.path, self.device)
        self._take_up(name, model)
        self._write()
        return model

    def _take_up(self, name: str, model: ImageModel) -> None:
        """Note a trained model, and what was measured of it."""
        self.found[name] = stored_results(self._evaluated(name), model.digest)
        config, vae = model.config, model.vae
        first = config.pretraining_steps * config.training.batch
        self.models[name] = {
            "process": _words(config.process),
            "parameters": {
                "score": _numbers(model.score),
                "autoencoder": 0 if vae is None else _numbers(vae),
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
                for budget, recipe in zip(row.budgets, row.recipes(), strict=True):
                    bar.set_postfix_str(f"{row.label}, {budget:g}")
                    self._measure(name, model, recipe)
                    bar.update()
                self._draw(row, model)
                self._write()
                self._report()

    def _measure(self, name: str, model: ImageModel, recipe: SamplingConfig) -> None:
        try:
            self.found[name] = self.distances.of_run(model, [recipe], self._evaluated(name))
        except FloatingPointError:
            # That a sampler fails at a budget is a result, too, and kept beside the others.
            self.found[name] = stored_results(self._evaluated(name), model.digest)
        self._write()

    def _measure_bits(self, name: str, model: ImageModel) -> None:
        if "bpd" not in self.config.metrics:
            return
        try:
            evaluation = self._evaluation(self.folder.path, "bpd")
            self.found[name] = evaluation.of_run(model, [], self._evaluated(name))
        except UndefinedLikelihoodError as error:
            self.undefined[name] = str(error)
        except FloatingPointError:
            self.found[name] = stored_results(self._evaluated(name), model.digest)
        self._write()

    def _draw(self, row: RowConfig, model: ImageModel) -> None:
        """Keep a picture of a row's first images, a line for each budget."""
        name = _picture_name(row, model.digest)
        if is_whole_picture(self.folder / name):
            return
        first = self.distances.first_seed
        seeds = range(first, first + min(_COLUMNS, self.config.samples))
        lines: list[Tensor] = []
        for recipe in row.recipes():
            try:
                lines.append(self.distances.draw(model, recipe, seeds).images)
            except FloatingPointError:
                lines.append(torch.zeros(len(seeds), *model.space.shape, dtype=torch.uint8))
        self.folder.write(
            name,
            lambda file: save_grid(file, torch.cat(lines), model.space.levels, columns=len(seeds)),
        )

    def _evaluated(self, name: str) -> Path:
        return self.folder / f"evaluations/{name}.json"

    def _write(self) -> None:
        """Put what there is into `RESULTS`."""
        rows = [self._row(row) for row in self.config.rows]
        models = {
            name: {**self.models[name], "bits": self._bits(name)}
            for name in self.config.models
            if name in self.models
        }
        results = {
            "format": FORMAT,
            "complete": self._is_complete(models, rows),
            "made": self._origins(),
            "reference": self._reference(),
            "models": models,
            "rows": rows,
            "config": self.config.to_dict(),
        }
        self.results = results
        self.folder.write_json(RESULTS, results)

    def _report(self) -> None:
        """Show what there is, if it is more than was shown: a kill leaves no time for it."""
        if self.results != self.shown:
            write_report(self.folder.path, pictures=False)
            self.shown = self.results

    def _is_complete(self, models: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
        bits = [model["bits"] for model in models.values()]
        return (
            len(models) == len(self.config.models)
            and self._are_filled(rows)
            and ("bpd" not in self.config.metrics or None not in bits)
        )

    def _are_filled(self, rows: Sequence[Mapping[str, Any]]) -> bool:
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
                numbers = [cell_numbers(one) for one in made]
                cell["measures"] = {
                    name.split()[0]: [one[name] for one in numbers] for name in numbers[0]
                }
            tried = self.distances.tried(found, recipe)
            failures = [one[FAILED] for one in tried if FAILED in one and one not in made]
            if failures:
                cell["reason"] = failures[0]
            cells.append(cell)
        picture = None
        if row.model in self.models:
            name = _picture_name(row, self.models[row.model]["weights"])
            picture = name if (self.folder / name).exists() else None
        return {
            "model": row.model,
            "label": row.label,
            "solver": row.solver,
            "adaptive": not row.nfe,
            "fixed": {} if row.nfe else row.fixed,
            "picture": picture,
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
        """What is kept of a model's likelihood of as many images as are wanted."""
        found: dict[str, Any] | None = self.found[name]["likelihood"]
        wanted = found is not None and found["asked"] == self.config.likelihood_images
        return found if wanted else None

    def _origins(self) -> list[dict[str, Any]]:
        """Versions, machines, devices and threads that the numbers are from: different ones."""
        cells = [
            cell[SAMPLING]
            for row in self.config.rows
            if row.model in self.found
            for recipe in row.recipes()
            for cell in self.distances.tried(self.found[row.model], recipe)
        ]
        bits = [self._likelihood(name) for name in self.found]
        made = [one for record in [*cells, *filter(None, bits)] for one in record.get("made", [])]
        return [one for i, one in enumerate(made) if one not in made[:i]]

    def _reference(self) -> dict[str, Any] | None:
        """What the distances of all cells are to, and in which features."""
        keys = ("features", "reference_samples", "reference_sha256")
        references = [
            {key: measure[key] for key in keys}
            for found in self.found.values()
            for recipe in found["recipes"]
            for cell in recipe["cells"].values()
            for name, measure in cell.items()
            if name.startswith("fd ")
        ]
        if any(one != references[0] for one in references):
            msg = (
                f"{self.folder / 'evaluations'} holds distances in the features of different "
                "classifiers; delete it to have them measured again"
            )
            raise ValueError(msg)
        return references[0] if references else None


def _numbers(part: nn.Module) -> int:
    return sum(x.numel() for x in part.parameters())


def _words(process: ProcessConfig) -> str:
    options = ", ".join(f"{key}={value}" for key, value in process.options.items())
    return f"{process.name}({options})"


def _training_seconds(metrics: Path) -> float | None:
    """Seconds of a training, all its parts together, from the last line of its metrics."""
    try:
        return float(json.loads(metrics.read_text().splitlines()[-1])["seconds"])
    except (OSError, LookupError, TypeError, ValueError):
        return None


def _picture_name(row: RowConfig, weights: str) -> str:
    """File of a row's picture; another recipe or model has another."""
    recipes = row.recipes()
    parts = f"{weights} {recipes} {[resolved_solver(recipe) for recipe in recipes]}"
    digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
    words = "".join(x if x.isalnum() else " " for x in row.label.lower())
    slug = "-".join(words.split())
    return f"samples/{row.model}-{slug}-{digest}.png"
