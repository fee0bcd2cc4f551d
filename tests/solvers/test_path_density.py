"""Log-densities of sampled paths, against the joint Gaussian of the whole path."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, GaussianMixture, RectifiedFlow, ReverseProcess, solvers
from cldsde.score import ScoreWrapper
from cldsde.solvers import EulerMaruyama, ExponentialMultistep, RecordedNoise
from probes import generator, normals
from tolerances import rounding

PROCESSES = {"VP": VPSDE(), "CLD": CLD(), "PSLD": PSLD(), "HOLD": HOLD()}
PROCESSES["rectified flow"] = RectifiedFlow()
SOLVERS = {
    "Euler-Maruyama": EulerMaruyama(),
    "exponential Euler": solvers.ExponentialEuler(),
    "ancestral": solvers.Ancestral(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "order 1": ExponentialMultistep(order=1, stochasticity=1.0),
    "order 2": ExponentialMultistep(order=2, stochasticity=0.7),
}
STEPS, BATCH, DIMENSION = 4, 3, 2
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
DATA = GaussianMixture([1.0], MEAN[None], [0.25 * torch.eye(2).double()])


def grid(sde):
    return torch.linspace(min(0.95, sde.regular_until), 0.6, STEPS + 1, dtype=torch.float64)


def solved(sde, solver, score=None, times=None, **options):
    times = grid(sde) if times is None else times
    process = ReverseProcess(sde, DATA.score(sde) if score is None else score)
    options = {"generator": generator(1), "t_eval": times, "log_prob": True, **options}
    return solvers.solve(process, solver, normals(0, BATCH, sde.components, 2), times, **options)


def joint_log_prob(sde, method, path, score=None):
    """Log-density of ``path`` ``(n + 1, B, k, D)`` given its start, by probing the solver's states.

    The path is affine in its r normals per step, with a square matrix A. Its density is the density
    of the normals over det A. If the root has fewer columns than rows, only the driven rows have a
    density.
    """
    r = len(sde.driven) if method == "Euler-Maruyama" else sde.components
    rows, results = list(range(sde.components)) if r >= sde.components else list(sde.driven), []
    for sample in path.unbind(1):
        # The mean and, for each normal, the state that it moves by one: all in one batch.
        probes = torch.cat([torch.zeros(1, STEPS * r), torch.eye(STEPS * r)]).double()
        draws = probes.reshape(-1, STEPS, r, 1).expand(-1, -1, -1, DIMENSION).unbind(1)
        process = ReverseProcess(sde, DATA.score(sde) if score is None else score)
        start, times = sample[:1].expand(len(probes), -1, -1), grid(sde)
        options = {"noise": RecordedNoise(draws), "t_eval": times[1:]}
        found = solvers.solve(process, SOLVERS[method], start, times, **options)
        states = found.y[:, :, rows].transpose(0, 1).flatten(1, 2)
        # The same matrix for each data dimension.
        A = (states[1:] - states[0])[..., 0].T
        whitened = torch.linalg.solve(A, sample[1:, rows].flatten(0, 1) - states[0])
        constant = torch.linalg.slogdet(A).logabsdet + len(A) * 0.5 * math.log(2 * math.pi)
        results.append(-0.5 * whitened.square().sum() - DIMENSION * constant)
    return torch.stack(results)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", SOLVERS)
def test_the_sum_is_the_density_of_the_path(name, method):
    sde = PROCESSES[name]
    found = solved(sde, SOLVERS[method])
    expected = joint_log_prob(sde, method, found.y)
    assert found.log_probs.shape == (STEPS, BATCH)
    # Solving with A loses as many digits as its condition number has.
    assert (found.log_prob - expected).abs().max() <= rounding(32, 1e4)
    assert (found.log_probs.sum(0) - found.log_prob).abs().max() <= rounding(16, 100.0)


class Shifted(ScoreWrapper):
    """The exact score of the data, and a learnt constant."""

    def __init__(self, sde, shift):
        super().__init__(DATA.score(sde))
        self.shift = shift

    def forward(self, z, t, **options):
        return super().forward(z, t, **options) + self.shift


@pytest.mark.parametrize("name", ["VP", "CLD"])
@pytest.mark.parametrize("method", ["Euler-Maruyama", "order 2"])
def test_its_gradient_is_that_of_the_density_at_a_fixed_path(name, method):
    sde, h = PROCESSES[name], 1e-4
    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    found = solved(sde, SOLVERS[method], Shifted(sde, shift), differentiable=True)
    assert not found.state.requires_grad
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), shift)
    scores = [Shifted(sde, 0.2 + x) for x in (-h, h)]
    low, high = (joint_log_prob(sde, method, found.y, score).sum() for score in scores)
    # The log-density is quadratic in the shift: central differences are exact but for rounding of
    # the density over the step.
    difference = float(high - low) / (2 * h)
    assert float(gradient) == pytest.approx(difference, rel=rounding(32, 1e4) / h, abs=0)


def test_a_path_from_the_singular_end_has_a_density():
    times = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    found = solved(RectifiedFlow(), SOLVERS["order 1"], times=times)
    # The first step draws from N(alpha E x_0, sigma^2); the second from the posterior.
    first = torch.distributions.Normal(0.3 * MEAN, 0.7).log_prob(found.y[1, :, 0]).sum(-1)
    assert (found.log_probs[0] - first).abs().max() <= rounding(32, 10.0)


def test_a_failed_sample_has_no_density():
    factors = torch.tensor([1.0, math.nan, 1.0])[:, None, None]
    found = solved(CLD(), EulerMaruyama(), lambda z, t: z[:, 1:] * factors, warn=False)
    assert found.log_prob.isnan().tolist() == [False, True, False]
