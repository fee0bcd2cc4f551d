"""Evaluation of a trained run, or of samples in files: sampling recipes against metrics.

Results are lines of a file, which a later call resumes: only what is missing there is measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cldsde.errors import SettingError, setting
from cldsde.images.config import SamplingConfig
from cldsde.images.data.samples import as_bytes
from cldsde.images.evaluate.distances import FeatureSums, frechet_report, images_sha256
from cldsde.images.evaluate.features import check_features, feature_name, load_features
from cldsde.images.evaluate.inception import check_counts, inception_report, inception_sums
from cldsde.images.evaluate.likelihoods import (
    UndefinedLikelihoodError,
    latent_likelihood,
    likelihood,
)
from cldsde.images.evaluate.reference import CACHE, CLASSIFIER, Reference
from cldsde.images.evaluate.results import (
    Result,
    add_results,
    check_comparable,
    origin,
    read_results,
)
from cldsde.images.sample.sampler import ImageSampler, Samples, make_solver
from cldsde.images.sample.source import Model, OtherDynamics
from cldsde.images.schema import Count, check_name, plain, section
from cldsde.progress import progress_bar
from cldsde.score.flow_density import UnsolvedFlowError

METRICS = ("fd", "fid", "kid", "isc", "prc", "bpd")
"""Fréchet distance in features that fit the data; FID, KID, Inception score, precision and recall
in Inception's; bits per dim."""

_INCEPTION = {"fid", "kid", "isc", "prc"}
Reports = dict[str, dict[str, Any]]
"""Numbers by metric, with everything that they depend on."""
_FAILURES = (FloatingPointError, UnsolvedFlowError, UndefinedLikelihoodError)


@section
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
    weights
        File of Inception weights, for fid, kid, isc and prc.
    folder
        Where the classifier is kept.
    likelihood_images
        Held-out images whose likelihood is computed.
    device, progress
        Where to compute, and whether to show progress bars on stderr.
    metrics
        Some of `METRICS`.
    samples, repeats, first_seed
        Images per repetition, and repetitions, whose spread is reported. Seeds of the images count
        from the first one.
    batch
        Images per batch.
    """

    metrics: Sequence[str] = ("fd",)
    samples: Annotated[Count, Field(ge=2)] = 1000
    repeats: Count = 1
    first_seed: int = 0
    batch: Count = 64

    def check(self, images: int | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Raise an error if something cannot be measured, before any work is done."""
        train, reference = self.data.train, getattr(self.data, self.part)
        if images is not None and "bpd" in self.metrics:
            raise SettingError("metrics", "samples have no likelihood; bpd is for runs")
        images = self.samples if images is None else images
        if shape is not None and tuple(shape) != train.shape:
            own, others = ("×".join(map(str, x)) for x in (shape, train.shape))
            msg = "images must be of the size of those that they are compared with, "
            msg += f"{others} (channels, rows, columns); got {own}"
            raise SettingError("reference", msg)
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
        if reference is None:
            raise SettingError("part", f"the data set has no part {self.part}")
        if "bpd" in self.metrics and self.data.held_out is None:
            raise SettingError("metrics", "bpd needs held-out images; the data set has none")
        if not 0 <= self.first_seed <= 2**32 - self.samples * self.repeats:
            msg = f"must leave room for all seeds below 2³²; got {self.first_seed}"
            raise SettingError("seed", msg)
        check_counts(self._measures, images, len(reference))
        self._check_features()

    def _check_features(self) -> None:
        """Raise an error if a network for features is missing, or does not fit the images."""
        inception, channels = _INCEPTION & set(self.metrics), self.data.train.shape[0]
        if inception:
            names = ", ".join(sorted(inception))
            if self.weights is None:
                msg = f"{names} need the file of Inception weights; use fd for features of a "
                raise SettingError("weights", f"{msg}classifier of the data")
            if channels not in {1, 3}:
                msg = f"{names}: Inception needs images of 1 or 3 channels; got {channels}"
                raise SettingError("metrics", msg)
            with setting("weights"):
                _ = self._inception.sha256
        if "fd" in self.metrics and self.features != "classifier":
            two = as_bytes(self.images.load(torch.arange(2)), self.images.levels)
            check_features(load_features(self.features), two)
        elif "fd" in self.metrics and self.data.train.labels is None:
            msg = "the data have no classes; name a network, module:attribute"
            raise SettingError("features", msg)

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

    def of_run(self, model: Model, recipes: Iterable[SamplingConfig], file: Path) -> list[Result]:
        """Measure a trained model; return the results, which are added to the file.

        Failures are results and are not repeated, nor do they end the evaluation. Several processes
        may write to one file.
        """
        found = self.of_density(model, file) if "bpd" in self.metrics else []
        return [*found, *(x for recipe in recipes for x in self.of_recipe(model, recipe, file))]

    def of_density(self, model: Model, file: Path) -> list[Result]:
        """Bits per dim of a trained model; see `of_run`."""
        wanted = self._wanted(["bpd"], model=model.digest)
        return self._filled(file, wanted, lambda _: ({"bpd": self._bits(model)}, {}))

    def of_recipe(self, model: Model, recipe: SamplingConfig, file: Path) -> list[Result]:
        """Measure images of a recipe; see `of_run`."""
        own = {"model": model.digest, "recipe": plain(recipe), "solver": repr(make_solver(recipe))}
        found: list[Result] = []
        for repeat in range(self.repeats):
            first = self.first_seed + repeat * self.samples
            seeds = range(first, first + self.samples)
            wanted = self._wanted(self._measures, **own, seeds=(seeds[0], seeds[-1]))
            found += self._filled(file, wanted, partial(self._of_seeds, model, recipe, seeds))
        return found

    def of_samples(self, images: Tensor, name: str, file: Path) -> list[Result]:
        """Measure images, uint8 with 256 levels; see `of_run`."""
        wanted = self._wanted(self._measures, model=images_sha256(images), recipe={"solver": name})
        return self._filled(file, wanted, lambda metrics: (self.measure(images, metrics), {}))

    def stream(self, model: Model, recipe: SamplingConfig, seeds: range) -> Iterator[Samples]:
        """Sample images of a model with a recipe, batch by batch."""
        sampler = ImageSampler.of(model, recipe, batch=self.batch)
        return (drawn for _, drawn in sampler.stream(seeds, progress=self.progress))

    def measure(self, images: Iterable[Tensor], metrics: Sequence[str], count: int = 0) -> Reports:
        """Reports of metrics of images, uint8 with 256 levels.

        ``images`` is a tensor, or batches of ``count`` images in all, which are not kept.
        """
        if isinstance(images, Tensor):
            count, parts = len(images), images.split(self.batch)  # type: ignore[no-untyped-call]
            images = progress_bar(parts, shown=self.progress, desc="features")
        shape = (count, *self.data.train.shape)
        inception, streams = [metric for metric in metrics if metric != "fd"], []
        if "fd" in metrics:
            streams.append(FeatureSums(self._network, shape))
        if inception:
            streams.append(inception_sums(self._inception, shape, inception))
        for some in images:
            for sums in streams:
                sums.add(some)
        found = {}
        if "fd" in metrics:
            found["fd"] = frechet_report(streams[0].statistics(), self._statistics)
        if inception:
            other = self._inception_statistics(inception)
            report = inception_report(
                *(streams[-1].statistics(), other, self._inception, inception),
                kid_subset_size=min(1000, count, other.count),
            )
            found |= dict.fromkeys(inception, report)
        return found

    def _wanted(self, metrics: Sequence[str], **own: Any) -> list[Result]:
        """Results that an evaluation looks for or measures, without numbers."""
        return [Result(metric=name, against=self._against(name), **own) for name in metrics]

    def _against(self, metric: str) -> str:
        if metric == "bpd":
            return images_sha256(self._likelihood_images)[:16]
        features = self.features if metric == "fd" else self._inception.sha256[:8]
        return f"{features} {self.part}"

    def _filled(
        self,
        file: Path,
        wanted: list[Result],
        measure: Callable[[list[str]], tuple[Reports, dict[str, float]]],
    ) -> list[Result]:
        """Results from a file, after the missing ones were measured and added to it.

        ``measure`` returns reports of metrics, and the cost of the images.
        """
        found = read_results(file, wanted[0].model) if wanted else {}
        missing = [
            dataclasses.replace(one, **self._conditions(one.metric))
            for one in wanted
            if one.key not in found
        ]
        if missing:
            # Before any sampling.
            check_comparable([*found.values(), *missing], file)
            try:
                reports, cost = measure([one.metric for one in missing])
            except _FAILURES as error:
                made = [dataclasses.replace(one, failed=str(error)) for one in missing]
            else:
                made = [_reported(one, reports[one.metric], cost) for one in missing]
            add_results(file, made)
            found |= {one.key: one for one in made}
        return [found[one.key] for one in wanted]

    def _conditions(self, metric: str) -> dict[str, Any]:
        """Features and reference that results of a metric share, and the origin of the result."""
        found: dict[str, Any] = {"origin": origin(self.device)}
        if metric == "bpd":
            return found
        features = feature_name(self._network) if metric == "fd" else self._inception.sha256
        # The Inception score takes no reference.
        return found | {"features": features, "reference": "" if metric == "isc" else self._sha256}

    def _of_seeds(
        self, model: Model, recipe: SamplingConfig, seeds: range, metrics: list[str]
    ) -> tuple[Reports, dict[str, float]]:
        """Reports of metrics of a recipe, and the cost of the images."""
        evaluations, seconds = [], [0.0]

        def batches() -> Iterator[Tensor]:
            began = time.monotonic()
            for drawn in self.stream(model, recipe, seeds):
                seconds.append(time.monotonic() - began)
                evaluations.append(drawn.evaluations.double())
                yield as_bytes(drawn.images, model.space.levels)
                began = time.monotonic()

        found = self.measure(batches(), metrics, len(seeds))
        return found, {"nfe": float(torch.cat(evaluations).mean()), "seconds": sum(seconds)}

    @property
    def _measures(self) -> list[str]:
        """Metrics of samples."""
        return [metric for metric in self.metrics if metric != "bpd"]

    def _bits(self, model: Model) -> dict[str, Any]:
        if isinstance(model, OtherDynamics):
            raise UndefinedLikelihoodError("bpd needs a run under its own process")
        if model.space.always_classes:
            msg = "bpd needs a network that was trained without classes, too"
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


def _reported(wanted: Result, report: dict[str, Any], cost: dict[str, float]) -> Result:
    """A result with the numbers of a report."""
    metric = wanted.metric
    if metric in {"fd", "bpd"}:
        numbers = {metric: report["frechet_distance" if metric == "fd" else "bits_per_dim"]}
    else:
        names = ("precision", "recall") if metric == "prc" else (metric,)
        numbers = {name: report["metrics"][name]["value"] for name in names}
    return dataclasses.replace(wanted, numbers=numbers, about=report, **cost)  # type: ignore[arg-type]
