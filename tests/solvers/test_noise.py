"""Noise sources: streams of a generator and of samples, and the states that these start from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde import CLD, HOLD, VPSDE, solvers
from cldsde.solvers import SampleNoise
from probes import generator, tensor
from strategies import shapes
from tolerances import rounding, standard_error


def test_fresh_noise_is_the_stream_of_its_generator():
    noise, g = solvers.FreshNoise(generator(3)), generator(3)
    for z, rows in ((torch.zeros(4, 2, 3), 1), (torch.zeros(5, 1, 2, 2), 2)):
        expected = torch.randn(rows, len(z), *z.shape[2:], generator=g).transpose(0, 1)
        assert torch.equal(noise.normal(z, rows), expected)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=6), st.sampled_from([None, 0, 2**40]))
def test_draws_of_any_sizes_are_one_stream_of_the_seed(sizes, key):
    whole = SampleNoise([3, 4], key=key).normal(torch.zeros(2, 1, sum(sizes)), 1)[:, 0]
    noise = SampleNoise([4], key=key)
    parts = [noise.normal(torch.zeros(1, 1, size), 1)[0, 0] for size in sizes]
    assert torch.equal(torch.cat(parts), whole[1])
    if key is None:
        g, blocks = generator(4), range(-(-sum(sizes) // 4096))
        stream = torch.cat([torch.randn(4096, generator=g, dtype=torch.float32) for _ in blocks])
        assert torch.equal(whole[1], stream[: whole.shape[1]])


def test_keyed_draws_are_independent_normals():
    draws = SampleNoise(range(40), key=7).normal(torch.zeros(40, 1, 8192), 1)[:, 0].double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (draws**power).mean() - moment
        assert error.abs() <= standard_error(variance**0.5, draws.numel())
    blocks = draws.reshape(-1, 4096)  # of two draws of each stream
    products = (blocks @ blocks.mT).tril(-1).abs() / 4096
    assert products.max() <= standard_error(1.0, 4096, 5)  # the largest of 3160


@given(shapes(), st.integers(1, 3), st.sampled_from([torch.float16, torch.float64]))
def test_rows_and_axes_are_filled_in_order(axes, rows, dtype):
    found = SampleNoise([1, 2]).normal(torch.zeros(2, 3, *axes, dtype=dtype), rows)
    flat = SampleNoise([1, 2]).normal(torch.zeros(2, 1, found[0].numel()), 1)
    assert (found.shape, found.dtype) == ((2, rows, *axes), dtype)
    assert torch.equal(found.flatten(), flat.to(dtype).flatten())


@pytest.mark.parametrize("key", [None, 7])
def test_a_source_made_in_inference_mode_draws_the_same_outside_of_it(key):
    z, twin = torch.zeros(1, 1, 3000), SampleNoise([5], key=key)
    with torch.inference_mode():
        noise = SampleNoise([5], key=key)
        assert torch.equal(noise.normal(z, 1), twin.normal(z, 1))
    assert torch.equal(noise.normal(z, 1), twin.normal(z, 1))


def test_draws_are_not_shared_and_the_start_is_the_first():
    noise, twin, z = SampleNoise([5]), SampleNoise([5]), torch.zeros(1, 1, 4)
    noise.start(VPSDE(), (4,)).zero_()
    whole = twin.normal(torch.zeros(1, 1, 8), 1)[..., 4:]
    assert torch.equal(noise.normal(z, 1), whole)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("axes", [(), (1, 8, 8)])
def test_starts_have_the_prior_whatever_the_default_dtype(axes):
    like, sde = torch.zeros(2, 3, *axes, dtype=torch.float64), HOLD()
    torch.set_default_dtype(torch.float64)
    found = SampleNoise([1, 2]).start(sde, axes, dtype=torch.float64)
    torch.set_default_dtype(torch.float32)
    normals = SampleNoise([1, 2]).normal(like, 3)
    assert (found.shape, found.dtype) == (like.shape, like.dtype)
    expected = (sde.prior.root @ normals.reshape(2, 3, -1)).reshape(like.shape)
    assert (found - expected).abs().max() <= rounding(32, 10.0)


def test_at_a_time_they_have_the_marginal_of_data_of_variance_one_that_share_a_part():
    """As images share their brightness: two of their numbers have the covariance 0.52² ψψᵀ.

    Early, when the data are most of a state.
    """
    sde, t, count, D = CLD(), 0.05, 2500, 50
    z = SampleNoise(range(count)).start(sde, (D,), dtype=torch.float64, t=t)
    initial = torch.diag(tensor([1.0, sde.initial_covariance[1, 1]]))
    total = sde.marginal(t, initial).covariance
    own = torch.einsum("bid,bjd->ij", z, z) / (count * D)
    whole = torch.einsum("bi,bj->ij", z.sum(-1), z.sum(-1)) / (count * D)
    between = (whole - own) / (D - 1)  # the mean over all pairs of two numbers
    psi, scale = sde.marginal(t).mean[:, 0], total.diagonal().sqrt()
    # Means over D numbers with a correlation of at most 0.52² have at most this standard deviation.
    deviation = math.sqrt(2 * (0.52**4 + 1 / D))
    for found, exact in ((own, total), (between, 0.52**2 * psi[:, None] * psi)):
        relative = (found - exact) / (scale[:, None] * scale)
        assert relative.abs().max() < standard_error(deviation, count)
