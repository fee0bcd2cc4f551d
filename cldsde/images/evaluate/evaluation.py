"""Evaluation of a trained run, or of samples in files: recipes of sampling against measures.

Every finished cell is in the file of results at once: who asks again goes on from there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cldsde.images.config import SamplingConfig
from cldsde.images.data.samples import as_bytes
from cldsde.images.errors import SettingError, setting
from cldsde.images.evaluate.distances import frechet
from cldsde.images.evaluate.features import check_features, feature_name, load_features
from cldsde.images.evaluate.inception import inception_metrics
from cldsde.images.evaluate.latent_bound import latent_likelihood
from cldsde.images.evaluate.likelihoods import likelihood
from cldsde.images.evaluate.reference import CLASSIFIER, Reference
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
    with_origin,
)
from cldsde.images.evaluate.shared import UndefinedLikelihoodError
from cldsde.images.evaluate.weights import check_inception_weights
from cldsde.images.model import ImageModel
from cldsde.images.sample.sampler import Samples, draw_images
from cldsde.images.sample.source import OtherDynamics
from cldsde.images.schema import check_name
from cldsde.score.flow_density import UnsolvedFlowError

Metric = Literal["fd", "fid", "kid", "isc", "prc", "bpd"]
METRICS = ("fd", "fid", "kid", "isc", "prc", "bpd")
"""Fréchet distance in features that fit the data; FID, KID, Inception score, precision and recall
in Inception's; bits a dimension."""

_INCEPTION = {"fid", "kid", "isc", "prc"}
_LEAST = {"prc": 4, "isc": 10}  # images that it needs: three neighbours, ten splits; others two
_CACHE = "inception"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Reference):
    """What to measure.

    Attributes
    ----------
    metrics
        Which, of `METRICS`.
    samples
        Images of each repetition.
    repeats
        Repetitions, with seeds of their own, whose spread is reported.
    first_seed
        Seeds count from here.
    batch
        Images at once.
    weights
        File of Inception weights, for fid, kid, isc and prc.

    Further attributes are those of `Reference`.
    """

    metrics: Sequence[str] = ("fd",)
    samples: int = 1000
    repeats: int = 1
    first_seed: int = 0
    batch: int = 64
    weights: Path | None = None

    def check(
        self, images: int | None = None, *, shape: tuple[int, int, int] | None = None
    ) -> None:
        """Refuse what cannot be measured, before any work is done.

        Parameters
        ----------
        images
            Number of images to be measured; that of a repetition if None.
        shape
            Channels, rows and columns of images to be measured; those of the data if None.

        Raises
        ------
        ValueError
            If a metric is unknown, a number out of range, what a metric needs is missing, or images
            are too few for it or of another size than the data.
        """
        if shape is not None and shape != self.data.train.shape:
            own, others = ("×".join(map(str, x)) for x in (shape, self.data.train.shape))
            msg = (
                "images must be of the size of those that they are compared with, "
                f"{others} (channels, rows, columns); got {own}"
            )
            raise SettingError("reference", msg)
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
        if getattr(self.data, self.part) is None:
            raise SettingError("part", f"the data set has no part {self.part}")
        for name in ("samples", "repeats", "batch", "likelihood_images"):
            least = 2 if name == "samples" else 1
            if getattr(self, name) < least:
                raise SettingError(name, f"must be at least {least}; got {getattr(self, name)}")
        if not 0 <= self.first_seed <= 2**32 - self.samples * self.repeats:
            msg = f"must leave room for all seeds below 2³²; got {self.first_seed}"
            raise SettingError("seed", msg)
        self._check_counts(self.samples if images is None else images)
        inception = _INCEPTION & set(self.metrics)
        if inception and self.weights is None:
            msg = (
                f"{', '.join(sorted(inception))} need the file of Inception weights; take fd for "
                "features of a classifier of the data"
            )
            raise SettingError("weights", msg)
        if inception:
            with setting("weights"):
                _ = self._weights_digest
        if "fd" in self.metrics and self.features == "classifier":
            if self.data.train.labels is None:
                msg = "the data have no classes; name a network, module:attribute"
                raise SettingError("features", msg)
        elif "fd" in self.metrics:
            try:
                check_features(load_features(self.features), self._two_images)
            except ModuleNotFoundError as error:
                raise SettingError("features", str(error)) from error

    def _check_counts(self, images: int) -> None:
        reference = len(getattr(self.data, self.part))
        for metric in self._measures:
            least = _LEAST.get(metric, 2)
            if images < least:
                msg = f"{metric} needs at least {least} images; got {images}"
                raise SettingError("metrics", msg)
            least = 2 if metric == "isc" else least  # which looks at no reference
            if reference < least:
                msg = f"{metric} needs at least {least} images to compare with; got {reference}"
                raise SettingError("metrics", msg)

    def prepare(self, *, progress: bool = False) -> None:
        """Make what measuring samples needs, and keep it; nothing where that is done.

        Raises
        ------
        ValueError
            If a classifier in the folder is damaged, or of other data.
        """
        if "fd" in self.metrics:
            _ = dataclasses.replace(self, progress=progress)._network

    @property
    def fills_folder(self) -> bool:
        """Whether something is going to be kept in the folder that is not there yet."""
        kept = []
        if "fd" in self.metrics and self.features == "classifier":
            kept.append(CLASSIFIER)
        if _INCEPTION & set(self.metrics):
            kept.append(_CACHE)
        return not all((self.folder / name).exists() for name in kept)

    def of_run(
        self, model: ImageModel | OtherDynamics, recipes: Sequence[SamplingConfig], results: Path
    ) -> dict[str, Any]:
        """Measure each recipe on a trained model; return what the file of results then holds.

        Cells that a solver with other options made are measured again, as where a default of an
        option is another one now. Failures are results: they are not tried again. Several processes
        may write to one file: what others have measured meanwhile stays.

        Raises
        ------
        UndefinedLikelihoodError
            If the model can give no bits a dimension.
        ValueError
            If the file of results or the classifier does not fit the model, the data or the
            features.
        FloatingPointError
            If images of a recipe, or the likelihood, are not finite, now or when they were tried.
        """
        found = stored_results(results, model.digest)
        if "bpd" in self.metrics:
            found = self._measure_bits(model, found, results)
        for recipe in recipes if self._measures else ():
            solver = resolved_solver(recipe)
            for seeds in self._seeds:
                cell = cells_of(found, recipe).get(seeds_key(seeds), {})
                if _solver_of(cell) != solver:
                    cell = {}
                missing = self._missing(cell)
                if not missing:
                    continue
                if FAILED in cell:
                    raise FloatingPointError(_kept(cell[FAILED], results))
                self._check_beside(found, missing, results)
                cell = self._measured(model, recipe, seeds, cell)
                found = self._stored(model, recipe, seeds, cell, results)
                if FAILED in cell:
                    raise FloatingPointError(cell[FAILED])
        return found

    def tried(self, found: Mapping[str, Any], recipe: SamplingConfig) -> list[dict[str, Any]]:
        """Cells of a recipe's very solver among results, in the order of the repetitions."""
        stored = cells_of({"recipes": list(found["recipes"])}, recipe)
        cells = [stored.get(seeds_key(seeds), {}) for seeds in self._seeds]
        solver = resolved_solver(recipe)
        return [cell for cell in cells if _solver_of(cell) == solver]

    def cells(self, found: Mapping[str, Any], recipe: SamplingConfig) -> list[dict[str, Any]]:
        """The finished ones of them."""
        return [cell for cell in self.tried(found, recipe) if not self._missing(cell)]

    def draw(
        self, model: ImageModel | OtherDynamics, recipe: SamplingConfig, seeds: range
    ) -> Samples:
        """Images of a model with a recipe."""
        return draw_images(
            model.score,
            model.space,
            seeds,
            recipe,
            vae=model.vae,
            batch=self.batch,
            progress=self.progress,
        )

    def measure(self, images: Tensor, metrics: Sequence[str]) -> dict[str, Any]:
        """Measures of images, uint8 with 256 levels, by name."""
        cell: dict[str, Any] = {}
        if "fd" in metrics:
            cell[self._name("fd")] = frechet(
                images, self._reference_statistics, self._network, progress=self.progress
            )
        inception = [metric for metric in metrics if metric in _INCEPTION]
        if inception:
            assert self.weights is not None
            found = inception_metrics(
                images,
                self._reference,
                self.weights,
                metrics=inception,  # type: ignore[arg-type]
                batch=self.batch,
                device=self.device,
                cache=self.folder / _CACHE,
                kid_subset_size=min(1000, len(images), len(self._reference)),
                progress=self.progress,
            )
            cell |= {self._name(metric): found for metric in inception}
        return cell

    def _measured(
        self,
        model: ImageModel | OtherDynamics,
        recipe: SamplingConfig,
        seeds: range,
        cell: Mapping[str, Any],
    ) -> dict[str, Any]:
        """A cell with what it lacks, or with the reason why it cannot be had."""
        began = time.monotonic()
        made = {
            "solver": resolved_solver(recipe),
            "made": with_origin(cell, origin(self.device)),
        }
        try:
            drawn = self.draw(model, recipe, seeds)
        except FloatingPointError as error:
            return {**cell, SAMPLING: cell.get(SAMPLING, {}) | made, FAILED: str(error)}
        cost = {
            "nfe": float(drawn.evaluations.double().mean()),
            "seconds": time.monotonic() - began,
        }
        images = as_bytes(drawn.images, model.space.levels)
        return {**cell, SAMPLING: cost | made, **self.measure(images, self._missing(cell))}

    def _stored(
        self,
        model: ImageModel | OtherDynamics,
        recipe: SamplingConfig,
        seeds: range,
        cell: Mapping[str, Any],
        results: Path,
    ) -> dict[str, Any]:
        """All results once a cell is among them."""
        with changed_results(results, model.digest) as found:
            self._check_beside(found, self._measures, results)
            cells, key = cells_of(found, recipe), seeds_key(seeds)
            cells[key] = joined(cell, cells.get(key, {}))
        return found

    @property
    def _measures(self) -> list[str]:
        """Metrics of samples."""
        return [metric for metric in self.metrics if metric != "bpd"]

    @property
    def _seeds(self) -> list[range]:
        """Those of each repetition."""
        firsts = (self.first_seed + repeat * self.samples for repeat in range(self.repeats))
        return [range(first, first + self.samples) for first in firsts]

    def _missing(self, cell: Mapping[str, Any]) -> list[str]:
        return [metric for metric in self._measures if self._name(metric) not in cell]

    def _name(self, metric: str) -> str:
        """Key of a measure: in other features, or to other images, it is another."""
        if metric == "fd":
            return f"fd {self.features} {self.part}"
        return f"{metric} {self._weights_digest[:8]} {self.part}"

    def _check_beside(
        self, found: Mapping[str, Any], metrics: Sequence[str], results: Path
    ) -> None:
        """Refuse to put distances beside some in other features, or to other images."""
        cells = [cell for row in found["recipes"] for cell in row["cells"].values()]
        for metric in metrics:
            if metric == "isc":  # of samples alone
                continue
            name = self._name(metric)
            measures = [cell[name] for cell in cells if name in cell]
            for measure in measures if metric == "fd" else ():
                if measure["features"] != feature_name(self._network):
                    msg = (
                        f"{results} holds distances in the features of different classifiers or "
                        f"networks, {measure['features']} and now {feature_name(self._network)}; "
                        "delete it, or write to another file"
                    )
                    raise ValueError(msg)
            if any(measure["reference_sha256"] != self._reference_sha256 for measure in measures):
                msg = (
                    f"{results} holds {metric} to other images than those of the data now; "
                    "delete it, or write to another file"
                )
                raise ValueError(msg)

    @cached_property
    def _weights_digest(self) -> str:
        assert self.weights is not None
        return check_inception_weights(self.weights)

    def _measure_bits(
        self, model: ImageModel | OtherDynamics, found: dict[str, Any], results: Path
    ) -> dict[str, Any]:
        """All results once bits a dimension are among them."""
        bits = found["likelihood"]
        asked = {"asked": self.likelihood_images, "images_sha256": self._likelihood_sha256}
        if bits is None or not asked.items() <= bits.items():
            if model.space.always_classes:
                msg = "bpd needs a network that was trained without classes, too"
                raise UndefinedLikelihoodError(msg)
            try:
                bits = self._bits(model)
            except (FloatingPointError, UnsolvedFlowError) as error:
                bits = {FAILED: str(error)}
            bits |= {**asked, "made": [origin(self.device)]}
            with changed_results(results, model.digest) as changed:
                changed["likelihood"] = bits
            found = changed
            if FAILED in bits:
                raise FloatingPointError(bits[FAILED])
        if FAILED in bits:
            raise FloatingPointError(_kept(bits[FAILED], results))
        return found

    def _bits(self, model: ImageModel | OtherDynamics) -> dict[str, Any]:
        if isinstance(model, OtherDynamics):
            msg = "bpd needs a run under its own process"
            raise UndefinedLikelihoodError(msg)
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


def _solver_of(cell: Mapping[str, Any]) -> str | None:
    """The solver that made a cell, in words; None where nobody said."""
    solver: str | None = cell.get(SAMPLING, {}).get("solver")
    return solver
