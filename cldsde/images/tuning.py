"""Fit samplers of few evaluations to an image model, and measure them with new seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.errors import require
from cldsde.images.data import ArrayImages, DataSet, Images, to_levels
from cldsde.images.data.pixels import measured, measured_batches
from cldsde.images.evaluate.classifier import kept_classifier, random_features
from cldsde.images.evaluate.distances import (
    FeatureNetwork,
    FeatureSums,
    check_features,
    frechet_of,
    load_features,
)
from cldsde.images.model import ImageModel
from cldsde.progress import progress_bar
from cldsde.score import ConditionalScore, ReverseProcess, Score
from cldsde.solvers import SamplerSettings, recommend, sample
from cldsde.solvers.fitting import Distance, Search, fewest_tries, import_cma

SETS = 20  #: Sets of new images for the report.
_SEARCHED = 2  # networks in whose features the search minimises distances; the report has one more
_REFERENCE, _MANY = 2000, 50  # images of the network itself, and evaluations of each


class Measured(NamedTuple):
    """Fréchet distances of sets of images of the default and of the fitted settings."""

    default: Tensor
    fitted: Tensor

    @property
    def gain(self) -> tuple[float, float]:
        """Mean of default − fitted and its standard error, of pairs with the same seeds."""
        return _mean(self.default - self.fitted)

    def __str__(self) -> str:
        columns = _mean(self.default), _mean(self.fitted), self.gain
        texts = (f"{mean:.3f} ± {error:.3f}" for mean, error in columns)
        return "default {}, fitted {}, gain {}".format(*texts)


def _geometric_mean(distances: Sequence[float]) -> float:
    # Rounding may make a distance of equal sets negative.
    return math.prod(max(0.0, x) for x in distances) ** (1 / len(distances))


def _mean(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))


@dataclass(frozen=True, eq=False)
class Tuning:
    """Fits of samplers to one image model.

    The search minimises the geometric mean of the Fréchet distances in features of two networks,
    because settings that were fitted to one network made the images worse in others. ``features``
    names the first; the second has random weights, and so has a third network in the report.
    """

    model: ImageModel
    data: DataSet | None  # to compare with; None: images of the model, with 50 evaluations
    classifier: Path  # is trained and kept there if it is missing
    features: str = "classifier"
    images: int = 500  # of a try, and of each set of the report
    seed: int = 0  # of the search
    device: str = "cpu"  # of the features' networks

    def check(self, nfe: int, tries: int) -> None:
        """Raise an error if nothing can be fitted, before any work is done."""
        require(nfe >= 2, "nfe", f"must be at least 2; got {nfe}")
        require(self.images >= 2, "images", f"must be at least 2; got {self.images}")
        levels = recommend(self.process, nfe, shape=self.shape[1:]).kappa
        least = fewest_tries(len(levels))
        msg = f"must be at least {least} for {nfe} evaluations; got {tries}"
        require(tries >= least, "tries", msg)
        import_cma()
        if self.features not in {"classifier", "random"}:
            two = torch.zeros(2, *self.shape[1:], device=self.device)
            check_features(load_features(self.features), self._pixels(two))

    def search(self, nfe: int, tries: int) -> Search:
        """The search for settings with ``nfe`` evaluations; see `cldsde.solvers.fit_sampler`."""
        searched = [*self._distances.values()][:_SEARCHED]

        def distance(data: Tensor) -> float:
            images = self._pixels(data)
            return _geometric_mean([of(images) for of in searched])

        name = self.model.digest[:16]
        return Search(
            self.process, self.shape[1:], nfe, self.images, distance, self.seed, name, most=tries
        )

    def report(self, settings: SamplerSettings, nfe: int) -> Mapping[str, Measured]:
        """The mean that the search minimises, and distances by features, for new seeds."""
        names = ("geometric mean of the next two", *self._distances)
        found = torch.zeros(len(names), 2, SETS, dtype=torch.float64, device="cpu")
        for k in progress_bar(range(SETS), shown=True, desc="new images", unit="set"):
            for i, how in enumerate((None, settings)):
                images = self._pixels(self._draw(self.seed + 100 + k, nfe, how))
                distances = [distance(images) for distance in self._distances.values()]
                both = _geometric_mean(distances[:_SEARCHED])
                found[:, i, k] = found.new_tensor([both, *distances])
        return {name: Measured(*pair) for name, pair in zip(names, found, strict=True)}

    @cached_property
    def process(self) -> ReverseProcess:
        """The reverse process; image i has class i modulo their number if the network needs one."""
        score: Score = self.model.score
        if self.model.space.always_classes:
            assert self.model.space.classes is not None
            labels = torch.arange(self.images, device=score.device) % self.model.space.classes
            score = ConditionalScore(score, condition=labels)
        return ReverseProcess(self.model.score.sde, score)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the samples of a try."""
        return (self.images, *self.model.data_shape)

    @cached_property
    def _distances(self) -> Mapping[str, Distance]:
        """Distances of images to the data, by features; the search minimises the first two."""
        reference = self._own() if self.data is None else self.data.train
        name, labels = self.features, reference.labels
        networks: dict[str, FeatureNetwork] = {}
        if name == "classifier" and self.data is not None and labels is not None:
            kept = kept_classifier(self.classifier, self.data, device=self.device)
            networks["the classifier's features"] = kept
        elif name not in {"classifier", "random"}:
            networks[name] = load_features(name)
        for seed in range(_SEARCHED + 1 - len(networks)):
            random = random_features(reference.shape[0], self.device, seed)
            networks[f"random features {seed}"] = random
        return {name: self._distance(network, reference) for name, network in networks.items()}

    def _distance(self, network: FeatureNetwork, reference: Images) -> Distance:
        bar = progress_bar(measured_batches(reference), shown=True, desc="features", unit="batch")
        known = FeatureSums(network, (len(reference), *reference.shape)).of(bar)

        def distance(images: Tensor) -> float:
            sums = FeatureSums(network, images.shape)
            return frechet_of(sums.of(torch.split(images, 256)), known)

        return distance

    def _own(self) -> ArrayImages:
        """Images of the model itself, with seeds that nothing else uses."""
        seeds = range(2**32, 2**32 + math.ceil(_REFERENCE / self.images))
        bar = progress_bar(seeds, shown=True, desc="reference", unit="set")
        found = torch.cat([self._levels(self._draw(seed, _MANY)) for seed in bar])
        return ArrayImages(found, levels=self.model.space.levels)

    def _draw(self, seed: int, nfe: int, settings: SamplerSettings | None = None) -> Tensor:
        sde, score = self.process.sde, self.process.score
        return sample(sde, score, self.shape, nfe=nfe, seed=seed, settings=settings)

    def _levels(self, data: Tensor) -> Tensor:
        """Samples as images ``(B, C, H, W)``."""
        space, vae = self.model.space, self.model.vae
        if vae is not None:
            data = torch.cat([vae.images(part) for part in torch.split(data, 64)])
        return to_levels(data.cpu(), space.levels, dequantised=space.dequantised)

    def _pixels(self, data: Tensor) -> Tensor:
        """Samples as features take them."""
        return measured(self._levels(data), self.model.space.levels)
