"""The mixed score: an exact Gaussian reference, a network for the rest, and its training loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cldsde import CLD, VPSDE, GaussianMixture, LinearSDE, MixedScore
from cldsde.score import Conversion, PerturbedData, optimal_loss
from probes import generator
from score.cases import (
    FAMILIES,
    PROCESSES,
    Constant,
    assert_rejected,
    each,
    known,
    score_rounding,
)
from tolerances import EPS32, KERNEL, rounding, standard_error

every_process = pytest.mark.parametrize("name", PROCESSES)
every_kind = pytest.mark.parametrize("kind", ["scalar", "channel", "pixel"])
SHAPE = (2, 3, 3)  # channels and pixels
TIMES = torch.tensor([1.0, 0.02, 0.3], dtype=torch.float64)


def reference(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of data of shape SHAPE; numbers that single precision holds exactly."""
    shape: dict[str, tuple[int, ...]] = {"scalar": (), "channel": (2, 1, 1), "pixel": SHAPE}
    g = generator(3)
    mean = torch.randint(-8, 9, shape[kind], generator=g).double() / 8
    variance = torch.randint(1, 17, shape[kind], generator=g).double() / 16
    return mean, variance


def model_of(
    sde: LinearSDE, kind: str = "channel", network: Any = 0.0, **options: Any
) -> MixedScore:
    network = network if isinstance(network, nn.Module) else Constant(sde, network)
    return MixedScore(network, sde, *reference(kind), **options)


def spread(sde: LinearSDE, variance: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """psi, and the covariance Sigma + s^2 psi psi^T for each entry of the data."""
    kernel = sde.marginal(t)
    psi = kernel.mean[:, 0]
    return psi, kernel.covariance + variance[..., None, None] * torch.outer(psi, psi)


def gaussian_score(sde: LinearSDE, kind: str, z: torch.Tensor, t: float) -> Any:
    """Driven rows of -(Sigma + s^2 psi psi^T)^-1 (z - psi m) and the error of this formula."""
    mean, variance = reference(kind)
    psi, covariance = spread(sde, variance.expand(SHAPE), t)
    residual = (z - psi[:, None, None, None] * mean).movedim(1, -1)
    score = -torch.linalg.solve(covariance, residual[..., None])[..., 0].movedim(-1, 1)
    condition = float(torch.linalg.cond(covariance).max())
    score = score[:, list(sde.driven)]
    return score, rounding(64, condition * float(score.abs().max() + 1))


def data_states(sde: LinearSDE, t: Any, n: int = 3) -> torch.Tensor:
    g = generator(5)
    x = torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
    return sde.perturb(x, t, generator=g)[0]


class TestReference:
    """Without a network's contribution the score is the exact score of Gaussian data."""

    @every_kind
    @every_process
    def test_with_a_zero_network_it_is_the_gaussian_score(self, name: str, kind: str) -> None:
        sde = PROCESSES[name]
        z = data_states(sde, TIMES)
        found = model_of(sde, kind)(z, TIMES)
        assert found.shape == (3, len(sde.driven), *SHAPE)
        for i, t in enumerate(TIMES.tolist()):
            expected, tolerance = gaussian_score(sde, kind, z[i : i + 1], t)
            assert (found[i] - expected[0]).abs().max() <= tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("convex", [False, True])
    @every_process
    def test_at_known_times_it_is_the_same_score(
        self, name: str, convex: bool, dtype: torch.dtype
    ) -> None:
        sde = PROCESSES[name]
        logits = torch.tensor([-3.0, 1.0]).reshape(2, 1, 1) if convex else None
        model, times = model_of(sde, network=0.3, mixing_logits=logits), known(*TIMES.tolist())
        for i, t in enumerate(TIMES.tolist()):
            z = data_states(sde, t).to(dtype)
            found, expected = model(z, times.arguments(z)[i]), model(z, t)
            assert found.dtype == expected.dtype == dtype
            # Coefficients of one time or of a grid differ by rounding, in either precision.
            lost = score_rounding(sde, t) * rounding(1, dtype=dtype) / rounding(1)
            assert (found - expected).abs().max() <= lost * expected.abs().max()

    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda model: model.to(torch.float64),
            lambda model: model.to(torch.float32),
            lambda model: loaded(model, other_model(model)),
            lambda model: loaded(model, other_model(model), assign=True),
            lambda model: loaded(nn.ModuleList([model]), nn.ModuleList([other_model(model)]))[0],
        ],
    )
    @pytest.mark.parametrize("logits", [None, torch.tensor([-3.0, 1.0]).reshape(2, 1, 1)])
    @every_kind
    def test_copies_casts_and_loaded_states_are_the_same_model(
        self, kind: str, logits: Any, copied: Callable[[Any], Any]
    ) -> None:
        model, z = model_of(CLD(), kind, 0.7, mixing_logits=logits), data_states(CLD(), 0.3)
        before = model(z, 0.3)
        assert not torch.equal(other_model(model)(z, 0.3), before)
        assert torch.equal(copied(model)(z, 0.3), before)


def other_model(model: MixedScore) -> MixedScore:
    logits = None if model.mixing_logits is None else torch.zeros_like(model.mixing_logits)
    mean, variance = torch.zeros_like(model.data_mean), torch.ones_like(model.data_variance)
    return MixedScore(Constant(model.sde, 0.7), model.sde, mean, variance, mixing_logits=logits)


def loaded(source: Any, target: Any, **options: Any) -> Any:
    target.load_state_dict(source.state_dict(), **options)
    return target


class Spy(nn.Module):
    """Keeps the inputs of the network, and returns zeros."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        self.z, self.clock = z, clock
        return z.new_zeros(len(z), self.outputs, *z.shape[2:])


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
@every_process
class TestNetworkInputs:
    """Inputs of unit variance, and half the log of the signal-to-noise ratio."""

    def test_components_are_scaled_to_unit_variance(self, name: str, t: float) -> None:
        sde = PROCESSES[name]
        network = Spy(2 * len(sde.driven))
        model, (mean, variance) = model_of(sde, network=network), reference("channel")
        psi, covariance = spread(sde, variance, t)
        # The i-th component lies i + 1 standard deviations from its mean.
        stds = covariance.diagonal(dim1=-2, dim2=-1).sqrt().movedim(-1, 0)
        counts = torch.arange(1.0, sde.components + 1).reshape(-1, 1, 1, 1)
        z = (psi[:, None, None, None] * mean + counts * stds).expand(-1, *SHAPE)
        model(z.unsqueeze(0), t)
        expected = counts.expand(-1, *SHAPE).flatten(0, 1).double()
        size = float((psi.abs().max() * mean.abs().max() / stds.min()).clamp_min(1))
        assert torch.allclose(network.z[0], expected, rtol=0, atol=KERNEL * size)

    def test_the_estimate_is_unbiased_and_has_unit_variance(self, name: str, t: float) -> None:
        sde = PROCESSES[name]
        network = Spy(2)
        model = model_of(sde, "scalar", network, inputs="estimate")
        mean, variance = reference("scalar")
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        solved = torch.linalg.solve(kernel.covariance, psi)
        information = float(psi @ solved)
        probes = psi * mean + torch.eye(sde.components, dtype=torch.float64)
        model(probes[..., None, None, None].expand(-1, -1, *SHAPE), t)
        found = network.z[:, 0, 0, 0]
        expected = solved / math.sqrt(information * (1 + float(variance) * information))
        # Probes are rounded relative to psi m, and the covariance is inverted here.
        lost = rounding(64, float(torch.linalg.cond(kernel.covariance)) + 16) + KERNEL
        assert (found - expected).abs().max() <= lost * expected.abs().max()

    def test_the_clock_is_half_the_log_of_the_signal_to_noise_ratio(
        self, name: str, t: float
    ) -> None:
        sde = PROCESSES[name]
        network = Spy(2 * len(sde.driven))
        model_of(sde, "scalar", network)(data_states(sde, t), t)
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        expected = 0.5 * math.log(float(psi @ torch.linalg.solve(kernel.covariance, psi)))
        # The covariance is inverted here.
        tolerance = rounding(64, float(torch.linalg.cond(kernel.covariance))) + KERNEL
        assert network.clock.tolist() == pytest.approx([max(expected, -10.0)] * 3, abs=tolerance)


class Denoiser(nn.Module):
    """Ideal network for scalar data at one of a few points, in closed form.

    The data are estimated as u = x_0 + exp(-clock) normals; the input is u less the mean of the
    data in units of its size.
    """

    points = torch.tensor([-1.25, 0.25, 1.5], dtype=torch.float64)
    mean, variance = 0.25, 0.5

    def forward(self, estimate: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        noise = (-2 * clock).exp()[:, None, None, None]
        u = self.mean + estimate * (self.variance + noise).sqrt()
        weights = (-((u[..., None] - self.points) ** 2) / (2 * noise[..., None])).softmax(-1)
        found = (weights * self.points).sum(-1)
        reference = self.mean + self.variance / (self.variance + noise) * (u - self.mean)
        left = (self.variance * noise / (self.variance + noise)).sqrt()
        return (reference - found) / left


class TestEstimates:
    """A network whose input is the best unbiased estimate of the data."""

    @pytest.mark.parametrize("t", [0.05, 1.0])
    @every_process
    def test_one_network_has_the_scores_of_all_processes(self, name: str, t: float) -> None:
        sde, network = PROCESSES[name], Denoiser()
        model = MixedScore(network, sde, network.mean, network.variance, inputs="estimate")
        g = generator(3)
        x = network.points[torch.randint(3, (5, *SHAPE), generator=g)]
        z = sde.perturb(x, t, generator=g)[0]
        points = GaussianMixture([1.0] * 3, network.points[:, None].tolist(), [[[0.0]]] * 3)
        each = z.movedim(1, -1).reshape(-1, sde.components, 1)
        expected = points.score(sde)(each, t).reshape(5, *SHAPE, -1).movedim(-1, 1)
        # An error in the estimate is multiplied by the signal-to-noise ratio in the weights of the
        # points, and the remaining error by the root of the score.
        snr = math.exp(2 * float(sde.log_snr(t)))
        lost = 64 * score_rounding(sde, t) * max(1.0, snr)
        assert (model(z, t) - expected).abs().max() <= lost * expected.abs().max()

    def test_for_one_component_it_is_the_state(self) -> None:
        network = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        shown = lambda z, clock: network(z)  # noqa: E731
        module = nn.Module()
        module.forward = shown  # type: ignore[method-assign]
        z = data_states(VPSDE(), 0.3)
        one, other = (model_of(VPSDE(), "channel", module, inputs=i)(z, 0.3) for i in INPUTS)
        assert torch.allclose(one, other, rtol=0, atol=KERNEL * float(one.detach().abs().max()))


INPUTS: Any = ("state", "estimate")


@pytest.mark.parametrize("convex", [False, True])
@every_process
def test_score_and_noise_are_one_prediction(name: str, convex: bool) -> None:
    sde = PROCESSES[name]
    logits = torch.full((2, 1, 1), -0.5) if convex else None
    model, z = model_of(sde, network=0.7, mixing_logits=logits), data_states(sde, TIMES)
    noise, score = model(z, TIMES, prediction="noise").detach(), model(z, TIMES).detach()
    assert noise.shape == score.shape == (3, len(sde.driven), *SHAPE)
    assert torch.equal(model(z, TIMES, prediction="score"), score)
    found = Conversion.at(sde, TIMES, "score", "noise")(z, score)
    for i, t in enumerate(TIMES.tolist()):
        # There and back by a triangular matrix.
        lost = score_rounding(sde, t) * float(noise[i].abs().max())
        assert (found[i] - noise[i]).abs().max() <= lost


class TestConvexForm:
    """Weights between reference and network that are learnt."""

    @pytest.mark.parametrize("logit", [-200.0, -3.0, 1.5, 200.0])
    @every_process
    def test_noise_is_the_mean_of_reference_and_network(self, name: str, logit: float) -> None:
        sde = PROCESSES[name]
        z = data_states(sde, 0.3)
        model = model_of(sde, network=0.7, mixing_logits=torch.tensor(logit))
        found = model(z, 0.3, prediction="noise")
        plain = model_of(sde)(z, 0.3, prediction="noise")
        a = 1 / (1 + math.exp(-logit))
        tolerance = rounding(16, float(plain.abs().max() + 1))
        assert torch.allclose(found, (1 - a) * plain + a * 0.7, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("shape", [(2, 1, 1), (1, 3, 3), SHAPE])
    def test_logits_broadcast_with_the_data(self, shape: tuple[int, ...]) -> None:
        sde, logits = FAMILIES["PSLD"], torch.randn(shape, generator=generator(1))
        z = data_states(sde, 0.3)
        model = model_of(sde, network=0.7, mixing_logits=logits)
        plain = model_of(sde)(z, 0.3, prediction="noise")
        # Both driven components have the same weights.
        a = logits.double().sigmoid().expand(SHAPE)
        tolerance = rounding(16, float(plain.abs().max() + 1))
        found = model(z, 0.3, prediction="noise")
        assert torch.allclose(found, (1 - a) * plain + a * 0.7, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("name", ["CLD", "PSLD"])
    def test_gradients_reach_the_logits(self, name: str) -> None:
        sde, logits = FAMILIES[name], torch.tensor([-3.0, 1.0]).reshape(2, 1, 1)
        model = model_of(sde, network=0.7, mixing_logits=logits)
        assert [name for name, _ in model.named_parameters()] == ["mixing_logits"]
        x = torch.randn(4, *SHAPE, generator=generator(2), dtype=torch.float64)
        pair = PerturbedData.draw(sde, x, 0.3, generator=generator())
        noise = model(pair.z, pair.t, prediction="noise")
        pair.loss(noise).mean().backward()
        # d n / d logit = a (1 - a) (0.7 - n_ref), and n - n_ref = a (0.7 - n_ref).
        plain = model_of(sde)(pair.z, pair.t, prediction="noise")
        a = logits.double().sigmoid()
        slope = 2 * (noise - pair.noise) * a * (1 - a) * (0.7 - plain) / noise.numel()
        expected = slope.sum((0, 1, 3, 4)).detach()
        assert model.mixing_logits is not None
        assert model.mixing_logits.grad is not None
        found = model.mixing_logits.grad.flatten().double()
        # Gradients are summed in single precision.
        assert torch.allclose(found, expected, rtol=100 * EPS32, atol=EPS32)
        # The caller's logits are copied.
        model.mixing_logits.data += 1
        assert logits.flatten().tolist() == [-3.0, 1.0]

    def test_the_forms_do_not_load_each_other(self) -> None:
        forms = model_of(CLD()), model_of(CLD(), mixing_logits=torch.zeros(2, 1, 1))
        for source, target in (forms, forms[::-1]):
            with pytest.raises(RuntimeError, match="mixing_logits"):
                loaded(source, target)


@every_kind
@every_process
def test_residual_variance_is_the_variance_of_the_unpredictable_noise(name: str, kind: str) -> None:
    sde, s2 = PROCESSES[name], reference(kind)[1].flatten()
    found = model_of(sde, kind).residual_variance(TIMES)
    assert found.shape == (3,)
    driven = list(sde.driven)
    for value, t in zip(found.tolist(), TIMES.tolist(), strict=True):
        # n* = K^T (P (z - psi x))_d with P = Sigma^-1 and K K^T = (P_dd)^-1. The best prediction
        # of P (z - psi x) leaves P - (Sigma + s^2 psi psi^T)^-1 = s^2 b b^T / (1 + s^2 psi^T b).
        kernel = sde.marginal(t)
        psi, precision = kernel.mean[:, 0], torch.linalg.inv(kernel.covariance)
        K, b = (
            torch.linalg.cholesky(torch.linalg.inv(precision[driven][:, driven])),
            precision @ psi,
        )
        left = s2 * (K.mT @ b[driven]).square().mean() / (1 + s2 * (psi @ b))
        tolerance = rounding(64, float(torch.linalg.cond(kernel.covariance)))
        assert value == pytest.approx(float(left.mean()), rel=tolerance)


class TestLoss:
    """`MixedScore.loss`, for targets conditioned on the data or on all of z_0."""

    @pytest.mark.parametrize("weighting", ["reweighted", "likelihood"])
    @pytest.mark.parametrize("conditioning", ["data", "all"])
    @pytest.mark.parametrize("name", ["VE", "CLD", "PSLD", "HOLD", "first two of three driven"])
    def test_the_exact_score_of_gaussian_data_attains_the_least_loss(
        self, name: str, conditioning: Any, weighting: Any
    ) -> None:
        sde, variance, n, t = PROCESSES[name], 0.3, 10_000, 0.02
        model = MixedScore(Constant(sde), sde, 0.25, variance).double()
        g = generator()
        x0 = 0.25 + variance**0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
        pair = PerturbedData.draw(sde, x0, t, conditioning=conditioning, generator=g)
        losses = model.loss(pair, weighting=weighting)
        least = optimal_loss(
            sde, t, data_variance=variance, conditioning=conditioning, weighting=weighting
        )
        # The buffers of the reference are in single precision.
        error = standard_error(float(losses.std()), n) + 100 * EPS32 * float(least)
        assert float(losses.mean()) == pytest.approx(float(least), abs=error)

    def test_hybrid_score_matching_is_the_loss_of_the_predicted_noise(self) -> None:
        sde, t = CLD(), torch.linspace(0.01, 1, 6, dtype=torch.float64)
        model = MixedScore(Constant(sde, 0.3), sde, 0.25, 0.5)
        pair = PerturbedData.draw(sde, torch.randn(6, 1, generator=generator(1)), t)
        expected = pair.loss(model(pair.z, pair.t, prediction="noise"))
        assert torch.equal(model.loss(pair), expected)

    def test_a_condition_reaches_the_network(self) -> None:
        seen = []

        class Network(nn.Module):
            def forward(self, z: Any, clock: Any, label: torch.Tensor) -> torch.Tensor:
                seen.append(label.tolist())
                return torch.zeros(len(z), 1)

        model = MixedScore(Network(), CLD(), 0.0, 0.5)
        for conditioning in ("data", "all"):
            pair = PerturbedData.draw(CLD(), torch.zeros(3, 1), 0.5, conditioning=conditioning)  # type: ignore[arg-type]
            model.loss(pair, condition=torch.tensor([2, 0, 1]))
        model(pair.z, 0.5, condition=torch.tensor(4))
        model(pair.z, known(0.5).arguments(pair.z)[0], condition=torch.tensor(5))
        assert seen == [[2, 0, 1], [2, 0, 1], [4] * 3, [5] * 3]

    @pytest.mark.parametrize("name", ["VP", "PSLD", "first two of three driven"])
    def test_gradients_reach_the_network(self, name: str) -> None:
        sde = PROCESSES[name]
        layer = nn.Conv2d(2 * sde.components, 2 * len(sde.driven), 3, padding=1)

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.layer(z) * clock[:, None, None, None]
                return found

        pair = PerturbedData.draw(sde, torch.randn(3, *SHAPE, generator=generator()), TIMES)
        loss = model_of(sde, network=Network()).loss(pair)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0


class Wrong(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.shape)


def made(mean: Any = 0.0, variance: Any = 1.0, **options: Any) -> MixedScore:
    return MixedScore(Constant(CLD()), CLD(), mean, variance, **options)


def called(model: Any = None, z: Any = None, t: Any = 0.5, **options: Any) -> Any:
    return (model or made())(torch.zeros(3, 2, *SHAPE) if z is None else z, t, **options)


ONE, NAN, INF = torch.ones(()), math.nan, math.inf
TINY = torch.tensor(1e-50, dtype=torch.float64)
SPLIT = torch.tensor([-3.0, 3.0]).reshape(2, 1, 1)
SHAPES = [(3, 3, *SHAPE), (3, 1, *SHAPE), (3,), (3, 2)]
FEW_AXES = partial(called, model_of(CLD(), "pixel"))


def weighted(shape: tuple[int, ...], z: Any = None) -> Any:
    return called(made(mixing_logits=torch.zeros(shape)), z)


def returning(shape: tuple[int, ...]) -> Any:
    return called(model_of(CLD(), network=Wrong(shape)))


REJECTED = [
    *each(made, ValueError, "data_variance must be finite and", variance=[0.0, -1.0, NAN, TINY]),
    *each(made, ValueError, "data_mean must be finite", mean=[NAN, INF]),
    *each(made, TypeError, "data_mean must be a real number", mean=["1", None, [1.0]]),
    *each(made, TypeError, "data_variance must be a real number", variance=["1", None]),
    *each(made, ValueError, r"one shape; got \(2,\) and \(\)", mean=[torch.zeros(2)]),
    *each(made, ValueError, "inputs must be one of 'state', 'estimate'; got 'z'", inputs=["z"]),
    *each(
        partial(made, inputs="estimate"),
        ValueError,
        "mixing_logits must be None unless",
        mixing_logits=[ONE],
    ),
    *each(
        made,
        ValueError,
        "mixing_logits must be a finite tensor",
        mixing_logits=[ONE * NAN, ONE * INF, -3.0, "-3"],
    ),
    # Weights of each driven component, or of each sample, do not broadcast.
    *each(
        weighted,
        ValueError,
        "mixing_logits must broadcast with the data",
        shape=[(3, 1, 1), (5,), (2, 2, 3, 3), (3, 1, 1, 1, 1)],
    ),
    *each(
        partial(weighted, (2, 1, 1)),
        ValueError,
        "mixing_logits must broadcast with the data",
        z=[torch.ones(2, 2, 3)],
    ),
    *each(called, ValueError, "needs a process of one", prediction=["velocity", "flow"]),
    *each(called, ValueError, "prediction must be one of 'score'", prediction=["full_score", None]),
    *each(called, ValueError, "no density at t = 0", t=[0.0, torch.tensor([0.5, 0.0, 0.5])]),
    *each(called, ValueError, r"z must have shape \(B, 2, ", z=map(torch.zeros, SHAPES)),
    *each(FEW_AXES, ValueError, "the axes of", z=[torch.zeros(3, 2, 3)]),
    *each(
        returning,
        ValueError,
        r"network must return shape \(3, 2, 3, 3\)",
        shape=[(3, 4, 3, 3), (3, 1, 3, 3), (3, 2, 9, 9)],
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REJECTED)
def test_bad_arguments_are_rejected(call: Any, error: Any, message: str) -> None:
    assert_rejected(call, error, message)
