"""Noise sources at the size of images, against fresh normals of as many numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from cldsde import CLD, ReverseProcess, solvers
from problems import VelocityScore

SHAPE, STEPS = (3, 32, 32), 64
SDE = CLD()
TIMES = solvers.uniform_times(SDE.T, 1e-3, STEPS)
PROCESS = ReverseProcess(SDE, VelocityScore())


def fresh(batch, rows):
    generator = torch.Generator().manual_seed(0)
    return lambda: [torch.randn(batch, rows, *SHAPE, generator=generator) for _ in range(STEPS)]


def along(make, solver, batch, rows):
    z = torch.zeros(batch, SDE.components, *SHAPE)

    def run():
        noise = make().along(PROCESS, solver, TIMES)
        for _ in range(STEPS):
            noise.normal(z, rows)

    return run


def test_one_stream_a_sample(race):
    batch = 64
    source, z = solvers.SampleNoise(range(batch)), torch.zeros(batch, SDE.components, *SHAPE)
    race(
        f"SampleNoise, {batch} × 3 × 32 × 32",
        {
            "cldsde": lambda: [source.normal(z, 1) for _ in range(STEPS)],
            "fresh normals": fresh(batch, 1),
        },
        at_most={"fresh normals": 1.5},
        unit="draw",
        units=STEPS,
        rounds=5,
    )


@pytest.mark.parametrize("wanted", ["increments", "integrals"])
def test_a_path_that_can_be_refined(race, wanted):
    batch, integrals = 16, wanted == "integrals"
    rows = SDE.components if integrals else 1
    solver = solvers.ExponentialEuler() if integrals else solvers.EulerMaruyama()

    def make():
        return solvers.BrownianPath(SDE, TIMES, (batch, *SHAPE), integrals=integrals)

    made = make()
    race(
        f"BrownianPath, its {wanted}, {batch} × 3 × 32 × 32",
        {
            "cldsde, a path of one solve": along(make, solver, batch, rows),
            "cldsde, a path of many solves": along(lambda: made, solver, batch, rows),
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
