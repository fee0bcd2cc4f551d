"""Triangular factors and eliminations of rows that are zero or parallel, and exponentials."""

import pytest
import torch

from cldsde.linear.blocks import block_exp, lower_factor
from cldsde.linear.series import eliminate
from tolerances import rounding

DEGENERATE = [[[0, 0], [3, 4], [3, 4]], [[3, 4], [3, 4], [0, 0]], [[0, 1], [0, 2], [3, 0]]]
DEGENERATE += [[[0, 0, 0], [3, 4, 0], [1, 1, 2]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
@pytest.mark.parametrize("rows", DEGENERATE)
def test_zero_and_parallel_rows_of_any_size_have_a_factor(rows, scale):
    root = torch.tensor(rows, dtype=torch.float64)
    factor = lower_factor(root * scale) / scale
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() >= 0).all()
    assert not factor[:, factor.diagonal() == 0].any()  # a column without variance stays zero
    # Entries up to 25, a handful of operations.
    assert (factor @ factor.mT - root @ root.mT).abs().max() <= rounding(32, 25)


def test_the_exponential_of_a_turn_is_a_rotation():
    turn, angle = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double(), torch.tensor(100.0).double()
    expected = angle.cos() * torch.eye(2).double() + angle.sin() * turn
    # Twenty terms, whose rounding the squarings multiply by the angle.
    assert (block_exp(angle * turn) - expected).abs().max() <= rounding(20, float(angle))


def test_elimination_of_zeros_has_finite_gradients():
    rows = torch.zeros(2, 2, 3, dtype=torch.float64)
    rows[1] = torch.eye(2, 3)
    multipliers, eliminated = eliminate(rows.requires_grad_())
    assert torch.equal(eliminated, rows)
    (gradient,) = torch.autograd.grad(multipliers.sum() + eliminated.sum(), rows)
    assert torch.equal(gradient, torch.ones(2, 2, 3, dtype=torch.float64))
