"""Encoding: deterministic solvers on increasing grids, from data to noise and back."""

import math

import pytest
import torch

from cldsde import CLD, VPSDE, RectifiedFlow, ReverseProcess, solvers
from cldsde.solvers import ExponentialMultistep as Multistep
from gaussian_data import DATA as GAUSSIAN
from gaussian_data import SLOPE
from probes import generator, tensor
from score.cases import LINE as DATA
from tolerances import order_of

PROCESSES = {"VP": VPSDE(), "CLD": CLD(), "rectified flow": RectifiedFlow()}
EPS, FLOW = 0.02, 1e-7  # the end of sampling, and rtol and atol of flows


def process_and_states(name, n=50):
    """The exact reverse process, and states at the end of sampling."""
    sde, g = PROCESSES[name], generator()
    x = DATA.sample(n, generator=g, dtype=torch.float64)
    z = sde.transition(0.0, EPS).sample(sde.augment(x, generator=g), generator=g)
    return ReverseProcess(sde, DATA.score(sde)), z


def round_trip(process, solver, z, times):
    """Largest error of the data after encoding and decoding."""
    code = solvers.solve(process, solver, z, times.flip(0))
    assert code.success
    back = solvers.solve(process, solver, code.state, times)
    return float((back.data - z[:, 0]).abs().max())


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        *[("VP", Multistep(order=k)) for k in (1, 2)],
        *[(name, Multistep(order=2, corrector=True)) for name in PROCESSES],
        *[(name, Multistep(order=2, prediction="noise")) for name in ("CLD", "rectified flow")],
        *[(name, solvers.EDMHeun()) for name in ("VP", "rectified flow")],
    ],
)
def test_the_round_trip_converges_at_the_order_of_the_solver(name, solver):
    process, z = process_and_states(name)
    # Solvers that do not predict the data start later.
    T = min(0.99, process.sde.regular_until)
    errors = [round_trip(process, solver, z, solvers.root_times(T, EPS, n)) for n in (50, 100)]
    # Errors there and back partly cancel, so that the order may be one higher, not lower.
    assert math.log2(errors[0] / errors[1]) > solver.facts.ode_order - SLOPE, errors


@pytest.mark.parametrize("pace", ["batch", "sample"])
def test_adaptive_flows_come_back_within_their_tolerance(pace):
    process, z = process_and_states("CLD", 10)
    solver = solvers.ProbabilityFlow(rtol=FLOW, atol=FLOW, pace=pace)
    # A hundred steps each way, whose errors the flow may stretch tenfold.
    assert round_trip(process, solver, z, tensor([1.0, EPS])) <= 1e3 * FLOW


def test_encoding_with_a_gaussian_is_a_known_map():
    sde, n, solver = RectifiedFlow(), 200, Multistep(order=3, corrector=True)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1)
    times = solvers.root_times(1.0, EPS, n).flip(0)
    code = solvers.solve(ReverseProcess(sde, GAUSSIAN.score(sde)), solver, z, times).state
    expected = (z - (1 - EPS) * 0.3) / math.sqrt((1 - EPS) ** 2 * 0.25 + EPS**2)
    # The error times n³ is between 8.7 and 9.7 for 50 to 800 steps.
    assert (code - expected).abs().max() <= order_of(1 / n, 3, 12.0)
