"""Evaluation of a trained run, or of samples in files: sampling recipes against metrics.

Results are lines of a file, which a later call resumes: only what is missing there is measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, InstanceOf
from torch import Tensor

from cldsde.errors import require, setting
from cldsde.images.data import DataSet, Images
from cldsde.images.data.pixels import measured, measured_batches
from cldsde.images.evaluate import classifier, distances, inception, likelihoods, results
from cldsde.images.evaluate.results import Result
from cldsde.images.model import ImageModel, TrainedModel
from cldsde.images.sample.outputs import of_each, place, shared
from cldsde.images.sample.sampler import ImageSampler, Recipe, described_recipe, make_plan
from cldsde.images.schema import Count, check_name, section
from cldsde.progress import progress_bar
from cldsde.score.flow_density import UnsolvedFlowError

METRICS = ("fd", "fid", "kid", "isc", "prc", "bpd")
"""Fréchet distance in features that fit the data; FID, KID, Inception score, precision and recall
in Inception's; bits per dim."""
_CACHE = "inception"  # folder of what is kept of a data set in the features of Inception
Reports = dict[str, dict[str, Any]]
"""Numbers by metric, with everything that they depend on."""
_Measure = Callable[[list[str]], tuple[Reports, dict[str, float]]]
"""Reports of metrics, and the cost of the images."""
_FAILURES = (FloatingPointError, UnsolvedFlowError, likelihoods.UndefinedLikelihoodError)


@section
class Measurements:
    """Metrics, and the numbers of images and the features that they need."""

    samples: Annotated[Count, Field(ge=2)] = 1000
    """Images per set. A comparison makes ``repeats`` sets for each cell of its table."""
    repeats: Count = 1
    """Sets of images with seeds of their own, whose spread is reported."""
    batch: Count = 64
    """Images per batch."""
    metrics: tuple[str, ...] = ("fd",)
    """Some of ``"fd"``, ``"fid"``, ``"kid"``, ``"isc"``, ``"prc"`` and ``"bpd"``."""
    features: str = "classifier"
    """Features of the Fréchet distance: ``"classifier"``, of a classifier trained on the data's
    classes; ``"random"``, of one with random weights, also used for data without classes; or
    ``module:attribute`` of the user's own network."""
    weights: Path | None = None
    """Inception weights, for fid, kid, isc and prc."""
    likelihood_images: Count = 64
    """Held-out images whose likelihood is computed."""


@section
class Evaluation(Measurements):
    """Measurements of images; a classifier is kept in ``folder``.

    Several processes, started by ``torchrun``, share the sampling. All call the same methods, and
    the first one has the results.
    """

    data: InstanceOf[DataSet]
    part: Literal["train", "held_out"] = "train"  # to compare with; published distances: train
    folder: Path
    device: str = "cpu"
    progress: bool = False  # show progress bars on stderr
    first_seed: int = 0  # of the images

    def check(self, images: int | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Raise an error if something cannot be measured, before any work is done."""
        train, bits = self.data.train, "bpd" in self.metrics
        msg = "samples have no likelihood; bpd is for runs"
        require(images is None or not bits, "metrics", msg)
        own, others = ("×".join(map(str, x)) for x in (shape or train.shape, train.shape))
        msg = "images must be of the size of those that they are compared with, "
        msg += f"{others} (channels, rows, columns); got {own}"
        require(own == others, "reference", msg)
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
            fits = metric == "fd" or isinstance(train.levels, int)
            require(fits, "metrics", f"{metric} needs grey levels; use fd for other numbers")
        there = getattr(self.data, self.part) is not None
        require(there, "part", f"the data set has no part {self.part}")
        msg = "bpd needs held-out images; the data set has none"
        require(not bits or self.data.held_out is not None, "metrics", msg)
        msg = f"must leave room for all seeds below 2³²; got {self.first_seed}"
        require(0 <= self.first_seed <= 2**32 - self.samples * self.repeats, "seed", msg)
        count = self.samples if images is None else images
        inception.check_counts(self._measures, count, len(self._images))
        names, channels = ", ".join(sorted(self._inception_metrics)), train.shape[0]
        if names:
            msg = f"the file of Inception weights is needed for {names}; fd takes features of "
            require(self.weights is not None, "weights", f"{msg}a classifier of the data")
            msg = f"{names}: Inception needs images of 1 or 3 channels; got {channels}"
            require(channels in {1, 3}, "metrics", msg)
            with setting("weights"):
                _ = self._inception
        if "fd" in self.metrics and self._kind not in {"classifier", "random"}:
            distances.check_features(self._network, next(measured_batches(self._images, 2)))

    def prepare(self, *, progress: bool = False) -> None:
        """Train the classifier that measuring samples needs, if there is none yet."""
        if "fd" in self.metrics:
            _ = dataclasses.replace(self, progress=progress)._network

    @property
    def fills_folder(self) -> bool:
        """Whether a file that is missing in the folder is going to be kept there."""
        kept = [_CACHE] if self._inception_metrics else []
        if "fd" in self.metrics and self._kind == "classifier":
            kept.append(classifier.CLASSIFIER)
        return not all((self.folder / name).exists() for name in kept)

    def of_run(self, model: ImageModel, recipes: Iterable[Recipe], file: Path) -> list[Result]:
        """Measure a trained model; return the results, which are added to the file.

        Failures are results and are not repeated, nor do they end the evaluation. Several processes
        may write to one file.
        """
        found, recipes = self.of_density(model, file) if "bpd" in self.metrics else [], [*recipes]
        self.bar.reset(len(recipes) * self.repeats * self.samples)
        with self.bar:
            return [*found, *(x for recipe in recipes for x in self.of_recipe(model, recipe, file))]

    def of_density(self, model: ImageModel, file: Path) -> list[Result]:
        """Bits per dim of a trained model; see `of_run`."""
        return self._filled(file, ["bpd"], lambda _: ({"bpd": self._bits(model)}, {}), model.digest)

    def of_recipe(self, model: ImageModel, recipe: Recipe, file: Path) -> list[Result]:
        """Measure images of a recipe; see `of_run`."""
        made = make_plan(model.score, recipe, shape=model.data_shape)
        described = described_recipe(recipe)
        own = {"recipe": described, "sampler": made.described(), "solver": repr(made.solver)}
        # One for all repetitions, made if something is missing.
        sampler = cache(lambda: ImageSampler.of(model, recipe, batch=self.batch))
        found: list[Result] = []
        for repeat in range(self.repeats):
            first = self.first_seed + repeat * self.samples
            seeds = range(first, first + self.samples)
            name = model.digest, repr(recipe)
            measure, ends = partial(self._of_seeds, sampler, seeds, name), (seeds[0], seeds[-1])
            self.bar.set_postfix_str(f"{described['solver']}, {recipe.nfe}, seeds from {first}")
            done = self.bar.n + self.samples
            found += self._filled(file, self._measures, measure, model.digest, seeds=ends, **own)
            self.bar.update(done - self.bar.n)
        return found

    def of_samples(self, images: Tensor, name: str, file: Path) -> list[Result]:
        """Measure images, uint8 with 256 levels; see `of_run`."""
        digest, recipe = distances.images_sha256(images), {"solver": name}
        return self._filled(
            file, self._measures, lambda x: (self.measure(images, x), {}), digest, recipe=recipe
        )

    def measure(self, images: Iterable[Tensor], metrics: Sequence[str], count: int = 0) -> Reports:
        """Reports of metrics of images, uint8 with 256 levels.

        ``images`` is a tensor, or batches of ``count`` images in all, which are not kept.
        """
        if isinstance(images, Tensor):
            count, parts = len(images), torch.split(images, self.batch)
            images = progress_bar(parts, shown=self.progress, desc="features")
        if place()[0]:  # samples for the first process
            return {metric: {} for some in images for metric in metrics}
        shape = (count, *self.data.train.shape)
        others, sums = [metric for metric in metrics if metric != "fd"], {}
        if "fd" in metrics:
            sums["fd"] = distances.FeatureSums(self._network, shape)
        if others:
            sums["inception"] = inception.feature_sums(self._inception, shape, others)
        for some in images:
            for each in sums.values():
                each.add(some)
        found = {}
        if "fd" in metrics:
            found["fd"] = distances.frechet_report(sums["fd"].statistics(), self._statistics)
            network = self._network
            if isinstance(network, classifier.ClassifierFeatures) and network.accuracy is not None:
                found["fd"]["classifier_accuracy"] = network.accuracy
                found["fd"]["classes"] = self.data.train.classes
        if others:
            own, size = sums["inception"].statistics(), min(1000, count, self._shape[0])
            kid = {"kid_subsets": 100, "kid_subset_size": size}
            report = inception.report(own, self._reference, self._inception, others, kid)
            found |= dict.fromkeys(others, report)
        return found

    def _filled(
        self, file: Path, metrics: Iterable[str], measure: _Measure, model: str, **own: Any
    ) -> list[Result]:
        """Results from a file; those it lacks are measured and added. ``own`` are common fields."""
        if place()[0]:
            with suppress(*_FAILURES):
                if names := of_each(None)[0]:
                    measure(names)
            return []
        found = results.read_results(file, model)
        own = {"model": model, "sampler": {}, **own}
        wanted = [Result(metric=name, against=self._against(name), **own) for name in metrics]
        new = [one for one in wanted if one.key not in found]
        missing = [dataclasses.replace(one, **self._conditions(one.metric)) for one in new]
        of_each([one.metric for one in missing])
        if missing:
            # Before any sampling.
            results.check_comparable([*found.values(), *missing], file)
            try:
                reports, cost = measure([one.metric for one in missing])
            except _FAILURES as error:
                made = [dataclasses.replace(one, failed=str(error)) for one in missing]
            else:
                made = [_reported(one, reports[one.metric], cost) for one in missing]
            results.add_results(file, made)
            found |= {one.key: one for one in made}
        return [found[one.key] for one in wanted]

    def _against(self, metric: str) -> str:
        """Name of what a metric compares with."""
        if metric == "bpd":
            return distances.images_sha256(self._likelihood_images)[:16]
        features = self._inception.sha256[:8] if metric != "fd" else self._kind
        if ":" in features:  # a function that knows its version by its name
            features = distances.feature_name(self._network)
        return f"{features} {self.part}"

    def _conditions(self, metric: str) -> dict[str, Any]:
        """Features and reference that results of a metric share, and the origin of the result."""
        found: dict[str, Any] = {"origin": results.origin(self.device)}
        if metric == "bpd":
            return found
        name = self._inception.sha256 if metric != "fd" else distances.feature_name(self._network)
        # The Inception score takes no reference.
        return found | {"features": name, "reference": "" if metric == "isc" else self._sha256}

    def _of_seeds(
        self,
        sampler: Callable[[], ImageSampler],
        seeds: range,
        name: tuple[str, str],
        metrics: list[str],
    ) -> tuple[Reports, dict[str, float]]:
        """Reports of metrics of sampled images, and the cost of the images."""
        evaluations, seconds = [], [0.0]

        def batches() -> Iterator[Tensor]:
            began = time.monotonic()
            for some, drawn in shared(sampler(), seeds):
                self.bar.update(len(some))
                if some == [*range(self.first_seed, self.first_seed + len(some))]:
                    self.first_images[name] = drawn.images
                seconds.append(time.monotonic() - began)
                evaluations.append(drawn.evaluations.double())
                yield measured(drawn.images, drawn.levels)
                began = time.monotonic()

        found = self.measure(batches(), metrics, len(seeds))
        return found, {"nfe": float(torch.cat(evaluations).mean()), "seconds": sum(seconds)}

    def _bits(self, model: ImageModel) -> dict[str, Any]:
        if place()[0]:
            return {}
        if model.t_min is None:
            raise likelihoods.UndefinedLikelihoodError("bpd needs a run under its own process")
        if model.space.always_classes:
            msg = "bpd needs a network that was trained without classes, too"
            raise likelihoods.UndefinedLikelihoodError(msg)
        names = ("batch", "device", "progress")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options |= {"levels": self.data.train.levels, "t_min": model.t_min}
        if model.vae is not None:
            assert isinstance(model, TrainedModel)
            return likelihoods.latent_likelihood(model.model, self._likelihood_images, **options)
        scale: Literal["bins", "ends"] = "bins" if model.space.dequantised else "ends"
        return likelihoods.likelihood(model.score, self._likelihood_images, scale=scale, **options)

    @cached_property
    def bar(self) -> Any:
        """Progress of `of_run`, in sampled images."""
        return progress_bar(None, shown=self.progress, desc="evaluation", unit="image")

    @cached_property
    def first_images(self) -> dict[tuple[str, str], Tensor]:
        """First batch of images of digests and recipes that were measured."""
        return {}

    @property
    def _kind(self) -> str:
        """Name of the features of ``fd``."""
        unlabelled = self.features == "classifier" and self.data.train.labels is None
        return "random" if unlabelled else self.features

    @property
    def _measures(self) -> list[str]:
        """Metrics of samples."""
        return [metric for metric in self.metrics if metric != "bpd"]

    @property
    def _inception_metrics(self) -> set[str]:
        return {"fid", "kid", "isc", "prc"} & {*self.metrics}

    @property
    def _images(self) -> Images:
        """The part to compare with."""
        found: Images = getattr(self.data, self.part)
        return found

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self._images), *self._images.shape)

    def _batches(self) -> Iterator[Tensor]:
        """The part to compare with as bytes, batch by batch."""
        with progress_bar(None, shown=self.progress, total=self._shape[0], desc="features") as bar:
            for some in measured_batches(self._images):
                yield some
                bar.update(len(some))

    @cached_property
    def _sha256(self) -> str:
        return distances.images_sha256(measured_batches(self._images), self._shape)

    @cached_property
    def _statistics(self) -> distances.FeatureStatistics:
        """Statistics in the features of ``fd``."""
        return distances.FeatureSums(self._network, self._shape).of(self._batches())

    @cached_property
    def _reference(self) -> distances.FeatureStatistics:
        """Statistics in the features of Inception."""
        known = self._shape, self._sha256, self._inception, self._inception_metrics
        return inception.reference_statistics(self._batches(), *known, self.folder / _CACHE)

    @cached_property
    def _network(self) -> distances.FeatureNetwork:
        """The features of ``fd``; their classifier is trained if there is none yet."""
        if self._kind == "random":
            return classifier.random_features(self.data.train.shape[0], self.device)
        if self._kind != "classifier":
            return distances.load_features(self._kind)
        file = self.folder / classifier.CLASSIFIER
        return classifier.kept_classifier(
            file, self.data, device=self.device, progress=self.progress
        )

    @cached_property
    def _inception(self) -> inception.InceptionFeatures:
        assert self.weights is not None
        return inception.InceptionFeatures(self.weights, self.device)

    @property
    def _likelihood_images(self) -> Tensor:
        images = self.data.held_out
        assert images is not None
        return images.load(torch.arange(min(len(images), self.likelihood_images), device="cpu"))


def _reported(wanted: Result, report: dict[str, Any], cost: dict[str, float]) -> Result:
    metric = wanted.metric
    if metric in {"fd", "bpd"}:
        numbers = {metric: report["frechet_distance" if metric == "fd" else "bits_per_dim"]}
    else:
        names = ("precision", "recall") if metric == "prc" else (metric,)
        numbers = {name: report["metrics"][name]["value"] for name in names}
    return dataclasses.replace(wanted, numbers=numbers, about=report, **cost)  # type: ignore[arg-type]
