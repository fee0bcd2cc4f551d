"""The images that samples are compared with, and the features in which they are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import InstanceOf
from torch import Tensor

from cldsde.images.data import DataSet, Images
from cldsde.images.data.samples import byte_batches
from cldsde.images.evaluate.classifier import kept_classifier
from cldsde.images.evaluate.distances import FeatureStatistics, FeatureSums, batches_sha256
from cldsde.images.evaluate.features import FeatureNetwork, load_features
from cldsde.images.evaluate.inception import InceptionFeatures, reference_statistics
from cldsde.images.schema import Count, section
from cldsde.progress import progress_bar

CLASSIFIER = "classifier.safetensors"
"""File of the classifier whose features a data set is compared in."""
CACHE = "inception"
"""Folder of what is kept of a data set in the features of Inception."""


@section
class Reference:
    """A data set to compare with, and the features to compare in; see `Evaluation`."""

    data: InstanceOf[DataSet]
    part: Literal["train", "held_out"] = "train"
    features: str = "classifier"
    weights: Path | None = None
    folder: Path
    likelihood_images: Count = 64
    device: str = "cpu"
    progress: bool = False

    @property
    def images(self) -> Images:
        """The part to compare with."""
        found: Images = getattr(self.data, self.part)
        return found

    @property
    def _likelihood_images(self) -> Tensor:
        images = self.data.held_out
        assert images is not None
        return images.load(torch.arange(min(len(images), self.likelihood_images)))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self.images), *self.images.shape)

    @cached_property
    def _sha256(self) -> str:
        return batches_sha256(byte_batches(self.images), self._shape)

    @cached_property
    def _network(self) -> FeatureNetwork:
        """The features of ``fd``; their classifier is trained if there is none yet."""
        if self.features != "classifier":
            return load_features(self.features)
        file = self.folder / CLASSIFIER
        return kept_classifier(file, self.data, device=self.device, progress=self.progress)

    @cached_property
    def _inception(self) -> InceptionFeatures:
        assert self.weights is not None
        return InceptionFeatures(self.weights, self.device)

    @cached_property
    def _statistics(self) -> FeatureStatistics:
        """Statistics in the features of ``fd``."""
        sums = FeatureSums(self._network, self._shape)
        for some in self._batches():
            sums.add(some)
        return sums.statistics()

    def _inception_statistics(self, metrics: Sequence[str]) -> FeatureStatistics:
        """Statistics in the features of Inception, kept in the folder."""
        known = self._shape, self._sha256, self._inception
        return reference_statistics(self._batches(), *known, metrics, self.folder / CACHE)

    def _batches(self) -> Iterator[Tensor]:
        """The part as bytes, batch by batch."""
        with progress_bar(None, shown=self.progress, total=self._shape[0], desc="features") as bar:
            for some in byte_batches(self.images):
                yield some
                bar.update(len(some))
