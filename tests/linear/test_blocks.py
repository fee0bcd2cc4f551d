"""Algebra of stacks of small blocks: triangular factors, products, application to states."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde.linear.blocks import (
    apply_blocks,
    block_product,
    block_solve,
    lower_factor,
    safe_sqrt,
    stack_first,
)
from strategies import dtypes, seeds, shapes

EPS = torch.finfo(torch.float64).eps


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def exact_diagonal(root: torch.Tensor) -> list[float]:
    """Diagonal of the Cholesky factor of R R^T, in high precision."""
    with mp.workdps(120):
        rows = mp.matrix(root.tolist())
        factor = mp.cholesky(rows * rows.T)
        return [float(factor[i, i]) for i in range(len(root))]


@given(seeds(), st.integers(1, 4), st.integers(1, 9), shapes(dims=2))
def test_the_factor_is_lower_triangular_and_has_the_gram_matrix(
    seed: int, k: int, n: int, stack: tuple[int, ...]
) -> None:
    root = normals(seed, k, n, *stack)
    factor = lower_factor(root)
    assert factor.shape == (k, k, *stack)
    first = factor.movedim((0, 1), (-2, -1))
    rows = root.movedim((0, 1), (-2, -1))
    assert torch.equal(first, first.tril())
    assert (first.diagonal(dim1=-2, dim2=-1) >= 0).all()
    # k reflections of vectors of length n perturb R by about n k eps, and its Gram matrix by twice
    # as much.
    gram = rows @ rows.mT
    tolerance = 2 * n * k * 4 * EPS * torch.linalg.matrix_norm(gram)
    assert (torch.linalg.matrix_norm(first @ first.mT - gram) <= tolerance).all()


@given(seeds(), st.integers(2, 4), st.integers(2, 40))
def test_the_diagonal_is_accurate_for_rows_and_columns_of_any_scale(
    seed: int, k: int, decades: int
) -> None:
    # Rows and columns graded over many decades, as over short times, where a covariance of the
    # same numbers would have lost everything.
    rng = np.random.default_rng(seed)
    rows = 10.0 ** rng.uniform(-decades, 0, (k, 1))
    columns = 10.0 ** rng.uniform(-decades, 0, (1, 3 * k))
    root = torch.from_numpy(rng.standard_normal((k, 3 * k)) * rows * columns)
    found = lower_factor(root).diagonal()
    expected = exact_diagonal(root)
    # Row-wise backward stability: eps, times the condition of what the pivots leave. Of the graded
    # normals drawn here that is below 1e4 but for one in some thousand.
    assert found.tolist() == pytest.approx(expected, rel=1e4 * 64 * EPS)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_the_factor_neither_overflows_nor_underflows(scale: float) -> None:
    root = normals(0, 3, 5)
    # Scaling by a number is exact to one rounding an entry.
    expected = lower_factor(root) * scale
    assert torch.allclose(lower_factor(root * scale), expected, rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_factor_of_zero_is_zero(k: int) -> None:
    assert torch.equal(lower_factor(torch.zeros(k, 4, 2)), torch.zeros(k, k, 2))


@pytest.mark.parametrize(
    "rows", [[[0, 0], [3, 4], [3, 4]], [[3, 4], [3, 4], [0, 0]], [[0, 1], [0, 2], [3, 0]]]
)
def test_zero_and_parallel_rows_are_allowed(rows: Any) -> None:
    root = torch.tensor(rows, dtype=torch.float64)
    factor = lower_factor(root)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() >= 0).all()
    # Entries up to 25, a handful of operations.
    assert torch.allclose(factor @ factor.mT, root @ root.mT, rtol=0, atol=25 * 32 * EPS)


def test_a_triangular_factor_is_its_own_factor() -> None:
    root = normals(1, 4, 4).tril()
    root.diagonal().abs_()
    # A reflection on a vector that is already along the axis: a few roundings.
    assert torch.allclose(lower_factor(root), root, rtol=0, atol=32 * EPS * float(root.abs().max()))


def test_the_factor_can_be_differentiated() -> None:
    root = normals(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lower_factor, (root,))


def test_gradients_of_a_degenerate_factor_are_finite() -> None:
    root = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    lower_factor(root).sum().backward()
    assert root.grad is not None
    assert root.grad.isfinite().all()


def test_the_safe_root_has_a_finite_slope_at_zero() -> None:
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    safe_sqrt(x).sum().backward()
    assert safe_sqrt(x.detach()).tolist() == [0.0, 2.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.25]


def test_products_multiply_block_by_block() -> None:
    a, b = normals(3, 2, 3, 5), normals(4, 3, 4, 5)
    expected = torch.einsum("ijn,jkn->ikn", a, b)
    # Three products and two sums an entry, of numbers below 4.
    assert torch.allclose(block_product(a, b), expected, rtol=0, atol=3 * 16 * 4 * EPS)


def test_the_stack_moves_to_the_front() -> None:
    blocks = normals(5, 2, 3, 4)
    moved = stack_first(blocks, torch.Size([2, 2]))
    assert moved.shape == (2, 2, 2, 3)
    assert torch.equal(moved[1, 0], blocks[..., 2])


@given(seeds(), dtypes(), shapes(), st.booleans())
def test_blocks_act_on_the_component_axis(
    seed: int, dtype: torch.dtype, axes: tuple[int, ...], per_sample: bool
) -> None:
    z = normals(seed, 3, 2, *axes).to(dtype)
    blocks = normals(seed + 1, *((3,) if per_sample else ()), 4, 2)
    found = apply_blocks(blocks, z)
    assert found.dtype == dtype
    assert found.shape == (3, 4, *axes)
    expected = torch.einsum("bij,bj...->bi...", blocks.to(dtype).expand(3, 4, 2), z)
    # Two products and a sum.
    size = float(blocks.abs().max() * z.abs().max())
    assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("axes", [(), (3,), (1, 8, 8)])
def test_an_empty_batch_stays_empty(axes: Any) -> None:
    blocks = torch.eye(2, dtype=torch.float64)
    assert apply_blocks(blocks, torch.zeros(0, 2, *axes)).shape == (0, 2, *axes)


def test_a_row_of_zeros_leaves_a_column_of_zeros() -> None:
    root = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    found = lower_factor(root)
    assert (found[:, 0] == 0).all()
    assert found[1, 1].item() == pytest.approx(5.0, rel=1e-15)
    assert torch.allclose(found @ found.T, root @ root.T, rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_solution_of_many_systems_satisfies_each(k: int) -> None:
    # Backward stable but for a growth of pivots, at most 2^(k - 1): the residual is that many
    # roundings of |A| |X|, of k products each.
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(50, k, k, generator=generator, dtype=torch.float64)
    a[0] = a[0].flip(0).triu().flip(0)  # zero pivots, unless rows are exchanged
    b = torch.randn(k, 2, generator=generator, dtype=torch.float64)
    x = block_solve(a, b)
    assert x.shape == (50, k, 2)
    error = (a @ x - b).abs()
    assert (error <= 2**k * k * EPS * (a.abs() @ x.abs() + b.abs())).all()


def test_solutions_are_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block_solve, (a, b))
