"""The benchmarks run, and their rivals compute the same."""

import json
from pathlib import Path

import pytest
import torch

import report
from by_hand import euler_maruyama, sscs
from cldsde import CLD, ReverseProcess, solvers
from probes import Smooth, generator, start
from tolerances import rounding

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_results_of_the_documentation_make_a_table_and_miss_no_target():
    found = json.loads((FOLDER.parent / "docs" / "data" / "benchmarks.json").read_text())
    table = report.table(found)
    assert all(race["question"] in table for race in found["races"])
    assert not [line for race in found["races"] for line in report.missed(race)]


# Roundings of 30 steps; and of Van Loan's covariances, whose entries are h³ of their terms.
@pytest.mark.parametrize(
    ("loop", "solver", "tolerance"),
    [
        (euler_maruyama, solvers.EulerMaruyama(), rounding(1e4)),
        (sscs, solvers.SSCS(), rounding(1e2, 30**3)),
    ],
    ids=["EM", "SSCS"],
)
def test_the_loops_by_hand_are_the_solvers(loop, solver, tolerance):
    sde = CLD()
    score, state = Smooth(sde).requires_grad_(False), start(sde, (50, 2))
    times = solvers.uniform_times(sde.T, 1e-3, 30)
    by_hand = loop(score, state, times, generator(1))
    ours = solvers.solve(ReverseProcess(sde, score), solver, state, times, generator=generator(1))
    size = float(ours.state.abs().max())
    assert torch.allclose(by_hand, ours.state, rtol=0, atol=tolerance * size)
