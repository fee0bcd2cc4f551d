"""Properties of kernels that hold for every process, on random processes.

Tolerances. A transition over a clock B is made of about 2 ||A||_1 B short steps, each with a
relative error of a few eps; the clock itself is off by a few eps, which moves exp(A B) by
||A|| B eps. In the coordinates in which the stationary covariance is the identity no step amplifies
an error, and going there and back costs the condition number kappa of that covariance: 64 eps
(1 + ||A||_1 B) kappa, for Psi in absolute terms (||Psi|| <= sqrt(kappa)), and relative to ||Sigma||
for covariances, whose doublings only add positive semi-definite terms. 64 covers k <= 4 components
and the constants of the matrix products and of the orthogonal reductions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import references
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE
from references import Homogeneous, clock_of
from strategies import (
    StableProcess,
    clds,
    covariances,
    intervals,
    schedules,
    seeds,
    shapes,
    stable_processes,
)
from tolerances import KERNEL, rounding

FAMILIES = [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD, lambda: CLD(position_noise=0.1)]
FAMILY_NAMES = ["VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD", "CLD with position noise"]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_NAMES)


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def diagonal(kernel: Any) -> torch.Tensor:
    root: torch.Tensor = kernel.root
    return root.diagonal(dim1=-2, dim2=-1)


def process_rounding(process: StableProcess, b: float) -> float:
    """The bound of the module's docstring; A is scaled to ||A||_1 = 1."""
    return rounding(64, (1 + b) * process.condition)


@given(stable_processes(), schedules(), intervals(), st.data())
def test_random_processes_agree_with_the_reference(process, schedule, where, data):
    s, t = where
    sde, clock = process.sde(schedule), clock_of(schedule)
    initial = data.draw(covariances(process.components))
    exact = Homogeneous(process.A, process.Q_root, clock)
    for kernel, wanted, b in (
        (sde.transition(s, t), exact.transition(s, t), clock.integral(s, t)),
        (sde.marginal(t, initial), exact.marginal(t, initial), clock.integral(0.0, t)),
    ):
        mean, covariance, _ = (x[0] for x in references.as_tensors([wanted]))
        bound = process_rounding(process, b)
        assert norm(kernel.mean - mean) <= bound
        assert norm(kernel.covariance - covariance) <= bound * norm(covariance)
        assert torch.equal(kernel.root, kernel.root.tril())
        assert (diagonal(kernel) >= 0).all()
        if process.noise != "deficient":  # else rows of the root are nearly parallel
            assert (diagonal(kernel) > 0).all()
        # One product of two k x k matrices on either side.
        error = kernel.root @ kernel.root.mT - kernel.covariance
        assert norm(error) <= rounding(16, norm(kernel.covariance))
        assert torch.equal(kernel.covariance, kernel.covariance.mT)


@given(clds(), intervals())
def test_cld_agrees_with_the_reference_at_every_damping(sde, where):
    beta = sde.beta if isinstance(sde.beta, float) else tuple(sde.beta)
    exact = references.cld(beta, sde.mass, sde.friction, sde.velocity_scale)
    s, t = where
    for kernel, wanted in (
        (sde.transition(s, t), exact.transition(s, t)),
        (sde.marginal(t), exact.marginal(t)),
    ):
        mean, covariance, root = (x[0] for x in references.as_tensors([wanted]))
        assert norm(kernel.mean - mean) <= KERNEL * norm(mean)
        assert norm(kernel.covariance - covariance) <= KERNEL * norm(covariance)
        expected = root.diagonal()
        assert ((diagonal(kernel) - expected).abs() <= KERNEL * expected).all()


@given(stable_processes(), schedules(), intervals(points=3))
def test_kernels_compose(process, schedule, where):
    s, r, t = where
    sde = process.sde(schedule)
    first, second, whole = sde.transition(s, r), sde.transition(r, t), sde.transition(s, t)
    composed = second.mean @ first.covariance @ second.mean.mT + second.covariance
    # Three kernels; Psi twice in the first term, whose norm is at most kappa ||Sigma||.
    bound = 4 * process_rounding(process, clock_of(schedule).integral(s, t)) * process.condition
    assert norm(second.mean @ first.mean - whole.mean) <= bound
    assert norm(composed - whole.covariance) <= bound * norm(whole.covariance)


@given(stable_processes(noise=("full", "chain")), intervals())
def test_the_stationary_distribution_is_stationary(process, where):
    sigma = process.sde(4.0).marginal(where[1], process.stationary).covariance
    # Sigma itself solves its equation to kappa eps only, as rounded.
    bound = 2 * process_rounding(process, 4.0)
    assert norm(sigma - process.stationary) <= bound * norm(process.stationary)


@every_family
@pytest.mark.parametrize("t", [0.0, 1e-8, 0.3, 1.0])
def test_a_zero_step_is_the_identity(family, t):
    sde = family()
    kernel = sde.transition(t, t)
    assert torch.equal(kernel.mean, torch.eye(sde.components, dtype=torch.float64))
    assert not kernel.root.any()
    assert not kernel.covariance.any()


@every_family
def test_the_marginal_at_zero_is_the_initial_distribution(family):
    sde = family()
    identity = torch.eye(sde.components, dtype=torch.float64)
    for initial in (torch.zeros_like(identity), sde.initial_covariance, identity + 0.5):
        kernel = sde.marginal(0.0, initial)
        assert torch.equal(kernel.mean, identity)
        # A Cholesky factorisation of a k x k matrix, and its square.
        assert norm(kernel.covariance - initial) <= rounding(16, norm(initial))
    assert not sde.marginal(0.0, torch.zeros_like(identity)).root.any()


@every_family
@given(shape=shapes(), seed=seeds())
def test_times_of_any_shape_broadcast(family, shape, seed):
    sde: LinearSDE = family()
    generator = torch.Generator().manual_seed(seed)
    s = 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64)
    t = 0.5 + 0.5 * torch.rand((2, *[1] * len(shape)), generator=generator, dtype=torch.float64)
    k, both = sde.components, torch.broadcast_shapes(s.shape, t.shape)
    kernel = sde.transition(s, t)
    matrices = [kernel.mean, kernel.root, kernel.covariance]
    assert {(m.shape, m.dtype) for m in matrices} == {((*both, k, k), torch.float64)}
    assert torch.equal(sde.transition_matrix(s, t), kernel.mean)
    assert sde.drift(s).shape == sde.marginal(s).mean.shape == (*shape, k, k)
    assert sde.diffusion(s).shape[:-1] == (*shape, k)
    single = sde.transition(s.flatten()[0].item(), t.flatten()[0].item())
    # A batch may share the number of doublings of its longest step: equal to rounding, not in bits.
    for found, expected in ((kernel.mean, single.mean), (kernel.root, single.root)):
        first = found[(0,) * len(both)]
        assert norm(first - expected) <= KERNEL * math.sqrt(k) * norm(expected)
