"""Gaussian mixtures: densities and scores against dense ones in high precision."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from scipy import stats

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture
from cldsde.score.times import KnownTimes
from probes import generator
from references import mixed
from score.cases import AUXILIARY, FAMILIES, known, mixture, score_rounding, states
from tolerances import EPS, EPS32, KERNEL, rounding, standard_error

every_family = pytest.mark.parametrize("name", FAMILIES)
every_kind = pytest.mark.parametrize("kind", ["regular", "degenerate", "points"])
TIMES = torch.tensor([1e-3, 0.05, 0.4, 1.0], dtype=torch.float64)
PLANE = GaussianMixture([1.0], [[0.3, 0.1]], [[[0.2, 0.0], [0.0, 0.1]]])


def at_a_time(score: Any, t: float) -> Any:
    return lambda z: score(z, t)


both_ways = pytest.mark.parametrize("how", [at_a_time, at_a_known_time])


class TestExactness:
    @every_kind
    @every_family
    def test_density_scores_and_posterior_mean_are_exact(self, name: str, kind: str) -> None:
        sde, data = FAMILIES[name], mixture(kind)
        z = states(sde, data, TIMES)
        log_prob, mean = data.log_prob(sde, z, TIMES), data.posterior_mean(sde, z, TIMES)
        score, full = (data.score(sde, rows=rows)(z, TIMES) for rows in ("driven", "all"))
        assert score.shape == (4, len(sde.driven), 2)
        assert full.shape == z.shape
        for i, t in enumerate(TIMES.tolist()):
            expected = mixed(sde.marginal(t), data, z[i])
            tolerance = min(1e-10, score_rounding(sde, t))
            size = expected.score.abs().max()
            error = (score[i] - expected.score[list(sde.driven)]).abs().max()
            assert error <= tolerance * size
            # Rows that are not driven are found through all others.
            assert (full[i] - expected.score).abs().max() <= 4 * tolerance * size
            scale = max(1.0, abs(expected.log_prob))
            assert abs(log_prob[i].item() - expected.log_prob) <= tolerance * scale
            scale = float(data.means.abs().max() + expected.posterior_mean.abs().max())
            assert (mean[i] - expected.posterior_mean).abs().max() <= 4 * tolerance * scale

    @every_family
    def test_far_away_the_score_is_exact(self, name: str) -> None:
        sde, data, t = FAMILIES[name], mixture("degenerate"), 0.1
        z = 40 * states(sde, data, t, n=2)
        score = data.score(sde)(z, t)
        for i in range(len(z)):
            expected = mixed(sde.marginal(t), data, z[i]).score
            error = (score[i] - expected[list(sde.driven)]).abs().max()
            # Further away the residual is as long as its terms.
            assert error <= score_rounding(sde, t) * expected.abs().max()

    @every_kind
    @every_family
    def test_scores_are_gradients_of_densities(self, name: str, kind: str) -> None:
        sde, data = FAMILIES[name], mixture(kind)
        z = states(sde, data, TIMES).requires_grad_()
        pairs = [("driven", data.log_prob, sde.driven)]
        if sde.components > 1:
            pairs.append(("auxiliary", data.conditional_log_prob, tuple(range(1, sde.components))))
        full = data.score(sde, rows="all")(z, TIMES).detach()
        for rows, density, driven in pairs:
            (gradient,) = torch.autograd.grad(density(sde, z, TIMES).sum(), z)
            score = data.score(sde, rows=rows)  # type: ignore[arg-type]
            assert score.rows == list(driven)
            error = (score(z, TIMES).detach() - gradient[:, list(driven)]).abs()
            for i, t in enumerate(TIMES.tolist()):
                # Two orders of the same triangular products.
                tolerance = 2 * score_rounding(sde, t) * full[i].abs().max()
                assert error[i].max() <= tolerance

    @pytest.mark.parametrize("kind", ["regular", "points"])
    @pytest.mark.parametrize("name", AUXILIARY)
    def test_the_conditional_density_is_the_joint_one_over_that_of_the_data(
        self, name: str, kind: str
    ) -> None:
        sde, data = FAMILIES[name], mixture(kind)
        z = states(sde, data, TIMES)
        found = data.conditional_log_prob(sde, z, TIMES)
        joint = data.log_prob(sde, z, TIMES)
        for i, t in enumerate(TIMES.tolist()):
            kernel = sde.marginal(t)
            psi, sigma = float(kernel.mean[0, 0]), float(kernel.covariance[0, 0])
            eye = torch.eye(2, dtype=torch.float64)
            logs = [
                math.log(w)
                + stats.multivariate_normal.logpdf(z[i, 0], psi * m, sigma * eye + psi**2 * C)
                for w, m, C in zip(data.weights.tolist(), data.means, data.covariances, strict=True)
            ]
            of_data = float(torch.tensor(logs, dtype=torch.float64).logsumexp(0))
            # The residual of x is rounded relative to x.
            residual = EPS * float(z[i, 0].abs().max()) / math.sqrt(sigma)
            size = abs(of_data) + abs(float(joint[i])) + 1
            tolerance = 4 * score_rounding(sde, t) + 64 * residual
            assert abs(float(found[i] - joint[i]) + of_data) <= tolerance * size

    @every_family
    def test_a_single_precision_state_loses_single_precision(self, name: str) -> None:
        sde, data, t = FAMILIES[name], mixture(), TIMES[1:]
        z = states(sde, data, t, n=3).float()
        found, expected = data.score(sde)(z, t), data.score(sde)(z.double(), t)
        assert found.dtype == data.log_prob(sde, z, t).dtype == torch.float32
        # The residual z - psi m is rounded once more, relative to its terms, and whitened by the
        # inverse root twice for the score, once for the posterior mean.
        size = 8 * EPS32 * float(z.abs().max() + data.means.abs().max())
        whitening = torch.linalg.matrix_norm(torch.linalg.inv(sde.marginal(t).root), 2)
        error = (found.double() - expected).abs().amax((1, 2))
        assert (error <= size * whitening**2).all()
        mean = data.posterior_mean(sde, z, t)
        assert mean.dtype == torch.float32
        error = (mean.double() - data.posterior_mean(sde, z.double(), t)).abs().amax(1)
        assert (error <= 4 * size * (1 + whitening)).all()

    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    def test_in_equilibrium_the_score_is_linear(self, make: Any) -> None:
        scale = "auxiliary_scale" if make is HOLD else "velocity_scale"
        sde = make() if make is VPSDE else make(**{scale: 1.0})
        data = GaussianMixture([1.0], [[0.0]], [[[1.0]]])
        z = torch.randn(5, sde.components, 1, generator=generator(), dtype=torch.float64)
        expected = -torch.linalg.solve(sde.stationary_covariance, z)[:, list(sde.driven)]
        for t in (1e-6, 0.3, 1.0):
            # Times the condition of the stationary covariance.
            found = data.score(sde)(z, t)
            assert torch.allclose(found, expected, rtol=4 * KERNEL, atol=4 * KERNEL)

    def test_blurred_data_have_a_density_at_the_start(self) -> None:
        # VE's own initial distribution is N(x, sigma_min^2).
        sde, data = VESDE(0.1, 3.0), GaussianMixture([1.0], [[0.0]], [[[0.0]]])
        score = data.score(sde)(torch.ones(1, 1, 1, dtype=torch.float64), 0.0)
        assert score.item() == pytest.approx(-100.0, rel=rounding())


class TestNumbers:
    """Values that are not finite, transforms and devices."""

    @pytest.mark.parametrize("modes", [1, 8])
    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    @pytest.mark.parametrize("count", [8, 15])
    @both_ways
    def test_a_value_that_is_not_finite_stays_with_its_sample(
        self, how: Any, count: int, value: float, modes: int
    ) -> None:
        g = generator()
        means = torch.randn(modes, 2, generator=g)
        data = GaussianMixture([1.0] * modes, means, torch.eye(2).expand(modes, 2, 2) / 4)
        z = torch.randn(count, 2, 2, generator=g)
        score = how(data.score(CLD()), 0.3)
        clean = score(z)
        z[3, 0, 1] = value
        found = score(z)
        others = torch.arange(count) != 3
        # Sums may be made in another order.
        assert torch.allclose(found[others], clean[others], rtol=100 * EPS32, atol=100 * EPS32)
        assert not bool(found[3].isfinite().all())

    def test_it_changes_no_bit_of_other_groups(self) -> None:
        z = torch.randn(32, 2, 2, generator=generator())
        score = at_a_known_time(PLANE.score(CLD()), 0.3)
        clean = score(z)
        z[3, 1, 0] = math.nan
        assert torch.equal(score(z)[8:], clean[8:])

    @both_ways
    def test_a_gradient_that_is_not_finite_stays_with_its_sample(self, how: Any) -> None:
        z = torch.randn(16, 2, 2, generator=generator()).requires_grad_()
        above = torch.ones(16, 1, 2)
        above[3] = math.nan
        (found,) = torch.autograd.grad(how(PLANE.score(CLD()), 0.3)(z), z, above)
        assert bool(found[torch.arange(16) != 3].isfinite().all())

    @pytest.mark.parametrize("modes", [1, 8])
    def test_no_device_is_waited_for(self, modes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tensor without memory has no value to wait for."""
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        eyes = torch.eye(2).expand(modes, 2, 2)
        data = GaussianMixture([1.0] * modes, torch.zeros(modes, 2), eyes)
        z = torch.empty(16, 2, 2, device="meta")
        assert at_a_known_time(data.score(CLD()), 0.5)(z).shape == (16, 1, 2)

    @both_ways
    def test_it_can_be_transformed(self, how: Any) -> None:
        z = torch.randn(3, 16, 2, 2, generator=generator(), dtype=torch.float64)
        call = how(PLANE.score(CLD()), 0.3)
        lost = score_rounding(CLD(), 0.3) * float(call(z[0]).abs().max())
        found = torch.func.vmap(call)(z)
        assert torch.allclose(found, torch.stack([call(b) for b in z]), rtol=0, atol=4 * lost)
        # It is affine: its derivative along v is its change.
        _, slope = torch.func.jvp(call, (z[0],), (z[1],))
        change = call(z[0] + z[1]) - call(z[0])
        assert torch.allclose(slope, change, rtol=0, atol=8 * lost)

    @pytest.mark.parametrize(("dimension", "modes"), [(2, 1), (2, 3), (20, 3)])
    @pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.3, 0.3, 1.0])], ids=str)
    def test_a_compiled_graph_has_the_same_bits(self, t: Any, modes: int, dimension: int) -> None:
        g = generator()
        eye = torch.eye(dimension).expand(modes, -1, -1)
        data = GaussianMixture([1.0] * modes, torch.randn(modes, dimension, generator=g), eye)
        score, z = data.score(CLD()), torch.randn(4, 2, dimension, generator=g)
        torch._dynamo.reset()
        compiled = torch.compile(lambda z, t: 1.1 * score(z, t), backend="eager")
        assert torch.equal(compiled(z, t), 1.1 * score(z, t))


class TestKnownTimes:
    """Scores whose coefficients are computed for all times of a solver at once."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rows", ["driven", "all", "auxiliary"])
    @pytest.mark.parametrize("name", AUXILIARY)
    def test_it_is_the_score_at_exact_times(self, name: str, rows: Any, dtype: torch.dtype) -> None:
        sde, data = FAMILIES[name], mixture("degenerate")
        times, score = known(*TIMES[1:].tolist()), data.score(sde, rows=rows)
        for i, t in enumerate(TIMES[1:].tolist()):
            z = states(sde, data, t).to(dtype)
            found, expected = score(z, times.arguments(z)[i]), score(z, t)
            assert found.dtype == dtype
            # Coefficients of one time or of a grid differ by rounding in double precision, and
            # then perhaps by one rounding in the state's precision.
            lost = score_rounding(sde, t) * rounding(1, dtype=dtype) / EPS
            assert (found - expected).abs().max() <= lost * expected.abs().max()

    @pytest.mark.parametrize("count", [0, 1, 21])
    @pytest.mark.parametrize("modes", [1, 3])
    @pytest.mark.parametrize("dimension", [1, 3, 20])  # 20 has no matrix for all numbers
    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_batches_and_states_have_any_size(
        self, name: str, dimension: int, modes: int, count: int
    ) -> None:
        sde, times = FAMILIES[name], known(0.9, 0.3)
        means = torch.linspace(-1, 1, modes * dimension).reshape(modes, dimension)
        spread = 0.3 * torch.eye(dimension) + 0.1
        data = GaussianMixture(torch.ones(modes), means, spread.expand(modes, -1, -1))
        shape = (count, sde.components, dimension)
        z = torch.randn(shape, generator=generator(count), dtype=torch.float64)
        for rows in ("driven", "all"):
            score = data.score(sde, rows=rows)  # type: ignore[arg-type]
            found, expected = score(z, times.arguments(z)[1]), score(z, 0.3)
            assert found.shape == expected.shape
            tolerance = 4 * score_rounding(sde, 0.3)
            assert torch.allclose(found, expected, rtol=tolerance, atol=10 * tolerance)

    @pytest.mark.parametrize("dimension", [2, 50])
    def test_an_empty_batch_leaves_coefficients_for_others(self, dimension: int) -> None:
        data = GaussianMixture([1.0], torch.zeros(1, dimension), torch.eye(dimension)[None])
        score, times, z = data.score(CLD()), known(0.9, 0.3), torch.ones(3, 2, dimension)
        assert score(z[:0], times.arguments(z[:0])[0]).shape == (0, 1, dimension)
        found = score(z, times.arguments(z)[1])
        assert torch.allclose(found, score(z, 0.3), rtol=100 * EPS32, atol=0)

    @pytest.mark.parametrize("name", ["VE", "CLD", "HOLD"])
    def test_each_sample_may_have_its_time(self, name: str) -> None:
        sde, data = FAMILIES[name], mixture()
        table = torch.tensor([[0.9, 0.7, 0.8, 0.6], [0.3, 0.4, 0.05, 1.0]], dtype=torch.float64)
        z, score = states(sde, data, 0.3), data.score(sde)
        found, expected = score(z, KnownTimes(table).arguments(z)[1]), score(z, table[1])
        tolerance = max(score_rounding(sde, t) for t in table[1]) * float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)


class TestSampling:
    def test_samples_have_the_moments_of_the_mixture(self) -> None:
        data, n = mixture("degenerate"), 20_000
        x = data.sample(n, generator=generator(), dtype=torch.float64)
        mean = data.weights @ data.means
        second = data.covariances + torch.einsum("ni,nj->nij", data.means, data.means)
        expected = torch.einsum("n,nij->ij", data.weights, second)
        error = standard_error(1.0, n)
        assert ((x.mean(0) - mean).abs() <= error * x.std(0)).all()
        products = torch.einsum("bi,bj->bij", x, x)
        assert ((products.mean(0) - expected).abs() <= error * products.std(0)).all()

    def test_points_occur_with_their_weights(self) -> None:
        data, n = mixture("points"), 20_000
        x = data.sample(n, generator=generator(), dtype=torch.float64)
        hits = (x[:, None] == data.means).all(-1)
        assert (hits.sum(1) == 1).all()
        spread = (data.weights * (1 - data.weights)).sqrt()
        error = (hits.double().mean(0) - data.weights).abs()
        assert (error <= standard_error(1.0, n) * spread).all()

    def test_weights_are_normalised(self) -> None:
        data = GaussianMixture([1.0, 3.0], [[0.0], [1.0]], torch.ones(2, 1, 1))
        assert data.weights.tolist() == [0.25, 0.75]
