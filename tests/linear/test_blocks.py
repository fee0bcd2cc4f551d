"""Algebra of stacks of small blocks: triangular factors, products, application to states."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde.linear.blocks import apply_blocks, block_exp, block_solve, lower_factor, safe_sqrt
from cldsde.linear.series import eliminate
from probes import normals
from strategies import dtypes, seeds, shapes
from tolerances import EPS, rounding


@given(seeds(), st.integers(1, 4), st.integers(1, 9), shapes(dims=2))
def test_the_factor_is_lower_triangular_and_has_the_gram_matrix(seed, k, n, stack):
    root = normals(seed, k, n, *stack)
    first, rows = (x.movedim((0, 1), (-2, -1)) for x in (lower_factor(root), root))
    assert first.shape == (*stack, k, k)
    assert torch.equal(first, first.tril())
    assert (first.diagonal(dim1=-2, dim2=-1) >= 0).all()
    # k reflections of vectors of length n perturb R by about n k eps, and its Gram matrix by twice
    # as much.
    gram, norm = rows @ rows.mT, torch.linalg.matrix_norm
    assert (norm(first @ first.mT - gram) <= rounding(8 * n * k) * norm(gram)).all()


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_factor_neither_overflows_nor_underflows(scale):
    root = normals(0, 3, 5)
    # Scaling by a number is exact to one rounding an entry.
    expected = lower_factor(root) * scale
    assert torch.allclose(lower_factor(root * scale), expected, rtol=rounding(64), atol=0)


DEGENERATE = [[[0, 0], [3, 4], [3, 4]], [[3, 4], [3, 4], [0, 0]], [[0, 1], [0, 2], [3, 0]]]
DEGENERATE += [[[0, 0, 0], [3, 4, 0], [1, 1, 2]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("rows", DEGENERATE)
def test_zero_and_parallel_rows_are_allowed(rows):
    root = torch.tensor(rows, dtype=torch.float64)
    factor = lower_factor(root)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() >= 0).all()
    assert not factor[:, factor.diagonal() == 0].any()  # a column without variance stays zero
    # Entries up to 25, a handful of operations.
    assert (factor @ factor.mT - root @ root.mT).abs().max() <= rounding(32, 25)


def test_elimination_of_zeros_has_finite_gradients():
    rows = torch.zeros(2, 2, 3, dtype=torch.float64)
    rows[1] = torch.eye(2, 3)
    multipliers, eliminated = eliminate(rows.requires_grad_())
    assert torch.equal(eliminated, rows)
    (gradient,) = torch.autograd.grad(multipliers.sum() + eliminated.sum(), rows)
    assert torch.equal(gradient, torch.ones(2, 2, 3, dtype=torch.float64))


def test_the_slope_of_a_root_at_zero_is_finite():
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert safe_sqrt(x).tolist() == [0.0, 2.0]
    safe_sqrt(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.25]


@given(seeds(), dtypes(), st.integers(0, 3), shapes(), st.booleans())
def test_blocks_act_on_the_component_axis(seed, dtype, batch, axes, per_sample):
    z = normals(seed, batch, 2, *axes).to(dtype)
    blocks = normals(seed + 1, *((batch,) if per_sample else ()), 4, 2)
    found = apply_blocks(blocks, z)
    assert (found.dtype, found.shape) == (dtype, (batch, 4, *axes))
    expected = torch.einsum("bij,bj...->bi...", blocks.to(dtype).expand(batch, 4, 2), z)
    # Two products and a sum of numbers below 5.
    assert ((found - expected).abs() <= rounding(4, 25, dtype)).all()


@pytest.mark.parametrize("angle", [1.0, 100.0])
def test_the_exponential_of_a_turn_is_a_rotation(angle):
    turn, angle = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double(), torch.tensor(angle).double()
    expected = angle.cos() * torch.eye(2).double() + angle.sin() * turn
    # Twenty terms, whose rounding the squarings multiply by the angle.
    assert (block_exp(angle * turn) - expected).abs().max() <= rounding(20, float(angle))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_solution_of_many_systems_satisfies_each(k):
    # Backward stable but for a growth of pivots, at most 2^(k - 1): the residual is that many
    # roundings of |A| |X|, of k products each.
    a, b = normals(k, 50, k, k), normals(k + 1, k, 2)
    a[0] = a[0].flip(0).triu().flip(0)  # zero pivots, unless rows are exchanged
    x = block_solve(a, b)
    assert x.shape == (50, k, 2)
    assert ((a @ x - b).abs() <= 2**k * k * EPS * (a.abs() @ x.abs() + b.abs())).all()
