"""Gaussian mixtures: densities and scores against dense ones in high precision."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from scipy import stats

from cldsde import CLD, PSLD, VESDE, VPSDE, GaussianMixture
from cldsde.score.times import KnownTimes
from score import exact
from score.exact import EPS, FAMILIES, known

every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_kind = pytest.mark.parametrize("kind", ["regular", "degenerate", "points"])
every_time = pytest.mark.parametrize("t", [1e-3, 0.05, 0.4, 1.0])


def at_a_time(score: Any, t: float, like: torch.Tensor) -> Any:
    return lambda z: score(z, t)


def at_a_known_time(score: Any, t: float, like: torch.Tensor) -> Any:
    time = known(t)
    return lambda z: score(z, time.arguments(z)[0])


class TestExactness:
    """log_prob and score of mixtures in the plane."""

    @every_time
    @every_kind
    @every_family
    def test_density_and_score_are_those_of_the_dense_law(
        self, name: str, kind: str, t: float
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t)
        log_prob, score = data.log_prob(sde, z, t), data.score(sde)(z, t)
        assert score.shape == (len(z), len(sde.driven), 2)
        tolerance = min(1e-10, exact.rounding(sde, t))
        for i in range(len(z)):
            expected = exact.dense(sde, data, z[i], t)
            error = (score[i] - expected.score[list(sde.driven)]).abs().max()
            assert error <= tolerance * expected.score.abs().max()
            scale = max(1.0, abs(expected.log_prob))
            assert abs(log_prob[i].item() - expected.log_prob) <= tolerance * scale

    @every_kind
    @every_family
    def test_far_away_the_score_is_that_of_the_nearest_component(
        self, name: str, kind: str
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = 40 * exact.states(sde, data, 0.1, n=2)
        score = data.score(sde)(z, 0.1)
        for i in range(len(z)):
            expected = exact.dense(sde, data, z[i], 0.1).score
            error = (score[i] - expected[list(sde.driven)]).abs().max()
            # Further away the residual is as long as its terms.
            assert error <= exact.rounding(sde, 0.1) * expected.abs().max()

    @every_time
    @every_kind
    @every_family
    def test_the_score_is_the_gradient_of_the_density(self, name: str, kind: str, t: float) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t).requires_grad_()
        (gradient,) = torch.autograd.grad(data.log_prob(sde, z, t).sum(), z)
        score = data.score(sde)(z, t).detach()
        # Two orders of the same triangular products.
        tolerance = 2 * exact.rounding(sde, t) * gradient.abs().max()
        assert (score - gradient[:, list(sde.driven)]).abs().max() <= tolerance

    @pytest.mark.parametrize("name", ["VP", "VE", "CLD", "PSLD"])
    def test_the_density_is_that_of_scipy(self, name: str) -> None:
        sde, data, t = FAMILIES[name](), exact.mixture(), 0.3
        z = exact.states(sde, data, t)
        kernel = sde.marginal(t)
        psi, eye = kernel.mean[:, 0], torch.eye(2, dtype=torch.float64)
        density = torch.zeros(len(z), dtype=torch.float64)
        parts = zip(data.weights, data.means, data.covariances, strict=True)
        for weight, mean, covariance in parts:
            spread = torch.kron(torch.outer(psi, psi), covariance)
            law = stats.multivariate_normal(
                torch.kron(psi, mean).numpy(),
                (torch.kron(kernel.covariance, eye) + spread).numpy(),
            )
            density += weight * torch.from_numpy(law.pdf(z.flatten(1).numpy()))
        # scipy inverts covariances, whose condition number is below 1e4 here.
        assert torch.allclose(data.log_prob(sde, z, t), density.log(), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
    @every_family
    def test_a_single_precision_state_loses_single_precision(self, name: str, t: float) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        z = exact.states(sde, data, t).float()
        found, expected = data.score(sde)(z, t), data.score(sde)(z.double(), t)
        assert found.dtype == data.log_prob(sde, z, t).dtype == torch.float32
        # The residual z - psi m is rounded once more, relative to its terms, and whitened by the
        # inverse root twice for the score.
        whitening = torch.linalg.inv(sde.marginal(t).root)
        size = float(z.abs().max() + data.means.abs().max())
        bound = 8 * 1.2e-7 * size * float(torch.linalg.matrix_norm(whitening, 2)) ** 2
        assert (found.double() - expected).abs().max() <= bound

    @every_family
    def test_per_sample_times_equal_single_times(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture("degenerate")
        t = torch.tensor([1.0, 0.02, 0.3], dtype=torch.float64)
        z = exact.states(sde, data, t, n=3)
        together, density = data.score(sde)(z, t), data.log_prob(sde, z, t)
        for i, single in enumerate(t.tolist()):
            alone = data.score(sde)(z[i : i + 1], single)
            # A batch shares the number of doublings of its longest time.
            tolerance = exact.rounding(sde, single)
            assert torch.allclose(together[i : i + 1], alone, rtol=1e-10, atol=tolerance)
            value = data.log_prob(sde, z[i : i + 1], single).item()
            assert density[i].item() == pytest.approx(value, rel=1e-10)

    @every_family
    def test_one_time_may_be_given_as_a_number_or_one_a_sample(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        z = exact.states(sde, data, 0.5, n=3)
        score, number = data.score(sde), torch.tensor(0.5, dtype=torch.float64)
        expected = score(z, 0.5)
        assert torch.equal(score(z, number), expected)
        assert torch.equal(score(z, number.expand(3)), expected)
        # Coefficients of one time or of three equal ones: the same sums, perhaps in another order.
        tolerance = exact.rounding(sde, 0.5)
        for t in (torch.full((3,), 0.5), torch.full((3,), 0.5, dtype=torch.float64)):
            assert torch.allclose(score(z, t), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_family
    def test_at_known_times_it_is_the_score_at_exact_times(
        self, name: str, dtype: torch.dtype
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture("degenerate")
        times = known(1.0, 0.4, 0.02)
        score = data.score(sde)
        for i, t in enumerate(times.times.tolist()):
            z = exact.states(sde, data, t).to(dtype)
            found, expected = score(z, times.arguments(z)[i]), score(z, t)
            assert found.dtype == dtype
            # Coefficients of one time or of a grid differ by rounding in double precision, and then
            # perhaps by one rounding in that of the state.
            tolerance = exact.rounding(sde, t) * torch.finfo(dtype).eps / EPS
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()

    @pytest.mark.parametrize("axes", [(2, 1), (1, 2), (1, 1, 2)])
    @every_family
    def test_several_data_axes_equal_flattened_ones(self, name: str, axes: Any) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        flat = exact.states(sde, data, 0.3)
        z = flat.reshape(*flat.shape[:2], *axes)
        score = data.score(sde)
        assert torch.equal(score(z, 0.3).flatten(2), score(flat, 0.3))
        assert score(z, 0.3).shape == (len(z), len(sde.driven), *axes)
        assert torch.equal(data.log_prob(sde, z, 0.3), data.log_prob(sde, flat, 0.3))
        assert torch.equal(at_a_known_time(score, 0.3, z)(z).flatten(2), score(flat, 0.3))

    @every_family
    def test_scalar_data_need_no_axis(self, name: str) -> None:
        sde = FAMILIES[name]()
        data = GaussianMixture([1.0, 2.0], [[-1.0], [1.0]], [[[0.1]], [[0.0]]])
        z = exact.states(sde, data, 0.3)
        score = data.score(sde)
        expected = score(z, 0.3)[..., 0]
        assert torch.equal(score(z[..., 0], 0.3), expected)
        assert torch.equal(data.log_prob(sde, z[..., 0], 0.3), data.log_prob(sde, z, 0.3))
        assert torch.equal(at_a_known_time(score, 0.3, z)(z[..., 0]), expected)

    @every_family
    def test_a_batch_is_a_set_of_samples(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        z = exact.states(sde, data, 0.3)
        score = data.score(sde)
        # Products over a batch of another size may be summed in another order.
        tolerance = exact.rounding(sde, 0.3)
        whole, part = score(z, 0.3), score(z[2:], 0.3)
        assert torch.allclose(whole[2:], part, rtol=tolerance, atol=tolerance)
        assert torch.allclose(score(z.flip(0), 0.3).flip(0), whole, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("modes", [1, 8])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("count", [8, 15, 16])
    @pytest.mark.parametrize("how", [at_a_time, at_a_known_time])
    def test_what_is_not_finite_stays_with_its_sample(
        self, how: Any, count: int, value: float, modes: int
    ) -> None:
        sde, g = CLD(), torch.Generator().manual_seed(0)
        means = torch.randn(modes, 2, generator=g)
        data = GaussianMixture([1.0] * modes, means, torch.eye(2).expand(modes, 2, 2) / 4)
        z = torch.randn(count, 2, 2, generator=g)
        score = how(data.score(sde), 0.3, z)
        clean = score(z)
        z[3, 0, 1] = value
        found = score(z)
        others = torch.arange(count) != 3
        # Roundings of single precision, as the sums may be made otherwise.
        assert torch.allclose(found[others], clean[others], rtol=1e-5, atol=1e-5)
        assert not bool(found[3].isfinite().all())

    @pytest.mark.parametrize("modes", [1, 8])
    def test_no_device_is_waited_for(self, modes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tensor without memory has no value to ask for."""
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        sde = CLD()
        data = GaussianMixture(
            [1.0] * modes, torch.zeros(modes, 2), torch.eye(2).expand(modes, 2, 2)
        )
        z = torch.empty(16, 2, 2, device="meta")
        assert at_a_known_time(data.score(sde), 0.5, z)(z).shape == (16, 1, 2)

    @pytest.mark.parametrize("how", [at_a_time, at_a_known_time])
    def test_gradients_that_are_not_finite_stay_with_their_sample(self, how: Any) -> None:
        sde = CLD()
        z = torch.randn(16, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        score = how(
            GaussianMixture([1.0], [[0.3, 0.1]], [[[0.2, 0.0], [0.0, 0.1]]]).score(sde), 0.3, z
        )
        above = torch.ones(16, 1, 2)
        above[3] = math.nan
        (found,) = torch.autograd.grad(score(z), z, above)
        assert bool(found[torch.arange(16) != 3].isfinite().all())

    @pytest.mark.parametrize("how", [at_a_time, at_a_known_time])
    def test_it_can_be_transformed(self, how: Any) -> None:
        score = GaussianMixture([1.0], [[0.3, 0.1]], [[[0.2, 0.0], [0.0, 0.1]]]).score(CLD())
        z = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
        call = how(score, 0.3, z[0])
        found = torch.func.vmap(call)(z)
        assert torch.allclose(found, torch.stack([call(batch) for batch in z]), atol=1e-6)
        # It is affine: its derivative along v is its change.
        _, slope = torch.func.jvp(call, (z[0],), (z[1],))
        assert torch.allclose(slope, call(z[0] + z[1]) - call(z[0]), rtol=1e-4, atol=1e-4)

    def test_what_is_not_finite_changes_no_bit_of_other_groups(self) -> None:
        score = GaussianMixture([1.0], [[0.3, 0.1]], [[[0.2, 0.0], [0.0, 0.1]]]).score(CLD())
        z = torch.randn(32, 2, 2, generator=torch.Generator().manual_seed(0))
        table = at_a_known_time(score, 0.3, z)
        clean = table(z)
        z[3, 1, 0] = math.nan
        found = table(z)
        assert torch.equal(found[8:], clean[8:])
        assert torch.allclose(found[[0, 7]], clean[[0, 7]], rtol=1e-5, atol=1e-5)

    def test_an_empty_batch_has_no_scores(self) -> None:
        data = exact.mixture()
        for how in (at_a_time, at_a_known_time):
            z = torch.zeros(0, 2, 2)
            assert how(data.score(CLD()), 0.5, z)(z).shape == (0, 1, 2)
        assert data.log_prob(CLD(), torch.zeros(0, 2, 2), 0.5).shape == (0,)

    @pytest.mark.parametrize("name", ["VP", "CLD", "PSLD", "HOLD"])
    def test_in_equilibrium_the_score_is_linear(self, name: str) -> None:
        # Data N(0, S_xx) and auxiliary components at the stationary law stay there.
        sde = {
            "VP": VPSDE,
            "CLD": lambda: CLD(velocity_scale=1.0),
            "PSLD": lambda: PSLD(velocity_scale=1.0),
            "HOLD": lambda: exact.HOLD(auxiliary_scale=1.0),
        }[name]()
        data = GaussianMixture([1.0], [[0.0]], [[[1.0]]])
        z = torch.randn(5, sde.components, 1, generator=torch.Generator().manual_seed(0)).double()
        assert sde.stationary_covariance is not None
        expected = -torch.linalg.solve(sde.stationary_covariance, z)[:, list(sde.driven)]
        for t in (1e-6, 0.3, 1.0):
            # The promise of the kernels, 1e-12, times the condition of the stationary law, 4.
            assert torch.allclose(data.score(sde)(z, t), expected, rtol=4e-12, atol=4e-12)


class TestAllRows:
    """Full scores, posterior means, and the law of the auxiliary components given the data."""

    @every_time
    @every_kind
    @every_family
    def test_full_score_and_posterior_mean_are_those_of_the_dense_law(
        self, name: str, kind: str, t: float
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t, n=2)
        score = data.score(sde, rows="all")(z, t)
        mean = data.posterior_mean(sde, z, t)
        assert score.shape == z.shape
        assert mean.shape == (2, 2)
        # Rows that are not driven are found through all others.
        tolerance = min(1e-10, 4 * exact.rounding(sde, t))
        for i in range(len(z)):
            expected = exact.dense(sde, data, z[i], t)
            error = (score[i] - expected.score).abs().max()
            assert error <= tolerance * expected.score.abs().max()
            # The posterior mean of the data is of the size of the means and of the data.
            scale = float(data.means.abs().max() + expected.posterior_mean.abs().max())
            assert (mean[i] - expected.posterior_mean).abs().max() <= tolerance * scale

    @every_time
    @every_kind
    @every_family
    def test_the_full_score_is_the_gradient_of_the_density(
        self, name: str, kind: str, t: float
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t).requires_grad_()
        (gradient,) = torch.autograd.grad(data.log_prob(sde, z, t).sum(), z)
        score = data.score(sde, rows="all")
        # Two orders of the same triangular products.
        tolerance = 2 * exact.rounding(sde, t) * gradient.abs().max()
        assert score.rows == list(range(sde.components))
        assert (score(z, t).detach() - gradient).abs().max() <= tolerance

    @every_family
    def test_the_driven_rows_are_some_of_all(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture("degenerate")
        z = exact.states(sde, data, 0.1)
        full = data.score(sde, rows="all")(z, 0.1)
        # The same products, perhaps summed in another order.
        tolerance = exact.rounding(sde, 0.1) * float(full.abs().max())
        driven = data.score(sde, rows="driven")(z, 0.1)
        assert torch.allclose(full[:, list(sde.driven)], driven, rtol=0, atol=tolerance)
        assert torch.equal(driven, data.score(sde)(z, 0.1))

    @every_family
    def test_tweedie_s_formula_connects_score_and_posterior_mean(self, name: str) -> None:
        # Sigma s = -(z - psi E[x_0 | z]), all rows.
        sde, data, t = FAMILIES[name](), exact.mixture(), 0.3
        z = exact.states(sde, data, t)
        kernel = sde.marginal(t)
        left = kernel.covariance @ data.score(sde, rows="all")(z, t)
        right = kernel.mean[:, :1] * data.posterior_mean(sde, z, t).unsqueeze(1) - z
        # The score is right relative to its largest row, and the covariance is at most 400 for VE.
        size = float(kernel.covariance.abs().max() * data.score(sde, rows="all")(z, t).abs().max())
        assert (left - right).abs().max() <= exact.rounding(sde, t) * (size + float(z.abs().max()))

    @pytest.mark.parametrize("kind", ["regular", "degenerate"])
    @every_family
    def test_posterior_means_average_to_the_mean_of_the_data(self, name: str, kind: str) -> None:
        sde, data, n = FAMILIES[name](), exact.mixture(kind), 20_000
        found = data.posterior_mean(sde, exact.states(sde, data, 0.2, n=n), 0.2)
        # 5 standard errors, from the sample's own variance.
        error = 5 * found.std(0) / math.sqrt(n)
        assert ((found.mean(0) - data.weights @ data.means).abs() <= error).all()

    @every_family
    def test_posterior_means_take_any_times_axes_and_dtype(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        t = torch.tensor([1.0, 0.05, 0.4], dtype=torch.float64)
        z = exact.states(sde, data, t, n=3)
        together = data.posterior_mean(sde, z, t)
        for i, single in enumerate(t.tolist()):
            alone = data.posterior_mean(sde, z[i : i + 1], single)
            # A batch shares the number of doublings of its longest time.
            assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=1e-10)
        several = data.posterior_mean(sde, z.reshape(3, sde.components, 1, 2), t)
        assert several.shape == (3, 1, 2)
        assert torch.equal(several[:, 0], together)
        single_precision = data.posterior_mean(sde, z.float(), t)
        assert single_precision.dtype == torch.float32
        # The residual is rounded relative to z and divided by the row's standard deviation.
        rows = sde.marginal(t).root.norm(dim=-1).min()
        bound = 32 * 1.2e-7 * float(1 + z.abs().max() + 4 / rows)
        assert (single_precision.double() - together).abs().max() <= bound


AUXILIARY = [name for name in FAMILIES if FAMILIES[name]().components > 1]
every_auxiliary = pytest.mark.parametrize("name", AUXILIARY)


class TestCompiling:
    """Scores within graphs that torch compiles."""

    @pytest.mark.parametrize("dimension", [2, 20])
    @pytest.mark.parametrize("modes", [1, 3])
    @pytest.mark.parametrize(
        "t", [0.3, torch.tensor(0.3).expand(4), torch.tensor([0.1, 0.3, 0.3, 1.0])], ids=str
    )
    def test_the_bits_are_those_of_a_plain_call(self, t: Any, modes: int, dimension: int) -> None:
        g = torch.Generator().manual_seed(0)
        eye = torch.eye(dimension).expand(modes, -1, -1)
        data = GaussianMixture([1.0] * modes, torch.randn(modes, dimension, generator=g), eye)
        score, z = data.score(CLD()), torch.randn(4, 2, dimension, generator=g)
        torch._dynamo.reset()
        compiled = torch.compile(lambda z, t: 1.1 * score(z, t), backend="eager")
        assert torch.equal(compiled(z, t), 1.1 * score(z, t))


class TestKnownTimes:
    """Scores whose coefficients are computed for all times of a solver at once."""

    @pytest.mark.parametrize("count", [0, 1, 8, 21, 48])
    @pytest.mark.parametrize("modes", [1, 3])
    @every_family
    def test_states_of_any_number_and_size_are_taken(
        self, name: str, modes: int, count: int
    ) -> None:
        sde, times = FAMILIES[name](), known(0.9, 0.3)
        # Twenty numbers a component are beyond what has a matrix of its own.
        for dimension in (1, 2, 3, 5, 20):
            means = torch.linspace(-1, 1, modes * dimension).reshape(modes, dimension)
            spread = 0.3 * torch.eye(dimension) + 0.1
            data = GaussianMixture(torch.ones(modes), means, spread.expand(modes, -1, -1))
            g = torch.Generator().manual_seed(count)
            shape = (count, sde.components, dimension)
            z = torch.randn(shape, generator=g, dtype=torch.float64)
            for rows in ("driven", "all"):
                score = data.score(sde, rows=rows)
                found, expected = score(z, times.arguments(z)[1]), score(z, 0.3)
                assert found.shape == expected.shape
                # Two orders of the same products.
                tolerance = 4 * exact.rounding(sde, 0.3)
                assert torch.allclose(found, expected, rtol=tolerance, atol=10 * tolerance)

    @pytest.mark.parametrize("dimension", [2, 50])
    def test_an_empty_batch_leaves_coefficients_that_serve_others(self, dimension: int) -> None:
        data = GaussianMixture([1.0], torch.zeros(1, dimension), torch.eye(dimension)[None])
        score, times, z = data.score(CLD()), known(0.9, 0.3), torch.ones(3, 2, dimension)
        assert score(z[:0], times.arguments(z[:0])[0]).shape == (0, 1, dimension)
        assert torch.allclose(score(z, times.arguments(z)[1]), score(z, 0.3), rtol=1e-6)

    @every_family
    def test_each_sample_may_have_its_time(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        table = torch.tensor([[0.9, 0.7, 0.8, 0.6], [0.3, 0.4, 0.05, 1.0]], dtype=torch.float64)
        z, score = exact.states(sde, data, 0.3), data.score(sde)
        found = score(z, KnownTimes(table).arguments(z)[1])
        expected = score(z, table[1])
        # Coefficients of one time or of a grid differ by rounding.
        tolerance = max(exact.rounding(sde, t) for t in table[1]) * float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)

    def test_a_state_of_another_dimension_is_refused(self) -> None:
        data, z = GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)[None]), torch.zeros(8, 2, 3)
        with pytest.raises(ValueError, match="2 numbers per component"):
            at_a_known_time(data.score(CLD()), 0.5, z)(z)


class TestConditionalLaw:
    """The law of the auxiliary components given the first."""

    @every_time
    @every_kind
    @every_auxiliary
    def test_its_score_is_its_gradient(self, name: str, kind: str, t: float) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t).requires_grad_()
        (gradient,) = torch.autograd.grad(data.conditional_log_prob(sde, z, t).sum(), z)
        score = data.score(sde, rows="auxiliary")(z, t).detach()
        assert score.shape == (len(z), sde.components - 1, 2)
        # Two orders of the same triangular products; the terms of log p(z) and log p(x).
        full = data.score(sde, rows="all")(z, t).detach()
        tolerance = 2 * exact.rounding(sde, t) * full.abs().max()
        assert (score - gradient[:, 1:]).abs().max() <= tolerance
        assert torch.allclose(score, full[:, 1:], rtol=0, atol=float(tolerance))

    @every_time
    @every_kind
    @every_auxiliary
    def test_it_is_the_joint_density_over_that_of_the_data(
        self, name: str, kind: str, t: float
    ) -> None:
        sde, data = FAMILIES[name](), exact.mixture(kind)
        z = exact.states(sde, data, t)
        found = data.conditional_log_prob(sde, z, t)
        assert found.shape == (len(z),)
        kernel = sde.marginal(t)
        psi, sigma = float(kernel.mean[0, 0]), float(kernel.covariance[0, 0])
        eye = torch.eye(2, dtype=torch.float64)
        logs = [
            math.log(w)
            + stats.multivariate_normal.logpdf(z[:, 0], psi * m, sigma * eye + psi**2 * C)
            for w, m, C in zip(data.weights.tolist(), data.means, data.covariances, strict=True)
        ]
        log_data = torch.stack([torch.as_tensor(x) for x in logs]).logsumexp(0)
        expected = data.log_prob(sde, z, t) - log_data
        # The quadratic form of x is some 4 and its residual is rounded relative to x.
        size = float(log_data.abs().max() + expected.abs().max() + 1)
        residual = EPS * float(z[:, 0].abs().max()) / math.sqrt(sigma)
        tolerance = 4 * exact.rounding(sde, t) + 64 * residual
        assert (found - expected).abs().max() <= tolerance * size

    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @pytest.mark.parametrize("name", ["CLD", "CLD, position noise", "PSLD", "HOLD"])
    def test_it_integrates_to_one(self, name: str, t: float) -> None:
        sde = FAMILIES[name]()
        data = GaussianMixture([1.0, 2.0], [[-1.0], [1.0]], [[[0.1]], [[0.0]]])
        x = exact.states(sde, data, t, n=3)[:, 0, 0]
        draws = exact.states(sde, data, t, n=500)[:, 1:, 0]
        # Velocities are within 12 standard deviations of what occurs, and the trapezoidal rule is
        # exact for a smooth density once some steps fall on a standard deviation given the rest.
        own = sde.marginal(t).root.diagonal()[1:]
        axes = []
        for row, sd in zip(draws.unbind(1), own.tolist(), strict=True):
            # The first auxiliary row's spread given x may be larger than its own root's entry.
            low, high = float(row.min() - 12 * sd), float(row.max() + 12 * sd)
            axes.append(torch.linspace(low, high, 2 + int(2.5 * (high - low) / sd)).double())
        grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
        for point in x.tolist():
            z = torch.cat([torch.full((len(grid), 1), point).double(), grid], dim=1)
            density = data.conditional_log_prob(sde, z.unsqueeze(-1), t).exp()
            # Tails beyond 5 standard deviations of the draws, and the axes' single precision.
            assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-5)

    @pytest.mark.parametrize("name", ["VP", "sub-VP", "VE"])
    def test_a_process_without_auxiliary_components_has_none(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        with pytest.raises(ValueError, match="has no auxiliary"):
            data.score(sde, rows="auxiliary")
        with pytest.raises(ValueError, match="has no auxiliary"):
            data.conditional_log_prob(sde, torch.zeros(2, 1, 2), 0.5)

    @pytest.mark.parametrize("rows", ["velocity", "", None, [1]])
    def test_unknown_rows_are_refused(self, rows: Any) -> None:
        with pytest.raises(ValueError, match="rows must be one of"):
            exact.mixture().score(CLD(), rows=rows)

    @pytest.mark.parametrize("t", [0.0, torch.tensor([0.5, 0.0, 0.5])])
    def test_at_the_start_there_is_none(self, t: Any) -> None:
        data, z = exact.mixture("points"), torch.zeros(3, 2, 2)
        with pytest.raises(ValueError, match="no density at t = 0"):
            data.conditional_log_prob(CLD(), z, t)
        with pytest.raises(ValueError, match="no density at t = 0"):
            data.posterior_mean(CLD(), z, t)

    @pytest.mark.parametrize("shape", [(3, 1, 2), (3, 3, 2), (3, 2, 1), (3, 2), (2,)])
    def test_states_that_do_not_fit_are_refused(self, shape: tuple[int, ...]) -> None:
        data, z = exact.mixture(), torch.zeros(shape)
        for method in (data.conditional_log_prob, data.posterior_mean):
            with pytest.raises(ValueError, match="got"):
                method(CLD(), z, 0.5)

    @every_auxiliary
    def test_known_times_serve_any_rows(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        times = known(0.4, 0.05)
        for rows in ("all", "auxiliary"):
            score = data.score(sde, rows=rows)
            z = exact.states(sde, data, 0.05)
            expected = score(z, 0.05)
            found = score(z, times.arguments(z)[1])
            # Coefficients of one time or of a grid differ by rounding.
            tolerance = exact.rounding(sde, 0.05) * float(expected.abs().max())
            assert torch.allclose(found, expected, rtol=0, atol=tolerance)


class TestSampling:
    """Draws from the data law."""

    def test_draws_have_the_moments_of_the_mixture(self) -> None:
        data, n = exact.mixture("degenerate"), 100_000
        x = data.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w = data.weights
        mean = w @ data.means
        second = data.covariances + torch.einsum("ni,nj->nij", data.means, data.means)
        expected = torch.einsum("n,nij->ij", w, second)
        # 5 standard errors, from the sample's own variance of each product.
        assert ((x.mean(0) - mean).abs() <= 5 * x.std(0) / math.sqrt(n)).all()
        products = torch.einsum("bi,bj->bij", x, x)
        error = (products.mean(0) - expected).abs()
        assert (error <= 5 * products.std(0) / math.sqrt(n)).all()

    def test_points_are_drawn_with_their_weights(self) -> None:
        data, n = exact.mixture("points"), 20_000
        x = data.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        hits = (x[:, None] == data.means).all(-1)
        assert (hits.sum(1) == 1).all()
        # 5 standard errors of a share.
        error = (hits.double().mean(0) - data.weights).abs()
        assert (error <= 5 * (data.weights * (1 - data.weights) / n).sqrt()).all()

    def test_a_seed_decides_the_draw(self) -> None:
        data = exact.mixture()

        def draw(seed: int) -> torch.Tensor:
            return data.sample(5, generator=torch.Generator().manual_seed(seed))

        assert draw(0).dtype == torch.float32
        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))


ONE = torch.ones(1, 1, 1)


class TestRefusals:
    """What is no mixture, no state of it, no time."""

    @pytest.mark.parametrize(
        ("weights", "means", "covariances", "message"),
        [
            ([[1.0]], [[0.0]], ONE, "must have shapes"),
            ([1.0], [0.0], ONE, "must have shapes"),
            ([1.0], [[0.0]], [[1.0]], "must have shapes"),
            ([1.0, 1.0], [[0.0]], ONE, "need weights of shape"),
            ([1.0], [[0.0, 0.0]], ONE, "need weights of shape"),
            ([0.0], [[0.0]], ONE, "weights must be finite and positive"),
            ([-1.0], [[0.0]], ONE, "weights must be finite and positive"),
            ([math.nan], [[0.0]], ONE, "weights must be finite and positive"),
            ([math.inf], [[0.0]], ONE, "weights must be finite and positive"),
            ([1.0], [[math.nan]], ONE, "must be finite"),
            ([1.0], [[0.0]], ONE * math.inf, "must be finite"),
            ([1.0], [[0.0]], -ONE, "positive semi-definite"),
            ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive semi-definite"),
            ([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
            ([], torch.zeros(0, 2), torch.zeros(0, 2, 2), "at least one"),
            ([1.0], torch.zeros(1, 0), torch.zeros(1, 0, 0), "at least one"),
        ],
    )
    def test_what_is_no_mixture_is_refused(
        self, weights: Any, means: Any, covariances: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            GaussianMixture(weights, means, covariances)

    @pytest.mark.parametrize("shape", [(3, 1, 2), (3, 3, 2), (3, 2, 1), (3, 2, 2, 2), (3, 2), (2,)])
    def test_states_that_do_not_fit_are_refused(self, shape: tuple[int, ...]) -> None:
        sde, data, z = CLD(), exact.mixture(), torch.zeros(shape)
        with pytest.raises(ValueError, match="got"):
            data.score(sde)(z, 0.5)
        with pytest.raises(ValueError, match="got"):
            data.log_prob(sde, z, 0.5)

    @pytest.mark.parametrize("z", [torch.zeros(3, 2, 2, dtype=torch.int64), [[[0.0]]]])
    def test_states_of_another_type_are_refused(self, z: Any) -> None:
        with pytest.raises(TypeError, match="floating-point tensor of shape"):
            exact.mixture().score(CLD())(z, 0.5)

    @pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, torch.full((2,), 0.5)])
    def test_times_that_do_not_fit_are_refused(self, t: Any) -> None:
        with pytest.raises(ValueError, match="t must"):
            exact.mixture().score(CLD())(torch.zeros(3, 2, 2), t)

    @pytest.mark.parametrize("t", [0.0, torch.tensor([0.5, 0.0, 0.5])])
    def test_at_the_start_a_state_has_no_density(self, t: Any) -> None:
        data, z = exact.mixture("points"), torch.zeros(3, 2, 2)
        with pytest.raises(ValueError, match=r"no density at t = 0.*take t > 0"):
            data.score(CLD())(z, t)
        with pytest.raises(ValueError, match="no density"):
            data.log_prob(CLD(), z, t)

    def test_blurred_data_have_a_density_at_the_start(self) -> None:
        # VE's own initial law is N(x, sigma_min^2).
        sde, data = VESDE(0.1, 3.0), GaussianMixture([1.0], [[0.0]], [[[0.0]]])
        score = data.score(sde)(torch.ones(1, 1, 1, dtype=torch.float64), 0.0)
        assert score.item() == pytest.approx(-100.0, rel=16 * EPS)

    def test_weights_are_normalised(self) -> None:
        assert GaussianMixture(
            [1.0, 3.0], [[0.0], [1.0]], torch.ones(2, 1, 1)
        ).weights.tolist() == [
            0.25,
            0.75,
        ]
