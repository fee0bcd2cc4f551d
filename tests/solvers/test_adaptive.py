"""Adaptive solvers: evaluations per sample, and solves that cannot reach their end."""

import math
from collections import Counter

import pytest
import torch

from cldsde import CLD, VESDE, ReverseProcess
from cldsde.solvers import (
    FreshNoise,
    GottaGoFast,
    NoiseSource,
    ProbabilityFlow,
    RecordedNoise,
    TorchDiffEq,
    solve,
)
from cldsde.validation import propagate_moments
from probes import Recording, generator, start, untouchable
from tolerances import EPS

SDE, ENDS = CLD(), torch.tensor([1.0, 1e-2], dtype=torch.float64)
# Solvers with their evaluations before the first attempt and per attempt.
SOLVERS = {
    "Gotta Go Fast": (GottaGoFast, {"rtol": 0.1, "atol": 0.05}, 0, 2),
    "Gotta Go Fast, fresh": (
        GottaGoFast,
        {"rtol": 0.1, "atol": 0.05, "noise_on_reject": "fresh"},
        0,
        2,
    ),
    **{
        f"flow, {method}, {pace}": (
            ProbabilityFlow,
            {"method": method, "pace": pace, "rtol": tolerance, "atol": tolerance},
            2,
            stages,
        )
        for method, stages, tolerance in (
            ("bosh3", 3, 1e-4),
            ("dopri5", 6, 1e-5),
            ("dopri8", 12, 1e-9),
        )
        for pace in ("batch", "sample")
    },
    **{
        f"torchdiffeq, {method}": (TorchDiffEq, {"method": method, "rtol": 1e-4}, 2, stages)
        for method, stages in (
            ("dopri8", 13),
            ("dopri5", 6),
            ("bosh3", 3),
            ("fehlberg2", 2),
            ("adaptive_heun", 1),
        )
    },
}
pytestmark = [
    pytest.mark.parametrize("name", list(SOLVERS)),
    pytest.mark.filterwarnings("ignore:the solve failed"),
]


def smooth(z, t):
    return -4 * z[:, 1:] - z[:, 1:].sin()


def run(name, score=None, dtype=torch.float64, state=None, **options):
    kind, defaults, *_ = SOLVERS[name]
    score = Recording(smooth if score is None else score)
    state = start(SDE, dtype=dtype) if state is None else state
    process, solver = ReverseProcess(SDE, score), kind(**{**defaults, **options})
    found = solve(process, solver, state, ENDS, generator=generator())
    assert found.state.isfinite().all()
    assert torch.equal(found.data, found.state[:, 0])
    assert (found.status == 0) == found.success
    return found, score


class Marked(NoiseSource):
    """Normals, but zeros on the last number of each component."""

    def __init__(self):
        self.source = FreshNoise(generator(7))

    def normal(self, z, rows):
        draw = self.source.normal(z, rows)
        draw[..., -1] = 0
        return draw


def test_evaluations_are_those_that_each_sample_saw(name):
    # The last number stands still and holds the sample's number; starts are of different sizes.
    sde = VESDE(0.05, 20.0)
    scale, label = torch.logspace(0, 2, 6).double()[:, None, None], torch.arange(6).double()
    state = torch.cat([start(sde, (6, 2)) * scale, label[:, None, None]], dim=-1)

    def score(z, t):
        variance = (0.25 + (0.05 * 400**t) ** 2)[:, None, None]
        return torch.cat([-z[..., :2] / variance, torch.zeros_like(z[..., :1])], dim=-1)

    kind, options, before, attempt = SOLVERS[name]
    recorded = Recording(score)
    process, solver = ReverseProcess(sde, recorded), kind(**options)
    found = solve(process, solver, state, ENDS, noise=Marked())
    seen = Counter(i for z in recorded.states for i in z[:, 0, 2].tolist())
    assert found.success
    assert torch.equal(found.state[:, 0, 2], label)
    assert found.stats["nfev"].tolist() == [seen[i] for i in range(6)]
    assert found.nfev == max(seen.values())
    assert all((n - before) % attempt == 0 for n in seen.values())
    if kind is not TorchDiffEq:
        assert found.nfev == before + attempt * found.stats["attempts"]
    # Samples that arrived leave the batch, unless all have one step length.
    sizes = [len(z) for z in recorded.states]
    assert sizes == sorted(sizes, reverse=True)
    shared = kind is TorchDiffEq or "batch" in name
    assert (sizes[-1] == 6) == (len(set(seen.values())) == 1) == shared
    assert not shared or all((t == t[0]).all() for t in recorded.times)


@pytest.mark.parametrize("most", [2, 3, 20, 50])
def test_too_few_evaluations_are_reported(name, most):
    found, score = run(name, rtol=1e-12, atol=1e-12, max_nfev=most)
    assert not found.success
    assert f"max_nfev: {most}" in found.message
    assert most - SOLVERS[name][3] < score.calls == found.nfev <= most
    assert found.y.isnan().all()


def test_as_many_evaluations_as_needed_are_enough(name):
    needed, _ = run(name)
    before, attempt = SOLVERS[name][2:]
    assert (needed.nfev - before) % attempt == 0
    again, _ = run(name, max_nfev=needed.nfev)
    assert again.success
    assert torch.equal(again.state, needed.state)
    assert not run(name, max_nfev=needed.nfev - 1)[0].success


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
    assert len(healthy) - first <= 84 * SOLVERS[name][3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [1e-300, 1e-17])
def test_tolerances_out_of_reach_end(name, dtype, tolerance):
    found, _ = run(name, dtype=dtype, rtol=tolerance, atol=tolerance, max_nfev=300)
    assert not found.success
    assert any(x in found.message for x in ("max_nfev", "cannot be met", "underflow"))
    assert found.nfev <= 300


def test_a_step_that_ends_just_above_the_end_does_not_underflow(name):
    # Nothing moves: after a first step of 0.01 the second ends near these ends.
    kind, options, *_ = SOLVERS[name]
    first = {"first_step": 0.01}
    first = {"options": first} if kind is TorchDiffEq else first
    solver, seen = kind(**{**options, **first, "atol": 1.0}), []
    process = ReverseProcess(VESDE(0.05, 20.0), lambda z, t: torch.zeros_like(z))
    state = torch.zeros(1, 1, 1, dtype=torch.float64)
    noise = RecordedNoise([torch.zeros_like(state)] * 100)
    solve(process, solver, state, ENDS, noise=noise, callback=lambda n, t, z: seen.append(float(t)))
    for roundings in range(-20, 21):
        times = torch.tensor([1.0, seen[1] + roundings * EPS / 2], dtype=torch.float64)
        noise = RecordedNoise([torch.zeros_like(state)] * 100)
        assert solve(process, solver, state, times, noise=noise).success


def test_moments_are_for_grids(name):
    kind, options, *_ = SOLVERS[name]
    process, moments = ReverseProcess(SDE, untouchable), (torch.zeros(2, 1), torch.eye(2))
    with pytest.raises(TypeError, match=f"fixed grid; {kind.__name__} is adaptive"):
        propagate_moments(process, kind(**options), ENDS, *moments)
