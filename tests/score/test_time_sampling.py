"""Importance sampling of training times."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, MixedScore
from cldsde.score import PerturbedData, TimeSampler, log_snr_density, optimal_loss
from probes import generator
from score.cases import FAMILIES, Constant
from tolerances import order_of, rounding, standard_error

DENSITIES = {
    "uniform": (torch.ones_like, 1e-3),
    "log-uniform": (lambda t: 1 / t, 1e-5),
    "rising": (lambda t: t, 1e-3),
    "peaked": (lambda t: 1e-3 + torch.exp(-200 * (t - 0.3) ** 2), 1e-3),
    "spanning 1e-200 to 1": (lambda t: torch.exp(-460 * (1 - t)), 1e-3),
    "spanning 1e15 to 1": (lambda t: t**-5, 1e-3),
}
BENIGN = ["uniform", "log-uniform", "rising", "peaked"]  # every loss below has a finite variance
LOSSES = {
    "1": (torch.ones_like, lambda t: t),
    "sqrt(t)": (torch.sqrt, lambda t: 2 * t**1.5 / 3),
    "cos(5 t)": (lambda t: torch.cos(5 * t), lambda t: math.sin(5 * t) / 5),
}
HALF_START = 5e-4  # half of t_min
TAILS = 0.03  # of levels beyond the interval, at least 1.9 standard deviations away


def spacing(t_min):
    """Distance in log t of the table's 2,000 knots."""
    return math.log(1 / t_min) / 2000


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", BENIGN)
def test_weighted_losses_are_unbiased_and_weights_inverse_to_the_density(name, loss):
    density, t_min = DENSITIES[name]
    function, primitive = LOSSES[loss]
    sampler, g = TimeSampler(density, t_min), generator()
    draws = (sampler.sample(500, generator=g) for _ in range(100))
    means = torch.stack([(weight * function(t)).mean() for t, weight in draws])
    expected = (primitive(1.0) - primitive(t_min)) / (1 - t_min)
    # Rounding for a constant.
    error = standard_error(means.std().item(), 100) + rounding(500)
    assert means.mean().item() == pytest.approx(expected, abs=error)
    t, weight = sampler.sample(20_000, generator=g)
    constant = weight * density(t)
    # The logarithm of the density has a slope below 20 in log t between two knots.
    assert (constant / constant.mean() - 1).abs().max() <= 20 * spacing(t_min)


@pytest.mark.parametrize("name", DENSITIES)
def test_quantiles_rise_from_the_first_time_to_the_last(name):
    density, t_min = DENSITIES[name]
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    ends = torch.tensor([5e-324, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    t, weight = TimeSampler(density, t_min).quantiles(torch.cat([u, ends]).sort().values)
    assert (t[0].item(), t[-1].item()) == (t_min, 1.0)
    assert (t.diff() >= 0).all()
    assert (weight > 0).all()
    assert weight.isfinite().all()


def test_each_part_of_the_distribution_gets_one_time():
    for n in (1, 7, 1000):
        t, weight = TimeSampler(torch.ones_like, 1e-3).sample(n, generator=generator())
        assert t.dtype == weight.dtype == torch.float64
        part = ((t - 1e-3) / (1 - 1e-3) * n).floor()
        assert part.sort().values.tolist() == list(range(n))


def test_the_parts_come_in_random_order():
    # Otherwise the first datum of a batch would always meet the earliest time.
    sampler, g, n = TimeSampler(torch.ones_like, 1e-3), generator(), 500
    first = torch.stack([sampler.sample(10, generator=g)[0][0] for _ in range(n)])
    error = standard_error(math.sqrt(1 / 12), n) + HALF_START
    assert first.mean().item() == pytest.approx(0.5, abs=error)


@pytest.mark.parametrize("conditioning", ["data", "all"])
@pytest.mark.parametrize("make", [VPSDE, CLD, HOLD])
def test_the_least_loss_is_balanced_with_any_weighting(make, conditioning):
    for weighting in ("reweighted", "likelihood", lambda t: 1 / (t + 0.01)):
        options = {"data_variance": 0.5, "conditioning": conditioning, "weighting": weighting}
        sampler, step = TimeSampler.importance(make(), 1e-3, **options), spacing(1e-3)
        t, weight = sampler.sample(2000, generator=generator())
        loss = weight * optimal_loss(make(), t, **options)
        # Half of the largest power, 20 (VP at t = 1), times the spacing.
        assert (loss / loss.mean() - 1).abs().max() <= 10 * step


class TestNoiseLevels:
    """Times and weights by the signal-to-noise ratio."""

    @pytest.mark.parametrize("name", FAMILIES)
    def test_noise_levels_are_normal(self, name):
        sde, mean, std = FAMILIES[name], 0.4, 1.7
        t = torch.logspace(-3, -0.01, 40, dtype=torch.float64)
        h, kappa = 1e-3 * t, sde.log_snr
        slope = (8 * (kappa(t + h) - kappa(t - h)) - (kappa(t + 2 * h) - kappa(t - 2 * h))) / 12 / h
        normal = torch.exp(-0.5 * ((kappa(t) - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        found = log_snr_density(sde, mean=mean, std=std)(t)
        # The five-point rule: h⁴ f⁽⁵⁾/30, with f changing over t itself; rounding over h.
        error = order_of(1e-3, 4, 1e4) if "underdamped" in name else order_of(1e-3, 4, 1e3)
        assert torch.allclose(found, -slope * normal, rtol=error + rounding(64, 1e3), atol=0)

    @pytest.mark.parametrize("inputs", ["state", "estimate"])
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD])
    def test_the_loss_is_the_error_of_the_output_over_noise_levels(self, make, inputs):
        """On Gaussian data the target is standard normal; an output c is wrong by 1 + c²."""
        sde, c, n, t_min, g = make(), 0.7, 10_000, 1e-3, generator()
        network = Constant(sde if inputs == "state" else VPSDE(), c)
        model = MixedScore(network, sde, 0.5, 0.3, inputs=inputs)
        x0 = 0.5 + math.sqrt(0.3) * torch.randn(n, 1, generator=g, dtype=torch.float64)
        t, weight = TimeSampler(log_snr_density(sde), t_min).sample(n, generator=g)
        pair = PerturbedData.draw(sde, x0, t, generator=g)
        losses = weight * model.loss(pair, weighting=model.log_snr_weighting())
        normal = torch.distributions.Normal(1.2, 1.2)
        start, end = sde.log_snr(torch.tensor([t_min, 1.0], dtype=torch.float64))
        seen = float(normal.cdf(start) - normal.cdf(end)) / (1 - t_min)
        error = standard_error(float(losses.std()), n) + order_of(spacing(t_min), 2, 10)
        assert float(losses.mean()) == pytest.approx((1 + c**2) * seen, abs=error)

    @pytest.mark.parametrize("std", [0.2, 1.2])
    @pytest.mark.parametrize("sde", [VPSDE(), CLD(beta=8.0), HOLD()], ids=repr)
    def test_tails_that_rounding_would_lose_are_sampled(self, sde, std):
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        t, weight = TimeSampler(log_snr_density(sde, std=std), 1e-3).quantiles(u)
        assert bool((weight.isfinite() & (weight > 0)).all())
        kappa = sde.log_snr(t)
        assert float(kappa.mean()) == pytest.approx(1.2, abs=TAILS * std)
        assert float(kappa.std()) == pytest.approx(std, rel=TAILS, abs=0)
