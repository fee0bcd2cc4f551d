"""`solve` along the way: requested states, callbacks, failures, last steps, gradients."""

import dataclasses
import math
import re

import pytest
import torch

from cldsde import CLD, PSLD, VPSDE, ReverseProcess, solvers
from cldsde.solvers import SampleNoise
from gaussian_data import PROCESSES, moments
from probes import Recording, Smooth, named_solvers, noting, start
from tolerances import rounding

SOLVERS = named_solvers() | {
    "flow": solvers.ProbabilityFlow(rtol=1e-7, atol=1e-7, pace="sample"),
    "GGF": solvers.GottaGoFast(rtol=0.05, atol=0.02),
}
GRID = solvers.root_times(1.0, 0.1, 5)
ENDS = GRID[[0, -1]]
SDE = CLD(1.0)
PROCESS = ReverseProcess(SDE, Smooth(SDE))
# A few steps of states of size ten, whose tables are computed for grids of other lengths.
TABLES = rounding(1e4, 10.0)

every_adaptive = pytest.mark.parametrize("method", ["flow", "GGF"])
every_kind = pytest.mark.parametrize("method", ["euler-maruyama", "sscs", "flow", "GGF"])
# Only failures warn, and their tests look at the solution.
pytestmark = pytest.mark.filterwarnings("ignore::cldsde.solvers.SolveWarning")


def run(method, state, times=GRID, process=PROCESS, **options):
    """A solve of a few samples, each with its own noise."""
    solver = options.pop("solver", SOLVERS[method])
    options = {"noise": SampleNoise([3, 1, 4, 15, 9, 2][: len(state)]), **options}
    return solvers.solve(process, solver, state, times, **options)


def states(samples=3):
    return start(SDE, (samples, 2))


def close(found, expected):
    assert (found - expected).abs().max() <= TABLES


@every_kind
def test_data_and_requested_states_share_no_memory_with_others(method):
    state = states()
    solution = run(method, state, t_eval=GRID[[0, 2, 3]], denoise=True)
    before = solution.state.clone(), solution.y.clone()
    assert torch.equal(solution.y[0], state)
    assert solution.y[0].data_ptr() != state.data_ptr()
    solution.data.zero_()
    assert all(map(torch.equal, (solution.state, solution.y), before))
    plain = run(method, state)
    assert torch.equal(plain.t, GRID[5:])
    assert torch.equal(plain.y[0], plain.state)


def test_grids_and_times_may_be_in_single_precision():
    grid = GRID.float()
    solution = run("euler-maruyama", states(), grid, t_eval=grid[2:])
    assert torch.equal(solution.t, grid[2:].double())
    assert torch.equal(solution.state, run("euler-maruyama", states(), grid.double()).state)


@pytest.mark.parametrize("kind", ["euler", "midpoint", "gaussian"])
def test_sscs_without_merged_steps_has_the_same_distribution(kind):
    solver = solvers.SSCS(score_step=kind, data_variance=0.25)
    apart, merged = (moments(x, PROCESSES["CLD"], GRID) for x in (solver.on_grid(), solver))
    for found, expected in zip(apart, merged, strict=True):
        close(torch.from_numpy(found), torch.from_numpy(expected))


@every_adaptive
def test_callbacks_see_the_time_of_each_sample(method):
    calls, state = [], states(6)
    solution = run(method, state, ENDS, callback=noting(calls))
    assert torch.equal(solution.state, run(method, state, ENDS).state)
    assert [step for step, _, _ in calls] == list(range(1, solution.stats["attempts"] + 1))
    times = torch.stack([torch.ones(6), *[t for _, t, _ in calls]])
    assert (times[-1] == 0.1).all()
    # A sample's state changes when its time does.
    path = torch.stack([state, *[z for _, _, z in calls]])
    assert torch.equal((path.diff(dim=0) != 0).flatten(2).any(2), times.diff(dim=0) < 0)
    assert torch.equal(path[-1], solution.state)


@pytest.mark.parametrize("method", ["stochastic-heun", "sscs"])
def test_a_callback_s_true_stops_at_once(method):
    state, times, score = states(), GRID[[0, 2, 3, 5]], Recording(PROCESS.score)
    options = {"t_eval": times, "denoise": True, "callback": lambda step, t, z: step == 3}
    solution = run(method, state, process=ReverseProcess(SDE, score), **options)
    assert (solution.success, solution.status) == (False, 2)
    assert solution.raise_for_failure() is solution
    assert solution.message == "stopped by the callback after 3 steps"
    assert solution.nfev == score.calls == 3 * SOLVERS[method].facts.nfe_per_step
    assert solution.stats["steps"] == 3
    assert solution.stats["success"].tolist() == [False] * 3
    every = run(method, state, t_eval=times)
    assert torch.equal(solution.y[:3], every.y[:3])
    assert solution.y[3].isnan().all()
    assert torch.equal(solution.data, every.y[2][:, 0])


@every_adaptive
def test_a_callback_s_true_stops_samples_that_have_not_arrived(method):
    calls, score = [], Recording(PROCESS.score)

    def callback(step, t, z):
        noting(calls)(step, t, z)
        return bool((t <= 0.1).any())

    options = {"callback": callback, "denoise": "step"}
    solution = run(method, states(6), ENDS, ReverseProcess(SDE, score), **options)
    assert (solution.status, solution.message) == (2, "stopped by the callback")
    assert solution.stats["attempts"] == calls[-1][0]
    assert solution.nfev == score.calls
    assert torch.equal(solution.state, calls[-1][2])
    success = solution.stats["success"]
    assert 0 < int(success.sum()) < 6
    assert torch.equal((solution.data != solution.state[:, 0]).any(1), success)
    assert torch.equal(solution.y[0, success], solution.state[success])
    assert solution.y[0, ~success].isnan().all()


@every_kind
def test_after_the_last_step_there_is_nothing_to_stop(method):
    at_end = run(
        method, states(), callback=lambda step, t, z: bool((torch.as_tensor(t) <= 0.1).all())
    )
    assert at_end.message.startswith("reached the end of the ")


@pytest.mark.parametrize("sde", [VPSDE(0.5, 5.0), PSLD(2.0)], ids=["VP", "PSLD"])
def test_a_step_to_zero_is_an_euler_step_without_noise(sde):
    process, t = ReverseProcess(sde, Smooth(sde)), GRID[-1]
    solution = run("sscs", start(sde, (3, 2)), process=process, denoise="step")
    drift = process.drift(solution.state, float(t)).detach()
    close(solution.data, (solution.state - t * drift)[:, 0])


def test_a_prediction_that_is_not_finite_is_reported():
    def score(z, t):
        return torch.full_like(z[:, 1:], 0.0 if t[0] > 0.1 else math.nan)

    with pytest.warns(solvers.SolveWarning, match="not finite"):
        solution = run("sscs", states(), process=ReverseProcess(SDE, score), denoise=True)
    assert solution.state.isfinite().all()
    assert not solution.success


@every_adaptive
def test_max_nfev_bounds_each_sample(method):
    state = states(6)
    state[::2] *= 5
    counts = run(method, state, ENDS).stats["nfev"]
    most = int(counts.median())  # enough for some
    assert counts.min() <= most < counts.max()
    solver = dataclasses.replace(SOLVERS[method], max_nfev=most)
    solution = run(method, state, ENDS, solver=solver)
    arrived = counts <= most
    assert torch.equal(solution.stats["success"], arrived)
    assert torch.equal(solution.stats["nfev"][arrived], counts[arrived])
    assert (solution.stats["nfev"] <= most).all()
    assert f"{int((~arrived).sum())} of 6 samples: max_nfev: {most}" in solution.message


def test_progress_is_shown_on_stderr_if_asked_for(capsys):
    run("euler-maruyama", states())
    assert capsys.readouterr() == ("", "")
    run("euler-maruyama", states(), progress=True)
    assert re.search("EulerMaruyama.*5/5", capsys.readouterr().err, re.DOTALL)


@every_kind
def test_states_on_the_way_have_gradients_that_no_lost_sample_spoils(method):
    def failing(z, t):
        lost = (z.abs() > 100).flatten(1).any(1).reshape(-1, *(1,) * (z.ndim - 1))
        return torch.where(lost, math.nan, PROCESS.score(z, t))

    state, process = states(), ReverseProcess(SDE, failing)
    state[1] = 1e6
    state.requires_grad_()
    solution = run(method, state, process=process, t_eval=GRID[[0, 2]], differentiable=True)
    sums = (y[[0, 2]].sum() for y in solution.y)
    first, second = (torch.autograd.grad(x, state, retain_graph=True)[0][[0, 2]] for x in sums)
    assert torch.equal(first, torch.ones_like(first))
    assert second.isfinite().all()
    assert (second != 0).any()
