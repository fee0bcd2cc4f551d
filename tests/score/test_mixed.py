"""The mixed score: an exact Gaussian reference, a network for the rest, and its training loss."""

import copy

import mpmath as mp
import pytest
import torch
from torch import nn

from cldsde import CLD, VPSDE, MixedScore
from cldsde.score import Conversion, PerturbedData
from probes import generator, normals, tensor
from references.mixtures import MIXTURE_DIGITS
from score.cases import (
    FAMILIES,
    PROCESSES,
    Constant,
    called,
    condition,
    inverted,
    known,
    score_rounding,
)
from tolerances import KERNEL, rounding

every_process = pytest.mark.parametrize("name", PROCESSES)
KINDS = {  # shapes of mean and variance
    "scalar": ((), ()),
    "channel": ((2, 1, 1), (2, 1, 1)),
    "pixel": ((2, 3, 3), (2, 3, 3)),
    "channel, scalar": ((2, 1, 1), ()),
    "channel, row": ((2, 1, 1), (1, 3, 1)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (2, 3, 3)  # channels and pixels
TIMES = torch.tensor([1.0, 0.02, 0.3], dtype=torch.float64)
LOGITS = torch.tensor([-3.0, 1.0]).reshape(2, 1, 1)


def reference(kind):
    """Mean and variance of data of shape SHAPE; numbers that single precision holds exactly."""
    (mean, variance), g = KINDS[kind], generator(3)
    mean = torch.randint(-8, 9, mean, generator=g).double() / 8
    return mean, torch.randint(1, 17, variance, generator=g).double() / 16


def model_of(sde, kind="channel", network=0.0, **options):
    network = network if isinstance(network, nn.Module) else Constant(sde, network)
    return MixedScore(network, sde, *reference(kind), **options)


def spread(sde, variance, t):
    """psi, and the covariance Sigma + s^2 psi psi^T for each entry of the data."""
    kernel = sde.marginal(t)
    psi = kernel.mean[:, 0]
    return psi, kernel.covariance + variance[..., None, None] * torch.outer(psi, psi)


def data_states(sde, t):
    return sde.perturb(normals(5, 3, *SHAPE), t, generator=generator(6))[0]


@pytest.mark.one_in(3)
@every_kind
@every_process
def test_with_a_zero_network_it_is_the_gaussian_score(name, kind):
    """Driven rows of -(Sigma + s^2 psi psi^T)^-1 (z - psi m)."""
    sde, (mean, variance) = PROCESSES[name], reference(kind)
    z = data_states(sde, TIMES)
    found = model_of(sde, kind)(z, TIMES)
    for i, t in enumerate(TIMES.tolist()):
        psi, covariance = spread(sde, variance.expand(SHAPE), t)
        residual = (z[i] - psi[:, None, None, None] * mean).movedim(0, -1)
        score = -torch.linalg.solve(covariance, residual[..., None])[..., 0].movedim(-1, 0)
        expected = score[list(sde.driven)]
        lost = rounding(64, float(torch.linalg.cond(covariance).max()))
        assert torch.allclose(found[i], expected, rtol=0, atol=lost * float(score.abs().max() + 1))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [None, LOGITS])
@every_process
def test_at_known_times_it_is_the_same_score(name, logits, dtype):
    sde = PROCESSES[name]
    model, times = model_of(sde, network=0.3, mixing_logits=logits), known(*TIMES.tolist())
    for i, t in enumerate(TIMES.tolist()):
        z = data_states(sde, t).to(dtype)
        found, expected = called(model, z, times.arguments(z)[i]), model(z, t)
        assert found.dtype == expected.dtype == dtype
        # Coefficients of one time or of a grid differ by rounding, in either precision.
        lost = score_rounding(sde, t) * rounding(1, dtype=dtype) / rounding(1)
        assert (found - expected).abs().max() <= lost * expected.abs().max()


@pytest.mark.parametrize("logits", [None, LOGITS])
def test_copies_casts_and_loaded_states_are_the_same_model(logits):
    z, means = data_states(CLD(), 0.3), reference("channel")
    model = MixedScore(Constant(CLD(), 0.7), CLD(), *means, mixing_logits=logits)
    other = MixedScore(Constant(CLD(), 0.7), CLD(), 0 * means[0], 1.0, mixing_logits=logits)
    before = model(z, 0.3)
    assert not torch.equal(other(z, 0.3), before)
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), other, model.to(torch.float64), model.to(torch.float32)):
        assert torch.equal(copied(z, 0.3), before)


def test_models_of_the_same_tensors_share_no_memory():
    means = [x.float() for x in reference("channel")]
    before = [x.clone() for x in means]
    one, other = (MixedScore(Constant(CLD()), CLD(), *means) for _ in range(2))
    other.load_state_dict({name: x + 1 for name, x in other.state_dict().items()})
    for found in (means, (one.data_mean, one.data_variance)):
        assert all(map(torch.equal, found, before))


class Spy(nn.Module):
    """Keeps the inputs of the network, and returns zeros."""

    def __init__(self, sde):
        super().__init__()
        self.zeros = Constant(sde)

    def forward(self, z, clock):
        self.z, self.clock = z, clock
        return self.zeros(z, clock)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
@every_process
class TestNetworkInputs:
    """Inputs of unit variance, and half the log of the signal-to-noise ratio."""

    def test_components_are_scaled_to_unit_variance(self, name, t):
        sde, (mean, variance) = PROCESSES[name], reference("channel")
        network = Spy(sde)
        psi, covariance = spread(sde, variance, t)
        # The i-th component lies i + 1 standard deviations from its mean.
        stds = covariance.diagonal(dim1=-2, dim2=-1).sqrt().movedim(-1, 0)
        counts = torch.arange(1.0, sde.components + 1).reshape(-1, 1, 1, 1)
        z = (psi[:, None, None, None] * mean + counts * stds).expand(-1, *SHAPE)
        model_of(sde, network=network)(z.unsqueeze(0), t)
        expected = counts.expand(-1, *SHAPE).flatten(0, 1).double()
        size = float((psi.abs().max() * mean.abs().max() / stds.min()).clamp_min(1))
        assert torch.allclose(network.z[0], expected, rtol=0, atol=KERNEL * size)

    def test_the_estimate_is_unbiased_of_unit_variance_and_the_clock_its_noise_level(self, name, t):
        sde, network, (mean, variance) = PROCESSES[name], Spy(VPSDE()), reference("scalar")
        kernel = sde.marginal(t)
        with mp.workdps(MIXTURE_DIGITS):
            psi, _, solved = inverted(kernel)
            information = (psi.T * solved)[0]
            scale = mp.sqrt(information * (1 + float(variance) * information))
            expected, clock = tensor([*map(float, solved / scale)]), float(mp.log(information) / 2)
        probes = kernel.mean[:, 0] * mean + torch.eye(sde.components, dtype=torch.float64)
        z = probes[..., None, None, None].expand(-1, -1, *SHAPE)
        model_of(sde, "scalar", network, inputs="estimate")(z, t)
        # Triangular solves lose the condition number of the root; probes are rounded, too.
        lost = rounding(16, condition(kernel.root))
        assert (network.z[:, 0, 0, 0] - expected).abs().max() <= lost * expected.abs().max()
        assert network.clock.tolist() == pytest.approx(
            [max(clock, -10.0)] * sde.components, abs=lost
        )


@pytest.mark.parametrize("logits", [None, torch.full((2, 1, 1), -0.5)])
@every_process
def test_score_and_noise_are_one_prediction(name, logits):
    sde = PROCESSES[name]
    model, z = model_of(sde, network=0.7, mixing_logits=logits), data_states(sde, TIMES)
    noise, score = model(z, TIMES, prediction="noise").detach(), model(z, TIMES).detach()
    assert torch.equal(model(z, TIMES, prediction="score"), score)
    found = Conversion.at(sde, TIMES, "score", "noise")(z, score)
    for i, t in enumerate(TIMES.tolist()):
        # There and back by a triangular matrix.
        lost = score_rounding(sde, t) * float(noise[i].abs().max())
        assert (found[i] - noise[i]).abs().max() <= lost


CONVEX = [torch.tensor(x) for x in (-200.0, -3.0, 1.5, 200.0)]
CONVEX += [torch.randn(shape, generator=generator(1)) for shape in ((2, 1, 1), (1, 3, 3), SHAPE)]


@pytest.mark.parametrize("logits", CONVEX)
@pytest.mark.parametrize("name", ["VP", "CLD", "PSLD", "first two of three driven"])
def test_convex_noise_is_the_mean_of_reference_and_network(name, logits):
    sde = PROCESSES[name]
    z = data_states(sde, 0.3)
    found, plain = (
        model_of(sde, network=network, mixing_logits=mixing)(z, 0.3, prediction="noise")
        for network, mixing in ((0.7, logits), (0.0, None))
    )
    # All driven components have the same weights.
    a = logits.double().sigmoid().expand(SHAPE)
    tolerance = rounding(16, float(plain.abs().max() + 1))
    assert torch.allclose(found, (1 - a) * plain + a * 0.7, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["CLD", "PSLD"])
def test_gradients_reach_the_logits(name):
    logits = LOGITS.clone()
    model = model_of(FAMILIES[name], network=0.7, mixing_logits=logits)
    assert [name for name, _ in model.named_parameters()] == ["mixing_logits"]
    pair = PerturbedData.draw(model.sde, torch.ones(4, *SHAPE).double(), 0.3, generator=generator())
    model.loss(pair).mean().backward()
    assert model.mixing_logits.grad.ne(0).all()
    model.mixing_logits.data += 1
    assert torch.equal(logits, LOGITS)  # the caller's logits are copied


@pytest.mark.one_in(3)
@every_kind
@every_process
def test_residual_variance_is_the_variance_of_the_unpredictable_noise(name, kind):
    sde, s2 = PROCESSES[name], reference(kind)[1].flatten()
    found, driven = model_of(sde, kind).residual_variance(TIMES), list(sde.driven)
    assert found.shape == (3,)
    for value, t in zip(found.tolist(), TIMES.tolist(), strict=True):
        # n* = K^T (P (z - psi x))_d with P = Sigma^-1 and K K^T = (P_dd)^-1. The best prediction
        # of P (z - psi x) leaves P - (Sigma + s^2 psi psi^T)^-1 = s^2 b b^T / (1 + s^2 psi^T b).
        kernel = sde.marginal(t)
        with mp.workdps(MIXTURE_DIGITS):
            psi, P, b = inverted(kernel)
            rows = mp.matrix([b[i] for i in driven])
            block = mp.matrix([[P[i, j] for j in driven] for i in driven])
            part, gain = (rows.T * mp.inverse(block) * rows)[0] / len(rows), (psi.T * b)[0]
            left = float(sum(s * part / (1 + s * gain) for s in s2.tolist()) / len(s2))
        # Triangular solves lose the condition number of the root.
        assert value == pytest.approx(left, rel=rounding(16, condition(kernel.root)), abs=0)


def test_a_condition_reaches_the_network():
    network, seen = nn.Module(), []
    network.forward = lambda z, clock, label: seen.append(label.tolist()) or torch.zeros(len(z), 1)
    model = MixedScore(network, CLD(), 0.0, 0.5)
    pair = PerturbedData.draw(CLD(), torch.zeros(3, 1), 0.5)
    model.loss(pair, condition=torch.tensor([2, 0, 1]))
    model(pair.z, 0.5, condition=torch.tensor(4))
    called(model, pair.z, known(0.5).arguments(pair.z)[0], condition=torch.tensor(5))
    assert seen == [[2, 0, 1], [4] * 3, [5] * 3]


def test_a_network_gets_the_time_in_single_precision():
    """And the state in the precision of its parameters, whatever the precision of the states."""
    network, seen = nn.Linear(1, 1).to(torch.bfloat16), []
    forward = lambda z, clock: seen.append((z.dtype, clock.dtype)) or z  # noqa: E731
    network.forward = forward
    model = MixedScore(network, VPSDE(), 0.0, 0.5)
    for dtype in (torch.bfloat16, torch.float32):
        assert model(torch.zeros(3, 1, 1, dtype=dtype), 0.3).dtype == dtype
    assert seen == [(torch.bfloat16, torch.float32)] * 2
