"""A Brownian path: its distribution, its bits, and the solvers that follow it.

A read of the path is a linear map of independent standard normals. `as_maps` replaces those by unit
vectors, one per sample, so that a read is the map itself and products of reads are exact
covariances: no Monte Carlo.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag

import references
from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    ReverseProcess,
    solvers,
)
from cldsde.solvers import BrownianPath
from cldsde.solvers.authoring import NoiseSource, PathNoise, Solver
from probes import generator, start, untouchable
from references.float64 import Array, Dense, dense
from tolerances import KERNEL, rounding, standard_error, standard_error_of_variance

PROCESSES: dict[str, Callable[[], tuple[LinearSDE, Dense]]] = {
    "VP": lambda: (VPSDE(8.0, 8.0), dense(references.vp(8.0, 8.0))),
    "VE": lambda: (VESDE(0.1, 5.0), dense(references.ve(0.1, 5.0))),
    "PSLD": lambda: (PSLD(), dense(references.psld())),
    "HOLD": lambda: (HOLD(), dense(references.hold())),
    "CLD, linear": lambda: (CLD((1.0, 7.0)), dense(references.cld((1.0, 7.0)))),
}
SDE = CLD()
GRID = solvers.quadratic_times(1.0, 0.01, 8)
GIVEN = GRID.flip(0).tolist()
# Off the given times: halves, thirds, irrational ones, and pairs that are close.
CLOSE = 1e-6
INSIDE = [
    (GIVEN[2] + GIVEN[3]) / 2,
    GIVEN[5] + (GIVEN[6] - GIVEN[5]) / 3,
    GIVEN[5] + (GIVEN[6] - GIVEN[5]) / math.pi,
    0.7,
    0.7 + CLOSE,
]
POINTS = sorted([*GIVEN, *INSIDE])

# Kernels to a part in 1e12, and roots of joint covariances whose condition may be a thousand.
JOINT = 1e3 * KERNEL
# Sums of reads that are up to ten times larger than their sum.
SUMS = {torch.float64: rounding(1e3), torch.float32: rounding(64, dtype=torch.float32)}

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make(sde: LinearSDE, shape: tuple[int, ...] = (5, 3), seed: int = 0, **options: Any) -> Any:
    options = {"dtype": torch.float64, "times": GRID, **options}
    times = options.pop("times")
    return BrownianPath(sde, times, shape, generator=generator(seed), **options)


def both(path: BrownianPath, s: float, t: float) -> torch.Tensor:
    """(Delta W, I) of an interval, ``(B, m + k, *D)``."""
    return torch.cat([path.increment(s, t), path.integral(s, t)], dim=1)


def moved(psi: Array, z: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,bj...->bi...", torch.from_numpy(psi).to(z), z)


def covariance(reference: Dense, s: float, t: float) -> Array:
    """Of (Delta W, I)."""
    root = reference.joint_root(s, t, nodes=30)
    result: Array = root @ root.T
    return result


class Draws:
    """Counts the normals that are drawn, and replaces them with unit vectors if asked to.

    Draws are told apart by their bits.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, units: bool = False) -> None:
        self.calls = 0
        self.seen: dict[bytes, int] = {}
        draw = BrownianPath._draw

        def watched(path: BrownianPath, *args: Any) -> torch.Tensor:
            normals = draw(path, *args)
            self.calls += 1
            rows, numbers = normals.shape
            first = self.seen.setdefault(normals.numpy().tobytes(), rows * len(self.seen))
            if not units:
                return normals
            assert first + rows <= numbers, "more normals than samples"
            unit = torch.zeros_like(normals)
            unit[range(rows), range(first, first + rows)] = 1.0
            return unit

        patch.setattr(BrownianPath, "_draw", watched)


def as_maps(patch: pytest.MonkeyPatch, sde: LinearSDE, **options: Any) -> Any:
    """A path whose reads ``(N, rows)`` are their maps of N independent normals, transposed."""
    Draws(patch, units=True)
    return make(sde, (800,), **options)


def assert_covariance(found: torch.Tensor, expected: Array, tolerance: float = JOINT) -> None:
    """Entries in units of the standard deviations of their rows and columns."""
    size = np.sqrt(np.diag(expected))
    assert (abs(found.numpy() - expected) / np.outer(size, size)).max() <= tolerance


class TestAdditivity:
    """Increments add, and the process carries integrals on."""

    @every_dtype
    @every_process
    def test_parts_add_up_to_the_whole(self, name: str, dtype: torch.dtype) -> None:
        sde, reference = PROCESSES[name]()
        path, m = make(sde, dtype=dtype), reference.Q_root.shape[1]
        for s, r, t in itertools.combinations([*POINTS[::6], POINTS[-1]], 3):
            first, second, whole = (both(path, *ends) for ends in ((s, r), (r, t), (s, t)))
            carried = moved(reference.psi(r, t), first[:, m:])
            parts = torch.cat([first[:, :m], carried], dim=1) + second
            size = max(float(x.abs().max()) for x in (first, second, whole))
            assert (parts - whole).abs().max() <= SUMS[dtype] * size

    @every_process
    def test_evolving_over_a_grid_is_evolving_over_its_ends(self, name: str) -> None:
        sde, reference = PROCESSES[name]()
        path, z = make(sde), start(sde, (5, 3))
        whole = path.evolve(z, POINTS[0], POINTS[-1])
        expected = moved(reference.psi(POINTS[0], POINTS[-1]), z)
        expected = expected + path.integral(POINTS[0], POINTS[-1])
        for s, t in itertools.pairwise(POINTS):
            z = path.evolve(z, s, t)
        size = float(whole.abs().max())
        assert (z - whole).abs().max() <= KERNEL * size
        assert (whole - expected).abs().max() <= KERNEL * size


class TestDistribution:
    """The exact joint distribution of (Delta W, I), and independence of disjoint intervals."""

    @every_process
    def test_disjoint_intervals_are_independent(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, reference = PROCESSES[name]()
        path = as_maps(monkeypatch, sde)
        intervals = list(itertools.pairwise(POINTS[4:]))
        assert min(t - s for s, t in intervals) < 1.01 * CLOSE
        reads = torch.cat([both(path, s, t) for s, t in intervals], dim=1)
        expected = block_diag(*[covariance(reference, s, t) for s, t in intervals])
        assert_covariance(reads.T @ reads, expected)

    @every_process
    def test_intervals_of_many_cells_and_overlaps_have_that_of_the_process(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, reference = PROCESSES[name]()
        path, m = as_maps(monkeypatch, sde), reference.Q_root.shape[1]
        for s, t in itertools.combinations([GIVEN[0], GIVEN[3], INSIDE[2], GIVEN[-1]], 2):
            read = both(path, s, t)
            assert_covariance(read.T @ read, covariance(reference, s, t))
        s, r, t, u = GIVEN[1], INSIDE[0], GIVEN[5], 0.7
        first, second = both(path, s, t), both(path, r, u)
        # Up to its end the first interval has the common part, the second carries it on.
        carry = block_diag(np.eye(m), reference.psi(t, u))
        expected = covariance(reference, r, t) @ carry.T
        sizes = (np.sqrt(np.diag(covariance(reference, *ends))) for ends in ((s, t), (r, u)))
        assert (abs((first.T @ second).numpy() - expected) / np.outer(*sizes)).max() <= JOINT

    def test_increments_alone_have_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = as_maps(monkeypatch, PSLD(), integrals=False)
        intervals = list(itertools.pairwise(POINTS))
        reads = torch.cat([path.increment(s, t) for s, t in intervals], dim=1)
        expected = block_diag(*[(t - s) * np.eye(2) for s, t in intervals])
        assert_covariance(reads.T @ reads, expected, KERNEL)

    @every_dtype
    @pytest.mark.parametrize("name", ["CLD, linear", "HOLD"])
    def test_samples_have_it(self, name: str, dtype: torch.dtype) -> None:
        sde, reference = PROCESSES[name]()
        n = 20_000
        path = make(sde, (n // 2, 2), seed=3, dtype=dtype)
        intervals = [(GIVEN[0], GIVEN[3]), (GIVEN[3], INSIDE[2]), (INSIDE[2], GIVEN[-1])]
        reads = torch.cat([both(path, s, t) for s, t in intervals], dim=1).double()
        root = block_diag(*[reference.joint_root(s, t) for s, t in intervals])
        # All numbers of a batch are independent: samples, and the data axes of one.
        white = np.linalg.solve(root, reads.mT.reshape(n, -1).numpy().T)
        assert (abs(white.mean(1)) <= standard_error(1.0, n)).all()
        error = abs(white @ white.T / n - np.eye(len(white)))
        assert (np.diag(error) <= standard_error_of_variance(1.0, n)).all()
        assert (error - np.diag(np.diag(error)) <= standard_error(1.0, n)).all()
        axes = white.reshape(len(white), n // 2, 2).prod(-1)
        assert (abs(axes.mean(1)) <= standard_error(1.0, n // 2)).all()


class TestBits:
    """The same path, whatever is read of it and in which order."""

    @every_dtype
    @every_process
    def test_they_do_not_depend_on_the_order_of_reading(
        self, name: str, dtype: torch.dtype
    ) -> None:
        sde, _ = PROCESSES[name]()
        given = [(GIVEN[i], GIVEN[j]) for i, j in ((0, 2), (2, 4), (1, 6), (0, 8))]
        alone = {ends: both(make(sde, dtype=dtype), *ends) for ends in given}
        intervals = [*given, *itertools.pairwise(POINTS[5:]), (POINTS[0], INSIDE[1])]
        first, second = make(sde, dtype=dtype), make(sde, dtype=dtype)
        found = {ends: both(first, *ends) for ends in intervals}
        for ends in reversed(intervals):
            assert torch.equal(both(second, *ends), found[ends])
        assert all(torch.equal(found[ends], read) for ends, read in alone.items())

    @pytest.mark.parametrize(("gap", "same"), [(1.0, True), (0.4, False)])
    def test_of_two_times_in_one_of_the_smallest_cells_the_first_is_its_split(
        self, gap: float, same: bool
    ) -> None:
        # As documented: a cell is halved 20 times, and then split at the first time asked for.
        smallest = (GIVEN[6] - GIVEN[5]) / 2**20
        t = GIVEN[5] + 654321.3 * smallest
        u = t + gap * smallest
        first, second = make(CLD()), make(CLD())
        one = [first.increment(GIVEN[0], t), first.increment(GIVEN[0], u)]
        other = [second.increment(GIVEN[0], u), second.increment(GIVEN[0], t)][::-1]
        for path, (early, late) in ((first, one), (second, other)):
            assert (late - early - path.increment(t, u)).abs().max() <= SUMS[torch.float64]
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y) == same
            # Two bridges over the smallest cell, of variance 1 / 4 of it at most.
            assert (x - y).abs().max() <= 5 * math.sqrt(smallest / 2)

    def test_a_solve_in_between_changes_nothing(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:])
        path, other = make(sde), make(sde)
        coarser, finer = GRID[::2], solvers.quadratic_times(1.0, 0.01, 12)
        for solver, grid in ((EM, GRID), (EXPONENTIAL, coarser), (EM, finer), (EM, GRID)):
            found = solvers.solve(process, solver, start(sde, (5, 3)), grid, noise=path).state
            alone = solvers.solve(process, solver, start(sde, (5, 3)), grid, noise=make(sde)).state
            assert torch.equal(found, alone)
        for s, t in itertools.pairwise(GIVEN):
            assert torch.equal(both(path, s, t), both(other, s, t))

    @every_dtype
    def test_a_seed_fixes_them(self, dtype: torch.dtype) -> None:
        before = torch.random.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
        one, same, other = (make(CLD(), seed=seed, dtype=dtype) for seed in (4, 4, 5))
        for s, t in itertools.pairwise(POINTS):
            assert torch.equal(both(one, s, t), both(same, s, t))
            assert (both(one, s, t) != both(other, s, t)).all()
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1]  # noqa: NPY002

    def test_a_generator_gives_one_path_after_another(self) -> None:
        g = generator(4)
        one, two = (BrownianPath(SDE, GRID, (5, 3), generator=g) for _ in range(2))
        assert (both(one, 0.1, 0.9) != both(two, 0.1, 0.9)).all()
        up = BrownianPath(SDE, GRID.flip(0), (5, 3), generator=generator(4))
        assert torch.equal(both(up, 0.1, 0.9), both(one, 0.1, 0.9))

    def test_a_read_is_alone_the_same_and_belongs_to_the_reader(self) -> None:
        (s, t), path = (GIVEN[2], GIVEN[3]), make(SDE)
        expected = both(make(SDE), s, t)
        assert torch.equal(make(SDE).integral(s, t), expected[:, 1:])
        path.increment(s, t).zero_()
        path.integral(s, t).zero_()
        assert torch.equal(both(path, s, t), expected)

    @pytest.mark.parametrize("axes", [(), (1, 4, 4)])
    @every_dtype
    def test_reads_have_the_shape_and_type_asked_for(
        self, axes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        path = make(PSLD(), (6, *axes), dtype=dtype)
        for read in (path.increment(0.1, 0.9), path.integral(0.1, 0.9)):
            assert (read.shape, read.dtype) == ((6, 2, *axes), dtype)


EM, EXPONENTIAL = solvers.EulerMaruyama(), solvers.ExponentialEuler()
INCREMENTS: dict[str, Solver] = {
    "EM": EM,
    "torchsde, heun": solvers.TorchSDE(method="heun"),
    "torchsde, euler_heun": solvers.TorchSDE(method="euler_heun"),
}
INTEGRALS: dict[str, Solver] = {
    "exponential": EXPONENTIAL,
    "reverse diffusion": solvers.ReverseDiffusion(),
}
FOLLOWING = {"euler-maruyama", "stochastic-heun", "exponential-euler", "reverse-diffusion"}
FOLLOWING |= {"torchsde-euler"}
SOLVERS = {**INCREMENTS, "Heun": solvers.StochasticHeun(), **INTEGRALS}
LEVELS = (32, 128)
END = 0.1
# Slopes near their limit: errors c h (1 + d h) between h = 1/32 and 1/128, with d h < 1/4. A wrong
# order is off by a half.
NEAR = 0.25
DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])


def turning() -> LinearSDE:
    """Noise that is dense, turns with time, and has more sources than the state has components."""

    def drift(t: torch.Tensor) -> torch.Tensor:
        first = torch.stack([-1.0 - t, 2.0 + torch.sin(3 * t)])
        return torch.stack([first, torch.stack([-1.0 + t, -2.0 + 0 * t])])

    def diffusion(t: torch.Tensor) -> torch.Tensor:
        c, s = torch.cos(3 * t), torch.sin(3 * t)
        return torch.stack(
            [torch.stack([1 + t, 0.5 * s, 0.4 * c]), torch.stack([0.7 * c - 0.9 * s, 1.2 * c, s])]
        )

    return LinearSDE.from_functions(drift, diffusion, initial_covariance=[[0.0, 0.0], [0.0, 0.1]])


CONVERGING: dict[str, Callable[[], LinearSDE]] = {
    "CLD, linear": lambda: CLD((0.5, 2.0)),
    "PSLD": lambda: PSLD(2.0),
    "turning": turning,
}


def unscored(sde: LinearSDE) -> ReverseProcess:
    return ReverseProcess(sde, lambda z, t: torch.zeros_like(z[:, list(sde.driven)]))


def along(method: str, process: ReverseProcess, path: BrownianPath, n: int) -> torch.Tensor:
    z = start(VPSDE(), (200, 1)).expand(-1, process.sde.components, -1)
    times = solvers.quadratic_times(1.0, END, n)
    solution = solvers.solve(process, SOLVERS[method], z, times, noise=path)
    assert solution.success
    return solution.state


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square."""
    return float((one - other).square().mean().sqrt())


def normals(path: BrownianPath, sde: LinearSDE, solver: Solver, times: torch.Tensor) -> NoiseSource:
    """The source that a solver's steps over a grid get from a path."""
    process = ReverseProcess(sde, untouchable)
    return path.along(sde, times, lambda: solver.path_noise(process, times))


def order(errors: list[float]) -> float:
    return math.log(errors[0] / errors[1]) / math.log(LEVELS[1] / LEVELS[0])


class TestSolving:
    """Solvers follow one path on every grid."""

    @pytest.mark.parametrize("name", list(CONVERGING))
    def test_all_converge_to_the_same_path_at_order_one(self, name: str) -> None:
        sde = CONVERGING[name]()
        process = ReverseProcess(sde, DATA.score(sde))
        path = make(sde, (200, 1), times=solvers.quadratic_times(1.0, END, 2 * LEVELS[-1]))
        finest = along("Heun", process, path, 2 * LEVELS[-1])
        for method in SOLVERS if name != "turning" else ("EM", "exponential"):
            errors = [distance(along(method, process, path, n), finest) for n in LEVELS]
            assert abs(order(errors) - 1) <= NEAR, (method, errors)
            assert errors[-1] < 0.15 * float(finest.std()), (method, errors)

    def test_increments_are_the_normals_of_these_solvers(self) -> None:
        sde = turning()
        path, m = make(sde), sde.diffusion(0.5).shape[-1]
        z = start(VPSDE(), (5, 3)).expand(-1, 2, -1)
        for solver in INCREMENTS.values():
            noise = normals(path, sde, solver, GRID)
            for t, u in itertools.pairwise(GRID.tolist()):
                expected = path.increment(u, t) / math.sqrt(t - u)
                assert (noise.normal(z, m) - expected).abs().max() <= SUMS[torch.float64]

    def test_a_solver_may_use_increments_and_integrals_together(self) -> None:
        sde, steps = PSLD(), len(GRID) - 1
        path = make(sde)
        functional = torch.randn(2, steps, 3, 2, generator=generator(), dtype=torch.float64)
        noise = path.along(sde, GRID, lambda: PathNoise(functional[0], functional[1]))
        for a, b, (t, u) in zip(*functional, itertools.pairwise(GRID.tolist()), strict=True):
            expected = moved(a.numpy(), path.increment(u, t))
            expected = expected + moved(b.numpy(), path.integral(u, t))
            found = noise.normal(start(sde, (5, 3)), 3)
            assert (found - expected).abs().max() <= SUMS[torch.float64]

    @pytest.mark.parametrize("method", list(INTEGRALS))
    @every_process
    def test_integrals_are_the_noise_of_these_solvers(self, name: str, method: str) -> None:
        sde, reference = PROCESSES[name]()
        process, path = ReverseProcess(sde, untouchable), make(sde)
        solver: Any = INTEGRALS[method]
        noise = normals(path, sde, solver, GRID)
        roots = solver.prepare(process, GRID).stages[0].noise
        z = start(sde, (5, 3))
        for root, (t, u) in zip(roots, itertools.pairwise(GRID.tolist()), strict=True):
            xi = noise.normal(z, len(root[0]))
            expected = path.integral(u, t)
            if method == "exponential":
                expected = moved(reference.psi(t, u), expected)
            # Each row relative to its own size.
            error = (moved(np.array(root), xi) - expected).abs().amax((0, 2))
            assert (error <= JOINT * expected.abs().amax((0, 2))).all()

    @pytest.mark.parametrize("method", ["EM", "Heun", "exponential", "reverse diffusion"])
    @every_process
    def test_normals_of_a_solver_are_normal(
        self, name: str, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, _ = PROCESSES[name]()
        solver: Any = SOLVERS[method]
        process, path = ReverseProcess(sde, untouchable), as_maps(monkeypatch, sde)
        rows = solver.path_noise(process, GRID).increment.shape[1]
        noise = normals(path, sde, solver, GRID)
        like = torch.zeros(800, sde.components, dtype=torch.float64)
        reads = torch.cat([noise.normal(like, rows) for _ in range(len(GRID) - 1)], dim=1)
        assert (reads.T @ reads - torch.eye(reads.shape[1])).abs().max() <= JOINT

    def test_increments_alone_and_single_precision_are_taken(self) -> None:
        process, z = ReverseProcess(SDE, DATA.score(SDE)), start(SDE, (5, 1))
        whole, alone = (
            solvers.solve(process, EM, z, GRID, noise=make(SDE, (5, 1), integrals=integrals)).state
            for integrals in (True, False)
        )
        assert (whole != alone).all()  # normals of increments are other ones without integrals
        single = solvers.solve(process, EM, z.float(), GRID, noise=make(SDE, (5, 1))).state
        assert single.dtype == torch.float32
        error = (single - whole).abs().max() / whole.abs().max()
        assert error <= rounding(256, dtype=torch.float32)


class TestCost:
    """Normals are drawn once for each part of the path that is read."""

    @pytest.mark.parametrize("n", [1, 2, 7, 64])
    @pytest.mark.parametrize("method", ["EM", "exponential"])
    def test_a_walk_along_the_given_grid_draws_once_per_step(
        self, method: str, n: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, sde = Draws(monkeypatch), CLD()
        times = solvers.quadratic_times(1.0, 0.01, n)
        path, z = make(sde, times=times), start(sde, (5, 3))
        solvers.solve(unscored(sde), SOLVERS[method], z, times, noise=path)
        assert draws.calls == len(draws.seen) == n
        # A second walk draws the same normals again: the path keeps the last pair of each depth.
        solvers.solve(unscored(sde), SOLVERS[method], z, times, noise=path)
        assert len(draws.seen) == n
        assert draws.calls <= 2 * n

    @pytest.mark.parametrize("direction", [1, -1])
    def test_a_walk_off_the_given_times_draws_once_per_split(
        self, direction: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, path = Draws(monkeypatch), make(CLD())
        walk = itertools.pairwise(solvers.quadratic_times(1.0, 0.01, 12).flip(0).tolist())
        for s, t in list(walk)[::direction]:
            path.increment(s, t)
        # Nodes of one interval are read as solvers walk, so that a walk up may read each twice.
        assert draws.calls <= len(draws.seen) * (1 if direction == -1 else 2)

    def test_a_coarser_walk_draws_no_more_than_it_needs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, path = Draws(monkeypatch), make(SDE, times=solvers.uniform_times(1.0, 0.0, 64))
        for s, t in itertools.pairwise(torch.linspace(0, 1, 17).tolist()):
            path.increment(s, t)
        assert draws.calls == len(draws.seen) == 16  # no two are the same

    def test_a_time_off_the_grid_costs_some_twenty_draws(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, path = Draws(monkeypatch), make(CLD(), times=torch.tensor([0.0, 1.0]))
        path.increment(0.0, 1 / 3)
        assert draws.calls == 22  # the whole, twenty halvings, and the time itself
        path.increment(0.0, 0.625)
        assert len(draws.seen) <= 22 + 3


PATH, SHORT = make(SDE), make(SDE, integrals=False)
NEEDS = "needs a BrownianPath with integrals=True"
OUTSIDE = "an interval of the path must have"


def path_of(process: Any = SDE, times: Any = GRID, shape: Any = (3,)) -> BrownianPath:
    return BrownianPath(process, torch.as_tensor(times), shape)


def solved(solver: Any = EM, path: Any = PATH, sde: LinearSDE = SDE, **change: Any) -> Any:
    arguments = {"state": start(sde, (5, 3)), "times": GRID, **change}
    return solvers.solve(ReverseProcess(sde, untouchable), solver, noise=path, **arguments)


class TestBadArguments:
    """Rejected before any score is evaluated."""

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: path_of(times=[1.0, 0.5, 0.7]), ValueError, "times"),
            (lambda: path_of(times=[0.3]), ValueError, "times"),
            (lambda: path_of(times=[1.1, 0.5]), ValueError, "times"),
            (lambda: path_of(times=[0.1, math.nan]), ValueError, "times"),
            (lambda: path_of(shape=()), ValueError, "shape must be"),
            (lambda: path_of(shape=(3, -2)), ValueError, "shape must be"),
            (lambda: path_of("CLD"), TypeError, "LinearSDE"),
            (lambda: PATH.increment(0.005, 0.5), ValueError, OUTSIDE),
            (lambda: PATH.integral(0.5, 1.001), ValueError, OUTSIDE),
            (lambda: PATH.increment(0.5, 0.4), ValueError, OUTSIDE),
            (lambda: PATH.integral(0.5, 0.5), ValueError, OUTSIDE),
            (lambda: PATH.increment(0.1, math.nan), ValueError, OUTSIDE),
            (lambda: PATH.evolve(start(SDE, (5, 3)), 0.5, 0.4), ValueError, "must"),
            (lambda: solved(times=torch.tensor([1.0, 0.5, 0.001])), ValueError, OUTSIDE),
            # Even one of the same matrices: it is another object, and cheap to pass on.
            (lambda: solved(sde=CLD()), ValueError, "noise is a BrownianPath of another process"),
            (lambda: SHORT.integral(0.1, 0.5), ValueError, NEEDS),
            (lambda: SHORT.evolve(start(SDE, (5, 3)), 0.1, 0.5), ValueError, NEEDS),
            (lambda: solved(EXPONENTIAL, SHORT), ValueError, NEEDS),
            (lambda: make(SDE).normal(start(SDE), 1), RuntimeError, r"pass it to solve\(\.\.\., n"),
            (lambda: solved(generator=generator()), ValueError, "alternatives"),
        ],
    )
    def test_bad_arguments_are_rejected(
        self, call: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            call()

    @pytest.mark.parametrize("name", [x for x in solvers.named_solvers() if x[:3] != "edm"])
    def test_solvers_follow_a_path_or_say_that_they_do_not(self, name: str) -> None:
        solver = solvers.named_solvers()[name]
        if name in FOLLOWING:
            z = start(SDE, (5, 3))
            assert solvers.solve(unscored(SDE), solver, z, GRID, noise=PATH).success
        else:
            with pytest.raises(ValueError, match=r"^noise must not be a BrownianPath"):
                solved(solver)

    @pytest.mark.parametrize("shape", [(4, 3), (5, 2), (5,), (5, 3, 1), (1, 3), (5, 1)])
    def test_states_of_another_shape_are_rejected(self, shape: tuple[int, ...]) -> None:
        for solver in SOLVERS.values():
            with pytest.raises(ValueError, match="noise must have shape"):
                solved(solver, state=start(SDE, shape))


class TestMemoryOfPairs:
    """A path writes halves over older ones, which nobody may notice."""

    TIMES = solvers.uniform_times(1.0, 1e-3, 16)

    def reads(self, path: BrownianPath) -> list[torch.Tensor]:
        ends = self.TIMES.flip(0).tolist()
        return [path.integral(s, t) for s, t in itertools.pairwise(ends)]

    def path(self, **options: Any) -> BrownianPath:
        return make(CLD(), (300, 3), times=self.TIMES, **options)

    def same(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))

    def test_reads_stay(self) -> None:
        path = self.path()
        found = self.reads(path)
        kept = [x.clone() for x in found]
        self.reads(path)
        assert self.same(found, kept)

    @pytest.mark.parametrize("at", [0, 3, 10, 31])
    def test_an_interruption_leaves_nothing_behind(
        self, at: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted, path, asked = self.reads(self.path()), self.path(), 0
        add = torch.Tensor.addmm_

        def interrupted(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal asked
            asked += 1
            if asked == at + 1:
                raise KeyboardInterrupt
            return add(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "addmm_", interrupted)
            for _ in range(3):
                with contextlib.suppress(KeyboardInterrupt):
                    self.reads(path)
        assert asked > at
        assert self.same(self.reads(path), wanted)

    def test_threads_may_share_a_path(self) -> None:
        path, wanted = self.path(), self.reads(self.path())
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: self.reads(path), range(6)))
        assert all(self.same(reads, wanted) for reads in found)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_and_a_path_from_inference_mode_are_the_same_path(self, copied: Any) -> None:
        path = self.path()
        with torch.inference_mode():
            wanted = [x.clone() for x in self.reads(path)]
        assert self.same(self.reads(path), wanted)
        assert self.same(self.reads(copied(path)), wanted)

    @pytest.mark.parametrize("precision", ["medium", "none for all backends", "autocast"])
    def test_products_that_round_are_not_taken(
        self, precision: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown() -> str:
            raise RuntimeError("mix of interfaces")

        wanted = self.reads(self.path(dtype=torch.float32))
        answer = unknown if precision.startswith("none") else lambda: "medium"
        if precision != "autocast":
            monkeypatch.setattr(torch, "get_float32_matmul_precision", answer)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", None)
            with torch.autocast("cpu", enabled=precision == "autocast"):
                found = self.reads(self.path(dtype=torch.float32))
        for x, y in zip(found, wanted, strict=True):
            assert (x - y).abs().max() <= SUMS[torch.float32] * float(y.abs().max())
