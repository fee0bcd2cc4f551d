"""Velocity and flow predictions of processes with one component, and training on them."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from cldsde import VESDE, VPSDE, CosineVP, MixedScore, RectifiedFlow, ReverseProcess, SubVPSDE
from cldsde.score import (
    Conversion,
    GaussianMixture,
    PerturbedData,
    TimeSampler,
    flow_log_prob,
    optimal_loss,
)
from cldsde.score.time_sampling import kappa_density, logit_normal_density, mode_density
from probes import generator, normals, tensor
from tolerances import rounding

RATIO = rounding(100, 1e4)
"""Roundings of differences of numbers 1e4 times as large: noise and data, divided by 1/sigma^2."""
LEFT = math.exp(-10)  # of the data at the last regular time, where the clock is clamped
APPROACH = 1e-7  # a hundred times the step to the end
PROCESSES = [RectifiedFlow(), CosineVP(), VPSDE(), SubVPSDE(), VESDE()]
singular = pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()], ids=repr)
TARGETS = ["score", "noise", "data", "velocity", "flow"]


@pytest.mark.parametrize("t", [1e-8, 0.3, 1.0])
def test_velocity_and_flow_of_each_other_keep_their_digits_at_both_ends(t):
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


@singular
@pytest.mark.parametrize("kinds", [("flow", "velocity"), ("velocity", "flow")])
def test_losses_in_terms_of_another_prediction_are_finite_at_the_end(sde, kinds):
    losses, (prediction, measured) = [], kinds
    output = torch.full((6, 1, 2), 0.3, dtype=torch.float64)
    for t in (1 - 1e-9, 1.0):
        pair = PerturbedData.draw(sde, normals(0, 6, 2), t, generator=generator())
        losses.append(pair.loss(output, prediction, measured=measured))
        converted = Conversion.at(sde, t, prediction, measured)(pair.z, output)
        expected = pair.loss(converted, measured)
        assert torch.allclose(losses[-1], expected, rtol=RATIO, atol=0)
    assert torch.allclose(*losses, rtol=APPROACH, atol=0)
    # The data have no likelihood loss at the end.
    assert not pair.loss(pair.x0 + 1, "data", weighting="likelihood").any()


class Tanh(nn.Module):
    def forward(self, x, clock):
        self.clock = clock
        return torch.tanh(x + 0.1 * clock.reshape(-1, *(1,) * (x.ndim - 1)))


def model_of(sde, **options):
    return MixedScore(Tanh(), sde, 0.2, 0.36, **options)


Z = normals(0, 4, 1, 2, 3)


@pytest.mark.covering
@pytest.mark.parametrize("logits", [None, torch.tensor(-1.0)])
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_predictions_of_a_mixed_score_follow_from_its_score(sde, prediction, logits):
    model = model_of(sde, mixing_logits=logits)
    expected = Conversion.at(sde, 0.6, "score", prediction)(Z, model(Z, 0.6))
    found = model(Z, 0.6, prediction=prediction)
    assert torch.allclose(found, expected, rtol=RATIO, atol=RATIO)


@pytest.mark.parametrize("inputs", ["state", "estimate"])
@singular
def test_predictions_are_finite_and_continuous_at_the_end(sde, inputs):
    model = model_of(sde, inputs=inputs)
    for prediction in TARGETS:
        end, near = (model(Z, t, prediction=prediction) for t in (1.0, 1 - 1e-6))
        assert torch.allclose(end, near, rtol=0, atol=2 * LEFT)
    assert torch.equal(model.data_prediction(Z, 1.0), model(Z, 1.0, prediction="data"))
    assert model.network.clock.tolist() == [-10.0] * 4


# Densities of times of Esser et al. (2024)


def test_logits_are_normal():
    """For rectified flow the logit of a time is minus half the log of its SNR."""
    t = tensor([0.01, 0.3, 0.5, 0.97])
    expected = kappa_density(RectifiedFlow(), mean=0.5, std=0.6)(t)
    found = logit_normal_density(mean=-0.5, std=0.6)(t)
    assert torch.allclose(found, expected, rtol=rounding(1000), atol=0)


@pytest.mark.parametrize("scale", [-0.5, 1.29])
def test_times_are_the_map_of_uniform_numbers(scale):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    slope = 1 + scale * (1 - math.pi / 2 * (math.pi * u).sin())
    # The map is inverted to 60 bits; errors are divided by the slope, which is at least 1e-3.
    found = mode_density(scale)(t) * slope
    assert torch.allclose(found, torch.ones_like(u), rtol=0, atol=rounding(100, 1e3))


@singular
def test_importance_sampling_takes_singular_ends(sde):
    densities = [
        partial(model_of(sde).residual_variance, prediction="flow"),
        partial(optimal_loss, sde),
        partial(optimal_loss, sde, weighting="likelihood"),
        kappa_density(sde),
    ]
    for density in densities:
        t, weight = TimeSampler(density, 1e-3).sample(1000, generator=generator())
        assert (t < 1).all()
        assert weight.isfinite().all()
