"""Processes given by functions of time: short intervals, near-singular functions, copies."""

from __future__ import annotations

import copy
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import HOLD, LinearSDE
from linear import reference

# The promise of the package for kernels.
TOLERANCE = 1e-12
EPS = torch.finfo(torch.float64).eps


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def polynomial(*coefficients: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """t -> sum_i C_i t^i."""
    values = [tensor(c) for c in coefficients]
    return lambda t: sum((c * t**i for i, c in enumerate(values[1:], 1)), values[0] + 0 * t)


def random(seed: int, *shape: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).tolist()


HOLD_A, HOLD_G = HOLD().drift(0.5).tolist(), HOLD().diffusion(0.5).tolist()
SMOOTH = {
    "chain": ([HOLD_A, tensor(HOLD_A).mul(0.5).tolist()], [HOLD_G]),
    "chain that fills": ([HOLD_A, random(1, 3, 3)], [HOLD_G]),
    "dense": ([random(2, 3, 3), random(3, 3, 3)], [random(4, 3, 1)]),
    "two noises": ([random(5, 3, 3), random(6, 3, 3)], [random(7, 3, 2), random(8, 3, 2)]),
    "noise that turns": ([random(9, 3, 3)], [random(10, 3, 1), random(11, 3, 1)]),
    "four components": ([random(12, 4, 4), random(13, 4, 4)], [random(14, 4, 1)]),
}
GAPS = [10.0**e for e in (-8, -7, -5, -3, -2, -1, 0)]


def intervals() -> list[tuple[float, float]]:
    """Lengths from 1e-8 to 1, from the start, to the end, inside, and across edges of panels."""
    starts = [0.0, 0.25, 0.3]
    where = [(s, s + gap) for s in starts for gap in GAPS if s + gap <= 1]
    where += [(1 - gap, 1.0) for gap in GAPS[:-1]]
    return where + [(0.5 - 0.4 * gap, 0.5 + 0.6 * gap) for gap in GAPS[:-1]]


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Errors of the diagonals of roots, each relative to its own entry."""
    found, wanted = (root.diagonal(dim1=-2, dim2=-1) for root in (actual, expected))
    return ((found - wanted) / wanted).abs()


@pytest.mark.parametrize("name", list(SMOOTH))
def test_short_transitions_keep_the_digits_of_every_diagonal_entry(name: str) -> None:
    drift, diffusion = SMOOTH[name]
    sde = LinearSDE.from_functions(polynomial(*drift), polynomial(*diffusion))
    exact = reference.Polynomial(drift, diffusion)
    where = intervals()
    kernel = sde.transition(*tensor(where).unbind(-1))
    mean, _, root = reference.as_tensors([exact.transition(*pair) for pair in where])
    errors = relative_errors(kernel.root, root).amax(-1)
    assert errors.max() <= TOLERANCE, f"{errors.max():.1e} at {where[int(errors.argmax())]}"
    assert ((kernel.mean - mean).norm(dim=(1, 2)) / mean.norm(dim=(1, 2))).max() <= TOLERANCE


@pytest.mark.parametrize("initial", [(0, 0, 0.04), (0, 0.04, 0.04), (0.3, 0.1, 0.2)], ids=repr)
@pytest.mark.parametrize("name", ["chain", "chain that fills"])
def test_short_marginals_keep_the_digits_of_every_diagonal_entry(name: str, initial: Any) -> None:
    drift, diffusion = SMOOTH[name]
    covariance = tensor(initial).diag()
    sde = LinearSDE.from_functions(polynomial(*drift), polynomial(*diffusion))
    exact = reference.Polynomial(drift, diffusion)
    _, _, root = reference.as_tensors([exact.marginal(t, covariance) for t in GAPS])
    assert relative_errors(sde.marginal(tensor(GAPS), covariance).root, root).max() <= TOLERANCE


def straight_line(cut: float) -> LinearSDE:
    """x_t = (1 - u) x_0 + u n at u = cut t, whose drift diverges at u = 1."""
    return LinearSDE.from_functions(
        lambda t: (-cut / (1 - cut * t)).reshape(1, 1),
        lambda t: torch.sqrt(2 * cut**2 * t / (1 - cut * t)).reshape(1, 1),
    )


@pytest.mark.parametrize("where", [(0.0, 1.0), (0.0, 1e-8), (0.5, 1.0), (1 - 1e-6, 1.0)])
@pytest.mark.parametrize("cut", [0.99, 0.9999])
def test_processes_that_nearly_diverge_are_resolved(cut: float, where: tuple[float, float]) -> None:
    kernel = straight_line(cut).transition(*where)
    with mp.workdps(40):
        s, t = (mp.mpf(cut) * mp.mpf(x) for x in where)
        mean = (1 - t) / (1 - s)
        variance = float(t**2 - (mean * s) ** 2)
    # The functions subtract 1 - cut t: eps / (1 - cut) <= 2e-12 a value, and values are averaged.
    assert kernel.mean.item() == pytest.approx(float(mean), rel=TOLERANCE)
    assert kernel.covariance.item() == pytest.approx(variance, rel=TOLERANCE)


DIVERGING: dict[str, tuple[Any, Any, str]] = {
    "drift": (lambda t: [[-1 / (1 + 1e-7 - t)]], lambda t: [[1.0]], r"0\.99999"),
    "diffusion": (lambda t: [[-1.0]], lambda t: [[1 / (abs(t - 0.3).sqrt() + 1e-9)]], r"0\.(3|29)"),
    "oscillation": (lambda t: [[torch.sin(1e6 * t)]], lambda t: [[1.0]], r"0"),
    "numbers": (lambda t: [[math.sin(1e6 * float(t))]], lambda t: [[1.0]], r"0"),
}


@pytest.mark.parametrize("name", list(DIVERGING))
def test_functions_that_diverge_are_rejected_with_the_time_and_soon(name: str) -> None:
    drift, diffusion, where = DIVERGING[name]
    start = time.process_time()
    with pytest.raises(ValueError, match=f"nearly diverges or varies .* near t = {where}"):
        LinearSDE.from_functions(drift, diffusion)
    # At most 8191 panels of 16 nodes are evaluated: 1.5 s for functions of numbers on one core.
    assert time.process_time() - start < 10


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
def test_functions_need_not_be_smooth_everywhere(name: str) -> None:
    rate, integral = ROUGH[name]
    sde = LinearSDE.from_functions(lambda t: rate(t).reshape(1, 1), lambda t: [[1.0]])
    with mp.workdps(40):
        total = integral()
        expected = float(mp.exp(total))
    # The condition number of the exponential is its argument.
    tolerance = TOLERANCE * max(1.0, abs(float(total)))
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=tolerance)


def turning_drift(t: torch.Tensor) -> torch.Tensor:
    return tensor(HOLD_A) * (1 + t)


def growing_diffusion(t: torch.Tensor) -> torch.Tensor:
    return tensor(HOLD_G) * (1 + t)


def numeric_drift(t: torch.Tensor) -> list[list[float]]:
    return [[-math.exp(float(t))]]


def constant_diffusion(t: torch.Tensor) -> list[list[float]]:
    return [[1.0]]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sde: pickle.loads(pickle.dumps(sde))])
@pytest.mark.parametrize(
    "functions", [(turning_drift, growing_diffusion), (numeric_drift, constant_diffusion)]
)
def test_processes_of_named_functions_can_be_copied_and_pickled(
    functions: Any, duplicate: Any
) -> None:
    sde = LinearSDE.from_functions(*functions)
    other = duplicate(sde)
    t = tensor([1e-6, 0.3, 1.0])
    one, two = sde.marginal(t), other.marginal(t)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.root, two.root)


def test_panels_follow_parameters_that_change() -> None:
    rate = tensor(1.0)
    sde = LinearSDE.from_functions(lambda t: [[-rate * (1 + t)]], lambda t: [[1.0]])
    rate.fill_(200.0)
    # 300 is the condition number of the exponential.
    expected = math.exp(-300.0)
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=300 * TOLERANCE)


@pytest.mark.parametrize("where", [(0.1, 0.9), (0.3, 0.3001), (0.49, 0.51)])
def test_kernels_of_functions_are_differentiable(where: tuple[float, float]) -> None:
    def law(s: torch.Tensor, t: torch.Tensor, stiffness: torch.Tensor) -> Any:
        def drift(u: torch.Tensor) -> list[list[Any]]:
            return [[0.0, 8 * torch.cos(u)], [-stiffness * (1 + u), -20.0]]

        sde = LinearSDE.from_functions(drift, lambda u: [[0.0], [1 + torch.sin(3 * u)]])
        kernel = sde.transition(s, t)
        return kernel.mean, kernel.root

    arguments = tuple(tensor(x).requires_grad_() for x in (*where, 10.0))
    # Central differences of step 1e-6 and torch's tolerances, of roots of size 1e-6 and more.
    assert torch.autograd.gradcheck(law, arguments, eps=1e-7)
