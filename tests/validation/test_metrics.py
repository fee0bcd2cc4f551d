"""Distances of distributions against closed forms, and tables of error against work."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from cldsde import GaussianMixture
from cldsde.solvers import EulerMaruyama, ExponentialMultistep, ProbabilityFlow, StochasticHeun
from cldsde.solvers.grids import quadratic_times
from cldsde.validation import WorkPrecision, moment_error, problems, work_precision
from cldsde.validation.metrics import bures_wasserstein, mode_spread_error, sliced_wasserstein
from cldsde.validation.work_precision import WorkPrecisionPoint
from faulty_solvers import altered
from probes import generator, normals, tensor
from strategies import seeds
from tolerances import rounding, standard_error

PROBLEMS = problems()
# Sums, and square roots of matrices of dimension at most 6.
EXACT = rounding(64 * 36)


@given(d=st.integers(1, 6), seed=seeds())
def test_bures_wasserstein_is_the_formula_with_scipys_roots(d, seed):
    roots, (m, n) = normals(seed, 2, d, d), normals(seed + 1, 2, d)
    C, D = roots @ roots.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    root = sqrtm(C.numpy())
    cross = np.real(np.trace(sqrtm(root @ D.numpy() @ root)))
    size = np.trace((C + D).numpy())
    squared = float((m - n).square().sum()) + size - 2 * cross
    assert bures_wasserstein(m, C, n, D) ** 2 == pytest.approx(squared, rel=EXACT, abs=EXACT * size)


def test_bures_wasserstein_of_degenerate_distributions():
    zero, a, b = torch.zeros(3, dtype=torch.float64), normals(1, 3), normals(2, 3)
    # Of one direction each: |a|² + |b|² − 2 |a·b|.
    found = bures_wasserstein(zero, torch.outer(a, a), zero, torch.outer(b, b))
    squared = float(a @ a + b @ b - 2 * (a @ b).abs())
    # An eigenvalue that should be 0 is of the size of its rounding, of which the root is taken.
    assert found**2 == pytest.approx(squared, abs=math.sqrt(EXACT))
    # Points.
    still = torch.zeros(3, 3, dtype=torch.float64)
    distance = pytest.approx(float((a - b).norm()), rel=EXACT, abs=0)
    assert bures_wasserstein(a, still, b, still) == distance


def shuffled(x):
    return x[torch.randperm(len(x), generator=generator(1))]


def test_sliced_wasserstein_in_one_dimension_is_the_distance_of_sorted_samples():
    x = normals(0, 1001, 1)
    # An increasing map is optimal: the cost is the mean of its squares.
    cost = float((x - x.exp()).square().mean().sqrt())
    assert sliced_wasserstein(x, shuffled(x.exp())) == pytest.approx(cost, rel=EXACT, abs=0)
    # Two points against three: mass 1/3, 1/6, 1/6, 1/3 moves by 0, 1, 1, 0.
    few, more = tensor([[0.0], [2.0]]), tensor([[2.0], [0.0], [1.0]])
    assert sliced_wasserstein(few, more) == pytest.approx(math.sqrt(1 / 3), rel=EXACT, abs=0)
    # A weight of 3/4 is three points of four; a squared distance of 0 is good to rounding. Without
    # mass, the point 9 counts for nothing.
    weights, points = tensor([0.25, 0.0, 0.75]), tensor([[0.0], [2.0], [2.0], [2.0]])
    few = tensor([[0.0], [9.0], [2.0]])
    for axes in (1, 2):
        found = sliced_wasserstein(few.repeat(1, axes), points.repeat(1, axes), weights=weights)
        assert found < math.sqrt(rounding(64))


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_wasserstein_of_a_shift_is_the_shift_as_directions_see_it(d):
    """Along a direction θ the cost of a shift c is (θ·c)², of the mean |c|²/d over directions."""
    x, c, count = normals(0, 300, d), torch.arange(1.0, d + 1, dtype=torch.float64), 1000
    found, again, other = (
        sliced_wasserstein(x, shuffled(x + c), projections=count, generator=generator(seed))
        for seed in (2, 2, 3)
    )
    assert found == again != other
    # (θ·c)²/|c|² is of the distribution Beta(1/2, (d − 1)/2).
    size = float(c.square().sum())
    spread = math.sqrt(2 * (d - 1) / (d**2 * (d + 2)))
    assert abs(found**2 / size - 1 / d) <= standard_error(spread, count, number=5)


MODES = GaussianMixture([0.2, 0.3, 0.5], [[-10.0], [0.0], [10.0]], [[[0.04]], [[0.25]], [[1.0]]])


def mode(centre: float, deviation: float, n: int = 2) -> torch.Tensor:
    """Points around a centre whose standard deviation is the given one."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    return (centre + deviation * x / x.std()).unsqueeze(1)


@pytest.mark.parametrize(("scale", "noise"), [(1.0, 0.0), (0.5, 0.3)])
def test_the_error_of_modes_is_the_error_of_their_standard_deviations(scale, noise):
    factors, variances = tensor([1.1, 1.0, 0.7]), scale**2 * tensor([0.04, 0.25, 1.0]) + noise
    deviations = (factors * variances.sqrt()).tolist()
    x = shuffled(torch.cat([*map(mode, (-10 * scale, 0, 10 * scale), deviations, (2, 5, 9))]))
    expected = float((factors - 1).square().mean().sqrt())
    # Of the points between the two modes at half the scale 1 in 1000 may belong to the other one.
    shared = EXACT if scale == 1 else 1 / 50
    found = mode_spread_error(x, MODES, scale, noise)
    assert found == pytest.approx(expected, rel=shared, abs=shared / 20)


def test_modes_of_two_dimensions_or_of_one_point():
    data = GaussianMixture([1.0, 1.0], [[-5.0, 0.0], [5.0, 0.0]], [[[0.09, 0.0], [0.0, 0.09]]] * 2)
    # Four points (±a, 0), (0, ±b) have variances 2a²/3 and 2b²/3.
    a, b = 0.3 * 1.2 * math.sqrt(1.5), 0.3 * math.sqrt(1.5)
    points = tensor([[a, 0], [-a, 0], [0, b], [0, -b]])
    x = torch.cat([points + data.means[0], points + data.means[1]])
    expected = math.sqrt((1.2**2 + 1) / 2) - 1
    assert mode_spread_error(x, data, 1.0, 0.0) == pytest.approx(expected, rel=EXACT, abs=0)
    # A mode of one point has an error of 1.
    x = torch.cat([mode(-10, 0.2), mode(0, 0.5), tensor([[10.0]])])
    expected = pytest.approx(math.sqrt(1 / 3), rel=EXACT, abs=0)
    assert mode_spread_error(x, MODES, 1.0, 0.0) == expected


# Tables of work and precision ------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_has_each_solver_at_each_budget_with_its_exact_error():
    broken = altered(EulerMaruyama, step=lambda z, *_: z * math.nan)()
    solvers = {"EM": EulerMaruyama(), "Heun": StochasticHeun(), "broken": broken}
    problem = PROBLEMS["CLD"]
    table = work_precision(problem, solvers, budgets=(12, 25), samples=16)
    assert (table.problem, table.metric) == ("CLD", "moments")
    *finite, one, two = table.points
    runs = [("EM", 12), ("EM", 25), ("Heun", 12), ("Heun", 24)]
    assert [(p.solver, p.nfe) for p in finite] == runs
    assert one.pareto is two.pareto is False
    for point in finite:
        solver = solvers[point.solver]
        steps = point.nfe // solver.facts.nfe_per_step
        times = quadratic_times(problem.start, problem.end, steps)
        assert point.error == pytest.approx(moment_error(solver, problem, times), rel=EXACT, abs=0)
        assert point.standard_error == 0
        others = [other for other in finite if other != point and other.nfe <= point.nfe]
        assert point.pareto is not any(other.error <= point.error for other in others)
    assert {point.pareto for point in finite} == {True, False}


@pytest.mark.slow
def test_an_adaptive_solver_is_run_once_and_a_generator_decides_on_samples():
    solvers = {"multistep": ExponentialMultistep(), "flow": ProbabilityFlow(rtol=1e-3, atol=1e-3)}
    ring, options = PROBLEMS["CLD, ring"], {"budgets": (5, 10), "samples": 64, "repeats": 3}
    first, again, other = (
        work_precision(ring, solvers, generator=generator(seed), **options) for seed in (1, 1, 2)
    )
    assert [point.solver for point in first.points] == ["multistep", "multistep", "flow"]
    assert first.metric == "sliced"
    assert first.points[-1].nfe > 10
    errors = [[point.error for point in table.points] for table in (first, again, other)]
    assert errors[0] == errors[1] != errors[2]


def test_standard_errors_are_of_the_mean_of_the_repeats(monkeypatch):
    errors = iter([4.0, 5.0, 9.0, 1.0, 2.0, 6.0])  # of exact samples, and of the solver
    module = sys.modules[work_precision.__module__]
    monkeypatch.setattr(module, "_error", lambda *arguments: next(errors))
    options = {"budgets": (5,), "samples": 4, "repeats": 3}
    table = work_precision(PROBLEMS["VP, ring"], {"EM": EulerMaruyama()}, **options)
    (point,) = table.points
    # Deviations of −2, −1 and 3: a variance of 7.
    assert (table.floor, point.error) == (6.0, 3.0)
    assert point.standard_error == pytest.approx(math.sqrt(7 / 3), rel=EXACT, abs=0)


@pytest.mark.parametrize("metric", ["spread", "sliced"])
def test_the_floor_of_samples_is_shown(metric):
    problem, solvers = PROBLEMS["VP, three modes"], {"DDIM": ExponentialMultistep(order=2)}
    options = {"budgets": (200,), "samples": 8000, "repeats": 2}
    found = work_precision(problem, solvers, metric=metric, **options)
    # Standard deviations of a few thousand points are known to some per cent. Modes overlap here.
    low, high = (standard_error(1.0, 8000, number) for number in (0.25, 4))
    assert low < found.floor < high
    # So fine a grid leaves next to nothing else.
    assert found.points[0].error < 4 * found.floor
    assert f"| exact samples | {found.floor:.1e} |" in found.to_markdown()


WRONG = [
    ({"metric": "kl"}, ValueError, "'moments', 'bures', 'sliced' or 'spread'; got 'kl'"),
    ({"metric": "bures", "problem": PROBLEMS["CLD, ring"]}, ValueError, "metric must be 'sliced'"),
    ({"metric": "bures", "solvers": {"flow": ProbabilityFlow()}}, ValueError, "as 'flow'"),
    *(({"budgets": x}, ValueError, "budgets must be positive integers") for x in ((), (0,), 10)),
    ({"budgets": (10, 1)}, ValueError, "budgets must allow at least one step, which takes 2"),
    ({"repeats": 0}, ValueError, "repeats must be at least 1"),
    ({"grid": "root"}, TypeError, "grid must be a function of"),
    ({"solvers": {"heun": StochasticHeun}}, TypeError, "must be a solver, such as"),
]


@pytest.mark.parametrize(("changes", "error", "words"), WRONG)
def test_wrong_comparisons_are_rejected_by_name(changes, error, words):
    valid = {"problem": PROBLEMS["CLD"], "solvers": {"heun": StochasticHeun()}, "budgets": (10,)}
    with pytest.raises(error, match=words):
        work_precision(**(valid | {"samples": 4} | changes))


def test_markdown_has_a_line_per_solver():
    points = (
        WorkPrecisionPoint("first", 10, 0.1, 0.5, 0.0, pareto=True),
        WorkPrecisionPoint("first", 20, 0.2, 0.02, 0.001, pareto=True),
        WorkPrecisionPoint("second", 20, 0.3, 0.3, 0.0),
        WorkPrecisionPoint("second", 40, 0.4, math.nan, math.nan),
    )
    table = WorkPrecision("CLD", "moments", points)
    assert table.to_markdown().splitlines() == [
        "| moments at NFE | 10 | 20 | 40 |",
        "| --- | ---: | ---: | ---: |",
        "| first | **5.0e-01** | **2.0e-02** |  |",
        "| second |  | 3.0e-01 | nan |",
    ]
