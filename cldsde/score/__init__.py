"""Scores: exact ones of Gaussian mixtures, learnt ones, and the reverse process they define."""

from cldsde.score.mixed import MixedScore, hybrid_score_matching
from cldsde.score.mixture import GaussianMixture, MixtureScore
from cldsde.score.recovery import DataPrediction
from cldsde.score.reverse import ReverseProcess, Score, TabulatedScore
from cldsde.score.time_sampling import TimeSampler

__all__ = [
    "DataPrediction",
    "GaussianMixture",
    "MixedScore",
    "MixtureScore",
    "ReverseProcess",
    "Score",
    "TabulatedScore",
    "TimeSampler",
    "hybrid_score_matching",
]
