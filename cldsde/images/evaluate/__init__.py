"""Quality of samples and models: Fréchet distances, Inception metrics, likelihoods.

All functions take uint8 images ``(N, C, H, W)`` on the CPU. They return dictionaries of JSON types
with the numbers, their settings, hashes of images and weights, and versions.
"""

from cldsde.images.evaluate.classifier import ClassifierFeatures, train_classifier
from cldsde.images.evaluate.distances import (
    FeatureStatistics,
    frechet,
    frechet_distance,
    frechet_of,
    load_features,
)
from cldsde.images.evaluate.inception import inception_metrics
from cldsde.images.evaluate.likelihoods import likelihood

__all__ = [
    "ClassifierFeatures",
    "FeatureStatistics",
    "frechet",
    "frechet_distance",
    "frechet_of",
    "inception_metrics",
    "likelihood",
    "load_features",
    "train_classifier",
]
