"""Velocity and flow predictions of processes with one component, and training on them."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from torch import nn
from torch.distributions import SigmoidTransform

from cldsde import VESDE, VPSDE, CosineVP, MixedScore, RectifiedFlow, ReverseProcess, SubVPSDE
from cldsde.score import Conversion, GaussianMixture, PerturbedData, TimeSampler, flow_log_prob
from cldsde.score.time_sampling import log_snr_density, logit_normal_density, mode_density
from probes import generator, normals
from tolerances import rounding

DIGITS = 40
RATIO = rounding(100, 1e4)
"""Roundings of differences of numbers 1e4 times as large: noise and data, divided by 1/sigma^2."""
LEFT = math.exp(-10)  # of the data at the last regular time, where the clock is clamped
APPROACH = 1e-7  # a hundred times the step to the end
STORED = 1e-7  # a variance in single precision


def vp_paths(t):
    clock = mp.mpf(0.1) * t + mp.mpf(19.9) * t**2 / 2
    return mp.exp(-clock / 2), mp.sqrt(1 - mp.exp(-clock))


CASES = {
    "rectified flow": (RectifiedFlow(), lambda t: (1 - t, t)),
    "cosine": (CosineVP(), lambda t: (mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2))),
    "VP": (VPSDE(), vp_paths),
    "sub-VP": (SubVPSDE(), lambda t: (vp_paths(t)[0], vp_paths(t)[1] ** 2)),
    "VE": (VESDE(), lambda t: (mp.mpf(1), mp.mpf(0.01) * (mp.mpf(50) / mp.mpf(0.01)) ** t)),
}
every_case = pytest.mark.parametrize("name", CASES)
singular = pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()], ids=repr)
TARGETS = ["score", "noise", "data", "velocity", "flow"]


def forms(name, t, x, x0):
    """Every form of the prediction x0 at the state x, by the definitions, and alpha / sigma."""
    with mp.workdps(DIGITS):
        at, path = mp.mpf(t), CASES[name][1]
        alpha, sigma = path(at)
        alpha_rate, sigma_rate = (mp.diff(lambda u, i=i: path(u)[i], at) for i in (0, 1))
        noise = (mp.mpf(x) - alpha * mp.mpf(x0)) / sigma
        values = {
            "data": mp.mpf(x0),
            "noise": noise,
            "score": -noise / sigma,
            "full_score": -noise / sigma,
            "velocity": alpha * noise - sigma * mp.mpf(x0),
            "flow": alpha_rate * mp.mpf(x0) + sigma_rate * noise,
        }
        return {kind: float(value) for kind, value in values.items()}, float(alpha / sigma)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("t", [1e-3, 0.05, 0.4, 0.9, 1.0])
@every_case
def test_every_form_follows_from_every_other(name, t):
    sde, x, x0 = CASES[name][0], 0.7, -1.3
    values, ratio = forms(name, t, x, x0)
    kinds = ["data", "velocity", "flow"] if t == 1 and sde.regular_until < 1 else list(values)
    z = torch.tensor([[[x]]], dtype=torch.float64)
    for source, target in itertools.product(kinds, repeat=2):
        given = z.new_full((1, 1) if source == "data" else (1, 1, 1), values[source])
        found = Conversion.at(sde, t, source, target)(z, given)
        # Between noise and data digits are lost in the ratio of the two, either way, relative to
        # the larger of the forms.
        loss = max(ratio, 1 / ratio if ratio > 1e-9 else 1.0)
        size = max(abs(values[source]), abs(values[target]), 1.0)
        assert abs(float(found) - values[target]) <= rounding(64, loss * size), (source, target)


@pytest.mark.parametrize("t", [1e-8, 1e-4, 0.3])
def test_velocity_and_flow_of_each_other_keep_their_digits_near_the_data(t):
    found = Conversion.at(RectifiedFlow(), t, "flow", "velocity")
    assert float(found.state) == pytest.approx(1 - 2 * t, rel=rounding(4), abs=0)
    assert float(found.value) == pytest.approx((1 - t) ** 2 + t**2, rel=rounding(4), abs=0)


@singular
def test_log_densities_follow_the_flow_up_to_the_singular_end(sde):
    data = GaussianMixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.1]], [[0.2]]])
    z = torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(-1, 1, 1)
    found = flow_log_prob(ReverseProcess(sde, data.score(sde)), z, 0.3, rtol=1e-7, atol=1e-7)
    # z reaches 4 at the last regular time.
    assert torch.allclose(found.log_prob, data.log_prob(sde, z, 0.3), rtol=0, atol=4 * LEFT)


def draw(sde, t):
    return PerturbedData.draw(sde, normals(0, 6, 2), t, generator=generator())


class TestTraining:
    @singular
    @pytest.mark.parametrize("kinds", [("flow", "velocity"), ("velocity", "flow")])
    def test_losses_in_terms_of_another_prediction_are_finite_at_the_end(self, sde, kinds):
        losses, (prediction, measured) = [], kinds
        output = torch.full((6, 1, 2), 0.3, dtype=torch.float64)
        for t in (1 - 1e-9, 1.0):
            pair = draw(sde, t)
            losses.append(pair.loss(output, prediction, measured=measured))
            converted = Conversion.at(sde, t, prediction, measured)(pair.z, output)
            expected = pair.loss(converted, measured)
            assert torch.allclose(losses[-1], expected, rtol=RATIO, atol=0)
        assert torch.allclose(*losses, rtol=APPROACH, atol=0)

    def test_the_data_have_no_likelihood_loss_at_the_end(self):
        pair = draw(RectifiedFlow(), 1.0)
        assert not pair.loss(pair.x0 + 1, "data", weighting="likelihood").any()


class Tanh(nn.Module):
    def forward(self, x, clock):
        self.clock = clock
        return torch.tanh(x + 0.1 * clock.reshape(-1, *(1,) * (x.ndim - 1)))


def model_of(sde, **options):
    return MixedScore(Tanh(), sde, 0.2, 0.36, **options)


Z = torch.randn(4, 1, 2, 3, generator=generator(), dtype=torch.float64)


class TestMixedScore:
    @pytest.mark.parametrize("logits", [None, torch.tensor(-1.0)])
    @pytest.mark.parametrize("prediction", TARGETS)
    @every_case
    def test_predictions_follow_from_its_score(self, name, prediction, logits):
        sde = CASES[name][0]
        model = model_of(sde, mixing_logits=logits)
        expected = Conversion.at(sde, 0.6, "score", prediction)(Z, model(Z, 0.6))
        found = model(Z, 0.6, prediction=prediction)
        assert torch.allclose(found, expected, rtol=RATIO, atol=RATIO)

    @pytest.mark.parametrize("inputs", ["state", "estimate"])
    @singular
    def test_they_are_finite_and_continuous_at_the_end(self, sde, inputs):
        model = model_of(sde, inputs=inputs)
        for prediction in TARGETS:
            end, near = (model(Z, t, prediction=prediction) for t in (1.0, 1 - 1e-6))
            assert torch.allclose(end, near, rtol=0, atol=2 * LEFT)
        assert torch.equal(model.data_prediction(Z, 1.0), model(Z, 1.0, prediction="data"))
        assert model.network.clock.tolist() == [-10.0] * 4

    @pytest.mark.parametrize("t", [0.1, 0.6, 1.0])
    @pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
    def test_residual_variance_is_the_loss_on_gaussian_data(self, prediction, t):
        # For rectified flow: noise n = (x - alpha x_0)/sigma, velocity and flow alpha n - sigma x_0
        # and n - x_0; x_0 given x has the variance s^2 sigma^2 / (sigma^2 + s^2 alpha^2).
        model = model_of(RectifiedFlow())
        found = float(model.residual_variance(torch.tensor([t], dtype=torch.float64), prediction))
        alpha, sigma, s2 = 1 - t, t, 0.36
        left = s2 * sigma**2 / (sigma**2 + s2 * alpha**2)
        factor = {"noise": alpha, "velocity": alpha**2 + sigma**2, "flow": 1.0}[prediction] / sigma
        assert found == pytest.approx(left * factor**2, rel=STORED, abs=rounding())


class TestTimeDensities:
    """Densities of Esser et al. (2024)."""

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (0.5, 1.4)])
    def test_logits_are_normal(self, mean, std):
        t = torch.tensor([0.01, 0.3, 0.5, 0.97], dtype=torch.float64)
        normal = torch.distributions.Normal(mean, torch.tensor(std, dtype=torch.float64))
        exact = torch.distributions.TransformedDistribution(normal, SigmoidTransform())
        for density in (
            logit_normal_density(mean=mean, std=std),
            log_snr_density(RectifiedFlow(), mean=-mean, std=std),
        ):
            expected = exact.log_prob(t).exp()
            assert torch.allclose(density(t), expected, rtol=rounding(1000), atol=0)

    @pytest.mark.parametrize("scale", [-0.5, 0.0, 0.81, 1.29, 1.75])
    def test_times_are_the_map_of_uniform_numbers(self, scale):
        u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        t = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        slope = 1 + scale * (1 - math.pi / 2 * (math.pi * u).sin())
        # The map is inverted to 60 bits; errors are divided by the slope, which is at least 1e-3.
        found = mode_density(scale)(t) * slope
        assert torch.allclose(found, torch.ones_like(u), rtol=0, atol=rounding(100, 1e3))

    @pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
    @singular
    def test_importance_sampling_takes_singular_ends(self, sde, prediction):
        model = model_of(sde)
        sampler = TimeSampler(lambda t: model.residual_variance(t, prediction), 1e-3)
        t, weight = sampler.sample(1000, generator=generator())
        assert (t < 1).all()
        assert weight.isfinite().all()
        for weighting in ("reweighted", "likelihood"):
            TimeSampler.importance(sde, 1e-3, weighting=weighting)
        TimeSampler(log_snr_density(sde), 1e-3)
