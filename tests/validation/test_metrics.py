"""Distances of distributions against closed forms, and tables of error against work."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from cldsde import GaussianMixture
from cldsde.solvers import (
    EulerMaruyama,
    ExponentialMultistep,
    ProbabilityFlow,
    StochasticHeun,
    quadratic_times,
)
from cldsde.validation import (
    WorkPrecision,
    bures_wasserstein,
    moment_error,
    problems,
    sliced_wasserstein,
    work_precision,
)
from cldsde.validation.metrics import mode_spread_error
from cldsde.validation.work_precision import WorkPrecisionPoint
from tolerances import rounding, standard_error

PROBLEMS = problems()
SEEDS = st.integers(0, 2**32 - 1)
DIMENSIONS = st.integers(1, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def moments(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two means and two covariances with eigenvalues of at least 0.1."""
    roots = draw(2, d, d, seed=seed)
    means = draw(2, d, seed=seed + 1)
    covariances = roots @ roots.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    return means[0], covariances[0], means[1], covariances[1]


# Sums, and square roots of matrices of dimension at most 6.
EXACT = rounding(64 * 36)


@given(d=DIMENSIONS, seed=SEEDS)
def test_bures_wasserstein_is_the_formula_with_scipys_roots(d, seed):
    m, C, n, D = moments(d, seed)
    root = sqrtm(C.numpy())
    cross = np.real(np.trace(sqrtm(root @ D.numpy() @ root)))
    squared = float((m - n).square().sum()) + np.trace(C.numpy()) + np.trace(D.numpy()) - 2 * cross
    size = np.trace((C + D).numpy())
    assert bures_wasserstein(m, C, n, D) ** 2 == pytest.approx(squared, rel=EXACT, abs=EXACT * size)


def test_bures_wasserstein_of_diagonal_and_of_degenerate_laws():
    zero = torch.zeros(3, dtype=torch.float64)
    first, second = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    found = bures_wasserstein(zero, first.diag(), zero, second.diag())
    assert found == pytest.approx(math.sqrt(1 + 1 + 9), rel=EXACT)
    # Of one direction each: |a|² + |b|² − 2 |a·b|.
    a, b = draw(3, seed=1), draw(3, seed=2)
    found = bures_wasserstein(zero, torch.outer(a, a), zero, torch.outer(b, b))
    squared = float(a @ a + b @ b - 2 * (a @ b).abs())
    # An eigenvalue that should be 0 is of the size of its rounding, of which the root is taken.
    assert found**2 == pytest.approx(squared, abs=math.sqrt(EXACT))
    # Points.
    still = torch.zeros(3, 3, dtype=torch.float64)
    assert bures_wasserstein(a, still, b, still) == pytest.approx(float((a - b).norm()), rel=EXACT)


def test_sliced_wasserstein_in_one_dimension_is_the_distance_of_sorted_samples():
    x = draw(1001, 1)
    shuffled = torch.randperm(1001, generator=generator(1))
    # An increasing map is optimal: the cost is the mean of its squares.
    for y in (x + 0.7, 2 * x - 1, x.exp()):
        cost = float((x - y).square().mean().sqrt())
        assert sliced_wasserstein(x, y[shuffled]) == pytest.approx(cost, rel=EXACT)
    assert sliced_wasserstein(x, x[shuffled]) == pytest.approx(0.0, abs=EXACT)
    # Two points against three: mass 1/3, 1/6, 1/6, 1/3 moves by 0, 1, 1, 0.
    few = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    more = torch.tensor([[2.0], [0.0], [1.0]], dtype=torch.float64)
    assert sliced_wasserstein(few, more) == pytest.approx(math.sqrt(1 / 3), rel=EXACT)


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_wasserstein_of_a_shift_is_the_shift_as_directions_see_it(d):
    """Along a direction θ the cost of a shift c is (θ·c)², of the mean |c|²/d over directions."""
    x, c = draw(300, d), torch.arange(1.0, d + 1, dtype=torch.float64)
    y = (x + c)[torch.randperm(300, generator=generator(1))]
    count = 4000
    found = sliced_wasserstein(x, y, projections=count, generator=generator(2))
    # (θ·c)²/|c|² is of the distribution Beta(1/2, (d − 1)/2).
    size = float(c.square().sum())
    spread = size * math.sqrt(2 * (d - 1) / (d**2 * (d + 2)) / count)
    assert abs(found**2 - size / d) <= 5 * spread
    assert spread < 0.05 * size / d
    again = sliced_wasserstein(x, y, projections=count, generator=generator(2))
    other = sliced_wasserstein(x, y, projections=count, generator=generator(3))
    assert found == again != other


@pytest.mark.parametrize("d", [1, 3])
def test_sliced_wasserstein_of_equal_weights_is_the_distance_without_weights(d):
    """By POT with weights, by sorting without."""
    x, y = draw(500, d), draw(500, d, seed=3)
    weights = torch.full((500,), 1 / 500, dtype=torch.float64)
    weighted = sliced_wasserstein(x, y, weights=weights, generator=generator())
    # Sums of 500 weights are off by up to 500 eps at each of 500 edges. Costs are at most 0.1, and
    # the squared distance is 0.003.
    misplaced = rounding(500 * 500, 0.1 / 0.003)
    found = sliced_wasserstein(x, y, generator=generator())
    assert found == pytest.approx(weighted, rel=misplaced)


MODES = GaussianMixture([0.2, 0.3, 0.5], [[-10.0], [0.0], [10.0]], [[[0.04]], [[0.25]], [[1.0]]])


def mode(centre: float, deviation: float, n: int = 2) -> torch.Tensor:
    """Points around a centre whose standard deviation is the given one."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    return (centre + deviation * x / x.std()).unsqueeze(1)


@pytest.mark.parametrize(("scale", "noise"), [(1.0, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.1, 1.0, 0.7), (0.5, 2.0, 1.0)])
def test_the_error_of_modes_is_that_of_their_deviations(scale, noise, factors):
    deviations = [math.sqrt(scale**2 * v + noise) for v in (0.04, 0.25, 1.0)]
    x = torch.cat(
        [
            mode(scale * centre, factor * deviation, n)
            for centre, factor, deviation, n in zip(
                (-10, 0, 10), factors, deviations, (2, 5, 9), strict=True
            )
        ]
    )
    x = x[torch.randperm(len(x), generator=generator())]
    expected = math.sqrt(sum((factor - 1) ** 2 for factor in factors) / 3)
    # Of the points between the two modes at half the scale 1 in 1000 may belong to the other one.
    shared = EXACT if scale == 1 else 1 / 50
    found = mode_spread_error(x, MODES, scale, noise)
    assert found == pytest.approx(expected, rel=shared, abs=shared / 20)


@pytest.mark.parametrize("name", ["VP, three modes", "CLD, three modes", "VP, ring", "CLD, ring"])
def test_exact_samples_have_no_error_of_modes_however_much_these_overlap(name):
    problem, n = PROBLEMS[name], 200_000
    kernel = problem.sde.marginal(problem.end)
    scale, noise = float(kernel.mean[0, 0]), float(kernel.covariance[0, 0])
    x = problem.sample(n, generator(), at=problem.end)[:, 0]
    # A standard deviation of n/8 points, and three times as much where modes overlap.
    found = mode_spread_error(x, problem.data, scale, noise)
    assert found < standard_error(1 / math.sqrt(2), n // 8, number=10)
    scaled = mode_spread_error(1.2 * x, problem.data, 1.2 * scale, 1.44 * noise)
    # A sum over the points, and the condition of small differences.
    assert scaled == pytest.approx(found, rel=rounding(n, 100))
    data = GaussianMixture([1.0, 1.0], [[-1.0], [1.0]], [[[0.0]], [[0.1]]])
    with pytest.raises(ValueError, match="positive width"):
        mode_spread_error(draw(10, 1), data, 1.0, 0.0)
    assert math.isfinite(mode_spread_error(draw(10, 1), data, 1.0, 0.1))
    # A mode without two points is wholly wrong.
    x = torch.cat([mode(-10, 0.2), mode(0, 0.5)])
    for points in (x, torch.cat([x, torch.tensor([[10.0]], dtype=torch.float64)])):
        expected = math.sqrt(1 / 3)
        assert mode_spread_error(points, MODES, 1.0, 0.0) == pytest.approx(expected, rel=EXACT)


def test_the_spread_of_a_mode_in_two_dimensions_is_of_both():
    data = GaussianMixture([1.0, 1.0], [[-5.0, 0.0], [5.0, 0.0]], [[[0.09, 0.0], [0.0, 0.09]]] * 2)
    # Four points (±a, 0), (0, ±b) have variances 2a²/3 and 2b²/3.
    a, b = 0.3 * 1.2 * math.sqrt(1.5), 0.3 * math.sqrt(1.5)
    points = torch.tensor([[a, 0], [-a, 0], [0, b], [0, -b]], dtype=torch.float64)
    x = torch.cat([points + data.means[0], points + data.means[1]])
    expected = math.sqrt((1.2**2 + 1) / 2) - 1
    assert mode_spread_error(x, data, 1.0, 0.0) == pytest.approx(expected, rel=EXACT)


def test_a_table_has_each_solver_at_each_budget_with_its_exact_error():
    problem, solvers = PROBLEMS["CLD"], {"EM": EulerMaruyama(), "Heun": StochasticHeun()}
    table = work_precision(problem, solvers, budgets=(12, 25), samples=16)
    assert (table.problem, table.metric) == ("CLD", "moments")
    found = [(p.solver, p.nfe) for p in table.points]
    assert found == [("EM", 12), ("EM", 25), ("Heun", 12), ("Heun", 24)]
    for point in table.points:
        solver = solvers[point.solver]
        steps = point.nfe // solver.facts.nfe_per_step
        times = quadratic_times(problem.start, problem.end, steps)
        assert point.error == pytest.approx(moment_error(solver, problem, times), rel=EXACT)
        assert point.standard_error == 0
        assert point.seconds > 0
        beaten = any(
            other.nfe <= point.nfe
            and other.error <= point.error
            and (other.nfe < point.nfe or other.error < point.error)
            for other in table.points
        )
        assert point.pareto is not beaten
    assert {point.pareto for point in table.points} == {True, False}
    read = json.loads(table.to_json())
    assert [WorkPrecisionPoint(**point) for point in read["points"]] == list(table.points)


def test_a_solver_that_chooses_its_times_is_run_once():
    flow = ProbabilityFlow(rtol=1e-3, atol=1e-3)
    found = work_precision(
        PROBLEMS["CLD, ring"],
        {"flow": flow, "multistep": ExponentialMultistep()},
        budgets=(5, 10),
        samples=64,
        repeats=3,
    )
    assert [point.solver for point in found.points] == ["flow", "multistep", "multistep"]
    assert found.metric == "sliced"
    assert found.points[0].nfe > 10
    for point in found.points:
        assert 0 < point.standard_error < point.error


@pytest.mark.parametrize("metric", [None, "moments", "bures"])
def test_all_points_of_a_table_are_in_its_metric(metric):
    """An adaptive solver has no exact moments: either it is rejected, or all points are sampled."""
    solvers = {"flow": ProbabilityFlow(rtol=1e-3, atol=1e-3), "EM": EulerMaruyama()}

    def exact() -> set[bool]:
        try:
            found = work_precision(
                PROBLEMS["CLD"], solvers, budgets=(10,), metric=metric, samples=32, repeats=2
            )
        except ValueError:
            return set()
        return {point.standard_error == 0 for point in found.points}

    assert len(exact()) <= 1


@pytest.mark.parametrize("metric", ["spread", "sliced"])
def test_the_floor_of_samples_is_shown(tmp_path, metric):
    solvers = {"EM": EulerMaruyama(), "multistep": ExponentialMultistep(order=2)}
    found = work_precision(
        PROBLEMS["VP, three modes"], solvers, budgets=(200,), metric=metric, samples=2000, repeats=2
    )
    # Standard deviations of a few hundred points are known to some per cent.
    assert 0.005 < found.floor < 0.1
    # So fine a grid leaves next to nothing else.
    assert all(point.error < 4 * found.floor for point in found.points)
    assert found.to_markdown().splitlines()[-1] == f"| exact samples | {found.floor:.1e} |"
    assert json.loads(found.to_json())["floor"] == found.floor
    assert WorkPrecision.joined([found, found]).floor == pytest.approx(found.floor, rel=EXACT)
    found.plot(tmp_path / "a.svg")
    assert "exact samples" in (tmp_path / "a.svg").read_text()


def test_samples_come_from_the_generator():
    def errors(seed: int) -> list[float]:
        found = work_precision(
            PROBLEMS["VP, ring"],
            {"EM": EulerMaruyama()},
            budgets=(5,),
            samples=64,
            repeats=2,
            generator=generator(seed),
        )
        return [point.error for point in found.points]

    assert errors(1) == errors(1) != errors(2)


RING = {"problem": PROBLEMS["CLD, ring"]}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"metric": "kl"}, ValueError, "'moments', 'bures', 'sliced' or 'spread'; got 'kl'"),
        ({"metric": "moments"} | RING, ValueError, "metric must be 'sliced'"),
        ({"metric": "bures"} | RING, ValueError, "metric must be 'sliced'"),
        ({"budgets": ()}, ValueError, "budgets must be positive integers, at least one; got"),
        ({"budgets": (0,)}, ValueError, "budgets must be positive"),
        ({"budgets": (-3,)}, ValueError, "budgets must be positive"),
        ({"budgets": (10.5,)}, ValueError, "budgets must be positive"),
        ({"budgets": 10}, ValueError, "budgets must be positive"),
        ({"budgets": (10, 1)}, ValueError, "budgets must allow at least one step, which takes 2"),
        ({"samples": 0}, ValueError, "samples must be a positive integer; got 0"),
        ({"repeats": 0}, ValueError, "repeats must be a positive integer; got 0"),
        ({"repeats": 1.5}, ValueError, "repeats must be"),
        ({"solvers": [StochasticHeun()]}, TypeError, "solvers must be a mapping of names"),
        ({"solvers": {"heun": StochasticHeun}}, TypeError, "must be a solver, such as"),
        ({"problem": "CLD"}, TypeError, "problem must be a Problem"),
    ],
)
def test_wrong_comparisons_are_rejected_by_name(changes, error, words):
    valid = {"problem": PROBLEMS["CLD"], "solvers": {"heun": StochasticHeun()}, "budgets": (10,)}
    with pytest.raises(error, match=words):
        work_precision(**(valid | {"samples": 4} | changes))


POINTS = (
    WorkPrecisionPoint("first", 10, 0.1, 0.5, 0.0, pareto=True),
    WorkPrecisionPoint("first", 20, 0.2, 0.02, 0.001, pareto=True),
    WorkPrecisionPoint("second", 20, 0.3, 0.3, 0.0),
    WorkPrecisionPoint("second", 40, 0.4, math.nan, math.nan),
)
SYNTHETIC = WorkPrecision("CLD", "moments", POINTS)


def test_markdown_has_a_line_a_solver_and_a_column_a_budget():
    assert SYNTHETIC.to_markdown().splitlines() == [
        "| moments at NFE | 10 | 20 | 40 |",
        "| --- | ---: | ---: | ---: |",
        "| first | **5.0e-01** | **2.0e-02** |  |",
        "| second |  | 3.0e-01 | nan |",
    ]


@pytest.mark.parametrize("against", ["nfe", "seconds"])
@pytest.mark.parametrize(("name", "head"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_a_diagram_is_written_to_a_file(tmp_path, against, name, head):
    SYNTHETIC.plot(tmp_path / name, against=against)
    assert (tmp_path / name).read_bytes().startswith(head)
    buffer = io.BytesIO()
    SYNTHETIC.plot(buffer, against=against, file_format=name[2:])
    assert buffer.getvalue().startswith(head)


def test_a_diagram_against_anything_else_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="'nfe' or 'seconds'"):
        SYNTHETIC.plot(tmp_path / "a.svg", against="steps")
    assert not list(tmp_path.iterdir())


def test_a_front_leaves_out_what_is_not_finite():
    """A solver that blows up is in the table, with an error that is no number, and on no front."""

    class Exploding(EulerMaruyama):
        def step(self, z, memory, tables, i, score, noise):
            z, memory = super().step(z, memory, tables, i, score, noise)
            return z * math.nan, memory

    found = work_precision(
        PROBLEMS["CLD"],
        {"broken": Exploding(), "EM": EulerMaruyama()},
        budgets=(5,),
        samples=4,
    )
    assert [(p.solver, math.isnan(p.error), p.pareto) for p in found.points] == [
        ("broken", True, False),
        ("EM", False, True),
    ]
