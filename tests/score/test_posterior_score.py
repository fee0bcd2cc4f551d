"""Scores given an observation, against the closed form of mixtures."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, ReverseProcess, solvers
from cldsde.score import Observation, PosteriorScore
from cldsde.score.operators import conjugate_gradients
from probes import generator
from references import guided_prediction, wide_mixture
from score.cases import score_rounding, states
from tolerances import EPS, rounding

PROCESSES = [VPSDE(), VESDE(), CLD(), PSLD(), HOLD()]
every_process = pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
DATA, SEEN = wide_mixture()
A, NOISE = SEEN.dense((8,)), SEEN.noise_std**2 * torch.eye(len(SEEN.y)).double()
# The condition number of the systems that condition each component on y.
EXACT = rounding(64, float(torch.linalg.cond(A @ DATA.covariances @ A.mT + NOISE).max()))
SINGLE = rounding(4, 200, torch.float32)  # condition of the system with two equal entries


def solved(sde, z, t):
    """Relative error of a prediction by conjugate gradients, for R = A V Aᵀ + s²I.

    R's condition number multiplies the residual, and the rounding of V = σ² ∂D/∂û, where
    ∂D/∂û = I + σ² ∂s/∂û. The prediction then has the error of the score besides.
    """
    V = guided_prediction(DATA, SEEN, sde.marginal(t), z)[0]
    lost = EPS**0.75 + rounding(16, 1 + float((-2 * sde.kappa(t)).exp()))
    return float(torch.linalg.cond(A @ V @ A.mT + NOISE).max()) * lost + score_rounding(sde, t)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
@every_process
def test_exact_guidance_and_moment_matching_equal_their_closed_forms(sde, t):
    z = states(sde, DATA, t)
    _, exact, matched, log_likelihood = guided_prediction(DATA, SEEN, sde.marginal(t), z)
    found = DATA.condition(SEEN).posterior_mean(sde, z, t)
    torch.testing.assert_close(found, exact, rtol=EXACT, atol=EXACT)
    lost = solved(sde, z, t)
    guided = PosteriorScore(DATA.score(sde), SEEN, iterations=None)
    torch.testing.assert_close(guided.data_prediction(z, t), matched, rtol=lost, atol=lost)
    twisted = guided.guide(z, t)
    torch.testing.assert_close(twisted.data + twisted.shift, matched, rtol=lost, atol=lost)
    # A tenth of the likelihood has R = r²A Aᵀ + s²I, r² = σ²/(σ² + 1) for data of unit variance.
    variance = torch.exp(-2 * sde.kappa(t))
    R = variance / (variance + 1) * A @ A.mT + NOISE
    wide = torch.distributions.MultivariateNormal(SEEN.forward(twisted.data), R).log_prob(SEEN.y)
    expected = torch.logaddexp(log_likelihood + math.log(0.9), wide + math.log(0.1))
    torch.testing.assert_close(twisted.log_likelihood, expected, rtol=lost, atol=lost)


@every_process
def test_pigdm_and_dps_are_their_formulas(sde):
    t, y, R = 0.3, SEEN.y, {"dps": NOISE}
    z = states(sde, DATA, t)
    V, _, _, _ = guided_prediction(DATA, SEEN, sde.marginal(t), z)
    D, variance = DATA.posterior_mean(sde, z, t), (-2 * sde.kappa(t)).exp()
    r2 = variance * 0.7 / (variance + 0.7)
    R["pigdm"], lost = r2 * A @ A.T + NOISE, solved(sde, z, t)
    for method, metric in R.items():
        weight = torch.linalg.solve(metric, (y - D @ A.T).T).T
        steps = {True: torch.einsum("bij,bj->bi", V, weight @ A), False: r2 * weight @ A}
        for gradient, step in steps.items():
            options = {"data_variance": 0.7, "gradient": gradient}
            found = PosteriorScore(DATA.score(sde), SEEN, method, **options).data_prediction(z, t)
            torch.testing.assert_close(found, D + step, rtol=lost, atol=lost)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_solve_gives_the_same_in_every_gradient_mode(mode):
    guided = PosteriorScore(DATA.score(CLD()), SEEN)
    start = CLD().prior.sample((4, 8), generator=generator(0))
    times = solvers.root_times(1.0, 1e-2, 5)

    def result():
        process, solver = ReverseProcess(CLD(), guided), solvers.ExponentialMultistep(order=2)
        return solvers.solve(process, solver, start.clone(), times).state

    expected = result()
    with mode():
        assert torch.equal(result(), expected)
        score = guided(start.clone(), torch.tensor(0.5).expand(4))
    assert torch.equal(score, guided(start, 0.5))


def test_conjugate_gradients_survive_a_jacobian_that_is_not_positive():
    # D falls with û: its Jacobian is negative, which no covariance is.
    seen = Observation.mask(torch.tensor([True, True, False]), torch.ones(3), 0.1)
    wrong, pigdm = (
        PosteriorScore(lambda z, t: -z * 3.0, seen, method, iterations=None, sde=VPSDE())
        for method in ("moments", "pigdm")
    )
    z = torch.randn(5, 1, 3, generator=generator(0))
    # The fallback is a step with ΠGDM's R: as large as ΠGDM's own, in single precision.
    assert torch.allclose(wrong(z, 0.5), pigdm(z, 0.5), rtol=SINGLE, atol=SINGLE)


def test_conjugate_gradients_keep_what_they_found_before_they_fail():
    def solved(A, b, iterations):
        apply = lambda p: ((A @ p.unsqueeze(2)).squeeze(2), torch.zeros(len(p)).double())  # noqa: E731
        return conjugate_gradients(apply, lambda p: p, b, iterations=iterations)

    # Both first steps succeed. The second curvature of one sample is negative, 1 − 4 = −3.
    matrices = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[2.0, 0.5], [0.5, 1.0]]]).double()
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    together, expected = solved(matrices, b, 5), torch.linalg.solve(matrices[1], b[1])
    assert torch.equal(together[0], b[0])
    torch.testing.assert_close(together[1], expected, rtol=EPS**0.75, atol=EPS**0.75)


def test_a_score_without_gradients_is_an_error():
    closed = torch.no_grad()(DATA.score(CLD()).__call__)
    z = states(CLD(), DATA, 0.3)
    with pytest.raises(ValueError, match="score must be differentiable"):
        PosteriorScore(closed, SEEN, sde=CLD())(z, 0.3)
    assert PosteriorScore(closed, SEEN, sde=CLD(), gradient=False)(z, 0.3).isfinite().all()


def test_a_jacobian_that_couples_what_it_does_not_see_throws_nothing_far_off():
    sde, t = VPSDE(), 0.01
    z, kernel = torch.randn(20, 1, 2, generator=generator(0)), sde.marginal(t)
    psi, variance = float(kernel.mean), float(kernel.covariance)

    def score(z, t):
        # D of y's number moves with the other number alone, by 5: no covariance.
        x = z / psi
        data = torch.stack([5 * x[..., 1], 0 * x[..., 0]], -1)
        return -(z - psi * data) / variance

    seen = Observation.mask(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), 1e-3)
    # Unguarded, a step is the residual over s², 1e6 times. ΠGDM's is at most the residual over r²,
    # which is σ² in 1 % here, so that 5 σ² makes it at most 5 residuals.
    residual = (0.5 - 5 * z[..., 1] / psi).abs().max()
    assert PosteriorScore(score, seen, sde=sde).data_prediction(z, t).abs().max() <= 6 * residual
