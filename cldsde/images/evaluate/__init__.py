"""Quality of samples and models: Fréchet distances, Inception metrics, likelihoods.

Results are dictionaries of JSON types, with everything that the numbers depend on.
"""

from cldsde.images.evaluate.classifier import ClassifierFeatures, train_classifier
from cldsde.images.evaluate.distances import FeatureStatistics, frechet, frechet_of, load_features
from cldsde.images.evaluate.inception import inception_metrics
from cldsde.images.evaluate.likelihoods import likelihood

__all__ = [
    "ClassifierFeatures",
    "FeatureStatistics",
    "frechet",
    "frechet_of",
    "inception_metrics",
    "likelihood",
    "load_features",
    "train_classifier",
]
