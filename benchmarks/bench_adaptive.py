"""Adaptive solvers of the probability flow at one tolerance, with an exact mixture score."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from scipy.integrate import solve_ivp
from torchdiffeq import odeint

from cldsde import CLD, ReverseProcess, solvers
from problems import ring

SDE = CLD()
PROCESS = ReverseProcess(SDE, ring().score(SDE))
ENDS = torch.tensor([SDE.T, 1e-3], dtype=torch.float64)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}  # the defaults of ProbabilityFlow


@torch.no_grad()
def by_torchdiffeq(state):
    # torchdiffeq evaluates past the end unless it is told to step onto it.
    options = {"step_t": ENDS[1:], "dtype": torch.float64}
    flow = solvers.as_torchdiffeq(PROCESS)
    odeint(flow, state, ENDS, method="dopri5", options=options, **TOLERANCES)


def by_scipy(state):
    def flow(t, y):
        return PROCESS.probability_flow(torch.from_numpy(y).view(state.shape), t).numpy().ravel()

    solve_ivp(flow, ENDS.tolist(), state.double().numpy().ravel(), **TOLERANCES)


@torch.no_grad()
def by_torchode(state):
    import torchode

    def flow(t, y):
        return PROCESS.probability_flow(y.view(state.shape), t).flatten(1)

    term = torchode.ODETerm(flow)
    control = torchode.IntegralController(*TOLERANCES.values(), term=term)
    problem = torchode.InitialValueProblem(
        state.flatten(1), *ENDS.to(state).expand(len(state), 2).T
    )
    torchode.AutoDiffAdjoint(torchode.Dopri5(term), control).solve(problem)


@pytest.mark.parametrize("batch", [1, 1000, 200_000])
def test_probability_flow(race, threads, batch):
    state = SDE.prior.sample((batch, 2), generator=torch.Generator().manual_seed(0))
    rivals = {
        "cldsde": partial(solvers.solve, PROCESS, solvers.ProbabilityFlow(), state, ENDS),
        "torchdiffeq": partial(by_torchdiffeq, state),
        "scipy": partial(by_scipy, state),
    }
    if batch <= 1000 or threads == "default threads":  # it takes minutes
        rivals['cldsde, pace="sample"'] = partial(
            solvers.solve, PROCESS, solvers.ProbabilityFlow(pace="sample"), state, ENDS
        )
    if find_spec("torchode") and batch <= 1000:
        rivals["torchode, one step size per sample"] = partial(by_torchode, state)
    race(
        f"dopri5, CLD, {batch:,} × 2 × 2, ring of 8",
        rivals,
        unit="solve",
        rounds=5 if batch <= 1000 else 1,
    )
