"""Score matching: targets, losses, and the least loss."""

import math
from typing import get_args

import mpmath as mp
import pytest
import torch

from cldsde import CLD
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


@every_conditioning
@every_process
def test_the_target_is_the_gradient_of_the_conditional_density(name, conditioning):
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
@pytest.mark.parametrize("weighting", ["likelihood", lambda t: 1 + t])
@pytest.mark.parametrize("name", ["sub-VP", "VE", "PSLD", "HOLD", "first two of three driven"])
def test_a_prediction_has_one_loss_in_all_its_forms(name, weighting, conditioning):
    sde, x0 = PROCESSES[name], normals(1, 4, 3)
    pair = draw(sde, conditioning=conditioning)
    expected = pair.loss(x0, "data", weighting=weighting)
    for kind in ("score", "noise"):
        convert = Conversion.at(sde, TIMES, "data", kind, conditioning=conditioning)
        found = pair.loss(convert(pair.z, x0), kind, weighting=weighting)
        for i, t in enumerate(TIMES.tolist()):
            # Errors are squared, and a small one is the difference of two noises of size 4.
            lost = 16 * score_rounding(sde, t) * conditions(sde, t)
            assert abs(found[i] - expected[i]) <= lost * (1 + float(expected[i])) + KERNEL


@pytest.mark.parametrize("t", [TIMES, 0.3])
def test_a_function_of_times_weighs_the_mean_squared_error_of_the_noise(t):
    pair, output, seen = draw(CLD(), t), normals(1, 4, 1, 3), []
    expected = (output - pair.noise).square().mean((1, 2))
    assert torch.allclose(pair.loss(output), expected, rtol=rounding(), atol=0)
    found = pair.loss(output, weighting=lambda times: seen.append(times) or times**2 + 1)
    at = torch.as_tensor(t, dtype=torch.float64)
    assert torch.allclose(found, (at**2 + 1) * expected, rtol=rounding(), atol=0)
    assert torch.equal(seen[0], at.reshape(-1))


@pytest.mark.parametrize("prediction", ["score", "data"])
def test_the_model_gets_one_time_for_each_sample_and_gradients(prediction):
    weight, seen = torch.ones(1, dtype=torch.float64, requires_grad=True), []

    def model(z, t):
        seen.append(t)
        return weight * (z[:, 0] if prediction == "data" else z[:, 1:])

    x0 = normals(9, 3, 2).float()
    loss = score_matching_loss(model, CLD(), x0, 0.25, prediction=prediction)
    assert torch.equal(seen[0], torch.full((3,), 0.25))
    assert loss.dtype == torch.float32
    (slope,) = torch.autograd.grad(loss.sum(), weight)
    assert 0 < slope.abs() < math.inf


def closed_form(sde, t, variance, conditioning, weighting):
    """tr B^T (Sigma_cond^-1 - Sigma_ref^-1)_dd B in 50 digits.

    For likelihood weights B = G / sqrt(2). Otherwise B B^T is d^-1 times the inverse of the
    driven block of Sigma_cond^-1, the covariance of the driven components given the others.
    """
    with mp.workdps(MIXTURE_DIGITS):
        kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
        root, psi, driven = matrix(kernel.root), matrix(kernel.mean), list(sde.driven)
        start = mp.zeros(sde.components)
        if conditioning == "all":
            own = matrix(sde.initial_root)
            start = own * own.T
        start[0, 0] += variance
        sigma, G = root * root.T, matrix(sde.diffusion(t))
        precision = mp.inverse(sigma)
        gap = precision - mp.inverse(sigma + psi * start * psi.T)
        gap, block = (
            mp.matrix([[m[i, j] for j in driven] for i in driven]) for m in (gap, precision)
        )
        G = mp.matrix([[G[i, j] for j in range(G.cols)] for i in driven])
        metric = G * G.T / 2 if weighting == "likelihood" else mp.inverse(block) / len(driven)
        product = metric * gap
        return float(sum(product[i, i] for i in range(len(driven))))


@pytest.mark.one_in(7)
@pytest.mark.parametrize("weighting", ["likelihood", "reweighted"])
@every_conditioning
@every_process
@pytest.mark.parametrize(("t", "variance"), [(1e-6, 0.25), (0.02, 0.5), (1.0, 9.0)])
def test_the_least_loss_is_its_closed_form(name, t, variance, conditioning, weighting):
    sde, options = PROCESSES[name], {"conditioning": conditioning, "weighting": weighting}
    found = optimal_loss(sde, t, data_variance=variance, **options)
    # Driven rows are whitened given the others, whose own signal is larger by the ratio of
    # their standard deviations, at most h^-1 = 1e6 here.
    rows = sde.transition(0.0, t).root.norm(dim=-1)
    ratio = float(rows.max() / rows.min()) if conditioning == "all" else 0.0
    tolerance = min(SMALLEST, rounding(128, conditions(sde, t) + ratio))
    expected = closed_form(sde, t, variance, **options)
    assert float(found) == pytest.approx(expected, rel=tolerance, abs=0)


@every_conditioning
def test_the_loss_takes_its_options(conditioning):
    x0, options = normals(9, 4, 2), {"conditioning": conditioning}
    pair = PerturbedData.draw(CLD(), x0, TIMES, **options, generator=generator())
    options |= {"weighting": "likelihood", "generator": generator()}
    found = score_matching_loss(lambda z, t: -z[:, 1:], CLD(), x0, TIMES, **options)
    assert torch.equal(found, pair.loss(-pair.z[:, 1:], "score", weighting="likelihood"))
