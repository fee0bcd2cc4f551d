"""Properties of kernels that hold for every process, on random processes.

Tolerances. A transition over a clock B is made of about 2 ||A||_1 B short steps, each with a
relative error of a few eps; the clock itself is off by a few eps, which moves exp(A B) by
||A|| B eps. In the coordinates in which the stationary covariance is the identity no step amplifies
an error, and going there and back costs the condition number kappa of that covariance. Hence

    rounding(process, B) = 64 eps (1 + ||A||_1 B) kappa,

for Psi in absolute terms (||Psi|| <= sqrt(kappa)), and relative to ||Sigma|| for covariances, whose
doublings only add positive semi-definite terms. 64 covers k <= 4 components and the constants of
the matrix products and of the orthogonal reductions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE
from strategies import (
    StableProcess,
    clds,
    covariances,
    critical_friction,
    intervals,
    log_uniform,
    schedules,
    seeds,
    shapes,
    stable_processes,
    times,
)

EPS = torch.finfo(torch.float64).eps
# What the kernels promise for the diagonal of the root, element by element.
DIAGONAL = 1e-12

FAMILIES = [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD, lambda: CLD(position_noise=0.1)]
FAMILY_NAMES = ["VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD", "CLD with position noise"]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_NAMES)


def norm(matrix: torch.Tensor) -> float:
    """Spectral norm."""
    return float(torch.linalg.matrix_norm(matrix, 2))


def clock(schedule: float | tuple[float, float], s: float, t: float) -> float:
    """B(s, t) of a constant or linear rate."""
    first, last = schedule if isinstance(schedule, tuple) else (schedule, schedule)
    return (t - s) * ((1 - (s + t) / 2) * first + (s + t) / 2 * last)


def rounding(process: StableProcess, b: float) -> float:
    """The bound of the module's docstring; A is scaled to ||A||_1 = 1."""
    return 64 * EPS * (1 + b) * process.condition


def family_rounding(sde: LinearSDE) -> float:
    """The same bound for a process of the package, from its own drift and over all of [0, 1]."""
    grid = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
    size = float(torch.linalg.matrix_norm(sde.drift(grid), 1).mean())
    covariance = sde.prior.covariance
    return 64 * EPS * (1 + size) * float(torch.linalg.cond(covariance))


def diagonal(kernel: Any) -> torch.Tensor:
    """Diagonal of the root."""
    root: torch.Tensor = kernel.root
    return root.diagonal(dim1=-2, dim2=-1)


def lower_factor(*blocks: torch.Tensor) -> torch.Tensor:
    """Lower triangular factor, with diagonal >= 0, of the sum of B B^T over the blocks."""
    upper = torch.linalg.qr(torch.cat(blocks, dim=-1).mT)[1]
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper.dtype)
    return upper.mT * signs


# Composition ------------------------------------------------------------------------------------


@given(stable_processes(), schedules(), intervals(points=3))
def test_transitions_compose(process: StableProcess, schedule: Any, where: Any) -> None:
    s, r, t = where
    sde = process.sde(schedule)
    first, second, whole = sde.transition(s, r), sde.transition(r, t), sde.transition(s, t)
    # Two factors and their product, each within the bound; a factor amplifies by sqrt(kappa).
    tolerance = 3 * rounding(process, clock(schedule, s, t)) * math.sqrt(process.condition)
    assert norm(second.mean @ first.mean - whole.mean) <= tolerance


@given(stable_processes(), schedules(), intervals(points=3))
def test_covariances_satisfy_chapman_kolmogorov(
    process: StableProcess, schedule: Any, where: Any
) -> None:
    s, r, t = where
    sde = process.sde(schedule)
    first, second, whole = sde.transition(s, r), sde.transition(r, t), sde.transition(s, t)
    composed = second.mean @ first.covariance @ second.mean.mT + second.covariance
    # Three kernels; Psi twice in the first term, whose norm is at most kappa ||Sigma||.
    tolerance = 4 * rounding(process, clock(schedule, s, t)) * process.condition
    assert norm(composed - whole.covariance) <= tolerance * norm(whole.covariance)


@given(stable_processes(), schedules(), intervals(), st.data())
def test_marginals_are_carried_by_transitions(
    process: StableProcess, schedule: Any, where: Any, data: st.DataObject
) -> None:
    s, t = where
    sde = process.sde(schedule)
    initial = data.draw(covariances(process.components))
    first, step = sde.marginal(s, initial), sde.transition(s, t)
    last = sde.marginal(t, initial)
    carried = step.mean @ first.covariance @ step.mean.mT + step.covariance
    size = norm(last.covariance) + norm(initial)
    tolerance = 4 * rounding(process, clock(schedule, 0.0, t)) * process.condition
    assert norm(carried - last.covariance) <= tolerance * size
    assert norm(step.mean @ first.mean - last.mean) <= tolerance


@given(clds(), intervals(points=3))
def test_the_root_of_cld_composes_element_by_element(sde: CLD, where: Any) -> None:
    s, r, t = where
    first, second, whole = sde.transition(s, r), sde.transition(r, t), sde.transition(s, t)
    composed = lower_factor(second.mean @ first.root, second.root).diagonal()
    # Both sides keep the promise for the diagonal; the factorisation here adds a few eps.
    assert ((composed - diagonal(whole)).abs() <= 3 * DIAGONAL * diagonal(whole)).all()


# The moment equations ---------------------------------------------------------------------------


def gauss_nodes(s: float, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """32 Gauss-Legendre nodes and weights on [s, t]: exact to rounding for ||A|| B <= 8."""
    x, w = np.polynomial.legendre.leggauss(32)
    nodes = s + (t - s) * torch.from_numpy((1 + x) / 2)
    return nodes.clamp(s, t), (t - s) * torch.from_numpy(w / 2)[:, None, None]


# The residual of Sigma' = F Sigma + Sigma F^T + G G^T is taken in integrated form,
# Sigma(t) - Sigma(s) against a Gauss quadrature of the right-hand side, because differences in time
# would hide all errors below sqrt(eps). The quadrature multiplies the error of Sigma by at most
# 2 ||F|| (t - s), that is by 2 B.


@given(stable_processes(), schedules(), intervals())
def test_transitions_satisfy_the_moment_equations(
    process: StableProcess, schedule: Any, where: Any
) -> None:
    s, t = where
    sde = process.sde(schedule)
    nodes, weights = gauss_nodes(s, t)
    inner, whole = sde.transition(s, nodes), sde.transition(s, t)
    drift, diffusion = sde.drift(nodes), sde.diffusion(nodes)
    flow = drift @ inner.covariance
    gain = (weights * (flow + flow.mT + diffusion @ diffusion.mT)).sum(0)
    b = clock(schedule, s, t)
    tolerance = (1 + 2 * b) * process.condition * rounding(process, b)
    assert norm(gain - whole.covariance) <= tolerance * norm(whole.covariance)
    change = (weights * (drift @ inner.mean)).sum(0)
    identity = torch.eye(sde.components, dtype=torch.float64)
    assert norm(identity + change - whole.mean) <= tolerance


@given(stable_processes(), schedules(), intervals(), st.data())
def test_marginals_satisfy_the_lyapunov_equation(
    process: StableProcess, schedule: Any, where: Any, data: st.DataObject
) -> None:
    s, t = where
    sde = process.sde(schedule)
    initial = data.draw(covariances(process.components))
    nodes, weights = gauss_nodes(s, t)
    sigma, diffusion = sde.marginal(nodes, initial).covariance, sde.diffusion(nodes)
    flow = sde.drift(nodes) @ sigma
    gain = (weights * (flow + flow.mT + diffusion @ diffusion.mT)).sum(0)
    first, last = sde.marginal(s, initial).covariance, sde.marginal(t, initial).covariance
    b = clock(schedule, 0.0, t)
    tolerance = (2 + 2 * b) * process.condition * rounding(process, b)
    assert norm(first + gain - last) <= tolerance * (norm(initial) + norm(last))


@every_family
@given(where=intervals())
def test_every_family_satisfies_the_lyapunov_equation(family: Any, where: Any) -> None:
    s, t = where
    sde = family()
    nodes, weights = gauss_nodes(s, t)
    sigma, diffusion = sde.marginal(nodes).covariance, sde.diffusion(nodes)
    flow = sde.drift(nodes) @ sigma
    terms = weights * (flow + flow.mT + diffusion @ diffusion.mT)
    gain = terms.sum(0)
    first, last = sde.marginal(s).covariance, sde.marginal(t).covariance
    # The terms of the quadrature are rounded too, and decay cancels most of them.
    size = norm(first) + norm(last) + float(torch.linalg.matrix_norm(terms, 2).sum())
    assert norm(first + gain - last) <= family_rounding(sde) * size


@given(stable_processes(), schedules(), intervals())
def test_the_determinant_is_the_exponential_of_the_trace(
    process: StableProcess, schedule: Any, where: Any
) -> None:
    s, t = where
    mean = process.sde(schedule).transition(s, t).mean
    b = clock(schedule, s, t)
    expected = math.exp(b * float(process.A.trace()))
    # d det = tr(adj(Psi) dPsi), and a minor of order k - 1 is at most ||Psi||^(k - 1).
    k = process.components
    tolerance = k * max(1.0, norm(mean)) ** (k - 1) * rounding(process, b)
    assert abs(float(torch.linalg.det(mean)) - expected) <= tolerance


# The root ---------------------------------------------------------------------------------------


@given(stable_processes(), schedules(), intervals(), st.data())
def test_the_root_is_a_lower_triangular_factor_of_the_covariance(
    process: StableProcess, schedule: Any, where: Any, data: st.DataObject
) -> None:
    sde = process.sde(schedule)
    initial = data.draw(covariances(process.components))
    for kernel in (sde.transition(*where), sde.marginal(where[1], initial)):
        assert torch.isfinite(kernel.root).all()
        assert torch.equal(kernel.root, kernel.root.tril())
        assert (diagonal(kernel) >= 0).all()
        # One product of two k x k matrices on either side.
        error = kernel.root @ kernel.root.mT - kernel.covariance
        assert norm(error) <= 16 * EPS * norm(kernel.covariance)
        assert torch.equal(kernel.covariance, kernel.covariance.mT)


@given(stable_processes(noise=("full", "chain")), schedules(), intervals(), st.data())
def test_the_root_is_regular_where_the_law_has_a_density(
    process: StableProcess, schedule: Any, where: Any, data: st.DataObject
) -> None:
    s, t = where
    sde = process.sde(schedule)
    initial = data.draw(covariances(process.components))
    assert (diagonal(sde.transition(s, t)) > 0).all()
    assert (diagonal(sde.marginal(t, initial)) > 0).all()


@every_family
@given(t=times())
def test_every_family_has_a_density_after_the_start(family: Any, t: float) -> None:
    sde = family()
    kernel = sde.marginal(t)
    assert (diagonal(kernel) > 0).all()
    assert torch.isfinite(kernel.root).all()


# Critical damping -------------------------------------------------------------------------------
#
# In the coordinates in which Sigma = diag(1, M) is the identity, ||Psi|| <= 1 and
# dA/dGamma = diag(0, -1/M). With x = B |Gamma - Gamma_c| / M, Duhamel's formula gives
# ||Psi(Gamma) - Psi(Gamma_c)|| <= x and, for the second difference, <= x^2; covariances follow
# from I - Psi Psi^T, with 2 x and 4 x^2.


def critically_near(gap: float, mass: float, beta: float) -> tuple[CLD, float]:
    """CLD at (1 + gap) of critical friction, and |Gamma - Gamma_c| as rounded."""
    critical = critical_friction(mass)
    friction = (1 + gap) * critical
    return CLD(beta=beta, mass=mass, friction=friction), abs(friction - critical)


def whitened(kernel: Any, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor([1.0, math.sqrt(mass)], dtype=torch.float64)
    outer = scale[:, None] * scale
    return kernel.mean / scale[:, None] * scale, kernel.covariance / outer


def cld_rounding(beta: float, mass: float, length: float) -> float:
    size = beta * length * max(1.0, 3 / math.sqrt(mass) + 1 / mass)
    return 64 * EPS * (1 + size) * max(mass, 1 / mass)


@given(
    st.one_of(st.just(0.0), log_uniform(1e-12, 1.0)),
    st.sampled_from([-1.0, 1.0]),
    st.one_of(st.just(0.25), log_uniform(0.1, 2.0)),
    log_uniform(0.5, 8.0),
    intervals(),
)
def test_kernels_are_continuous_through_critical_damping(
    gap: float, sign: float, mass: float, beta: float, where: Any
) -> None:
    assume(sign * gap > -0.95)
    near, difference = critically_near(sign * gap, mass, beta)
    critical, _ = critically_near(0.0, mass, beta)
    x = beta * (where[1] - where[0]) * difference / mass
    tolerance = 2 * cld_rounding(beta, mass, where[1] - where[0])
    psi, sigma = whitened(near.transition(*where), mass)
    psi_critical, sigma_critical = whitened(critical.transition(*where), mass)
    assert norm(psi - psi_critical) <= x + tolerance
    assert norm(sigma - sigma_critical) <= 2 * x + tolerance


@given(
    log_uniform(1e-12, 0.9),
    st.one_of(st.just(0.25), log_uniform(0.1, 2.0)),
    log_uniform(0.5, 8.0),
    intervals(),
)
def test_kernels_are_smooth_through_critical_damping(
    gap: float, mass: float, beta: float, where: Any
) -> None:
    length = where[1] - where[0]
    over, difference = critically_near(gap, mass, beta)
    under, other = critically_near(-gap, mass, beta)
    critical, _ = critically_near(0.0, mass, beta)
    x = beta * length * difference / mass
    # The two frictions are not quite symmetric, being rounded.
    skewness = 2 * beta * length * abs(difference - other) / mass
    tolerance = 4 * cld_rounding(beta, mass, length) + skewness
    psi, sigma = whitened(over.transition(*where), mass)
    psi_under, sigma_under = whitened(under.transition(*where), mass)
    psi_critical, sigma_critical = whitened(critical.transition(*where), mass)
    assert norm(psi + psi_under - 2 * psi_critical) <= x**2 + tolerance
    assert norm(sigma + sigma_under - 2 * sigma_critical) <= 4 * x**2 + tolerance


@given(log_uniform(1e-12, 0.9), times())
def test_the_root_is_continuous_through_critical_damping(gap: float, t: float) -> None:
    near, difference = critically_near(gap, 0.25, 4.0)
    critical, _ = critically_near(0.0, 0.25, 4.0)
    ratio = diagonal(near.marginal(t)) / diagonal(critical.marginal(t))
    # Noise sqrt(2 Gamma) moves the diagonal by gap / 2 at once, the drift by at most x.
    x = 4.0 * t * difference / 0.25
    assert ((ratio - 1).abs() <= gap + 2 * x + 2 * DIAGONAL).all()


# Invariance -------------------------------------------------------------------------------------


@given(stable_processes(), schedules(), intervals(), seeds())
def test_kernels_do_not_depend_on_units(
    process: StableProcess, schedule: Any, where: Any, seed: int
) -> None:
    units = np.exp(np.random.default_rng(seed).uniform(-1.0, 1.0, process.components))
    scale = torch.from_numpy(units)
    outer = scale[:, None] / scale
    other = LinearSDE.from_matrices(
        process.A * outer, process.Q_root * scale[:, None], schedule=schedule
    )
    ours, theirs = process.sde(schedule).transition(*where), other.transition(*where)
    # The other process has a larger ||A||_1, and its errors return through the units' condition.
    spread = float(scale.max() / scale.min())
    size = max(1.0, float(torch.linalg.matrix_norm(process.A * outer, 1)))
    b = clock(schedule, *where)
    tolerance = rounding(process, b) + spread * rounding(process, size * b)
    assert norm(theirs.mean / outer - ours.mean) <= tolerance
    root = theirs.root / scale[:, None]
    error = root @ root.mT - ours.covariance
    assert norm(error) <= 2 * spread * tolerance * norm(ours.covariance)


@given(log_uniform(1 / 16, 16.0), clds(), times())
def test_cld_does_not_depend_on_the_unit_of_velocity(unit: float, sde: CLD, t: float) -> None:
    # v -> b v leaves the law of x alone with beta -> b beta, M -> b^2 M, Gamma -> b Gamma.
    options = {"beta": 4.0, "mass": 0.25, "friction": 0.8}
    other = {"beta": 4.0 * unit, "mass": 0.25 * unit**2, "friction": 0.8 * unit}
    ours, theirs = CLD(**options).marginal(t), CLD(**other).marginal(t)
    scale = torch.tensor([1.0, unit], dtype=torch.float64)
    # Each side keeps the promise of the kernels.
    assert ((diagonal(theirs) / scale - diagonal(ours)).abs() <= 2e-12 * diagonal(ours)).all()
    mean = theirs.mean / scale[:, None] * scale
    tolerance = 2e-12 * max(unit, 1 / unit)
    assert norm(mean - ours.mean) <= tolerance * norm(ours.mean)


@given(stable_processes(), schedules(), intervals())
def test_kernels_depend_on_time_through_the_clock_alone(
    process: StableProcess, schedule: Any, where: Any
) -> None:
    b = clock(schedule, *where)
    assume(b > 0)
    ours = process.sde(schedule).transition(*where)
    theirs = process.sde(b).transition(0.0, 1.0)
    tolerance = 2 * rounding(process, b)
    assert norm(ours.mean - theirs.mean) <= tolerance
    assert norm(ours.covariance - theirs.covariance) <= tolerance * norm(ours.covariance)


@given(stable_processes(noise=("full", "chain")), intervals())
def test_the_stationary_law_is_stationary(process: StableProcess, where: Any) -> None:
    sde = process.sde(4.0)
    sigma = sde.marginal(where[1], process.stationary).covariance
    # Sigma itself solves its equation to kappa eps only, as rounded.
    tolerance = 2 * rounding(process, 4.0)
    assert norm(sigma - process.stationary) <= tolerance * norm(process.stationary)


# Edges and shapes -------------------------------------------------------------------------------


@every_family
@given(t=st.one_of(st.sampled_from([0.0, 1.0]), times()))
def test_a_zero_step_is_the_identity(family: Any, t: float) -> None:
    sde = family()
    kernel = sde.transition(t, t)
    assert torch.equal(kernel.mean, torch.eye(sde.components, dtype=torch.float64))
    assert not kernel.root.any()
    assert not kernel.covariance.any()


@given(stable_processes(), schedules(), times())
def test_a_zero_step_of_a_random_process_is_the_identity(
    process: StableProcess, schedule: Any, t: float
) -> None:
    kernel = process.sde(schedule).transition(t, t)
    assert torch.equal(kernel.mean, torch.eye(process.components, dtype=torch.float64))
    assert not kernel.root.any()


@every_family
def test_the_marginal_at_zero_is_the_initial_law(family: Any) -> None:
    sde = family()
    identity = torch.eye(sde.components, dtype=torch.float64)
    zero = sde.marginal(0.0, torch.zeros_like(identity))
    own = sde.marginal(0.0)
    full = sde.marginal(0.0, identity + 0.5)
    for kernel in (zero, own, full):
        assert torch.equal(kernel.mean, identity)
        assert torch.isfinite(kernel.root).all()
        assert torch.isfinite(kernel.covariance).all()
    assert not zero.root.any()
    # A Cholesky factorisation of a k x k matrix, and its square.
    assert norm(full.covariance - (identity + 0.5)) <= 16 * EPS * norm(full.covariance)


@every_family
@given(s_shape=shapes(), seed=seeds())
def test_times_of_any_shape_broadcast(family: Any, s_shape: tuple[int, ...], seed: int) -> None:
    sde = family()
    generator = torch.Generator().manual_seed(seed)
    s = 0.5 * torch.rand(s_shape, generator=generator, dtype=torch.float64)
    t = 0.5 + 0.5 * torch.rand((2, *[1] * len(s_shape)), generator=generator, dtype=torch.float64)
    kernel = sde.transition(s, t)
    k = sde.components
    shape = torch.broadcast_shapes(s.shape, t.shape)
    assert kernel.mean.shape == kernel.root.shape == kernel.covariance.shape == (*shape, k, k)
    assert kernel.mean.dtype == kernel.root.dtype == torch.float64
    first = s.flatten()[0].item()
    single = sde.transition(first, t.flatten()[0].item())
    assert torch.equal(sde.transition_matrix(s, t), kernel.mean)
    # A batch may share the number of doublings of its longest step: equal to rounding, not in bits.
    tolerance = family_rounding(sde)
    index = (0,) * len(shape)
    assert norm(kernel.mean[index] - single.mean) <= tolerance
    error = norm(kernel.root[index] - single.root)
    assert error <= tolerance * max(norm(single.root), 1e-300)


@every_family
@given(shape=shapes(), seed=seeds())
def test_drift_and_diffusion_take_the_shape_of_time(
    family: Any, shape: tuple[int, ...], seed: int
) -> None:
    sde = family()
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    k = sde.components
    assert sde.drift(t).shape == (*shape, k, k)
    assert sde.diffusion(t).shape[:-1] == (*shape, k)
    assert sde.marginal(t).mean.shape == (*shape, k, k)
    for value in (sde.drift(t), sde.diffusion(t)):
        assert value.dtype == torch.float64
