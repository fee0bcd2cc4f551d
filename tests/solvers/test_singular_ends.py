"""Interpolants of which nothing is left at t = 1: who samples from there, and who says why not."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from cldsde import (
    VPSDE,
    CosineVP,
    GaussianMixture,
    LinearSDE,
    RectifiedFlow,
    ReverseProcess,
    solvers,
)
from cldsde.linear.signal_noise import SignalNoiseDynamics
from cldsde.score import Conversion
from cldsde.solvers import named_solvers

DATA = GaussianMixture([0.5, 0.2, 0.3], [[-1.0], [0.2], [1.2]], [[[0.35**2]]] * 3)
PROCESSES: dict[str, LinearSDE] = {
    "rectified flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "table to zero": VPSDE.from_alphas_cumprod(
        [*torch.linspace(0.01, 1.5, 39, dtype=torch.float64).cos().square().tolist(), 0.0]
    ),
}
# Of the data.
VARIANCE = 0.35**2 + 0.5 + 0.2 * 0.04 + 0.3 * 1.44 - 0.1**2
# Those that evaluate drift and diffusion, or take few digits from the score.
STARTING_LATER = [
    solvers.EulerMaruyama(),
    solvers.StochasticHeun(),
    solvers.ExponentialEuler(),
    solvers.EDMHeun(),
    solvers.Ancestral(),
    solvers.ReverseDiffusion(),
    solvers.PredictorCorrector(),
]
every_process = pytest.mark.parametrize("name", list(PROCESSES))


def states(n: int = 50, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return RectifiedFlow().prior.sample((n, 1), generator=g, dtype=dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def process(name: str) -> ReverseProcess:
    sde = PROCESSES[name]
    return ReverseProcess(sde, DATA.score(sde))


@pytest.mark.parametrize("solver", list(named_solvers()))
@every_process
def test_a_solver_samples_from_the_end_or_says_from_where_it_starts(name: str, solver: str) -> None:
    sampler, times = named_solvers()[solver], solvers.root_times(1.0, 0.05, 20)
    g = torch.Generator().manual_seed(1)
    try:
        found = solvers.solve(process(name), sampler, states(), times, generator=g)
    except ValueError as error:
        text = str(error)
    else:
        assert found.success
        assert "multistep" in solver
        return
    applies = not ("stationary distribution" in text or "position and velocity" in text)
    if applies:
        until = PROCESSES[name].regular_until
        assert f"take t ≤ {until:.15g}" in text
        times = solvers.root_times(until, 0.02, 50)
        # Adaptive solvers keep their tolerances, and take longer.
        fixed = sampler.facts.nfe_per_step is not None
        z = states(500 if fixed else 50)
        found = solvers.solve(process(name), sampler, z, times, generator=g)
        assert found.success
        # Fifty steps of first order, and 500 samples, which are off by 4 %. Langevin steps divide
        # by the norm of the score, which of one dimension may be zero, under VP too.
        law = PROCESSES[name].marginal(0.02)
        deviation = float(law.mean.square() * VARIANCE + law.covariance) ** 0.5
        if fixed and solver != "predictor-corrector":
            assert float(found.data.std()) == pytest.approx(deviation, rel=0.12)


@pytest.mark.parametrize("solver", STARTING_LATER)
def test_a_start_between_the_latest_and_the_end_is_refused(solver: Any) -> None:
    late = solvers.root_times(1 - 1e-9, 0.05, 20)
    name = type(solver).__name__
    with pytest.raises(ValueError, match=rf"t = 0\.999999999 for {name}, .* take t ≤ 0\.9933"):
        solvers.plan(process("rectified flow"), solver, late)
    # Times that were float32 once are not exactly the latest.
    times = solvers.root_times(RectifiedFlow().regular_until, 0.05, 20)
    solvers.plan(process("rectified flow"), solver, times.float().double())


@pytest.mark.parametrize(
    "solver", [f"multistep-{n}{c}" for n in (1, 2, 3) for c in ("", "-corrector")]
)
@pytest.mark.parametrize("name", ["rectified flow", "cosine"])
def test_the_flow_from_the_end_has_its_order(name: str, solver: str) -> None:
    sampler, start = named_solvers()[solver], states()
    best = solvers.ExponentialMultistep(order=3, corrector=True)
    fine = solvers.root_times(1.0, 0.05, 2000)
    exact = solvers.solve(process(name), best, start, fine).state
    errors = []
    for n in (40, 80, 160):
        times = solvers.root_times(1.0, 0.05, n)
        found = solvers.solve(process(name), sampler, start, times).state
        errors.append(float((found - exact).abs().max()))
    order = math.log2(errors[1] / errors[2])
    # Rates within 0.25 of the declared order at 160 steps, of order 3 with corrector above it.
    declared = sampler.facts.ode_order
    assert declared is not None
    assert order > declared - 0.25, errors


@pytest.mark.parametrize("stochasticity", [0.5, 1.0])
@every_process
def test_noise_from_the_end_on_gives_the_data(name: str, stochasticity: float) -> None:
    solver = solvers.ExponentialMultistep(order=2, stochasticity=stochasticity)
    times = solvers.root_times(1.0, 0.01, 60)
    g = torch.Generator().manual_seed(1)
    found = solvers.solve(process(name), solver, states(20_000), times, generator=g, denoise=True)
    mean, variance = -0.5 + 0.04 + 0.36, 0.35**2 + 0.5 + 0.008 + 0.3 * 1.44 - 0.1**2
    # Five standard errors of 20,000 samples, and a bias of order 2 at 60 steps.
    assert float(found.data.mean()) == pytest.approx(mean, abs=5 * (variance / 20_000) ** 0.5)
    assert float(found.data.var()) == pytest.approx(variance, rel=5 * (2 / 20_000) ** 0.5)


def test_encoding_reaches_the_end_on_a_fine_grid() -> None:
    # Several steps start where the score tells nothing of the data, and the last ends at t = 1.
    times = solvers.logistic_times(RectifiedFlow(), 1.0, 0.02, 1000)
    solver, z = solvers.ExponentialMultistep(order=2), DATA.sample(20, generator=seeded(2))[:, None]
    code = solvers.solve(process("rectified flow"), solver, z, times.flip(0)).state
    found = solvers.solve(process("rectified flow"), solver, code, times).state
    # Order 2 at 1,000 steps.
    assert float((found - z).abs().max()) <= 1e-4


def test_order_one_is_euler_for_the_flow_matching_ode() -> None:
    sde, reverse = RectifiedFlow(), process("rectified flow")
    times = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.02], dtype=torch.float64)
    x = states()
    found = solvers.solve(reverse, solvers.ExponentialMultistep(order=1), x, times).state
    for t, u in itertools.pairwise(times):
        data = DATA.posterior_mean(sde, x, float(t))
        x = x + (u - t) * Conversion.at(sde, float(t), "data", "flow")(x, data)
    # Five steps of a few roundings, of predictions that divide by 1 − t.
    assert float((found - x).abs().max()) <= 1e-13


def test_diffusers_scheduler_takes_the_same_steps() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas
    assert float(sigmas[0]) == 1.0
    assert float(sigmas[-1]) == 0.0
    sde, reverse = RectifiedFlow(), process("rectified flow")
    start = states(dtype=torch.float32)
    x = start.clone()
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        z = x.double()
        data = DATA.posterior_mean(sde, z, float(sigma))
        flow = Conversion.at(sde, float(sigma), "data", "flow")(z, data)
        x = scheduler.step(flow.float(), t, x).prev_sample
    solver = solvers.ExponentialMultistep(order=1)
    times = sigmas[:-1].double()
    found = solvers.solve(reverse, solver, start.double(), times, denoise=True)
    # Twelve steps in single precision.
    assert float((found.data - x[:, 0]).abs().max()) <= 1e-6


def test_a_score_without_a_data_prediction_says_where_to_start() -> None:
    sde = RectifiedFlow()
    exact = DATA.score(sde)
    reverse = ReverseProcess(sde, exact.__call__)
    solver = solvers.ExponentialMultistep()
    with pytest.raises(ValueError, match=r"must have a method data_prediction.*regular_until"):
        solvers.plan(reverse, solver, solvers.root_times(1.0, 0.05, 20))
    times = solvers.root_times(sde.regular_until, 0.05, 20)
    late = solvers.solve(reverse, solver, states(), times).state
    whole = solvers.solve(process("rectified flow"), solver, states(), times).state
    # Predictions from the score lose e^10 of 1e-16.
    assert torch.allclose(late, whole, rtol=0, atol=1e-10)


def test_a_data_prediction_of_another_shape_is_rejected() -> None:
    sde = RectifiedFlow()

    class Wrong:
        def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -z

        def data_prediction(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return z

    with pytest.raises(ValueError, match=r"score.data_prediction must return shape \(50, 1\)"):
        solvers.solve(
            ReverseProcess(sde, Wrong()),
            solvers.ExponentialMultistep(),
            states(),
            solvers.root_times(1.0, 0.05, 4),
        )


def test_evaluations_of_the_data_prediction_count() -> None:
    times = solvers.root_times(1.0, 0.05, 7)
    found = solvers.solve(process("cosine"), solvers.ExponentialMultistep(), states(), times)
    assert found.nfev == 7


@pytest.mark.parametrize("grid", [solvers.log_snr_times, solvers.karras_times])
def test_grids_in_the_signal_to_noise_ratio_need_a_finite_one(grid: Any) -> None:
    sde = RectifiedFlow()
    with pytest.raises(ValueError, match="T must be a time with a finite signal-to-noise ratio"):
        grid(sde, 1.0, 1e-3, 5)
    assert len(grid(sde, 0.999, 1e-3, 5)) == 6
    # Flat at both ends, it reaches t = 1.
    assert float(solvers.logistic_times(sde, 1.0, 1e-3, 5)[0]) == 1.0


def test_what_needs_a_finite_log_snr_says_so() -> None:
    times = solvers.root_times(1.0, 0.05, 7)
    with pytest.raises(ValueError, match="must not reach t = 1 with variable='log_snr'"):
        solvers.plan(process("cosine"), solvers.ExponentialMultistep(variable="log_snr"), times)


def test_a_ratio_that_stands_still_needs_polynomials_in_time() -> None:
    def bent(t: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0.4, t, torch.where(t < 0.6, 0.4, t - 0.2))

    dynamics = SignalNoiseDynamics(torch.ones_like, bent, gain=lambda s, t: bent(t) - bent(s))
    sde = LinearSDE(dynamics)
    reverse = ReverseProcess(sde, DATA.score(sde))
    times = torch.tensor([0.9, 0.7, 0.55, 0.5, 0.3, 0.1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"variable must be 'time' .* t = 0\.55 and 0\.5$"):
        solvers.plan(reverse, solvers.ExponentialMultistep(variable="log_snr"), times)
    found = solvers.solve(reverse, solvers.ExponentialMultistep(), states(), times)
    assert bool(found.state.isfinite().all())
