"""Exact moments of solvers with Gaussian data, against recursions from matrix exponentials.

The score is -C^-1 (z - m). The reverse drift per unit of falling time is a z + c with
a = -F - G G^T C^-1.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
from cldsde.validation import moment_error, problems, propagate_moments
from faulty_solvers import altered
from gaussian_data import PROCESSES, reverse
from tolerances import rounding, standard_error

END = 0.05
EM, SSCS = solvers.EulerMaruyama(), solvers.SSCS()
# Kernels and references are both good to some 1e-14 here, and steps are mostly contractions:
# several exponentials of matrices of the size |A| B <= 40.
RECURSION = rounding(64 * 40)


def euler_maruyama(exact, times):
    """m' = X m + b and C' = X C X^T + h G G^T."""
    m, C = exact.mean(times[0]), exact.covariance(times[0])
    for t, u in itertools.pairwise(times):
        kick = (t - u) * exact.clock.rate(t)
        pull = exact.Q @ np.linalg.inv(exact.covariance(t))
        X = np.eye(len(m)) - kick * (exact.A + pull)
        m = X @ m + kick * pull @ exact.mean(t)
        C = X @ C @ X.T + kick * exact.Q
    return m, C


GRIDS = [("uniform", 1, True), ("root", 7, False), ("quadratic", 25, True)]


@pytest.mark.parametrize(("kind", "steps", "known"), GRIDS)
@pytest.mark.parametrize("name", list(PROCESSES))
def test_a_solver_has_the_moments_of_its_recursion(name, kind, steps, known):
    times, (sde, exact) = getattr(solvers, f"{kind}_times")(1.0, END, steps), PROCESSES[name]
    # The score knows its times beforehand, or is told each.
    process = reverse(name, lambda score: score if known else lambda z, t: score(z, t.clone()))
    start = torch.from_numpy(exact.mean(1.0))[:, None], torch.from_numpy(exact.covariance(1.0))
    mean, covariance = propagate_moments(process, EM, times, *start)
    assert mean.dtype == covariance.dtype == torch.float64
    assert mean.shape == (sde.components, 1)
    m, C = euler_maruyama(exact, times.tolist())
    assert abs(mean[:, 0].numpy() - m).max() <= RECURSION * abs(C).max()
    assert abs(covariance.numpy() - C).max() <= RECURSION * abs(C).max()


@pytest.mark.parametrize("name", ["VE", "CLD, linear schedule"])
def test_the_moment_error_is_the_distance_of_the_recursion_from_the_exact_moments(name):
    times = solvers.uniform_times(1.0, END, 32)
    exact = PROCESSES[name.removesuffix(" schedule")][1]
    m, C = euler_maruyama(exact, times.tolist())
    distances = [abs(m - exact.mean(END)).max(), abs(C - exact.covariance(END)).max()]
    found = moment_error(EM, problems()[name], times)
    assert found == pytest.approx(max(distances), abs=RECURSION)


@pytest.mark.parametrize("solver", [EM, SSCS])
def test_directions_of_the_data_are_kept_apart(solver):
    data = GaussianMixture([1.0], [[0.3, -1.0]], [[[0.25, 0.0], [0.0, 0.04]]])
    sde, times, zero = CLD(), solvers.quadratic_times(1.0, END, 6), torch.zeros(2, 2)
    start = torch.kron(sde.prior.covariance, torch.eye(2, dtype=torch.float64))
    mean, covariance = propagate_moments(
        ReverseProcess(sde, data.score(sde)), solver, times, zero, start
    )
    blocks = covariance.reshape(2, 2, 2, 2)
    for i, (m, v) in enumerate([(0.3, 0.25), (-1.0, 0.04)]):
        alone = GaussianMixture([1.0], [[m]], [[[v]]])
        process, start = ReverseProcess(sde, alone.score(sde)), sde.prior.covariance
        one, single = propagate_moments(process, solver, times, zero[:, :1], start)
        # A rotation by the eigenvectors, and otherwise the same operations.
        assert (mean[:, i] - one[:, 0]).abs().max() <= rounding(64)
        assert (blocks[:, i, :, i] - single).abs().max() <= rounding(64)
    assert blocks[:, 0, :, 1].abs().max() <= rounding(64)


@pytest.mark.parametrize(
    ("solver", "name"),
    [(SSCS, "PSLD"), (solvers.ExponentialMultistep(order=2, stochasticity=1.0), "HOLD")],
)
def test_samples_have_the_propagated_moments(solver, name):
    sde, n = PROCESSES[name][0], 50_000
    times, g = solvers.quadratic_times(1.0, END, 8), torch.Generator().manual_seed(0)
    state = sde.prior.sample((n, 1), generator=g, dtype=torch.float64)
    z = solvers.solve(reverse(name), solver, state, times, generator=g).state[..., 0]
    start = torch.zeros(sde.components, 1), sde.prior.covariance
    mean, C = propagate_moments(reverse(name), solver, times, *start)
    # Variances of sample moments of normals: C_ii of a mean, C_ii C_jj + C_ij^2 of a covariance.
    variance, one = C.diagonal(), standard_error(1.0, n, number=5)
    assert ((z.mean(0) - mean[:, 0]).abs() <= one * variance.sqrt()).all()
    error = one * (variance[:, None] * variance + C**2).sqrt()
    centred = z - mean[:, 0]
    assert ((centred.mT @ centred / n - C).abs() <= error).all()
    # The samples tell these moments from the exact ones.
    exact = torch.from_numpy(PROCESSES[name][1].covariance(END))
    assert ((exact - C).abs() > 2 * error).any()


GRID = solvers.uniform_times(1.0, 0.1, 3)
ONE, EYE = torch.zeros(2, 1), torch.eye(2)


OwnNoise = altered(solvers.EulerMaruyama, step=lambda z, *_: z + torch.randn_like(z))


class Moody(solvers.EulerMaruyama):
    """Draws more if some state is not zero."""

    def step(self, z, memory, tables, i, score, noise):
        if z.any():
            noise.normal(z, 2)
        return super().step(z, memory, tables, i, score, noise)


MODES = GaussianMixture([1.0, 1.0], [[-1.0], [1.0]], [[[0.01]], [[0.01]]])
TWICE = "the same state and noise gave two different results; does the solver draw noise outs"
SHAPES = [
    *((torch.zeros(k, 1), torch.eye(k)) for k in (1, 3)),
    *((torch.zeros(*shape), EYE) for shape in ((2,), (2, 1, 1), (2, 2))),
    *((ONE, covariance) for covariance in (torch.eye(3), torch.ones(2))),
]
WRONG_GRIDS = [[0.1, 0.5, 1.0], [1.0, 0.5, 0.5], [1.0, math.nan], [1.5, 0.5], [1.0], [[1.0, 1.0]]]
MIXED = ReverseProcess(CLD(), MODES.score(CLD()))
BY_NORM = solvers.PredictorCorrector(corrector=solvers.Langevin(norm="batch"))
NO_SSCS = {"process": reverse("VE"), "solver": SSCS, "mean": ONE[:1], "covariance": EYE[:1, :1]}
REJECTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"mean": m, "covariance": C}, ValueError, r"mean must be \(2, D\)") for m, C in SHAPES),
    *(({"times": torch.tensor(grid)}, ValueError, "times") for grid in WRONG_GRIDS),
    *(({"solver": x}, TypeError, "solver must be a solver") for x in (solvers.SSCS, None, "EM")),
    *(({"process": x}, TypeError, "process must be a ReverseProcess") for x in (CLD(), None)),
    ({"solver": OwnNoise()}, ValueError, TWICE),
    ({"solver": Moody()}, ValueError, "solver must draw the same noise for every state"),
    ({"solver": solvers.GottaGoFast()}, TypeError, "a fixed grid; GottaGoFast is adaptive"),
    *(({"solver": solver, "process": MIXED}, ValueError, "affine") for solver in (EM, SSCS)),
    ({"solver": BY_NORM}, ValueError, "affine in"),
    (NO_SSCS, ValueError, "SSCS needs"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REJECTED)
def test_solvers_and_arguments_without_exact_moments_are_rejected(changes, error, message):
    valid = {"process": reverse("CLD"), "solver": EM, "times": GRID, "mean": ONE, "covariance": EYE}
    with pytest.raises(error, match=message):
        propagate_moments(*(valid | changes).values())


def test_moments_of_steps_that_diverge_are_not_finite_and_arguments_are_kept():
    exploding = altered(solvers.EulerMaruyama, step=lambda z, *_: z / 0)()
    mean, covariance = torch.full((2, 1), 0.5).double(), EYE.double()
    found = propagate_moments(reverse("CLD"), exploding, GRID, mean, covariance)
    assert not found[0].isfinite().any()
    assert torch.equal(mean, torch.full((2, 1), 0.5).double())
    assert torch.equal(covariance, EYE.double())
