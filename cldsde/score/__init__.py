"""Scores: exact ones of Gaussian mixtures, learnt ones, and the reverse process they define."""

from cldsde.score.mixed import MixedScore, hybrid_score_matching
from cldsde.score.mixture import GaussianMixture
from cldsde.score.recovery import DataPrediction
from cldsde.score.reverse import ReverseProcess, Score, TabulatedScore

__all__ = [
    "DataPrediction",
    "GaussianMixture",
    "MixedScore",
    "ReverseProcess",
    "Score",
    "TabulatedScore",
    "hybrid_score_matching",
]
