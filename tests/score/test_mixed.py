"""The mixed score: an exact Gaussian reference, a network for the rest, and its training loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, MixedScore, SubVPSDE
from cldsde.score import Conversion, PerturbedData, optimal_loss
from score import exact
from score.exact import EPS, FAMILIES, Constant, known


def hybrid_score_matching(
    model: MixedScore, x0: torch.Tensor, t: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The reweighted loss of the noise that the model predicts, as training uses it."""
    pair = PerturbedData.draw(model.sde, x0, t, generator=generator)
    return pair.loss(model(pair.z, pair.t, prediction="noise"))


every_family = pytest.mark.parametrize("name", list(FAMILIES))
SHAPE = (2, 3, 3)  # channels and pixels


def reference(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of data of shape SHAPE; numbers that single precision holds exactly."""
    shape: dict[str, tuple[int, ...]] = {"scalar": (), "channel": (2, 1, 1), "pixel": SHAPE}
    g = torch.Generator().manual_seed(3)
    mean = torch.randint(-8, 9, shape[kind], generator=g).double() / 8
    variance = torch.randint(1, 17, shape[kind], generator=g).double() / 16
    return mean, variance


every_kind = pytest.mark.parametrize("kind", ["scalar", "channel", "pixel"])


def gaussian_score(
    sde: LinearSDE, mean: torch.Tensor, variance: torch.Tensor, z: torch.Tensor, t: float
) -> torch.Tensor:
    """Driven rows of -(Sigma + s^2 psi psi^T)^-1 (z - psi m), entry by entry of the data."""
    kernel = sde.marginal(t)
    psi = kernel.mean[:, 0]
    spread = variance.expand(SHAPE)[..., None, None] * torch.outer(psi, psi)
    residual = z - psi[:, None, None, None] * mean
    score = -torch.linalg.solve(kernel.covariance + spread, residual.movedim(1, -1)[..., None])
    return score[..., 0].movedim(-1, 1)[:, list(sde.driven)]


def condition(sde: LinearSDE, variance: torch.Tensor, t: float) -> float:
    """Largest condition number of the covariances in `gaussian_score`, times that of the root."""
    kernel = sde.marginal(t)
    psi = kernel.mean[:, 0]
    spread = variance.flatten()[:, None, None] * torch.outer(psi, psi)
    return float(torch.linalg.cond(kernel.covariance + spread).max())


def data_states(sde: LinearSDE, t: Any, n: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
    return sde.perturb(x, t, generator=g)[0]


class TestReference:
    """A network that says nothing leaves the exact score of Gaussian data."""

    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @every_kind
    @every_family
    def test_with_a_zero_network_it_is_the_gaussian_score(
        self, name: str, kind: str, t: float
    ) -> None:
        sde = FAMILIES[name]()
        mean, variance = reference(kind)
        model = MixedScore(Constant(sde), sde, mean, variance)
        z = data_states(sde, t)
        found, expected = model(z, t), gaussian_score(sde, mean, variance, z, t)
        assert found.shape == (3, len(sde.driven), *SHAPE)
        # The dense solve loses eps times the condition number, below 1e5; the states have size 10.
        tolerance = 64 * EPS * condition(sde, variance, t) * float(expected.abs().max() + 1)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    @every_kind
    @every_family
    def test_per_sample_times_equal_single_times(self, name: str, kind: str) -> None:
        sde = FAMILIES[name]()
        model = MixedScore(Constant(sde, 0.3), sde, *reference(kind))
        t = torch.tensor([1.0, 0.02, 0.3], dtype=torch.float64)
        z = data_states(sde, t)
        together = model(z, t)
        for i, single in enumerate(t.tolist()):
            alone = model(z[i : i + 1], single)
            tolerance = exact.rounding(sde, single) * float(alone.abs().max())
            assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_kind
    @every_family
    def test_at_known_times_it_is_the_score_at_exact_times(
        self, name: str, kind: str, dtype: torch.dtype
    ) -> None:
        sde = FAMILIES[name]()
        model = MixedScore(Constant(sde, 0.3), sde, *reference(kind))
        times = known(1.0, 0.3, 0.02)
        for i, t in enumerate(times.times.tolist()):
            z = data_states(sde, t).to(dtype)
            found, expected = model(z, times.arguments(z)[i]), model(z, t)
            assert found.dtype == expected.dtype == dtype
            # Coefficients of one time or of a grid differ by rounding, in either precision.
            tolerance = exact.rounding(sde, t) * torch.finfo(dtype).eps / EPS
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()

    @every_kind
    def test_a_model_in_double_precision_is_the_same_model(self, kind: str) -> None:
        sde = CLD()
        mean, variance = reference(kind)
        model = MixedScore(Constant(sde), sde, mean, variance)
        z = data_states(sde, 0.3)
        before = model(z, 0.3)
        assert torch.equal(model.to(torch.float64)(z, 0.3), before)
        assert torch.equal(model.to(torch.float32)(z, 0.3), before)

    @every_kind
    def test_a_copy_and_a_loaded_state_are_the_same_model(self, kind: str) -> None:
        sde = CLD()
        mean, variance = reference(kind)
        model = MixedScore(Constant(sde), sde, mean, variance)
        other = MixedScore(Constant(sde), sde, torch.zeros_like(mean), torch.ones_like(variance))
        z = data_states(sde, 0.3)
        expected = model(z, 0.3)
        assert torch.equal(copy.deepcopy(model)(z, 0.3), expected)
        assert not torch.equal(other(z, 0.3), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(z, 0.3), expected)
        other = MixedScore(Constant(sde), sde, torch.zeros_like(mean), torch.ones_like(variance))
        other.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(other(z, 0.3), expected)

    def test_a_loaded_state_reaches_a_model_inside_another(self) -> None:
        sde = CLD()
        outer = nn.ModuleList([MixedScore(Constant(sde), sde, *reference("channel"))])
        mean, variance = reference("channel")
        other = nn.ModuleList([MixedScore(Constant(sde), sde, mean * 0, variance * 0 + 1)])
        other.load_state_dict(outer.state_dict())
        z = data_states(sde, 0.3)
        assert torch.equal(other[0](z, 0.3), outer[0](z, 0.3))

    def test_the_state_holds_mean_and_variance(self) -> None:
        sde = CLD()
        mean, variance = reference("channel")
        state = MixedScore(Constant(sde), sde, mean, variance).state_dict()
        assert torch.equal(state["data_mean"].double(), mean)
        assert torch.equal(state["data_variance"].double(), variance)

    def test_in_equilibrium_the_reference_is_minus_the_velocity_over_the_mass(self) -> None:
        sde = CLD(velocity_scale=1.0)
        model = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))
        z = data_states(sde, 0.3)
        # The promise of the kernels, 1e-12, times the condition of the stationary law, 4.
        assert torch.allclose(model(z, 0.3), -z[:, 1:] / 0.25, rtol=4e-12, atol=4e-12)


class Spy(nn.Module):
    """Remembers what the network sees."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.zero = Constant(sde)

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        self.z, self.clock = z, clock
        result: torch.Tensor = self.zero(z, clock)
        return result


class TestNetworkInputs:
    """The network sees unit variances and half the log of the signal-to-noise ratio."""

    @pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
    @every_family
    def test_inputs_have_unit_size(self, name: str, t: float) -> None:
        sde = FAMILIES[name]()
        mean, variance = reference("channel")
        network = Spy(sde)
        model = MixedScore(network, sde, mean, variance)
        n = 4000
        g = torch.Generator().manual_seed(0)
        x = mean + variance.sqrt() * torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
        model(sde.perturb(x, t, generator=g)[0], t)
        assert network.z.shape == (n, sde.components * 2, 3, 3)
        # 5 standard errors of a mean and of a variance of n normals of unit variance, over 5 sigma
        # in some hundred numbers.
        assert (network.z.mean(0).abs() <= 5 / math.sqrt(n)).all()
        assert ((network.z.square().mean(0) - 1).abs() <= 5 * math.sqrt(2 / n)).all()

    @pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
    @every_family
    def test_the_clock_is_half_the_log_of_the_signal_to_noise_ratio(
        self, name: str, t: float
    ) -> None:
        sde = FAMILIES[name]()
        network = Spy(sde)
        MixedScore(network, sde, *reference("scalar"))(data_states(sde, t), t)
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        expected = 0.5 * math.log(float(psi @ torch.linalg.solve(kernel.covariance, psi)))
        # The covariance is inverted here.
        tolerance = 64 * EPS * float(torch.linalg.cond(kernel.covariance)) + 1e-12
        assert network.clock.tolist() == pytest.approx([expected] * 3, abs=tolerance)

    def test_rows_of_a_component_stay_together(self) -> None:
        sde = CLD()
        network = Spy(sde)
        z = data_states(sde, 0.3)
        MixedScore(network, sde, torch.zeros(()), torch.ones(()))(z, 0.3)
        ratio = network.z / z.flatten(1, 2)
        assert torch.allclose(ratio[:, :2], ratio[0, 0, 0, 0], rtol=16 * EPS, atol=0)
        assert torch.allclose(ratio[:, 2:], ratio[0, 2, 0, 0], rtol=16 * EPS, atol=0)


NOT_TRAILING: dict[str, LinearSDE] = {
    "first of two": LinearSDE.from_matrices(
        [[-1.0, -4.0], [4.0, 0.0]],
        [[8**0.5], [0.0]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.04]],
    ),
    "middle of three": LinearSDE.from_matrices(
        [[0.0, 1.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 1.0, -1.0]], [[0.0], [2.0], [0.0]], 4.0
    ),
    # Moved to the end by a cycle, which is not its own inverse.
    "first two of three": LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, -2.0, 1.0], [0.0, -1.0, -1.0]],
        [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]],
        2.0,
        initial_covariance=[[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]],
    ),
    "first and last of three": LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -2.0]],
        [[1.0, 0.5], [0.0, 0.0], [0.5, 2.0]],
        2.0,
        initial_covariance=[[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]],
    ),
}
every_order = pytest.mark.parametrize("order", list(NOT_TRAILING))


class TestDrivenComponents:
    """Driven components anywhere among the others."""

    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @every_kind
    @every_order
    def test_with_a_zero_network_it_is_the_gaussian_score(
        self, order: str, kind: str, t: float
    ) -> None:
        sde = NOT_TRAILING[order]
        mean, variance = reference(kind)
        z = data_states(sde, t)
        found = MixedScore(Constant(sde), sde, mean, variance)(z, t)
        expected = gaussian_score(sde, mean, variance, z, t)
        assert found.shape == (3, len(sde.driven), *SHAPE)
        # The dense solve loses eps times the condition number.
        tolerance = 64 * EPS * condition(sde, variance, t) * float(expected.abs().max() + 1)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    @every_order
    def test_what_the_reference_leaves_open_is_the_loss_of_a_zero_network(self, order: str) -> None:
        sde, n = NOT_TRAILING[order], 4000
        mean, variance = reference("channel")
        model = MixedScore(Constant(sde), sde, mean, variance)
        g = torch.Generator().manual_seed(1)
        x = mean + variance.sqrt() * torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
        for t in (0.02, 0.3, 0.9):
            loss = hybrid_score_matching(
                model, x, torch.full((n,), t, dtype=torch.float64), generator=g
            )
            expected = model.residual_variance(torch.tensor([t], dtype=torch.float64)).item()
            # 5 standard errors, from the sample's own variance.
            assert abs(loss.mean().item() - expected) <= 5 * loss.std().item() / math.sqrt(n)

    @every_order
    def test_at_known_times_it_is_the_score(self, order: str) -> None:
        sde = NOT_TRAILING[order]
        model = MixedScore(Constant(sde, 0.3), sde, *reference("channel"))
        z = data_states(sde, 0.3)
        found, expected = model(z, known(1.0, 0.3, 0.02).arguments(z)[1]), model(z, 0.3)
        # Coefficients of one time or of a grid differ by rounding.
        tolerance = exact.rounding(sde, 0.3) * float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)


class Denoiser(nn.Module):
    """What the reference leaves open of scalar data at one of a few points, in closed form.

    The data are estimated as u = x_0 + exp(-clock) normals, and the network is shown u less the
    mean of the data in units of its size.
    """

    points = torch.tensor([-1.25, 0.25, 1.5], dtype=torch.float64)

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, estimate: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        noise = (-2 * clock).exp()[:, None, None, None]
        u = self.mean + estimate * (self.variance + noise).sqrt()
        weights = (-((u[..., None] - self.points) ** 2) / (2 * noise[..., None])).softmax(-1)
        found = (weights * self.points).sum(-1)
        reference = self.mean + self.variance / (self.variance + noise) * (u - self.mean)
        left = (self.variance * noise / (self.variance + noise)).sqrt()
        return (reference - found) / left


class Blur(nn.Module):
    """A network that mixes pixels and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(z)
        return result


class TestEstimates:
    """A network that is shown the one estimate that tells all of the data."""

    @pytest.mark.parametrize("t", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("name", [*FAMILIES, *NOT_TRAILING])
    def test_one_network_has_the_scores_of_all_processes(self, name: str, t: float) -> None:
        sde = (FAMILIES[name] if name in FAMILIES else lambda: NOT_TRAILING[name])()
        mean, variance = torch.tensor(0.25), torch.tensor(0.5)
        model = MixedScore(Denoiser(0.25, 0.5), sde, mean, variance, inputs="estimate")
        g = torch.Generator().manual_seed(3)
        x = Denoiser.points[torch.randint(3, (5, *SHAPE), generator=g)]
        z = sde.perturb(x, t, generator=g)[0]
        found = model(z, t)
        points = GaussianMixture([1.0] * 3, Denoiser.points[:, None].tolist(), [[[0.0]]] * 3)
        each = z.movedim(1, -1).reshape(-1, sde.components, 1)
        expected = points.score(sde)(each, t).reshape(5, *SHAPE, -1).movedim(-1, 1)
        # An error in the estimate is multiplied by the signal-to-noise ratio in the weights of the
        # points, 3 apart, and what is left of it by the root of the score.
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        snr = float(psi @ torch.linalg.solve(kernel.covariance, psi))
        tolerance = 64 * exact.rounding(sde, t) * max(1.0, snr) * float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)
        at_known = model(z, known(1.0, t).arguments(z)[1])
        assert torch.allclose(at_known, found, rtol=0, atol=tolerance)

    @every_kind
    @every_family
    def test_inputs_have_unit_size(self, name: str, kind: str) -> None:
        sde, n, seen = FAMILIES[name](), 4000, []
        mean, variance = reference(kind)

        class Silent(nn.Module):
            def forward(self, estimate: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                seen.append(estimate)
                return torch.zeros_like(estimate)

        model = MixedScore(Silent(), sde, mean, variance, inputs="estimate")
        g = torch.Generator().manual_seed(0)
        x = mean + variance.sqrt() * torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
        z = sde.perturb(x, 0.3, generator=g)[0]
        found, expected = model(z, 0.3), gaussian_score(sde, mean, variance, z, 0.3)
        tolerance = 64 * EPS * condition(sde, variance, 0.3) * float(expected.abs().max() + 1)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)
        assert seen[0].shape == (n, *SHAPE)
        # 5 standard errors, as above.
        assert (seen[0].mean(0).abs() <= 5 / math.sqrt(n)).all()
        assert ((seen[0].square().mean(0) - 1).abs() <= 5 * math.sqrt(2 / n)).all()

    def test_where_all_are_driven_and_one_it_is_the_state(self) -> None:
        mean, variance = reference("channel")
        network = Blur()
        z = data_states(VPSDE(), 0.3)
        one = MixedScore(network, VPSDE(), mean, variance)(z, 0.3).detach()
        other = MixedScore(network, VPSDE(), mean, variance, inputs="estimate")(z, 0.3).detach()
        assert torch.allclose(one, other, rtol=0, atol=1e-12 * float(one.abs().max()))


class TestPredictions:
    """Score and noise of one model."""

    @pytest.mark.parametrize("convex", [False, True])
    @pytest.mark.parametrize("name", [*FAMILIES, *NOT_TRAILING])
    def test_score_and_noise_are_one_prediction(self, name: str, convex: bool) -> None:
        sde = NOT_TRAILING[name] if name in NOT_TRAILING else FAMILIES[name]()
        logits = torch.full((2, 1, 1), -0.5) if convex else None
        model = MixedScore(Constant(sde, 0.7), sde, *reference("channel"), mixing_logits=logits)
        t = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
        z = data_states(sde, t)
        noise, score = model(z, t, prediction="noise").detach(), model(z, t).detach()
        assert noise.shape == score.shape == (3, len(sde.driven), *SHAPE)
        assert torch.equal(model(z, t, prediction="score"), score)
        for i, single in enumerate(t.tolist()):
            convert = Conversion.at(sde, single, "score", "noise")
            found = convert(z[i : i + 1], score[i : i + 1])
            # There and back by a triangular matrix; kernels of one time and of three to 1e-12.
            size = float(noise[i].abs().max())
            tolerance = (exact.rounding(sde, single) + 1e-11) * size
            assert torch.allclose(found[0], noise[i], rtol=0, atol=tolerance)

    @pytest.mark.parametrize("prediction", ["velocity", "flow"])
    def test_predictions_of_one_component_are_refused_for_others(self, prediction: Any) -> None:
        model = MixedScore(Constant(CLD()), CLD(), *reference("scalar"))
        with pytest.raises(ValueError, match="needs a process of one component; CLD has 2"):
            model(torch.zeros(3, 2, *SHAPE), 0.5, prediction=prediction)

    @pytest.mark.parametrize("prediction", ["full_score", "", None])
    def test_other_predictions_are_refused(self, prediction: Any) -> None:
        model = MixedScore(Constant(CLD()), CLD(), *reference("scalar"))
        with pytest.raises(ValueError, match="prediction must be one of 'score', 'noise'"):
            model(torch.zeros(3, 2, *SHAPE), 0.5, prediction=prediction)


class TestConvexForm:
    """Weights between reference and network that are learnt."""

    @staticmethod
    def model(sde: LinearSDE, logits: torch.Tensor | None, value: float = 0.7) -> MixedScore:
        return MixedScore(Constant(sde, value), sde, *reference("channel"), mixing_logits=logits)

    @every_family
    def test_at_one_end_it_is_the_reference_score(self, name: str) -> None:
        sde = FAMILIES[name]()
        z = data_states(sde, 0.3)
        # exp(-200) is no weight.
        found = self.model(sde, torch.full((2, 1, 1), -200.0))(z, 0.3)
        expected = MixedScore(Constant(sde), sde, *reference("channel"))(z, 0.3)
        assert torch.equal(found, expected)

    @every_family
    def test_at_the_other_end_it_is_the_network_s_noise_alone(self, name: str) -> None:
        sde = FAMILIES[name]()
        z = data_states(sde, 0.3)
        model = self.model(sde, torch.full((2, 1, 1), 200.0))
        noise, score = model(z, 0.3, prediction="noise").detach(), model(z, 0.3).detach()
        assert torch.equal(noise, torch.full_like(noise, 0.7))
        convert = Conversion.at(sde, 0.3, "noise", "score")
        # One triangular matrix, the inverse of another.
        tolerance = exact.rounding(sde, 0.3) * float(score.abs().max())
        assert torch.allclose(convert(z, noise), score, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("logit", [-3.0, 0.0, 1.5])
    @pytest.mark.parametrize("name", [*FAMILIES, *NOT_TRAILING])
    def test_between_the_ends_it_is_the_mean_of_both(self, name: str, logit: float) -> None:
        sde = NOT_TRAILING[name] if name in NOT_TRAILING else FAMILIES[name]()
        z = data_states(sde, 0.3)
        found = self.model(sde, torch.tensor(logit))(z, 0.3, prediction="noise")
        reference_noise = MixedScore(Constant(sde), sde, *reference("channel"))(
            z, 0.3, prediction="noise"
        )
        a = 1 / (1 + math.exp(-logit))
        expected = (1 - a) * reference_noise + a * 0.7
        # A few roundings of the terms.
        tolerance = 16 * EPS * float(reference_noise.abs().max() + 1)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("shape", [(), (2, 1, 1), (1, 3, 3), SHAPE])
    def test_logits_broadcast_with_the_data(self, shape: tuple[int, ...]) -> None:
        sde = FAMILIES["PSLD"]()
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        z = data_states(sde, 0.3)
        found = self.model(sde, logits)(z, 0.3, prediction="noise")
        plain = MixedScore(Constant(sde), sde, *reference("channel"))(z, 0.3, prediction="noise")
        a = logits.double().sigmoid().expand(SHAPE)
        # Both driven components have the same weights; a few roundings of the terms.
        expected = (1 - a) * plain + a * 0.7
        tolerance = 16 * EPS * float(plain.abs().max() + 1)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    @every_family
    def test_gradients_reach_the_logits(self, name: str) -> None:
        sde = FAMILIES[name]()
        model = self.model(sde, torch.tensor([-3.0, 1.0]).reshape(2, 1, 1))
        assert model.mixing_logits is not None
        assert [name for name, _ in model.named_parameters()] == ["mixing_logits"]
        g = torch.Generator().manual_seed(2)
        x = torch.randn(4, *SHAPE, generator=g)
        t = torch.full((4,), 0.3, dtype=torch.float64)
        pair = PerturbedData.draw(sde, x.double(), t, generator=g)
        noise = model(pair.z, t, prediction="noise")
        pair.loss(noise).mean().backward()
        # d n / d logit = a (1 - a) (0.7 - n_ref), and n - n_ref = a (0.7 - n_ref).
        plain = MixedScore(Constant(sde), sde, *reference("channel"))(pair.z, t, prediction="noise")
        a = torch.tensor([-3.0, 1.0]).double().sigmoid().reshape(2, 1, 1)
        slope = 2 * (noise - pair.noise) * a * (1 - a) * (0.7 - plain) / (noise[0].numel() * 4)
        expected = slope.sum((0, 1, 3, 4)).detach()
        assert model.mixing_logits.grad is not None
        # Gradients are summed in single precision.
        assert torch.allclose(
            model.mixing_logits.grad.flatten().double(), expected, rtol=1e-5, atol=1e-7
        )

    def test_the_logits_are_saved_and_loaded(self) -> None:
        sde = CLD()
        logits = torch.tensor([-3.0, 1.0]).reshape(2, 1, 1)
        model, other = self.model(sde, logits), self.model(sde, torch.zeros(2, 1, 1))
        z = data_states(sde, 0.3)
        assert not torch.equal(other(z, 0.3), model(z, 0.3))
        state = model.state_dict()
        assert torch.equal(state["mixing_logits"], logits)
        other.load_state_dict(state)
        assert torch.equal(other(z, 0.3), model(z, 0.3))
        assert torch.equal(copy.deepcopy(model)(z, 0.3), model(z, 0.3))

    def test_the_forms_do_not_load_each_other(self) -> None:
        sde = CLD()
        additive, convex = self.model(sde, None), self.model(sde, torch.zeros(2, 1, 1))
        assert additive.mixing_logits is None
        assert "mixing_logits" not in additive.state_dict()
        with pytest.raises(RuntimeError, match="mixing_logits"):
            convex.load_state_dict(additive.state_dict())
        with pytest.raises(RuntimeError, match="mixing_logits"):
            additive.load_state_dict(convex.state_dict())

    def test_the_caller_s_logits_stay_its_own(self) -> None:
        logits = torch.zeros(2, 1, 1)
        model = self.model(CLD(), logits)
        assert model.mixing_logits is not None
        with torch.no_grad():
            model.mixing_logits += 1
        assert not logits.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_dtype_of_the_state_is_kept(self, dtype: torch.dtype) -> None:
        sde = CLD()
        model = self.model(sde, torch.zeros(2, 1, 1))
        z = data_states(sde, 0.3).to(dtype)
        assert model(z, 0.3).dtype == model(z, 0.3, prediction="noise").dtype == dtype

    def test_it_mixes_at_known_times_too(self) -> None:
        sde = CLD()
        model = self.model(sde, torch.tensor([-3.0, 1.0]).reshape(2, 1, 1))
        z = data_states(sde, 0.3)
        time = known(1.0, 0.3).arguments(z)[1]
        found, expected = model(z, time).detach(), model(z, 0.3).detach()
        # Coefficients of one time or of a grid differ by rounding.
        tolerance = exact.rounding(sde, 0.3) * float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("logits", [torch.tensor(math.nan), torch.tensor(math.inf), -3.0, "-3"])
    def test_logits_are_finite_tensors(self, logits: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="mixing_logits must be a finite tensor"):
            self.model(CLD(), logits)

    @pytest.mark.parametrize("shape", [(3, 1, 1), (5,), (2, 2, 3, 3), (3, 1, 1, 1, 1)])
    def test_logits_that_do_not_broadcast_are_refused(self, shape: tuple[int, ...]) -> None:
        # (2, 2, 3, 3) would give each driven component weights of its own, (3, 1, 1, 1, 1) each
        # sample.
        sde = FAMILIES["PSLD"]()
        model = self.model(sde, torch.zeros(shape))
        with pytest.raises((ValueError, RuntimeError)):
            model(data_states(sde, 0.3), 0.3)

    def test_logits_with_more_axes_than_the_data_are_refused(self) -> None:
        # (2, 1, 1) would give each of two samples weights of its own.
        sde, logits = CLD(), torch.tensor([-3.0, 3.0]).reshape(2, 1, 1)
        mean, variance = reference("scalar")
        model = MixedScore(Constant(sde), sde, mean, variance, mixing_logits=logits)
        with pytest.raises((ValueError, RuntimeError)):
            model(torch.ones(2, 2, 3), 0.3)


class TestResidualVariance:
    """What the best linear prediction of the noise leaves open."""

    @every_kind
    @every_family
    def test_it_is_one_minus_the_explained_variance(self, name: str, kind: str) -> None:
        sde = FAMILIES[name]()
        mean, variance = reference(kind)
        times = torch.tensor([0.02, 0.3, 1.0], dtype=torch.float64)
        found = MixedScore(Constant(sde), sde, mean, variance).residual_variance(times)
        assert found.shape == (3,)
        for value, t in zip(found.tolist(), times.tolist(), strict=True):
            kernel = sde.marginal(t)
            psi, first = kernel.mean[:, 0], sde.driven[0]
            spread = variance.reshape(-1, 1, 1) * torch.outer(psi, psi)
            # z = psi x + L e: Cov(e, z) = L^T, and the share Cov Var(z)^-1 Cov^T is explained.
            explained = kernel.root.mT @ torch.linalg.solve(
                kernel.covariance + spread, kernel.root.expand(len(spread), -1, -1)
            )
            left = 1 - explained.diagonal(dim1=-2, dim2=-1)[:, first:]
            tolerance = 64 * EPS * condition(sde, variance, t)
            assert value == pytest.approx(float(left.mean()), abs=tolerance)

    @pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
    @pytest.mark.parametrize("name", ["VP", "VE", "CLD", "PSLD", "HOLD"])
    def test_it_is_the_loss_of_a_zero_network_on_gaussian_data(self, name: str, t: float) -> None:
        sde = FAMILIES[name]()
        mean, variance = reference("channel")
        model = MixedScore(Constant(sde), sde, mean, variance)
        g = torch.Generator().manual_seed(1)
        n = 4000
        x = mean + variance.sqrt() * torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
        times = torch.full((n,), t, dtype=torch.float64)
        loss = hybrid_score_matching(model, x, times, generator=g)
        assert loss.shape == (n,)
        expected = model.residual_variance(times[:1]).item()
        # 5 standard errors, from the sample's own variance.
        assert abs(loss.mean().item() - expected) <= 5 * loss.std().item() / math.sqrt(n)


class Linear(nn.Module):
    """One number a component: network = a . z, the same for every channel and pixel."""

    def __init__(self, components: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(components, dtype=torch.float64))

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        split = z.unflatten(1, (len(self.a), -1))
        return torch.einsum("k,bk...->b...", self.a, split)


class TestLoss:
    """Hybrid score matching."""

    @pytest.mark.parametrize("name", ["VP", "sub-VP", "CLD", "HOLD"])
    def test_its_minimiser_is_the_score_of_the_data(self, name: str) -> None:
        # Data N(0, 1/4), reference N(0, 1): a linear network can mend the difference exactly.
        sde, t, n = FAMILIES[name](), 0.2, 20_000
        network = Linear(sde.components)
        model = MixedScore(network, sde, torch.zeros(()), torch.ones(()))
        g = torch.Generator().manual_seed(2)
        x = 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
        times = torch.full((n,), t, dtype=torch.float64)

        # The loss is a parabola in a: one Newton step leads to the minimum over this sample.
        noise = torch.Generator().manual_seed(3)
        value = hybrid_score_matching(model, x, times, generator=noise).mean()
        (slope,) = torch.autograd.grad(value, network.a)
        rows = []
        for unit in torch.eye(sde.components, dtype=torch.float64):
            with torch.no_grad():
                network.a.copy_(unit)
            noise.manual_seed(3)
            shifted = hybrid_score_matching(model, x, times, generator=noise).mean()
            rows.append(torch.autograd.grad(shifted, network.a)[0] - slope)
        curvature = torch.stack(rows)
        best = -torch.linalg.solve(curvature, slope)
        with torch.no_grad():
            network.a.copy_(best)
        noise.manual_seed(3)
        residual = hybrid_score_matching(model, x, times, generator=noise).mean().item()
        # Least squares with homoscedastic normal noise: Cov(a) = 2 residual / n curvature^-1.
        covariance = 2 * residual / n * torch.linalg.inv(curvature)
        z = exact.states(sde, GaussianMixture([1.0], [[0.0]], [[[0.25]]]), t, n=5)
        found = model(z, t).detach()
        expected = GaussianMixture([1.0], [[0.0]], [[[0.25]]]).score(sde)(z, t)
        jacobian = torch.autograd.functional.jacobian(
            lambda a: torch.func.functional_call(model, {"network.a": a}, (z, t)).flatten(), best
        )
        error = torch.einsum("ni,ij,nj->n", jacobian, covariance, jacobian).sqrt()
        # 5 standard errors.
        assert ((found - expected).flatten().abs() <= 5 * error).all()
        assert error.max() <= 0.05 * expected.abs().max()

    @every_family
    def test_gradients_reach_the_network(self, name: str) -> None:
        sde = FAMILIES[name]()
        channels = len(sde.driven)
        layer = nn.Conv2d(2 * sde.components, 2 * channels, 3, padding=1)

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                return self.layer(z) * clock[:, None, None, None]

        model = MixedScore(Network(), sde, *reference("channel"))
        t = torch.tensor([0.01, 0.4, 1.0], dtype=torch.float64)
        loss = hybrid_score_matching(model, torch.randn(3, *SHAPE), t)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0

    def test_each_sample_has_its_own_loss_and_time(self) -> None:
        sde = CLD()
        model = MixedScore(Constant(sde, 0.2), sde, *reference("channel"))
        x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)

        def loss(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return hybrid_score_matching(model, x, t, generator=torch.Generator().manual_seed(7))

        before = loss(x, t)
        x[0], t[0] = 5.0, 0.02
        after = loss(x, t)
        # The other samples see the same coefficients, to rounding.
        assert torch.allclose(after[1:], before[1:], rtol=1e-10, atol=0)
        assert after[0] != before[0]

    def test_a_seed_decides_the_loss(self) -> None:
        sde = CLD()
        model = MixedScore(Constant(sde), sde, *reference("channel"))
        x, t = torch.ones(2, *SHAPE), torch.tensor([0.1, 0.5], dtype=torch.float64)

        def loss(seed: int) -> torch.Tensor:
            return hybrid_score_matching(model, x, t, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(loss(0), loss(0))
        assert not torch.equal(loss(0), loss(1))

    @pytest.mark.parametrize(
        "t", [[0.0, 0.5], [0.5, 1.5], [0.5, math.nan], [-0.1, 0.5], [0.5], [0.5, 0.5, 0.5]]
    )
    def test_times_that_do_not_fit_are_refused(self, t: list[float]) -> None:
        sde = CLD()
        model = MixedScore(Constant(sde), sde, *reference("channel"))
        with pytest.raises(ValueError, match=r"^t: |^t must"):
            hybrid_score_matching(model, torch.zeros(2, *SHAPE), torch.tensor(t).double())


class TestItsOwnLoss:
    """`MixedScore.loss` compares what can be compared, whatever the targets are conditioned on."""

    @pytest.mark.parametrize("weighting", ["reweighted", "likelihood"])
    @pytest.mark.parametrize("conditioning", ["data", "all"])
    @pytest.mark.parametrize("name", ["CLD", "PSLD", "HOLD", "VE"])
    def test_the_exact_score_of_gaussian_data_attains_the_least_loss(
        self, name, conditioning, weighting
    ):
        sde, variance = {"CLD": CLD, "PSLD": PSLD, "HOLD": HOLD, "VE": VESDE}[name](), 0.3
        model = MixedScore(Constant(sde), sde, torch.tensor(0.25), torch.tensor(variance)).double()
        g = torch.Generator().manual_seed(0)
        n, t = 40_000, 0.02
        x0 = 0.25 + variance**0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
        pair = PerturbedData.draw(sde, x0, t, conditioning=conditioning, generator=g)
        losses = model.loss(pair, weighting=weighting)
        least = optimal_loss(
            sde, t, data_variance=variance, conditioning=conditioning, weighting=weighting
        )
        # The buffers of the reference are in single precision.
        error = 5 * float(losses.std()) / n**0.5 + 1e-5 * float(least)
        assert float(losses.mean()) == pytest.approx(float(least), abs=error)

    def test_hybrid_score_matching_is_the_loss_of_the_predicted_noise(self):
        sde, g = CLD(), torch.Generator().manual_seed(1)
        model = MixedScore(Constant(sde, 0.3), sde, torch.tensor(0.25), torch.tensor(0.5))
        x0 = torch.randn(6, 1, generator=g)
        t = torch.linspace(0.01, 1, 6, dtype=torch.float64)
        pair = PerturbedData.draw(sde, x0, t, generator=g)
        expected = pair.loss(model(pair.z, pair.t, prediction="noise"))
        assert torch.equal(model.loss(pair), expected)

    def test_a_condition_reaches_the_network(self):
        seen = []

        class Network(nn.Module):
            def forward(self, z, clock, label):
                seen.append(label)
                return torch.zeros(len(z), 1)

        model = MixedScore(Network(), CLD(), torch.tensor(0.0), torch.tensor(0.5))
        x0 = torch.zeros(3, 1)
        for conditioning in ("data", "all"):
            pair = PerturbedData.draw(CLD(), x0, 0.5, conditioning=conditioning)
            model.loss(pair, condition=torch.tensor([2, 0, 1]))
        model(pair.z, 0.5, condition=torch.tensor(4))
        model(pair.z, known(0.5).arguments(pair.z)[0], condition=torch.tensor(5))
        assert [label.tolist() for label in seen] == [[2, 0, 1], [2, 0, 1], [4] * 3, [5] * 3]


class TestRefusals:
    """What makes no mixed score."""

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_variances_have_to_be_finite_and_positive(self, value: float) -> None:
        variance = torch.tensor([1.0, value])
        with pytest.raises(ValueError, match="data_variance must be finite and positive"):
            MixedScore(Constant(CLD()), CLD(), torch.zeros(2), variance)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_means_have_to_be_finite(self, value: float) -> None:
        with pytest.raises(ValueError, match="data_mean must be finite"):
            MixedScore(Constant(CLD()), CLD(), torch.tensor(value), torch.tensor(1.0))

    @pytest.mark.parametrize("value", ["1", None, [1.0]])
    def test_means_and_variances_are_numbers_or_tensors(self, value: Any) -> None:
        with pytest.raises(TypeError, match="data_mean must be a real number"):
            MixedScore(Constant(CLD()), CLD(), value, 1.0)
        with pytest.raises(TypeError, match="data_variance must be a real number"):
            MixedScore(Constant(CLD()), CLD(), 0.0, value)

    def test_mean_and_variance_have_one_shape(self) -> None:
        with pytest.raises(ValueError, match=r"one shape; got \(2,\) and \(\)"):
            MixedScore(Constant(CLD()), CLD(), torch.zeros(2), torch.tensor(1.0))

    def test_a_variance_below_single_precision_is_refused(self) -> None:
        # It would be stored as zero.
        tiny = torch.tensor(1e-50, dtype=torch.float64)
        with pytest.raises(ValueError, match="data_variance"):
            MixedScore(Constant(CLD()), CLD(), torch.zeros(()), tiny)

    def test_inputs_are_one_of_two(self) -> None:
        one = torch.ones(())
        with pytest.raises(ValueError, match="inputs must be one of 'state', 'estimate'; got 'z'"):
            MixedScore(Constant(CLD()), CLD(), one, one, inputs="z")  # type: ignore[arg-type]

    def test_the_convex_form_is_of_the_state(self) -> None:
        one = torch.ones(())
        with pytest.raises(ValueError, match="mixing_logits must be None"):
            MixedScore(Constant(CLD()), CLD(), one, one, inputs="estimate", mixing_logits=one)

    @pytest.mark.parametrize("t", [0.0, torch.tensor([0.5, 0.0, 0.5])])
    @pytest.mark.parametrize("make", [VPSDE, SubVPSDE, CLD, PSLD, HOLD])
    def test_the_start_is_refused(self, make: Any, t: Any) -> None:
        sde = make()
        model = MixedScore(Constant(sde), sde, *reference("scalar"))
        with pytest.raises(ValueError, match=r"no density at t = 0"):
            model(torch.zeros(3, sde.components, *SHAPE), t)

    @pytest.mark.parametrize("shape", [(3, 3, *SHAPE), (3, 1, *SHAPE), (3,), (3, 2)])
    def test_states_that_do_not_fit_are_refused(self, shape: tuple[int, ...]) -> None:
        model = MixedScore(Constant(CLD()), CLD(), *reference("scalar"))
        with pytest.raises(ValueError, match=r"z must have shape \(B, 2, "):
            model(torch.zeros(shape), 0.5)

    def test_data_with_fewer_axes_than_the_variance_are_refused(self) -> None:
        model = MixedScore(Constant(CLD()), CLD(), *reference("pixel"))
        with pytest.raises(ValueError, match=r"data_variance|data_mean|z must"):
            model(torch.zeros(3, 2, 3), 0.5)

    @pytest.mark.parametrize("shape", [(3, 4, 3, 3), (3, 1, 3, 3), (3, 2, 9, 9)])
    def test_a_network_that_returns_another_shape_is_refused(self, shape: Any) -> None:
        class Wrong(nn.Module):
            def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                return torch.zeros(shape)

        model = MixedScore(Wrong(), CLD(), *reference("channel"))
        with pytest.raises(ValueError, match=r"network must return shape \(3, 2, 3, 3\)"):
            model(torch.zeros(3, 2, *SHAPE), 0.5)
