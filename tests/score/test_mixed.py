"""The mixed score: an exact Gaussian reference, a network for the rest, and its training loss."""

import copy

import mpmath as mp
import pytest
import torch
from torch import nn

from cldsde import CLD, VPSDE, MixedScore, ReverseProcess, solvers
from cldsde.score import Conversion, PerturbedData, optimal_loss
from probes import generator, normals, tensor
from references.mixtures import MIXTURE_DIGITS
from score.cases import PROCESSES, Constant, called, condition, inverted, known, score_rounding
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
STORED = 1e-7  # a variance in single precision
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
def test_with_a_zero_network_it_is_the_gaussian_score_or_its_noise(name, kind):
    """Driven rows of -(Sigma + s^2 psi psi^T)^-1 (z - psi m)."""
    sde, (mean, variance) = PROCESSES[name], reference(kind)
    z, model = data_states(sde, TIMES), model_of(sde, kind)
    found, noise = model(z, TIMES), model(z, TIMES, prediction="noise")
    from_score = Conversion.at(sde, TIMES, "score", "noise")(z, found)
    for i, t in enumerate(TIMES.tolist()):
        psi, covariance = spread(sde, variance.expand(SHAPE), t)
        residual = (z[i] - psi[:, None, None, None] * mean).movedim(0, -1)
        score = -torch.linalg.solve(covariance, residual[..., None])[..., 0].movedim(-1, 0)
        expected = score[list(sde.driven)]
        lost = rounding(64, float(torch.linalg.cond(covariance).max()))
        assert torch.allclose(found[i], expected, rtol=0, atol=lost * float(score.abs().max() + 1))
        # There and back by a triangular matrix.
        lost = score_rounding(sde, t) * float(noise[i].abs().max())
        assert (from_score[i] - noise[i]).abs().max() <= lost


@pytest.mark.parametrize("logits", [None, LOGITS])
def test_copies_casts_and_loaded_states_are_the_same_model(logits):
    z, means = data_states(CLD(), 0.3), [x.float() for x in reference("channel")]
    model, other = (
        MixedScore(Constant(CLD(), 0.7), CLD(), mean, variance, mixing_logits=logits)
        for mean, variance in (means, (means[0], means[1] + 1))
    )
    before, own = model(z, 0.3), [x.clone() for x in means]
    assert not torch.equal(other(z, 0.3), before)
    # They share no memory with each other, or with the caller's tensors.
    other.load_state_dict({name: x + 1 for name, x in other.state_dict().items()})
    assert all(map(torch.equal, means, own))
    assert torch.equal(model(z, 0.3), before)
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), other, model.to(torch.float64), model.to(torch.float32)):
        assert torch.equal(copied(z, 0.3), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inference", [False, True])
def test_changes_of_the_buffers_change_the_score(inference, dtype):
    """As mean and variance that the model was made with, also in plans that were used before."""
    sde, z = CLD(), data_states(CLD(), 1.0)
    with torch.inference_mode(inference):
        model = model_of(sde, network=0.7).to(dtype)
    process, solver = ReverseProcess(sde, model), solvers.ExponentialMultistep()
    sampler = solvers.plan(process, solver, TIMES[[0, 2]])
    before = sampler.solve(z).state
    with torch.inference_mode(inference):
        for buffer in model.buffers():
            buffer.mul_(2)
    mean, variance = reference("channel")
    other = MixedScore(Constant(sde, 0.7), sde, 2 * mean, 2 * variance)
    expected = sampler.with_score(other).solve(z).state
    assert not torch.equal(expected, before)
    assert torch.equal(sampler.solve(z).state, expected)
    assert torch.equal(model(z, 0.3), other(z, 0.3))
    assert torch.equal(model.residual_variance(TIMES), other.residual_variance(TIMES))
    loaded = model_of(sde, network=0.7)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(z, 0.3), other(z, 0.3))


class Spy(Constant):
    """Keeps the inputs of the network, and returns zeros."""

    def forward(self, z, clock):
        self.z, self.clock = z, clock
        return super().forward(z, clock)


every_time = pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])


@pytest.mark.one_in(2)
@every_time
@every_process
def test_components_are_scaled_to_unit_variance(name, t):
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


@pytest.mark.one_in(2)
@every_time
@every_process
def test_the_estimate_is_unbiased_of_unit_variance_and_the_clock_its_noise_level(name, t):
    sde, network, (mean, variance) = PROCESSES[name], Spy(VPSDE()), reference("scalar")
    kernel = sde.marginal(t)
    with mp.workdps(MIXTURE_DIGITS):
        psi, _, solved = inverted(kernel)
        information = (psi.T * solved)[0]
        scale = mp.sqrt(information * (1 + float(variance) * information))
        expected = tensor([*map(float, solved / scale)])
        clock = max(float(mp.log(information) / 2), -10.0)
    probes = kernel.mean[:, 0] * mean + torch.eye(sde.components, dtype=torch.float64)
    z = probes[..., None, None, None].expand(-1, -1, *SHAPE)
    model_of(sde, "scalar", network, inputs="estimate")(z, t)
    # Triangular solves lose the condition number of the root; probes are rounded, too.
    lost = rounding(16, condition(kernel.root))
    assert (network.z[:, 0, 0, 0] - expected).abs().max() <= lost * expected.abs().max()
    assert network.clock.tolist() == pytest.approx([clock] * sde.components, abs=lost)


CONVEX = [torch.tensor(-200.0), torch.tensor(1.5)]
CONVEX += [torch.randn(shape, generator=generator(1)) for shape in ((2, 1, 1), SHAPE)]


@pytest.mark.parametrize("logits", CONVEX)
@pytest.mark.parametrize("name", ["VP", "PSLD", "first two of three driven"])
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


def test_gradients_reach_the_logits():
    model = model_of(PROCESSES["PSLD"], network=0.7, mixing_logits=LOGITS)
    assert [name for name, _ in model.named_parameters()] == ["mixing_logits"]
    pair = PerturbedData.draw(model.sde, torch.ones(4, *SHAPE).double(), 0.3, generator=generator())
    model.loss(pair).mean().backward()
    assert model.mixing_logits.grad.ne(0).all()


@pytest.mark.one_in(3)
@every_kind
@every_process
def test_residual_variance_is_the_mean_of_the_least_losses(name, kind):
    sde, variances = PROCESSES[name], reference(kind)[1].flatten().tolist()
    losses = [optimal_loss(sde, TIMES, data_variance=variance) for variance in variances]
    expected = torch.stack(losses).mean(0)
    # Triangular solves lose the condition number of the root.
    lost = rounding(16, condition(sde.marginal(TIMES).root))
    model = model_of(sde, kind)
    assert torch.allclose(model.residual_variance(TIMES), expected, rtol=lost, atol=0)
    for prediction in ("velocity", "flow") if sde.components == 1 else ():
        change = Conversion.at(sde, TIMES, "noise", prediction).value.flatten()
        found = model.residual_variance(TIMES, prediction)
        assert torch.allclose(found, change**2 * expected, rtol=STORED, atol=0)


def test_a_condition_reaches_the_network():
    network, seen = nn.Module(), []
    network.forward = lambda z, clock, label: seen.append(label.tolist()) or z[:, :1]
    model = MixedScore(network, CLD(), 0.0, 0.5)
    pair = PerturbedData.draw(CLD(), torch.zeros(3, 1), 0.5)
    model.loss(pair, condition=torch.tensor([2, 0, 1]))
    model(pair.z, 0.5, condition=torch.tensor(4))
    called(model, pair.z, known(0.5).arguments(pair.z)[0], condition=torch.tensor(5))
    assert seen == [[2, 0, 1], [4] * 3, [5] * 3]


def test_a_network_gets_the_time_in_single_precision():
    """And the state in the precision of its parameters, whatever the precision of the states."""
    network, seen = nn.Linear(1, 1).to(torch.bfloat16), []
    network.forward = lambda z, clock: seen.append((z.dtype, clock.dtype)) or z
    model = MixedScore(network, VPSDE(), 0.0, 0.5)
    for dtype in (torch.bfloat16, torch.float32):
        assert model(torch.zeros(3, 1, 1, dtype=dtype), 0.3).dtype == dtype
    assert seen == [(torch.bfloat16, torch.float32)] * 2
