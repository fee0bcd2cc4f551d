"""Processes given by functions of time: near-singular functions, checks, copies, gradients."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import LinearSDE
from probes import tensor
from tolerances import KERNEL, rounding


@pytest.mark.parametrize(
    ("cut", "where"), [(0.99, (0.0, 1.0)), (0.99, (0.0, 1e-8)), (0.9999, (0.5, 1.0))]
)
def test_processes_that_nearly_diverge_are_resolved(cut, where):
    # x_t = (1 - u) x_0 + u n at u = cut t, whose drift diverges at u = 1.
    sde = LinearSDE.from_functions(
        lambda t: (-cut / (1 - cut * t)).reshape(1, 1),
        lambda t: torch.sqrt(2 * cut**2 * t / (1 - cut * t)).reshape(1, 1),
    )
    kernel = sde.transition(*where)
    with mp.workdps(40):
        s, t = (mp.mpf(cut) * mp.mpf(x) for x in where)
        mean = (1 - t) / (1 - s)
        variance = float(t**2 - (mean * s) ** 2)
    # The functions subtract 1 - cut t: eps / (1 - cut) <= 2e-12 a value, and values are averaged.
    assert kernel.mean.item() == pytest.approx(float(mean), rel=KERNEL)
    assert kernel.covariance.item() == pytest.approx(variance, rel=KERNEL)


ROUGH: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], Any]]] = {
    "jump": (lambda t: torch.where(t < 0.3, -1.0, -5.0).double(), lambda: -5 + 4 * mp.mpf(0.3)),
    "kink": (
        lambda t: -(t - 0.3).abs(),
        lambda: -(mp.mpf(0.3) ** 2 + (1 - mp.mpf(0.3)) ** 2) / 2,
    ),
    "square root": (lambda t: -t.sqrt(), lambda: -mp.mpf(2) / 3),
    "bump": (
        lambda t: -torch.exp(-(((t - 0.377) / 0.004) ** 2)),
        lambda: -mp.sqrt(mp.pi) * mp.mpf(0.004),
    ),
    "high power": (lambda t: -(t**9), lambda: -mp.mpf(1) / 10),
    "stiff": (lambda t: -300 * (1 + t), lambda: mp.mpf(-450)),
}


@pytest.mark.parametrize("name", list(ROUGH))
def test_functions_need_not_be_smooth_everywhere(name):
    rate, integral = ROUGH[name]
    sde = LinearSDE.from_functions(lambda t: rate(t).reshape(1, 1), lambda t: [[1.0]])
    with mp.workdps(40):
        total = integral()
        expected = float(mp.exp(total))
    # The condition number of the exponential is its argument.
    tolerance = KERNEL * max(1.0, abs(float(total)))
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=tolerance)


DIVERGING: list[tuple[Any, Any, str]] = [
    (lambda t: [[-1 / (1 + 1e-7 - t)]], lambda t: [[1.0]], r"0\.99999"),
    (lambda t: [[-1.0]], lambda t: [[1 / (abs(t - 0.3).sqrt() + 1e-9)]], r"0\.(3|29)"),
    (lambda t: [[torch.sin(1e6 * t)]], lambda t: [[1.0]], "0"),
]


@pytest.mark.parametrize(("drift", "diffusion", "where"), DIVERGING)
def test_functions_that_diverge_are_rejected_with_the_time(drift, diffusion, where):
    with pytest.raises(ValueError, match=f"nearly diverges or varies .* near t = {where}"):
        LinearSDE.from_functions(drift, diffusion)


WRONG = [
    (lambda t: [[-1.0, 0.0]], lambda t: [[1.0]], "drift must .*square"),
    (lambda t: -1.0, lambda t: [[1.0]], "drift must .*one matrix per time"),
    (lambda t: [[-1.0]], lambda t: 1.0, "diffusion must .*one matrix per time"),
    (lambda t: [[-1.0]], lambda t: [[1.0], [1.0]], "diffusion must .*as many rows"),
    (lambda t: [[math.nan]], lambda t: [[1.0]], "drift must be finite.*t = 0"),
    (lambda t: [[-1.0]], lambda t: [[1 / (1 - t)]], "diffusion must be finite.*t = 1"),
    (lambda t: [[-1.0]], lambda t: [[0.0]], "diffusion must have a nonzero entry"),
]


@pytest.mark.parametrize(("drift", "diffusion", "message"), WRONG)
def test_functions_that_do_not_fit_are_rejected(drift, diffusion, message):
    with pytest.raises(ValueError, match=message):
        LinearSDE.from_functions(drift, diffusion)


def numeric_drift(t: torch.Tensor) -> list[list[float]]:
    return [[-math.exp(float(t))]]


def growing_diffusion(t: torch.Tensor) -> torch.Tensor:
    return (1 + t).reshape(1, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sde: pickle.loads(pickle.dumps(sde))])
def test_processes_of_named_functions_can_be_copied_and_pickled(duplicate):
    sde = LinearSDE.from_functions(numeric_drift, growing_diffusion)
    t = tensor([1e-6, 0.3, 1.0])
    one, two = sde.marginal(t), duplicate(sde).marginal(t)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.root, two.root)


def test_a_prior_may_be_given_and_lists_be_returned():
    sde = LinearSDE.from_functions(lambda t: [[-0.5]], lambda t: [[1.0]], prior_covariance=[[4.0]])
    assert sde.prior.covariance.item() == 4.0
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(math.exp(-0.5), rel=rounding())
    assert sde.marginal(torch.empty(0, dtype=torch.float64)).mean.shape == (0, 1, 1)


def test_panels_follow_parameters_that_change():
    rate = tensor(1.0)
    sde = LinearSDE.from_functions(lambda t: [[-rate * (1 + t)]], lambda t: [[1.0]])
    rate.fill_(200.0)
    # The condition number of the exponential is its argument.
    expected = math.exp(-300.0)
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=300 * KERNEL)


@pytest.mark.parametrize("where", [(0.1, 0.9), (0.49, 0.51)])
def test_kernels_of_functions_are_differentiable(where):
    def kernel(s, t, stiffness):
        def drift(u):
            return [[0.0, 8 * torch.cos(u)], [-stiffness * (1 + u), -20.0]]

        sde = LinearSDE.from_functions(drift, lambda u: [[0.0], [1 + torch.sin(3 * u)]])
        step = sde.transition(s, t)
        return step.mean, step.root

    arguments = tuple(tensor(x).requires_grad_() for x in (*where, 10.0))
    # Central differences of a step below |t - s|, and torch's tolerances.
    assert torch.autograd.gradcheck(kernel, arguments, eps=1e-7)
