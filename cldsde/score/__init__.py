"""Scores, exact and learnt, their training, and the reverse process that they define."""

from cldsde.linear.paths import NoisePath
from cldsde.renamed import old_attributes
from cldsde.score.conversion import Conversion
from cldsde.score.denoiser_score import DenoiserScore, ScoreDenoiser
from cldsde.score.denoisers import Denoiser, PredictionDenoiser
from cldsde.score.flow_density import flow_log_prob
from cldsde.score.guidance import ConditionalScore, GuidedScore
from cldsde.score.likelihood import bits_per_dim, dequantise, log_likelihood
from cldsde.score.matching import PerturbedData, optimal_loss, score_matching_loss
from cldsde.score.mixed import MixedScore
from cldsde.score.mixture import GaussianMixture
from cldsde.score.observation import Observation
from cldsde.score.posterior_score import PosteriorScore
from cldsde.score.protocol import Score, ScoreFunction, ScoreWrapper
from cldsde.score.reverse import ReverseProcess
from cldsde.score.time_sampling import (
    TimeSampler,
    kappa_density,
    logit_normal_density,
    mode_density,
)
from cldsde.score.variational import cross_entropy, evidence_lower_bound

__all__ = [
    "ConditionalScore",
    "Conversion",
    "Denoiser",
    "DenoiserScore",
    "GaussianMixture",
    "GuidedScore",
    "MixedScore",
    "NoisePath",
    "Observation",
    "PerturbedData",
    "PosteriorScore",
    "PredictionDenoiser",
    "ReverseProcess",
    "Score",
    "ScoreDenoiser",
    "ScoreFunction",
    "ScoreWrapper",
    "TimeSampler",
    "bits_per_dim",
    "cross_entropy",
    "dequantise",
    "evidence_lower_bound",
    "flow_log_prob",
    "kappa_density",
    "log_likelihood",
    "logit_normal_density",
    "mode_density",
    "optimal_loss",
    "score_matching_loss",
]

__getattr__ = old_attributes(__name__, log_snr_density="kappa_density")
