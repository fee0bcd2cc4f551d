"""Interpolants without signal at t = 1: which solvers sample from there, and the others' errors."""

import pytest
import torch

import cldsde
from cldsde import CosineVP, RectifiedFlow, ReverseProcess, solvers
from probes import generator, named_solvers, tensor
from score.cases import LINE as DATA
from score.cases import mixture
from tolerances import rounding

FLOW = RectifiedFlow()
ALPHAS = [*torch.linspace(0.01, 1.5, 39, dtype=torch.float64).cos().square().tolist(), 0.0]
PROCESSES = {"rectified flow": FLOW, "cosine": CosineVP()}
PROCESSES["table to zero"] = cldsde.VPSDE.from_alphas_cumprod(ALPHAS)
SOLVERS = named_solvers(0.5)


def states(n=50, dtype=torch.float64):
    return FLOW.prior.sample((n, 1), generator=generator(), dtype=dtype)


def process(name="rectified flow"):
    return ReverseProcess(PROCESSES[name], DATA.score(PROCESSES[name]))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_solver_samples_from_the_end_or_names_the_latest_start(name, solver):
    sampler, times = SOLVERS[solver], solvers.root_times(1.0, 0.05, 20)
    if "multistep" in solver and not solver.endswith("noise"):
        assert solvers.solve(process(name), sampler, states(), times).success
        return
    with pytest.raises(ValueError, match=r"take t ≤|stationary distribution") as error:
        solvers.solve(process(name), sampler, states(), times)
    if "stationary distribution" not in str(error.value):
        until = PROCESSES[name].regular_until
        assert f"take t ≤ {until:.15g}" in str(error.value)
        times = solvers.root_times(until, 0.02, 8)
        assert solvers.solve(process(name), sampler, states(8), times).success


@pytest.mark.parametrize("solver", [solvers.EulerMaruyama(), solvers.PredictorCorrector()])
def test_a_start_between_the_latest_and_the_end_is_rejected(solver):
    late = solvers.root_times(1 - 1e-9, 0.05, 20)
    name = type(solver).__name__
    with pytest.raises(ValueError, match=rf"t = 0\.999999999 for {name}, .* take t ≤ 0\.9933"):
        solvers.plan(process(), solver, late)
    # Times that were float32 once are not exactly the latest.
    times = solvers.root_times(FLOW.regular_until, 0.05, 20)
    solvers.plan(process(), solver, times.float().double())


def test_order_one_is_euler_for_the_flow_matching_ode():
    sde, data, times = RectifiedFlow(), mixture(), tensor([1.0, 0.6, 0.1])
    process, solver = ReverseProcess(sde, data.score(sde)), solvers.ExponentialMultistep(order=1)
    x = sde.prior.sample((5, 2), generator=generator(), dtype=torch.float64)
    found = solvers.solve(process, solver, x, times).state
    for t, u in ((1.0, 0.6), (0.6, 0.1)):
        x = x + (u - t) / t * (x - data.posterior_mean(sde, x, t).unsqueeze(1))
    assert (found - x).abs().max() <= rounding(32, 10.0)
