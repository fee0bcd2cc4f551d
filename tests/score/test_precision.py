"""Scores at times that solvers know, of states in double, single and half precision.

A score multiplies the residual z − ψ x̂₀ by an inverse covariance, which amplifies rounding by about
e^κ. Scores therefore compute in single precision at least and round their result once, which leaves
one rounding of a half-precision type: half an eps, the unit roundoff. The arithmetic has the
amplified error of its own precision (`score_rounding`).
"""

from functools import partial

import pytest
import torch

from cldsde import DenoiserScore, GuidedScore, MixedScore, Observation, RectifiedFlow
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.paths import NoisePath
from cldsde.score import ConditionalScore, PosteriorScore, PredictionDenoiser, ScoreDenoiser
from cldsde.score.times import KnownTimes
from probes import generator
from score.cases import COMMON, MODES, called, mixture, normal_denoiser, score_rounding
from tolerances import rounding

PROCESSES = {**COMMON, "rectified flow": RectifiedFlow()}
UNIT = 0.5  # unit roundoff in units of eps
QUARTER = torch.tensor(0.25)
denoiser = partial(normal_denoiser, variance=QUARTER)


class Network(torch.nn.Module):
    """A smooth network without parameters."""

    def __init__(self, sde, inputs="state"):
        super().__init__()
        self.share = len(sde.driven) if inputs == "state" else 1

    def forward(self, z, clock):
        return 0.3 * torch.sin(z[:, : 2 * self.share] + 0.1 * clock.reshape(-1, 1))


def network_denoiser():
    path = NoisePath(torch.ones_like, lambda t: t, interval=(1e-3, 1e3))
    return PredictionDenoiser(lambda x, clock: 0.1 * x.sin(), path, "data", clock="log_snr")


def guided(sde):
    base = DenoiserScore(denoiser, sde)
    return GuidedScore(*(ConditionalScore(base, variance=x * QUARTER) for x in (1, 2)), 7.5)


def posterior(sde):
    seen = Observation.mask(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), 0.3)
    return PosteriorScore(DenoiserScore(denoiser, sde), seen, "pigdm")


SCORES = {
    "denoiser": lambda sde: DenoiserScore(denoiser, sde),
    "network": lambda sde: DenoiserScore(network_denoiser(), sde),
    "mixture": MODES.score,
    "degenerate mixture": lambda sde: mixture("degenerate").score(sde),
    "mixed": lambda sde: MixedScore(Network(sde), sde, 0.1, 0.5),
    "mixed, of the estimate": lambda sde: MixedScore(
        Network(sde, "estimate"), sde, 0.1, 0.5, inputs="estimate"
    ),
    "convex": lambda sde: MixedScore(Network(sde), sde, 0.1, 0.5, mixing_logits=torch.tensor(-1.0)),
    "another process": lambda sde: DenoiserScore(
        ScoreDenoiser(MODES.score(COMMON["CLD"]), fill=False, start=1e-4), sde
    ),
    "guided": guided,
    "posterior": posterior,
}


@pytest.mark.one_in(11)
@pytest.mark.parametrize("kappa", [-4.5, 0.0, 5.0])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_error_is_a_few_roundings_of_the_states_type(process, name, kappa):
    sde = PROCESSES[process]
    t = times_of_kappa(sde, torch.tensor([kappa], dtype=torch.float64))
    if abs(float(sde.kappa(t)) - kappa) > 1e-6:
        pytest.skip("the process does not reach this level")
    score = SCORES[name](sde)
    x = MODES.sample(3, generator=generator(), dtype=torch.float64)
    z = sde.perturb(x, t[0], generator=generator(1))[0]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rounded = z.to(dtype)
        if not bool(rounded.isfinite().all()):
            continue  # a large state of VE in half precision
        found = called(score, rounded, KnownTimes(t).arguments(rounded)[0])
        expected = score(rounded.to(torch.float64), t[0])
        assert found.dtype == dtype
        error = (found.to(torch.float64) - expected).abs().max() / expected.abs().max()
        inside = torch.promote_types(dtype, torch.float32)
        amplified = score_rounding(sde, t[0]) * rounding(1, dtype=inside) / rounding(1)
        assert error <= rounding(UNIT, dtype=dtype) + amplified, dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_a_denoiser_of_a_network_rounds_once(sigma, dtype):
    path = NoisePath(torch.ones_like, lambda t: t, interval=(1e-3, 1e3))
    made = PredictionDenoiser(lambda x, clock: x / (1 + sigma), path, "noise", clock="log_snr")
    u = torch.randn(50, 3, generator=generator(), dtype=torch.float64).to(dtype)
    found, expected = made(u, sigma).double(), made(u.double(), sigma)
    # The estimate u − σ n cancels by less than a factor of 1 + σ in single precision.
    lost = rounding(8, 1 + sigma, torch.float32)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= rounding(UNIT, dtype=dtype) + lost
