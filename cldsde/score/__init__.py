"""Scores: exact ones of Gaussian mixtures, learnt ones, and the reverse process they define."""

from cldsde.score.conversion import Conversion
from cldsde.score.matching import PerturbedData, optimal_loss, score_matching_loss
from cldsde.score.mixed import MixedScore
from cldsde.score.mixture import GaussianMixture, MixtureScore
from cldsde.score.reverse import ReverseProcess, Score, TabulatedScore
from cldsde.score.time_sampling import TimeSampler

__all__ = [
    "Conversion",
    "GaussianMixture",
    "MixedScore",
    "MixtureScore",
    "PerturbedData",
    "ReverseProcess",
    "Score",
    "TabulatedScore",
    "TimeSampler",
    "optimal_loss",
    "score_matching_loss",
]
