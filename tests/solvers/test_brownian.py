"""A Brownian path: its distribution, its bits, and the solvers that follow it.

`as_maps` makes a read the linear map of independent normals that it is: no Monte Carlo.
"""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag

from cldsde import CLD, LinearSDE, ReverseProcess, solvers
from cldsde.solvers import BrownianPath
from cldsde.solvers.named import validated_solvers
from gaussian_data import EVERY, PROCESSES
from probes import check_normal, generator, normals, start, untouchable
from tolerances import KERNEL, rounding, standard_error

SDE = CLD()
GRID = solvers.quadratic_times(1.0, 0.01, 8)
GIVEN = GRID.flip(0).tolist()
# Off the given times: halves, thirds, irrational ones, and pairs that are close.
CLOSE = 1e-6
INSIDE = [GIVEN[i] + (GIVEN[i + 1] - GIVEN[i]) / x for i, x in ((2, 2), (5, 3), (5, math.pi))]
INSIDE += [0.7, 0.7 + CLOSE]
POINTS = sorted([*GIVEN, *INSIDE])

# Kernels to a part in 1e12, and roots of joint covariances whose condition may be a thousand.
JOINT = 1e3 * KERNEL
# Sums of reads that are up to ten times larger than their sum.
SUMS = {torch.float64: rounding(1e3), torch.float32: rounding(64, dtype=torch.float32)}

every_process = pytest.mark.parametrize("name", EVERY)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make(sde=SDE, shape=(5, 3), seed=0, times=GRID, **options):
    options = {"dtype": torch.float64, **options}
    return BrownianPath(sde, times, shape, generator=generator(seed), **options)


def both(path, s, t):
    """(Delta W, I) of an interval, ``(B, m + k, *D)``."""
    return torch.cat([path.increment(s, t), path.integral(s, t)], dim=1)


def moved(psi, z):
    return torch.einsum("ij,bj...->bi...", torch.as_tensor(psi).to(z), z)


def covariance(reference, s, t):
    """Of (Delta W, I)."""
    root = reference.joint_root(s, t, nodes=30)
    return root @ root.T


def as_maps(patch, sde, **options):
    """A path whose reads ``(N, rows)`` are their maps of N independent normals, transposed."""
    seen, draw = {}, BrownianPath._draw

    def units(path, *args):
        # Draws are told apart by their bits.
        normals = draw(path, *args)
        first = seen.setdefault(normals.numpy().tobytes(), len(normals) * len(seen))
        return torch.eye(*normals.shape).roll(first, 1).to(normals)

    patch.setattr(BrownianPath, "_draw", units)
    return make(sde, (800,), **options)  # more samples than normals


def check_covariance(found, expected, sizes, tolerance=JOINT):
    """Entries in units of the standard deviations of their rows and columns."""
    units = np.outer(*(np.sqrt(np.diag(size)) for size in sizes))
    assert (abs(found.numpy() - expected) / units).max() <= tolerance


@pytest.mark.one_in(2)
@every_process
def test_reads_have_their_joint_distribution(name, monkeypatch):
    sde, reference = PROCESSES[name]
    path, m = as_maps(monkeypatch, sde), reference.Q_root.shape[1]
    # Disjoint intervals are independent.
    intervals = list(itertools.pairwise(POINTS[4:]))
    assert min(t - s for s, t in intervals) < 1.01 * CLOSE
    reads = torch.cat([both(path, s, t) for s, t in intervals], dim=1)
    expected = block_diag(*[covariance(reference, s, t) for s, t in intervals])
    check_covariance(reads.T @ reads, expected, [expected] * 2)
    for s, t in itertools.combinations([GIVEN[0], GIVEN[3], INSIDE[2], GIVEN[-1]], 2):
        read, expected = both(path, s, t), covariance(reference, s, t)
        check_covariance(read.T @ read, expected, [expected] * 2)
    # Of two that overlap the first has the common part up to its end; the second carries it on.
    s, r, t, u = GIVEN[1], INSIDE[0], GIVEN[5], 0.7
    carry = block_diag(np.eye(m), reference.psi(t, u))
    sizes = covariance(reference, s, t), covariance(reference, r, u)
    expected = covariance(reference, r, t) @ carry.T
    check_covariance(both(path, s, t).T @ both(path, r, u), expected, sizes)


def test_numbers_of_a_batch_are_independent_samples():
    sde, reference = PROCESSES["CLD, linear"]
    reads = both(make(sde, (6000, 2), seed=3), GIVEN[0], INSIDE[2])
    expected = torch.from_numpy(covariance(reference, GIVEN[0], INSIDE[2]))
    for axis in reads.unbind(-1):
        check_normal(axis, expected)
    white = reads / expected.diagonal().sqrt()[:, None]
    for products in (white[1:] * white[:-1], white[..., 0] * white[..., 1]):  # of neighbours
        assert products.mean(0).abs().max() <= standard_error(1.0, 6000)


def test_the_forward_process_moves_along_the_path():
    (sde, reference), z, (s, t) = PROCESSES["PSLD"], normals(1, 5, 2, 3), (GIVEN[1], INSIDE[0])
    path = make(sde)
    expected = moved(reference.psi(s, t), z) + path.integral(s, t)
    assert (path.evolve(z, s, t) - expected).abs().max() <= SUMS[torch.float64]


@pytest.mark.one_in(9)
@every_process
@every_dtype
def test_bits_do_not_depend_on_the_order_of_reading(name, dtype):
    sde, _ = PROCESSES[name]
    given = [(GIVEN[i], GIVEN[j]) for i, j in ((0, 2), (2, 4), (1, 6), (0, 8))]
    alone = {ends: both(make(sde, dtype=dtype), *ends) for ends in given}
    intervals = [*given, *itertools.pairwise(POINTS[5:]), (POINTS[0], INSIDE[1])]
    first, second = make(sde, dtype=dtype), make(sde, dtype=dtype)
    found = {ends: both(first, *ends) for ends in intervals}
    for ends in reversed(intervals):
        assert torch.equal(both(second, *ends), found[ends])
    assert all(torch.equal(found[ends], read) for ends, read in alone.items())
    up = make(sde, times=GRID.flip(0), dtype=dtype)
    assert all(torch.equal(both(up, *ends), read) for ends, read in alone.items())


def test_a_generator_gives_one_path_after_another():
    g = generator(4)
    one, two = (BrownianPath(SDE, GRID, (5, 3), generator=g) for _ in range(2))
    assert (both(one, 0.1, 0.9) != both(two, 0.1, 0.9)).all()


INCREMENTS = {x: solvers.TorchSDE(method=x) for x in ("euler", "milstein", "heun", "euler_heun")}
INCREMENTS |= {"EM": solvers.EulerMaruyama(), "midpoint": solvers.TorchSDE(method="midpoint")}
INTEGRALS = {"exponential": solvers.ExponentialEuler(), "reverse": solvers.ReverseDiffusion()}
FOLLOWING = {"euler-maruyama", "stochastic-heun", "exponential-euler", "reverse-diffusion"}
FOLLOWING |= {"torchsde-euler"}


def along(path, sde, solver, times=GRID):
    """The source that a solver's steps over a grid get from a path."""
    process = ReverseProcess(sde, untouchable)
    return path.along(sde, times, lambda: solver.path_noise(process, times))


@pytest.mark.parametrize("integrals", [True, False])
@pytest.mark.parametrize("method", INCREMENTS)
def test_increments_are_the_normals_of_these_solvers(method, integrals):
    # More sources of noise than components.
    sde = LinearSDE.from_matrices([[-1, 2], [-1, -2]], [[1, 0.5, 0.4], [-0.7, 1.2, 0.3]], (1, 7))
    path, z = make(sde, integrals=integrals), start(CLD(), (5, 3))
    noise = along(path, sde, INCREMENTS[method])
    for t, u in itertools.pairwise(GRID.tolist()):
        expected = path.increment(u, t) / math.sqrt(t - u)
        assert (noise.normal(z, 3) - expected).abs().max() <= SUMS[torch.float64]


@pytest.mark.parametrize("method", INTEGRALS)
@every_process
def test_integrals_are_the_noise_of_these_solvers(name, method):
    sde, reference = PROCESSES[name]
    path, solver = make(sde), INTEGRALS[method]
    noise = along(path, sde, solver)
    roots = solver.prepare(ReverseProcess(sde, untouchable), GRID).stages[0].noise
    for root, (t, u) in zip(roots, itertools.pairwise(GRID.tolist()), strict=True):
        xi, expected = noise.normal(start(sde, (5, 3)), len(root[0])), path.integral(u, t)
        if method == "exponential":
            expected = moved(reference.psi(t, u), expected)
        # Each row relative to its own size.
        error = (moved(np.array(root), xi) - expected).abs().amax((0, 2))
        assert (error <= JOINT * expected.abs().amax((0, 2))).all()


@pytest.mark.parametrize("name", [x for x in validated_solvers() if x[:3] != "edm"])
def test_solvers_follow_a_path_or_say_that_they_do_not(name):
    process = ReverseProcess(SDE, lambda z, t: torch.zeros_like(z[:, 1:]))
    arguments = process, validated_solvers()[name], start(SDE, (5, 1, 3)), GRID
    if name in FOLLOWING:
        assert solvers.solve(*arguments, noise=make(shape=(5, 1, 3))).success
    else:
        with pytest.raises(ValueError, match=r"^noise must not be a BrownianPath"):
            solvers.solve(*arguments, noise=make())


# The memory of pairs: a path writes halves over older ones, which nobody may notice.
WALK = solvers.uniform_times(1.0, 1e-3, 16)


def walked(path):
    return [path.integral(s, t) for s, t in itertools.pairwise(WALK.flip(0).tolist())]


def same(found, wanted):
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_autocast_changes_nothing():
    wanted = walked(make(times=WALK, dtype=torch.float32))
    with torch.autocast("cpu"):
        found = walked(make(times=WALK, dtype=torch.float32))
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).abs().max() <= SUMS[torch.float32] * float(y.abs().max())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_reads_stay_and_copies_are_the_same_path_also_from_inference_mode(copied):
    path = make(shape=(300, 3), times=WALK)
    with torch.inference_mode():
        found = walked(path)
        wanted = [x.clone() for x in found]
    assert same(walked(path), wanted)
    assert same(found, wanted)
    assert same(walked(copied(path)), wanted)


def test_a_path_serves_every_process_that_equals_its_own():
    path, score = make(shape=(5, 3)), ReverseProcess(SDE, lambda z, t: -z[:, 1:]).score
    ends = [
        solvers.solve(
            ReverseProcess(sde, score),
            solvers.EulerMaruyama(),
            torch.ones(5, 2, 3, dtype=torch.float64),
            GRID,
            noise=path,
        ).state
        for sde in (SDE, CLD(beta=4.0))
    ]
    assert torch.equal(*ends)
