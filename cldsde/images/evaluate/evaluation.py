"""Evaluation of a trained run, or of samples in files: sampling recipes against metrics.

Every finished cell is written to the file of results at once, from which a later call resumes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.errors import SettingError, setting
from cldsde.files import write_whole
from cldsde.images.config import SamplingConfig
from cldsde.images.data.samples import as_bytes
from cldsde.images.evaluate.distances import FeatureSums, frechet_report
from cldsde.images.evaluate.features import check_features, feature_name, load_features
from cldsde.images.evaluate.inception import inception_metrics
from cldsde.images.evaluate.likelihoods import (
    UndefinedLikelihoodError,
    latent_likelihood,
    likelihood,
)
from cldsde.images.evaluate.reference import CACHE, CLASSIFIER, Reference
from cldsde.images.evaluate.results import (
    FAILED,
    SAMPLING,
    cells_of,
    changed_results,
    joined,
    origin,
    resolved_solver,
    seeds_key,
    stored_results,
)
from cldsde.images.evaluate.weights import check_inception_weights
from cldsde.images.sample.sampler import ImageSampler, Samples
from cldsde.images.sample.source import Model, OtherDynamics
from cldsde.images.schema import check_name
from cldsde.progress import progress_bar
from cldsde.score.flow_density import UnsolvedFlowError

METRICS = ("fd", "fid", "kid", "isc", "prc", "bpd")
"""Fréchet distance in features that fit the data; FID, KID, Inception score, precision and recall
in Inception's; bits per dim."""

_INCEPTION = {"fid", "kid", "isc", "prc"}
# Images that a metric needs: three neighbours, ten splits; two for all others.
_LEAST = {"prc": 4, "isc": 10}


@dataclass(frozen=True, kw_only=True)
class Evaluation(Reference):
    """A set of metrics, and the images and features that they need.

    Attributes
    ----------
    data
        The data set.
    part
        Part of the data to compare with: ``"train"``, as for published distances, or
        ``"held_out"``.
    features
        ``"classifier"``: features of a classifier trained on the data's classes and kept in
        ``folder``; or ``module:attribute`` of the user's own network.
    likelihood_images
        Held-out images whose likelihood is computed.
    folder
        Where the classifier is kept.
    weights
        File of Inception weights, for fid, kid, isc and prc.
    device
        Where to compute.
    progress
        Show progress bars on stderr.
    metrics
        Some of `METRICS`.
    samples
        Images per repetition.
    repeats
        Repetitions with seeds of their own, whose spread is reported.
    first_seed
        Seed of the first image; the others count from there.
    batch
        Images per batch.
    """

    metrics: Sequence[str] = ("fd",)
    samples: int = 1000
    repeats: int = 1
    first_seed: int = 0
    batch: int = 64

    def check(self, images: int | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Raise an error if something cannot be measured, before any work is done."""
        if self.part not in {"train", "held_out"}:
            raise SettingError("part", f"must be train or held_out; got {self.part!r}")
        if images is not None and "bpd" in self.metrics:
            raise SettingError("metrics", "samples have no likelihood; bpd is for runs")
        train, images = self.data.train, self.samples if images is None else images
        if shape is not None and tuple(shape) != train.shape:
            own, others = ("×".join(map(str, x)) for x in (shape, train.shape))
            msg = "images must be of the size of those that they are compared with, "
            msg += f"{others} (channels, rows, columns); got {own}"
            raise SettingError("reference", msg)
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
        reference = getattr(self.data, self.part)
        if reference is None:
            raise SettingError("part", f"the data set has no part {self.part}")
        for name in ("samples", "repeats", "batch", "likelihood_images"):
            least = 2 if name == "samples" else 1
            if getattr(self, name) < least:
                raise SettingError(name, f"must be at least {least}; got {getattr(self, name)}")
        if not 0 <= self.first_seed <= 2**32 - self.samples * self.repeats:
            msg = f"must leave room for all seeds below 2³²; got {self.first_seed}"
            raise SettingError("seed", msg)
        for metric in self._measures:
            needed = _LEAST.get(metric, 2)
            msg = f"{metric} needs at least {needed} images"
            if images < needed:
                raise SettingError("metrics", f"{msg}; got {images}")
            if metric != "isc" and len(reference) < needed:
                raise SettingError("metrics", f"{msg} to compare with; got {len(reference)}")
        self._check_inputs()

    def _check_inputs(self) -> None:
        reference = getattr(self.data, self.part)
        inception = ", ".join(sorted(_INCEPTION & set(self.metrics)))
        if inception and self.weights is None:
            msg = f"{inception} need the file of Inception weights; use fd for features of a "
            raise SettingError("weights", f"{msg}classifier of the data")
        channels = self.data.train.shape[0]
        if inception and channels not in {1, 3}:
            msg = f"{inception}: Inception needs images of 1 or 3 channels; got {channels}"
            raise SettingError("metrics", msg)
        if inception:
            with setting("weights"):
                _ = self._weights_digest
        if "fd" in self.metrics and self.features == "classifier":
            if self.data.train.labels is None:
                msg = "the data have no classes; name a network, module:attribute"
                raise SettingError("features", msg)
        elif "fd" in self.metrics:
            two = as_bytes(reference.load(torch.arange(2)), reference.levels)
            check_features(load_features(self.features), two)

    def prepare(self, *, progress: bool = False) -> None:
        """Train the classifier that measuring samples needs, if there is none yet."""
        if "fd" in self.metrics:
            _ = dataclasses.replace(self, progress=progress)._network

    @property
    def fills_folder(self) -> bool:
        """Whether a file that is missing in the folder is going to be kept there."""
        kept = [CACHE] if _INCEPTION & set(self.metrics) else []
        if "fd" in self.metrics and self.features == "classifier":
            kept.append(CLASSIFIER)
        return not all((self.folder / name).exists() for name in kept)

    def of_run(
        self, model: Model, recipes: Sequence[SamplingConfig], results: Path
    ) -> dict[str, Any]:
        """Measure each recipe on a trained model; return the content of the file of results.

        Cells of a solver with other options are measured again, for example after a change of a
        default. Failures are results and are not repeated. Several processes may write to one file.
        """
        found = stored_results(results, model.digest)
        if "bpd" in self.metrics:
            found = self._measure_bits(model, found, results)
        for recipe in recipes if self._measures else ():
            solver = resolved_solver(recipe)
            for seeds in self._seeds:
                cell = cells_of(found, recipe).get(seeds_key(seeds), {})
                if cell.get(SAMPLING, {}).get("solver") != solver:
                    cell = {}
                missing = self._missing(cell)
                if not missing:
                    continue
                if FAILED in cell:
                    raise FloatingPointError(_kept(cell[FAILED], results))
                self._check_beside(found, missing, results)
                cell = self._measured(model, recipe, seeds, cell)
                with changed_results(results, model.digest) as found:
                    self._check_beside(found, self._measures, results)
                    cells, key = cells_of(found, recipe), seeds_key(seeds)
                    cells[key] = joined(cell, cells.get(key, {}))
                if FAILED in cell:
                    raise FloatingPointError(cell[FAILED])
        return found

    def tried(self, found: Mapping[str, Any], recipe: SamplingConfig) -> list[dict[str, Any]]:
        """Cells of a recipe's solver among results, in the order of the repetitions."""
        stored = cells_of({"recipes": list(found["recipes"])}, recipe)
        cells = [stored.get(seeds_key(seeds), {}) for seeds in self._seeds]
        solver = resolved_solver(recipe)
        return [cell for cell in cells if cell.get(SAMPLING, {}).get("solver") == solver]

    def cells(self, found: Mapping[str, Any], recipe: SamplingConfig) -> list[dict[str, Any]]:
        """The finished cells among those that were tried."""
        return [cell for cell in self.tried(found, recipe) if not self._missing(cell)]

    def draw(self, model: Model, recipe: SamplingConfig, seeds: range) -> Samples:
        """Sample images of a model with a recipe."""
        return self._sampler(model, recipe).sample(seeds, progress=self.progress)

    def of_samples(self, images: Tensor, name: str, results: Path) -> dict[str, Any]:
        """Measure images, uint8 with 256 levels; write a file, return what `of_run` returns."""
        cell = self.measure(images, self.metrics)
        text = json.dumps({"samples": name, "measures": cell}, indent=1) + "\n"
        write_whole(results, lambda path: path.write_text(text))
        row = {"sampling": {"solver": name, "nfe": ""}, "cells": {"": cell}}
        return {"recipes": [row], "likelihood": None}

    def stream(self, model: Model, recipe: SamplingConfig, seeds: range) -> Iterator[Samples]:
        """The images of `draw`, batch by batch."""
        batches = self._sampler(model, recipe).stream(seeds, progress=self.progress)
        return (drawn for _, drawn in batches)

    def _sampler(self, model: Model, recipe: SamplingConfig) -> ImageSampler:
        return ImageSampler(model.score, model.space, recipe, vae=model.vae, batch=self.batch)

    def measure(
        self, images: Iterable[Tensor], metrics: Sequence[str], count: int = 0
    ) -> dict[str, Any]:
        """Metrics of images, uint8 with 256 levels, by name.

        ``images`` is a tensor, or batches of ``count`` images, which are kept for kid, isc and prc
        alone.
        """
        if isinstance(images, Tensor):
            count, parts = len(images), images.split(self.batch)  # type: ignore[no-untyped-call]
            images = progress_bar(parts, shown=self.progress, desc="features")
        shape = (count, *self.data.train.shape)
        inception: list[Any] = [metric for metric in metrics if metric in _INCEPTION]
        streams, kept = {}, []
        if "fd" in metrics:
            streams["fd"] = FeatureSums(self._network, shape), self._reference_statistics
        if inception == ["fid"]:
            streams["fid"] = FeatureSums(self._inception, shape), self._inception_statistics
        for some in images:
            for sums, _ in streams.values():
                sums.add(some)
            if inception and "fid" not in streams:
                kept.append(some)
        cell: dict[str, Any] = {}
        for metric, (sums, reference) in streams.items():
            found = frechet_report(sums.statistics(), reference)
            value = {"value": found["frechet_distance"], "spread": None, "spread_is": None}
            numbers = {} if metric == "fd" else {"metrics": {"fid": value}}
            cell[self._name(metric)] = {**found, **numbers}
        if kept:
            assert self.weights is not None
            images = torch.cat(kept)
            found = inception_metrics(
                *(images, self._reference, self.weights),
                metrics=inception,
                batch=self.batch,
                device=self.device,
                cache=self.folder / CACHE,
                kid_subset_size=min(1000, len(images), len(self._reference)),
                progress=self.progress,
            )
            cell |= {self._name(metric): found for metric in inception}
        return cell

    def _measured(
        self, model: Model, recipe: SamplingConfig, seeds: range, cell: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A cell with its missing measures, or with the reason of the failure."""
        own, before = origin(self.device), cell.get(SAMPLING, {}).get("made", [])
        made: dict[str, Any] = {"solver": resolved_solver(recipe)}
        made["made"] = before if own in before else [*before, own]
        evaluations, seconds = [], [0.0]

        def batches() -> Iterator[Tensor]:
            began = time.monotonic()
            for drawn in self.stream(model, recipe, seeds):
                seconds.append(time.monotonic() - began)
                evaluations.append(drawn.evaluations.double())
                yield as_bytes(drawn.images, model.space.levels)
                began = time.monotonic()

        try:
            found = self.measure(batches(), self._missing(cell), len(seeds))
        except FloatingPointError as error:
            return {**cell, SAMPLING: cell.get(SAMPLING, {}) | made, FAILED: str(error)}
        made["nfe"] = float(torch.cat(evaluations).mean())
        made["seconds"] = sum(seconds)
        return {**cell, SAMPLING: made, **found}

    @property
    def _measures(self) -> list[str]:
        """Metrics of samples."""
        return [metric for metric in self.metrics if metric != "bpd"]

    @property
    def _seeds(self) -> list[range]:
        """Seeds of each repetition."""
        firsts = (self.first_seed + repeat * self.samples for repeat in range(self.repeats))
        return [range(first, first + self.samples) for first in firsts]

    def _missing(self, cell: Mapping[str, Any]) -> list[str]:
        return [metric for metric in self._measures if self._name(metric) not in cell]

    def _name(self, metric: str) -> str:
        """Key of a measure, which names its features and the part of the data."""
        if metric == "fd":
            return f"fd {self.features} {self.part}"
        return f"{metric} {self._weights_digest[:8]} {self.part}"

    def _check_beside(
        self, found: Mapping[str, Any], metrics: Sequence[str], results: Path
    ) -> None:
        """Raise if distances in other features, or to other images, are among the results."""
        cells = [cell for row in found["recipes"] for cell in row["cells"].values()]
        for metric in metrics:
            if metric == "isc":  # takes no reference
                continue
            name = self._name(metric)
            for measure in (cell[name] for cell in cells if name in cell):
                problem = None
                if metric == "fd" and measure["features"] != feature_name(self._network):
                    others = f"{measure['features']} and now {feature_name(self._network)}"
                    problem = f"distances in the features of different classifiers, {others}"
                elif measure["reference_sha256"] != self._reference_sha256:
                    problem = f"{metric} to other images than the present data set has"
                if problem is not None:
                    msg = f"{results} holds {problem}; delete it, or write to another file"
                    raise ValueError(msg)

    @cached_property
    def _weights_digest(self) -> str:
        assert self.weights is not None
        return check_inception_weights(self.weights)

    def _measure_bits(self, model: Model, found: dict[str, Any], results: Path) -> dict[str, Any]:
        """All results once bits per dim are among them."""
        asked = {"asked": self.likelihood_images, "images_sha256": self._likelihood_sha256}
        bits = found["likelihood"]
        if bits is not None and asked.items() <= bits.items():
            if FAILED in bits:
                raise FloatingPointError(_kept(bits[FAILED], results))
            return found
        if model.space.always_classes:
            msg = "bpd needs a network that was trained without classes, too"
            raise UndefinedLikelihoodError(msg)
        try:
            bits = self._bits(model)
        except (FloatingPointError, UnsolvedFlowError) as error:
            bits = {FAILED: str(error)}
        with changed_results(results, model.digest) as changed:
            changed["likelihood"] = {**bits, **asked, "made": [origin(self.device)]}
        if FAILED in bits:
            raise FloatingPointError(bits[FAILED])
        return changed

    def _bits(self, model: Model) -> dict[str, Any]:
        if isinstance(model, OtherDynamics):
            raise UndefinedLikelihoodError("bpd needs a run under its own process")
        options: dict[str, Any] = {
            "levels": self.data.train.levels,
            "t_min": model.config.training.t_min,
            "batch": self.batch,
            "device": self.device,
            "progress": self.progress,
        }
        if model.vae is not None:
            return latent_likelihood(model.model, self._likelihood_images, **options)
        scale: Literal["bins", "ends"] = "bins" if model.space.dequantised else "ends"
        return likelihood(model.score, self._likelihood_images, scale=scale, **options)


def _kept(reason: str, results: Path) -> str:
    return f"{reason}; that was found before, delete {results} to have it tried again"
