"""Gaussian laws of a state, Kernel and Gaussian: densities and draws."""

from __future__ import annotations

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

EPS = torch.finfo(torch.float64).eps
FAMILIES = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": VESDE,
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
    "rectified flow": RectifiedFlow,
    "cosine": CosineVP,
}
every_family = pytest.mark.parametrize("name", list(FAMILIES))


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def dense_log_prob(kernel: Any, z_t: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
    """The same density as one of a kD-dimensional normal law."""
    eye = np.eye(z_t[0, 0].numel())
    covariance = np.kron(kernel.covariance.numpy(), eye)
    residual = z_t.flatten(2) - torch.einsum("ij,bjd->bid", kernel.mean, z_s.flatten(2))
    law = stats.multivariate_normal(np.zeros(len(covariance)), covariance)
    return torch.from_numpy(np.atleast_1d(law.logpdf(residual.flatten(1).numpy())))


@pytest.mark.parametrize("axes", [(3,), (2, 2), (1,)])
@pytest.mark.parametrize("where", [(0.0, 0.2), (0.3, 1.0)])
@every_family
def test_the_density_of_a_kernel_is_that_of_the_dense_law(
    name: str, where: Any, axes: tuple[int, ...]
) -> None:
    kernel = FAMILIES[name]().transition(*where)
    z_s = normals(0, 4, len(kernel.mean), *axes)
    z_t = kernel.sample(z_s, generator=torch.Generator().manual_seed(1))
    # The dense law inverts its covariance: eps times its condition number, below 1e6 here.
    condition = float(torch.linalg.cond(kernel.covariance))
    assert condition < 1e6
    expected = dense_log_prob(kernel, z_t, z_s)
    assert torch.allclose(
        kernel.log_prob(z_t, z_s), expected, rtol=0, atol=64 * EPS * condition + 1e-12
    )


@every_family
def test_states_without_data_axes_have_a_density(name: str) -> None:
    kernel = FAMILIES[name]().transition(0.1, 0.9)
    z_s, z_t = normals(0, 3, len(kernel.mean)), normals(1, 3, len(kernel.mean))
    assert torch.equal(
        kernel.log_prob(z_t, z_s), kernel.log_prob(z_t.unsqueeze(-1), z_s.unsqueeze(-1))
    )


@every_family
def test_each_sample_may_have_its_own_kernel(name: str) -> None:
    sde = FAMILIES[name]()
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    kernel = sde.marginal(t)
    z_s = normals(0, 3, sde.components, 2)
    z_t = kernel.sample(z_s, generator=torch.Generator().manual_seed(1))
    found = kernel.log_prob(z_t, z_s)
    for i in range(3):
        single = Kernel(kernel.mean[i], kernel.root[i])
        alone = single.log_prob(z_t[i : i + 1], z_s[i : i + 1])
        # The same operations, in another order at most.
        assert found[i].item() == pytest.approx(alone.item(), rel=1e-12)


@every_family
def test_the_prior_has_the_density_of_the_dense_law(name: str) -> None:
    prior = FAMILIES[name]().prior
    z = prior.sample((5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = dense_log_prob(prior, z, torch.zeros_like(z))
    # Terms up to 50; diagonal covariances.
    assert torch.allclose(prior.log_prob(z), expected, rtol=64 * EPS, atol=50 * 64 * EPS)


def test_a_density_integrates_to_one() -> None:
    kernel = CLD().marginal(0.3)
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x / 2)
    total = kernel.log_prob(grid, torch.zeros_like(grid)).exp().sum() * 0.1 * 0.05
    # The trapezoidal rule on a Gaussian errs by exp(-2 pi^2 s^2 / h^2), s >= 0.3 and h = 0.1 here,
    # and what lies outside is beyond nine standard deviations.
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_densities_keep_the_type_of_the_state() -> None:
    kernel, prior = CLD().transition(0.1, 0.5), CLD().prior
    z = torch.ones(3, 2, 4)
    assert kernel.log_prob(z, z).dtype == torch.float32
    assert prior.log_prob(z).dtype == torch.float32
    # Eight terms up to 100, whose whitening has the condition number 10 of the root.
    exact = kernel.log_prob(z.double(), z.double())
    assert torch.allclose(kernel.log_prob(z, z).double(), exact, rtol=1e2 * 1.2e-7, atol=1e-5)


def test_a_law_without_density_is_refused() -> None:
    z = torch.zeros(1, 2, 1)
    for kernel in (CLD().transition(0.5, 0.5), CLD().marginal(0.0)):
        with pytest.raises(ValueError, match="no density"):
            kernel.log_prob(z, z)
    with pytest.raises(ValueError, match="no density"):
        Gaussian(torch.zeros(2, 2, dtype=torch.float64)).log_prob(z)


class TestKernelDraws:
    """Draws of z_t given z_s."""

    def test_a_draw_is_the_mean_plus_the_root_times_the_noise(self) -> None:
        kernel = HOLD().transition(0.1, 0.4)
        z = normals(0, 5, 3, 2)
        drawn, noise = kernel.perturb(z, generator=torch.Generator().manual_seed(0))
        expected = torch.einsum("ij,bjd->bid", kernel.mean, z)
        expected = expected + torch.einsum("ij,bjd->bid", kernel.root, noise)
        # Sums of six products of numbers below 10.
        assert torch.allclose(drawn, expected, rtol=0, atol=8 * 10 * EPS)

    def test_sampling_is_perturbing_without_the_noise(self) -> None:
        kernel, z = CLD().transition(0.1, 0.4), torch.ones(5, 2, 3)
        one = kernel.sample(z, generator=torch.Generator().manual_seed(3))
        two, _ = kernel.perturb(z, generator=torch.Generator().manual_seed(3))
        assert torch.equal(one, two)
        assert not torch.equal(one, kernel.sample(z, generator=torch.Generator().manual_seed(4)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("axes", [(), (3,), (1, 8, 8)])
    def test_draws_have_the_type_and_shape_of_the_state(
        self, dtype: torch.dtype, axes: tuple[int, ...]
    ) -> None:
        z = torch.ones(4, 2, *axes, dtype=dtype)
        for value in CLD().transition(0.1, 0.4).perturb(z):
            assert value.dtype == dtype
            assert value.shape == z.shape

    @pytest.mark.parametrize(
        ("z", "error"),
        [
            (torch.zeros(3, 3, 1), ValueError),
            (torch.zeros(2), ValueError),
            (torch.zeros(3, 2, 1, dtype=torch.int64), TypeError),
            ([[0.0, 0.0]], TypeError),
        ],
    )
    def test_states_that_do_not_fit_are_refused(self, z: Any, error: type[Exception]) -> None:
        kernel = CLD().transition(0.1, 0.4)
        with pytest.raises(error, match=r"shape \(B, 2, \*D\)"):
            kernel.perturb(z)
        with pytest.raises(error, match=r"shape \(B, 2, \*D\)"):
            kernel.log_prob(z, torch.zeros(3, 2, 1))
        with pytest.raises(error, match=r"shape \(B, 2, \*D\)"):
            CLD().prior.log_prob(z)

    @pytest.mark.parametrize("times", [(3,), (1, 4), (4, 1)])
    def test_kernels_that_do_not_fit_the_batch_are_refused(self, times: tuple[int, ...]) -> None:
        kernel = CLD().marginal(torch.full(times, 0.5))
        z = torch.zeros(4, 2, 1)
        with pytest.raises(ValueError, match=r"one time or for \(4,\) times"):
            kernel.perturb(z)
        with pytest.raises(ValueError, match=r"one time or for \(4,\) times"):
            kernel.log_prob(z, z)

    def test_two_states_of_different_shape_have_no_density(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            CLD().transition(0.1, 0.4).log_prob(torch.zeros(4, 2, 3), torch.zeros(4, 2, 2))


class TestGaussianDraws:
    """Draws from a prior."""

    @every_family
    def test_draws_have_the_moments_of_the_law(self, name: str) -> None:
        prior = FAMILIES[name]().prior
        n = 20_000
        z = prior.sample((n,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        covariance = prior.covariance
        variance = covariance.diagonal()
        # 5 standard errors: S_ii / n of a mean, (S_ii S_jj + S_ij^2) / n of a covariance.
        assert (z.mean(0).abs() <= 5 * (variance / n).sqrt()).all()
        spread = (variance[:, None] * variance + covariance**2) / n
        assert ((z.mT @ z / n - covariance).abs() <= 5 * spread.sqrt()).all()

    def test_a_prior_with_correlation_is_sampled_with_it(self) -> None:
        prior = CLD(position_noise=1.0).prior
        n = 20_000
        z = prior.sample((n,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        S = prior.covariance
        # 5 standard errors, as above.
        error = (z[:, 0] * z[:, 1]).mean() - S[0, 1]
        assert abs(error) <= 5 * ((S[0, 0] * S[1, 1] + S[0, 1] ** 2) / n) ** 0.5

    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 8, 8)])
    def test_the_shape_is_that_of_the_data(self, shape: tuple[int, ...]) -> None:
        z = HOLD().prior.sample(shape)
        assert z.shape == (4, 3, *shape[1:])
        assert z.dtype == torch.float32
        assert HOLD().prior.sample(shape, dtype=torch.float64).dtype == torch.float64

    def test_a_seed_decides_the_draw(self) -> None:
        def draw(seed: int) -> torch.Tensor:
            return CLD().prior.sample((4, 2), generator=torch.Generator().manual_seed(seed))

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))

    @pytest.mark.parametrize("shape", [(), 4, None])
    def test_what_is_no_shape_of_a_batch_is_refused(self, shape: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"shape must be the shape .* of a batch"):
            CLD().prior.sample(shape)

    def test_the_law_depends_on_no_earlier_state(self) -> None:
        prior = CLD().prior
        assert torch.equal(prior.mean, torch.zeros(2, 2, dtype=torch.float64))
        assert torch.equal(prior.covariance, prior.root @ prior.root.mT)
