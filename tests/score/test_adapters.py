"""Processes as right-hand sides of torchdiffeq and torchsde."""

import itertools

import numpy as np
import pytest
import torch

from cldsde import CLD, ReverseProcess
from cldsde.score.adapters import as_torchdiffeq, as_torchsde
from gaussian_data import PROCESSES, reverse
from probes import Smooth, generator, start, tensor

# Two ways to a covariance, whose inverse loses up to two digits.
ROUNDING = 1e-11

every_process = pytest.mark.parametrize("name", list(PROCESSES))


@every_process
def test_a_flow_is_the_drift_or_the_probability_flow(name):
    (sde, exact), t = PROCESSES[name], 0.37
    z = start(sde, (4, 1))
    expected = exact.clock.rate(t) * exact.A @ z.numpy(), exact.velocity(t, z.numpy())
    for process, velocity in zip((sde, reverse(name)), expected, strict=True):
        found = as_torchdiffeq(process)(tensor(t), z).numpy()
        assert abs(found - velocity).max() <= ROUNDING * (1 + abs(velocity).max())


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_a_row_holds_the_components_of_one_number(shape):
    form, state = as_torchsde(CLD(), shape), torch.randn(3, 2, *shape, generator=generator())
    y = form.pack(state)
    numbers = itertools.product(range(3), *map(range, shape))
    for row, (b, *place) in zip(y, numbers, strict=True):
        assert torch.equal(row, state[(b, slice(None), *place)])
    assert torch.equal(form.unpack(torch.stack([y, 2 * y])), torch.stack([state, 2 * state]))


@every_process
@pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
def test_drift_and_noise_are_those_of_the_process(calculus, name):
    (sde, exact), t = PROCESSES[name], 0.37
    z, rate = start(sde, (4, 1)), exact.clock.rate(t)
    y = z[..., 0].numpy()
    drift = rate * y @ exact.A.T
    score = -(y - exact.mean(t)) @ np.linalg.inv(exact.covariance(t))
    for process, s, expected in (
        (sde, t, drift),
        (reverse(name), -t, rate * score @ exact.Q - drift),
    ):
        form = as_torchsde(process, (1,), calculus=calculus)
        assert (form.noise_type, form.sde_type) == ("additive", calculus)
        assert form.clock(tensor(t)) == s
        f, g = (call(tensor(s), form.pack(z)).numpy() for call in (form.f, form.g))
        assert abs(f - expected).max() <= ROUNDING * (1 + abs(expected).max())
        noise = rate * exact.Q
        assert g.shape == (4, *exact.Q_root.shape)
        assert abs(g @ g.mT - noise).max() <= ROUNDING * noise.max()


def test_parameters_of_a_score_are_those_of_the_adapted_process():
    """An adjoint method looks for them there."""
    process = ReverseProcess(CLD(), Smooth(CLD()))
    for module in (as_torchsde(process, (1,)), as_torchdiffeq(process)):
        assert [name for name, _ in module.named_parameters()] == ["score.function.slope"]


def test_the_drift_of_torchsde_has_gradients():
    score = Smooth(CLD())
    form = as_torchsde(ReverseProcess(CLD(), score), (1,))
    form.f(tensor(-1.0), form.pack(start(CLD(), (4, 1)))).sum().backward()
    assert score.slope.grad.ne(0).all()
