"""Coefficients are float64 on the CPU whatever torch's default device and dtype.

With the default device "meta", a tensor made without a device fails if its values are needed, or if
it meets a tensor with values.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cldsde
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE, solvers
from cldsde.score import Conversion

PROCESSES: list[Callable[[], LinearSDE]] = [
    *(VPSDE, SubVPSDE, VESDE, HOLD, cldsde.RectifiedFlow, cldsde.CosineVP),
    lambda: VPSDE(schedule=Schedule.cosine()),
    lambda: CLD(beta=(0.1, 20.0)),
    lambda: PSLD(gamma=0.3),
    lambda: VPSDE.from_alphas_cumprod([0.9, 0.5, 0.1, 0.0]),
    lambda: LinearSDE.from_signal_noise(lambda t: (1 - t) ** 2, torch.sqrt),
    lambda: LinearSDE.from_functions(lambda t: [[-1 - t]], lambda t: [[(1 + t).sqrt()]]),
]
TIMES = torch.tensor([1e-3, 0.2, 0.9], dtype=torch.float64, device="cpu")


def kernels(sde: LinearSDE) -> Iterator[Any]:
    for kernel in (sde.marginal(0.5), sde.marginal(TIMES), sde.transition(0.1 * TIMES, TIMES)):
        yield from (kernel.mean, kernel.root)
    k = sde.components
    yield sde.marginal(TIMES, [[float(i == j) for j in range(k)] for i in range(k)]).root
    yield from (sde.drift(0.5), sde.diffusion(TIMES), sde.noise_root(0.1 * TIMES, TIMES))
    yield from (sde.log_snr(TIMES), sde.prior.root, sde.stationary_covariance)
    reversal = sde.stationary_reversal
    yield None if reversal is None else reversal.drift(TIMES)
    for stochasticity in (0.5, 1.0):
        posterior = sde.posterior(0.5 * TIMES, TIMES, stochasticity=stochasticity)
        yield from (posterior.state, posterior.initial, posterior.root)
    yield sde.probability_flow_root(TIMES)


def coefficients(sde: LinearSDE) -> Iterator[Any]:
    for source, target in (("score", "data"), ("noise", "full_score")):
        for conditioning in ("data", "all"):
            found = Conversion.at(sde, TIMES, source, target, conditioning=conditioning)
            yield from (found.state, found.value)
    for name in ("uniform", "quadratic", "root", "log_snr", "karras", "logistic"):
        yield getattr(solvers, f"{name}_times")(sde, sde.regular_until, 1e-3, 4)
    yield solvers.times_of_log_snr(sde, 0.5)
    data = cldsde.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.1]], [[0.0]]])
    process = cldsde.ReverseProcess(sde, data.score(sde))
    times = solvers.root_times(sde.regular_until, 1e-3, 3)
    for options in (
        {"order": 3, "corrector": True},
        {"order": 2, "stochasticity": lambda t: 0.5 * t, "variable": "log_snr"},
    ):
        yield solvers.plan(process, solvers.ExponentialMultistep(**options), times).tables


def forget_constants() -> None:
    """Let cached constants be made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cldsde."):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("results", [kernels, coefficients])
@pytest.mark.parametrize("process", PROCESSES)
def test_coefficients_do_not_follow_the_default_device_and_dtype(process, results):
    expected = list(results(process()))
    forget_constants()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    found = list(results(process()))
    for value, like in zip(found, expected, strict=True):
        assert torch.equal(value, like) if isinstance(like, torch.Tensor) else value == like
        if isinstance(like, torch.Tensor):
            assert (value.device.type, value.dtype) == ("cpu", torch.float64)
