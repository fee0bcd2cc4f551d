"""Arguments that functions of scores reject, before a score is evaluated."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, RectifiedFlow, score
from cldsde.score.adapters import as_torchdiffeq, as_torchsde
from probes import untouchable
from references import wide_mixture
from score.cases import Constant, at_a_known_time, mixture

NAN, INF = math.nan, math.inf
ONES, ZEROS = torch.ones, torch.zeros
Z, X = ZEROS(2, 2, 2), ZEROS(2, 2)
DOUBLE = ONES(2, dtype=torch.float64)
SDES, CRITICAL, VP, FLOW = [CLD, None, "CLD"], CLD(), VPSDE(), RectifiedFlow()


def each(calls, message="", error=ValueError, **values):
    """Rows (call, error, message): one for each call and each value of each argument.

    By default the message has to say what the argument must be.
    """
    calls = calls if isinstance(calls, list) else [calls]
    rows = [(f, {name: x}, name) for name, given in values.items() for x in given for f in calls]
    return [(partial(f, **x), error, message or rf"\b{name}\b must") for f, x, name in rows]


def types(calls, message="", **values):
    return each(calls, message, TypeError, **values)


# The functions with arguments that they accept.
PROCESS = score.ReverseProcess(CRITICAL, untouchable)
DRAWN = partial(score.PerturbedData.draw, sde=CRITICAL, x0=X, t=0.5)
PAIR = score.PerturbedData.draw(CRITICAL, ZEROS(4, 2), 0.5)
LOSS = partial(PAIR.loss, output=PAIR.noise)
PREDICTED = [partial(LOSS, prediction=kind) for kind in ("score", "noise", "data")]
LEAST = partial(score.optimal_loss, sde=CRITICAL, t=0.5)
CONVERTED = partial(score.Conversion.at, sde=CRITICAL, t=0.5, source="score", target="noise")
FORGOTTEN = partial(CONVERTED, sde=VPSDE(0.1, 2000.0), t=1.0, target="data")  # psi = exp(-500)
IMPORTANCE = partial(score.TimeSampler.importance, sde=CRITICAL, t_min=1e-3)
SAMPLER = partial(score.TimeSampler, density=torch.ones_like, t_min=1e-3)
LEVELS, LOGITS = partial(score.log_snr_density, CRITICAL), score.logit_normal_density
BOUND = partial(score.evidence_lower_bound, model=untouchable, sde=CRITICAL, x0=X, t=0.5, t_min=0.1)
FLOW_DENSITY = partial(score.flow_log_prob, process=PROCESS, z=Z, t=0.1)
LIKELIHOOD = partial(score.log_likelihood, process=PROCESS, x0=X, t_min=0.1)
DENSITIES = [FLOW_DENSITY, LIKELIHOOD]
REVERSE = partial(score.ReverseProcess, sde=CRITICAL, score=untouchable)
DRIFTS = [
    partial(f, z=Z, t=0.5)
    for f in (PROCESS.drift, PROCESS.probability_flow, PROCESS.data_prediction, PROCESS.full_score)
]
NOISES = [partial(PROCESS.drift, Z, 0.5), partial(PROCESS.diffusion, 0.5)]
BITS = partial(score.bits_per_dim, ZEROS(1), dimension=1)
LEVEL_0 = partial(score.dequantise, torch.tensor([0]))

# Mixtures.
MIXTURE = partial(score.GaussianMixture, weights=[1.0], means=[[0.0]], covariances=ONES(1, 1, 1))
PLANE = partial(score.GaussianMixture, weights=[1.0], means=[[0.0, 0.0]])
POINTS = mixture("points")
SCORE = POINTS.score(CRITICAL)
METHODS = [POINTS.log_prob, POINTS.conditional_log_prob, POINTS.posterior_mean]
AT_STATES = [partial(SCORE, z=Z, t=0.5), *(partial(f, CLD(), z=Z, t=0.5) for f in METHODS)]

# Mixed scores.
MIXED = partial(score.MixedScore, Constant(CRITICAL), CRITICAL, data_mean=0.0, data_variance=1.0)
EVALUATED = partial(MIXED(), z=Z, t=0.5)
TINY = torch.tensor(1e-50, dtype=torch.float64)


def returned(shape):
    network = nn.Module()
    network.forward = lambda z, clock: ZEROS(shape)
    return score.MixedScore(network, CRITICAL, 0.0, 1.0)(ZEROS(3, 2, 2, 3, 3), 0.5)


def weighted(logits, z=(3, 2, 2, 3, 3)):
    return MIXED(mixing_logits=ZEROS(logits))(ZEROS(z), 0.5)


def entropy(conditioning="data", losses=X[:, 0], **options):
    equilibrium, t = CLD(velocity_scale=1.0), torch.tensor([0.1, 0.5], dtype=torch.float64)
    pair = score.PerturbedData.draw(equilibrium, ZEROS(2, 1), t, conditioning=conditioning)
    return score.cross_entropy(pair, losses, **{"t_min": 1e-3, **options})


# Denoisers and guidance.
def denoise(u, sigma):
    return u


def wrong_shape(shape):
    return score.DenoiserScore(lambda u, sigma: ZEROS(shape), VP)(ZEROS(4, 1, 2), 0.5)


def wrong_output(shape):
    return PREDICTION(lambda x, t: ZEROS(shape))(ZEROS(4, 2), 1.0)


TABLE = torch.linspace(0.9999, 1e-4, 1000, dtype=torch.float64)
PREDICTION = partial(score.PredictionDenoiser, path=score.NoisePath.linear())
DENOISED = partial(PREDICTION, denoise)
PATH = partial(score.NoisePath, noise=lambda t: t)
ALPHAS = score.NoisePath.from_alphas_cumprod
TABULATED = partial(DENOISED(path=ALPHAS(TABLE)), X)
FALLING = partial(score.NoisePath, lambda t: 1 - t)
DENOISER = partial(score.DenoiserScore, denoise, sde=VP)
GUIDED = partial(score.GuidedScore, conditional=DENOISER(), unconditional=DENOISER(), weight=2.0)
PLAIN = partial(score.GuidedScore, untouchable, untouchable, 2.0)
TORCHSDE = partial(as_torchsde, process=CRITICAL, shape=(3,))
OTHER = score.DenoiserScore(denoise, VPSDE(beta_max=10.0))

# Observations.
DATA, SEEN = wide_mixture()
MASK = torch.tensor([True, True])
GIVEN = partial(score.Observation, abs, y=ONES(2), noise_std=0.1)
MASKED = partial(score.Observation.mask, mask=MASK, y=ONES(2), noise_std=0.1)
MATRIX = partial(score.Observation.matrix, y=ONES(1), noise_std=0.1)
MEANS = partial(score.Observation.downsample, factor=2, y=ONES(1, 2), noise_std=0.1)
BLUR = partial(score.Observation.blur, kernel=ONES(3, 3), y=ONES(1, 4, 4), noise_std=0.1)
CONDITION = score.GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)[None]).condition
POSTERIOR = partial(score.PosteriorScore, DATA.score(CRITICAL), observation=SEEN)
LEAF = ZEROS(2, 2, 8, dtype=torch.float64, requires_grad=True)
DPS = partial(POSTERIOR, method="dps")
ANY_SCORE = partial(score.PosteriorScore, observation=SEEN)


def observed(forward, y=DOUBLE):
    seen = score.Observation(forward, y, 0.1)
    return score.PosteriorScore(untouchable, seen, sde=VP)(ZEROS(2, 1, 2), 0.5)


OF_DATA = partial(CONVERTED(source="data"), Z)

# Predictions that need one component, and singular ends.
GIVEN_ALL = score.PerturbedData.draw(VESDE(), ZEROS(2, 1), 0.5, conditioning="all")
END = score.PerturbedData.draw(FLOW, ONES(2, 1), 1.0)
AT_THE_END = partial(score.Conversion.at, FLOW, 1.0, "score")
ENDED = partial(END.loss, END.noise)
END_LOSS = partial(ENDED, weighting="likelihood")
BOTH = ["velocity", "flow"]

UNKNOWN = ["speed", None, 1]
UNEVEN = [0.0, torch.tensor([0.5, 0.0])]
STARTS = [VP, CLD(), PSLD(), HOLD()]
WEIGHTS = [lambda t, f=f: f * t for f in (0, -1, NAN, INF)]
WEIGHTS += [lambda t: t - 0.5, lambda t: t.sum(), lambda t: t[1:], lambda t: 1.0]
OUTPUTS = [(4, 2, 2), (1, 1, 2), (4, 1), (4, 1, 1), (4,), (4, 1, 2, 1)]  # must not broadcast
AT_REST = [score.ReverseProcess(CLD(velocity_scale=0.0), untouchable)]
MATCHED = partial(score.score_matching_loss, untouchable, VP, X, 0.5)
DRAWING = [partial(POINTS.sample, 4), partial(SAMPLER().sample, 4), LEVEL_0, MATCHED, BOUND]

ROWS = [
    # Arguments that several functions share.
    *types([DRAWN, LEAST, CONVERTED, IMPORTANCE, BOUND, REVERSE], sde=SDES),
    *each([DRAWN, LEAST, CONVERTED, BOUND, *DRIFTS, *AT_STATES], "^t must", t=[-0.1, 1.1, NAN]),
    *each([DRAWN, LEAST, *DRIFTS[2:], *AT_STATES], "no density at t = 0|lie in", t=UNEVEN),
    *each([DRAWN, BOUND, *DRIFTS, *AT_STATES], "^t must", t=[ONES(3) / 2]),
    *types([LEAST, *DRIFTS], "^t", t=["0.5"]),
    *each([DRAWN, LEAST, CONVERTED], conditioning=UNKNOWN),
    *each([LEAST, BOUND, IMPORTANCE], data_variance=[0, -1.0, INF]),
    *types([DRAWN, LIKELIHOOD, BOUND], "floating-point", x0=[X.long(), X[0, 0], None, [[0.0]]]),
    *types([FLOW_DENSITY, *DRIFTS, *AT_STATES], "floating-point", z=[Z.long(), None, [[0.0]]]),
    *each([FLOW_DENSITY, *DRIFTS], "must", z=map(ZEROS, [(2, 3, 1), (2, 1, 2), (2,)])),
    *each(AT_STATES, "got", z=map(ZEROS, [(3, 1, 2), (3, 3, 2), (3, 2, 1), (3, 2, 2, 2), (2,)])),
    *types([*DRAWING, *DENSITIES], r"torch\.Generator.* got 3\.", generator=[3]),
    # Training.
    *each(PAIR.target, prediction=[*UNKNOWN, "full_score"]),
    *each(LOSS, prediction=UNKNOWN, measured=["data"]),
    *types(LOSS, output=[None, 1.0]),
    *types([LEAST, LOSS, IMPORTANCE], weighting=["uniform", None, 1.0]),
    *each(LOSS, "one number for each time", weighting=[lambda t: t[1:], torch.sum]),
    *each(PREDICTED, r"must be a prediction of the \w* of shape", output=map(ZEROS, OUTPUTS)),
    *each(SAMPLER, t_min=[0.0, -1e-3, 0.6, 1.0, NAN]),
    *each(SAMPLER, "one finite, positive value per time", density=WEIGHTS),
    *each(SAMPLER().quantiles, u=[DOUBLE * u for u in (-0.1, 1.1, NAN)]),
    *each(IMPORTANCE, "one finite, positive value per time", weighting=WEIGHTS[:3]),
    *each(IMPORTANCE, conditioning=["velocity"]),
    *each([LEVELS, LOGITS], mean=[NAN, INF], std=[0.0, -1.0]),
    *each(score.mode_density, scale=[2.0]),
    *each([entropy, BOUND], t_min=[0.0, 1.0, -0.1], weight=map(ONES, [(3,), (2, 1), (1, 2)])),
    *each(entropy, "conditioned on the data", conditioning=["all"]),
    *each(entropy, of=["velocity"], losses=map(ZEROS, [(3,), (2, 1)])),
    *each(BOUND, t=[0.05, torch.tensor([0.5, 0.05])], prediction=["speed"]),
    *each(BOUND, "prediction of the score of shape", model=[lambda z, t: z]),
    *each(BOUND, "data_variance must be given with data_mean", data_mean=[0.3]),
    *types(score.dequantise, levels=[X, [3], None]),
    *each(score.dequantise, levels=map(torch.tensor, ([256], [-1]))),
    *each(LEVEL_0, count=[1], low=[1.0, 2.0, -INF, NAN]),
    *each(LEVEL_0, "low must be below high", high=[-1.0, INF, NAN]),
    *each(BITS, dimension=[0, -1], bin_width=[0.0, -1.0, INF]),
    # Likelihoods.
    *each(DENSITIES, rtol=[0.0], atol=[NAN], divergence=["skilling"], method=["rk4"]),
    *each(DENSITIES, max_nfev=[0]),
    *each(FLOW_DENSITY, t=[-0.1, 1.0, NAN], z=[Z + NAN, Z - INF]),
    *each(LIKELIHOOD, t_min=[0.0, 1.0, NAN], start=["both"], samples=[0]),
    *types(LIKELIHOOD, samples=[True, 1.0]),
    *each(LIKELIHOOD, "at least one number per data point", x0=[X[:, :0]]),
    *each(partial(LIKELIHOOD, importance_weighted=True), divergence=["hutchinson"]),
    *each(partial(LIKELIHOOD, start="replace"), "needs auxiliary", process=AT_REST),
    # Scores and conversions.
    *types(REVERSE, score=[None, 1.0, ZEROS(2)]),
    *each(
        REVERSE, "belongs to another", score=map(POINTS.score, [CLD(5.0), CLD(velocity_scale=1)])
    ),
    *each(NOISES, stochasticity=[-0.1, NAN, INF]),
    *each(CONVERTED, source=UNKNOWN, target=UNKNOWN),
    *each(partial(CONVERTED, t=DOUBLE * 0), "no density at t = 0", sde=STARTS),
    *each(partial(CONVERTED, t=0.0, source="data"), "t must be above 0", sde=STARTS),
    *each(FORGOTTEN, "nothing of x_0 is left", source=["score", "full_score"]),
    *each(AT_THE_END, r"nothing of x_0 is left .* ≤ 0\.9933", target=["data", *BOTH]),
    # So early that float64 holds no digit of the full score.
    *each(partial(CONVERTED, t=1e-20, source="data"), "must be later for", target=["full_score"]),
    *each(OF_DATA, r"data of shape \(2, 2\)", value=map(ZEROS, [(2, 1), (2, 1, 2), (1, 2)])),
    *each(partial(CONVERTED, source="data"), "needs a process of one", target=BOTH),
    *each([PAIR.target, EVALUATED], "needs a process of one", prediction=BOTH),
    *each(GIVEN_ALL.target, "conditioning must be 'data'", prediction=["flow"]),
    *each(ENDED, r"nothing of x_0 is left .* ≤ 0\.9933", measured=["flow"]),
    *each(END_LOSS, "t must be below 1 with", prediction=["noise", "score", *BOTH]),
    *each(partial(POINTS.score, CRITICAL), rows=["v", None]),
    *each(partial(POINTS.score, VP), "has no auxiliary", rows=["auxiliary"]),
    *each(at_a_known_time(SCORE, 0.5), "2 numbers per component", z=[ZEROS(8, 2, 3)]),
    # Mixtures and mixed scores.
    *each(MIXTURE, "must have shapes", weights=[[[1.0]]], means=[[0.0]], covariances=[[[1.0]]]),
    *each(MIXTURE, "need weights of shape", weights=[[1.0, 1.0]], means=[[[0.0, 0.0]]]),
    *each(MIXTURE, "must be finite", weights=[[0.0], [-1.0], [NAN], [INF]], means=[[[NAN]]]),
    *each(MIXTURE, "must be finite", covariances=[ONES(1, 1, 1) * INF]),
    *each(MIXTURE, "positive semi-definite", covariances=[-ONES(1, 1, 1)]),
    *each(PLANE, "semi-definite", covariances=[[[[1.0, 2.0], [2.0, 1.0]]]]),
    *each(PLANE, "symmetric", covariances=[[[[1.0, 0.5], [0.0, 1.0]]]]),
    *each(MIXED, data_variance=[0.0, -1.0, NAN, TINY], data_mean=[NAN, INF], inputs=["z"]),
    *each(partial(MIXED, inputs="estimate"), mixing_logits=[ONES(())]),
    *each(MIXED, "mixing_logits must be a finite", mixing_logits=[ONES(()) * NAN, -3.0, "-3"]),
    # Weights of each driven component, or of each sample, do not broadcast.
    *each(weighted, "must broadcast", logits=[(3, 1, 1), (5,), (2, 2, 3, 3), (3, 1, 1, 1, 1)]),
    *each(partial(weighted, (2, 1, 1)), "mixing_logits must broadcast with the", z=[(2, 2, 3)]),
    *each(EVALUATED, "no density at t = 0", t=[0.0, torch.tensor([0.5, 0.0])]),
    *each(EVALUATED, r"z must have shape \(B, 2, ", z=map(ZEROS, [(3, 3, 2), (3, 1, 2), (3,)])),
    *each(returned, r"shape \(3, 2, 3, 3\)", shape=[(3, 4, 3, 3), (3, 1, 3, 3), (3, 2, 9, 9)]),
    # Denoisers, paths, guidance and other libraries.
    *types(PATH, signal=[1.0, lambda t: 1.0]),
    *each(PATH, signal=[lambda t: t.sum(), lambda t: 1 / t, lambda t: 1 - 2 * t]),
    *each(FALLING, "a decrease after t = 0", noise=[lambda t: t - t**2, lambda t: (t - 0.5).abs()]),
    *each(partial(PATH, torch.ones_like), "two increasing", interval=[(1, 1), (0,), (0, 1, 2)]),
    *each(partial(score.NoisePath.of, VP), start=[0.0, 1.0, NAN]),
    *each(partial(score.ScoreDenoiser, untouchable, VP), start=[0.0, 1.0, NAN]),
    *each(ALPHAS, table=[TABLE.flip(0), [[0.9, 0.5]]]),
    *types(partial(score.DenoiserScore, sde=VP), denoiser=[None]),
    *types(PREDICTION, network=[None]),
    *types(DENOISED, path=[None, denoise]),
    *each(DENOISER, noise_levels=[(1.0, 0.5), (-1.0, 0.5), (-INF, 0.5)]),
    *each(
        partial(DENOISER(sde=FLOW), ZEROS(2, 1, 2)),
        "infinite there; take t ≤ 0.993",
        t=[1.0],
    ),
    *each(DENOISED, predicts=["epsilon"], clock=["steps", "index"]),
    *each(partial(DENOISED(), ZEROS(4, 2)), r"have shape \(4,\)", sigma=[ONES(3)]),
    *each(TABULATED, r"sigma must lie in \[0.01.*, 99.*\].*got 200", sigma=[200.0]),
    *each(wrong_shape, r"denoiser must .* like its input, \(4, 2\)", shape=[(4, 3), (4, 1, 2)]),
    *each(wrong_output, "network must return a tensor like its input", shape=[(4, 3), (3, 2)]),
    *types(GUIDED, unconditional=[None], weight=["2"]),
    *each(GUIDED, weight=[NAN], interval=[(2.0, 0.2), (-1.0, 0.2)]),
    *each(GUIDED, "must be scores of one process", unconditional=[OTHER]),
    *each(PLAIN, "interval must be None for scores without an", interval=[(0.2, 2.0)]),
    *types([as_torchdiffeq, TORCHSDE], process=[*SDES, DATA]),
    *each(TORCHSDE, calculus=["Ito", None]),
    *each(TORCHSDE().pack, r"shape \(B, 2, 3\)", state=map(ZEROS, [(4, 2), (4, 1, 3), (4, 2, 4)])),
    # Observations and scores given one.
    *types(partial(score.Observation, y=ONES(2), noise_std=0.1), forward=[3]),
    *each(GIVEN, y=[X[0] * NAN], noise_std=[-1.0]),
    *each(MASKED, mask=[~MASK], y=[ONES(3)]),
    *types(MASKED, mask=[MASK.double(), [True, True]]),
    *each(MATRIX, A=[[1.0]]),
    *each(MEANS, factor=[1], y=[ONES(2)]),
    *each(BLUR, "odd", kernel=[ONES(2, 2)]),
    *each(CONDITION, "must be of data of 2 numbers", observation=[MATRIX([[1.0, 0.0, 0.0]])]),
    *each(CONDITION, "one y of 1 numbers", observation=[MATRIX([[1.0, 0.0]], y=ONES(3, 1))]),
    *each(CONDITION, "no density", observation=[MATRIX([[1.0, 0], [1, 0]], y=X[0], noise_std=0)]),
    *types([CONDITION, POSTERIOR], observation=[3]),
    *each(POSTERIOR, method=["mmps"], iterations=[0], data_variance=[0.0]),
    *each(DPS, "noise_std must be positive", observation=[MATRIX([[1.0, 0.0]], noise_std=0.0)]),
    *types(ANY_SCORE, "sde must be given", score=[untouchable]),
    *types([partial(ANY_SCORE, sde=VP), score.ScoreDenoiser], score=[None, Z]),
    *types([ANY_SCORE, score.ConditionalScore], "wrap it: DenoiserScore", score=[DENOISED()]),
    *types(GUIDED, "wrap it: DenoiserScore", conditional=[DENOISED()], unconditional=[DENOISED()]),
    *each(observed, "must be linear", forward=[lambda x: x**2]),
    *each(observed, r"forward\(0\) ≠ 0", forward=[lambda x: x + 1]),
    *each(observed, "each sample separately", forward=[lambda x: x - x.mean(0)]),
    *each(partial(observed, lambda x: x), "y must have shape", y=[ONES(3)]),
    *types(observed, "autograd can differentiate", forward=[lambda x: x.detach()]),
    *each(partial(POSTERIOR(), t=0.3), "z must not require gradients", z=[LEAF]),
]


@pytest.mark.parametrize(("call", "error", "message"), ROWS)
def test_bad_arguments_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("method", ["drift", "probability_flow", "data_prediction", "full_score"])
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2), (1, 1, 1), (3, 1)])
def test_a_score_of_another_shape_is_rejected(method, shape):
    process = score.ReverseProcess(CRITICAL, lambda z, t: ZEROS(shape))
    with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 1\)"):
        getattr(process, method)(ZEROS(3, 2, 1), 0.5)
