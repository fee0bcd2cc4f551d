"""Transition kernels of a grid: ours against what one writes with a matrix exponential a time."""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD, HOLD, VPSDE

PROCESSES = {"VP": VPSDE(), "CLD": CLD(), "HOLD": HOLD()}


def block_exponential(sde, s, t):
    """Ψ and Σ by Van Loan's block exponential, one call a step (inaccurate for long steps)."""
    k = sde.components
    for start, end in zip(s, t, strict=True):
        middle = (start + end) / 2
        F, G = sde.drift(middle), sde.diffusion(middle)
        block = torch.zeros(2 * k, 2 * k, dtype=torch.float64)
        block[:k, :k], block[:k, k:], block[k:, k:] = -F, G @ G.T, F.T
        exponential = torch.matrix_exp(block * (end - start))
        psi = exponential[k:, k:].T
        yield psi, psi @ exponential[:k, k:]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", ["cldsde", "matrix_exp"])
def test_transition_of_a_1000_step_grid(benchmark, name, method):
    sde = PROCESSES[name]
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    benchmark.group = f"1,000 transitions of {name}"
    if method == "cldsde":
        benchmark(sde.transition, times[:-1], times[1:])
    else:
        benchmark(lambda: list(block_exponential(sde, times[:-1], times[1:])))


@pytest.mark.parametrize("name", PROCESSES)
def test_marginal_of_512_times(benchmark, name):
    times = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    benchmark.group = "marginals at 512 times"
    benchmark(PROCESSES[name].marginal, times)
