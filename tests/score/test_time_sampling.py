"""Importance sampling of training times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, MixedScore, SubVPSDE
from cldsde.score import PerturbedData, TimeSampler, log_snr_density, optimal_loss
from score.exact import Constant

Density = Callable[[torch.Tensor], torch.Tensor]
DENSITIES: dict[str, tuple[Density, float]] = {
    "uniform": (torch.ones_like, 1e-3),
    "log-uniform": (lambda t: 1 / t, 1e-5),
    "rising": (lambda t: t, 1e-3),
    "peaked": (lambda t: 1e-3 + torch.exp(-200 * (t - 0.3) ** 2), 1e-3),
    "spanning 1e-200 to 1": (lambda t: torch.exp(-460 * (1 - t)), 1e-3),
    "spanning 1e15 to 1": (lambda t: t**-5, 1e-3),
}
every_density = pytest.mark.parametrize("name", list(DENSITIES))
# Densities with which every loss below has a finite variance that a sample of this size can see.
BENIGN = ["uniform", "log-uniform", "rising", "peaked"]

LOSSES: dict[str, tuple[Density, Callable[[float], float]]] = {
    "1": (torch.ones_like, lambda t: t),
    "t": (lambda t: t, lambda t: t**2 / 2),
    "sqrt(t)": (torch.sqrt, lambda t: 2 * t**1.5 / 3),
    "cos(5 t)": (lambda t: torch.cos(5 * t), lambda t: math.sin(5 * t) / 5),
}


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("name", BENIGN)
def test_weighted_losses_are_unbiased(name: str, loss: str) -> None:
    density, t_min = DENSITIES[name]
    sampler = TimeSampler(density, t_min)
    function, primitive = LOSSES[loss]
    g = torch.Generator().manual_seed(0)
    means = []
    for _ in range(200):
        t, weight = sampler.sample(500, generator=g)
        means.append((weight * function(t)).mean())
    estimates = torch.stack(means)
    expected = (primitive(1.0) - primitive(t_min)) / (1 - t_min)
    # 5 standard errors from the scatter of 200 independent estimates; rounding, for a constant.
    error = 5 * estimates.std().item() / math.sqrt(200) + 1e-12
    assert estimates.mean().item() == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("name", BENIGN)
def test_draws_follow_the_density(name: str) -> None:
    density, t_min = DENSITIES[name]
    n = 20_000
    t, _ = TimeSampler(density, t_min).sample(n, generator=torch.Generator().manual_seed(0))
    t = t.sort().values
    grid = torch.logspace(math.log10(t_min), 0, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(density(grid), grid)
    share = torch.cat([mass.new_zeros(1), mass]) / mass[-1]
    inside = torch.searchsorted(grid, t).clamp(1, len(grid) - 1)
    # One draw in each n-th part: the empirical distribution is off by 1/n at most; the table of
    # 2,001 knots by (log(1/t_min)/2000)^2 of the density's curvature, some hundred at most.
    position = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (share[inside] - position).abs().max() <= 2 / n + 100 * (math.log(1e5) / 2000) ** 2 / 12


@every_density
def test_quantiles_rise_from_the_first_time_to_the_last(name: str) -> None:
    density, t_min = DENSITIES[name]
    sampler = TimeSampler(density, t_min)
    t, weight = sampler.quantiles(torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert t[0].item() == t_min
    assert (t.diff() >= 0).all()
    assert ((t >= t_min) & (t <= 1)).all()
    assert (weight > 0).all()
    assert weight.isfinite().all()


@every_density
def test_the_extreme_quantiles_are_the_ends(name: str) -> None:
    density, t_min = DENSITIES[name]
    sampler = TimeSampler(density, t_min)
    ends = torch.tensor([0.0, 1.0, math.nextafter(1.0, 0.0), 5e-324], dtype=torch.float64)
    t, weight = sampler.quantiles(ends)
    assert t[:2].tolist() == [t_min, 1.0]
    assert t.isfinite().all()
    assert weight.isfinite().all()


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_each_part_of_the_distribution_gets_one_draw(n: int) -> None:
    t, weight = TimeSampler(torch.ones_like, 1e-3).sample(
        n, generator=torch.Generator().manual_seed(0)
    )
    assert t.shape == weight.shape == (n,)
    assert t.dtype == weight.dtype == torch.float64
    part = ((t - 1e-3) / (1 - 1e-3) * n).floor()
    # The table's linear interpolation is exact for a uniform density, up to rounding at the edges.
    assert part.sort().values.tolist() == list(range(n))


def test_the_parts_come_in_random_order() -> None:
    # Otherwise the first datum of a batch would always meet the earliest time.
    sampler, g = TimeSampler(torch.ones_like, 1e-3), torch.Generator().manual_seed(0)
    first = torch.stack([sampler.sample(10, generator=g)[0][0] for _ in range(2000)])
    # A mean of 2,000 uniform times, five standard errors.
    assert first.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 2000))


def test_a_seed_decides_the_draw() -> None:
    sampler = TimeSampler(lambda t: 1 / t, 1e-3)

    def draw(seed: int) -> torch.Tensor:
        return sampler.sample(10, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("make", [VPSDE, CLD])
def test_the_residual_variance_of_a_mixed_score_is_a_density(make: Any) -> None:
    sde = make()
    model = MixedScore(Constant(sde), sde, torch.zeros(()), torch.full((), 0.25))
    sampler = TimeSampler(model.residual_variance, 1e-5)
    t, weight = sampler.sample(1000, generator=torch.Generator().manual_seed(0))
    loss = weight * model.residual_variance(t)
    # Every time has the same share of the loss, but for the steps of the table: it has 2000 over
    # five decades, 0.58 % each, and the residual variance falls at most like t^-20 (VP at t = 1,
    # where it is exp(-B)), so that it is off by half of 20 times 0.58 % at a knot.
    assert (loss / loss.mean() - 1).abs().max() <= 0.06


def information(sde: LinearSDE, t: torch.Tensor, conditioning: str) -> torch.Tensor:
    """H = 1/2 log(det Sigma_ref / det Sigma_cond) of unit-variance data, -dH/dt the least loss."""
    if conditioning == "data":
        kernel = sde.marginal(t)
        c = torch.linalg.solve_triangular(kernel.root, kernel.mean[..., :1], upper=False)
        return 0.5 * c.square().sum((-2, -1)).log1p()
    start = sde.initial_covariance.clone()
    start[0, 0] += 1
    roots = sde.marginal(t, initial_covariance=start).root, sde.transition(0.0, t).root
    reference, given = (root.diagonal(dim1=-2, dim2=-1).log().sum(-1) for root in roots)
    return reference - given


def likelihood_sampler(sde: LinearSDE, conditioning: Any) -> TimeSampler:
    return TimeSampler.importance(sde, T_MIN, conditioning=conditioning, weighting="likelihood")


T_MIN = 1e-5
SPACING = math.log(1 / T_MIN) / 2000  # of the table's logarithms


@pytest.mark.parametrize("conditioning", ["data", "all"])
@pytest.mark.parametrize("make", [VPSDE, CLD, HOLD])
class TestImportance:
    """Times at which the least loss is the same share of the whole."""

    def test_the_weighted_loss_is_nearly_constant(self, make: Any, conditioning: Any) -> None:
        sde = make()
        sampler = likelihood_sampler(sde, conditioning)
        t, weight = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
        loss = weight * optimal_loss(sde, t, conditioning=conditioning, weighting="likelihood")
        # Draws are uniform between knots, and a loss like t^-p varies there by p times the spacing,
        # a standard deviation of p / sqrt(12) spacings: one spacing for p <= 3.4. Larger powers,
        # up to 20, occur near t = 1 alone, where hardly a draw falls.
        assert loss.std() <= SPACING * loss.mean()
        assert (loss / loss.mean() - 1).abs().max() <= 0.06

    def test_draws_share_the_information_evenly(self, make: Any, conditioning: Any) -> None:
        sde = make()
        u = torch.linspace(0, 1, 1001, dtype=torch.float64)
        t, _ = likelihood_sampler(sde, conditioning).quantiles(u)
        H = information(sde, t, conditioning)
        # The trapezoidal rule is off by p (p + 1) / 12 squared spacings of a loss like t^-p, less
        # than twice 20 / 12 with p <= 4 wherever there is mass; interpolation by less: a bin's
        # share, 1/100 at most, times p / 8 spacings.
        share = (H[0] - H) / (H[0] - H[-1])
        assert (share - u).abs().max() <= 20 / 6 * SPACING**2 + 0.01 * 4 / 8 * SPACING

    def test_the_weighted_loss_averages_to_the_information(
        self, make: Any, conditioning: Any
    ) -> None:
        sde = make()
        sampler = likelihood_sampler(sde, conditioning)
        u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        t, weight = sampler.quantiles(u)
        loss = weight * optimal_loss(sde, t, conditioning=conditioning, weighting="likelihood")
        ends = information(sde, torch.tensor([T_MIN, 1.0], dtype=torch.float64), conditioning)
        expected = float(ends[0] - ends[1]) / (1 - T_MIN)
        # As the shares above, and the midpoint rule of 10,000 shares on values that vary by 6 %.
        assert loss.mean().item() == pytest.approx(expected, rel=4 * SPACING**2 + 0.06 / 1e3)

    def test_any_weighting_may_be_balanced(self, make: Any, conditioning: Any) -> None:
        sde = make()
        for weighting in ("reweighted", lambda t: 1 / (t + 0.01), lambda t: t):
            sampler = TimeSampler.importance(
                sde, 1e-3, data_variance=0.5, conditioning=conditioning, weighting=weighting
            )
            t, weight = sampler.sample(2000, generator=torch.Generator().manual_seed(0))
            loss = weight * optimal_loss(
                sde, t, data_variance=0.5, conditioning=conditioning, weighting=weighting
            )
            # As above, 2000 steps over three decades.
            assert (loss / loss.mean() - 1).abs().max() <= 0.06


@pytest.mark.parametrize("weighting", [lambda t: 0 * t, lambda t: -t, lambda t: t * math.nan])
def test_weightings_without_mass_are_refused(weighting: Any) -> None:
    with pytest.raises(ValueError, match="one finite, positive value per time"):
        TimeSampler.importance(CLD(), 1e-3, weighting=weighting)


def test_importance_passes_refusals_on() -> None:
    with pytest.raises(ValueError, match="data_variance"):
        TimeSampler.importance(CLD(), 1e-3, data_variance=0.0)
    with pytest.raises(ValueError, match="conditioning"):
        TimeSampler.importance(CLD(), 1e-3, conditioning="velocity")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weighting"):
        TimeSampler.importance(CLD(), 1e-3, weighting="uniform")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sde must be a LinearSDE"):
        TimeSampler.importance(CLD, 1e-3)  # type: ignore[arg-type]


class TestRefusals:
    """What is no density and no share."""

    @pytest.mark.parametrize("t_min", [0.0, -1e-3, 0.6, 1.0, math.nan, math.inf])
    def test_the_smallest_time_is_checked(self, t_min: float) -> None:
        with pytest.raises(ValueError, match="t_min must lie in"):
            TimeSampler(torch.ones_like, t_min)

    @pytest.mark.parametrize(
        "density",
        [
            lambda t: 0 * t,
            lambda t: -t,
            lambda t: t - 0.5,
            lambda t: t * math.nan,
            lambda t: t * math.inf,
            lambda t: t.sum(),
            lambda t: t[1:],
            lambda t: 1.0,
        ],
    )
    def test_densities_have_to_be_finite_and_positive(self, density: Any) -> None:
        with pytest.raises(ValueError, match="one finite, positive value per time"):
            TimeSampler(density, 1e-3)

    @pytest.mark.parametrize("u", [-0.1, 1.1, math.nan])
    def test_shares_lie_between_zero_and_one(self, u: float) -> None:
        with pytest.raises(ValueError, match=r"u must lie in \[0, 1\]"):
            TimeSampler(torch.ones_like, 1e-3).quantiles(torch.tensor([0.5, u]).double())


class TestNoiseLevels:
    """Times and weights by the signal-to-noise ratio."""

    @pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD])
    def test_the_density_is_that_of_normal_noise_levels(self, make: Any) -> None:
        sde, mean, std = make(), 0.4, 1.7
        t = torch.logspace(-3, -0.01, 40, dtype=torch.float64)
        h = 1e-3 * t
        kappa, density = sde.log_snr, log_snr_density(sde, mean=mean, std=std)(t)
        # The five-point rule: h⁴ f⁽⁵⁾/30, with f changing over t itself.
        slope = (8 * (kappa(t + h) - kappa(t - h)) - (kappa(t + 2 * h) - kappa(t - 2 * h))) / (
            12 * h
        )
        normal = torch.exp(-0.5 * ((kappa(t) - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        assert torch.allclose(density, -slope * normal, rtol=1e-8, atol=0)

    def test_a_closed_form_of_vp(self) -> None:
        # With S = e^{−B}: κ = ½ log S/(1 − S) and −dκ/dt = β/(2 (1 − S)).
        t = torch.tensor([1e-4, 0.03, 0.5, 1.0], dtype=torch.float64)
        beta = 0.1 + 19.9 * t
        kept = torch.exp(-0.1 * t - 9.95 * t**2)
        kappa = 0.5 * torch.log(kept / (1 - kept))
        wanted = beta / (2 * (1 - kept)) * torch.exp(-((kappa - 1.2) ** 2) / 2.88)
        wanted /= 1.2 * math.sqrt(2 * math.pi)
        found = log_snr_density(VPSDE())(t)
        assert torch.allclose(found, wanted, rtol=1e-11, atol=0)

    @pytest.mark.parametrize("inputs", ["state", "estimate"])
    @pytest.mark.parametrize("make", [VPSDE, VESDE, CLD, PSLD])
    def test_the_loss_is_the_error_of_the_output_over_noise_levels(
        self, make: Any, inputs: Any
    ) -> None:
        """On Gaussian data the target is standard normal; an output c is wrong by 1 + c²."""
        sde, c, n, t_min = make(), 0.7, 40_000, 1e-3
        network = Constant(sde if inputs == "state" else VPSDE(), c)
        model = MixedScore(network, sde, 0.5, 0.3, inputs=inputs)
        g = torch.Generator().manual_seed(0)
        x0 = 0.5 + math.sqrt(0.3) * torch.randn(n, 1, generator=g, dtype=torch.float64)
        t, weight = TimeSampler(log_snr_density(sde), t_min).sample(n, generator=g)
        pair = PerturbedData.draw(sde, x0, t, generator=g)
        losses = weight * model.loss(pair, weighting=model.log_snr_weighting())
        normal = torch.distributions.Normal(1.2, 1.2)
        start, end = sde.log_snr(torch.tensor([t_min, 1.0], dtype=torch.float64))
        seen = float(normal.cdf(start) - normal.cdf(end)) / (1 - t_min)
        error = 5 * float(losses.std()) / math.sqrt(n)
        # Times are drawn from a density that is constant between knots, log t/300 apart.
        assert float(losses.mean()) == pytest.approx((1 + c**2) * seen, abs=error, rel=1e-4)

    @pytest.mark.parametrize("times", [0.3, [0.01, 0.3, 0.9]])
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD])
    def test_the_loss_takes_the_weights_from_what_it_has_found(
        self, make: Any, times: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same numbers as of any function of times, and no further law where there are many."""
        sde = make()
        model, x0 = MixedScore(Constant(sde, 0.7), sde, 0.5, 0.3), torch.zeros(3, 1)
        weighting = model.log_snr_weighting()
        t = torch.tensor(times, dtype=torch.float64)
        pair = PerturbedData.draw(sde, x0, t, generator=torch.Generator().manual_seed(0))
        wanted = model.loss(pair, weighting=weighting.__call__)
        if t.ndim:
            monkeypatch.setattr(type(sde), "marginal", None)
        assert torch.equal(model.loss(pair, weighting=weighting), wanted)

    @pytest.mark.parametrize("std", [0.2, 0.6, 1.2])
    @pytest.mark.parametrize("sde", [VPSDE(), CLD(beta=8.0), PSLD(), HOLD()], ids=repr)
    def test_tails_that_rounding_would_lose_are_drawn(self, sde: LinearSDE, std: float) -> None:
        sampler = TimeSampler(log_snr_density(sde, std=std), 1e-3)
        u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        t, weight = sampler.quantiles(u)
        assert bool((weight.isfinite() & (weight > 0)).all())
        kappa = sde.log_snr(t)
        # Midpoints of 1e5 shares, of a density that is constant between knots.
        assert float(kappa.mean()) == pytest.approx(1.2, abs=0.02)
        assert float(kappa.std()) == pytest.approx(std, rel=0.03)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"mean": math.nan}, "mean"), ({"std": 0.0}, "std"), ({"std": -1.0}, "std")],
    )
    def test_levels_that_are_none_are_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            log_snr_density(CLD(), **options)
