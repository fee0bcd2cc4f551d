"""Adaptive solvers: evaluations per sample, and solves that cannot reach their end."""

import dataclasses
import math

import pytest
import torch

from cldsde import CLD, VESDE, ReverseProcess
from cldsde.solvers import GottaGoFast, ProbabilityFlow, RecordedNoise, TorchDiffEq, solve
from probes import Recording, generator, start, tensor
from tolerances import EPS

SDE, ENDS = CLD(), torch.tensor([1.0, 0.1], dtype=torch.float64)

FLOWS = [("bosh3", "batch", 1e-3), ("dopri5", "batch", 1e-5)]
FLOWS += [("dopri5", "sample", 1e-5), ("dopri8", "sample", 1e-9)]
SOLVERS = {
    "Gotta Go Fast": GottaGoFast(rtol=0.1, atol=0.05),
    "Gotta Go Fast, fresh": GottaGoFast(rtol=0.1, atol=0.05, noise_on_reject="fresh"),
    **{
        f"flow, {method}, {pace}": ProbabilityFlow(method=method, pace=pace, rtol=x, atol=x)
        for method, pace, x in FLOWS
    },
    "torchdiffeq, dopri5": TorchDiffEq(method="dopri5", rtol=1e-4),
    "torchdiffeq, adaptive_heun": TorchDiffEq(method="adaptive_heun", rtol=1e-3),
}
pytestmark = [pytest.mark.parametrize("name", list(SOLVERS))]
pytestmark += [pytest.mark.filterwarnings("ignore:the solve failed")]


def smooth(z, t):
    return -4 * z[:, 1:] - z[:, 1:].sin()


def cost(name):
    """Evaluations before the first attempt, and per attempt."""
    return 0 if name.startswith("Gotta") else 2, SOLVERS[name].facts.nfe_per_step


def run(name, score=smooth, state=None, **options):
    score, state = Recording(score), start(SDE) if state is None else state
    solver = dataclasses.replace(SOLVERS[name], **options)
    found = solve(ReverseProcess(SDE, score), solver, state, ENDS, generator=generator())
    assert found.state.isfinite().all()
    assert (found.status == 0) == found.success
    return found, score


@pytest.mark.one_in(3)
def test_as_many_evaluations_as_needed_are_enough_and_fewer_are_reported(name):
    needed, _ = run(name)
    before, attempt = cost(name)
    assert (needed.nfev - before) % attempt == 0
    again, _ = run(name, max_nfev=needed.nfev)
    assert again.success
    assert torch.equal(again.state, needed.state)
    for most in (2, needed.nfev - 1):
        found, score = run(name, max_nfev=most)
        assert f"max_nfev: {most}" in found.message
        assert most - attempt < score.calls == found.nfev <= most
        assert found.y[0, ~found.stats["success"]].isnan().all()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("value", "since"), [(math.nan, 1.0), (math.nan, 0.5), (math.inf, 0.5)])
def test_a_score_that_is_not_finite_is_reported_soon(name, value, since):
    def sick(z, t):
        return torch.where((t <= since)[:, None, None], value, -4 * z[:, 1:])

    found, score = run(name, sick, state=start(SDE)[:1])
    assert not found.success
    # The step of torchdiffeq becomes NaN, and then nothing.
    underflow = "torchdiffeq" in name and since < 1
    assert ("failed: underflow" if underflow else "not finite") in found.message
    # The distance to the first NaN, or the step, shrinks fivefold in at most four attempts: two
    # rejections, one step, one that may grow. 1e-14 is 21 times that.
    healthy = [float(t) > since for t in score.times]
    first = healthy.index(False) if False in healthy else len(healthy)
    assert len(healthy) - first <= 84 * cost(name)[1]


@pytest.mark.one_in(3)
def test_ends_next_to_a_step_are_reached_and_a_stop_costs_one_step(name):
    # Nothing moves: after a first step of 0.01 the second ends near these times.
    first = {"options": {"first_step": 0.01}} if "torchdiffeq" in name else {"first_step": 0.01}
    solver, seen = dataclasses.replace(SOLVERS[name], **first, atol=1.0), []
    process = ReverseProcess(VESDE(0.05, 20.0), lambda z, t: torch.zeros_like(z))
    state = torch.zeros(1, 1, 1, dtype=torch.float64)

    def still(*ends, **options):
        noise = RecordedNoise([torch.zeros_like(state)] * 100)
        return solve(process, solver, state, tensor(ends), noise=noise, **options)

    nfev = still(*ENDS, callback=lambda n, t, z: seen.append(float(t))).nfev
    assert all(still(1.0, seen[1] + i * EPS / 2).success for i in range(-12, 13))
    assert still(1.0, 1 - 8 * EPS).success
    if "torchdiffeq" not in name:  # torchdiffeq makes its steps longer again one by one
        assert still(*ENDS, t_eval=tensor([seen[1] - 1e-9])).nfev <= nfev + cost(name)[1]
