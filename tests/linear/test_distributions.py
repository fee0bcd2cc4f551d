"""Gaussian distributions of a state, Kernel and Gaussian: densities and samples."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    CosineVP,
    Gaussian,
    Kernel,
    RectifiedFlow,
    SubVPSDE,
)
from cldsde.linear.random import standard_normal
from probes import generator, name_of_case, normals
from tolerances import EPS32, KERNEL, rounding, standard_error

FAMILIES = [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD, RectifiedFlow, CosineVP]
every_family = pytest.mark.parametrize("family", FAMILIES)


def dense_log_prob(kernel: Any, z_t: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
    """The same density as one of a kD-dimensional normal distribution, by scipy."""
    covariance = np.kron(kernel.covariance.numpy(), np.eye(z_t[0, 0].numel()))
    residual = z_t.flatten(2) - torch.einsum("ij,bjd->bid", kernel.mean, z_s.flatten(2))
    normal = stats.multivariate_normal(np.zeros(len(covariance)), covariance)
    return torch.from_numpy(np.atleast_1d(normal.logpdf(residual.flatten(1).numpy())))


@pytest.mark.parametrize(("where", "axes"), [((0.0, 0.2), (3,)), ((0.3, 1.0), (2, 2))])
@every_family
def test_densities_agree_with_the_dense_distribution(family, where, axes):
    kernel, prior = family().transition(*where), family().prior
    z_s = normals(0, 4, len(kernel.mean), *axes)
    z_t = kernel.sample(z_s, generator=generator(1))
    # scipy inverts the covariance: eps times its condition number, below 1e6 here; terms below 50.
    condition = float(torch.linalg.cond(kernel.covariance))
    assert condition < 1e6
    bound = rounding(64, condition + 50)
    assert (kernel.log_prob(z_t, z_s) - dense_log_prob(kernel, z_t, z_s)).abs().max() <= bound
    z = prior.sample((5, 3), generator=generator(0), dtype=torch.float64)
    expected = dense_log_prob(prior, z, torch.zeros_like(z))
    assert (prior.log_prob(z) - expected).abs().max() <= rounding(64, 50)
    flat_s, flat_t = z_s.flatten(2)[..., 0], z_t.flatten(2)[..., 0]
    one = kernel.log_prob(flat_t.unsqueeze(-1), flat_s.unsqueeze(-1))
    assert torch.equal(kernel.log_prob(flat_t, flat_s), one)


def test_each_sample_may_have_its_own_kernel():
    kernel = HOLD().marginal(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    z_s = normals(0, 3, 3, 2)
    z_t = kernel.sample(z_s, generator=generator(1))
    found = kernel.log_prob(z_t, z_s)
    for i in range(3):
        single = Kernel(kernel.mean[i], kernel.root[i])
        alone = single.log_prob(z_t[i : i + 1], z_s[i : i + 1])
        # The same operations, in another order at most.
        assert found[i].item() == pytest.approx(alone.item(), rel=KERNEL)


def test_densities_keep_the_type_of_the_state():
    kernel, prior = CLD().transition(0.1, 0.5), CLD().prior
    z = torch.ones(3, 2, 4)
    assert prior.log_prob(z).dtype == kernel.log_prob(z, z).dtype == torch.float32
    exact = kernel.log_prob(z.double(), z.double())
    # Eight terms up to 100, whose whitening has the condition number 10 of the root.
    error = (kernel.log_prob(z, z).double() - exact).abs()
    assert (error <= 100 * EPS32 * exact.abs() + 100 * EPS32).all()


def test_singular_distributions_have_no_density():
    z, singular = torch.zeros(1, 2, 1), Gaussian(torch.zeros(2, 2, dtype=torch.float64))
    for kernel in (CLD().transition(0.5, 0.5), CLD().marginal(0.0)):
        with pytest.raises(ValueError, match="no density"):
            kernel.log_prob(z, z)
    with pytest.raises(ValueError, match="no density"):
        singular.log_prob(z)


def test_a_draw_is_the_mean_plus_the_root_times_the_noise():
    kernel, z = HOLD().transition(0.1, 0.4), normals(0, 5, 3, 2)
    drawn, noise = kernel.perturb(z, generator=generator(0))
    # Sums of six products of numbers below 10.
    assert (drawn - kernel.mean @ z - kernel.root @ noise).abs().max() <= rounding(8, 10)
    assert torch.equal(kernel.sample(z, generator=generator(0)), drawn)
    assert not torch.equal(kernel.sample(z, generator=generator(4)), drawn)
    for axes in ((), (1, 8, 8)):
        for dtype in (torch.float32, torch.float64):
            state = torch.ones(4, 3, *axes, dtype=dtype)
            prior = HOLD().prior.sample((4, *axes), dtype=dtype)
            for value in (*kernel.perturb(state), prior):
                assert (value.dtype, value.shape) == (dtype, state.shape)


@pytest.mark.parametrize("family", [VESDE, HOLD, lambda: CLD(position_noise=1.0)])
def test_draws_of_a_prior_have_its_moments(family):
    prior, n = family().prior, 10_000
    z = prior.sample((n,), generator=generator(0), dtype=torch.float64)
    S = prior.covariance
    variance = S.diagonal()
    # Variances of sample moments of normals: S_ii of a mean, S_ii S_jj + S_ij^2 of a covariance.
    one = standard_error(1.0, n, number=5)
    assert (z.mean(0).abs() <= one * variance.sqrt()).all()
    spread = (variance[:, None] * variance + S**2).sqrt()
    assert ((z.mT @ z / n - S).abs() <= one * spread).all()
    assert torch.equal(prior.mean, torch.zeros_like(S))
    same, other = (
        prior.sample((n,), generator=generator(seed), dtype=torch.float64) for seed in (0, 1)
    )
    assert torch.equal(z, same)
    assert not torch.equal(z, other)


WRONG_STATES = [torch.zeros(3, 3, 1), torch.zeros(2), torch.zeros(3, 2, 1).long(), [[0.0, 0.0]]]


def test_states_that_do_not_fit_are_rejected():
    kernel, prior, z = CLD().transition(0.1, 0.4), CLD().prior, torch.zeros(3, 2, 1)
    for wrong in WRONG_STATES:
        calls = (kernel.perturb, lambda z: kernel.log_prob(z, torch.zeros(3, 2, 1)), prior.log_prob)
        for call in calls:
            with pytest.raises((ValueError, TypeError), match=r"shape \(B, 2, \*D\)"):
                call(wrong)
    with pytest.raises(ValueError, match="shape"):
        kernel.log_prob(torch.zeros(4, 2, 3), torch.zeros(4, 2, 2))
    for times in ((4,), (1, 3), (3, 1)):
        several = CLD().marginal(torch.full(times, 0.5))
        for call in (several.perturb, lambda z, k=several: k.log_prob(z, z)):
            with pytest.raises(ValueError, match=r"one time or for \(3,\) times"):
                call(z)
    for shape in ((), 4, None):
        with pytest.raises((TypeError, ValueError), match=r"shape must be the shape .* of a batch"):
            prior.sample(shape)


# Generators ------------------------------------------------------------------------------------


def draw(n: int, generators: Any) -> torch.Tensor:
    return standard_normal((n, 3), generator=generators, dtype=torch.float32, device="cpu")


def test_several_generators_draw_for_even_shares_of_the_batch():
    together = draw(6, [generator(i) for i in (1, 2, 3)])
    assert torch.equal(together, torch.cat([draw(2, generator(i)) for i in (1, 2, 3)]))
    assert torch.equal(draw(6, [generator(1)]), draw(6, generator(1)))
    for count in (0, 4):
        with pytest.raises(ValueError, match="length divides the batch"):
            draw(6, [generator(i) for i in range(count)])


@pytest.mark.parametrize("wrong", [3, "0", 1.0, [3], [torch.Generator(), None]], ids=name_of_case)
def test_wrong_generators_are_rejected(wrong):
    sde, x, z = CLD(), torch.zeros(4, 2), torch.zeros(4, 2, 1)
    for call in (
        lambda: sde.prior.sample((4, 2), generator=wrong),
        lambda: sde.augment(x, generator=wrong),
        lambda: sde.perturb(x, 0.5, generator=wrong),
        lambda: sde.transition(0.2, 0.5).perturb(z, generator=wrong),
        lambda: sde.posterior(0.2, 0.5).sample(z, z, generator=wrong),
    ):
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator.* or None; got"):
            call()
