"""A Brownian path: its law, its bits, and what solvers make of it.

What the path returns is a linear map of independent standard normals. `as_maps` puts unit vectors
in the place of those, one a sample, so that a read is the map itself and products of reads are
exact covariances: no Monte Carlo. References follow from the matrices of the processes, with
scipy's exponential or mpmath's.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, expm

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

Array = np.ndarray[Any, np.dtype[np.float64]]

DIGITS = 60


class Reference(NamedTuple):
    """F = beta A and G = sqrt(beta) root, with the clock of beta, the joint law of (Delta W, I)."""

    A: Array
    root: Array
    clock: Callable[[Any, Any], Any]
    covariance: Callable[[float, float], Array]

    def psi(self, s: float, t: float) -> Array:
        result: Array = expm(self.A * float(self.clock(s, t)))
        return result


def constant(A: Any, root: Any, rate: float) -> Reference:
    """Van Loan's block exponential for the state (w, z), in many digits."""
    A, root = np.array(A, dtype=float), np.array(root, dtype=float)
    k, m = root.shape

    def covariance(s: float, t: float) -> Array:
        drift = block_diag(np.zeros((m, m)), rate * A)
        with mp.workdps(DIGITS):
            scaled = mp.sqrt(rate) * mp.matrix(root.tolist())
            noise = mp.matrix(m + k, m)
            for j in range(m):
                noise[j, j] = 1
                for i in range(k):
                    noise[m + i, j] = scaled[i, j]
            n, h = m + k, mp.mpf(t) - mp.mpf(s)
            F, Q = mp.matrix(drift.tolist()), noise * noise.T
            doubled = mp.matrix(2 * n)
            doubled[:n, :n], doubled[:n, n:], doubled[n:, n:] = -F * h, Q * h, F.T * h
            flow = mp.expm(doubled)
            law = flow[n:, n:].T * flow[:n, n:]
            return np.array([[float(x) for x in row] for row in law.tolist()])

    return Reference(A, root, lambda s, t: rate * (t - s), covariance)


def by_quadrature(
    A: Any, root: Any, rate: Any, clock: Any, column: Callable[[Any], list[Any]]
) -> Reference:
    """One column of noise, with Psi(t, tau) root = ``column`` of the clock in closed form."""

    def covariance(s: float, t: float) -> Array:
        with mp.workdps(20):
            s_, t_ = mp.mpf(s), mp.mpf(t)

            def rows(tau: Any) -> list[Any]:
                return [1, *(mp.sqrt(rate(tau)) * x for x in column(clock(tau, t_)))]

            size = 1 + len(A)
            law = np.zeros((size, size))
            for i, j in itertools.combinations_with_replacement(range(size), 2):
                law[i, j] = mp.quad(lambda u, i=i, j=j: rows(u)[i] * rows(u)[j], [s_, t_])
            return law + np.triu(law, 1).T

    return Reference(np.array(A, dtype=float), np.array(root, dtype=float), clock, covariance)


def linear_langevin(low: float, high: float) -> Reference:
    """Critical damping: A + 2 is nilpotent, so that e^(A c) = e^(-2 c) (1 + (A + 2) c)."""
    slope = high - low
    return by_quadrature(
        [[0, 4], [-1, -4]],
        [[0], [math.sqrt(2)]],
        lambda t: low + slope * t,
        lambda s, t: (t - s) * (low + slope * (s + t) / 2),
        lambda c: [4 * c * mp.exp(-2 * c) * mp.sqrt(2), (1 - 2 * c) * mp.exp(-2 * c) * mp.sqrt(2)],
    )


def geometric(low: float, high: float) -> Reference:
    """The variance low^2 (high / low)^(2 t)."""
    r = mp.log(mp.mpf(high) / mp.mpf(low))
    return by_quadrature(
        [[0]],
        [[1]],
        lambda t: 2 * r * (low * mp.exp(r * t)) ** 2,
        lambda s, t: low**2 * mp.exp(2 * r * s) * mp.expm1(2 * r * (t - s)),
        lambda c: [1],
    )


HOLD_G, HOLD_XI = 2 * math.sqrt(2), 3 * math.sqrt(3)
PROCESSES: dict[str, Callable[[], tuple[LinearSDE, Reference]]] = {
    "VP": lambda: (VPSDE(8.0, 8.0), constant([[-0.5]], [[1]], 8.0)),
    "VE": lambda: (VESDE(0.1, 5.0), geometric(0.1, 5.0)),
    "CLD": lambda: (CLD(), constant([[0, 4], [-1, -4]], [[0], [math.sqrt(2)]], 4.0)),
    "PSLD": lambda: (
        PSLD(),
        constant([[-0.005, 2], [-0.5, -2.005]], [[0.1, 0], [0, math.sqrt(0.25 * 4.01)]], 8.0),
    ),
    "HOLD": lambda: (
        HOLD(),
        constant(
            [[0, 1, 0], [-1, 0, HOLD_G], [0, -HOLD_G, -HOLD_XI]],
            [[0], [0], [math.sqrt(2 * HOLD_XI)]],
            4.0,
        ),
    ),
    "CLD, linear": lambda: (CLD((1.0, 7.0)), linear_langevin(1.0, 7.0)),
}
GRID = solvers.quadratic_times(1.0, 0.01, 8)
GIVEN = GRID.flip(0).tolist()

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


class Draws:
    """Counts the normals that are drawn, and replaces them with unit vectors if asked to.

    Which normals they are is told by their bits, not by who asks for them.
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


def assert_covariance(found: torch.Tensor, expected: Array, tolerance: float) -> None:
    """Entries in units of the standard deviations of their rows and columns."""
    size = np.sqrt(np.diag(expected))
    error = abs(found.numpy() - expected) / np.outer(size, size)
    assert error.max() <= tolerance


# Off the given times: halves, thirds, irrational ones, and pairs that are close.
CLOSE = 1e-6
INSIDE = [
    (GIVEN[2] + GIVEN[3]) / 2,
    GIVEN[5] + (GIVEN[6] - GIVEN[5]) / 3,
    GIVEN[5] + (GIVEN[6] - GIVEN[5]) / math.pi,
    0.7,
    0.7 + CLOSE,
    GIVEN[4] + CLOSE,
]
POINTS = sorted([*GIVEN, *INSIDE])


class TestAdditivity:
    """Increments add, and integrals are carried on by the process."""

    @every_dtype
    @every_process
    def test_parts_make_up_the_whole(self, name: str, dtype: torch.dtype) -> None:
        sde, reference = PROCESSES[name]()
        path = make(sde, dtype=dtype)
        # Roundings of reads whose terms are up to a few times larger than they are.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        chosen = [*POINTS[::4], INSIDE[1]]
        for s, r, t in itertools.combinations(sorted({*chosen, POINTS[-1]}), 3):
            first, second, whole = (both(path, *ends) for ends in ((s, r), (r, t), (s, t)))
            m = reference.root.shape[1]
            dW = first[:, :m] + second[:, :m]
            carried = moved(reference.psi(r, t), first[:, m:])
            size = max(float(x.abs().max()) for x in (first, second, whole))
            assert (dW - whole[:, :m]).abs().max() <= tolerance * size
            assert (carried + second[:, m:] - whole[:, m:]).abs().max() <= tolerance * size

    @every_process
    def test_many_parts_do_so_too(self, name: str) -> None:
        sde, reference = PROCESSES[name]()
        path = make(sde)
        dW = torch.zeros(5, reference.root.shape[1], 3, dtype=torch.float64)
        z = torch.zeros(5, len(reference.A), 3, dtype=torch.float64)
        for s, t in itertools.pairwise(POINTS):
            dW = dW + path.increment(s, t)
            z = moved(reference.psi(s, t), z) + path.integral(s, t)
        assert (dW - path.increment(POINTS[0], POINTS[-1])).abs().max() <= 1e-12
        # States of VE are up to 5 times a few.
        assert (z - path.integral(POINTS[0], POINTS[-1])).abs().max() <= 1e-11

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
        assert (z - whole).abs().max() <= 1e-12 * size
        assert (whole - expected).abs().max() <= 1e-12 * size


class TestLaw:
    """The exact joint law of (Delta W, I), and independence of disjoint intervals."""

    @every_process
    def test_over_disjoint_intervals_it_is_that_of_independent_ones(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, reference = PROCESSES[name]()
        path = as_maps(monkeypatch, sde)
        intervals = list(itertools.pairwise(POINTS[4:]))
        assert min(t - s for s, t in intervals) < 1.01 * CLOSE
        reads = torch.cat([both(path, s, t) for s, t in intervals], dim=1)
        expected = block_diag(*[reference.covariance(s, t) for s, t in intervals])
        # Kernels to 1e-12 of a row, and reads that the roots' condition may make a hundredfold.
        assert_covariance(reads.T @ reads, expected, 1e-9)

    @every_process
    def test_over_intervals_of_many_cells_it_is_that_of_the_process(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, reference = PROCESSES[name]()
        path = as_maps(monkeypatch, sde)
        chosen = [GIVEN[0], GIVEN[3], GIVEN[-1], *INSIDE[2:4]]
        for s, t in itertools.combinations(sorted(set(chosen)), 2):
            read = both(path, s, t)
            assert_covariance(read.T @ read, reference.covariance(s, t), 1e-9)

    @every_process
    def test_overlapping_intervals_share_what_they_have_in_common(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, reference = PROCESSES[name]()
        path = as_maps(monkeypatch, sde)
        m = reference.root.shape[1]
        s, r, t, u = GIVEN[1], INSIDE[0], GIVEN[5], 0.7
        first, second = both(path, s, t), both(path, r, u)
        # Up to its end the first interval has the common part, the second carries it on.
        carry = block_diag(np.eye(m), reference.psi(t, u))
        expected = reference.covariance(r, t) @ carry.T
        sizes = (np.sqrt(np.diag(reference.covariance(*ends))) for ends in ((s, t), (r, u)))
        error = abs((first.T @ second).numpy() - expected) / np.outer(*sizes)
        assert error.max() <= 1e-9

    @every_process
    def test_evolving_from_the_data_gives_the_marginal(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, _ = PROCESSES[name]()
        times = solvers.uniform_times(1.0, 0.0, 5)
        path = as_maps(monkeypatch, sde, times=times)
        # The last samples stand for the normals of the auxiliary components.
        k = sde.components
        z = torch.zeros(800, k, dtype=torch.float64)
        z[-k:] = sde.initial_root.mT
        at = 0.0
        for t in (0.13, *times.flip(0)[1:].tolist()):
            if t <= at:
                continue
            z, at = path.evolve(z, at, t), t
            assert_covariance(z.T @ z, sde.marginal(t).covariance.numpy(), 1e-9)
        assert at == 1.0

    def test_increments_alone_have_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = as_maps(monkeypatch, PSLD(), integrals=False)
        intervals = list(itertools.pairwise(POINTS))
        reads = torch.cat([path.increment(s, t) for s, t in intervals], dim=1)
        expected = block_diag(*[(t - s) * np.eye(2) for s, t in intervals])
        assert_covariance(reads.T @ reads, expected, 1e-12)

    @every_dtype
    @pytest.mark.parametrize("name", ["VE", "CLD, linear", "HOLD"])
    def test_samples_have_it(self, name: str, dtype: torch.dtype) -> None:
        sde, reference = PROCESSES[name]()
        n = 20_000
        path = make(sde, (n // 2, 2), seed=3, dtype=dtype)
        intervals = [(GIVEN[0], GIVEN[3]), (GIVEN[3], INSIDE[2]), (INSIDE[2], GIVEN[-1])]
        reads = torch.cat([both(path, s, t) for s, t in intervals], dim=1).double()
        covariance = block_diag(*[reference.covariance(s, t) for s, t in intervals])
        # All numbers of a batch are independent: samples, and the data axes of one.
        white = np.linalg.solve(np.linalg.cholesky(covariance), reads.mT.reshape(n, -1).numpy().T)
        assert (abs(white.mean(1)) <= 4 / math.sqrt(n)).all()
        error = abs(white @ white.T / n - np.eye(len(white)))
        assert (np.diag(error) <= 4 * math.sqrt(2 / n)).all()
        assert (error - np.diag(np.diag(error)) <= 4 / math.sqrt(n)).all()
        axes = white.reshape(len(white), n // 2, 2)
        assert (abs((axes[..., 0] * axes[..., 1]).mean(1)) <= 4 / math.sqrt(n // 2)).all()

    def test_no_two_draws_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Unit vectors are told apart by the bits of the normals that they stand for.
        draws = Draws(monkeypatch)
        path = make(CLD(), times=solvers.uniform_times(1.0, 0.0, 64))
        for s, t in itertools.pairwise(torch.linspace(0, 1, 65, dtype=torch.float64).tolist()):
            both(path, s, t)
        assert len(draws.seen) == 64


class TestBits:
    """The same path, whatever is asked of it and in which order."""

    @every_dtype
    @every_process
    def test_they_do_not_depend_on_the_order_of_asking(self, name: str, dtype: torch.dtype) -> None:
        sde, _ = PROCESSES[name]()
        intervals = [*itertools.pairwise(GIVEN[::2]), (GIVEN[0], GIVEN[-1])]
        intervals += [(GIVEN[i], GIVEN[j]) for i, j in ((1, 6), (3, 7), (0, 5))]
        expected = {ends: both(make(sde, dtype=dtype), *ends) for ends in intervals}
        first, second = make(sde, dtype=dtype), make(sde, dtype=dtype)
        for ends in intervals:
            assert torch.equal(both(first, *ends), expected[ends])
        # After other queries, too.
        for s, t in itertools.pairwise(POINTS[::2]):
            both(second, s, t)
        for ends in intervals[::-1]:
            assert torch.equal(both(second, *ends), expected[ends])

    @every_process
    def test_off_the_given_times_they_do_not_either(self, name: str) -> None:
        sde, _ = PROCESSES[name]()
        intervals = [*itertools.pairwise(POINTS[3:]), (POINTS[0], INSIDE[1]), (INSIDE[2], 0.7)]
        first, second = make(sde), make(sde)
        found = [both(first, *ends) for ends in intervals]
        again = [both(second, *ends) for ends in intervals[::-1]][::-1]
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one, other)

    def test_of_a_path_that_is_asked_for_nothing_else_they_are_the_same(self) -> None:
        sde = HOLD()
        intervals = list(itertools.combinations(sorted([*GIVEN[::4], 0.1, 0.3, 0.31, 0.9]), 2))
        path = make(sde)
        for ends in intervals:
            assert torch.equal(both(path, *ends), both(make(sde), *ends))

    @pytest.mark.parametrize(("gap", "same"), [(1.0, True), (0.4, False)])
    def test_of_two_times_in_one_of_the_smallest_cells_the_first_is_its_split(
        self, gap: float, same: bool
    ) -> None:
        # As documented: a cell is halved 20 times, and then split where it is asked for.
        smallest = (GIVEN[6] - GIVEN[5]) / 2**20
        t = GIVEN[5] + 654321.3 * smallest
        u = t + gap * smallest
        first, second = make(CLD()), make(CLD())
        one = [first.increment(GIVEN[0], t), first.increment(GIVEN[0], u)]
        other = [second.increment(GIVEN[0], u), second.increment(GIVEN[0], t)][::-1]
        for path, (early, late) in ((first, one), (second, other)):
            assert torch.allclose(late - early, path.increment(t, u), rtol=0, atol=1e-12)
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y) == same
            # Two bridges over the smallest cell, of variance 1 / 4 of it at most.
            assert (x - y).abs().max() <= 5 * math.sqrt(smallest / 2)

    def test_integrals_and_increments_may_be_asked_for_alone(self) -> None:
        sde, (s, t) = CLD(), (GIVEN[1], INSIDE[1])
        together = both(make(sde), s, t)
        assert torch.equal(make(sde).integral(s, t), together[:, 1:])
        assert torch.equal(make(sde).increment(s, t), together[:, :1])

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
    def test_they_are_those_of_the_seed(self, dtype: torch.dtype) -> None:
        one, same, other = (make(CLD(), seed=seed, dtype=dtype) for seed in (4, 4, 5))
        for s, t in itertools.pairwise(POINTS):
            assert torch.equal(both(one, s, t), both(same, s, t))
            assert (both(one, s, t) != both(other, s, t)).all()

    def test_a_generator_gives_one_path_after_another(self) -> None:
        g = generator(4)
        one, two = (BrownianPath(CLD(), GRID, (5, 3), generator=g) for _ in range(2))
        assert (both(one, 0.1, 0.9) != both(two, 0.1, 0.9)).all()

    def test_the_direction_of_the_times_does_not_matter(self) -> None:
        down, up = make(CLD()), make(CLD(), times=GRID.flip(0))
        assert torch.equal(both(down, 0.1, 0.9), both(up, 0.1, 0.9))

    def test_no_global_generator_is_touched(self) -> None:
        before = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
        both(make(CLD()), 0.1, 0.9)
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert str(np.random.get_state()) == str(before[1])  # noqa: NPY002

    def test_what_is_read_is_the_readers(self) -> None:
        path = make(CLD())
        expected = both(make(CLD()), GIVEN[2], GIVEN[3])
        for _ in range(2):
            path.increment(GIVEN[2], GIVEN[3]).zero_()
            path.integral(GIVEN[2], GIVEN[3]).zero_()
        assert torch.equal(both(path, GIVEN[2], GIVEN[3]), expected)

    @pytest.mark.parametrize("axes", [(), (2,), (1, 4, 4)])
    @every_dtype
    def test_reads_have_the_shape_and_type_asked_for(
        self, axes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        path = make(PSLD(), (6, *axes), dtype=dtype)
        assert path.increment(0.1, 0.9).shape == path.integral(0.1, 0.9).shape == (6, 2, *axes)
        assert path.increment(0.1, 0.9).dtype == path.integral(0.1, 0.9).dtype == dtype


EM, EXPONENTIAL = solvers.EulerMaruyama(), solvers.ExponentialEuler()
INCREMENTS: dict[str, Solver] = {
    "EM": EM,
    "torchsde, euler": solvers.TorchSDE(method="euler"),
    "torchsde, heun": solvers.TorchSDE(method="heun"),
    "torchsde, midpoint": solvers.TorchSDE(method="midpoint"),
    "torchsde, euler_heun": solvers.TorchSDE(method="euler_heun"),
}
INTEGRALS: dict[str, Solver] = {
    "exponential": EXPONENTIAL,
    "reverse diffusion": solvers.ReverseDiffusion(),
}
SOLVERS = {**INCREMENTS, "Heun": solvers.StochasticHeun(), **INTEGRALS}
LEVELS = (32, 64, 128)
FINEST = 512
END = 0.1
# Orders are near their limit, and one that is off by a half is more than this away.
NEAR = 0.25
DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])

every_solver = pytest.mark.parametrize("method", list(SOLVERS))


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
    "VP": lambda: VPSDE(1.0, 5.0),
    "CLD, linear": lambda: CLD((0.5, 2.0)),
    "PSLD": lambda: PSLD(2.0),
    "turning": turning,
}


def along(method: str, process: ReverseProcess, path: BrownianPath, n: int) -> torch.Tensor:
    z = start(VPSDE(), (200, 1)).expand(-1, process.sde.components, -1)
    times = solvers.quadratic_times(1.0, END, n)
    solution = solvers.solve(process, SOLVERS[method], z, times, noise=path)
    assert solution.success
    return solution.state


def normals(path: BrownianPath, sde: LinearSDE, solver: Solver, times: torch.Tensor) -> NoiseSource:
    """The source that a solver's steps over a grid get from a path."""
    process = ReverseProcess(sde, untouchable)
    return path.along(sde, times, lambda: solver.path_noise(process, times))


def order(errors: list[float]) -> float:
    return float(-np.polyfit(np.log(LEVELS[: len(errors)]), np.log(errors), 1)[0])


class TestSolving:
    """Solvers follow one path on every grid."""

    @pytest.mark.parametrize("name", list(CONVERGING))
    def test_all_converge_to_the_same_path_at_order_one(self, name: str) -> None:
        sde = CONVERGING[name]()
        process = ReverseProcess(sde, DATA.score(sde))
        path = make(sde, (200, 1), times=solvers.quadratic_times(1.0, END, FINEST))
        finest = along("Heun", process, path, FINEST)
        spread = float(finest.std())
        for method in SOLVERS:
            errors = [
                float((along(method, process, path, n) - finest).square().mean().sqrt())
                for n in LEVELS
            ]
            assert abs(order(errors) - 1) <= NEAR, (method, errors)
            assert errors[-1] < 0.15 * spread, (method, errors)

    @pytest.mark.parametrize("name", ["PSLD", "turning"])
    def test_without_a_score_the_path_is_known(self, name: str) -> None:
        sde = CONVERGING[name]()
        process = ReverseProcess(sde, lambda z, t: torch.zeros_like(z[:, list(sde.driven)]))
        path = make(sde, (200, 1), times=solvers.quadratic_times(1.0, END, LEVELS[-1]))
        z = start(VPSDE(), (200, 1)).expand(-1, sde.components, -1)
        psi = sde.transition(END, 1.0).mean
        exact = torch.einsum("ij,bjd->bid", torch.linalg.inv(psi), z + path.integral(END, 1.0))
        for method in SOLVERS:
            found = [along(method, process, path, n) for n in LEVELS]
            errors = [float((x - exact).square().mean().sqrt()) for x in found]
            if method == "exponential":
                assert max(errors) <= 1e-10 * float(exact.abs().max())
            else:
                assert abs(order(errors) - 1) <= NEAR, (method, errors)

    @every_process
    def test_exponential_euler_without_a_score_goes_back_where_the_process_came_from(
        self, name: str
    ) -> None:
        sde, reference = PROCESSES[name]()
        process = ReverseProcess(sde, lambda z, t: torch.zeros_like(z[:, list(sde.driven)]))
        path, z = make(sde), start(sde, (5, 3))
        solution = solvers.solve(process, EXPONENTIAL, z, GRID, noise=path, t_eval=GRID[1:])
        for t, y in zip(solution.t.tolist(), solution.y, strict=True):
            # The noise of the reverse SDE is added in its direction: of the process it is -w.
            again = moved(reference.psi(t, 1.0), y) - path.integral(t, 1.0)
            assert (again - z).abs().max() <= 1e-11 * float(z.abs().max())

    @pytest.mark.parametrize("name", ["CLD, linear", "turning", "PSLD"])
    def test_increments_are_the_normals_of_these_solvers(self, name: str) -> None:
        sde = CONVERGING[name]()
        path, times = make(sde), solvers.quadratic_times(1.0, 0.02, 6)
        z, m = start(VPSDE(), (5, 3)).expand(-1, 2, -1), sde.diffusion(0.5).shape[-1]
        for solver in INCREMENTS.values():
            noise = normals(path, sde, solver, times)
            for t, u in itertools.pairwise(times.tolist()):
                expected = path.increment(u, t) / math.sqrt(t - u)
                assert torch.allclose(noise.normal(z, m), expected, rtol=0, atol=1e-12)

    def test_a_solver_may_use_increments_and_integrals_together(self) -> None:
        sde, steps = PSLD(), len(GRID) - 1
        path = make(sde)
        functional = torch.randn(2, steps, 3, 2, generator=generator(), dtype=torch.float64)
        noise = path.along(sde, GRID, lambda: PathNoise(functional[0], functional[1]))
        for a, b, (t, u) in zip(*functional, itertools.pairwise(GRID.tolist()), strict=True):
            expected = moved(a.numpy(), path.increment(u, t)) + moved(
                b.numpy(), path.integral(u, t)
            )
            # Roundings of sums of eight numbers.
            found = noise.normal(start(sde, (5, 3)), 3)
            assert torch.allclose(found, expected, rtol=0, atol=1e-13)

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
                expected = moved(np.linalg.inv(reference.psi(u, t)), expected)
            # Each row to rounding of its own size.
            error = (moved(np.array(root), xi) - expected).abs().amax((0, 2))
            assert (error <= 1e-10 * expected.abs().amax((0, 2))).all()

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
        # The solver's root is not that of the path: two factorisations of one covariance.
        assert (reads.T @ reads - torch.eye(reads.shape[1])).abs().max() <= 1e-9

    def test_a_grid_finer_than_the_given_one_is_met(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, DATA.score(sde))
        path = make(sde, (200, 1), times=torch.tensor([1.0, 0.4, END], dtype=torch.float64))
        finest = along("Heun", process, path, 64)
        errors = [
            float((along("EM", process, path, n) - finest).square().mean().sqrt()) for n in (16, 32)
        ]
        assert 1.5 < errors[0] / errors[1] < 2.8

    def test_without_integrals_solvers_of_increments_work(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, DATA.score(sde))
        path = make(sde, (200, 1), times=solvers.quadratic_times(1.0, END, 512), integrals=False)
        finest = along("Heun", process, path, 512)
        for method in (*INCREMENTS, "Heun"):
            error = (along(method, process, path, 128) - finest).square().mean().sqrt()
            assert error < 0.05 * finest.std()

    def test_states_of_single_precision_take_a_path_of_double(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:])
        z = start(sde, (5, 3))
        double = solvers.solve(process, EM, z, GRID, noise=make(sde)).state
        single = solvers.solve(process, EM, z.float(), GRID, noise=make(sde)).state
        assert single.dtype == torch.float32
        assert (single - double).abs().max() <= 1e-5 * float(double.abs().max())


class TestCost:
    """Normals are drawn once for each part of the path that is looked at."""

    @pytest.mark.parametrize("n", [1, 2, 7, 64])
    @pytest.mark.parametrize("method", ["EM", "exponential"])
    def test_a_walk_along_the_given_grid_draws_one_for_each_step(
        self, method: str, n: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws = Draws(monkeypatch)
        sde, times = CLD(), solvers.quadratic_times(1.0, 0.01, n)
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:])
        path = make(sde, times=times)
        solvers.solve(process, SOLVERS[method], start(sde, (5, 3)), times, noise=path)
        assert draws.calls == len(draws.seen) == n
        # Of a second walk the normals are the same, drawn again: of a path the last pair of halves
        # at each depth is kept.
        solvers.solve(process, SOLVERS[method], start(sde, (5, 3)), times, noise=path)
        assert len(draws.seen) == n
        assert draws.calls <= 2 * n

    @pytest.mark.parametrize("direction", [1, -1])
    def test_a_walk_off_the_given_times_draws_one_for_each_split(
        self, direction: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws = Draws(monkeypatch)
        path = make(CLD())
        walk = itertools.pairwise(solvers.quadratic_times(1.0, 0.01, 24).flip(0).tolist())
        for s, t in list(walk)[::direction]:
            path.increment(s, t)
        if direction == -1:
            assert draws.calls == len(draws.seen)
        else:
            # Nodes of one interval are read as solvers walk, so that a walk up may read each twice.
            assert draws.calls <= 2 * len(draws.seen)

    @pytest.mark.parametrize("n", [8, 64])
    def test_a_coarser_walk_draws_no_more_than_it_needs(
        self, n: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws = Draws(monkeypatch)
        path = make(CLD(), times=solvers.uniform_times(1.0, 0.0, n))
        for s, t in itertools.pairwise(torch.linspace(0, 1, n // 4 + 1).tolist()):
            path.increment(s, t)
        assert draws.calls == len(draws.seen) == n // 4

    def test_a_time_off_the_grid_costs_some_twenty_draws(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws = Draws(monkeypatch)
        path = make(CLD(), times=torch.tensor([0.0, 1.0]))
        path.increment(0.0, 1 / 3)
        # Once for the whole, twenty halvings, and the time itself.
        assert draws.calls == 22
        path.increment(0.0, 0.625)
        assert len(draws.seen) <= 22 + 3


class TestRefusals:
    """What does not fit is refused before any score is asked."""

    @pytest.mark.parametrize(
        "times",
        [
            torch.tensor([1.0, 0.5, 0.7]),
            torch.tensor([0.1, 0.5, 0.5]),
            torch.tensor([0.5, 0.5]),
            torch.tensor([0.3]),
            torch.tensor(0.3),
            torch.tensor([]),
            torch.tensor([[1.0, 0.5]]),
            torch.tensor([1.1, 0.5]),
            torch.tensor([0.5, -0.1]),
            torch.tensor([math.nan, 0.5]),
            torch.tensor([0.1, math.nan, 0.5]),
        ],
    )
    def test_times_that_are_no_grid(self, times: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="times"):
            BrownianPath(CLD(), times, (3,))

    @pytest.mark.parametrize("shape", [(), (-1,), (3, -2)])
    def test_shapes_that_are_none(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="shape must be"):
            BrownianPath(CLD(), GRID, shape)

    def test_what_is_no_process(self) -> None:
        with pytest.raises(TypeError, match="LinearSDE"):
            BrownianPath("CLD", GRID, (3,))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("s", "t"),
        [
            (0.005, 0.5),
            (0.5, 1.001),
            (0.5, 0.4),
            (0.5, 0.5),
            (-1.0, 0.5),
            (math.nan, 0.5),
            (0.1, math.nan),
            (0.1, math.inf),
        ],
    )
    def test_intervals_that_are_none_or_outside(self, s: float, t: float) -> None:
        path = make(CLD())
        for read in (path.increment, path.integral, lambda s, t: path.evolve(start(CLD()), s, t)):
            with pytest.raises(ValueError):  # noqa: PT011
                read(s, t)
        with pytest.raises(ValueError, match="an interval of the path must have"):
            path.increment(s, t)

    @pytest.mark.parametrize("grid", [(1.0, 0.5, 0.001), (1.0, 0.5, 0.0)])
    def test_grids_that_leave_the_path(self, grid: tuple[float, ...]) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="an interval of the path must have"):
            solvers.solve(
                ReverseProcess(sde, untouchable),
                EM,
                start(sde, (5, 3)),
                torch.tensor(grid),
                noise=make(sde),
            )

    @every_solver
    def test_other_processes(self, method: str) -> None:
        # Even one of the same matrices: it is another object, and cheap to pass on.
        with pytest.raises(ValueError, match="noise is a BrownianPath of another process"):
            solvers.solve(
                ReverseProcess(CLD(), untouchable),
                SOLVERS[method],
                start(CLD(), (5, 3)),
                GRID,
                noise=make(CLD()),
            )

    @pytest.mark.parametrize(
        "solver",
        [
            solvers.SSCS(),
            solvers.SSCS(merge=False),
            solvers.ExponentialMultistep(),
            solvers.ExponentialMultistep(stochasticity=1.0),
            solvers.Ancestral(),
            solvers.Splitting(),
            solvers.TorchSDE(method="srk"),
            solvers.PredictorCorrector(solvers.EulerMaruyama(), solvers.Langevin()),
            solvers.ProbabilityFlow(),
            solvers.GottaGoFast(),
            solvers.TorchDiffEq(),
        ],
        ids=repr,
    )
    def test_solvers_whose_noise_is_no_functional_of_it(self, solver: Any) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match=r"^noise must not be a BrownianPath"):
            solvers.solve(
                ReverseProcess(sde, untouchable),
                solver,
                start(sde, (5, 3)),
                GRID,
                noise=make(sde),
            )

    @pytest.mark.parametrize("method", list(INTEGRALS))
    def test_integrals_of_a_path_without(self, method: str) -> None:
        sde = CLD()
        path = make(sde, integrals=False)
        with pytest.raises(ValueError, match="needs a BrownianPath with integrals=True"):
            path.integral(0.1, 0.5)
        with pytest.raises(ValueError, match="needs a BrownianPath with integrals=True"):
            path.evolve(start(sde, (5, 3)), 0.1, 0.5)
        with pytest.raises(ValueError, match="needs a BrownianPath with integrals=True"):
            solvers.solve(
                ReverseProcess(sde, untouchable),
                INTEGRALS[method],
                start(sde, (5, 3)),
                GRID,
                noise=path,
            )

    @pytest.mark.parametrize("shape", [(4, 3), (5, 2), (5,), (5, 3, 1), (1, 3), (5, 1)])
    @every_solver
    def test_states_of_another_shape(self, method: str, shape: tuple[int, ...]) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="noise must have shape"):
            solvers.solve(
                ReverseProcess(sde, untouchable),
                SOLVERS[method],
                start(sde, shape),
                GRID,
                noise=make(sde),
            )

    def test_normals_without_an_interval(self) -> None:
        with pytest.raises(RuntimeError, match=r"pass it to solve\(\.\.\., noise=path\)"):
            make(CLD()).normal(start(CLD()), 1)

    def test_a_generator_besides(self) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="alternatives"):
            solvers.solve(
                ReverseProcess(sde, untouchable),
                EM,
                start(sde, (5, 3)),
                GRID,
                noise=make(sde),
                generator=generator(),
            )


class TestMemoryOfPairs:
    """A path writes halves where others lay before; nobody may see that."""

    TIMES = solvers.uniform_times(1.0, 1e-3, 16)

    def reads(self, path: BrownianPath) -> list[torch.Tensor]:
        ends = self.TIMES.flip(0).tolist()
        return [path.integral(s, t) for s, t in itertools.pairwise(ends)]

    def path(self, **options: Any) -> BrownianPath:
        return make(CLD(), (300, 3), times=self.TIMES, **options)

    def same(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))

    def test_what_was_read_stays(self) -> None:
        path = self.path()
        found = self.reads(path)
        kept = [x.clone() for x in found]
        self.reads(path)
        assert self.same(found, kept)

    @pytest.mark.parametrize("at", [0, 3, 10, 20, 31])
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

    def test_a_path_that_served_inference_serves_elsewhere(self) -> None:
        path = self.path()
        with torch.inference_mode():
            found = [x.clone() for x in self.reads(path)]
        assert self.same(self.reads(path), found)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_are_the_same_path(self, copied: Any) -> None:
        path = self.path()
        wanted = self.reads(path)
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
            assert torch.allclose(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))
