"""The images that samples are compared with, and the features in which they are compared."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cldsde.errors import SettingError
from cldsde.files import file_lock
from cldsde.images.data import DataSet
from cldsde.images.data.samples import all_bytes, byte_batches
from cldsde.images.evaluate.classifier import (
    ClassifierFeatures,
    load_classifier,
    save_classifier,
    train_classifier,
)
from cldsde.images.evaluate.distances import (
    FeatureStatistics,
    FeatureSums,
    batches_sha256,
    images_sha256,
)
from cldsde.images.evaluate.features import FeatureNetwork, load_features
from cldsde.images.evaluate.inception import InceptionFeatures
from cldsde.images.tensor_files import load_tensors, save_tensors, tensors_digest
from cldsde.progress import progress_bar

CLASSIFIER = "classifier.safetensors"
"""File of the classifier whose features a data set is compared in."""
CACHE = "inception"
"""Folder of what is kept of a data set in the features of Inception."""
_TRAINED_ON = 150_000  # images that a classifier is trained on at least, repetitions counted
_KIND = "feature statistics of cldsde"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A data set to compare with, and the features to compare in; see `Evaluation`."""

    data: DataSet
    part: Literal["train", "held_out"] = "train"
    features: str = "classifier"
    likelihood_images: int = 64
    folder: Path
    weights: Path | None = None
    device: str = "cpu"
    progress: bool = False

    @property
    def _likelihood_images(self) -> Tensor:
        images = self.data.held_out
        if images is None:
            raise SettingError("metrics", "bpd needs held-out images; the data set has none")
        return images.load(torch.arange(min(len(images), self.likelihood_images)))

    @cached_property
    def _likelihood_sha256(self) -> str:
        return images_sha256(self._likelihood_images)

    @cached_property
    def _reference(self) -> Tensor:
        return all_bytes(getattr(self.data, self.part))

    @cached_property
    def _reference_sha256(self) -> str:
        images = getattr(self.data, self.part)
        return batches_sha256(byte_batches(images), (len(images), *images.shape))

    @cached_property
    def _reference_statistics(self) -> FeatureStatistics:
        return self._statistics(self._network)

    def _statistics(self, features: FeatureNetwork) -> FeatureStatistics:
        """Statistics of the part, without keeping its images."""
        images = getattr(self.data, self.part)
        sums = FeatureSums(features, (len(images), *images.shape))
        with progress_bar(None, shown=self.progress, total=len(images), desc="features") as bar:
            for some in byte_batches(images):
                sums.add(some)
                bar.update(len(some))
        return sums.statistics()

    @cached_property
    def _inception(self) -> InceptionFeatures:
        assert self.weights is not None
        return InceptionFeatures(self.weights, self.device)

    @cached_property
    def _inception_statistics(self) -> FeatureStatistics:
        """Statistics in the features of Inception, kept in the folder."""
        data, features = self._reference_sha256, self._inception
        file = self.folder / CACHE / f"{data[:32]}-{features.sha256[:32]}.safetensors"
        with suppress(ValueError, FileNotFoundError):  # damaged or missing: made again
            found, _ = load_tensors(file, _KIND)
            sizes = found["mean"], found["covariance"], len(getattr(self.data, self.part))
            return FeatureStatistics(*sizes, features.name, data)
        made = self._statistics(features)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, _KIND, {"mean": made.mean, "covariance": made.covariance}, {})
        return made

    @cached_property
    def _training_images(self) -> Tensor:
        return self._reference if self.part == "train" else all_bytes(self.data.train)

    @cached_property
    def _network(self) -> FeatureNetwork:
        if self.features != "classifier":
            return load_features(self.features)
        file = self.folder / CLASSIFIER
        if file.exists():
            return self._kept_classifier(file)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of two evaluations at the same time one trains the classifier for both.
        with file_lock(file, wait=True):
            return self._kept_classifier(file) if file.exists() else self._new_classifier(file)

    def _kept_classifier(self, file: Path) -> FeatureNetwork:
        try:
            classifier, notes = load_classifier(file, device=self.device)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to have it made again") from error
        if not self._origin_of_classifier.items() <= notes.items():
            msg = f"{file} was trained on other images or classes; delete it, or move it away"
            raise ValueError(msg)
        return ClassifierFeatures(classifier, device=self.device)

    def _new_classifier(self, file: Path) -> FeatureNetwork:
        images, labels = self._training_images, self.data.train.labels
        held_out = self.data.held_out or self.data.train
        assert labels is not None
        assert held_out.labels is not None
        classifier, accuracy = train_classifier(
            *(images, labels, all_bytes(held_out), held_out.labels),
            epochs=max(3, round(_TRAINED_ON / len(images))),
            device=self.device,
            progress=self.progress,
        )
        notes = {**self._origin_of_classifier, "held_out_accuracy": f"{accuracy:.4f}"}
        save_classifier(classifier, file, metadata=notes)
        return ClassifierFeatures(classifier, device=self.device)

    @property
    def _origin_of_classifier(self) -> dict[str, str]:
        labels = self.data.train.labels
        assert labels is not None
        return {
            "images_sha256": images_sha256(self._training_images),
            "labels_sha256": tensors_digest({"labels": labels}),
        }
