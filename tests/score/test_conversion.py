"""Conversions between score, noise, data and full score, against dense algebra."""

import itertools
from typing import get_args

import mpmath as mp
import pytest
import torch

from cldsde import CLD, VESDE, CosineVP, LinearSDE, RectifiedFlow
from cldsde.score import Conversion
from cldsde.score.conversion import Conditioning
from probes import hidden_times, normals, tensor
from references.kernels import matrix
from references.mixtures import MIXTURE_DIGITS
from score.cases import PROCESSES, condition, inverted, mixture, states
from tolerances import rounding

# Driven scores of an underdamped process do not determine x_0 at some times.
DETERMINED = {name: sde for name, sde in PROCESSES.items() if name != "CLD, underdamped"}
DETERMINED |= {"rectified flow": RectifiedFlow(), "cosine": CosineVP()}
UNDERDAMPED = {
    "0.2": CLD(friction=0.2),
    "0.6": CLD(friction=0.6),
    "first driven": LinearSDE.from_matrices(
        [[-1.0, -4.0], [4.0, 0.0]], [[8**0.5], [0.0]], 4.0, initial_covariance=[[0, 0], [0, 0.04]]
    ),
}
every_process = pytest.mark.parametrize("name", DETERMINED)
every_conditioning = pytest.mark.parametrize("conditioning", get_args(Conditioning))
TIMES = tensor([1e-3, 0.05, 0.4, 1.0])
EXACT = 1e-10  # conversions that do not divide by the driven rows


def driven_noise_root(sde, t, conditioning):
    """K, lower-triangular, K K^T = Cov(driven | rest), inverse of a block of Sigma^-1."""
    kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
    _, precision, _ = inverted(kernel)
    block = mp.inverse(mp.matrix([[precision[i, j] for j in sde.driven] for i in sde.driven]))
    return mp.cholesky((block + block.T) / 2)


def representations(sde, t, z, x0, conditioning):
    """Every form of the prediction ``x0`` ``(D,)`` at the state ``z`` ``(k, D)``; 50 digits."""
    driven, kernel = list(sde.driven), sde.marginal(t)
    with mp.workdps(MIXTURE_DIGITS):
        psi, precision, _ = inverted(kernel)
        K = driven_noise_root(sde, t, conditioning)
        scores = -precision * (matrix(z) - psi * matrix(x0.unsqueeze(0)))
        noises = -K.T * mp.matrix([[scores[i, j] for j in range(z.shape[1])] for i in driven])
        score, noise = (
            tensor([[float(x) for x in row] for row in m.tolist()]) for m in (scores, noises)
        )
    values = {"score": score[driven], "noise": noise, "data": x0, "full_score": score}
    if sde.components == 1:
        alpha, sigma, alpha_rate, sigma_rate = rates(sde, t)
        n = -sigma * score
        values |= {"velocity": alpha * n - sigma * x0, "flow": alpha_rate * x0 + sigma_rate * n}
    return values


def rates(sde, t):
    """α and σ of x_t = α x_0 + σ n, and their derivatives F α and F σ + G²/2σ."""
    kernel = sde.marginal(t)
    alpha, sigma, F, G = map(float, (kernel.mean, kernel.root, sde.drift(t), sde.diffusion(t)))
    return alpha, sigma, F * alpha, F * sigma + G**2 / (2 * sigma)


def tolerances(sde, t, z, x0, conditioning):
    """Absolute rounding errors of each form, when it is found from any other.

    Whitening w = L^-1 z is exact to eps times the condition number of L relative to the size W of
    |L^-1| |z| + |c x_0|: this is the error of a noise. The other forms follow by the norms of the
    maps. The way from the driven score to x_0 amplifies by the ratio a of |c| to |c_d|. Noise given
    all of z_0 is smaller than noise given the data, K' < K: as a source it brings its error in
    K K'^-1 fold.
    """
    kernel, driven = sde.marginal(t), list(sde.driven)
    rest = [i for i in range(sde.components) if i not in driven]
    order = rest + driven
    root = torch.linalg.cholesky(kernel.covariance[order][:, order])
    inverse = torch.linalg.inv(root)
    c = inverse @ kernel.mean[order, 0]
    W = float((inverse.abs() @ z[order].abs() + c.abs()[:, None] * x0.abs()).max())
    amplification = float(c.norm() / c[len(rest) :].norm())
    with mp.workdps(MIXTURE_DIGITS):
        own, given = (driven_noise_root(sde, t, how) for how in ("data", conditioning))
        ratio = float(mp.norm(mp.inverse(given) * own))
    noise = rounding(32, condition(root) * W * ratio * amplification)
    stretch = float(torch.linalg.matrix_norm(inverse, 2))
    data = noise / float(c.norm())
    errors = {"noise": noise, "data": data, "score": noise * stretch, "full_score": noise * stretch}
    if sde.components == 1:
        alpha, sigma, *slopes = rates(sde, t)
        errors["velocity"] = alpha * noise + sigma * data
        errors["flow"] = abs(slopes[0]) * data + abs(slopes[1]) * noise
    return errors


@pytest.mark.one_in(5)
@every_conditioning
@every_process
def test_every_form_follows_from_every_other(name, conditioning):
    sde = DETERMINED[name]
    times = TIMES.clamp(max=0.99 * sde.regular_until) if sde.regular_until < 1 else TIMES
    z, x0 = states(sde, mixture(), times), normals(11, 4, 2)
    cases = list(zip(times.tolist(), z, x0, strict=True))
    forms = [representations(sde, *case, conditioning) for case in cases]
    allowed = [tolerances(sde, *case, conditioning) for case in cases]
    values = {kind: torch.stack([form[kind] for form in forms]) for kind in forms[0]}
    for source, target in itertools.product(values, repeat=2):
        convert = Conversion.at(sde, times, source, target, conditioning=conditioning)
        assert (convert.source, convert.target) == (source, target)
        found = convert(z, values[source])
        assert found.shape == values[target].shape
        for i, tolerance in enumerate(allowed):
            error = float((found[i] - values[target][i]).abs().max())
            assert error <= tolerance[target], (source, target, times[i])


@pytest.mark.parametrize("source", ["score", "noise", "full_score"])
@every_process
def test_the_data_explain_the_prediction_best(name, source):
    # Least squares over whitened rows: of x_0 in n = w_d - c_d x_0 for the driven rows, in
    # L^T s = -(w - c x_0) for all.
    sde, t = DETERMINED[name], 0.3
    driven = list(sde.driven)
    rows = sde.components if source == "full_score" else len(driven)
    z, value = normals(1, 3, sde.components), normals(2, 3, rows)
    kernel = sde.marginal(t)
    solved, metric = torch.linalg.inv(kernel.covariance), kernel.covariance
    if source != "full_score":
        metric = torch.linalg.inv(solved[driven][:, driven])
        solved = solved[driven]
    whiten = torch.linalg.cholesky(metric).mT
    score = value if source != "noise" else -torch.linalg.solve(whiten, value.mT).mT
    b = whiten @ solved @ kernel.mean[:, 0]
    right = whiten @ (score.mT + solved @ z.mT)
    found = Conversion.at(sde, t, source, "data")(z, value)
    # Covariances are inverted twice.
    tolerance = rounding(64, float(torch.linalg.cond(kernel.covariance)) ** 2)
    error = (found - b @ right / (b @ b)).abs().max()
    assert error <= tolerance * float(right.abs().max() / b.norm())


# Times at which the driven score does not determine the data


@pytest.mark.parametrize("name", UNDERDAMPED)
def test_an_underdamped_process_is_rejected_near_the_zeros(name):
    for t in hidden_times(UNDERDAMPED[name]):
        for source, target in itertools.product(["score", "noise"], ["data", "full_score"]):
            with pytest.raises(ValueError, match=r"not determine x_0 at .*critical damping"):
                Conversion.at(UNDERDAMPED[name], t, source, target)


@pytest.mark.parametrize("name", UNDERDAMPED)
def test_other_conversions_do_not_need_the_driven_rows(name):
    sde, x0 = UNDERDAMPED[name], tensor([0.3, -1.2])
    t = hidden_times(sde)[0]
    z = states(sde, mixture(), t, n=1)
    values = representations(sde, t, z[0], x0, "data")
    for source, target in (("score", "noise"), ("data", "noise"), ("full_score", "data")):
        convert = Conversion.at(sde, t, source, target)
        found = convert(z, values[source].unsqueeze(0))[0]
        size = max(1.0, float(values[target].abs().max()))
        assert (found - values[target]).abs().max() <= EXACT * size


def test_a_critically_damped_process_has_no_zeros():
    assert all(map(hidden_times, UNDERDAMPED.values()))
    assert not hidden_times(CLD())
    Conversion.at(CLD(), torch.logspace(-3, 0, 50, dtype=torch.float64), "score", "data")


def test_a_process_with_initial_noise_converts_at_the_start():
    assert Conversion.at(VESDE(), 0.0, "score", "noise").value.isfinite().all()
