"""The probability flow with adaptive steps: ours, scipy's and torchdiffeq's.

All integrate the flow of one process to the same tolerance; reported is the time of one evaluation,
all of the solver's work included. Others have one step size for the batch, and so has ours with
``pace="batch"``; with one for each sample the right-hand side itself costs more, as its
coefficients differ from sample to sample.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

import by_hand
from cldsde import CLD, ReverseProcess, solvers
from problems import VelocityScore, gaussian, ring

BATCH, TOLERANCE = 4096, 1e-5
SDE = CLD()
ENDS = torch.tensor([SDE.T, 1e-3], dtype=torch.float64)
PROBLEMS = {"Gaussian": gaussian(), "ring of 8": ring()}


class Counted:
    """The flow of a problem and how often it was asked for in the last solve."""

    def __init__(self, name):
        self.process = ReverseProcess(SDE, PROBLEMS[name].score(SDE))
        generator = torch.Generator().manual_seed(0)
        self.start = SDE.prior.sample((BATCH, 2), generator=generator, dtype=torch.float64)
        self.nfev = {}

    def ours(self, pace):
        solver = solvers.ProbabilityFlow(rtol=TOLERANCE, atol=TOLERANCE, pace=pace)
        found = solvers.solve(self.process, solver, self.start, ENDS)
        self.nfev[f"cldsde, one step size a {pace}"] = found.nfev

    def scipy(self):
        from scipy.integrate import solve_ivp

        def flow(t, y):
            z = torch.from_numpy(y).view(self.start.shape)
            return self.process.probability_flow(z, t).numpy().ravel()

        found = solve_ivp(
            flow, ENDS.tolist(), self.start.numpy().ravel(), rtol=TOLERANCE, atol=TOLERANCE
        )
        self.nfev["scipy"] = found.nfev

    def torchdiffeq(self):
        end = float(ENDS[-1])  # which it evaluates beyond
        self.nfev["torchdiffeq"] = by_torchdiffeq(
            lambda t, z: self.process.probability_flow(z, max(float(t), end)), self.start
        )

    def torchode(self):
        import torchode

        def flow(t, y):
            return self.process.probability_flow(y.view(self.start.shape), t).flatten(1)

        term = torchode.ODETerm(flow)
        control = torchode.IntegralController(TOLERANCE, TOLERANCE, term=term)
        ends = ENDS.expand(BATCH, 2)
        problem = torchode.InitialValueProblem(self.start.flatten(1), *ends.T)
        with torch.no_grad():
            found = torchode.AutoDiffAdjoint(torchode.Dopri5(term), control).solve(problem)
        self.nfev["torchode, one step size a sample"] = int(found.stats["n_f_evals"].max())


@torch.no_grad()
def by_torchdiffeq(flow, start):
    """Solve, and count the evaluations."""
    from torchdiffeq import odeint

    count = 0

    def counted(t, z):
        nonlocal count
        count += 1
        return flow(t, z)

    odeint(counted, start, ENDS, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
    return count


@pytest.mark.parametrize("name", PROBLEMS)
def test_dopri5(race, name):
    flow = Counted(name)
    rivals = {
        "cldsde, one step size a batch": partial(flow.ours, "batch"),
        "cldsde, one step size a sample": partial(flow.ours, "sample"),
        "scipy": flow.scipy,
        "torchdiffeq": flow.torchdiffeq,
    }
    if find_spec("torchode"):
        rivals["torchode, one step size a sample"] = flow.torchode
    race(
        f"dopri5, {BATCH} × 2 × 2, float64, score: {name}",
        rivals,
        at_most={"scipy": 1.1, "torchdiffeq": 0.5},
        unit="evaluation",
        units=flow.nfev.__getitem__,
        rounds=3,
    )
    assert abs(flow.nfev["cldsde, one step size a batch"] / flow.nfev["scipy"] - 1) <= 0.05


def test_what_the_solver_itself_costs(race):
    """The score costs nothing, and others have the flow of CLD as one writes it by hand."""
    process = ReverseProcess(SDE, VelocityScore())
    generator = torch.Generator().manual_seed(0)
    start = SDE.prior.sample((BATCH, 2), generator=generator, dtype=torch.float64)
    solver = solvers.ProbabilityFlow(rtol=TOLERANCE, atol=TOLERANCE, pace="batch")
    by_scipy = by_hand.probability_flow(start.shape)
    nfev = {}

    def ours():
        nfev["cldsde"] = solvers.solve(process, solver, start, ENDS, denoise=False).nfev

    def scipy():
        from scipy.integrate import solve_ivp

        found = solve_ivp(
            by_scipy, ENDS.tolist(), start.numpy().ravel(), rtol=TOLERANCE, atol=TOLERANCE
        )
        nfev["scipy, flow by hand"] = found.nfev

    def torchdiffeq():
        nfev["torchdiffeq, flow by hand"] = by_torchdiffeq(by_hand.probability_flow_in_torch, start)

    race(
        f"dopri5, {BATCH} × 2 × 2, float64, free score",
        {
            "cldsde": ours,
            "scipy, flow by hand": scipy,
            "torchdiffeq, flow by hand": torchdiffeq,
        },
        at_most={"scipy, flow by hand": 1.1, "torchdiffeq, flow by hand": 0.5},
        unit="evaluation",
        units=nfev.__getitem__,
    )
    assert abs(nfev["cldsde"] / nfev["scipy, flow by hand"] - 1) <= 0.05
