"""Arguments that functions of scores reject, before a score is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    DenoiserScore,
    GaussianMixture,
    GuidedScore,
    LinearSDE,
    MixedScore,
    NoisePath,
    PredictionDenoiser,
    RectifiedFlow,
    ReverseProcess,
)
from cldsde.linear import Gaussian
from cldsde.score import (
    Conversion,
    Observation,
    PerturbedData,
    PosteriorScore,
    ScoreDenoiser,
    TimeSampler,
    bits_per_dim,
    cross_entropy,
    dequantise,
    evidence_lower_bound,
    flow_log_prob,
    log_likelihood,
    log_snr_density,
    logit_normal_density,
    mode_density,
    optimal_loss,
    score_matching_loss,
)
from cldsde.score.adapters import as_torchdiffeq, as_torchsde
from probes import untouchable
from references import wide_mixture
from score.cases import Constant, at_a_known_time, mixture

NAN, INF = math.nan, math.inf
ONES, ZEROS = torch.ones, torch.zeros
Z, X = ZEROS(2, 2, 2), ZEROS(2, 2)
DOUBLE = ONES(2, dtype=torch.float64)
SDES, CRITICAL, VP, FLOW = [CLD, None, "CLD"], CLD(), VPSDE(), RectifiedFlow()
Call = Callable[..., Any]


def each(calls: Call | list[Call], message: str, error: Any = ValueError, **values: Any) -> Any:
    """Rows (call, error, message): one for each call and each value of the only argument."""
    ((name, given),) = values.items()
    calls = calls if isinstance(calls, list) else [calls]
    return [(partial(f, **{name: value}), error, message) for value in given for f in calls]


def types(calls: Call | list[Call], message: str, **values: Any) -> Any:
    return each(calls, message, TypeError, **values)


# The functions with arguments that they accept.
PROCESS = ReverseProcess(CRITICAL, untouchable)
DRAWN = partial(PerturbedData.draw, sde=CRITICAL, x0=X, t=0.5)
PAIR = PerturbedData.draw(CRITICAL, ZEROS(4, 2), 0.5)
LOSS = partial(PAIR.loss, output=PAIR.noise)
PREDICTED = [partial(LOSS, prediction=kind) for kind in ("score", "noise", "data")]
LEAST = partial(optimal_loss, sde=CRITICAL, t=0.5)
CONVERTED = partial(Conversion.at, sde=CRITICAL, t=0.5, source="score", target="noise")
FORGOTTEN = partial(CONVERTED, sde=VPSDE(0.1, 2000.0), t=1.0, target="data")  # psi = exp(-500)
IMPORTANCE = partial(TimeSampler.importance, sde=CRITICAL, t_min=1e-3)
SAMPLER = partial(TimeSampler, density=torch.ones_like, t_min=1e-3)
LEVELS, LOGITS = partial(log_snr_density, CRITICAL), logit_normal_density
BOUND = partial(evidence_lower_bound, model=untouchable, sde=CRITICAL, x0=X, t=0.5, t_min=0.1)
FLOW_DENSITY = partial(flow_log_prob, process=PROCESS, z=Z, t=0.1)
LIKELIHOOD = partial(log_likelihood, process=PROCESS, x0=X, t_min=0.1)
WEIGHTED = partial(LIKELIHOOD, importance_weighted=True)
DENSITIES = [FLOW_DENSITY, LIKELIHOOD]
REVERSE = partial(ReverseProcess, sde=CRITICAL, score=untouchable)
DRIFTS = [
    partial(f, z=Z, t=0.5)
    for f in (PROCESS.drift, PROCESS.probability_flow, PROCESS.data_prediction, PROCESS.full_score)
]
NOISES = [partial(PROCESS.drift, Z, 0.5), partial(PROCESS.diffusion, 0.5)]
BITS = partial(bits_per_dim, ZEROS(1), dimension=1)
LEVEL_0 = partial(dequantise, torch.tensor([0]))
NO_DENSITY = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])

# Mixtures.
MIXTURE = partial(GaussianMixture, weights=[1.0], means=[[0.0]], covariances=ONES(1, 1, 1))
PLANE = partial(GaussianMixture, weights=[1.0], means=[[0.0, 0.0]])
POINTS = mixture("points")
SCORE = POINTS.score(CRITICAL)
METHODS = [POINTS.log_prob, POINTS.conditional_log_prob, POINTS.posterior_mean]
AT_STATES = [
    lambda z=Z, t=0.5, f=f: f(z, t) for f in (SCORE, *(partial(f, CLD()) for f in METHODS))
]
SINGULAR = partial(POINTS.conditional_log_prob, VP, Z[:, :1])

# Mixed scores.
MIXED = partial(MixedScore, Constant(CRITICAL), CRITICAL, data_mean=0.0, data_variance=1.0)
OF_ESTIMATE = partial(MIXED, inputs="estimate")
EVALUATED = partial(MIXED(), z=Z, t=0.5)
PER_PIXEL = MixedScore(Constant(CRITICAL), CRITICAL, ZEROS(2, 3, 3), ONES(2, 3, 3))
TINY = torch.tensor(1e-50, dtype=torch.float64)


class Returning(nn.Module):
    """A network whose output has a shape of its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return ZEROS(self.shape)


def returned(shape: tuple[int, ...]) -> Any:
    return MixedScore(Returning(shape), CRITICAL, 0.0, 1.0)(ZEROS(3, 2, 2, 3, 3), 0.5)


def weighted(logits: tuple[int, ...], z: tuple[int, ...] = (3, 2, 2, 3, 3)) -> Any:
    return MIXED(mixing_logits=ZEROS(logits))(ZEROS(z), 0.5)


def entropy(conditioning: Any = "data", losses: Any = X[:, 0], **options: Any) -> Any:
    equilibrium, t = CLD(velocity_scale=1.0), torch.tensor([0.1, 0.5], dtype=torch.float64)
    pair = PerturbedData.draw(equilibrium, ZEROS(2, 1), t, conditioning=conditioning)
    return cross_entropy(pair, losses, **{"t_min": 1e-3, **options})


# Denoisers and guidance.
def denoise(u: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return u


def wrong_shape(shape: tuple[int, ...]) -> Any:
    return DenoiserScore(lambda u, sigma: ZEROS(shape), VP)(ZEROS(4, 1, 2), 0.5)


def wrong_output(shape: tuple[int, ...]) -> Any:
    return PredictionDenoiser(lambda x, t: ZEROS(shape), NoisePath.linear())(ZEROS(4, 2), 1.0)


TABLE = torch.linspace(0.9999, 1e-4, 1000, dtype=torch.float64)
PREDICTION = partial(PredictionDenoiser, denoise, path=NoisePath.linear())
PATH = partial(NoisePath, noise=lambda t: t)
TABULATED = partial(PREDICTION(path=NoisePath.from_alphas_cumprod(TABLE)), X)
FALLING = partial(NoisePath, lambda t: 1 - t)
ALPHAS = NoisePath.from_alphas_cumprod
DENOISER = partial(DenoiserScore, denoise, sde=VP)
GUIDED = partial(GuidedScore, conditional=DENOISER(), unconditional=DENOISER(), weight=2.0)
PLAIN = partial(GuidedScore, untouchable, untouchable, 2.0)
TORCHSDE = partial(as_torchsde, process=CRITICAL, shape=(3,))
OTHER = DenoiserScore(denoise, VPSDE(beta_max=10.0))

# Observations.
DATA, SEEN = wide_mixture()
MASK = torch.tensor([True, True])
GIVEN = partial(Observation, abs, y=ONES(2), noise_std=0.1)
MASKED = partial(Observation.mask, mask=MASK, y=ONES(2), noise_std=0.1)
MATRIX = partial(Observation.matrix, y=ONES(1), noise_std=0.1)
MEANS = partial(Observation.downsample, factor=2, y=ONES(1, 2), noise_std=0.1)
BLUR = partial(Observation.blur, kernel=ONES(3, 3), y=ONES(1, 4, 4), noise_std=0.1)
CONDITION = GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)[None]).condition
POSTERIOR = partial(PosteriorScore, DATA.score(CRITICAL), observation=SEEN)
LEAF = ZEROS(2, 2, 8, dtype=torch.float64, requires_grad=True)
DPS = partial(POSTERIOR, method="dps")
ANY_SCORE = partial(PosteriorScore, observation=SEEN)


def observed(forward: Any, y: Any = DOUBLE) -> Any:
    return PosteriorScore(untouchable, Observation(forward, y, 0.1), sde=VP)(ZEROS(2, 1, 2), 0.5)


# Predictions that need one component, and singular ends.
GIVEN_ALL = PerturbedData.draw(VESDE(), ZEROS(2, 1), 0.5, conditioning="all")
END = PerturbedData.draw(FLOW, ONES(2, 1), 1.0)
AT_THE_END = partial(Conversion.at, FLOW, 1.0, "score")
ENDED = partial(END.loss, END.noise)
BOTH = ["velocity", "flow"]

UNKNOWN = ["speed", None, 1]
UNEVEN = [0.0, torch.tensor([0.5, 0.0])]
STARTS = [VP, CLD(), PSLD(), HOLD()]
WEIGHTS: list[Any] = [lambda t, f=f: f * t for f in (0, -1, NAN, INF)]
WEIGHTS += [lambda t: t - 0.5, lambda t: t.sum(), lambda t: t[1:], lambda t: 1.0]
OUTPUTS = [(4, 2, 2), (1, 1, 2), (4, 1), (4, 1, 1), (4,), (4, 1, 2, 1)]  # must not broadcast
RESTING = LinearSDE.from_matrices(
    [[-1.0, 1.0, 0.0], [-1.0, -1.0, 1.0], [0.0, -1.0, -1.0]],
    [[1.0], [1.0], [1.0]],
    initial_covariance=[[0, 0, 0], [0, 1.0, 0], [0, 0, 0]],
)
AT_REST = [
    ReverseProcess(sde, untouchable)
    for sde in (CLD(velocity_scale=0.0), HOLD(auxiliary_scale=0.0), RESTING)
]
NO_GENERATOR: list[Call] = [
    POINTS.sample,
    SAMPLER().sample,
    lambda n, generator: dequantise(torch.zeros(n, dtype=torch.long), generator=generator),
    lambda n, generator: score_matching_loss(untouchable, VP, X, 0.5, generator=generator),
    lambda n, generator: BOUND(generator=generator),
    lambda n, generator: FLOW_DENSITY(generator=generator),
    lambda n, generator: LIKELIHOOD(generator=generator),
]

SHARED = [
    *types([DRAWN, LEAST, CONVERTED, IMPORTANCE, BOUND, REVERSE], "sde must be a Lin", sde=SDES),
    *each([DRAWN, LEAST, CONVERTED, BOUND, *DRIFTS, *AT_STATES], "^t must", t=[-0.1, 1.1, NAN]),
    *each([DRAWN, LEAST, *DRIFTS[2:], *AT_STATES], "no density at t = 0|lie in", t=UNEVEN),
    *each([DRAWN, BOUND, *DRIFTS, *AT_STATES], "^t must", t=[ONES(3) / 2]),
    *types([LEAST, *DRIFTS], "^t", t=["0.5"]),
    *each([DRAWN, LEAST, CONVERTED], "conditioning must be one of", conditioning=UNKNOWN),
    *each([LEAST, BOUND, IMPORTANCE], "data_variance must be fin", data_variance=[0, -1.0, INF]),
    *types([DRAWN, LIKELIHOOD, BOUND], "floating-point", x0=[X.long(), X[0, 0], None, [[0.0]]]),
    *types([FLOW_DENSITY, *DRIFTS, *AT_STATES], "floating-point", z=[Z.long(), None, [[0.0]]]),
    *each([FLOW_DENSITY, *DRIFTS], "must", z=map(ZEROS, [(2, 3, 1), (2, 1, 2), (2,)])),
    *each(AT_STATES, "got", z=map(ZEROS, [(3, 1, 2), (3, 3, 2), (3, 2, 1), (3, 2, 2, 2), (2,)])),
    *types([partial(f, 4) for f in NO_GENERATOR], r"torch\.Generator.* got 3\.", generator=[3]),
]
TRAINING = [
    *each(PAIR.target, "prediction must be one of", prediction=[*UNKNOWN, "full_score"]),
    *each(LOSS, "prediction must be one of", prediction=UNKNOWN),
    *each(LOSS, "measured must be one of", measured=["data"]),
    *types(LOSS, "output must be a tensor", output=[[1.0]]),
    *types([LEAST, LOSS, IMPORTANCE], "weighting must be", weighting=["uniform", None, 1.0]),
    *each(LOSS, "one number for each time", weighting=[lambda t: t[1:], torch.sum]),
    *each(PREDICTED, r"must be a prediction of the \w* of shape", output=map(ZEROS, OUTPUTS)),
    *each(SAMPLER, "t_min must lie in", t_min=[0.0, -1e-3, 0.6, 1.0, NAN]),
    *each(SAMPLER, "one finite, positive value per time", density=WEIGHTS),
    *each(SAMPLER().quantiles, r"u must lie in \[0, 1\]", u=[DOUBLE * u for u in (-0.1, 1.1, NAN)]),
    *each(IMPORTANCE, "one finite, positive value per time", weighting=WEIGHTS[:3]),
    *each(IMPORTANCE, "conditioning", conditioning=["velocity"]),
    *each([LEVELS, LOGITS], "mean must be finite", mean=[NAN, INF]),
    *each([LEVELS, LOGITS], "std must be finite and positive", std=[0.0, -1.0]),
    *each(mode_density, "scale must lie in", scale=[2.0]),
    *each([entropy, BOUND], "t_min must lie in", t_min=[0.0, 1.0, -0.1]),
    *each(entropy, "t must lie in", t_min=[0.2]),
    *each(BOUND, "t must lie in", t=[0.05, torch.tensor([0.5, 0.05])]),
    *each(entropy, "conditioned on the data", conditioning=["all"]),
    *each(entropy, "of must be", of=["velocity"]),
    *each(entropy, "losses must have shape", losses=map(ZEROS, [(3,), (2, 1)])),
    *each([entropy, BOUND], "weight must", weight=map(ONES, [(3,), (2, 1), (1, 2)])),
    *each(entropy, r"2 components.*got \(\d, \d\)", prior=[Gaussian(torch.eye(3).double())]),
    *each(BOUND, "prediction must be one of", prediction=["speed"]),
    *each(BOUND, "prediction of the score of shape", model=[lambda z, t: z]),
    *each(BOUND, "data_variance must be given with data_mean", data_mean=[0.3]),
    *each(partial(BOUND, data_variance=1.0), "data_mean must broadcast", data_mean=[ZEROS(3)]),
    *each(partial(BOUND, model=lambda z, t: -z[:, 1:]), "no density", sde=[NO_DENSITY]),
    *types(dequantise, "levels must be a tensor of integers", levels=[X, X.cfloat(), [1], None]),
    *each(dequantise, "levels must lie in 0 … 255; got", levels=map(torch.tensor, ([256], [-1]))),
    *each(LEVEL_0, "count must be", count=[1]),
    *each(LEVEL_0, "low must be below high", low=[1.0, 2.0, -INF, NAN]),
    *each(LEVEL_0, "low must be below high", high=[-1.0, INF, NAN]),
    *each(BITS, "dimension", dimension=[0, -1]),
    *each(BITS, "bin_width", bin_width=[0.0, -1.0, INF]),
]
LIKELIHOODS = [
    *each(DENSITIES, "rtol must be", rtol=[0.0]),
    *each(DENSITIES, "atol must be", atol=[NAN]),
    *each(DENSITIES, "divergence must be one of 'exact', 'hutchinson'", divergence=["skilling"]),
    *each(DENSITIES, "method must be one of 'dopri5'", method=["rk4"]),
    *each(DENSITIES, "max_nfev", max_nfev=[0]),
    *types(DENSITIES, "process must be a ReverseProcess; got", process=[None]),
    *each(FLOW_DENSITY, "t must lie in", t=[-0.1, 1.0, NAN]),
    *each(LIKELIHOOD, "t_min must lie in", t_min=[0.0, 1.0, NAN]),
    *each(FLOW_DENSITY, "z must be finite", z=[Z + NAN, Z - INF]),
    *each(LIKELIHOOD, "must be finite", x0=[X + NAN, X - INF]),
    *each(LIKELIHOOD, "at least one number per data point", x0=[X[:, :0]]),
    *each(LIKELIHOOD, "start must be one of 'perturb', 'replace'", start=["both"]),
    *each(LIKELIHOOD, "samples must be", samples=[0, True, 1.0]),
    *each(WEIGHTED, "divergence must be 'exact' with imp", divergence=["hutchinson"]),
    *each(partial(LIKELIHOOD, start="replace"), "needs auxiliary", process=AT_REST),
]
SCORES = [
    *types(REVERSE, "score must be a callable", score=[None, 1.0, ZEROS(2)]),
    *each(REVERSE, "belongs to another process", score=[POINTS.score(CLD(friction=2.0))]),
    *each(NOISES, "stochasticity must be finite and at least 0", stochasticity=[-0.1, NAN, INF]),
    *types(NOISES, "stochasticity must be a real number", stochasticity=["1", None, True]),
    *each(CONVERTED, "source must be one of", source=UNKNOWN),
    *each(CONVERTED, "target must be one of", target=UNKNOWN),
    *each(partial(CONVERTED, t=DOUBLE * 0), "no density at t = 0", sde=STARTS),
    *each(partial(CONVERTED, t=0.0, source="data"), "take t > 0", sde=STARTS),
    # VE starts with a density; given all of z_0 there is none.
    *each(partial(CONVERTED, sde=VESDE(), t=0.0), "no density at t = 0", conditioning=["all"]),
    *each(FORGOTTEN, "nothing of x_0 is left", source=["score", "full_score"]),
    *each(AT_THE_END, r"nothing of x_0 is left .* ≤ 0\.9933", target=["data", *BOTH]),
    # So early that float64 holds no digit of the full score.
    *each(partial(CONVERTED, t=1e-20, source="data"), "must be later for", target=["full_score"]),
    *each(
        partial(CONVERTED(source="data"), Z),
        r"prediction of the data of shape \(2, 2\)",
        value=map(ZEROS, [(2, 1), (2, 1, 2), (1, 2)]),
    ),
    *each(partial(CONVERTED, source="data"), "needs a process of one", target=BOTH),
    *each([PAIR.target, EVALUATED], "needs a process of one", prediction=BOTH),
    *each(LOSS, "needs a process of one", measured=BOTH),
    *each(GIVEN_ALL.target, "conditioning must be 'data'", prediction=["flow"]),
    *each(ENDED, "prediction is infinite", measured=["flow"]),
    *each(ENDED, "t must be below 1 with weighting='likelihood'", weighting=["likelihood"]),
    *each(partial(POINTS.score, CRITICAL), "rows must be one of", rows=["v", None]),
    *each(partial(POINTS.score, VP), "has no auxiliary", rows=["auxiliary"]),
    *each(SINGULAR, "has no auxiliary", t=[0.5]),
    *each(at_a_known_time(SCORE, 0.5), "2 numbers per component", z=[ZEROS(8, 2, 3)]),
    *each(MIXTURE, "must have shapes", weights=[[[1.0]]]),
    *each(MIXTURE, "must have shapes", means=[[0.0]]),
    *each(MIXTURE, "must have shapes", covariances=[[[1.0]]]),
    *each(MIXTURE, "need weights of shape", weights=[[1.0, 1.0]]),
    *each(MIXTURE, "need weights of shape", means=[[[0.0, 0.0]]]),
    *each(MIXTURE, "weights must be finite", weights=[[0.0], [-1.0], [NAN], [INF]]),
    *types(MIXTURE, "weights must be an array of real numbers", weights=["one"]),
    *each(MIXTURE, "must be finite", means=[[[NAN]]]),
    *each(MIXTURE, "must be finite", covariances=[ONES(1, 1, 1) * INF]),
    *each(MIXTURE, "positive semi-definite", covariances=[-ONES(1, 1, 1)]),
    *each(PLANE, "semi-definite", covariances=[[[[1.0, 2.0], [2.0, 1.0]]]]),
    *each(PLANE, "symmetric", covariances=[[[[1.0, 0.5], [0.0, 1.0]]]]),
    *each(partial(PLANE, weights=[], means=X[:0]), "at least one", covariances=[Z[:0]]),
    *each(MIXED, "data_variance must be finite and", data_variance=[0.0, -1.0, NAN, TINY]),
    *each(MIXED, "data_mean must be finite", data_mean=[NAN, INF]),
    *types(MIXED, "data_mean must be a real number", data_mean=["1", None, [1.0]]),
    *types(MIXED, "data_variance must be a real number", data_variance=["1", None]),
    *each(MIXED, r"one shape; got \(2,\) and \(\)", data_mean=[ZEROS(2)]),
    *each(MIXED, "inputs must be one of 'state', 'estimate'; got 'z'", inputs=["z"]),
    *each(OF_ESTIMATE, "mixing_logits must be None unless", mixing_logits=[ONES(())]),
    *each(MIXED, "mixing_logits must be a finite", mixing_logits=[ONES(()) * NAN, -3.0, "-3"]),
    # Weights of each driven component, or of each sample, do not broadcast.
    *each(weighted, "must broadcast", logits=[(3, 1, 1), (5,), (2, 2, 3, 3), (3, 1, 1, 1, 1)]),
    *each(partial(weighted, (2, 1, 1)), "mixing_logits must broadcast with the", z=[(2, 2, 3)]),
    *each(EVALUATED, "prediction must be one of 'score'", prediction=["full_score", None]),
    *each(EVALUATED, "no density at t = 0", t=[0.0, torch.tensor([0.5, 0.0])]),
    *each(EVALUATED, r"z must have shape \(B, 2, ", z=map(ZEROS, [(3, 3, 2), (3, 1, 2), (3,)])),
    *each(partial(PER_PIXEL, t=0.5), "the axes of", z=[ZEROS(3, 2, 3)]),
    *each(returned, r"shape \(3, 2, 3, 3\)", shape=[(3, 4, 3, 3), (3, 1, 3, 3), (3, 2, 9, 9)]),
]
DENOISERS = [
    *types(PATH, "signal must be a function", signal=[1.0]),
    *types(PATH, "signal must return a tensor", signal=[lambda t: 1.0]),
    *each(PATH, "signal must return one value per time", signal=[lambda t: t.sum()]),
    *each(PATH, "signal must be finite", signal=[lambda t: 1 / t, lambda t: 1 - 2 * t]),
    *each(FALLING, "got a decrease after t = 0.99", noise=[lambda t: t - t**2]),
    *each(FALLING, "a decrease after t = 0", noise=[lambda t: (t - 0.5).abs()]),
    *each(partial(PATH, torch.ones_like), "two increasing numbers", interval=[(1.0, 1.0)]),
    *each(ALPHAS, "table must decrease", table=[TABLE.flip(0)]),
    *each(
        partial(FALLING, lambda t: t), "inverse must map κ", inverse=[torch.exp, lambda k: k * NAN]
    ),
    *each(partial(NoisePath.of, VP), "start must lie between 0 and 1", start=[0.0, 1.0, NAN]),
    *each(ALPHAS, "table must be a tensor", table=[[0.9, 0.5]]),
    *each(NoisePath.of, "sde must have one component; got CLD", sde=[CRITICAL]),
    *types(partial(DenoiserScore, sde=VP), "denoiser must be a callable", denoiser=[None]),
    *each(DENOISER, "noise_levels must be two increasing numbers", noise_levels=[(1.0, 0.5)]),
    *each(DENOISER, "noise_levels must be at least 0", noise_levels=[(-1.0, 0.5)]),
    *each(DENOISER, "noise_levels must start with a finite", noise_levels=[(-INF, 0.5)]),
    *each(partial(DENOISER(sde=FLOW), ZEROS(2, 1, 2)), "infinite: start earlier", t=[1.0]),
    *types(ScoreDenoiser, "score must be a callable", score=[None]),
    *each(partial(ScoreDenoiser, SCORE), "start must lie between", start=[0.0, 1.0, NAN]),
    *each(PREDICTION, "predicts must be one of 'noise'", predicts=["epsilon"]),
    *each(PREDICTION, "clock must be one of 'time'", clock=["steps"]),
    *each(PREDICTION, "clock must not be 'index'", clock=["index"]),
    *types(partial(PredictionDenoiser, path=NoisePath.linear()), "must be a cal", network=[None]),
    *types(PREDICTION, "path must be a NoisePath", path=[VP]),
    *each(partial(PREDICTION(), ZEROS(4, 2)), r"have shape \(4,\)", sigma=[ONES(3)]),
    *each(TABULATED, r"sigma must lie in \[0.01.*, 99.*\].*got 200", sigma=[200.0]),
    *each(wrong_shape, r"denoiser must .* like its input, \(4, 2\)", shape=[(4, 3), (4, 1, 2)]),
    *each(wrong_output, "network must return a tensor like its input", shape=[(4, 3), (3, 2)]),
    *types(GUIDED, "unconditional must be a callable", unconditional=[None]),
    *types(GUIDED, "weight", weight=["2"]),
    *each(GUIDED, "weight must be finite", weight=[NAN]),
    *each(GUIDED, "interval must be two increasing numbers", interval=[(2.0, 0.2)]),
    *each(GUIDED, "interval must hold noise levels ≥ 0", interval=[(-1.0, 0.2)]),
    *each(GUIDED, "must be scores of one process", unconditional=[OTHER]),
    *each(PLAIN, "interval must be None for scores without an", interval=[(0.2, 2.0)]),
    *types([as_torchdiffeq, TORCHSDE], "process must be a LinearSDE", process=[*SDES, DATA]),
    *each(TORCHSDE, "calculus must be 'ito' or 'stratonovich'", calculus=["Ito", None]),
    *each(TORCHSDE().pack, r"shape \(B, 2, 3\)", state=map(ZEROS, [(4, 2), (4, 1, 3), (4, 2, 4)])),
]
OBSERVATIONS = [
    *types(partial(Observation, y=ONES(2), noise_std=0.1), "forward must be a", forward=[3]),
    *types(GIVEN, "y must be an array", y=["y"]),
    *each(GIVEN, "y must be finite", y=[X[0] * NAN]),
    *each(GIVEN, "noise_std must be", noise_std=[-1.0]),
    *types(MASKED, "mask must be", mask=[ONES(2)]),
    *each(MASKED, "mask must mark", mask=[~MASK]),
    *each(MASKED, "the mask's shape", y=[ONES(3)]),
    *each(MATRIX, "A must be", A=[[1.0]]),
    *each(MEANS, "factor must be", factor=[1]),
    *each(MEANS, "y must have", y=[ONES(2)]),
    *each(BLUR, "odd", kernel=[ONES(2, 2)]),
    *each(BLUR, "image", y=[ONES(4, 4)]),
    *each(CONDITION, "must be of data of 2 numbers", observation=[MATRIX([[1.0, 0.0, 0.0]])]),
    *each(CONDITION, "one y of 1 numbers", observation=[MATRIX([[1.0, 0.0]], y=ONES(3, 1))]),
    *each(CONDITION, "no density", observation=[MATRIX([[1.0, 0], [1, 0]], y=X[0], noise_std=0)]),
    *types([CONDITION, POSTERIOR], "observation must be an Observation", observation=[3]),
    *each(POSTERIOR, "method must be one of", method=["mmps"]),
    *each(POSTERIOR, "iterations must be", iterations=[0]),
    *each(POSTERIOR, "data_variance must be", data_variance=[0.0]),
    *each(DPS, "noise_std must be positive", observation=[Observation(SEEN.forward, SEEN.y, 0.0)]),
    *types(ANY_SCORE, "score must be a", score=[3]),
    *types(ANY_SCORE, "sde must be given", score=[untouchable]),
    *each(observed, "must be linear", forward=[lambda x: x**2]),
    *each(observed, r"forward\(0\) ≠ 0", forward=[lambda x: x + 1]),
    *each(observed, "each sample separately", forward=[lambda x: x - x.mean(0)]),
    *each(partial(observed, lambda x: x), "y must have shape", y=[ONES(3)]),
    *types(observed, "autograd can differentiate", forward=[lambda x: x.detach()]),
    *each(partial(POSTERIOR(), t=0.3), "z must not require gradients", z=[LEAF]),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [*SHARED, *TRAINING, *LIKELIHOODS, *SCORES, *DENOISERS, *OBSERVATIONS],
)
def test_bad_arguments_are_rejected(call: Call, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("method", ["drift", "probability_flow", "data_prediction", "full_score"])
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2), (1, 1, 1), (3, 1)])
def test_a_score_of_another_shape_is_rejected(method: str, shape: Any) -> None:
    process = ReverseProcess(CRITICAL, lambda z, t: ZEROS(shape))
    with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 1\)"):
        getattr(process, method)(ZEROS(3, 2, 1), 0.5)
