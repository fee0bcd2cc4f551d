"""Sampling loops: ours against a loop tuned by hand for this one process and score."""

from __future__ import annotations

import math

import pytest
import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers

STEPS = 200
STATE = (4096, 2)


def gaussian_score(z, t):
    """The stationary score, the cheapest there is: what is timed is the solver."""
    del t
    return -4.0 * z[:, 1:]


def by_hand(start, times, generator):
    """Euler–Maruyama for CLD with β = 4, M = 1/4, Γ = 1, in place."""
    x, v = start[:, 0].clone(), start[:, 1].clone()
    noise = torch.empty_like(x)
    for h in (-times.diff()).tolist():
        score = -4.0 * v
        noise.normal_(generator=generator)
        old = v.clone()
        v.mul_(1 + 16 * h).add_(x, alpha=4 * h).add_(score, alpha=8 * h)
        v.add_(noise, alpha=math.sqrt(8 * h))
        x.add_(old, alpha=-16 * h)
    return torch.stack([x, v], 1)


@pytest.mark.parametrize("name", ["by hand", "EulerMaruyama", "SSCS"])
def test_200_steps_of_cld(benchmark, name):
    sde = CLD()
    process = ReverseProcess(sde, gaussian_score)
    times = solvers.quadratic_times(sde.T, 1e-3, STEPS)
    start = sde.prior.sample(STATE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    benchmark.group = f"{STEPS} steps of CLD, state {(STATE[0], 2, *STATE[1:])}"
    if name == "by hand":
        benchmark(by_hand, start, times, generator)
    else:
        solver = getattr(solvers, name)()
        benchmark(lambda: solvers.solve(process, solver, start, times, generator=generator))


@pytest.mark.parametrize("components", [1, 8])
def test_exact_mixture_score(benchmark, components):
    sde = CLD()
    angles = torch.arange(components) * (2 * math.pi / components)
    means = torch.stack([angles.cos(), angles.sin()], 1)
    data = GaussianMixture([1.0] * components, means, [[[0.01, 0.0], [0.0, 0.01]]] * components)
    z = sde.prior.sample(STATE, generator=torch.Generator().manual_seed(0))
    score = data.score(sde).tabulate(torch.tensor([0.5], dtype=torch.float64), z)
    benchmark.group = "score of a mixture in 2-D, batch 4,096"
    benchmark(score, z, 0)
