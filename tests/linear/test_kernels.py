"""Kernels of every family against high-precision references."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mpmath as mp
import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from linear import reference
from linear.reference import Law, Reference
from strategies import critical_friction, stable_process

# The project's promise. Rounding explains about a tenth of it: the transition over a clock B comes
# from about |A| B doublings of a step with error eps, and |A| B is at most a few hundred here.
TOLERANCE = 1e-12

GAPS = [10.0**e for e in range(-8, 1)]
FUNCTION_GAPS = [1e-8, 1e-4, 1e-1, 1.0]  # fewer: every kernel calls the functions many times
STARTS = [0.0, 1e-4, 0.3]
BETAS = [4.0, (0.1, 20.0)]
RATIOS = [0.5, 0.9, 1 - 1e-6, 1.0, 1 + 1e-12, 1.1, 2.0]
INITIALS = ["own", "zero", "full", "data"]


def pairs(gaps: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs (s, t) with t - s from 1e-8 to 1, from several s and up to the end."""
    chosen = [(s, s + gap) for s in STARTS for gap in gaps if s + gap <= 1]
    chosen += [(1 - gap, 1.0) for gap in gaps[:-1]]
    return chosen


def initial_covariance(kind: str, components: int) -> torch.Tensor | None:
    """Covariances of z_0 by name; "hsm": all but the data is uncertain, "data": the data alone."""
    if kind == "own":
        return None
    sigma = torch.zeros(components, components, dtype=torch.float64)
    if kind == "full":
        index = torch.arange(components, dtype=torch.float64)
        sigma = 0.4 ** (index[:, None] - index).abs() / (1 + index[:, None] + index)
        sigma = sigma + 0.25 * torch.eye(components, dtype=torch.float64)
    if kind == "data":
        sigma[0, 0] = 0.1225
    if kind == "hsm":
        sigma.diagonal()[1:] = 0.04
    if kind == "last":
        sigma[-1, -1] = 0.04
    return sigma


def normwise(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of the error over that of the expected matrix, for each matrix."""
    return torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected)


def assert_agrees(
    kernel: Any, laws: Sequence[Law], where: Sequence[Any], tolerance: float = TOLERANCE
) -> None:
    """Psi, Sigma and root within the tolerance norm-wise, root's diagonal element by element."""
    mean, covariance, root = reference.as_tensors(laws)
    for value in (kernel.mean, kernel.covariance, kernel.root):
        assert value.dtype == torch.float64
        assert value.shape == mean.shape
        assert torch.isfinite(value).all()
    assert torch.equal(kernel.root, kernel.root.tril())
    expected = root.diagonal(dim1=-2, dim2=-1)
    actual = kernel.root.diagonal(dim1=-2, dim2=-1)
    errors = {
        "mean": normwise(kernel.mean, mean),
        "covariance": normwise(kernel.covariance, covariance),
        "root": normwise(kernel.root, root),
        "diagonal of root": ((actual - expected).abs() / expected).amax(-1),
    }
    wrong = [
        f"{name}: error {error.max():.2e} at {where[int(error.argmax())]}"
        for name, error in errors.items()
        if not error.max() <= tolerance
    ]
    assert not wrong, "; ".join(wrong)


def assert_transitions_agree(
    sde: LinearSDE,
    exact: Reference,
    gaps: Sequence[float] = GAPS,
    tolerance: float = TOLERANCE,
) -> None:
    where = pairs(gaps)
    s, t = torch.tensor(where, dtype=torch.float64).unbind(-1)
    laws = [exact.transition(*pair) for pair in where]
    assert_agrees(sde.transition(s, t), laws, where, tolerance)


def assert_marginals_agree(
    sde: LinearSDE,
    exact: Reference,
    initial: str,
    times: Sequence[float] = GAPS,
    tolerance: float = TOLERANCE,
) -> None:
    sigma = initial_covariance(initial, sde.components)
    kernel = sde.marginal(torch.tensor(times, dtype=torch.float64), initial_covariance=sigma)
    assert_agrees(kernel, [exact.marginal(t, sigma) for t in times], times, tolerance)


def each(name: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise with readable names."""
    return pytest.mark.parametrize(name, values, ids=[f"{name}={v!r}" for v in values])


class TestReferences:
    """The references agree with each other, far below what they are used for."""

    PROCESSES: ClassVar[dict[str, Callable[[], reference.Homogeneous]]] = {
        "cld": reference.cld,
        "overdamped cld": lambda: reference.cld((0.1, 20.0), friction=2.0),
        "psld": reference.psld,
        "hold": reference.hold,
    }

    @each("name", list(PROCESSES))
    @each("t", [1e-8, 0.1])
    def test_block_exponential_agrees_with_power_series(self, name: str, t: float) -> None:
        exact = self.PROCESSES[name]()
        with mp.workdps(reference.DIGITS):
            clock = exact._clock(mp.mpf(0), mp.mpf(t))
            series = reference.Polynomial([exact.drift], [reference.cholesky(exact.noise)])
            laws = zip(exact.transition(0.0, t), series.transition(0.0, clock), strict=True)
            for ours, theirs in laws:
                assert mp.mnorm(ours - theirs, "f") < mp.mpf(10) ** -60 * mp.mnorm(ours, "f")

    def test_block_exponential_agrees_with_the_critical_closed_form(self) -> None:
        # math: y = 2 w B, w = 2 / Gamma; Q_xx = P(3, y), Q_vv = M (P(3, y) + 2 y e^-y).
        with mp.workdps(reference.DIGITS):
            for t in (1e-8, 1e-3, 1.0):
                y = 4 * mp.mpf(4) * mp.mpf(t)
                p3 = mp.gammainc(3, 0, y, regularized=True)
                sigma = reference.cld().transition(0.0, t).covariance
                assert abs(sigma[0, 0] / p3 - 1) < mp.mpf(10) ** -50
                assert abs(4 * sigma[1, 1] / (p3 + 2 * y * mp.exp(-y)) - 1) < mp.mpf(10) ** -50

    def test_moving_frame_agrees_with_power_series(self) -> None:
        # In the frame S = [[0, 1], [0, 0]], exp(t S) = I + t S: F and G are polynomials.
        process = reference.from_matrices(
            [[0.0, 2.0], [-1.0, -1.5]], [[0.0], [1.25]], reference.constant_clock(1.0)
        )
        moving = reference.MovingFrame([[0.0, 1.0], [0.0, 0.0]], process)
        drift = [[[0.0, 3.0], [-1.0, -1.5]], [[-1.0, -1.5], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]
        series = reference.Polynomial(drift, [[[0.0], [1.25]], [[1.25], [0.0]]])
        laws = zip(moving.transition(0.25, 0.75), series.transition(0.25, 0.75), strict=True)
        for ours, theirs in laws:
            with mp.workdps(reference.DIGITS):
                assert mp.mnorm(ours - theirs, "f") < mp.mpf(10) ** -60 * mp.mnorm(ours, "f")

    @each("name", ["vp", "sub_vp", "ve"])
    def test_scalar_closed_forms_solve_the_variance_equation(self, name: str) -> None:
        exact = getattr(reference, name)()
        with mp.workdps(30):
            clock = reference.linear_clock(0.1, 20.0)
            beta = lambda t: mp.mpf(0.1) + (20 - mp.mpf(0.1)) * t  # noqa: E731
            rate, gain = {
                "vp": (beta, beta),
                "sub_vp": (beta, lambda t: beta(t) * (1 - mp.exp(-2 * clock(mp.mpf(0), t)))),
                "ve": (
                    lambda t: mp.mpf(0),
                    lambda t: 2 * mp.log(50 / mp.mpf(0.01)) * exact.marginal(t).covariance[0, 0],
                ),
            }[name]
            variance = lambda t: exact.moments(mp.mpf(0.2), t)[1][0, 0]  # noqa: E731
            t = mp.mpf(0.7)
            slope = mp.diff(variance, t)
            assert abs(slope + rate(t) * variance(t) - gain(t)) < mp.mpf(10) ** -12 * gain(t)


SCALARS = {
    "VPSDE()": (VPSDE, reference.vp, {}),
    "VPSDE(1e-3, 12)": (VPSDE, reference.vp, {"beta_min": 1e-3, "beta_max": 12.0}),
    "SubVPSDE()": (SubVPSDE, reference.sub_vp, {}),
    "SubVPSDE(0.5, 8)": (SubVPSDE, reference.sub_vp, {"beta_min": 0.5, "beta_max": 8.0}),
    "VESDE()": (VESDE, reference.ve, {}),
    "VESDE(0.1, 348)": (VESDE, reference.ve, {"sigma_min": 0.1, "sigma_max": 348.0}),
}


@each("name", list(SCALARS))
class TestScalarProcesses:
    """VP, sub-VP and VE."""

    def test_transition_agrees_with_the_reference(self, name: str) -> None:
        process, exact, options = SCALARS[name]
        assert_transitions_agree(process(**options), exact(**options))

    @each("initial", ["own", "zero", "full"])
    def test_marginal_agrees_with_the_reference(self, name: str, initial: str) -> None:
        process, exact, options = SCALARS[name]
        if (process, initial) == (VPSDE, "own"):
            initial = "zero"  # the same thing
        assert_marginals_agree(process(**options), exact(**options), initial)


@each("beta", BETAS)
@each("ratio", RATIOS)
class TestCLD:
    """Critically-damped Langevin diffusion, with any damping; ratio: friction over critical."""

    def test_transition_agrees_with_the_reference(self, ratio: float, beta: Any) -> None:
        options = {"beta": beta, "friction": ratio * critical_friction(0.25)}
        assert_transitions_agree(CLD(**options), reference.cld(**options))

    @each("initial", INITIALS)
    def test_marginal_agrees_with_the_reference(
        self, ratio: float, beta: Any, initial: str
    ) -> None:
        options = {"beta": beta, "friction": ratio * critical_friction(0.25)}
        assert_marginals_agree(CLD(**options), reference.cld(**options), initial)


@each("ratio", [0.5, 1.0, 2.0])
@each("mass", [0.04, 1.7])
class TestCLDWithOtherMasses:
    """CLD away from its default mass and velocity scale."""

    def options(self, ratio: float, mass: float) -> dict[str, float]:
        friction = ratio * critical_friction(mass)
        return {"beta": 2.5, "mass": mass, "friction": friction, "velocity_scale": 1.0}

    def test_transition_agrees_with_the_reference(self, ratio: float, mass: float) -> None:
        options = self.options(ratio, mass)
        assert_transitions_agree(CLD(**options), reference.cld(**options))

    @each("initial", INITIALS)
    def test_marginal_agrees_with_the_reference(
        self, ratio: float, mass: float, initial: str
    ) -> None:
        options = self.options(ratio, mass)
        assert_marginals_agree(CLD(**options), reference.cld(**options), initial)


@each("ratio", [0.5, 1.0, 2.0])
@each("position_noise", [0.01, 0.5])
class TestCLDWithPositionNoise:
    """CLD whose position is driven, too."""

    def options(self, ratio: float, position_noise: float) -> dict[str, Any]:
        friction = ratio * critical_friction(0.25)
        return {"beta": (0.5, 8.0), "friction": friction, "position_noise": position_noise}

    def test_transition_agrees_with_the_reference(
        self, ratio: float, position_noise: float
    ) -> None:
        options = self.options(ratio, position_noise)
        assert_transitions_agree(CLD(**options), reference.cld(**options))

    @each("initial", INITIALS)
    def test_marginal_agrees_with_the_reference(
        self, ratio: float, position_noise: float, initial: str
    ) -> None:
        options = self.options(ratio, position_noise)
        assert_marginals_agree(CLD(**options), reference.cld(**options), initial)


OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "PSLD()": (PSLD, reference.psld, {}),
    "PSLD(gamma=0)": (PSLD, reference.psld, {"gamma": 0.0, "nu": 4.0}),
    "PSLD(overdamped)": (PSLD, reference.psld, {"beta": (0.1, 20.0), "gamma": 0.25, "nu": 8.0}),
    "PSLD(underdamped)": (PSLD, reference.psld, {"gamma": 0.5, "nu": 2.0, "mass": 0.1}),
    "HOLD()": (HOLD, reference.hold, {}),
    "HOLD(linear)": (HOLD, reference.hold, {"beta": (0.5, 8.0)}),
    "HOLD(underdamped)": (HOLD, reference.hold, {"coupling": 2.0, "friction": 1.5}),
    "HOLD(L=4)": (HOLD, reference.hold, {"inverse_mass": 4.0, "auxiliary_scale": 1.0}),
}


@each("name", list(OTHERS))
class TestPSLDAndHOLD:
    """Phase-space Langevin and third-order Langevin diffusion."""

    def test_transition_agrees_with_the_reference(self, name: str) -> None:
        process, exact, options = OTHERS[name]
        assert_transitions_agree(process(**options), exact(**options))

    @each("initial", INITIALS)
    def test_marginal_agrees_with_the_reference(self, name: str, initial: str) -> None:
        process, exact, options = OTHERS[name]
        assert_marginals_agree(process(**options), exact(**options), initial)


def geometric_rate(t: Any) -> torch.Tensor:
    """0.2 * 40^t."""
    return 0.2 * torch.exp(torch.as_tensor(t, dtype=torch.float64) * math.log(40.0))


def geometric_integral(s: Any, t: Any) -> torch.Tensor:
    gap = torch.as_tensor(t, dtype=torch.float64) - torch.as_tensor(s, dtype=torch.float64)
    return geometric_rate(s) * torch.expm1(gap * math.log(40.0)) / math.log(40.0)


def squared_sine_rate(t: Any) -> torch.Tensor:
    """3 (1 + sin^2(2 t))."""
    return 3.0 * (1 + torch.sin(2 * torch.as_tensor(t, dtype=torch.float64)) ** 2)


SCHEDULES: dict[str, tuple[Any, reference.Clock]] = {
    "constant": (3.0, reference.constant_clock(3.0)),
    "linear": ((0.1, 8.0), reference.linear_clock(0.1, 8.0)),
    "decreasing": ((8.0, 0.0), reference.linear_clock(8.0, 0.0)),
    "geometric": (
        Schedule(geometric_rate, geometric_integral),
        reference.geometric_clock(0.2, 8.0),
    ),
    "geometric, integrated numerically": (
        Schedule(geometric_rate),
        reference.geometric_clock(0.2, 8.0),
    ),
    "squared sine, integrated numerically": (
        Schedule(squared_sine_rate),
        reference.squared_sine_clock(3.0, 2.0),
    ),
}


@each("noise", ["full", "chain"])
@each("components", [1, 2, 3, 4])
class TestFromMatrices:
    """Random stable processes declared by two matrices."""

    def test_transition_agrees_with_the_reference(self, components: int, noise: Any) -> None:
        process = stable_process(components, components, noise)
        rate, clock = SCHEDULES["constant"]
        exact = reference.from_matrices(process.A, process.Q_root, clock)
        assert_transitions_agree(process.sde(rate), exact)

    @each("initial", ["zero", "hsm", "full", "data"])
    def test_marginal_agrees_with_the_reference(
        self, components: int, noise: Any, initial: str
    ) -> None:
        process = stable_process(10 + components, components, noise)
        rate, clock = SCHEDULES["linear"]
        exact = reference.from_matrices(process.A, process.Q_root, clock)
        assert_marginals_agree(process.sde(rate), exact, initial)


def dense_process(components: int, noise: str, seed: int) -> tuple[LinearSDE, Reference]:
    """A without a zero, one noise: on a random direction, on the last component or on the first.

    Noise reaches several components through the same coupling, so that at short times their rows of
    the root are parallel to many digits; its small diagonal entries lie in the rest.
    """
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(components, components, generator=g, dtype=torch.float64)
    A = A - 2 * torch.eye(components, dtype=torch.float64)
    Q_root = torch.randn(components, 1, generator=g, dtype=torch.float64)
    if noise != "random":
        Q_root = torch.zeros_like(Q_root)
        Q_root[-1 if noise == "last" else 0] = 0.7
    exact = reference.from_matrices(A, Q_root, reference.linear_clock(1.0, 4.0))
    return LinearSDE.from_matrices(A, Q_root, (1.0, 4.0)), exact


def doubling_rounding(sde: LinearSDE) -> float:
    """What composing steps of ||A|| h = 1/2 may do to the small diagonal entries of a root.

    Each triangularisation perturbs a row relative to its own size. Within a step leading terms are
    eliminated first; from step to step they are not, so that eps |row| / diagonal is lost.
    """
    rate = float(sde.drift(0.0).abs().sum(0).max())
    root = sde.transition(0.0, 0.5 / rate).root
    ratio = torch.linalg.vector_norm(root, dim=1) / root.diagonal()
    return 4 * sde.components * torch.finfo(torch.float64).eps * float(ratio.max())


def single_steps(sde: LinearSDE) -> list[float]:
    """Gaps over which ||A|| B stays below 1/2, so that nothing is composed."""
    rate = float(sde.drift(1.0).abs().sum(0).max())
    return [gap for gap in GAPS if gap * rate <= 0.5]


@each("seed", [0, 1, 2])
@each("noise", ["random", "last", "first"])
@each("components", [2, 3, 4])
class TestDenseProcesses:
    """One noise for several components that see it alike."""

    def test_transition_agrees_with_the_reference(
        self, components: int, noise: str, seed: int
    ) -> None:
        sde, exact = dense_process(components, noise, seed)
        assert_transitions_agree(sde, exact, gaps=single_steps(sde))
        tolerance = max(TOLERANCE, doubling_rounding(sde))
        assert_transitions_agree(sde, exact, tolerance=tolerance)

    @each("initial", ["zero", "hsm", "full", "data", "last"])
    def test_marginal_agrees_with_the_reference(
        self, components: int, noise: str, seed: int, initial: str
    ) -> None:
        sde, exact = dense_process(components, noise, seed)
        assert_marginals_agree(sde, exact, initial, times=single_steps(sde))
        tolerance = max(TOLERANCE, doubling_rounding(sde))
        assert_marginals_agree(sde, exact, initial, tolerance=tolerance)


@each("schedule", list(SCHEDULES))
def test_transition_agrees_with_the_reference_for_every_schedule(schedule: str) -> None:
    process = stable_process(3, 3, "chain")
    rate, clock = SCHEDULES[schedule]
    exact = reference.from_matrices(process.A, process.Q_root, clock)
    assert_transitions_agree(process.sde(rate), exact)


def polynomial(*coefficients: Any) -> Callable[[Any], torch.Tensor]:
    """t -> sum_i C_i t^i, for a time or for a tensor of times."""
    values = [torch.tensor(c, dtype=torch.float64) for c in coefficients]

    def function(t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)[..., None, None]
        return sum((c * t**i for i, c in enumerate(values[1:], start=1)), values[0] + 0 * t)

    return function


def polynomial_process() -> tuple[LinearSDE, Reference]:
    """A forced oscillator whose stiffness, damping and noise drift in time."""
    drift = [
        [[-0.5, 4.0], [-1.0, -3.0]],
        [[0.25, 3.0], [-4.0, 0.5]],
        [[0.0, -2.0], [1.5, -4.0]],
    ]
    diffusion = [[[0.25, 0.0], [0.0, 1.5]], [[0.0, 0.5], [-0.75, 1.0]]]
    sde = LinearSDE.from_functions(polynomial(*drift), polynomial(*diffusion))
    return sde, reference.Polynomial(drift, diffusion)


def moving_process(components: int) -> tuple[LinearSDE, Reference]:
    """A random stable process seen from a frame that turns with angular speed 3/2."""
    process = stable_process(20 + components, components, "full")
    turn = {
        1: [[0.0]],
        2: [[0.0, -1.5], [1.5, 0.0]],
        3: [[0.0, -1.0, 1.0], [1.0, 0.0, -0.5], [-1.0, 0.5, 0.0]],
    }[components]
    skew = torch.tensor(turn, dtype=torch.float64)
    square, identity = skew @ skew, torch.eye(components, dtype=torch.float64)

    def frame(t: torch.Tensor) -> torch.Tensor:
        # Rodrigues: exp(t S) for a skew S that turns in one plane.
        return identity + torch.sin(1.5 * t) / 1.5 * skew + (1 - torch.cos(1.5 * t)) / 2.25 * square

    def drift(t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)[..., None, None]
        rotation = frame(t)
        return skew + (1 + 6 * t) * (rotation @ process.A @ rotation.mT)

    def diffusion(t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)[..., None, None]
        return torch.sqrt(1 + 6 * t) * (frame(t) @ process.Q_root)

    inner = reference.from_matrices(process.A, process.Q_root, reference.linear_clock(1.0, 7.0))
    return LinearSDE.from_functions(drift, diffusion), reference.MovingFrame(turn, inner)


FUNCTIONS: dict[str, Callable[[], tuple[LinearSDE, Reference]]] = {
    "polynomial": polynomial_process,
    "moving, k=1": lambda: moving_process(1),
    "moving, k=2": lambda: moving_process(2),
    "moving, k=3": lambda: moving_process(3),
}


@each("name", list(FUNCTIONS))
class TestFromFunctions:
    """F(t) and G(t) that do not commute with themselves."""

    def test_transition_agrees_with_the_reference(self, name: str) -> None:
        assert_transitions_agree(*FUNCTIONS[name](), FUNCTION_GAPS)

    @each("initial", ["zero", "full", "data"])
    def test_marginal_agrees_with_the_reference(self, name: str, initial: str) -> None:
        assert_marginals_agree(*FUNCTIONS[name](), initial, FUNCTION_GAPS)

    @each("initial", ["zero", "full"])
    def test_marginals_at_many_times_are_those_at_each(self, name: str, initial: str) -> None:
        sde, _ = FUNCTIONS[name]()
        covariance = initial_covariance(initial, sde.components)
        times = torch.tensor([*FUNCTION_GAPS, 1e-6, 0.25, 0.5, 0.77, 0.25], dtype=torch.float64)
        together = sde.marginal(times, covariance)
        for i, t in enumerate(times):
            alone = sde.marginal(t, covariance)
            # Both are exact to 1e-12 of a row's size.
            for one, other in ((together.mean[i], alone.mean), (together.root[i], alone.root)):
                size = other.abs().amax(-1, keepdim=True)
                assert bool(((one - other).abs() <= 4e-12 * size).all())

    def test_many_times_have_the_derivatives_of_each(self, name: str) -> None:
        sde, _ = FUNCTIONS[name]()
        # Half of the last time is an edge of panels, whatever their number.
        times = torch.tensor([0.1, 0.2, 0.25, 0.5, 0.77, 1.0], dtype=torch.float64)
        times.requires_grad_()
        laws = sde.marginal(times)
        (slopes,) = torch.autograd.grad(laws.root[:, -1, -1].sum(), times)
        for t, slope in zip(times.detach(), slopes, strict=True):
            one = t.clone().requires_grad_()
            (expected,) = torch.autograd.grad(sde.marginal(one).root[-1, -1], one)
            # The derivative of a polynomial that is exact to 1e-12, of degree 16.
            assert float(slope) == pytest.approx(float(expected), rel=1e-9, abs=1e-10)
