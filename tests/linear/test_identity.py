"""Whether two processes are the same is decided by their numbers."""

import math

import pytest
import torch

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    RectifiedFlow,
    ReverseProcess,
    Schedule,
)
from cldsde.linear import same_process

PROCESSES = [CLD, HOLD, PSLD, VPSDE, VESDE, RectifiedFlow]
ONE = torch.ones(1, 1, dtype=torch.float64)


def wave(t):
    # Equal to 4 at each of the times 0, 1/4, 1/2, 3/4 and 1.
    return 4 + 16 * torch.sin(4 * math.pi * t) ** 2


def bump(t):
    """4, and a thousandth more for a twentieth of the times."""
    return 4 + 4e-3 * torch.exp(-0.5 * ((t - 0.37123) / 0.02) ** 2)


def vp_of_functions():
    rate = Schedule.linear(0.1, 20.0).rate
    return LinearSDE.from_functions(lambda t: -0.5 * rate(t) * ONE, lambda t: rate(t).sqrt() * ONE)


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_is_that_of_equal_options_and_no_other(kind):
    assert same_process(kind(), kind())
    assert not any(same_process(kind(), other()) for other in PROCESSES if other is not kind)


def test_default_options_and_equal_functions_make_the_same_process():
    assert same_process(CLD(), CLD(beta=4))
    assert same_process(VPSDE(), vp_of_functions())
    assert not same_process(CLD(), CLD(beta=4 * (1 + 1e-6)))
    assert not same_process(CLD(), CLD(velocity_scale=0.05))


@pytest.mark.parametrize("rate", [wave, bump])
def test_rates_that_differ_between_some_times_make_another_process(rate):
    plain, changed = CLD(), CLD(beta=Schedule(rate))
    assert not same_process(plain, changed)
    with pytest.raises(ValueError, match="score belongs to another process"):
        ReverseProcess(changed, GaussianMixture([1.0], [[2.0]], [[[1.0]]]).score(plain))
