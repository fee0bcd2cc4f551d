"""Arguments that functions of scores reject, before a score is evaluated."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from cldsde import CLD, VESDE, VPSDE, RectifiedFlow, score
from cldsde.score.adapters import as_torchsde
from probes import untouchable
from references import wide_mixture
from score.cases import Constant, mixture

NAN, INF = math.nan, math.inf
ONES, ZEROS = torch.ones, torch.zeros
Z, X = ZEROS(2, 2, 2), ZEROS(2, 2)
DOUBLE = ONES(2, dtype=torch.float64)
CRITICAL, VP, FLOW = CLD(), VPSDE(), RectifiedFlow()


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
PREDICTED = [partial(LOSS, prediction=kind) for kind in ("score", "data")]
LEAST = partial(score.optimal_loss, sde=CRITICAL, t=0.5)
CONVERTED = partial(score.Conversion.at, sde=CRITICAL, t=0.5, source="score", target="noise")
OF_DATA = partial(CONVERTED, source="data")
FORGOTTEN = partial(CONVERTED, sde=VPSDE(0.1, 2000.0), t=1.0, target="data")  # psi = exp(-500)
SAMPLER = partial(score.TimeSampler, density=torch.ones_like, t_min=1e-3)
BOUND = partial(score.evidence_lower_bound, model=untouchable, sde=CRITICAL, x0=X, t=0.5, t_min=0.1)
FLOW_DENSITY = partial(score.flow_log_prob, process=PROCESS, z=Z, t=0.1)
LIKELIHOOD = partial(score.log_likelihood, process=PROCESS, x0=X, t_min=0.1)
REVERSE = partial(score.ReverseProcess, sde=CRITICAL, score=untouchable)
DRIFTS = [partial(f, z=Z, t=0.5) for f in (PROCESS.drift, PROCESS.data_prediction)]

# Mixtures and mixed scores.
MIXTURE = partial(score.GaussianMixture, weights=[1.0], means=[[0.0]], covariances=ONES(1, 1, 1))
PLANE = partial(MIXTURE, means=[[0.0, 0.0]])
POINTS = mixture("points")
SCORE = POINTS.score(CRITICAL)
AT_STATES = [partial(SCORE, z=Z, t=0.5), partial(POINTS.log_prob, CRITICAL, z=Z, t=0.5)]
MIXED = partial(score.MixedScore, Constant(CRITICAL), CRITICAL, data_mean=0.0, data_variance=1.0)
EVALUATED = partial(MIXED(), z=Z, t=0.5)


def returned(shape):
    network = nn.Module()
    network.forward = lambda z, clock: ZEROS(shape)
    return score.MixedScore(network, CRITICAL, 0.0, 1.0)(ZEROS(3, 2, 2, 3, 3), 0.5)


def weighted(logits, z=(3, 2, 2, 3, 3)):
    return MIXED(mixing_logits=ZEROS(logits))(ZEROS(z), 0.5)


def entropy(losses=X[:, 0], **options):
    pair = score.PerturbedData.draw(CRITICAL, ZEROS(2, 1), 0.5)
    return score.cross_entropy(pair, losses, **{"t_min": 1e-3, **options})


# Denoisers and guidance.
def denoise(u, sigma):
    return u


def wrong_score(shape):
    return score.ReverseProcess(CRITICAL, lambda z, t: ZEROS(shape)).drift(ZEROS(3, 2, 1), 0.5)


def wrong_data(shape):
    return score.DenoiserScore(lambda u, sigma: ZEROS(shape), VP)(ZEROS(4, 1, 2), 0.5)


def wrong_output(shape):
    return PREDICTION(lambda x, t: ZEROS(shape))(ZEROS(4, 2), 1.0)


TABLE = torch.linspace(0.9999, 1e-4, 1000, dtype=torch.float64)
PREDICTION = partial(score.PredictionDenoiser, path=score.NoisePath.linear())
DENOISED = partial(PREDICTION, denoise)
PATH = partial(score.NoisePath, noise=lambda t: t)
ALPHAS = score.NoisePath.from_alphas_cumprod
DENOISER = partial(score.DenoiserScore, denoise, sde=VP)
GUIDED = partial(score.GuidedScore, conditional=DENOISER(), unconditional=DENOISER(), weight=2.0)
PLAIN = partial(score.GuidedScore, untouchable, untouchable, 2.0)
CONDITIONS = partial(score.ConditionalScore, untouchable)
WRAPPED = score.ScoreWrapper(untouchable)

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
DPS = partial(POSTERIOR, method="dps")
ANY_SCORE = partial(score.PosteriorScore, observation=SEEN)
OF_FLOW = ANY_SCORE(untouchable, sde=FLOW)


def observed(forward, y=DOUBLE):
    seen = score.Observation(forward, y, 0.1)
    return score.PosteriorScore(untouchable, seen, sde=VP)(ZEROS(2, 1, 2), 0.5)


# Predictions that need one component, and singular ends.
GIVEN_ALL = score.PerturbedData.draw(VESDE(), ZEROS(2, 1), 0.5, conditioning="all")
END = score.PerturbedData.draw(FLOW, ONES(2, 1), 1.0)
AT_THE_END = partial(score.Conversion.at, FLOW, 1.0, "score")

WEIGHTS = [lambda t: -t, lambda t: t * INF, lambda t: (t - 0.5).clamp_min(0), lambda t: t[1:]]
OUTPUTS = [(4, 2, 2), (1, 1, 2), (4, 1), (4, 1, 1), (4, 1, 2, 1)]  # must not broadcast
AT_REST = [score.ReverseProcess(CLD(velocity_scale=0.0), untouchable)]

ROWS = [
    # Arguments that several functions share.
    *types([DRAWN, LEAST, CONVERTED, REVERSE], sde=[CLD]),
    *each([DRAWN, LEAST, CONVERTED, *DRIFTS, *AT_STATES], "^t must", t=[-0.1, 1.1, NAN]),
    *each([DRAWN, LEAST, CONVERTED, DRIFTS[1], EVALUATED, *AT_STATES], "no density", t=[0.0]),
    *each([DRAWN, BOUND, *DRIFTS, *AT_STATES], "^t must", t=[ONES(3) / 2]),
    *each([DRAWN, LEAST, CONVERTED], conditioning=["speed"]),
    *types([DRAWN, LIKELIHOOD], "floating-point", x0=[X.long()]),
    *each([FLOW_DENSITY, *DRIFTS, *AT_STATES], "must have shape", z=[ZEROS(2, 3, 1)]),
    # Training.
    *each(PAIR.target, prediction=["speed", "full_score"]),
    *each(LOSS, prediction=["speed"], measured=["data"]),
    *types(LOSS, output=[1.0], weighting=["uniform"]),
    *each(LOSS, "one number for each time", weighting=[lambda t: t[1:]]),
    *each(PREDICTED, r"must be a prediction of the \w* of shape", output=map(ZEROS, OUTPUTS)),
    *each(SAMPLER, "one finite, positive value per time", density=WEIGHTS),
    *each([entropy, BOUND], t_min=[0.0, 1.0], weight=map(ONES, [(3,), (2, 1)])),
    *each(entropy, of=["velocity"], losses=map(ZEROS, [(3,), (2, 1)])),
    *each(BOUND, t=[0.05], prediction=["speed"]),
    *each(BOUND, "data_variance must be given with data_mean", data_mean=[0.3]),
    *each(score.dequantise, levels=map(torch.tensor, ([256], [-1]))),
    # Likelihoods.
    *each(FLOW_DENSITY, rtol=[0.0], atol=[NAN], divergence=["skilling"], method=["rk4"]),
    *types(FLOW_DENSITY, max_nfev=[2.5, 1e5, True]),
    *each(FLOW_DENSITY, max_nfev=[0], t=[-0.1, 1.0], z=[Z + NAN]),
    *each(LIKELIHOOD, t_min=[0.0, 1.0], start=["both"], samples=[0], divergence=["skilling"]),
    *each(partial(LIKELIHOOD, importance_weighted=True), divergence=["hutchinson"]),
    *each(partial(LIKELIHOOD, start="replace"), "needs auxiliary", process=AT_REST),
    # Scores and conversions.
    *types(REVERSE, score=[None, ZEROS(2)]),
    *each(REVERSE, "belongs to another", score=[POINTS.score(CLD(velocity_scale=1.0))]),
    *each(wrong_score, r"must return shape \(3, 1, 1\)", shape=[(3, 2, 1), (1, 1, 1), (3, 1)]),
    *each(partial(WRAPPED.data_prediction, t=0.5), "a data prediction of its own", z=[Z]),
    *each(CONVERTED, source=["speed"], target=["speed"]),
    *each(FORGOTTEN, "nothing of x_0 is left.* end earlier", source=["score", "full_score"]),
    *each(AT_THE_END, r"nothing of x_0 is left .* ≤ 0\.9933", target=["data", "flow"]),
    # So early that float64 holds no digit of the full score.
    *each(partial(OF_DATA, t=1e-20), "must be later for", target=["full_score"]),
    *each(partial(OF_DATA(), Z), r"data of shape \(2, 2\)", value=map(ZEROS, [(2, 1), (1, 2)])),
    *each(OF_DATA, "needs a process of one", target=["velocity", "flow"]),
    *each(GIVEN_ALL.target, "conditioning must be 'data'", prediction=["flow"]),
    *each(partial(END.loss, END.noise), "nothing of x_0 is left", measured=["flow"]),
    *each(partial(END.loss, END.noise, "flow"), "t must be below 1", weighting=["likelihood"]),
    *each(partial(POINTS.score, VP), "has no auxiliary", rows=["auxiliary"]),
    *each(partial(SCORE, t=0.5), "2 numbers per component", z=[ZEROS(8, 2, 3)]),
    # Mixtures and mixed scores.
    *each(MIXTURE, "must have shapes", weights=[[[1.0]]], means=[[0.0]], covariances=[[[1.0]]]),
    *each(MIXTURE, "need weights of shape", weights=[[1.0, 1.0]], means=[[[0.0, 0.0]]]),
    *each(MIXTURE, "must be finite", weights=[[0.0], [INF]], means=[[[NAN]]]),
    *each(MIXTURE, "positive semi-definite", covariances=[-ONES(1, 1, 1)]),
    *each(PLANE, "symmetric", covariances=[[[[1.0, 0.5], [0.0, 1.0]]]]),
    *each(MIXED, data_variance=[0.0, NAN, DOUBLE * 1e-50], data_mean=[INF], inputs=["z"]),
    *each(partial(MIXED, inputs="estimate"), mixing_logits=[ONES(())]),
    *each(MIXED, "mixing_logits must be a finite", mixing_logits=[ONES(()) * NAN, -3.0]),
    # Weights of each driven component, or of each sample, do not broadcast.
    *each(weighted, "must broadcast", logits=[(3, 1, 1), (2, 2, 3, 3), (3, 1, 1, 1, 1)]),
    *each(EVALUATED, r"z must have shape \(B, 2, ", z=map(ZEROS, [(3, 3, 2), (3, 2)])),
    *each(returned, r"shape \(3, 2, 3, 3\)", shape=[(3, 4, 3, 3), (3, 2, 9, 9)]),
    # Denoisers, paths, guidance and other libraries.
    *types(PATH, signal=[1.0, lambda t: 1.0]),
    *each(PATH, signal=[lambda t: t.sum(), lambda t: 1 / t, lambda t: 1 - 2 * t]),
    *each(partial(PATH, lambda t: 1 - t), "a decrease after t = 0", noise=[lambda t: t - t**2]),
    *each(ALPHAS, table=[TABLE.flip(0), [[0.9, 0.5]]]),
    *types(DENOISED, path=[denoise]),
    *each(DENOISER, noise_levels=[(1.0, 0.5), (-1.0, 0.5)]),
    *each(partial(DENOISER(sde=FLOW), ZEROS(2, 1, 2)), "infinite there; take t ≤ 0.993", t=[1.0]),
    *each(DENOISED, predicts=["epsilon"], clock=["steps", "index"]),
    *each(partial(DENOISED(), X), r"have shape \(2,\)", sigma=[ONES(3)]),
    *each(partial(DENOISED(path=ALPHAS(TABLE)), X), r"lie in \[0.01.*got 200", sigma=[200.0]),
    *each(wrong_data, r"denoiser must .* like its input, \(4, 2\)", shape=[(4, 1, 2)]),
    *each(wrong_output, "network must return a tensor like its input", shape=[(3, 2)]),
    *types(GUIDED, unconditional=[None], weight=["2"]),
    *each(GUIDED, weight=[NAN], interval=[(2.0, 0.2), (-1.0, 0.2)]),
    *each(GUIDED, "scores of one process", unconditional=[DENOISER(sde=VPSDE(beta_max=10.0))]),
    *each(PLAIN, "interval must be None for scores without an", interval=[(0.2, 2.0)]),
    *each(CONDITIONS, "must have other names than z, t, planned", z=[1], t=[1], planned=[1]),
    *each(
        as_torchsde(CRITICAL, (3,)).pack, r"shape \(B, 2, 3\)", state=map(ZEROS, [(4,), (4, 1, 3)])
    ),
    # Observations and scores given one.
    *each(GIVEN, y=[X[0] * NAN], noise_std=[-1.0]),
    *each(MASKED, mask=[~MASK], y=[ONES(3)]),
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
    *types([ANY_SCORE, score.ConditionalScore], "wrap it: DenoiserScore", score=[DENOISED()]),
    *each(observed, "must be linear", forward=[lambda x: x**2]),
    *each(observed, r"forward\(0\) ≠ 0", forward=[lambda x: x + 1]),
    *each(observed, "each sample separately", forward=[lambda x: x - x.mean(0)]),
    *each(partial(observed, lambda x: x), "y must have shape", y=[ONES(3)]),
    *types(observed, "autograd can differentiate", forward=[lambda x: x.detach()]),
    *each(OF_FLOW.check_times, "earlier than 1 for a PosteriorScore", t=[DOUBLE]),
]


@pytest.mark.parametrize(("call", "error", "message"), ROWS)
def test_bad_arguments_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()
