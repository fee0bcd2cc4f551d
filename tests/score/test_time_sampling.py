"""Importance sampling of training times."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, MixedScore
from cldsde.score import PerturbedData, TimeSampler, kappa_density, optimal_loss
from probes import generator
from score.cases import FAMILIES, Constant
from tolerances import order_of, standard_error

DENSITIES = {
    "uniform": (torch.ones_like, 1e-3),
    "log-uniform": (lambda t: 1 / t, 1e-5),
    "rising": (lambda t: t, 1e-3),
    "peaked": (lambda t: 1e-3 + torch.exp(-200 * (t - 0.3) ** 2), 1e-3),
}
HALF_START = 5e-4  # half of t_min
TAILS = 0.03  # of levels beyond the interval, at least 1.9 standard deviations away


def spacing(t_min):
    """Distance in log t of the table's 2,000 knots."""
    return math.log(1 / t_min) / 2000


@pytest.mark.parametrize("name", DENSITIES)
def test_weighted_losses_are_unbiased_and_weights_inverse_to_the_density(name):
    (density, t_min), g = DENSITIES[name], generator()
    sampler = TimeSampler(density, t_min)
    draws = (sampler.sample(500, generator=g) for _ in range(100))
    means = torch.stack([(weight * torch.cos(5 * t)).mean() for t, weight in draws])
    expected = (math.sin(5) - math.sin(5 * t_min)) / 5 / (1 - t_min)
    error = standard_error(means.std().item(), 100)
    assert means.mean().item() == pytest.approx(expected, abs=error)
    t, weight = sampler.sample(20_000, generator=g)
    constant = weight * density(t)
    # The logarithm of the density has a slope below 20 in log t between two knots.
    assert (constant / constant.mean() - 1).abs().max() <= 20 * spacing(t_min)


def test_each_part_of_the_distribution_gets_one_time_in_random_order():
    # Otherwise the first datum of a batch would always meet the earliest time.
    sampler, g, n = TimeSampler(torch.ones_like, 1e-3), generator(), 500
    t = torch.stack([sampler.sample(10, generator=g)[0] for _ in range(n)])
    part = ((t - 1e-3) / (1 - 1e-3) * 10).floor()
    assert torch.equal(part.sort().values, torch.arange(10.0).double().expand(n, 10))
    error = standard_error(math.sqrt(1 / 12), n) + HALF_START
    assert t[:, 0].mean().item() == pytest.approx(0.5, abs=error)


@pytest.mark.parametrize("conditioning", ["data", "all"])
@pytest.mark.parametrize("make", [VPSDE, HOLD])
def test_the_least_loss_is_balanced_with_any_weighting(make, conditioning):
    for weighting in ("reweighted", "likelihood", lambda t: 1 / (t + 0.01)):
        options = {"data_variance": 0.5, "conditioning": conditioning, "weighting": weighting}
        sampler, step = TimeSampler.importance(make(), 1e-3, **options), spacing(1e-3)
        t, weight = sampler.sample(2000, generator=generator())
        loss = weight * optimal_loss(make(), t, **options)
        # Half of the largest power, 20 (VP at t = 1), times the spacing.
        assert (loss / loss.mean() - 1).abs().max() <= 10 * step


@pytest.mark.parametrize("inputs", ["state", "estimate"])
@pytest.mark.parametrize("make", [VPSDE, CLD, PSLD])
def test_the_loss_is_the_error_of_the_output_over_noise_levels(make, inputs):
    """On Gaussian data the target is standard normal; an output c is wrong by 1 + c²."""
    sde, c, n, t_min, g = make(), 0.7, 10_000, 1e-3, generator()
    network = Constant(sde if inputs == "state" else VPSDE(), c)
    model = MixedScore(network, sde, 0.5, 0.3, inputs=inputs)
    x0 = 0.5 + math.sqrt(0.3) * torch.randn(n, 1, generator=g, dtype=torch.float64)
    t, weight = TimeSampler(kappa_density(sde), t_min).sample(n, generator=g)
    pair = PerturbedData.draw(sde, x0, t, generator=g)
    losses = weight * model.loss(pair, weighting=model.kappa_weighting())
    normal = torch.distributions.Normal(1.2, 1.2)
    start, end = sde.kappa(torch.tensor([t_min, 1.0], dtype=torch.float64))
    seen = float(normal.cdf(start) - normal.cdf(end)) / (1 - t_min)
    error = standard_error(float(losses.std()), n) + order_of(spacing(t_min), 2, 10)
    assert float(losses.mean()) == pytest.approx((1 + c**2) * seen, abs=error)


@pytest.mark.parametrize(("name", "std"), [*((name, 0.2) for name in FAMILIES), ("HOLD", 1.2)])
def test_noise_levels_are_normal_also_if_rounding_would_lose_the_tails(name, std):
    sde = FAMILIES[name]
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    sampler = TimeSampler(kappa_density(sde, std=std), 1e-5)
    t, weight = sampler.quantiles(u)
    assert bool((weight.isfinite() & (weight > 0)).all())
    assert bool((t.diff() >= 0).all())
    assert sampler.quantiles(torch.tensor([0.0, 1.0]))[0].tolist() == [1e-5, 1.0]
    kappa = sde.kappa(t)
    assert float(kappa.mean()) == pytest.approx(1.2, abs=TAILS * std)
    assert float(kappa.std()) == pytest.approx(std, rel=TAILS, abs=0)
