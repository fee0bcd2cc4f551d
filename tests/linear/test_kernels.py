"""Kernels of every kind of process against references of 110 digits; densities and samples."""

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

import cldsde.linear
import references
import strategies
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, CosineVP, LinearSDE, RectifiedFlow, SubVPSDE
from cldsde.linear import Schedule
from cldsde.linear.increments import increment_roots
from probes import generator, norm, normals, tensor
from references import Homogeneous, Polynomial, Reference, initial_covariance
from references.interpolants import INTERPOLANTS
from tolerances import KERNEL, rounding

GAPS = [10.0**e for e in range(-8, 1)]
# Lengths from 1e-8 to 1: from the start, inside, to the end, and across an edge of panels.
PAIRS = [(s, s + gap) for s in (0.0, 1e-4, 0.25, 0.3) for gap in GAPS[::2] if s + gap <= 1]
PAIRS += [(1 - gap, 1.0) for gap in GAPS[:-1:2]] + [(0.5 - 4e-6, 0.5 + 6e-6), (0.1, 0.2)]
PAIRS += [(0.25 - 1e-9, 0.25 + 1e-9)]  # and across a knot of a table

Case = Callable[[], tuple[LinearSDE, Reference]]


def ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Relative error; no error is allowed of a signal that has vanished."""
    return error / torch.where(size > 0, size, 1e-300)


def assert_agrees(kernel, exact, where, bound):
    """Psi, Sigma and root within the bound by norm, the root's diagonal entry by entry."""
    mean, covariance, root = references.as_tensors(exact)
    assert torch.equal(kernel.root, kernel.root.tril())
    errors = {}
    for name, expected in (("mean", mean), ("covariance", covariance), ("root", root)):
        found = getattr(kernel, name)
        assert (found.dtype, found.shape) == (torch.float64, expected.shape)
        errors[name] = ratio(*map(torch.linalg.matrix_norm, (found - expected, expected)))
    found, expected = (x.diagonal(dim1=-2, dim2=-1) for x in (kernel.root, root))
    errors["diagonal"] = ratio((found - expected).abs(), expected).amax(-1)
    assert all(error.max() <= bound for error in errors.values()), [
        (name, float(error.max()), where[int(error.argmax())]) for name, error in errors.items()
    ]


def assert_transitions(sde, exact, bound=KERNEL, pairs=PAIRS):
    kernel = sde.transition(*tensor(pairs).unbind(-1))
    assert_agrees(kernel, [exact.transition(*pair) for pair in pairs], pairs, bound)


def assert_marginals(sde, exact, initial, bound=KERNEL, times=GAPS):
    sigma = initial_covariance(initial, sde.components)
    kernel = sde.marginal(tensor(times), initial_covariance=sigma)
    assert_agrees(kernel, [exact.marginal(t, sigma) for t in times], times, bound)


def declared(process: Any, reference: Any, *variants: dict[str, Any]) -> list[tuple[str, Case]]:
    """A process with its defaults, and with other options."""
    return [
        (f"{process.__name__}({options})", lambda o=options: (process(**o), reference(**o)))
        for options in ({}, *variants)
    ]


def by_quadrature() -> tuple[LinearSDE, Reference]:
    """VP with a schedule that has no integral of its own."""
    schedule = Schedule(lambda t: 2 * math.log(3) * 9**t)
    exact = Homogeneous([[-0.5]], [[1.0]], references.variance_clock(1.0, 3.0))
    return VPSDE(schedule=schedule), exact


def of_polynomials(drift: Any, diffusion: Any) -> Case:
    """F(t) = sum_i F_i t^i, and G(t) likewise."""

    def polynomial(values: Any) -> Any:
        terms = [torch.as_tensor(value, dtype=torch.float64) for value in values]
        return lambda t: sum(value * t**i for i, value in enumerate(terms))

    sde = LinearSDE.from_functions(polynomial(drift), polynomial(diffusion))
    return lambda: (sde, Polynomial(drift, diffusion))


CHAIN, CHAIN_NOISE = HOLD().drift(0.5), HOLD().diffusion(0.5)
FUNCTIONS: dict[str, Case] = {
    "oscillator": of_polynomials(
        [[[-0.5, 4.0], [-1.0, -3.0]], [[0.25, 3.0], [-4.0, 0.5]], [[0.0, -2.0], [1.5, -4.0]]],
        [[[0.25, 0.0], [0.0, 1.5]], [[0.0, 0.5], [-0.75, 1.0]]],
    ),
    "noise that vanishes": of_polynomials([[[-1.0]], [[0.5]]], [[[1.0]], [[-2.0]]]),
    "chain that fills": of_polynomials([CHAIN, normals(1, 3, 3)], [CHAIN_NOISE]),
    "noise that turns": of_polynomials([normals(9, 3, 3)], [normals(10, 3, 1), normals(11, 3, 1)]),
    "four components": of_polynomials([normals(12, 4, 4), normals(13, 4, 4)], [normals(14, 4, 1)]),
}
CLDS: list[dict[str, Any]] = [
    # At the default mass the friction 1 is critical; near it the eigenvalues nearly coincide.
    *({"friction": friction} for friction in (0.2, 1 - 1e-6, 1 - 1e-12, 1 + 1e-9, 1.1)),
    {"beta": (0.1, 20.0), "friction": 2.0},
    {"mass": 0.04, "friction": 0.8, "velocity_scale": 0.0},
    {"position_noise": 0.01, "friction": 0.5, "beta": (0.5, 8.0)},
    {"position_noise": 0.5},
]
PSLDS = {"gamma": 0.0, "nu": 4.0}, {"beta": (0.1, 20.0), "gamma": 0.25, "nu": 8.0}
HOLDS = {"coupling": 2.0, "friction": 1.5}, {"inverse_mass": 4.0, "auxiliary_scale": 1.0}
CASES: dict[str, Case] = dict(
    [
        *declared(VPSDE, references.vp, {"beta_min": 1e-3, "beta_max": 12.0}),
        *declared(SubVPSDE, references.sub_vp, {"beta_min": 0.5, "beta_max": 8.0}),
        *declared(VESDE, references.ve, {"sigma_min": 0.1, "sigma_max": 348.0}),
        *declared(CLD, references.cld, *CLDS),
        *declared(PSLD, references.psld, *PSLDS),
        *declared(HOLD, references.hold, {"beta": (0.5, 8.0)}, *HOLDS),
        ("by quadrature", by_quadrature),
        *((name, lambda case=case: case) for name, case in INTERPOLANTS.items()),
        *FUNCTIONS.items(),
    ]
)


def test_every_published_process_has_a_reference():
    made = {type(make()[0]).__name__ for make in CASES.values()}
    names = {name: getattr(cldsde.linear, name) for name in cldsde.linear.__all__}
    kinds = {name: x for name, x in names.items() if isinstance(x, type)}
    published = {name for name, kind in kinds.items() if issubclass(kind, LinearSDE)}
    assert published <= made, f"add {published - made} to CASES or INTERPOLANTS"


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_agree_with_the_reference(name):
    sde, exact = CASES[name]()
    assert_transitions(sde, exact)
    for initial in ("own", "zero", "full", "data"):
        assert_marginals(sde, exact, initial)


ACCUMULATED = ["rectified flow", "SubVPSDE({})", "VESDE({})", "PSLD({})", "HOLD({})", "cosine"]
ACCUMULATED += ["VP functions"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_noise_is_the_integral_of_the_squared_diffusion(name):
    sde, exact = CASES[name]()
    pairs = [(0.0, 0.3), (0.2, 0.2 + 1e-8), (0.1, 0.999), (0.5, 1 - 1e-6)]
    pairs = pairs if name in INTERPOLANTS else PAIRS[::3]
    found = sde.accumulated_noise(*tensor(pairs).unbind(-1))
    for value, (s, t) in zip(found, pairs, strict=True):
        # The noise of an interpolant diverges at t = 1.
        nearer = [1 - (1 - s) / 10**k for k in range(1, 6)] if name in INTERPOLANTS else []
        cuts = [s, *(u for u in nearer if u < t and t - s > 1e-3), t]
        for i in range(sde.components):
            with mp.workdps(40):
                integral = float(mp.quad(lambda u, i=i: exact.slopes(u)[1][i, i], cuts))
            assert abs(float(value[i, i]) - integral) <= KERNEL * integral
        assert torch.equal(value, value.diag().diag())


# At short times the rows of the root of one noise for several components are parallel to many
# digits; its small diagonal entries lie in the rest.
@pytest.mark.one_in(2)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_one_noise_on_coupled_components_agrees_with_the_reference(k):
    A, Q_root = normals(k, k, k + 1).split([k, 1], 1)
    A = A - 2 * torch.eye(k)
    sde = LinearSDE.from_matrices(A, Q_root, (1.0, 4.0))
    exact = Homogeneous(A, Q_root, references.clock_of((1.0, 4.0)))
    # Each triangularisation perturbs a row relative to its own size. Within a step of ||A|| h = 1/2
    # leading terms are eliminated first; from step to step they are not, so that composing steps
    # loses eps |row| / diagonal.
    root = sde.transition(0.0, 0.5 / float(A.abs().sum(0).max())).root
    lost = torch.linalg.vector_norm(root, dim=1) / root.diagonal()
    bound = max(KERNEL, rounding(4 * k, float(lost.max())))
    assert_transitions(sde, exact, bound)
    rate = float(sde.drift(1.0).abs().sum(0).max())
    for initial in ("zero", "auxiliary", "last", "full"):
        assert_marginals(sde, exact, initial, times=[gap for gap in GAPS if gap * rate <= 0.5])
        assert_marginals(sde, exact, initial, bound)


def test_increments_over_a_long_interval_agree_with_their_integrals():
    """Psi falls by e^-100 in each of four panels, which are the fewest; more are needed."""
    stiff = LinearSDE.from_matrices([[-400.0]], [[1.0]])
    root = increment_roots(stiff, tensor([0.0]), tensor([1.0]), integrals=True)[0]
    expected = tensor([[1.0, 1 / 400], [1 / 400, 1 / 800]])  # less e^-400
    units = expected.diagonal().sqrt()
    assert norm((root @ root.mT - expected) / units / units[:, None]) <= KERNEL


@pytest.mark.parametrize("name", list(CASES))
def test_drift_and_diffusion_agree_with_the_reference(name):
    """F and G G^T, entry by entry."""
    times = (0.05, 0.31, 0.77, 0.999) if name in INTERPOLANTS else (0.0, 1e-3, 0.3, 1.0)
    sde, exact = CASES[name]()
    with mp.workdps(references.DIGITS):
        expected = references.as_tensors([exact.slopes(mp.mpf(t)) for t in times])
    G, noise = sde.diffusion(tensor(times)), expected[1].amax(0).diagonal()
    assert sde.driven == tuple(i for i in range(sde.components) if noise[i] > 0)
    for found, wanted in zip((sde.drift(tensor(times)), G @ G.mT), expected, strict=True):
        assert ((found - wanted).abs() <= KERNEL * wanted.abs()).all()


# Properties of random processes ----------------------------------------------------------------


def process_rounding(process: strategies.StableProcess, b: float) -> float:
    """Rounding over a clock of b; A is scaled to ||A||_1 = 1.

    A transition is made of about 2 ||A||_1 b short steps, each with a relative error of a few eps;
    the clock itself is off by a few eps, which moves exp(A b) by ||A|| b eps. No step amplifies an
    error in the coordinates in which the stationary covariance is the identity; going there and
    back costs its condition number. 64 covers k <= 4 components and the constants of products.
    Absolute for Psi, and relative to ||Sigma|| for covariances, whose doublings only add terms.
    """
    return rounding(64, (1 + b) * float(torch.linalg.cond(process.stationary)))


kinds = st.sampled_from(["zero", "last", "full"])


@given(strategies.stable_processes(), strategies.schedules(), strategies.intervals(), kinds)
def test_random_processes_agree_with_the_reference(process, schedule, where, kind):
    s, t = where
    sde, clock = process.sde(schedule), references.clock_of(schedule)
    initial = initial_covariance(kind, process.components)
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
        assert (kernel.root.diagonal() > 0).all()


FAMILIES = [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD, lambda: CLD(position_noise=0.1)]
FAMILIES += [RectifiedFlow, CosineVP]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_no_time_changes_nothing(family):
    sde = family()
    identity = torch.eye(sde.components, dtype=torch.float64)
    for t in (0.0, 1e-8, 0.3, 1, torch.tensor(1.0).half()):
        kernel = sde.transition(t, t)
        assert torch.equal(kernel.mean, identity)
        assert not kernel.root.any()
    for initial in (torch.zeros_like(identity), sde.initial_covariance, identity + 0.5):
        kernel = sde.marginal(0.0, initial)
        assert torch.equal(kernel.mean, identity)
        # A Cholesky factorisation of a k x k matrix, and its square.
        assert norm(kernel.covariance - initial) <= rounding(16, norm(initial))


@pytest.mark.one_in(3)
@every_family
@given(shape=strategies.shapes(), seed=strategies.seeds())
def test_times_of_any_shape_broadcast(family, shape, seed):
    sde: LinearSDE = family()
    s = 0.5 * torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    t = 0.5 + 0.25 * torch.arange(2, dtype=torch.float64).reshape(2, *[1] * len(shape))
    k, both = sde.components, torch.broadcast_shapes(s.shape, t.shape)
    kernel = sde.transition(s, t)
    assert kernel.mean.shape == kernel.root.shape == kernel.covariance.shape == (*both, k, k)
    assert torch.equal(sde.transition_matrix(s, t), kernel.mean)
    assert sde.drift(s).shape == sde.marginal(s).mean.shape == (*shape, k, k)
    assert sde.diffusion(s).shape[:-1] == (*shape, k)
    single = sde.transition(s.flatten()[0].item(), t.flatten()[0].item())
    # A batch may share the number of doublings of its longest step: equal to rounding, not in bits.
    for found, expected in ((kernel.mean, single.mean), (kernel.root, single.root)):
        first = found[(0,) * len(both)]
        assert norm(first - expected) <= KERNEL * math.sqrt(k) * norm(expected)


# Densities and samples -------------------------------------------------------------------------


def dense_log_prob(kernel: Any, z_t: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
    """The same density, each dimension on its own, by torch."""
    residual = z_t.flatten(2) - kernel.mean @ z_s.flatten(2)
    zero = torch.zeros(len(kernel.mean), dtype=torch.float64)
    return MultivariateNormal(zero, kernel.covariance).log_prob(residual.mT).sum(-1)


@every_family
def test_densities_agree_with_the_dense_distribution(family):
    kernel, prior = family().transition(0.1, 0.7), family().prior
    z_s = normals(0, 4, len(kernel.mean), 2, 2)
    z_t = kernel.sample(z_s, generator=generator(1))
    # torch factorises the covariance: eps times its condition number, below 1e6; terms below 50.
    condition = float(torch.linalg.cond(kernel.covariance))
    assert condition < 1e6
    bound = rounding(64, condition + 50)
    assert (kernel.log_prob(z_t, z_s) - dense_log_prob(kernel, z_t, z_s)).abs().max() <= bound
    z = prior.sample((5, 3), generator=generator(0), dtype=torch.float64)
    expected = dense_log_prob(prior, z, torch.zeros_like(z))
    assert (prior.log_prob(z) - expected).abs().max() <= rounding(64, 50)


def test_a_draw_is_the_mean_plus_the_root_times_the_noise():
    kernel, z = HOLD().transition(0.1, 0.4), normals(0, 5, 3, 2)
    drawn, noise = kernel.perturb(z, generator=generator(0))
    # Sums of six products of numbers below 10.
    assert (drawn - kernel.mean @ z - kernel.root @ noise).abs().max() <= rounding(8, 10)
    assert torch.equal(kernel.sample(z, generator=generator(0)), drawn)
    prior = HOLD(inverse_mass=4.0).prior
    drawn = prior.sample((5, 2), generator=generator(0), dtype=torch.float64)
    assert (drawn - prior.root @ normals(0, 5, 3, 2)).abs().max() <= rounding(8, 10)
    for axes in ((), (1, 8, 8)):
        state = torch.ones(4, 3, *axes)
        for value in (*kernel.perturb(state), prior.sample((4, *axes))):
            assert (value.dtype, value.shape) == (torch.float32, state.shape)
        log_probs = kernel.log_prob(state, state), prior.log_prob(state)
        assert {(x.dtype, x.shape) for x in log_probs} == {(torch.float32, (4,))}


def test_one_component_has_roots_whose_squares_overflow_or_vanish():
    growing = LinearSDE.from_matrices([[100.0]], [[1.0]], 5.0)
    # Ψ = e^500 and Q = (e^1000 − 1)/200; the exponent is rounded.
    for initial, expected in (([[1.0]], math.sqrt(1 + 1 / 200)), ([[0.0]], math.sqrt(1 / 200))):
        root = float(growing.marginal(1.0, initial).root)
        assert math.log(root) - 500 == pytest.approx(math.log(expected), abs=500 * KERNEL)
    for size in (1e160, 1e-165):
        still = LinearSDE.from_matrices([[0.0]], [[3 * size, 4 * size]])
        assert float(still.transition(0.0, 1.0).root) == pytest.approx(5 * size, rel=KERNEL, abs=0)
