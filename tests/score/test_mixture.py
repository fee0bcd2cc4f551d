"""Gaussian mixtures: densities and scores against dense ones in high precision."""

import contextlib
import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from cldsde import CLD, GaussianMixture
from probes import generator
from references import mixed
from score.cases import (
    AUXILIARY,
    FAMILIES,
    at_a_known_time,
    called,
    known,
    mixture,
    score_rounding,
    states,
)
from tolerances import EPS, EPS32, rounding, standard_error

every_family = pytest.mark.parametrize("name", FAMILIES)
TIMES = torch.tensor([1e-3, 0.05, 0.4, 1.0], dtype=torch.float64)
PLANE = GaussianMixture([1.0], [[0.3, 0.1]], [[[0.2, 0.0], [0.0, 0.1]]])
PROMISED = 1e-10  # relative accuracy of scores and densities for k up to 3


at_a_time = lambda score, t: lambda z: score(z, t)  # noqa: E731
both_ways = pytest.mark.parametrize("how", [at_a_time, at_a_known_time])


class TestExactness:
    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("kind", ["regular", "degenerate", "points"])
    @every_family
    def test_density_scores_and_posterior_mean_are_exact(self, name, kind):
        sde, data = FAMILIES[name], mixture(kind)
        z = states(sde, data, TIMES)
        log_prob, mean = data.log_prob(sde, z, TIMES), data.posterior_mean(sde, z, TIMES)
        score, full = (data.score(sde, rows=rows)(z, TIMES) for rows in ("driven", "all"))
        auxiliary = (
            data.score(sde, rows="auxiliary")(z, TIMES) if sde.components > 1 else full[:, 1:]
        )
        for i, t in enumerate(TIMES.tolist()):
            expected = mixed(sde.marginal(t), data, z[i])
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
            scale = float(data.means.abs().max() + expected.posterior_mean.abs().max())
            assert (mean[i] - expected.posterior_mean).abs().max() <= 4 * tolerance * scale

    @every_family
    def test_far_away_the_score_is_exact(self, name):
        sde, data, t = FAMILIES[name], mixture("degenerate"), 0.1
        z = 40 * states(sde, data, t, n=2)
        for state, found in zip(z, data.score(sde, rows="all")(z, t), strict=True):
            expected = mixed(sde.marginal(t), data, state).score
            # Further away the residual is as long as its terms.
            error = (found - expected).abs().max()
            assert error <= 4 * score_rounding(sde, t) * expected.abs().max()

    @pytest.mark.parametrize("kind", ["regular", "points"])
    @pytest.mark.parametrize("name", AUXILIARY)
    def test_the_conditional_density_is_the_joint_one_over_that_of_the_data(self, name, kind):
        sde, data = FAMILIES[name], mixture(kind)
        z = states(sde, data, TIMES)
        found, joint = (f(sde, z, TIMES) for f in (data.conditional_log_prob, data.log_prob))
        for i, t in enumerate(TIMES.tolist()):
            kernel = sde.marginal(t)
            psi, sigma = float(kernel.mean[0, 0]), float(kernel.covariance[0, 0])
            spread = sigma * torch.eye(2, dtype=torch.float64) + psi**2 * data.covariances
            members = MultivariateNormal(psi * data.means, spread)
            of_data = MixtureSameFamily(Categorical(data.weights), members).log_prob(z[i, 0])
            # The residual of x is rounded relative to x.
            residual = EPS * float(z[i, 0].abs().max()) / math.sqrt(sigma)
            tolerance = 4 * score_rounding(sde, t) + 64 * residual
            error = abs(found[i] - joint[i] + of_data)
            assert error <= tolerance * (abs(of_data) + abs(joint[i]) + 1)

    @every_family
    def test_a_single_precision_state_loses_single_precision(self, name):
        sde, data, t = FAMILIES[name], mixture(), TIMES[1:]
        z = states(sde, data, t, n=3).float()
        # The residual z - psi m is rounded once more, relative to its terms, and whitened by the
        # inverse root twice for the score, once for the posterior mean.
        size = 8 * EPS32 * float(z.abs().max() + data.means.abs().max())
        whitening = torch.linalg.matrix_norm(torch.linalg.inv(sde.marginal(t).root), 2)
        found, expected = data.score(sde)(z, t), data.score(sde)(z.double(), t)
        assert ((found.double() - expected).abs().amax((1, 2)) <= size * whitening**2).all()
        found, expected = (data.posterior_mean(sde, s, t) for s in (z, z.double()))
        assert ((found - expected).abs().amax(1) <= 4 * size * (1 + whitening)).all()


class TestNumbers:
    @pytest.mark.parametrize("modes", [1, 8])
    @pytest.mark.parametrize("count", [8, 15, 32])
    @both_ways
    def test_a_value_that_is_not_finite_stays_with_its_sample(self, how, count, modes):
        g = generator()
        means = torch.randn(modes, 2, generator=g)
        data = GaussianMixture([1.0] * modes, means, torch.eye(2).expand(modes, 2, 2) / 4)
        z, score = torch.randn(count, 2, 2, generator=g), how(data.score(CLD()), 0.3)
        clean, others = score(z), torch.arange(count) != 3
        for value in (math.nan, -math.inf):
            z[3, 0, 1] = value
            found = score(z)
            # Sums may be made in another order, but not in other groups of samples.
            assert torch.allclose(found[others], clean[others], rtol=100 * EPS32, atol=100 * EPS32)
            assert torch.equal(found[16:], clean[16:])
            assert not found[3].isfinite().all()

    @both_ways
    def test_a_gradient_that_is_not_finite_stays_with_its_sample(self, how):
        z = torch.randn(16, 2, 2, generator=generator()).requires_grad_()
        above = torch.ones(16, 1, 2)
        above[3] = math.nan
        (found,) = torch.autograd.grad(how(PLANE.score(CLD()), 0.3)(z), z, above)
        assert found[torch.arange(16) != 3].isfinite().all()

    @pytest.mark.parametrize("modes", [1, 8])
    def test_no_device_is_waited_for(self, modes, monkeypatch):
        """A tensor without memory has no value to wait for."""
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        eyes = torch.eye(2).expand(modes, 2, 2)
        data = GaussianMixture([1.0] * modes, torch.zeros(modes, 2), eyes)
        z = torch.empty(16, 2, 2, device="meta")
        assert at_a_known_time(data.score(CLD()), 0.5)(z).shape == (16, 1, 2)

    @both_ways
    def test_it_can_be_transformed(self, how):
        z = torch.randn(3, 16, 2, 2, generator=generator(), dtype=torch.float64)
        call = how(PLANE.score(CLD()), 0.3)
        lost = 4 * score_rounding(CLD(), 0.3) * float(call(z[0]).abs().max())
        expected = torch.stack([call(b) for b in z])
        assert torch.allclose(torch.func.vmap(call)(z), expected, rtol=0, atol=lost)
        # It is affine: its derivative along v is its change.
        _, slope = torch.func.jvp(call, (z[0],), (z[1],))
        assert torch.allclose(slope, call(z[0] + z[1]) - call(z[0]), rtol=0, atol=2 * lost)

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize(
        ("dimension", "t"), [(2, 0.3), (20, torch.tensor([0.1, 0.3, 0.3, 1.0]))], ids=str
    )
    def test_a_compiled_graph_has_the_same_bits(self, dimension, t):
        g = generator()
        eye = torch.eye(dimension).expand(3, -1, -1)
        data = GaussianMixture([1.0] * 3, torch.randn(3, dimension, generator=g), eye)
        score, z = data.score(CLD()), torch.randn(4, 2, dimension, generator=g)
        torch._dynamo.reset()
        compiled = torch.compile(lambda z, t: 1.1 * score(z, t), backend="eager")
        assert torch.equal(compiled(z, t), 1.1 * score(z, t))


class TestKnownTimes:
    @pytest.mark.one_in(5)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rows", ["driven", "all", "auxiliary"])
    @pytest.mark.parametrize("name", AUXILIARY)
    def test_it_is_the_score_at_exact_times(self, name, rows, dtype):
        sde, data = FAMILIES[name], mixture("degenerate")
        times, score = known(*TIMES[1:].tolist()), data.score(sde, rows=rows)
        for i, t in enumerate(TIMES[1:].tolist()):
            z = states(sde, data, t).to(dtype)
            found, expected = called(score, z, times.arguments(z)[i]), score(z, t)
            assert found.dtype == dtype
            # Coefficients of one time or of a grid differ by rounding in double precision, and
            # then perhaps by one rounding in the state's precision.
            lost = score_rounding(sde, t) * rounding(1, dtype=dtype) / EPS
            assert (found - expected).abs().max() <= lost * expected.abs().max()

    @pytest.mark.one_in(5)
    @pytest.mark.parametrize("count", [0, 1, 21])
    @pytest.mark.parametrize("modes", [1, 3])
    @pytest.mark.parametrize("dimension", [1, 3, 20])  # 20 has no matrix for all numbers
    @pytest.mark.parametrize("name", ["VP", "HOLD"])
    def test_batches_and_states_have_any_size(self, name, dimension, modes, count):
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


class TestSampling:
    def test_samples_have_the_moments_of_the_mixture(self):
        data, n = mixture("degenerate"), 20_000
        x = data.sample(n, generator=generator(), dtype=torch.float64)
        second = data.covariances + torch.einsum("ni,nj->nij", data.means, data.means)
        products = torch.einsum("bi,bj->bij", x, x)
        for found, members in ((x, data.means), (products, second)):
            expected = torch.einsum("n,n...->...", data.weights, members)
            error = standard_error(1.0, n) * found.std(0)
            assert ((found.mean(0) - expected).abs() <= error).all()

    def test_points_occur_with_their_weights(self):
        data, n = mixture("points"), 20_000
        assert float(data.weights.sum()) == pytest.approx(1.0, rel=rounding(), abs=0)
        x = data.sample(n, generator=generator(), dtype=torch.float64)
        hits = (x[:, None] == data.means).all(-1)
        assert (hits.sum(1) == 1).all()
        error = standard_error(1.0, n) * (data.weights * (1 - data.weights)).sqrt()
        assert ((hits.double().mean(0) - data.weights).abs() <= error).all()
