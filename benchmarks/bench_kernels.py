"""Transition kernels of a grid, compared with one matrix exponential per time."""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD, HOLD, VPSDE

PROCESSES = {"VP": VPSDE(), "CLD": CLD(), "HOLD": HOLD()}

pytestmark = pytest.mark.parametrize("threads", ["one thread"], indirect=True)


def blocks(sde, s, t):
    """Matrices that Van Loan's method exponentiates, from F and G in the middle of each step.

    The method overflows for long steps. For short steps small covariances lose digits.
    """
    k, middle = sde.components, (s + t) / 2
    F, G = sde.drift(middle), sde.diffusion(middle)
    block = torch.zeros(len(s), 2 * k, 2 * k, dtype=torch.float64)
    block[:, :k, :k], block[:, :k, k:], block[:, k:, k:] = -F, G @ G.mT, F.mT
    return block * (t - s)[:, None, None]


def factors(exponential, k):
    psi = exponential[..., k:, k:].mT
    return psi, psi @ exponential[..., :k, k:]


def step_by_step(sde, s, t):
    return [factors(torch.matrix_exp(block), sde.components) for block in blocks(sde, s, t)]


def at_once(sde, s, t):
    return factors(torch.matrix_exp(blocks(sde, s, t)), sde.components)


@pytest.mark.parametrize("name", PROCESSES)
def test_transitions_of_a_grid(race, name):
    sde, steps = PROCESSES[name], 1000
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    race(
        f"{steps:,} transitions of {name}",
        {
            "cldsde": lambda: sde.transition(times[:-1], times[1:]),
            "matrix_exp per step": lambda: step_by_step(sde, times[:-1], times[1:]),
            "matrix_exp of all steps": lambda: at_once(sde, times[:-1], times[1:]),
        },
        unit="transition",
        units=steps,
    )
