"""Gaussian mixtures: densities and scores against dense ones in high precision."""

import pytest
import torch

from cldsde import GaussianMixture
from cldsde.linear import Kernel
from probes import generator
from references import mixed
from score.cases import FAMILIES, called, known, mixture, score_rounding, states
from tolerances import EPS, standard_error

TIMES = torch.tensor([1e-3, 0.05, 0.4, 1.0], dtype=torch.float64)
PROMISED = 1e-10  # relative accuracy of scores and densities for k up to 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["regular", "degenerate", "points"])
@pytest.mark.parametrize("name", FAMILIES)
def test_density_scores_and_posterior_mean_are_exact(name, kind):
    sde, data = FAMILIES[name], mixture(kind)
    z = states(sde, data, TIMES)
    log_prob, mean = data.log_prob(sde, z, TIMES), data.posterior_mean(sde, z, TIMES)
    score, full = (data.score(sde, rows=rows)(z, TIMES) for rows in ("driven", "all"))
    auxiliary, of_auxiliary = full[:, 1:], None
    if sde.components > 1:
        auxiliary = data.score(sde, rows="auxiliary")(z, TIMES)
        of_auxiliary = data.conditional_log_prob(sde, z, TIMES)
    for i, t in enumerate(TIMES.tolist()):
        kernel = sde.marginal(t)
        expected = mixed(kernel, data, z[i])
        tolerance = min(PROMISED, score_rounding(sde, t))
        size = expected.score.abs().max()
        # Samples with one time take products over all numbers of the state.
        for found in (score[i], data.score(sde)(z[i : i + 1], t)[0]):
            error = (found - expected.score[list(sde.driven)]).abs().max()
            assert error <= tolerance * size
        # Rows that are not driven are found through all others.
        assert (full[i] - expected.score).abs().max() <= 4 * tolerance * size
        # Given the data, the density has the same gradient along the other components.
        error = (auxiliary[i] - expected.score[1:]).abs()
        assert (error <= 4 * tolerance * size).all()
        scale = max(1.0, abs(expected.log_prob))
        assert abs(log_prob[i].item() - expected.log_prob) <= tolerance * scale
        if of_auxiliary is not None:
            of_data = mixed(Kernel(kernel.mean[:1, :1], kernel.root[:1, :1]), data, z[i, :1])
            error = abs(of_auxiliary[i] - expected.log_prob + of_data.log_prob)
            # The residual of x is rounded relative to x.
            residual = 64 * EPS * float(z[i, 0].abs().max() / kernel.root[0, 0])
            assert error <= (4 * tolerance + residual) * (scale + abs(of_data.log_prob))
        scale = float(data.means.abs().max() + expected.posterior_mean.abs().max())
        assert (mean[i] - expected.posterior_mean).abs().max() <= 4 * tolerance * scale


@pytest.mark.one_in(5)
@pytest.mark.parametrize("count", [0, 1, 21])
@pytest.mark.parametrize("modes", [1, 3])
@pytest.mark.parametrize("dimension", [1, 3, 20])  # 20 has no matrix for all numbers
@pytest.mark.parametrize("name", ["VP", "HOLD"])
def test_batches_and_states_have_any_size_at_known_times(name, dimension, modes, count):
    sde, times = FAMILIES[name], known(0.9, 0.3)
    means = torch.linspace(-1, 1, modes * dimension).reshape(modes, dimension)
    spread = 0.3 * torch.eye(dimension) + 0.1
    data = GaussianMixture(torch.ones(modes), means, spread.expand(modes, -1, -1))
    shape = (count, sde.components, dimension)
    z = torch.randn(shape, generator=generator(count), dtype=torch.float64)
    for rows in ("driven", "all"):
        score = data.score(sde, rows=rows)
        # Coefficients of the first time that is used serve an empty batch, too.
        assert len(called(score, z[:0], times.arguments(z[:0])[0])) == 0
        found, expected = called(score, z, times.arguments(z)[1]), score(z, 0.3)
        assert found.shape == expected.shape
        tolerance = 4 * score_rounding(sde, 0.3)
        assert torch.allclose(found, expected, rtol=tolerance, atol=10 * tolerance)


def test_samples_have_the_moments_of_the_mixture():
    data, n = mixture("degenerate"), 20_000
    x = data.sample(n, generator=generator(), dtype=torch.float64)
    second = data.covariances + torch.einsum("ni,nj->nij", data.means, data.means)
    products = torch.einsum("bi,bj->bij", x, x)
    for found, members in ((x, data.means), (products, second)):
        expected = torch.einsum("n,n...->...", data.weights, members)
        error = standard_error(1.0, n) * found.std(0)
        assert ((found.mean(0) - expected).abs() <= error).all()
