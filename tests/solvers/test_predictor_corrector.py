"""Predictor–corrector sampling: its evaluations, and the correction's formula."""

import math

import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.solvers import Langevin, PredictorCorrector
from probes import Recording, generator, normals, start, tensor
from score import cases
from tolerances import KERNEL, rounding

FEW = rounding(100)  # sums of a dozen numbers of size 1


def by_hand(z, s, xi, alpha, snr):
    """Song et al. (2021), algorithms 4 and 5, with norms of samples."""
    rows = []
    for one, slope, noise in zip(z, s, xi, strict=True):
        eta = 2 * alpha * (snr * math.sqrt(noise.square().sum() / slope.square().sum())) ** 2
        rows.append(one + eta * slope + math.sqrt(2 * eta) * noise)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["VP", "VE", "CLD", "HOLD", "CLD, position noise"])
def test_the_correction_is_the_formula_on_the_driven_components_alone(name):
    sde, snr = cases.FAMILIES[name], 0.3
    times, driven = tensor([0.9, 0.6, 0.2]), list(sde.driven)
    score, draws = Recording(cases.mixture().score(sde)), normals(0, 6, 3, len(driven), 2)
    solver = PredictorCorrector(solvers.EulerMaruyama(), Langevin(snr=snr, steps=2))
    noise = solvers.RecordedNoise(list(draws))
    solvers.solve(ReverseProcess(sde, score), solver, start(sde), times, noise=noise)
    assert [t[0].item() for t in score.times] == [0.9] * 3 + [0.6] * 3
    # The clock of VP, its alpha_t^2 / alpha_u^2 = 1 - b.
    clock = 0.1 * times + 0.5 * 19.9 * times**2
    # Two corrections come before each step of the predictor.
    for n in (0, 1, 3, 4):
        i, (z, found) = n // 3, score.states[n : n + 2]
        alpha = math.exp(-float(clock[i] - clock[i + 1])) if name == "VP" else 1.0
        s, expected = score.score(z, times[i]), z.clone()
        expected[:, driven] = by_hand(z[:, driven], s, draws[n], alpha, snr)
        # Two scores with the accuracy of kernels.
        assert torch.allclose(found, expected, rtol=100 * KERNEL, atol=100 * KERNEL)
        still = [j for j in range(sde.components) if j not in driven]
        assert torch.equal(found[:, still], z[:, still])


def test_batch_norms_are_means_of_norms_as_published():
    z, s, xi = normals(0, 3, 6, 1, 3, 4)
    before, alpha, snr = z.clone(), 0.7, 0.16
    found = Langevin(snr=snr, norm="batch").correct(z, (0,), alpha, s, xi)
    noise_norm, score_norm = (x.reshape(6, -1).norm(dim=-1).mean() for x in (xi, s))
    eta = (snr * noise_norm / score_norm) ** 2 * 2 * alpha
    assert torch.allclose(found, z + eta * s + (2 * eta).sqrt() * xi, rtol=FEW, atol=FEW)
    assert torch.equal(z, before)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_without_a_score_the_state_stays_finite(size):
    xi = torch.randn(2, 1, 3, generator=generator())
    found = Langevin().correct(torch.ones_like(xi), (0,), 1.0, torch.full_like(xi, size), xi)
    assert found.isfinite().all()


def test_reverse_diffusion_is_the_published_step_for_ve():
    sde, (t, u) = cases.FAMILIES["VE"], (0.6, 0.4)
    score, z, xi = cases.mixture().score(sde), start(sde), normals(0, 3, 1, 2)
    times, noise = tensor([t, u]), solvers.RecordedNoise([xi])
    found = solvers.solve(
        ReverseProcess(sde, score), solvers.ReverseDiffusion(), z, times, noise=noise
    )
    late, early = ((0.05 * 400**x) ** 2 for x in (t, u))
    expected = z + (late - early) * score(z, t) + math.sqrt(late - early) * xi
    assert torch.allclose(found.state, expected, rtol=100 * KERNEL, atol=100 * KERNEL)
