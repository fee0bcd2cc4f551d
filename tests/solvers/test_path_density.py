"""Log-densities of sampled paths, against the joint Gaussian of the whole path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    RectifiedFlow,
    ReverseProcess,
    solvers,
)
from cldsde.solvers import RecordedNoise

PROCESSES: dict[str, LinearSDE] = {
    "VP": VPSDE(),
    "rectified flow": RectifiedFlow(),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
}
SOLVERS = {
    "Euler-Maruyama": solvers.EulerMaruyama(),
    "exponential Euler": solvers.ExponentialEuler(),
    "ancestral": solvers.Ancestral(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "order 1": solvers.ExponentialMultistep(order=1, stochasticity=1.0),
    "order 2": solvers.ExponentialMultistep(order=2, stochasticity=0.7),
}
STEPS, BATCH, DIMENSION = 4, 3, 2
DATA = GaussianMixture([1.0], [[0.3, -0.2]], [0.25 * torch.eye(2).double()])


class Shifted:
    """The exact score of the data, and a learnt constant."""

    def __init__(self, sde: LinearSDE, shift: torch.Tensor) -> None:
        self._exact, self._shift = DATA.score(sde), shift

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self._exact(z, t) + self._shift

    def data_prediction(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self._exact.data_prediction(z, t)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def joint_log_prob(
    process: ReverseProcess, solver: Any, times: torch.Tensor, path: torch.Tensor, r: int
) -> torch.Tensor:
    """Log-density of ``path`` ``(n, B, k, D)`` after its start, from probing the solver's states.

    The path is affine in all normals, with a square matrix A, so that its density is that of the
    normals over det A. Of a root with fewer columns than rows only the driven rows have a density.
    """
    n, k = len(times) - 1, process.sde.components
    rows = list(range(k)) if r >= k else list(process.sde.driven)

    def run(draws: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """States after the start, ``(n, rows, D)``, of one sample."""
        noise = RecordedNoise([draw[None, :, None].expand(1, r, DIMENSION) for draw in draws])
        found = solvers.solve(process, solver, start, times, noise=noise, t_eval=times[1:])
        return found.y[:, 0, rows]

    results = []
    for sample in range(path.shape[1]):
        start = path[0, sample : sample + 1]
        mean = run(torch.zeros(n, r).double(), start)
        basis = torch.eye(n * r).double().reshape(-1, n, r)
        # The same matrix for each data dimension.
        columns = [(run(one, start) - mean)[..., 0].flatten() for one in basis]
        A = torch.stack(columns, dim=1)
        residual = (path[1:, sample][:, rows] - mean).flatten(0, 1)
        whitened = torch.linalg.solve(A, residual)
        constant = torch.linalg.slogdet(A).logabsdet + len(A) * 0.5 * math.log(2 * math.pi)
        results.append(-0.5 * whitened.square().sum() - DIMENSION * constant)
    return torch.stack(results)


def grid(sde: LinearSDE) -> torch.Tensor:
    return torch.linspace(min(0.95, sde.regular_until), 0.6, STEPS + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("method", list(SOLVERS))
def test_the_sum_is_the_density_of_the_path(name: str, method: str) -> None:
    sde, solver = PROCESSES[name], SOLVERS[method]
    process, times = ReverseProcess(sde, DATA.score(sde)), grid(sde)
    start = normal(BATCH, sde.components, DIMENSION)
    g = torch.Generator().manual_seed(1)
    found = solvers.solve(process, solver, start, times, generator=g, t_eval=times, log_prob=True)
    assert found.log_prob is not None
    assert found.log_probs is not None
    assert found.log_probs.shape == (STEPS, BATCH)
    r = len(sde.driven) if method == "Euler-Maruyama" else sde.components
    expected = joint_log_prob(process, solver, times, found.y, r)
    # Solving with A loses as many digits as its condition number has, up to 1e4.
    assert float((found.log_prob - expected).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["VP", "CLD"])
@pytest.mark.parametrize("method", ["Euler-Maruyama", "order 2"])
def test_its_gradient_is_that_of_the_density_at_a_fixed_path(name: str, method: str) -> None:
    sde, solver = PROCESSES[name], SOLVERS[method]
    times, start = grid(sde), normal(BATCH, sde.components, DIMENSION)
    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    found = solvers.solve(
        ReverseProcess(sde, Shifted(sde, shift)),
        solver,
        start,
        times,
        generator=torch.Generator().manual_seed(1),
        t_eval=times,
        differentiable=True,
        log_prob=True,
    )
    assert found.log_prob is not None
    assert not found.state.requires_grad
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), shift)
    r = 1 if method == "Euler-Maruyama" else sde.components
    ends = []
    for value in (0.2 - 1e-4, 0.2 + 1e-4):
        process = ReverseProcess(sde, Shifted(sde, torch.tensor(value, dtype=torch.float64)))
        ends.append(joint_log_prob(process, solver, times, found.y, r).sum())
    # The log-density is quadratic in the shift: central differences are exact but for rounding,
    # 1e-12 of the density over the step of 2e-4.
    assert float(gradient) == pytest.approx(float(ends[1] - ends[0]) / 2e-4, rel=1e-6)


def test_a_path_from_the_singular_end_has_a_density() -> None:
    sde = RectifiedFlow()
    times = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    process = ReverseProcess(sde, DATA.score(sde))
    solver = solvers.ExponentialMultistep(order=1, stochasticity=1.0)
    start = normal(BATCH, 1, DIMENSION)
    g = torch.Generator().manual_seed(1)
    found = solvers.solve(process, solver, start, times, generator=g, t_eval=times, log_prob=True)
    assert found.log_prob is not None
    # The first step draws from N(alpha E x_0, sigma^2); the second from the posterior.
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    first = torch.distributions.Normal(0.3 * mean, 0.7).log_prob(found.y[1, :, 0]).sum(-1)
    assert found.log_probs is not None
    # A handful of roundings.
    assert torch.allclose(found.log_probs[0], first, rtol=0, atol=1e-13)


def test_single_precision_states_have_densities_in_single_precision() -> None:
    sde = VPSDE()
    process, times = ReverseProcess(sde, DATA.score(sde)), grid(sde)
    values = []
    for dtype in (torch.float64, torch.float32):
        draws = [normal(BATCH, 1, DIMENSION, seed=i).to(dtype) for i in range(STEPS)]
        start = normal(BATCH, 1, DIMENSION).to(dtype)
        noise = RecordedNoise(draws)
        found = solvers.solve(
            process, solvers.EulerMaruyama(), start, times, noise=noise, log_prob=True
        )
        assert found.log_prob is not None
        assert found.log_prob.dtype == dtype
        values.append(found.log_prob.double())
    # A dozen sums of single-precision numbers below 10.
    assert torch.allclose(*values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "solver",
    [
        solvers.SSCS(),
        solvers.StochasticHeun(),
        solvers.ExponentialMultistep(),
        solvers.ExponentialMultistep(stochasticity=1.0, corrector=True),
        solvers.ExponentialMultistep(order=3, stochasticity=1.0),
        solvers.GottaGoFast(),
        solvers.ProbabilityFlow(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_solvers_without_gaussian_steps_are_rejected_before_any_evaluation(solver: Any) -> None:
    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    process = ReverseProcess(CLD(), score)
    with pytest.raises(ValueError, match=r"log_prob must be False for .* whose steps"):
        solvers.solve(process, solver, normal(2, 2, 1), grid(CLD()), log_prob=True)


def test_a_step_without_noise_is_rejected() -> None:
    sde = VPSDE()
    times = torch.tensor([0.5, 0.2, 0.0], dtype=torch.float64)
    process = ReverseProcess(sde, DATA.score(sde))
    with pytest.raises(ValueError, match=r"the step from t = 0\.2 to 0 adds no noise"):
        solvers.solve(process, solvers.Ancestral(), normal(1, 1, 2), times, log_prob=True)


def test_without_it_there_is_none() -> None:
    sde = VPSDE()
    process = ReverseProcess(sde, DATA.score(sde))
    found = solvers.solve(process, solvers.EulerMaruyama(), normal(1, 1, 2), grid(sde))
    assert found.log_prob is None
    assert found.log_probs is None


def test_a_failed_sample_has_no_density():
    process = ReverseProcess(
        CLD(), lambda z, t: z[:, 1:] * torch.tensor([1.0, float("nan")])[:, None, None]
    )
    found = solvers.solve(
        process, solvers.EulerMaruyama(), normal(2, 2, 1), grid(CLD()), log_prob=True, warn=False
    )
    assert found.log_prob is not None
    assert found.log_prob.isnan().tolist() == [False, True]
