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
def test_transitions_of_a_grid(race, name):
    sde, steps = PROCESSES[name], 1000
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    race(
        f"{steps:,} transitions of {name}",
        {
            "cldsde": lambda: sde.transition(times[:-1], times[1:]),
            "matrix_exp a step": lambda: list(block_exponential(sde, times[:-1], times[1:])),
        },
        unit="transition",
        units=steps,
    )
