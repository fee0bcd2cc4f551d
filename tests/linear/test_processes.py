"""Processes: declarations, stationary distributions and priors, samples, rejected arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE
from strategies import intervals, schedules, stable_processes
from tolerances import KERNEL, rounding

TIMES = torch.tensor([0.0, 1e-6, 0.2, 0.7, 1.0], dtype=torch.float64)


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def diagonal(*entries: float) -> torch.Tensor:
    return tensor(entries).diag()


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2).max())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: torch.Tensor, expected: torch.Tensor, operations: float = 4) -> bool:
    """Entry by entry, to the rounding of so many operations."""
    return torch.allclose(found, expected, rtol=rounding(operations), atol=0)


# Process, driven components, covariance of the prior, covariance of z_0.
Declaration = tuple[Callable[[], LinearSDE], tuple[int, ...], torch.Tensor, torch.Tensor]
DECLARED: dict[str, Declaration] = {
    "VP": (VPSDE, (0,), diagonal(1.0), diagonal(0.0)),
    "sub-VP": (SubVPSDE, (0,), diagonal(1.0), diagonal(0.0)),
    "VE": (lambda: VESDE(0.1, 3.0), (0,), diagonal(9.0), diagonal(0.01)),
    "CLD": (CLD, (1,), diagonal(1.0, 0.25), diagonal(0.0, 0.01)),
    "CLD, heavy": (
        lambda: CLD((0.1, 8.0), mass=2.0, friction=0.3, velocity_scale=1.0),
        (1,),
        diagonal(1.0, 2.0),
        diagonal(0.0, 2.0),
    ),
    "PSLD": (PSLD, (0, 1), diagonal(1.0, 0.25), diagonal(0.0, 0.01)),
    "PSLD, gamma=0": (
        lambda: PSLD(gamma=0.0, mass=3.0),
        (1,),
        diagonal(1.0, 3.0),
        diagonal(0.0, 0.12),
    ),
    "HOLD": (HOLD, (2,), diagonal(1.0, 1.0, 1.0), diagonal(0.0, 0.04, 0.04)),
    "HOLD, L=4": (
        lambda: HOLD(inverse_mass=4.0, auxiliary_scale=1.0),
        (2,),
        diagonal(0.25, 0.25, 0.25),
        diagonal(0.0, 0.25, 0.25),
    ),
}
STATIONARY = [name for name in DECLARED if name not in {"VE", "sub-VP"}]
declared = pytest.mark.parametrize("name", list(DECLARED))


@declared
def test_a_process_is_what_its_paper_declares(name):
    make, driven, prior, initial = DECLARED[name]
    sde = make()
    assert sde.components == len(prior)
    assert sde.driven == driven
    assert sde.T == 1.0
    # A square root and its square.
    assert close(sde.prior.covariance, prior)
    assert close(sde.marginal(0.0).covariance, initial)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_matrices_are_those_of_the_papers(t):
    beta, clock = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    ve = 2 * math.log(5000.0) * (0.01 * 5000.0**t) ** 2
    pair = (0.1, 20.0)
    langevin = [[0.0, beta / 0.5], [-beta, -beta * 0.7 / 0.5]]
    expected: list[tuple[LinearSDE, list[list[float]], list[list[float]]]] = [
        (VPSDE(), [[-beta / 2]], [[beta]]),
        (SubVPSDE(), [[-beta / 2]], [[beta * (1 - math.exp(-2 * clock))]]),
        (VESDE(), [[0.0]], [[ve]]),
        (CLD(pair, mass=0.5, friction=0.7), langevin, [[0.0, 0.0], [0.0, 1.4 * beta]]),
        (
            CLD(pair, mass=0.5, friction=0.7, position_noise=0.2),
            langevin,
            [[0.04 * beta, 0.0], [0.0, 1.4 * beta]],
        ),
        (
            PSLD(pair, gamma=0.3, nu=2.0, mass=0.5),
            [[-0.15 * beta, beta], [-beta / 2, -beta]],
            [[0.3 * beta, 0.0], [0.0, beta]],
        ),
        (
            HOLD(pair, coupling=2.0, friction=3.0, inverse_mass=4.0),
            [[0.0, beta, 0.0], [-beta, 0.0, 2 * beta], [0.0, -2 * beta, -3 * beta]],
            [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5 * beta]],
        ),
    ]
    # Products of a few numbers; VE's power has the condition log(5000) = 8.5, and what the
    # noise of sub-VP subtracts here as 1 - exp is 0 or above 0.9.
    for sde, drift, squared in expected:
        G = sde.diffusion(t)
        assert close(sde.drift(t), tensor(drift), 64)
        assert close(G @ G.mT, tensor(squared), 64)


class TestStationaryDistributions:
    @pytest.mark.parametrize("name", STATIONARY)
    def test_they_solve_the_lyapunov_equation(self, name):
        sde = DECLARED[name][0]()
        sigma, F, G = sde.stationary_covariance, sde.drift(TIMES), sde.diffusion(TIMES)
        flow = F @ sigma
        # Three products of k x k matrices.
        assert norm(flow + flow.mT + G @ G.mT) <= rounding(16, norm(F) * norm(sigma))

    @pytest.mark.parametrize("noise", [1e-3, 1.0])
    @pytest.mark.parametrize("friction", [0.5, 3.0])
    def test_position_noise_correlates_position_and_velocity(self, noise, friction):
        sde = CLD(friction=friction, position_noise=noise)
        # From the three equations of F S + S F^T + G G^T = 0: S_xv = -M eps^2 / 2, then
        # S_vv = M - S_xv M / Gamma, S_xx = S_vv / M - Gamma S_xv / M.
        M = 0.25
        xv = -M * noise**2 / 2
        vv = M * (1 - xv / friction)
        expected = tensor([[vv / M - friction * xv / M, xv], [xv, vv]])
        # A linear system of four equations whose condition number is below 100.
        for found in (sde.stationary_covariance, sde.prior.covariance):
            assert norm(found - expected) <= rounding(8, 100 * norm(expected))

    @given(stable_processes(), schedules())
    def test_those_of_matrices_are_found(self, process, schedule):
        sde = process.sde(schedule)
        found = sde.stationary_covariance
        assert torch.equal(found, found.mT)
        flow = process.A @ found
        residual = flow + flow.mT + process.Q_root @ process.Q_root.mT
        # A linear system of k^2 <= 16 equations is solved with a residual of 16 eps of its terms.
        assert norm(residual) <= rounding(16 * 16, max(1.0, norm(found)))
        if process.noise != "deficient":
            assert norm(sde.prior.covariance - found) <= rounding(64, norm(found))

    @pytest.mark.parametrize("A", [[[0.0, 1.0], [0.0, 0.0]], [[0.1]], [[0.0, 1.0], [-1.0, 0.0]]])
    def test_without_one_the_prior_is_the_marginal_at_the_end(self, A):
        k = len(A)
        sde = LinearSDE.from_matrices(A, torch.eye(k), 2.0, initial_covariance=torch.eye(k))
        assert sde.stationary_covariance is None
        assert sde.stationary_reversal is None
        assert torch.equal(sde.prior.covariance, sde.marginal(1.0).covariance)

    def test_some_processes_have_no_reversal(self):
        # Noise never reaches the first component, whose stationary variance is zero.
        singular = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
        assert singular.stationary_reversal is None
        for sde in (VESDE(), SubVPSDE()):
            assert sde.stationary_covariance is None
            assert sde.stationary_reversal is None

    @given(stable_processes(noise=("full", "chain")), intervals())
    def test_the_reversal_is_the_backward_kernel(self, process, where):
        self.assert_reversed_by_bayes(process.sde(4.0), where)

    @pytest.mark.parametrize("name", [*STATIONARY, "position noise"])
    def test_the_reversal_of_each_process_is_the_backward_kernel(self, name):
        sde = CLD(position_noise=1.0) if name == "position noise" else DECLARED[name][0]()
        for where in ((0.0, 1e-8), (0.3, 0.31), (0.1, 1.0)):
            self.assert_reversed_by_bayes(sde, where)
        back = sde.stationary_reversal
        assert back.driven == sde.driven
        again = back.stationary_reversal
        # Multiplications by S, whose condition number is at most 4.
        bound = rounding(32, norm(sde.drift(TIMES)))
        assert norm(again.drift(TIMES) - sde.drift(TIMES)) <= bound
        assert torch.equal(again.diffusion(TIMES), sde.diffusion(TIMES))

    @staticmethod
    def assert_reversed_by_bayes(sde, where):
        """Bayes: z_u | z_t has the mean S Psi^T S^-1 z_t and the covariance S - K S K^T."""
        sigma, psi = sde.stationary_covariance, sde.transition(*where).mean
        gain = torch.linalg.solve(sigma, psi @ sigma).mT
        kernel = sde.stationary_reversal.transition(*where)
        # Rounding over the clock B, amplified by the change to coordinates in which S = I and
        # back: 64 eps (1 + |A| B) cond(S); S^-1 S costs the condition once more.
        grid = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
        size = float(torch.linalg.matrix_norm(sde.drift(grid), 1).mean())
        bound = rounding(64, (1 + size) * float(torch.linalg.cond(sigma)) ** 2)
        assert norm(kernel.mean - gain) <= bound
        assert norm(kernel.covariance - sigma + gain @ sigma @ gain.mT) <= bound * norm(sigma)

    def test_one_that_is_given_must_be_right(self):
        def drift(t):
            return -(1 + t) * tensor([[0.5]])

        def diffusion(t):
            return torch.sqrt(1 + t) * tensor([[1.0]])

        right = LinearSDE.from_functions(drift, diffusion, stationary_covariance=[[1.0]])
        assert right.prior.covariance.item() == 1.0
        with pytest.raises(ValueError, match="stationary_covariance must satisfy"):
            LinearSDE.from_functions(drift, diffusion, stationary_covariance=[[2.0]])


# Rejected arguments ----------------------------------------------------------------------------

POSITIVE = [(CLD, "mass friction beta"), (PSLD, "mass beta"), (VESDE, "sigma_min")]
POSITIVE += [(HOLD, "friction inverse_mass beta")]
NOT_NEGATIVE = [(CLD, "velocity_scale position_noise"), (PSLD, "gamma nu velocity_scale")]
NOT_NEGATIVE += [(HOLD, "auxiliary_scale")]
WRONG_NUMBERS = [-1.0, math.nan, math.inf]
PARAMETERS = [
    (process, {name: value}, f"{name} must be finite and {words}; got {value}")
    for words, table, values in (
        ("positive", POSITIVE, [0.0, *WRONG_NUMBERS]),
        ("at least 0", NOT_NEGATIVE, WRONG_NUMBERS),
    )
    for process, names in table
    for name in names.split()
    for value in values
]
PARAMETERS += [
    *((sde, {"beta_min": x}, "beta") for sde in (VPSDE, SubVPSDE) for x in WRONG_NUMBERS),
    *((sde, {"beta_max": x}, "beta") for sde in (VPSDE, SubVPSDE) for x in WRONG_NUMBERS),
    *((VESDE, {"sigma_min": 1.0, "sigma_max": x}, "sigma_max") for x in (1.0, 0.5, math.nan, -1)),
    *((HOLD, {"coupling": x}, "coupling") for x in (0.0, math.nan, math.inf)),
    (PSLD, {"gamma": 0.0, "nu": 0.0}, r"gamma \+ nu"),
]


@pytest.mark.parametrize(("process", "options", "message"), PARAMETERS)
def test_wrong_parameters_are_rejected(process, options, message):
    with pytest.raises(ValueError, match=message):
        process(**options)


@pytest.mark.parametrize("process", [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD])
def test_unknown_options_are_rejected(process):
    with pytest.raises(TypeError, match="unexpected keyword"):
        process(temperature=1.0)


@pytest.mark.parametrize(
    ("A", "Q_root", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], "A must be square"),
        ([1.0], [[1.0]], "A must be a matrix"),
        (torch.zeros(0, 0), [[1.0]], "A must be a matrix"),
        ([[math.nan]], [[1.0]], "A must be finite"),
        ([[-1.0]], [[1.0], [1.0]], "Q_root must be a matrix of shape 1 × any"),
        ([[-1.0]], [1.0], "Q_root must be a matrix"),
        ([[-1.0]], [[math.inf]], "Q_root must be finite"),
        ([[-1.0]], [[0.0]], "Q_root must have a nonzero entry"),
    ],
)
def test_matrices_that_do_not_fit_are_rejected(A, Q_root, message):
    with pytest.raises(ValueError, match=message):
        LinearSDE.from_matrices(A, Q_root)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        ([[1.0]], r"initial_covariance must be a matrix of shape 2 × 2; got shape \(1, 1\)"),
        ([[1.0, 0.5], [0.0, 1.0]], "must be symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], "must be positive semi-definite"),
        ([[-1.0, 0.0], [0.0, 1.0]], "must be positive semi-definite"),
        ([[math.nan, 0.0], [0.0, 1.0]], "must be finite"),
    ],
)
def test_wrong_initial_covariances_are_rejected(covariance, message):
    with pytest.raises(ValueError, match=message):
        LinearSDE.from_matrices([[0, 1], [-1, -1]], [[0], [1]], initial_covariance=covariance)
    with pytest.raises(ValueError, match=message):
        CLD().marginal(0.5, covariance)
    with pytest.raises(ValueError, match=message):
        CLD().posterior(0.1, 0.5, initial_covariance=covariance)


@declared
def test_times_outside_the_interval_are_rejected(name):
    sde = DECLARED[name][0]()
    for t in (-1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf):
        for where in (t, tensor([0.5, t])):
            for call in (sde.drift, sde.diffusion, sde.marginal, lambda t: sde.transition(0.0, t)):
                with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
                    call(where)
            with pytest.raises(ValueError, match=r"s must lie in \[0, 1\]"):
                sde.transition(where, 1.0)


@pytest.mark.parametrize(
    "t", [torch.tensor(1), torch.tensor([True]), torch.tensor(0.5j), "0.5", None, True, [0.5]]
)
def test_times_of_another_type_are_rejected(t):
    with pytest.raises(TypeError, match="floating-point tensor or a real number"):
        CLD().marginal(t)
    with pytest.raises(TypeError, match="s must be"):
        CLD().transition(t, 1.0)


@pytest.mark.parametrize("t", [1, torch.tensor(1.0), tensor(1.0), torch.tensor(1.0).half()])
def test_whole_numbers_and_all_floating_point_types_are_times(t):
    assert torch.equal(CLD().marginal(t).mean, CLD().marginal(1.0).mean)


@pytest.mark.parametrize(
    ("s", "t", "message"),
    [
        (0.5, 0.2, r"s = 0\.5, t = 0\.2\. Pass the earlier time first"),
        (tensor([0.1, 0.5]), tensor([0.2, 0.4]), "s must not be later than t"),
        (torch.zeros(2), torch.ones(3), r"broadcast; got shapes \(2,\) and \(3,\)"),
    ],
)
def test_pairs_of_times_that_make_no_step_are_rejected(s, t, message):
    for call in (CLD().transition, CLD().transition_matrix):
        with pytest.raises(ValueError, match=message):
            call(s, t)


# Samples ---------------------------------------------------------------------------------------

drawn = pytest.mark.parametrize("name", ["VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD"])
each_conditioning = pytest.mark.parametrize("conditioning", ["data", "all"])
SAMPLES = 10_000


def assert_standard_normal(draws):
    """Moments of (n, k) draws within 5 standard errors: 1 / n and (1 + [i = j]) / n."""
    n, k = draws.shape
    assert (draws.mean(0).abs() <= 5 / math.sqrt(n)).all()
    eye = torch.eye(k, dtype=torch.float64)
    assert ((draws.mT @ draws / n - eye).abs() <= 5 * ((1 + eye) / n).sqrt()).all()


@each_conditioning
@drawn
def test_perturbed_data_have_the_distribution_of_the_forward_process(name, conditioning):
    sde = DECLARED[name][0]()
    x = torch.full((SAMPLES,), 0.7, dtype=torch.float64)
    z, noise = sde.perturb(x, 1e-3, conditioning=conditioning, generator=generator(2))
    kernel = sde.marginal(1e-3)
    # Whitened, so that the small variances of short times are tested, too.
    residual = z - 0.7 * kernel.mean[:, 0]
    assert_standard_normal(torch.linalg.solve_triangular(kernel.root, residual.mT, upper=False).mT)
    assert_standard_normal(noise)


@drawn
def test_the_augmented_state_starts_from_the_initial_distribution(name):
    sde = DECLARED[name][0]()
    x = torch.full((SAMPLES,), 0.7, dtype=torch.float64)
    z = sde.augment(x, generator(1))
    deviation = sde.initial_covariance.diagonal().sqrt()
    z[:, 0] -= 0.7
    assert not z[:, deviation == 0].any()
    assert_standard_normal((z / deviation)[:, deviation > 0])


@pytest.mark.parametrize("t", [1e-6, 0.3, 1.0])
@drawn
def test_the_noise_explains_the_state(name, t):
    sde = DECLARED[name][0]()
    x = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    z, noise = sde.perturb(x, t, generator=generator(1))
    kernel = sde.marginal(t)
    expected = kernel.mean[:, :1] * x[:, None] + kernel.root @ noise
    # Sums of at most four products of numbers below 10 (VE: 3).
    assert (z - expected).abs().max() <= rounding(8, 10)
    # Given the whole state, the transition leads back to the data.
    z, noise = sde.perturb(x, t, conditioning="all", generator=generator(1))
    kernel = sde.transition(0.0, t)
    start = torch.linalg.solve(kernel.mean, z - kernel.root @ noise)
    bound = rounding(64, float(torch.linalg.cond(kernel.mean)) * float(start.abs().max()))
    if name != "VE":  # whose data are blurred at the start
        assert (start[:, 0] - x).abs().max() <= bound


@each_conditioning
@drawn
def test_times_may_differ_between_samples(name, conditioning):
    sde = DECLARED[name][0]()
    x = torch.randn(3, 2, generator=generator(0), dtype=torch.float64)
    t = tensor([0.01, 0.5, 1.0])
    together, _ = sde.perturb(x, t, conditioning=conditioning, generator=generator(1))
    for i, time in enumerate(t):
        alone, _ = sde.perturb(x, time, conditioning=conditioning, generator=generator(1))
        # A batch shares the number of doublings of its longest time.
        assert torch.allclose(together[i], alone[i], rtol=KERNEL, atol=KERNEL)


@each_conditioning
@drawn
def test_draws_follow_the_seed_and_the_shape_and_type_of_the_data(name, conditioning):
    sde = DECLARED[name][0]()

    def draws(x, seed):
        pair = sde.perturb(x, 0.5, conditioning=conditioning, generator=generator(seed))
        return [sde.augment(x, generator(seed)), *pair]

    for axes in ((), (3,), (1, 8, 8)):
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(4, *axes, dtype=dtype)
            for z in draws(x, 0):
                assert (z.dtype, z.shape) == (dtype, (4, sde.components, *axes))
            assert torch.equal(x, torch.ones_like(x))
    first, again, other = draws(x, 0), draws(x, 0), draws(x, 1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(draws(x.flatten(1), 0)[1], first[1].flatten(2))
    if name != "VE":
        assert torch.equal(first[0][:, 0], x)


@pytest.mark.parametrize("x", [torch.zeros(2, dtype=torch.int64), [0.0], torch.tensor(0.0), 1.0])
def test_data_that_are_no_batch_of_numbers_are_rejected(x):
    for call in (CLD().augment, lambda x: CLD().perturb(x, 0.5)):
        with pytest.raises(TypeError, match="data must be a floating-point tensor of shape"):
            call(x)


@each_conditioning
def test_times_that_do_not_fit_the_batch_are_rejected(conditioning):
    for t in (torch.full((3,), 0.5), torch.full((2, 1), 0.5)):
        with pytest.raises(ValueError, match=r"one time or for \(2,\) times"):
            CLD().perturb(torch.zeros(2, 1), t, conditioning=conditioning)
    with pytest.raises(ValueError, match="conditioning must be 'data' or 'all'; got 'none'"):
        CLD().perturb(torch.zeros(2, 1), 0.5, conditioning="none")  # type: ignore[arg-type]
