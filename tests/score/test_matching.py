"""Score matching: targets, their expectations and minimisers, losses, and the least loss."""

import math
from typing import get_args

import mpmath as mp
import pytest
import torch

from cldsde import CLD, GaussianMixture
from cldsde.linear import kernel as kernel_module
from cldsde.linear import sde as sde_module
from cldsde.linear.random import standard_normal
from cldsde.score import Conversion, PerturbedData, optimal_loss, score_matching_loss
from cldsde.score.conversion import Conditioning
from probes import generator, normals
from references.kernels import matrix
from references.mixtures import MIXTURE_DIGITS
from score.cases import PROCESSES, condition, score_rounding
from tolerances import KERNEL, rounding

every_process = pytest.mark.parametrize("name", PROCESSES)
every_conditioning = pytest.mark.parametrize("conditioning", get_args(Conditioning))
TIMES = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
SMALLEST = 1e-9  # rounding of the least loss near t = 0: a difference of two large terms


def draw(sde, t=TIMES, axes=(3,), **options):
    return PerturbedData.draw(sde, normals(9, 4, *axes), t, generator=generator(), **options)


def conditions(sde, t):
    """Largest condition number of a root, hybrid or denoising."""
    return max(condition(sde.marginal(t).root), condition(sde.transition(0.0, t).root))


class Maps:
    """State and target of one number as linear maps of the random numbers behind them.

    z = Z u and target = T u with u = (x_0, the normals of z_0, the normals of z_t), found by
    drawing with unit vectors in place of the normals; covariances are then exact, in 50 digits.
    """

    def __init__(self, monkeypatch, sde, t, conditioning, prediction="score"):
        # Both modules draw by one function.
        assert kernel_module.standard_normal is sde_module.standard_normal is standard_normal
        k = sde.components
        starts = k if conditioning == "all" else 0
        units = torch.eye(1 + starts + k, dtype=torch.float64).unsqueeze(-1)
        draws = iter([*([units[:, 1 : 1 + k]] if starts else []), units[:, 1 + starts :]])
        with monkeypatch.context() as patch:
            for module in (kernel_module, sde_module):
                patch.setattr(module, "standard_normal", lambda *_, **__: next(draws))
            pair = PerturbedData.draw(sde, units[:, 0], t, conditioning=conditioning)
        assert next(draws, None) is None
        self.size = len(units)
        self.Z = matrix(pair.z[..., 0].mT)
        self.T = matrix(pair.target(prediction)[..., 0].mT)

    def covariance(self, a, b, data_variance):
        """Of two linear maps of u, for data of the given variance."""
        return a * mp.diag([data_variance] + [1.0] * (self.size - 1)) * b.T

    def best(self, data_variance):
        """W of the best linear prediction of the target, W z."""
        cross, own = (self.covariance(a, self.Z, data_variance) for a in (self.T, self.Z))
        return cross * mp.inverse(own)


def assert_close(found, expected, tolerance):
    error = max(abs(x) for x in found - expected)
    assert error <= tolerance * max(abs(x) for x in expected)


@every_process
class TestTargets:
    @every_conditioning
    def test_the_target_is_the_gradient_of_the_conditional_density(self, name, conditioning):
        sde, options = PROCESSES[name], {"conditioning": conditioning}
        pair, driven = draw(sde, **options), list(sde.driven)
        z, epsilon = sde.perturb(normals(9, 4, 3), TIMES, generator=generator(), **options)
        assert torch.equal(pair.z, z)
        if driven == list(range(sde.components))[-len(driven) :]:
            assert torch.equal(pair.noise, epsilon[:, driven])
        start = sde.augment(pair.x0, generator()) if conditioning == "all" else sde.embed(pair.x0)
        leaf = pair.z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pair.kernel.log_prob(leaf, start).sum(), leaf)
        noise = Conversion.at(sde, TIMES, "score", "noise", **options)(pair.z, pair.target())
        assert pair.target().shape == noise.shape == (4, len(driven), 3)
        for i, t in enumerate(TIMES.tolist()):
            # The residual is rounded relative to its terms, and whitened twice.
            size = float(pair.z[i].abs().max() / pair.kernel.root[i].norm(dim=-1).min())
            lost = rounding(32, conditions(sde, t) + size)
            error = (pair.target() - gradient[:, driven])[i].abs().max()
            assert error <= lost * gradient[i].abs().max()
            assert (noise - pair.noise)[i].abs().max() <= lost * pair.noise[i].abs().max()

    @every_conditioning
    def test_the_noise_is_standard_normal(self, name, conditioning, monkeypatch):
        sde, t = PROCESSES[name], 0.2
        maps = Maps(monkeypatch, sde, t, conditioning, "noise")
        with mp.workdps(MIXTURE_DIGITS):
            found = maps.covariance(maps.T, maps.T, 1e3)
            assert_close(found, mp.eye(len(sde.driven)), rounding(32, conditions(sde, t)))

    @pytest.mark.one_in(3)
    @every_conditioning
    @pytest.mark.parametrize(("t", "variance"), [(0.02, 0.25), (0.3, 4.0)])
    def test_the_best_prediction_is_the_score_of_the_marginal(
        self, name, t, variance, conditioning, monkeypatch
    ):
        sde = PROCESSES[name]
        maps, kernel = Maps(monkeypatch, sde, t, conditioning), sde.marginal(t)
        with mp.workdps(MIXTURE_DIGITS):
            root, psi = matrix(kernel.root), matrix(kernel.mean[:, :1])
            precision = mp.inverse(root * root.T + variance * psi * psi.T)
            rows = [[-precision[i, j] for j in range(sde.components)] for i in sde.driven]
            assert_close(maps.best(variance), mp.matrix(rows), KERNEL * conditions(sde, t) ** 2)


class TestLosses:
    @pytest.mark.one_in(3)
    @every_conditioning
    @pytest.mark.parametrize("weighting", ["likelihood", lambda t: 1 + t])
    @pytest.mark.parametrize("name", ["sub-VP", "VE", "PSLD", "HOLD", "first two of three driven"])
    def test_a_function_has_one_loss_in_all_its_forms(self, name, weighting, conditioning):
        sde, t = PROCESSES[name], torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
        mixture = GaussianMixture([0.4, 0.6], [[-1.0], [1.5]], [[[0.1]], [[0.3]]])
        score = mixture.score(sde)
        convert = Conversion.at(sde, t, "score", "noise", conditioning=conditioning)
        models = {
            "score": score,
            "noise": lambda z, times: convert(z, score(z, times)),
            "data": lambda z, times: mixture.posterior_mean(sde, z, times),
        }
        options = {"conditioning": conditioning, "weighting": weighting}

        def loss(prediction):
            options.update(prediction=prediction, generator=generator())
            return score_matching_loss(models[prediction], sde, normals(9, 4, 1), t, **options)

        expected = loss("score")
        for found in map(loss, ("noise", "data")):
            for i, single in enumerate(t.tolist()):
                # Noises agree to the rounding of a score; errors are squared, and a small one is
                # the difference of two noises of size 4.
                lost = 16 * score_rounding(sde, single) * conditions(sde, single)
                assert abs(found[i] - expected[i]) <= lost * (1 + float(expected[i])) + KERNEL

    @pytest.mark.one_in(3)
    @every_conditioning
    @pytest.mark.parametrize("axes", [(), (2, 3)])
    @every_process
    def test_likelihood_weights_measure_the_error_along_the_noise(self, name, axes, conditioning):
        sde = PROCESSES[name]
        pair = draw(sde, axes=axes, conditioning=conditioning)
        error = normals(3, 4, len(sde.driven), *axes)
        found = pair.loss(pair.target() + error, "score", weighting="likelihood")
        G = sde.diffusion(TIMES)[:, list(sde.driven)]
        pulled = torch.einsum("bir,bi...->br...", G, error)
        expected = 0.5 * pulled.square().flatten(1).sum(1) / math.prod(axes)
        # The error is the difference of target + error and target, through L_dd and back.
        for i, t in enumerate(TIMES.tolist()):
            size = float(pair.target()[i].abs().max() / error[i].abs().min())
            lost = rounding(64, conditions(sde, t) * (1 + size))
            assert found[i].item() == pytest.approx(expected[i].item(), rel=lost, abs=0)

    @pytest.mark.parametrize("t", [TIMES, 0.3])
    def test_a_function_of_times_weighs_the_mean_squared_error_of_the_noise(self, t):
        pair, output, seen = draw(CLD(), t), normals(1, 4, 1, 3), []
        expected = (output - pair.noise).square().mean((1, 2))
        assert torch.allclose(pair.loss(output), expected, rtol=rounding(), atol=0)
        found = pair.loss(output, weighting=lambda times: seen.append(times) or times**2 + 1)
        at = torch.as_tensor(t, dtype=torch.float64)
        assert torch.allclose(found, (at**2 + 1) * expected, rtol=rounding(), atol=0)
        assert torch.equal(seen[0], at.reshape(-1))

    @every_conditioning
    @pytest.mark.parametrize("prediction", ["score", "noise", "data"])
    def test_the_model_gets_one_time_for_each_sample_and_gradients(self, prediction, conditioning):
        weight, seen = torch.ones(1, dtype=torch.float64, requires_grad=True), []

        def model(z, t):
            seen.append(t)
            return weight * (z[:, 0] if prediction == "data" else z[:, 1:])

        options = {"prediction": prediction, "conditioning": conditioning}
        loss = score_matching_loss(model, CLD(), normals(9, 3, 2).float(), 0.25, **options)
        assert torch.equal(seen[0], torch.full((3,), 0.25))
        assert loss.dtype == torch.float32
        (slope,) = torch.autograd.grad(loss.sum(), weight)
        assert 0 < slope.abs() < math.inf


def closed_form(sde, t, variance, conditioning):
    """1/2 tr G^T (Sigma_cond^-1 - Sigma_ref^-1) G in 50 digits, a likelihood-weighted loss."""
    with mp.workdps(MIXTURE_DIGITS):
        kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
        root, psi = matrix(kernel.root), matrix(kernel.mean)
        start = mp.zeros(sde.components)
        if conditioning == "all":
            own = matrix(sde.initial_root)
            start = own * own.T
        start[0, 0] += variance
        sigma, G = root * root.T, matrix(sde.diffusion(t))
        gap = mp.inverse(sigma) - mp.inverse(sigma + psi * start * psi.T)
        product = G.T * gap * G
        return float(sum(product[i, i] for i in range(product.rows)) / 2)


@every_conditioning
@every_process
class TestOptimalLoss:
    @pytest.mark.one_in(5)
    @pytest.mark.parametrize(("t", "variance"), [(1e-6, 0.25), (0.01, 9.0), (1.0, 1.0)])
    def test_with_likelihood_weights_it_is_the_closed_form(self, name, t, variance, conditioning):
        sde, options = PROCESSES[name], {"conditioning": conditioning, "weighting": "likelihood"}
        found = optimal_loss(sde, t, data_variance=variance, **options)
        # Driven rows are whitened given the others, whose own signal is larger by the ratio of
        # their standard deviations, at most h^-1 = 1e6 here.
        rows = sde.transition(0.0, t).root.norm(dim=-1)
        ratio = float(rows.max() / rows.min()) if conditioning == "all" else 0.0
        tolerance = min(SMALLEST, rounding(128, conditions(sde, t) + ratio))
        expected = closed_form(sde, t, variance, conditioning)
        assert float(found) == pytest.approx(expected, rel=tolerance, abs=0)

    @pytest.mark.one_in(3)
    @pytest.mark.parametrize("t", [0.02, 1.0])
    def test_it_is_the_variance_of_the_unpredictable_noise(
        self, name, t, conditioning, monkeypatch
    ):
        sde, variance = PROCESSES[name], 0.5
        d = len(sde.driven)
        maps = Maps(monkeypatch, sde, t, conditioning, "noise")
        with mp.workdps(MIXTURE_DIGITS):
            left = maps.T - maps.best(variance) * maps.Z
            covariance = maps.covariance(left, left, variance)
            expected = float(sum(covariance[i, i] for i in range(d)) / d)
        found = optimal_loss(sde, t, data_variance=variance, conditioning=conditioning)
        # Unit variance less the explained part.
        tolerance = rounding(128, conditions(sde, t) ** 2)
        assert float(found) == pytest.approx(expected, abs=tolerance)
