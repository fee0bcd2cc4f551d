"""Kernels are differentiable in the matrices, the schedule, the initial law, and time.

`torch.autograd.gradcheck` compares with central differences of step 1e-6 in float64, whose own
error is about 1e-10 of the function's third derivative plus 1e-10 of rounding; its tolerances are
torch's defaults, 1e-5 absolute and 1e-3 relative.
"""

from __future__ import annotations

import pytest
import torch

from cldsde import LinearSDE

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
