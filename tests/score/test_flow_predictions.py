"""Velocity and flow predictions of processes with one component, and training on them."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import nn

from cldsde import (
    CLD,
    VESDE,
    VPSDE,
    CosineVP,
    GaussianMixture,
    LinearSDE,
    MixedScore,
    RectifiedFlow,
    ReverseProcess,
    SubVPSDE,
)
from cldsde.score import (
    Conversion,
    PerturbedData,
    TimeSampler,
    evidence_lower_bound,
    flow_log_prob,
    log_snr_density,
    logit_normal_density,
    mode_density,
    score_matching_loss,
)

DIGITS = 40


def vp_paths(t: Any) -> tuple[Any, Any]:
    clock = mp.mpf(0.1) * t + mp.mpf(19.9) * t**2 / 2
    return mp.exp(-clock / 2), mp.sqrt(1 - mp.exp(-clock))


def sub_vp_paths(t: Any) -> tuple[Any, Any]:
    alpha, sigma = vp_paths(t)
    return alpha, sigma**2


CASES: dict[str, tuple[LinearSDE, Any]] = {
    "rectified flow": (RectifiedFlow(), lambda t: (1 - t, t)),
    "cosine": (CosineVP(), lambda t: (mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2))),
    "VP": (VPSDE(), vp_paths),
    "sub-VP": (SubVPSDE(), sub_vp_paths),
    "VE": (VESDE(), lambda t: (mp.mpf(1), mp.mpf(0.01) * (mp.mpf(50) / mp.mpf(0.01)) ** t)),
}
every_case = pytest.mark.parametrize("name", list(CASES))
KINDS = ["score", "noise", "data", "full_score", "velocity", "flow"]
AT_THE_END = ["data", "velocity", "flow"]


def forms(name: str, t: float, x: float, x0: float) -> tuple[dict[str, float], Any]:
    """What the prediction x0 at the state x is in each form, by the definitions."""
    with mp.workdps(DIGITS):
        at = mp.mpf(t)
        alpha, sigma = CASES[name][1](at)
        alpha_rate = mp.diff(lambda u: CASES[name][1](u)[0], at)
        sigma_rate = mp.diff(lambda u: CASES[name][1](u)[1], at)
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


@every_case
@pytest.mark.parametrize("t", [1e-3, 0.05, 0.4, 0.9, 1.0])
def test_every_form_follows_from_every_other(name: str, t: float) -> None:
    sde, x, x0 = CASES[name][0], 0.7, -1.3
    values, ratio = forms(name, t, x, x0)
    kinds = AT_THE_END if t == 1 and sde.regular_until < 1 else KINDS
    z = torch.tensor([[[x]]], dtype=torch.float64)
    for source, target in itertools.product(kinds, repeat=2):
        given = z.new_full((1, 1) if source == "data" else (1, 1, 1), values[source])
        found = Conversion.at(sde, t, source, target)(z, given)
        # Between noise and data digits are lost in the ratio of the two, either way; a few dozen
        # roundings, among them those of derivatives, relative to the larger of the forms.
        loss = max(ratio, 1 / ratio if ratio > 1e-9 else 1.0)
        size = max(abs(values[source]), abs(values[target]), 1.0)
        error = abs(float(found) - values[target])
        assert error <= 64 * torch.finfo(torch.float64).eps * loss * size, (source, target)


@every_case
def test_the_flow_is_the_velocity_of_the_probability_flow(name: str) -> None:
    sde = CASES[name][0]
    data = GaussianMixture([0.3, 0.7], [[-1.0], [0.5]], [[[0.1]], [[0.02]]])
    x = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = Conversion.at(sde, 0.3, "data", "flow")(x, data.posterior_mean(sde, x, 0.3))
    expected = ReverseProcess(sde, data.score(sde)).probability_flow(x, 0.3)
    # A dozen roundings of numbers that differ in size by 1/sigma^2.
    assert torch.allclose(flow, expected, rtol=1e-11, atol=1e-11)


def test_the_score_says_nothing_of_the_data_at_the_end() -> None:
    for target in ("data", "flow", "velocity"):
        with pytest.raises(ValueError, match=r"nothing of x_0 is left .* take t ≤ 0\.9933"):
            Conversion.at(RectifiedFlow(), 1.0, "score", target)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["velocity", "flow"])
def test_processes_with_several_components_have_neither(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"a prediction of the {kind} needs a process of one"):
        Conversion.at(CLD(), 0.5, "data", kind)
    pair = PerturbedData.draw(CLD(), torch.zeros(2, 1), 0.5)
    with pytest.raises(ValueError, match=f"a prediction of the {kind} needs a process of one"):
        pair.target(kind)
    with pytest.raises(ValueError, match=f"a prediction of the {kind} needs a process of one"):
        pair.loss(torch.zeros(2, 1, 1), "noise", measured=kind)


class TestTraining:
    """`PerturbedData` and `score_matching_loss`."""

    @staticmethod
    def pair(sde: LinearSDE, t: Any) -> PerturbedData:
        g = torch.Generator().manual_seed(0)
        x0 = torch.randn(6, 2, generator=g, dtype=torch.float64)
        return PerturbedData.draw(sde, x0, t, generator=g)

    def test_targets_are_those_of_flow_matching(self) -> None:
        t = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0, 1e-4], dtype=torch.float64)
        pair = self.pair(RectifiedFlow(), t)
        at = t.reshape(-1, 1, 1)
        x0 = pair.x0.unsqueeze(1)
        # One or two roundings each.
        assert torch.allclose(pair.target("flow"), pair.noise - x0, rtol=0, atol=1e-14)
        velocity = (1 - at) * pair.noise - at * x0
        assert torch.allclose(pair.target("velocity"), velocity, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("prediction", ["score", "noise", "data", "velocity", "flow"])
    @pytest.mark.parametrize("measured", ["noise", "velocity", "flow"])
    @every_case
    def test_the_error_is_the_same_in_whatever_form_it_is_predicted(
        self, name: str, prediction: Any, measured: Any
    ) -> None:
        sde, t = CASES[name][0], 0.4
        pair = self.pair(sde, t)
        guess = pair.x0 + 0.3
        convert = Conversion.at(sde, t, "data", prediction)
        output = convert(pair.z, guess)
        in_units = Conversion.at(sde, t, "data", measured)
        error = in_units(pair.z, guess) - in_units(pair.z, pair.x0)
        expected = error.square().flatten(1).mean(1)
        found = pair.loss(output, prediction, measured=measured)
        # Differences of states that are up to 50 times larger, squared.
        assert torch.allclose(found, expected, rtol=1e-9, atol=0)

    def test_the_loss_of_a_flow_is_its_mean_squared_error(self) -> None:
        g = torch.Generator().manual_seed(1)
        x0 = torch.randn(5, 3, generator=g, dtype=torch.float64)
        t = torch.rand(5, generator=g, dtype=torch.float64)

        def model(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.tanh(z) * t.reshape(-1, 1, 1)

        found = score_matching_loss(
            model, RectifiedFlow(), x0, t, prediction="flow", generator=g.manual_seed(2)
        )
        noise = torch.randn(5, 1, 3, generator=g.manual_seed(2), dtype=torch.float64)
        at = t.reshape(-1, 1, 1)
        state = (1 - at) * x0.unsqueeze(1) + at * noise
        expected = (model(state, t) - (noise - x0.unsqueeze(1))).square().flatten(1).mean(1)
        # A few roundings.
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)

    def test_likelihood_weights_do_not_depend_on_what_is_predicted(self) -> None:
        pair = self.pair(RectifiedFlow(), 0.7)
        flow = pair.target("flow") + 0.2
        noise = Conversion.at(RectifiedFlow(), 0.7, "flow", "noise")(pair.z, flow)
        losses = [
            pair.loss(output, kind, weighting="likelihood")  # type: ignore[arg-type]
            for output, kind in ((flow, "flow"), (noise, "noise"))
        ]
        # Differences of numbers of like size.
        assert torch.allclose(*losses, rtol=1e-11, atol=0)

    def test_all_of_the_start_has_no_flow(self) -> None:
        pair = PerturbedData.draw(VESDE(), torch.zeros(2, 1), 0.5, conditioning="all")
        with pytest.raises(ValueError, match="conditioning must be 'data'"):
            pair.target("flow")

    def test_the_evidence_lower_bound_is_the_entropy_for_exact_gaussians(self) -> None:
        sde, n = RectifiedFlow(), 4000
        data = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
        g = torch.Generator().manual_seed(0)
        x0 = data.sample(n, generator=g, dtype=torch.float64)
        t, weight = TimeSampler.importance(sde, 1e-3, weighting="likelihood").sample(n, generator=g)
        exact = data.score(sde)
        bound = evidence_lower_bound(
            exact, sde, x0, t, weight, t_min=1e-3, data_mean=0.3, data_variance=0.25, generator=g
        )
        entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
        # Five standard errors; the decoder at t_min costs less.
        error = 5 * float(bound.std()) / math.sqrt(n)
        assert float(bound.mean()) == pytest.approx(-entropy, abs=error + 1e-3)


class Tanh(nn.Module):
    """A network of the right shapes."""

    def forward(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + 0.1 * clock.reshape(-1, 1, 1))


class TestMixedScore:
    """Predictions of a mixed score, and its loss on them."""

    @staticmethod
    def model(sde: LinearSDE, **options: Any) -> MixedScore:
        return MixedScore(Tanh(), sde, 0.2, 0.36, **options)

    @staticmethod
    def states() -> torch.Tensor:
        return torch.randn(
            4, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

    @pytest.mark.parametrize("prediction", ["noise", "data", "velocity", "flow"])
    @every_case
    def test_predictions_are_those_of_its_score(self, name: str, prediction: Any) -> None:
        sde, z = CASES[name][0], self.states()
        model = self.model(sde)
        found = model(z, 0.6, prediction=prediction)
        expected = Conversion.at(sde, 0.6, "score", prediction)(z, model(z, 0.6))
        # Through the score digits are lost in the ratio of noise and signal, up to 100.
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("inputs", ["state", "estimate"])
    @pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()], ids=repr)
    def test_they_are_finite_and_continuous_at_the_end(self, sde: LinearSDE, inputs: Any) -> None:
        model, z = self.model(sde, inputs=inputs), self.states()
        for prediction in ("score", "noise", "data", "velocity", "flow"):
            end = model(z, 1.0, prediction=prediction)
            assert bool(end.isfinite().all())
            # One log-SNR beyond the last that the network is shown.
            near = model(z, 1 - 1e-6, prediction=prediction)
            assert torch.allclose(end, near, rtol=0, atol=1e-4)
        assert torch.equal(model.data_prediction(z, 1.0), model(z, 1.0, prediction="data"))

    def test_the_network_is_shown_no_infinite_clock(self) -> None:
        seen = []

        class Watching(Tanh):
            def forward(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                seen.append(clock)
                return super().forward(x, clock)

        MixedScore(Watching(), RectifiedFlow(), 0.0, 1.0)(self.states(), 1.0)
        assert torch.equal(seen[0], torch.full((4,), -10.0, dtype=torch.float64))

    @pytest.mark.parametrize("prediction", ["velocity", "flow"])
    @every_case
    def test_the_loss_is_the_squared_error_of_the_prediction(
        self, name: str, prediction: Any
    ) -> None:
        sde = CASES[name][0]
        g = torch.Generator().manual_seed(0)
        x0 = torch.randn(5, 2, 3, generator=g, dtype=torch.float64)
        t = torch.tensor([0.02, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
        pair, model = PerturbedData.draw(sde, x0, t, generator=g), self.model(sde)
        output = model(pair.z, t, prediction=prediction)
        expected = (output - pair.target(prediction)).square().flatten(1).mean(1)
        found = model.loss(pair, prediction=prediction)
        # The same difference, once of flows and once of data.
        assert torch.allclose(found, expected, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
    def test_residual_variance_is_the_loss_on_gaussian_data(self, prediction: Any) -> None:
        class Zero(nn.Module):
            def forward(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                return torch.zeros_like(x)

        sde, n = RectifiedFlow(), 40_000
        model = MixedScore(Zero(), sde, 0.2, 0.36)
        g = torch.Generator().manual_seed(0)
        x0 = 0.2 + 0.6 * torch.randn(n, 1, 1, generator=g, dtype=torch.float64)
        for t in (0.1, 0.6, 1.0):
            pair = PerturbedData.draw(sde, x0, t, generator=g)
            found = model.loss(pair, prediction=prediction).mean()
            times = torch.tensor([t], dtype=torch.float64)
            expected = float(model.residual_variance(times, prediction))
            # Five standard errors of the mean of squares.
            assert float(found) == pytest.approx(expected, rel=5 * math.sqrt(2 / n), abs=1e-12)

    def test_the_convex_form_gives_them_too(self) -> None:
        sde, z = VPSDE(), self.states()
        model = self.model(sde, mixing_logits=torch.tensor(-1.0))
        found = model(z, 0.6, prediction="flow")
        expected = Conversion.at(sde, 0.6, "score", "flow")(z, model(z, 0.6))
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)  # as above


class TestTimeDensities:
    """Densities of Esser et al. (2024)."""

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (0.5, 1.4)])
    def test_logits_are_normal(self, mean: float, std: float) -> None:
        density = logit_normal_density(mean=mean, std=std)
        with mp.workdps(DIGITS):
            for t in (0.01, 0.3, 0.5, 0.97):
                at = mp.mpf(t)
                exact = mp.npdf(mp.log(at / (1 - at)), mean, std) / (at * (1 - at))
                found = float(density(torch.tensor(t, dtype=torch.float64)))
                assert found == pytest.approx(float(exact), rel=1e-13)  # a few roundings
        # Gauss-Legendre of a smooth function that vanishes at both ends.
        t = torch.linspace(1e-9, 1, 200_001, dtype=torch.float64)
        assert float(torch.trapezoid(density(t), t)) == pytest.approx(1, abs=1e-6)

    def test_it_is_the_log_snr_density_of_rectified_flow(self) -> None:
        t = torch.tensor([0.01, 0.3, 0.5, 0.97], dtype=torch.float64)
        expected = log_snr_density(RectifiedFlow(), mean=0.5, std=0.8)(t)
        found = logit_normal_density(mean=-0.5, std=0.8)(t)
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)  # a few roundings

    @pytest.mark.parametrize("scale", [-0.5, 0.0, 0.81, 1.29, 1.75])
    def test_times_are_the_map_of_uniform_numbers(self, scale: float) -> None:
        u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        t = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        slope = 1 + scale * (1 - math.pi / 2 * (math.pi * u).sin())
        found = mode_density(scale)(t)
        # The map is inverted to 60 bits; where it is flat, errors are divided by the slope.
        assert torch.allclose(found * slope, torch.ones_like(u), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("make", [logit_normal_density, mode_density])
    def test_samplers_take_them(self, make: Any) -> None:
        sampler = TimeSampler(make(), t_min=1e-3)
        t, weight = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
        assert float((weight * t).mean()) == pytest.approx(0.5005, abs=0.02)
        assert float(t.mean()) == pytest.approx(0.5, abs=0.01)  # both are symmetric

    @pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
    @pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()], ids=repr)
    def test_importance_sampling_takes_singular_ends(self, sde: LinearSDE, prediction: Any) -> None:
        model = MixedScore(Tanh(), sde, 0.0, 0.25)
        sampler = TimeSampler(lambda t: model.residual_variance(t, prediction), 1e-3)
        t, weight = sampler.sample(1000, generator=torch.Generator().manual_seed(0))
        assert bool((t < 1).all())
        assert bool(weight.isfinite().all())
        for weighting in ("reweighted", "likelihood"):
            TimeSampler.importance(sde, 1e-3, weighting=weighting)  # type: ignore[arg-type]
        TimeSampler(log_snr_density(sde), 1e-3)

    def test_parameters_out_of_range_are_rejected(self) -> None:
        with pytest.raises(ValueError, match="std must be finite and positive"):
            logit_normal_density(std=0.0)
        with pytest.raises(ValueError, match="mean must be finite"):
            logit_normal_density(mean=math.inf)
        with pytest.raises(ValueError, match="scale must lie in"):
            mode_density(2.0)


@pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()], ids=repr)
def test_log_densities_follow_the_flow_up_to_the_singular_end(sde: LinearSDE) -> None:
    data = GaussianMixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.1]], [[0.2]]])
    z = torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(-1, 1, 1)
    process = ReverseProcess(sde, data.score(sde))
    found = flow_log_prob(process, z, 0.05, rtol=1e-9, atol=1e-9)
    # At the last regular time the noise leaves out e^-10 of the data; z reaches 4 there.
    assert torch.allclose(found.log_prob, data.log_prob(sde, z, 0.05), rtol=0, atol=2e-4)


@pytest.mark.parametrize("sde", [RectifiedFlow(), CosineVP()])
@pytest.mark.parametrize("kinds", [("flow", "velocity"), ("velocity", "flow")])
def test_losses_of_one_prediction_in_terms_of_another_are_finite_at_the_end(
    sde: LinearSDE, kinds: Any
) -> None:
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction, measured = kinds
    losses = []
    for t in (1 - 1e-9, 1.0):
        g = torch.Generator().manual_seed(1)
        pair = PerturbedData.draw(sde, x0, t, generator=g)
        output = torch.full((4, 1, 3), 0.3, dtype=torch.float64)
        losses.append(pair.loss(output, prediction, measured=measured))
        # The same by way of the quantity that is measured.
        converted = Conversion.at(sde, t, prediction, measured)(pair.z, output)
        assert torch.allclose(losses[-1], pair.loss(converted, measured), rtol=1e-12, atol=0)
    assert torch.allclose(losses[0], losses[1], rtol=1e-7, atol=0)


def test_losses_that_are_infinite_at_the_end_are_refused() -> None:
    x0 = torch.ones(2, 1, dtype=torch.float64)
    pair = PerturbedData.draw(RectifiedFlow(), x0, 1.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="error of this prediction is infinite"):
        pair.loss(pair.noise + 1, "noise", measured="flow")
    with pytest.raises(ValueError, match="t must be below 1 with weighting='likelihood'"):
        pair.loss(pair.noise, "noise", weighting="likelihood")
    assert not bool(pair.loss(x0 + 1, "data", weighting="likelihood").any())


@pytest.mark.parametrize("t", [1e-8, 1e-4, 0.3])
def test_velocity_and_flow_of_each_other_keep_their_digits_near_the_data(t: float) -> None:
    # (a'b - b'a) x + (b' alpha - a' sigma) u over the determinant, 1 for the flow.
    found = Conversion.at(RectifiedFlow(), t, "flow", "velocity")
    assert float(found.state) == pytest.approx(1 - 2 * t, rel=1e-15)
    assert float(found.value) == pytest.approx((1 - t) ** 2 + t**2, rel=1e-15)


@pytest.mark.parametrize("density", [logit_normal_density(mean=0.3), mode_density(0.8)])
def test_densities_of_times_can_be_pickled_and_take_one_time(density: Any) -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(density))(t), density(t))
    assert float(density(0.2)) == float(density(t)[0])
