"""Kernels of every kind of process against references of 110 digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch

import references
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from references import Homogeneous, Polynomial, Reference
from strategies import stable_process
from tolerances import KERNEL, rounding

GAPS = [10.0**e for e in range(-8, 1)]
# Lengths from 1e-8 to 1: from the start, inside, to the end, and across an edge of panels.
PAIRS = [(s, s + gap) for s in (0.0, 1e-4, 0.25, 0.3) for gap in GAPS[::2] if s + gap <= 1]
PAIRS += [(1 - gap, 1.0) for gap in GAPS[:-1:2]] + [(0.5 - 4e-6, 0.5 + 6e-6), (0.1, 0.2)]
CRITICAL = 1.0  # friction of CLD with mass 1/4

Case = Callable[[], tuple[LinearSDE, Reference]]


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def initial_covariance(kind: str, k: int) -> torch.Tensor | None:
    """Covariances of z_0: the process's own, none, of some components alone, or correlated."""
    index = torch.arange(k, dtype=torch.float64)
    correlated = 0.4 ** (index[:, None] - index).abs() / (1 + index[:, None] + index)
    return {
        "own": None,
        "zero": torch.zeros(k, k, dtype=torch.float64),
        "full": correlated + 0.25 * torch.eye(k, dtype=torch.float64),
        "data": 0.1225 * (index == 0).double().diag(),
        "auxiliary": 0.04 * (index > 0).double().diag(),
        "last": 0.04 * (index == k - 1).double().diag(),
    }[kind]


def assert_agrees(kernel, exact, where, bound):
    """Psi, Sigma and root within the bound by norm, the root's diagonal entry by entry."""
    mean, covariance, root = references.as_tensors(exact)
    assert torch.equal(kernel.root, kernel.root.tril())
    errors = {}
    for name, expected in (("mean", mean), ("covariance", covariance), ("root", root)):
        found = getattr(kernel, name)
        assert found.dtype == torch.float64
        assert found.shape == expected.shape
        norm = torch.linalg.matrix_norm
        errors[name] = norm(found - expected) / norm(expected)
    found, expected = (x.diagonal(dim1=-2, dim2=-1) for x in (kernel.root, root))
    errors["diagonal"] = ((found - expected).abs() / expected).amax(-1)
    wrong = [
        f"{name}: {error.max():.2e} at {where[int(error.argmax())]}"
        for name, error in errors.items()
        if not error.max() <= bound
    ]
    assert not wrong, "; ".join(wrong)


def assert_transitions(sde, exact, bound=KERNEL):
    kernel = sde.transition(*tensor(PAIRS).unbind(-1))
    assert_agrees(kernel, [exact.transition(*pair) for pair in PAIRS], PAIRS, bound)


def assert_marginals(sde, exact, initial, bound=KERNEL, times=GAPS):
    sigma = initial_covariance(initial, sde.components)
    kernel = sde.marginal(tensor(times), initial_covariance=sigma)
    assert_agrees(kernel, [exact.marginal(t, sigma) for t in times], times, bound)


# Declared processes ----------------------------------------------------------------------------


def declared(process: Any, reference: Any, **options: Any) -> tuple[str, Case]:
    text = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{process.__name__}({text})", lambda: (process(**options), reference(**options))


def of_matrices(seed: int, components: int, noise: Any, schedule: str) -> tuple[str, Case]:
    """A random stable process declared by two matrices."""

    def make():
        process = stable_process(seed, components, noise)
        rate, clock = SCHEDULES[schedule]
        return process.sde(rate), Homogeneous(process.A, process.Q_root, clock)

    return f"{components} components, {noise}, {schedule}", make


def geometric_rate(t: torch.Tensor) -> torch.Tensor:
    return 0.2 * torch.exp(t * math.log(40.0))


def geometric_integral(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return geometric_rate(s) * torch.expm1((t - s) * math.log(40.0)) / math.log(40.0)


SCHEDULES: dict[str, tuple[Any, Any]] = {
    "constant": (3.0, references.clock_of(3.0)),
    "linear": ((0.1, 8.0), references.linear_clock(0.1, 8.0)),
    "decreasing": ((8.0, 0.0), references.linear_clock(8.0, 0.0)),
    "geometric": (
        Schedule(geometric_rate, geometric_integral),
        references.geometric_clock(0.2, 8.0),
    ),
    "geometric, by quadrature": (Schedule(geometric_rate), references.geometric_clock(0.2, 8.0)),
    "squared sine, by quadrature": (
        Schedule(lambda t: 3.0 * (1 + torch.sin(2 * t) ** 2)),
        references.squared_sine_clock(3.0, 2.0),
    ),
}
RATIOS = [0.5, 0.9, 1 - 1e-6, 1.0, 1 + 1e-12, 1.1, 2.0]
DECLARED: dict[str, Case] = dict(
    [
        declared(VPSDE, references.vp),
        declared(VPSDE, references.vp, beta_min=1e-3, beta_max=12.0),
        declared(SubVPSDE, references.sub_vp),
        declared(SubVPSDE, references.sub_vp, beta_min=0.5, beta_max=8.0),
        declared(VESDE, references.ve),
        declared(VESDE, references.ve, sigma_min=0.1, sigma_max=348.0),
        *(declared(CLD, references.cld, friction=r * CRITICAL) for r in RATIOS),
        *(declared(CLD, references.cld, beta=(0.1, 20.0), friction=r) for r in (0.5, 1.0, 2.0)),
        declared(CLD, references.cld, mass=0.04, friction=0.2, velocity_scale=1.0),
        declared(CLD, references.cld, mass=0.04, friction=0.8, velocity_scale=0.0),
        declared(CLD, references.cld, mass=1.7, friction=2.6, beta=2.5),
        declared(CLD, references.cld, position_noise=0.01, friction=0.5, beta=(0.5, 8.0)),
        declared(CLD, references.cld, position_noise=0.5),
        declared(CLD, references.cld, position_noise=0.5, friction=2.0),
        declared(PSLD, references.psld),
        declared(PSLD, references.psld, gamma=0.0, nu=4.0),
        declared(PSLD, references.psld, beta=(0.1, 20.0), gamma=0.25, nu=8.0),
        declared(PSLD, references.psld, gamma=0.5, nu=2.0, mass=0.1),
        declared(HOLD, references.hold),
        declared(HOLD, references.hold, beta=(0.5, 8.0)),
        declared(HOLD, references.hold, coupling=2.0, friction=1.5),
        declared(HOLD, references.hold, inverse_mass=4.0, auxiliary_scale=1.0),
        *(of_matrices(3, 3, "chain", schedule) for schedule in SCHEDULES),
        *(of_matrices(k, k, "full", "linear") for k in (1, 2, 3, 4)),
        *(of_matrices(k, k, "chain", "constant") for k in (1, 2, 4)),
    ]
)


@pytest.mark.parametrize("name", list(DECLARED))
def test_transition_agrees_with_the_reference(name):
    assert_transitions(*DECLARED[name]())


@pytest.mark.parametrize("initial", ["own", "zero", "full", "data"])
@pytest.mark.parametrize("name", list(DECLARED))
def test_marginal_agrees_with_the_reference(name, initial):
    assert_marginals(*DECLARED[name](), initial)


@pytest.mark.parametrize("name", ["VPSDE()", "SubVPSDE()", "VESDE()", "PSLD()", "HOLD()"])
def test_accumulated_noise_is_the_integral_of_the_squared_diffusion(name):
    sde, exact = DECLARED[name]()
    clock = exact.clock

    def gain(t):  # of sub-VP
        return -clock.rate(t) * mp.expm1(-2 * clock.integral(mp.mpf(0), t))

    found = sde.accumulated_noise(*tensor(PAIRS).unbind(-1))
    for value, pair in zip(found, PAIRS, strict=True):
        with mp.workdps(40):
            s, t = map(mp.mpf, pair)
            scalar = name == "SubVPSDE()"
            integral = mp.quad(gain, [s, t]) if scalar else exact.Q * clock.integral(s, t)
            wanted = references.as_tensors([[mp.matrix([[integral]]) if scalar else integral]])[0]
        assert ((value - wanted).abs() <= KERNEL * wanted.abs()).all()


# Matrices without a zero -----------------------------------------------------------------------


def dense_process(k: int, noise: str) -> tuple[LinearSDE, Reference, float]:
    """One noise for several components that see it alike, and the rounding of its root.

    At short times their rows of the root are parallel to many digits; its small diagonal entries
    lie in the rest. Each triangularisation perturbs a row relative to its own size. Within a step
    leading terms are eliminated first; from step to step they are not, so that composing steps of
    ||A|| h = 1/2 loses eps |row| / diagonal.
    """
    g = torch.Generator().manual_seed(k)
    A = torch.randn(k, k, generator=g, dtype=torch.float64) - 2 * torch.eye(k)
    Q_root = torch.randn(k, 1, generator=g, dtype=torch.float64)
    if noise != "random":
        Q_root = 0.7 * torch.eye(k, dtype=torch.float64)[:, [-1 if noise == "last" else 0]]
    sde = LinearSDE.from_matrices(A, Q_root, (1.0, 4.0))
    root = sde.transition(0.0, 0.5 / float(A.abs().sum(0).max())).root
    ratio = torch.linalg.vector_norm(root, dim=1) / root.diagonal()
    exact = Homogeneous(A, Q_root, references.linear_clock(1.0, 4.0))
    return sde, exact, max(KERNEL, rounding(4 * k, float(ratio.max())))


@pytest.mark.parametrize("noise", ["random", "last", "first"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_one_noise_on_coupled_components_agrees_with_the_reference(k, noise):
    sde, exact, bound = dense_process(k, noise)
    assert_transitions(sde, exact, bound)
    # Nothing is composed while ||A|| B <= 1/2.
    rate = float(sde.drift(1.0).abs().sum(0).max())
    short = [gap for gap in GAPS if gap * rate <= 0.5]
    for initial in ("zero", "auxiliary", "last", "full"):
        assert_marginals(sde, exact, initial, times=short)
        assert_marginals(sde, exact, initial, bound)


# Functions of time -----------------------------------------------------------------------------


def polynomial(*coefficients: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """t -> sum_i C_i t^i."""
    values = [tensor(c) for c in coefficients]
    return lambda t: sum((c * t**i for i, c in enumerate(values[1:], 1)), values[0] + 0 * t)


def of_polynomials(drift: Any, diffusion: Any) -> Case:
    return lambda: (
        LinearSDE.from_functions(polynomial(*drift), polynomial(*diffusion)),
        Polynomial(drift, diffusion),
    )


def random(seed: int, *shape: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).tolist()


CHAIN, CHAIN_NOISE = HOLD().drift(0.5).tolist(), HOLD().diffusion(0.5).tolist()
FUNCTIONS: dict[str, Case] = {
    "oscillator": of_polynomials(
        [[[-0.5, 4.0], [-1.0, -3.0]], [[0.25, 3.0], [-4.0, 0.5]], [[0.0, -2.0], [1.5, -4.0]]],
        [[[0.25, 0.0], [0.0, 1.5]], [[0.0, 0.5], [-0.75, 1.0]]],
    ),
    "noise that vanishes": of_polynomials([[[-1.0]], [[0.5]]], [[[1.0]], [[-2.0]]]),
    "chain": of_polynomials([CHAIN, (tensor(CHAIN) / 2).tolist()], [CHAIN_NOISE]),
    "chain that fills": of_polynomials([CHAIN, random(1, 3, 3)], [CHAIN_NOISE]),
    "noise that turns": of_polynomials([random(9, 3, 3)], [random(10, 3, 1), random(11, 3, 1)]),
    "four components": of_polynomials([random(12, 4, 4), random(13, 4, 4)], [random(14, 4, 1)]),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_that_do_not_commute_agree_with_the_reference(name):
    sde, exact = FUNCTIONS[name]()
    assert_transitions(sde, exact)
    for initial in ("full", "auxiliary"):
        assert_marginals(sde, exact, initial)


@pytest.mark.parametrize("name", ["oscillator", "noise that turns"])
def test_marginals_of_functions_at_many_times_are_those_at_each(name):
    sde, _ = FUNCTIONS[name]()
    # Half of the last time is an edge of panels, whatever their number.
    times = tensor([1e-8, 1e-4, 0.1, 0.25, 0.5, 0.77, 0.25, 1.0]).requires_grad_()
    together = sde.marginal(times, initial_covariance("full", sde.components))
    (slopes,) = torch.autograd.grad(together.root[2:, -1, -1].sum(), times)
    for i, t in enumerate(times.detach()):
        t.requires_grad_()
        alone = sde.marginal(t, initial_covariance("full", sde.components))
        for one, other in ((together.mean[i], alone.mean), (together.root[i], alone.root)):
            size = other.abs().amax(-1, keepdim=True)
            assert bool(((one - other).abs() <= 4 * KERNEL * size).all())
        if i >= 2:
            (slope,) = torch.autograd.grad(alone.root[-1, -1], t)
            # Derivatives of polynomials of degree 16: 16^2 times the error of a value on a panel.
            assert float(slopes[i]) == pytest.approx(float(slope), rel=KERNEL * 256, abs=KERNEL)


# The references --------------------------------------------------------------------------------


def assert_same(ours, theirs):
    with mp.workdps(references.DIGITS):
        for one, other in zip(ours, theirs, strict=True):
            assert mp.mnorm(one - other, "f") < mp.mpf(10) ** -50 * mp.mnorm(one, "f")


@pytest.mark.parametrize(
    "exact",
    [references.cld(), references.cld(4.0, friction=2.0), references.psld(), references.hold()],
)
@pytest.mark.parametrize("t", [1e-8, 0.1])
def test_block_exponentials_are_the_power_series(exact, t):
    with mp.workdps(references.DIGITS):
        clock = exact.clock.integral(mp.mpf(0), mp.mpf(t))
    series = Polynomial([exact.A], [exact.Q_root])
    assert_same(exact.transition(0.0, t), series.transition(0.0, clock))


def test_block_exponentials_are_the_critical_closed_form():
    # math: y = 2 w B, w = 2 / Gamma; Q_xx = P(3, y), Q_vv = M (P(3, y) + 2 y e^-y).
    for t in (1e-8, 1e-3, 1.0):
        with mp.workdps(references.DIGITS):
            y = 16 * mp.mpf(t)
            p3 = mp.gammainc(3, 0, y, regularized=True)
            sigma = references.cld().transition(0.0, t).covariance
            diagonal = [mp.matrix([[sigma[0, 0]]]), mp.matrix([[4 * sigma[1, 1]]])]
            expected = [mp.matrix([[p3]]), mp.matrix([[p3 + 2 * y * mp.exp(-y)]])]
        assert_same(diagonal, expected)


def test_the_closed_form_of_sub_vp_solves_its_variance_equation():
    exact, t = references.sub_vp(), mp.mpf(0.7)
    with mp.workdps(30):
        variance = lambda t: exact.moments(mp.mpf(0.2), t)[1][0, 0]  # noqa: E731
        beta = exact.clock.rate(t)
        gain = beta * (1 - mp.exp(-2 * exact.clock.integral(mp.mpf(0), t)))
        # mpmath differentiates to half of its digits.
        assert abs(mp.diff(variance, t) + beta * variance(t) - gain) < mp.mpf(10) ** -12 * gain


@pytest.mark.parametrize("name", ["vp", "ve", "cld", "psld", "hold"])
def test_the_float64_processes_have_the_moments_of_the_exact_ones(name):
    exact = getattr(references, name)()
    process, t = references.dense(exact), [1e-3, 0.2, 0.9]
    with mp.workdps(references.DIGITS):
        initial = exact.own.copy()
        initial[0, 0] += process.data_variance
    mean, covariance, _ = references.as_tensors([exact.marginal(u, initial) for u in t])
    noise = references.as_tensors([exact.transition(0.2, 0.9)])[1][0]
    root = torch.from_numpy(process.joint_root(0.2, 0.9, nodes=40))
    r = process.Q_root.shape[1]
    joint = root @ root.mT
    # Exponentials of matrices of the size |A| B <= 40.
    bound = rounding(64 * 40)
    for found, expected in (
        (process.mean(tensor(t).numpy()), process.data_mean * mean[..., 0]),
        (process.covariance(tensor(t).numpy()), covariance),
        (joint[r:, r:], noise),
        (joint[:r, :r], 0.7 * torch.eye(r, dtype=torch.float64)),
    ):
        assert (torch.as_tensor(found) - expected).abs().max() <= bound * expected.abs().max()
