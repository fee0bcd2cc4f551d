"""The cross-entropy of latent variables and a model: closed forms, its place, its gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, SubVPSDE
from cldsde.linear import Gaussian
from cldsde.score import (
    MixedScore,
    PerturbedData,
    TimeSampler,
    cross_entropy,
    evidence_lower_bound,
)
from cldsde.score.conversion import whiten

PROCESSES: dict[str, Any] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "CLD, γ = 1": lambda: CLD(velocity_scale=1.0),
    "PSLD": PSLD,
    "HOLD": HOLD,
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))

T_MIN = 1e-3
# A linear-Gaussian autoencoder x = Wz + noise: z ~ N(0, P) a priori, N(MEAN, SCALE²) given x.
P = 0.7
LOADINGS = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.4, 0.6]], dtype=torch.float64)
NOISE = 0.25
X = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
_PRECISION = torch.eye(2, dtype=torch.float64) / P + LOADINGS.T @ LOADINGS / NOISE
# Of the posterior its mean and the diagonal of its covariance: the encoder is not exact.
MEAN = torch.linalg.solve(_PRECISION, LOADINGS.T @ X / NOISE)
SCALE = torch.linalg.inv(_PRECISION).diagonal().sqrt()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_score(sde: LinearSDE) -> Any:
    eye = torch.eye(2, dtype=torch.float64)
    return GaussianMixture([1.0], [[0.0, 0.0]], P * eye.unsqueeze(0)).score(sde)


def terminal(sde: LinearSDE) -> Gaussian:
    """Law of the prior at T, of which the process's own prior is the limit."""
    return Gaussian(torch.linalg.cholesky(covariance(sde, sde.T, P)))


def covariance(sde: LinearSDE, t: float, variance: float) -> Tensor:
    """Covariance at t of data of a variance, one direction."""
    kernel = sde.marginal(t)
    return kernel.covariance + variance * torch.outer(kernel.mean[:, 0], kernel.mean[:, 0])


def closed_form(sde: LinearSDE, t: float = T_MIN) -> float:
    """−E log p_t(z) over z of the encoder carried to t: a sum over directions of Gaussians."""
    psi = sde.marginal(t).mean[:, 0]
    C = covariance(sde, t, P)
    total = torch.zeros((), dtype=torch.float64)
    for mean, scale in zip(MEAN, SCALE, strict=True):
        second = covariance(sde, t, float(scale) ** 2) + mean**2 * torch.outer(psi, psi)
        log_det = torch.linalg.slogdet(2 * math.pi * C).logabsdet
        total += 0.5 * (log_det + torch.linalg.solve(C, second).trace())
    return float(total)


def cubature(sde: LinearSDE, nodes: int) -> tuple[PerturbedData, Tensor]:
    """States and weights whose mean loss of an affine score is its expectation.

    Gauss and Legendre's nodes in log t, and points ±√n e_i in place of n normals, over which the
    mean of a quadratic function is that over the normals.
    """
    k, D = sde.components, len(MEAN)
    x, w = np.polynomial.legendre.leggauss(nodes)
    span = math.log(sde.T / T_MIN)
    t = T_MIN * torch.exp(torch.from_numpy((x + 1) / 2 * span))
    weight = nodes * torch.from_numpy(w / 2) * span * t / (sde.T - T_MIN)

    def points(n: int) -> Tensor:
        eye = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
        return torch.cat([eye, -eye])

    start = MEAN + SCALE * points(D)
    noise = points(k * D).reshape(-1, k, D)
    a, b, c = torch.meshgrid(
        torch.arange(nodes), torch.arange(len(start)), torch.arange(len(noise)), indexing="ij"
    )
    times, x0, epsilon = t[a.flatten()], start[b.flatten()], noise[c.flatten()]
    kernel = sde.marginal(times)
    law = whiten(sde, kernel, times)
    z = kernel.mean[:, :, :1] * x0.unsqueeze(1) + kernel.root @ epsilon
    pair = PerturbedData(sde, x0, z, law.noise @ epsilon, times, kernel, "data", law)
    return pair, weight[a.flatten()]


@every_process
def test_of_a_linear_gaussian_autoencoder_it_is_the_closed_form(name: str) -> None:
    """To 1e-6: sixty nodes integrate a function that is smooth in log t to rounding."""
    sde = PROCESSES[name]()
    pair, weight = cubature(sde, 60)
    losses = pair.loss(prior_score(sde)(pair.z, pair.t), "score", weighting="likelihood")
    found = cross_entropy(pair, losses, weight, t_min=T_MIN, prior=terminal(sde)).mean()
    assert float(found) == pytest.approx(closed_form(sde), abs=1e-6)


@every_process
def test_its_estimate_at_importance_sampled_times_scatters_little(name: str) -> None:
    sde, n = PROCESSES[name](), 40_000
    sampler = TimeSampler.importance(sde, T_MIN, data_variance=P, weighting="likelihood")
    t, weight = sampler.sample(n, generator=seeded())
    x0 = MEAN + SCALE * torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    pair = PerturbedData.draw(sde, x0, t, generator=seeded(2))
    losses = pair.loss(prior_score(sde)(pair.z, t), "score", weighting="likelihood")
    found = cross_entropy(pair, losses, weight, t_min=T_MIN, prior=terminal(sde))
    # Three standard errors; the draws of times are stratified, which only lessens them.
    error = abs(float(found.mean()) - closed_form(sde))
    assert error <= 3 * float(found.std()) / math.sqrt(n)
    # Two squared normals have a coefficient of variation of 1.
    integrand = weight * losses
    assert float(integrand.std() / integrand.mean()) < 1.5


@every_process
def test_an_imperfect_score_bounds_it_from_above(name: str) -> None:
    sde = PROCESSES[name]()
    pair, weight = cubature(sde, 60)
    output = 0.95 * prior_score(sde)(pair.z, pair.t) + 0.1
    losses = pair.loss(output, "score", weighting="likelihood")
    found = cross_entropy(pair, losses, weight, t_min=T_MIN, prior=terminal(sde)).mean()
    # The score of no other prior of this process: what is left open is a mean square.
    assert float(found) > closed_form(sde) + 1e-3


def test_the_process_s_own_prior_is_taken_where_none_is_given() -> None:
    sde = CLD(velocity_scale=1.0)
    pair, weight = cubature(sde, 8)
    losses = torch.zeros(len(pair.x0), dtype=torch.float64)
    own, same = (
        cross_entropy(pair, losses, weight, t_min=T_MIN, prior=prior)
        for prior in (None, Gaussian(sde.prior.root))
    )
    assert torch.equal(own, same)


@pytest.mark.parametrize("k", [1, 3])
def test_a_prior_of_other_components_is_refused(k: int) -> None:
    pair, weight = cubature(CLD(velocity_scale=1.0), 8)
    losses = torch.zeros(len(pair.x0), dtype=torch.float64)
    prior = Gaussian(torch.eye(k, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"prior must have the 2 components.*got \(\d, \d\)"):
        cross_entropy(pair, losses, weight, t_min=T_MIN, prior=prior)


@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
def test_the_evidence_lower_bound_has_a_decoder_where_it_has_an_entropy(name: str) -> None:
    sde, n = PROCESSES[name](), 16
    score = prior_score(sde)
    t = torch.linspace(0.01, 1, n, dtype=torch.float64)
    x0 = torch.randn(n, 2, generator=seeded(), dtype=torch.float64)
    bound = evidence_lower_bound(score, sde, x0, t, 0.7, t_min=T_MIN, generator=seeded(1))
    pair = PerturbedData.draw(sde, x0, t, generator=seeded(1))
    losses = pair.loss(score(pair.z, t), "score", weighting="likelihood")
    found = cross_entropy(pair, losses, 0.7, t_min=T_MIN)
    covariance = sde.marginal(T_MIN).covariance
    psi = sde.marginal(T_MIN).mean[:, 0]
    information = psi @ torch.linalg.solve(covariance, psi)
    entropy = torch.linalg.slogdet(2 * math.pi * math.e * covariance).logabsdet
    decoder = math.log(2 * math.pi * math.e) - information.log()
    # Two directions of half each; solving with a covariance loses its condition, below 1e8.
    expected = entropy - decoder
    assert torch.allclose(found + bound, expected.expand(n), rtol=1e-6, atol=1e-6)
    assert torch.equal(cross_entropy(pair, losses, 0.7, t_min=T_MIN, of="data"), -bound)


@pytest.mark.parametrize("scale", [0.04, 1.0])
def test_that_of_the_data_has_no_gap_from_a_velocity_out_of_equilibrium(scale: float) -> None:
    """Of the state less the velocity's entropy against −E log p(z_0) of the encoder."""
    sde = CLD(velocity_scale=scale)
    pair, weight = cubature(sde, 60)
    losses = pair.loss(prior_score(sde)(pair.z, pair.t), "score", weighting="likelihood")
    state, data = (
        float(cross_entropy(pair, losses, weight, t_min=T_MIN, of=of, prior=terminal(sde)).mean())
        for of in ("state", "data")
    )
    velocity = math.log(2 * math.pi * math.e * scale * 0.25)
    exact = math.log(2 * math.pi * P) + 0.5 * float((MEAN**2 + SCALE**2).sum()) / P
    # Decoding adds noise of variance 1/I, below 1e-3 of P at 1e-3: half of it a direction, twice.
    assert exact - 1e-6 <= data <= exact + 2e-3
    assert (state - velocity - exact > 0.4) == (scale == 0.04)


class TestGradients:
    """Through the states into the encoder, as the training of latent models takes them."""

    @staticmethod
    def bound(sde: LinearSDE, model: MixedScore, encoder: Tensor) -> Tensor:
        """Cross-entropy less the entropy of the encoder, at given normals."""
        n = 32
        mean, log_scale = encoder[:2], encoder[2:]
        eta = torch.randn(n, 2, generator=seeded(), dtype=torch.float64)
        x0 = mean + log_scale.exp() * eta
        sampler = TimeSampler.importance(sde, T_MIN, weighting="likelihood")
        t, weight = sampler.sample(n, generator=seeded(1))
        pair = PerturbedData.draw(sde, x0, t, generator=seeded(2))
        losses = model.loss(pair, weighting="likelihood")
        return cross_entropy(pair, losses, weight, t_min=T_MIN).mean() - log_scale.sum()

    @pytest.mark.parametrize("mixing", [None, -1.0])
    @every_process
    def test_they_agree_with_differences(self, name: str, mixing: float | None) -> None:
        sde = PROCESSES[name]()

        class Network(nn.Module):
            def forward(self, z: Tensor, clock: Tensor) -> Tensor:
                driven = (z.sum(1, keepdim=True) + clock[:, None]).sin() + 0.1 * z[:, :1]
                return driven.expand(-1, 2 * len(sde.driven))

        logits = None if mixing is None else torch.full((2,), mixing)
        model = MixedScore(
            Network(), sde, torch.tensor(0.0), torch.tensor(1.0), mixing_logits=logits
        )
        encoder = torch.tensor([0.3, -0.5, -0.7, 0.1], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(self.bound(sde, model, encoder), encoder)
        h = 1e-5
        for i in range(4):
            step = torch.zeros(4, dtype=torch.float64)
            step[i] = h
            with torch.no_grad():
                above, below = (self.bound(sde, model, encoder + s) for s in (step, -step))
            # Differences: h² f'''/6 and eps f/h, of f near 10³ with derivatives near 10⁴.
            wanted = float(above - below) / (2 * h)
            assert float(gradient[i]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


class TestRefusals:
    @staticmethod
    def pair(**options: Any) -> PerturbedData:
        t = torch.tensor([0.1, 0.5], dtype=torch.float64)
        return PerturbedData.draw(CLD(), torch.zeros(2, 1), t, generator=seeded(), **options)

    def test_a_pair_given_all_of_the_start(self) -> None:
        with pytest.raises(ValueError, match="conditioned on the data"):
            cross_entropy(self.pair(conditioning="all"), torch.zeros(2), t_min=1e-3)

    def test_what_it_is_not_of(self) -> None:
        with pytest.raises(ValueError, match="of must be"):
            cross_entropy(self.pair(), torch.zeros(2), t_min=1e-3, of="velocity")  # type: ignore[arg-type]

    def test_times_before_the_smallest(self) -> None:
        with pytest.raises(ValueError, match="t must lie in"):
            cross_entropy(self.pair(), torch.zeros(2), t_min=0.2)

    @pytest.mark.parametrize("losses", [torch.zeros(3), torch.zeros(2, 1)])
    def test_losses_that_do_not_fit(self, losses: Tensor) -> None:
        with pytest.raises(ValueError, match="losses must have shape"):
            cross_entropy(self.pair(), losses, t_min=1e-3)

    def test_weights_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="weight must"):
            cross_entropy(self.pair(), torch.zeros(2), torch.ones(3), t_min=1e-3)

    @pytest.mark.parametrize("t_min", [0.0, 1.0, -0.1])
    def test_a_smallest_time_out_of_range(self, t_min: float) -> None:
        with pytest.raises(ValueError, match="t_min"):
            cross_entropy(self.pair(), torch.zeros(2), t_min=t_min)
