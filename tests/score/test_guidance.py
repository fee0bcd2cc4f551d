"""Classifier-free guidance of any two scores, and what it costs."""

import pytest
import torch

from cldsde import CLD, VPSDE, GaussianMixture, GuidedScore, RectifiedFlow, solvers
from cldsde.score import ConditionalScore, DenoiserScore
from probes import generator, start, tensor
from score.cases import Counting
from tolerances import rounding

CLOSE, SHAPE = rounding(100), (6, 2)


def pair(sde, network):
    score = DenoiserScore(network, sde)
    return [ConditionalScore(score, variance=torch.tensor(x)) for x in (0.5, 2.0)]


@pytest.mark.parametrize(("weight", "samples"), [(0.0, 6), (1.0, 6), (3.0, 12)])
@pytest.mark.parametrize("sde", [VPSDE(), CLD()])
def test_guidance_is_linear_and_batched(sde, weight, samples):
    """One call of twice the batch gives what two calls do, to rounding."""
    network, z, t = Counting(), start(sde, SHAPE), tensor(0.5).expand(6)
    given, free = pair(sde, network)
    guided = GuidedScore(given, free, weight)
    found = guided(z, t)
    assert (network.calls, network.samples) == (1, samples)
    assert guided.evaluations(t).tolist() == [samples // 6] * 6
    expected = free(z, 0.5) + weight * (given(z, 0.5) - free(z, 0.5))
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)


def test_outside_an_interval_of_noise_levels_the_conditional_score_alone_is_evaluated():
    sde, network = CLD(), Counting()
    given, free = pair(sde, network)
    guided, z = GuidedScore(given, free, 2.0, interval=(0.2, 2.0)), start(sde, SHAPE)
    ends = solvers.times_of_kappa(sde, -tensor([0.2, 2.0]).log())
    assert guided.evaluations(ends).tolist() == [1, 2]
    for level, weight in ((0.1, 1.0), (0.5, 2.0), (5.0, 1.0)):
        t = solvers.times_of_kappa(sde, -tensor(level).log())
        expected = free(z, t) + weight * (given(z, t) - free(z, t))
        network.samples = 0
        torch.testing.assert_close(guided(z, t), expected, rtol=CLOSE, atol=CLOSE)
        assert network.samples == 6 * weight


@pytest.mark.parametrize("interval", [None, (0.2, 2.0), (0.2, 0.3)])
@pytest.mark.parametrize(("before", "after"), [(0.0, 3.0), (3.0, 0.0), (1.0, 2.0)])
def test_weight_and_interval_can_be_set(before, after, interval):
    sde, network = CLD(), Counting()
    guided = GuidedScore(*pair(sde, network), before)
    z, t = start(sde, SHAPE), tensor(0.5).expand(6)
    guided(z, t)
    guided.weight, guided.interval = after, interval
    made = GuidedScore(*pair(sde, network), after, interval=interval)
    assert repr(guided) == repr(made)
    assert torch.equal(guided(z, t), made(z, t))
    times = tensor([0.05, 0.2, 0.5])
    assert torch.equal(guided.evaluations(times), made.evaluations(times))
    with pytest.raises(ValueError, match="weight must be finite; got inf"):
        guided.weight = float("inf")
    with pytest.raises(ValueError, match="interval must be two increasing"):
        guided.interval = (2.0, 1.0)
    assert (guided.weight, guided.interval) == (after, interval)


def test_samples_at_times_of_their_own_are_guided_one_by_one():
    sde = CLD()
    guided = GuidedScore(*pair(sde, Counting()), 2.0, interval=(0.2, 2.0))
    z, t = start(sde, SHAPE), torch.linspace(0.05, 0.9, 6, dtype=torch.float64)
    # If one of them is guided, both scores are evaluated for all.
    assert guided.evaluations(t.unsqueeze(0)).tolist() == [[2] * 6]
    apart = torch.cat([guided(z[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(guided(z, t), apart, rtol=CLOSE, atol=CLOSE)


def test_guidance_where_a_state_tells_nothing_of_the_data():
    """At t = 1 of a flow the data predictions are combined: with one Gaussian they are its mean."""
    sde = RectifiedFlow()
    scores = [GaussianMixture([1.0], [[mean]], [[[0.25]]]).score(sde) for mean in (2.0, -1.0)]
    guided = GuidedScore(*scores, 3.0)
    z = sde.prior.sample((5, 1), generator=generator(), dtype=torch.float64)
    expected = torch.full((5, 1), -1.0 + 3.0 * (2.0 + 1.0), dtype=torch.float64)
    torch.testing.assert_close(guided.data_prediction(z, 1.0), expected, rtol=rounding(), atol=0)
    outside = GuidedScore(*scores, 3.0, interval=(0.1, 0.5)).data_prediction(z, 1.0)
    assert torch.equal(outside, scores[0].data_prediction(z, 1.0))
