"""Time grids: formulas, exact ends, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde import solvers
from strategies import log_uniform

EPS = torch.finfo(torch.float64).eps


def uniform(T: float, eps: float, x: float) -> float:
    return T + x * (eps - T)


def quadratic(T: float, eps: float, x: float) -> float:
    return eps + (T - eps) * (1 - x) ** 2


def root(T: float, eps: float, x: float) -> float:
    return (math.sqrt(T) + x * (math.sqrt(eps) - math.sqrt(T))) ** 2


GRIDS: dict[str, tuple[Any, Any]] = {
    "uniform": (solvers.uniform_times, uniform),
    "quadratic": (solvers.quadratic_times, quadratic),
    "root": (solvers.root_times, root),
}
every_grid = pytest.mark.parametrize("name", list(GRIDS))


@every_grid
@given(st.integers(1, 500), log_uniform(1e-6, 0.5), log_uniform(0.6, 2.0))
def test_grids_fall_from_end_to_end(name: str, n: int, eps: float, T: float) -> None:
    times = GRIDS[name][0](T, eps, n)
    assert times.shape == (n + 1,)
    assert times.dtype == torch.float64
    assert times.device.type == "cpu"
    assert times[0].item() == T
    assert times[-1].item() == eps
    assert (times.diff() < 0).all()


@every_grid
@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_grids_are_the_formulas(name: str, n: int, eps: float) -> None:
    make, formula = GRIDS[name]
    expected = torch.tensor([formula(1.0, eps, i / n) for i in range(n + 1)], dtype=torch.float64)
    # Half a dozen roundings of numbers up to 1.
    assert torch.allclose(make(1.0, eps, n), expected, rtol=0, atol=8 * EPS)


@every_grid
def test_one_step_has_two_ends(name: str) -> None:
    assert GRIDS[name][0](1.0, 0.25, 1).tolist() == [1.0, 0.25]


@every_grid
def test_a_grid_may_end_at_zero(name: str) -> None:
    times = GRIDS[name][0](1.0, 0.0, 10)
    assert times[-1].item() == 0.0
    assert (times.diff() < 0).all()


def test_the_last_steps_are_those_that_the_names_promise() -> None:
    n, eps = 50, 1e-3
    last = {name: float(-make(1.0, eps, n).diff()[-1]) for name, (make, _) in GRIDS.items()}
    assert last["uniform"] == pytest.approx((1 - eps) / n, rel=1e-12)
    assert last["quadratic"] == pytest.approx((1 - eps) / n**2, rel=1e-12)
    # (sqrt(eps) + d)^2 - eps with d = (1 - sqrt(eps)) / n.
    d = (1 - math.sqrt(eps)) / n
    assert last["root"] == pytest.approx(2 * math.sqrt(eps) * d + d**2, rel=1e-12)


@every_grid
@pytest.mark.parametrize("n", [0, -1, -100])
def test_less_than_one_step_is_refused(name: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be at least 1 step; got {n}"):
        GRIDS[name][0](1.0, 1e-3, n)


@every_grid
@pytest.mark.parametrize("n", [2.0, 2.5, "2", None, True])
def test_a_number_of_steps_that_is_no_integer_is_refused(name: str, n: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer number of steps; got"):
        GRIDS[name][0](1.0, 1e-3, n)


@every_grid
def test_an_integer_of_numpy_is_an_integer(name: str) -> None:
    make = GRIDS[name][0]
    assert torch.equal(make(1.0, 1e-3, np.int64(5)), make(1.0, 1e-3, 5))


@every_grid
@pytest.mark.parametrize("eps", [1.0, 1.5, -1e-9, math.nan, math.inf, -math.inf])
def test_ends_outside_the_interval_are_refused(name: str, eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must lie in \[0, T\) with T = 1; got"):
        GRIDS[name][0](1.0, eps, 10)


@every_grid
@pytest.mark.parametrize("T", [0.0, -1.0, math.nan, math.inf])
def test_a_start_that_is_not_positive_and_finite_is_refused(name: str, T: float) -> None:
    with pytest.raises(ValueError, match="T"):
        GRIDS[name][0](T, 1e-3, 10)


@every_grid
def test_steps_below_the_resolution_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="resolution"):
        GRIDS[name][0](1.0, 1 - 4 * EPS, 1000)
