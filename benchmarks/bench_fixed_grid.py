"""Loops over a fixed grid: ours, one tuned by hand, and torchsde's.

All rivals of a race make the same table of the score and call it, so that what differs is the loop:
noise, arithmetic and bookkeeping.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import by_hand as loops
from by_hand import BETA, FRICTION, INVERSE_MASS
from by_torchsde import EulerMaruyama, EulerMaruyamaOfOneRow
from cldsde import CLD, ReverseProcess, solvers
from problems import VelocityScore, gaussian, ring

STEPS = 1000
SDE = CLD(beta=BETA, mass=1 / INVERSE_MASS, friction=FRICTION)
TIMES = solvers.uniform_times(SDE.T, 1e-3, STEPS)
SCORES = {
    "Gaussian": gaussian().score(SDE),
    "ring of 8": ring().score(SDE),
    "free": VelocityScore(),
}
BATCH, DIMENSION = 4096, 2


def start(batch, *shape):
    return SDE.prior.sample((batch, *shape), generator=torch.Generator().manual_seed(0))


def ours(score, solver, state, times=TIMES):
    generator = torch.Generator().manual_seed(1)
    process = ReverseProcess(SDE, score)
    return partial(solvers.solve, process, solver, state, times, generator=generator)


def by_hand(score, state, loop=loops.euler_maruyama, times=TIMES):
    generator = torch.Generator().manual_seed(1)
    return lambda: loop(score.tabulate(times[:-1], state), state, times, generator)


class Untabulated:
    """A score that is a plain function of states and times."""

    def __call__(self, z, t):
        return z[:, 1:]


@pytest.mark.parametrize("name", SCORES)
def test_euler_maruyama_against_a_loop_by_hand(race, name):
    state, score = start(BATCH, DIMENSION), SCORES[name]
    race(
        f"Euler–Maruyama, {BATCH} × 2 × {DIMENSION}, score: {name}",
        {
            "cldsde": ours(score, solvers.EulerMaruyama(), state),
            "by hand": by_hand(score, state),
        },
        at_most={"by hand": 1.15} if name == "Gaussian" else {},
        unit="step",
        units=STEPS,
        rounds=5,
    )


def test_sscs_against_euler_maruyama(race):
    state, score = start(BATCH, DIMENSION), SCORES["Gaussian"]
    race(
        f"SSCS, {BATCH} × 2 × {DIMENSION}, score: Gaussian",
        {
            "SSCS": ours(score, solvers.SSCS(), state),
            "Euler–Maruyama": ours(score, solvers.EulerMaruyama(), state),
            "SSCS by hand": by_hand(score, state, loops.sscs),
        },
        at_most={"Euler–Maruyama": 1.6},
        unit="step",
        units=STEPS,
        rounds=5,
    )


@pytest.mark.parametrize("name", ["Gaussian", "free"])
def test_euler_maruyama_against_torchsde(race, name):
    state, score = start(BATCH, DIMENSION), SCORES[name]
    form = EulerMaruyama(score, state, TIMES)
    row = EulerMaruyamaOfOneRow(score, state, TIMES)
    if name == "Gaussian":
        # Both end in the law of the data, but for an error of the step, below 1/50 here.
        ends = form.run(informed=True)[-1].view(BATCH, DIMENSION, 2)[..., 0]
        rows = row.run(informed=True)[-1].view(2, BATCH, DIMENSION)[0]
        for x in (ends, rows):
            assert torch.allclose(x.mean(0), torch.tensor([0.3, -0.2]), rtol=0, atol=0.05)
            assert torch.allclose(x.var(0), torch.tensor([0.25, 0.16]), rtol=0.1, atol=0)
    race(
        f"Euler–Maruyama against torchsde, {BATCH} × 2 × {DIMENSION}, score: {name}",
        {
            "cldsde": ours(score, solvers.EulerMaruyama(), state),
            "torchsde": partial(form.run, informed=False),
            "torchsde, given dt": partial(form.run, informed=True),
            "torchsde, in one row": partial(row.run, informed=False),
            "torchsde, in one row, given dt": partial(row.run, informed=True),
            "by hand": by_hand(score, state),
        },
        at_most={"torchsde": 1 / 10, "torchsde, given dt": 1 / 3},
        unit="step",
        units=STEPS,
        rounds=3,
    )


def test_euler_maruyama_against_diffrax(race):
    pytest.importorskip("diffrax")
    import by_diffrax

    state, score = start(BATCH, DIMENSION), SCORES["Gaussian"]
    rivals = {"cldsde": ours(score, solvers.EulerMaruyama(), state)}
    for name, path in (("diffrax", "stepwise"), ("diffrax, Brownian tree", "tree")):
        rivals[name] = by_diffrax.euler_maruyama(score, state, TIMES, path)
        # The law is that of the data but for an error of the step, below 1/50 here.
        found = torch.from_numpy(rivals[name]()[:, 0].copy())
        assert torch.allclose(found.mean(0), torch.tensor([0.3, -0.2]), rtol=0, atol=0.05)
        assert torch.allclose(found.var(0), torch.tensor([0.25, 0.16]), rtol=0.1, atol=0)
    race(
        f"Euler–Maruyama against diffrax, compiled, {BATCH} × 2 × {DIMENSION}, score: Gaussian",
        rivals,
        unit="step",
        units=STEPS,
        rounds=3,
    )


@pytest.mark.parametrize(
    ("name", "limit", "loop"),
    [("EulerMaruyama", 25e-6, loops.euler_maruyama), ("SSCS", 40e-6, loops.sscs)],
)
def test_overhead_at_batch_1(race, name, limit, loop):
    state = start(1, DIMENSION)
    race(
        f"{name}, 1 × 2 × {DIMENSION}, score: free",
        {
            "cldsde": ours(SCORES["free"], getattr(solvers, name)(), state),
            "by hand": by_hand(SCORES["free"], state, loop),
            "cldsde, a plain function as score": ours(
                Untabulated(), getattr(solvers, name)(), state
            ),
        },
        below=limit,
        unit="step",
        units=STEPS,
    )


@pytest.mark.parametrize(("name", "rows"), [("EulerMaruyama", 1), ("SSCS", 2)])
def test_steps_of_images_against_their_normals(race, name, rows):
    steps, shape = 200, (3, 32, 32)
    state, times = start(16, *shape), solvers.uniform_times(SDE.T, 1e-3, steps)
    generator = torch.Generator().manual_seed(1)

    def draw():
        for _ in range(steps):
            torch.randn(16, rows, *shape, generator=generator)

    race(
        f"{name}, 16 × 2 × 3 × 32 × 32, score: free",
        {"cldsde": ours(SCORES["free"], getattr(solvers, name)(), state, times), "normals": draw},
        at_most={"normals": 1.5},
        unit="step",
        units=steps,
    )
