"""Kernels are differentiable in the matrices, the schedule, the initial law, and time.

`torch.autograd.gradcheck` compares with central differences of step 1e-6 in float64, whose own
error is about 1e-10 of the function's third derivative plus 1e-10 of rounding; its tolerances are
torch's defaults, 1e-5 absolute and 1e-3 relative.
"""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE

A = torch.tensor([[0.0, 4.0], [-1.0, -4.0]], dtype=torch.float64)
Q_ROOT = torch.tensor([[0.0], [1.4]], dtype=torch.float64)
INITIAL = torch.tensor([[0.3, 0.05], [0.05, 0.2]], dtype=torch.float64)
TIMES = torch.tensor([1e-3, 0.2, 0.9], dtype=torch.float64)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def kernel(A, Q_root, start, end, t):
    sde = LinearSDE.from_matrices(A, Q_root, (start, end), stationary_covariance=None)
    law = sde.marginal(t, INITIAL)
    return law.mean, law.root


@pytest.mark.parametrize("argument", range(5))
def test_marginals_are_differentiable_in_every_parameter(argument):
    start, end = (torch.tensor(x, dtype=torch.float64) for x in (0.5, 3.0))
    arguments = [A, Q_ROOT, start, end, TIMES]
    arguments[argument] = leaf(arguments[argument])
    assert torch.autograd.gradcheck(kernel, arguments, eps=1e-6)


def test_transitions_are_differentiable_in_both_ends():
    sde = LinearSDE.from_matrices(A, Q_ROOT, (0.5, 3.0))

    def transition(s, t):
        law = sde.transition(s, t)
        return law.mean, law.root

    s = leaf(torch.tensor([0.1, 0.5], dtype=torch.float64))
    t = leaf(torch.tensor([0.2, 0.9], dtype=torch.float64))
    assert torch.autograd.gradcheck(transition, (s, t), eps=1e-6)


@pytest.mark.parametrize("initial", [INITIAL, torch.diag(torch.tensor([0.01, 0.01]).double())])
def test_marginals_are_differentiable_in_the_initial_covariance(initial):
    sde = LinearSDE.from_matrices(A, Q_ROOT, 4.0)

    def covariance(upper):
        matrix = torch.stack([torch.stack([upper[0], upper[1]]), torch.stack([upper[1], upper[2]])])
        return sde.marginal(0.1, matrix).covariance

    upper = leaf(torch.stack([initial[0, 0], initial[0, 1], initial[1, 1]]))
    assert torch.autograd.gradcheck(covariance, (upper,), eps=1e-6)


def test_gradients_are_finite_where_the_law_is_singular():
    sde = LinearSDE.from_matrices(leaf(A), leaf(Q_ROOT), 4.0)
    t = leaf(torch.tensor([0.0, 0.5], dtype=torch.float64))
    variance = leaf(torch.tensor([0.0, 0.01], dtype=torch.float64))
    law = sde.marginal(t, variance.diag())
    (law.mean.sum() + law.root.sum()).backward()
    assert t.grad.isfinite().all()
    assert variance.grad.isfinite().all()


def test_matrices_may_be_put_together_of_parameters():
    stiffness = leaf(torch.tensor(2.0, dtype=torch.float64))
    sde = LinearSDE.from_matrices([[-stiffness]], [[1.0]])
    sde.transition(0.0, 0.5).mean.sum().backward()
    # d/da e^{−a/2} = −½ e^{−a/2} at a = 2; a few roundings.
    assert stiffness.grad.item() == pytest.approx(-0.5 * torch.tensor(-1.0).double().exp().item())


LEARNT = {
    "VP": (VPSDE, (0.1, 20.0)),
    "VP, cosine": (lambda *x: VPSDE(schedule=Schedule.cosine(*x)), (0.01, 0.9)),
    "sub-VP": (SubVPSDE, (0.1, 20.0)),
    "VE": (VESDE, (0.1, 20.0)),
    "CLD": (CLD, (4.0, 0.25, 1.0, 0.04)),
    "CLD, position noise": (lambda *x: CLD(mass=x[0], position_noise=x[1]), (0.25, 0.3)),
    "PSLD": (lambda *x: PSLD(8.0, *x), (0.5, 4.0, 0.25, 0.04)),
    "HOLD": (lambda *x: HOLD(4.0, *x), (2.8, 5.0, 1.2, 0.04)),
}


@pytest.mark.parametrize("name", list(LEARNT))
def test_processes_with_names_are_differentiable_in_their_parameters(name):
    make, values = LEARNT[name]
    parameters = [leaf(torch.tensor(x, dtype=torch.float64)) for x in values]

    def laws(*parameters):
        sde = make(*parameters)
        marginal, step = sde.marginal(TIMES), sde.transition(0.2, 0.9)
        return marginal.mean, marginal.root, step.mean, step.root, sde.prior.root

    assert torch.autograd.gradcheck(laws, parameters, eps=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_learnt_parameters_are_checked_like_numbers(value):
    learnt = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="mass must be finite and positive"):
        CLD(mass=learnt)
