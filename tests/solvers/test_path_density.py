"""Log-densities of sampled paths, against the joint Gaussian of the whole path."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, GaussianMixture, RectifiedFlow, ReverseProcess, solvers
from cldsde.solvers import EulerMaruyama, ExponentialMultistep, RecordedNoise
from probes import generator, untouchable

PROCESSES = {
    "VP": VPSDE(),
    "rectified flow": RectifiedFlow(),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
}
SOLVERS = {
    "Euler-Maruyama": EulerMaruyama(),
    "exponential Euler": solvers.ExponentialEuler(),
    "ancestral": solvers.Ancestral(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "order 1": ExponentialMultistep(order=1, stochasticity=1.0),
    "order 2": ExponentialMultistep(order=2, stochasticity=0.7),
}
STEPS, BATCH, DIMENSION = 4, 3, 2
DATA = GaussianMixture([1.0], [[0.3, -0.2]], [0.25 * torch.eye(2).double()])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def grid(sde):
    return torch.linspace(min(0.95, sde.regular_until), 0.6, STEPS + 1, dtype=torch.float64)


def solved(sde, solver, score=None, **options):
    process, times = ReverseProcess(sde, DATA.score(sde) if score is None else score), grid(sde)
    state = normal(BATCH, sde.components, DIMENSION)
    options = {"generator": generator(1), "t_eval": times, "log_prob": True, **options}
    return solvers.solve(process, solver, state, times, **options)


def joint_log_prob(process, solver, path, r):
    """Log-density of ``path`` ``(n + 1, B, k, D)`` given its start, by probing the solver's states.

    The path is affine in its r normals per step, with a square matrix A. Its density is the density
    of the normals over det A. Of a root with fewer columns than rows only the driven rows
    have a density.
    """
    times, k = grid(process.sde), process.sde.components
    rows = list(range(k)) if r >= k else list(process.sde.driven)

    results = []
    for sample in path.unbind(1):
        # The mean and, for each normal, the state that it moves by one: all in one batch.
        probes = torch.cat([torch.zeros(1, STEPS * r), torch.eye(STEPS * r)]).double()
        draws = probes.reshape(-1, STEPS, r, 1).expand(-1, -1, -1, DIMENSION).unbind(1)
        start, noise = sample[:1].expand(len(probes), -1, -1), RecordedNoise(draws)
        found = solvers.solve(process, solver, start, times, noise=noise, t_eval=times[1:])
        states = found.y[:, :, rows].transpose(0, 1).flatten(1, 2)
        # The same matrix for each data dimension.
        A = (states[1:] - states[0])[..., 0].T
        whitened = torch.linalg.solve(A, sample[1:, rows].flatten(0, 1) - states[0])
        constant = torch.linalg.slogdet(A).logabsdet + len(A) * 0.5 * math.log(2 * math.pi)
        results.append(-0.5 * whitened.square().sum() - DIMENSION * constant)
    return torch.stack(results)


def normals_of(method, sde):
    return len(sde.driven) if method == "Euler-Maruyama" else sde.components


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("method", list(SOLVERS))
def test_the_sum_is_the_density_of_the_path(name, method):
    sde, solver = PROCESSES[name], SOLVERS[method]
    found = solved(sde, solver)
    process = ReverseProcess(sde, DATA.score(sde))
    expected = joint_log_prob(process, solver, found.y, normals_of(method, sde))
    assert found.log_probs.shape == (STEPS, BATCH)
    # Solving with A loses as many digits as its condition number has, up to 1e4.
    assert torch.allclose(found.log_prob, expected, rtol=0, atol=1e-10)
    assert torch.allclose(found.log_probs.sum(0), found.log_prob, rtol=0, atol=1e-12)


class Shifted:
    """The exact score of the data, and a learnt constant."""

    def __init__(self, sde, shift):
        self.exact, self.shift = DATA.score(sde), shift

    def __call__(self, z, t):
        return self.exact(z, t) + self.shift

    def data_prediction(self, z, t):
        return self.exact.data_prediction(z, t)


@pytest.mark.parametrize("name", ["VP", "CLD"])
@pytest.mark.parametrize("method", ["Euler-Maruyama", "order 2"])
def test_its_gradient_is_that_of_the_density_at_a_fixed_path(name, method):
    sde, solver = PROCESSES[name], SOLVERS[method]
    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    found = solved(sde, solver, Shifted(sde, shift), differentiable=True)
    assert not found.state.requires_grad
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), shift)
    low, high = (
        joint_log_prob(
            ReverseProcess(sde, Shifted(sde, value)), solver, found.y, normals_of(method, sde)
        ).sum()
        for value in (0.2 - 1e-4, 0.2 + 1e-4)
    )
    # The log-density is quadratic in the shift: central differences are exact but for rounding,
    # 1e-12 of the density over the step of 2e-4.
    assert float(gradient) == pytest.approx(float(high - low) / 2e-4, rel=1e-6)


def test_a_path_from_the_singular_end_has_a_density():
    sde, solver = RectifiedFlow(), SOLVERS["order 1"]
    times = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    process, state = ReverseProcess(sde, DATA.score(sde)), normal(BATCH, 1, DIMENSION)
    options = {"generator": generator(1), "t_eval": times, "log_prob": True}
    found = solvers.solve(process, solver, state, times, **options)
    # The first step draws from N(alpha E x_0, sigma^2); the second from the posterior.
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    first = torch.distributions.Normal(0.3 * mean, 0.7).log_prob(found.y[1, :, 0]).sum(-1)
    # A handful of roundings.
    assert torch.allclose(found.log_probs[0], first, rtol=0, atol=1e-13)


def test_single_precision_states_have_densities_in_single_precision():
    sde, values = VPSDE(), []
    process, times = ReverseProcess(sde, DATA.score(sde)), grid(sde)
    for dtype in (torch.float64, torch.float32):
        state, *draws = normal(STEPS + 1, BATCH, 1, DIMENSION).to(dtype)
        options = {"noise": RecordedNoise(draws), "log_prob": True}
        found = solvers.solve(process, EulerMaruyama(), state, times, **options)
        assert found.log_prob.dtype == dtype
        values.append(found.log_prob.double())
    # A dozen sums of single-precision numbers below 10.
    assert torch.allclose(*values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "solver",
    [
        solvers.SSCS(),
        solvers.StochasticHeun(),
        ExponentialMultistep(),
        ExponentialMultistep(stochasticity=1.0, corrector=True),
        ExponentialMultistep(order=3, stochasticity=1.0),
        solvers.GottaGoFast(),
        solvers.ProbabilityFlow(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_solvers_without_gaussian_steps_are_rejected(solver):
    with pytest.raises(ValueError, match=r"log_prob must be False for .* whose steps"):
        solved(CLD(), solver, untouchable, t_eval=None)


def test_a_step_without_noise_is_rejected():
    times = torch.tensor([0.5, 0.2, 0.0], dtype=torch.float64)
    process = ReverseProcess(VPSDE(), untouchable)
    with pytest.raises(ValueError, match=r"the step from t = 0\.2 to 0 adds no noise"):
        solvers.solve(process, solvers.Ancestral(), normal(1, 1, 2), times, log_prob=True)


def test_without_the_option_there_is_no_density():
    found = solved(VPSDE(), EulerMaruyama(), log_prob=False)
    assert found.log_prob is found.log_probs is None


def test_a_failed_sample_has_no_density():
    factors = torch.tensor([1.0, math.nan, 1.0])[:, None, None]
    found = solved(CLD(), EulerMaruyama(), lambda z, t: z[:, 1:] * factors, warn=False)
    assert found.log_prob.isnan().tolist() == [False, True, False]
