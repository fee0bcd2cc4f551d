"""Noise sources at the size of images, compared with the same number of fresh normals."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from cldsde import CLD, ReverseProcess, solvers
from problems import free

SHAPE, STEPS = (3, 32, 32), 64
SDE = CLD()
TIMES = solvers.uniform_times(SDE.T, 1e-3, STEPS)
PROCESS = ReverseProcess(SDE, free(SDE))

pytestmark = pytest.mark.parametrize("threads", ["one thread"], indirect=True)


def fresh(batch, rows):
    generator = torch.Generator().manual_seed(0)

    def run():
        for _ in range(STEPS):
            # The draws are not kept, because new memory takes half as long as they do.
            torch.randn(batch, rows, *SHAPE, generator=generator)

    return run


def drawn(make, batch, rows):
    z = torch.zeros(batch, SDE.components, *SHAPE)

    def run():
        noise = make()
        for _ in range(STEPS):
            noise.normal(z, rows)

    return run


def along(make, solver, batch, rows):
    functionals = partial(solver.path_noise, PROCESS, TIMES)
    return drawn(lambda: make().along(SDE, TIMES, functionals), batch, rows)


def test_one_stream_per_sample(race):
    batch = 64
    source = solvers.SampleNoise(range(batch))
    race(
        f"SampleNoise, {batch} × 3 × 32 × 32",
        {
            "cldsde": drawn(lambda: source, batch, 1),
            "fresh normals": fresh(batch, 1),
        },
        at_most={"fresh normals": 1.5},
        unit="draw",
        units=STEPS,
        rounds=5,
    )


@pytest.mark.parametrize("wanted", ["increments", "integrals"])
def test_refinable_path(race, wanted):
    batch, integrals = 16, wanted == "integrals"
    rows = SDE.components if integrals else 1
    solver = solvers.ExponentialEuler() if integrals else solvers.EulerMaruyama()

    def make():
        return solvers.BrownianPath(SDE, TIMES, (batch, *SHAPE), integrals=integrals)

    made = make()
    race(
        f"BrownianPath, its {wanted}, {batch} × 3 × 32 × 32",
        {
            "cldsde, a new path": along(make, solver, batch, rows),
            "cldsde, a path used before": along(lambda: made, solver, batch, rows),
            "fresh normals": fresh(batch, rows),
        },
        at_most={"fresh normals": 3.0},
        unit="step",
        units=STEPS,
        rounds=5,
    )


def test_increments_of_a_path_against_torchsde(race):
    import torchsde

    batch = 16
    ends = (-TIMES).tolist()

    def make():
        return solvers.BrownianPath(SDE, TIMES, (batch, *SHAPE), integrals=False)

    def by_torchsde():
        tree = torchsde.BrownianInterval(ends[0], ends[-1], size=(batch, *SHAPE), entropy=0)
        for s, t in itertools.pairwise(ends):
            tree(s, t)

    race(
        f"BrownianPath and BrownianInterval, {batch} × 3 × 32 × 32",
        {
            "cldsde": along(make, solvers.EulerMaruyama(), batch, 1),
            "torchsde": by_torchsde,
        },
        unit="step",
        units=STEPS,
        rounds=5,
    )
