"""Processes: what they declare, their stationary laws and priors, draws, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from strategies import StableProcess, intervals, log_uniform, schedules, stable_processes

EPS = torch.finfo(torch.float64).eps
TIMES = torch.tensor([0.0, 1e-6, 0.2, 0.7, 1.0], dtype=torch.float64)


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def diagonal(*entries: float) -> torch.Tensor:
    return tensor(entries).diag()


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2).max())


Declaration = tuple[Callable[[], LinearSDE], tuple[int, ...], torch.Tensor]
DECLARED: dict[str, Declaration] = {
    "VP": (VPSDE, (0,), diagonal(1.0)),
    "VP, constant": (lambda: VPSDE(3.0, 3.0), (0,), diagonal(1.0)),
    "sub-VP": (SubVPSDE, (0,), diagonal(1.0)),
    "VE": (VESDE, (0,), diagonal(2500.0)),
    "VE, small": (lambda: VESDE(0.1, 3.0), (0,), diagonal(9.0)),
    "CLD": (CLD, (1,), diagonal(1.0, 0.25)),
    "CLD, heavy": (lambda: CLD(mass=2.0, friction=0.3), (1,), diagonal(1.0, 2.0)),
    "CLD, linear": (lambda: CLD((0.1, 8.0), friction=2.0), (1,), diagonal(1.0, 0.25)),
    "PSLD": (PSLD, (0, 1), diagonal(1.0, 0.25)),
    "PSLD, no friction of x": (lambda: PSLD(gamma=0.0), (1,), diagonal(1.0, 0.25)),
    "PSLD, heavy": (lambda: PSLD(mass=3.0), (0, 1), diagonal(1.0, 3.0)),
    "HOLD": (HOLD, (2,), diagonal(1.0, 1.0, 1.0)),
    "HOLD, L=4": (lambda: HOLD(inverse_mass=4.0), (2,), diagonal(0.25, 0.25, 0.25)),
}
STATIONARY = [name for name in DECLARED if not name.startswith(("VE", "sub"))]
declared = pytest.mark.parametrize("name", list(DECLARED))


class TestDeclarations:
    """Components, driven components, horizon, matrices."""

    @declared
    def test_components_and_driven_components_are_those_of_the_process(self, name: str) -> None:
        make, driven, prior = DECLARED[name]
        sde = make()
        assert sde.components == len(prior)
        assert sde.driven == driven
        assert sde.T == 1.0

    def test_position_noise_drives_both_components(self) -> None:
        assert CLD(position_noise=0.1).driven == (0, 1)
        assert CLD(position_noise=0.0).driven == (1,)

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_the_matrices_are_those_of_the_papers(self, t: float) -> None:
        beta = 0.1 + 19.9 * t
        clock = 0.1 * t + 9.95 * t**2
        rate = math.log(5000.0)
        sigma = 0.01 * 5000.0**t
        expected: list[tuple[LinearSDE, list[list[float]], list[list[float]]]] = [
            (VPSDE(), [[-beta / 2]], [[beta]]),
            (SubVPSDE(), [[-beta / 2]], [[beta * (1 - math.exp(-2 * clock))]]),
            (VESDE(), [[0.0]], [[2 * rate * sigma**2]]),
            (
                CLD((0.1, 20.0), mass=0.5, friction=0.7),
                [[0.0, beta / 0.5], [-beta, -beta * 0.7 / 0.5]],
                [[0.0, 0.0], [0.0, 1.4 * beta]],
            ),
            (
                CLD((0.1, 20.0), mass=0.5, friction=0.7, position_noise=0.2),
                [[0.0, beta / 0.5], [-beta, -beta * 0.7 / 0.5]],
                [[0.04 * beta, 0.0], [0.0, 1.4 * beta]],
            ),
            (
                PSLD((0.1, 20.0), gamma=0.3, nu=2.0, mass=0.5),
                [[-0.15 * beta, beta], [-beta / 2, -beta]],
                [[0.3 * beta, 0.0], [0.0, beta]],
            ),
            (
                HOLD((0.1, 20.0), coupling=2.0, friction=3.0, inverse_mass=4.0),
                [[0.0, beta, 0.0], [-beta, 0.0, 2 * beta], [0.0, -2 * beta, -3 * beta]],
                [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5 * beta]],
            ),
        ]
        # Products of a few numbers; VE's power has the condition log(5000) = 8.5, and what the
        # noise of sub-VP subtracts here as 1 - exp is 0 or above 0.9.
        for sde, drift, squared in expected:
            G = sde.diffusion(t)
            assert torch.allclose(sde.drift(t), tensor(drift), rtol=64 * EPS, atol=0)
            assert torch.allclose(G @ G.mT, tensor(squared), rtol=64 * EPS, atol=0)

    @pytest.mark.parametrize("scale", [0.0, 0.04, 1.0])
    def test_auxiliary_components_start_at_their_share_of_the_stationary_variance(
        self, scale: float
    ) -> None:
        # A square root and its square.
        for sde, expected in [
            (CLD(mass=0.5, velocity_scale=scale), diagonal(0.0, scale * 0.5)),
            (PSLD(mass=0.5, velocity_scale=scale), diagonal(0.0, scale * 0.5)),
            (
                HOLD(inverse_mass=4.0, auxiliary_scale=scale),
                diagonal(0.0, scale / 4, scale / 4),
            ),
        ]:
            found = sde.marginal(0.0).covariance
            assert torch.allclose(found, expected, rtol=4 * EPS, atol=0)

    def test_the_variance_of_ve_is_that_of_the_literature(self) -> None:
        # sigma(t)^2 with the own initial law; the condition of the power is 2 log(5000) = 17.
        sde = VESDE()
        expected = (0.01 * 5000.0**TIMES) ** 2
        found = sde.marginal(TIMES).covariance.flatten()
        assert torch.allclose(found, expected, rtol=8 * 17 * EPS, atol=0)


class TestStationaryLaws:
    """Stationary laws, priors, and the reversal at the stationary law."""

    @declared
    def test_the_prior_is_that_of_the_process(self, name: str) -> None:
        make, _, prior = DECLARED[name]
        # A square root and its square.
        assert torch.allclose(make().prior.covariance, prior, rtol=4 * EPS, atol=0)

    @pytest.mark.parametrize("name", STATIONARY)
    def test_the_stationary_law_solves_the_lyapunov_equation(self, name: str) -> None:
        sde = DECLARED[name][0]()
        sigma, F, G = sde.stationary_covariance, sde.drift(TIMES), sde.diffusion(TIMES)
        assert sigma is not None
        flow = F @ sigma
        # Rounding of three products of k x k matrices.
        assert norm(flow + flow.mT + G @ G.mT) <= 16 * EPS * norm(F) * norm(sigma)

    @pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
    @pytest.mark.parametrize("friction", [0.5, 1.0, 3.0])
    def test_position_noise_correlates_position_and_velocity(
        self, noise: float, friction: float
    ) -> None:
        sde = CLD(friction=friction, position_noise=noise)
        sigma = sde.stationary_covariance
        assert sigma is not None
        # From the three equations of F S + S F^T + G G^T = 0: S_xv = -M eps^2 / 2, then
        # S_vv = M - S_xv M / Gamma, S_xx = S_vv / M - Gamma S_xv / M.
        M = 0.25
        xv = -M * noise**2 / 2
        vv = M * (1 - xv / friction)
        expected = tensor([[vv / M - friction * xv / M, xv], [xv, vv]])
        # A linear system of four equations whose condition number is below 100.
        assert torch.allclose(sigma, expected, rtol=0, atol=100 * 8 * EPS * norm(expected))
        assert torch.allclose(sde.prior.covariance, expected, rtol=0, atol=100 * 8 * EPS)

    @given(stable_processes(), schedules())
    def test_the_stationary_law_of_matrices_is_found(
        self, process: StableProcess, schedule: Any
    ) -> None:
        sde = process.sde(schedule)
        found = sde.stationary_covariance
        assert found is not None
        assert torch.equal(found, found.mT)
        flow = process.A @ found
        residual = flow + flow.mT + process.Q_root @ process.Q_root.mT
        # A linear system of k^2 <= 16 equations is solved with a residual of 16 eps of its terms.
        assert norm(residual) <= 16 * 16 * EPS * max(1.0, norm(found))
        if process.noise != "deficient":
            assert norm(sde.prior.covariance - found) <= 64 * EPS * norm(found)

    @pytest.mark.parametrize("A", [[[0.0, 1.0], [0.0, 0.0]], [[0.1]], [[0.0, 1.0], [-1.0, 0.0]]])
    def test_without_a_stationary_law_the_prior_is_the_marginal_at_the_end(self, A: Any) -> None:
        k = len(A)
        sde = LinearSDE.from_matrices(A, torch.eye(k), 2.0, initial_covariance=torch.eye(k))
        assert sde.stationary_covariance is None
        assert sde.stationary_reversal is None
        assert torch.equal(sde.prior.covariance, sde.marginal(1.0).covariance)

    @pytest.mark.parametrize("make", [VESDE, SubVPSDE], ids=["VE", "sub-VP"])
    def test_ve_and_sub_vp_have_no_reversal_at_a_stationary_law(self, make: Any) -> None:
        assert make().stationary_covariance is None
        assert make().stationary_reversal is None

    @pytest.mark.parametrize("name", STATIONARY)
    @given(where=intervals())
    def test_the_reversal_is_the_backward_kernel_of_the_stationary_process(
        self, name: str, where: Any
    ) -> None:
        self.assert_reversed_by_bayes(DECLARED[name][0](), where)

    @pytest.mark.parametrize("noise", [0.1, 1.0])
    @given(where=intervals())
    def test_the_reversal_with_position_noise_is_the_backward_kernel(
        self, noise: float, where: Any
    ) -> None:
        self.assert_reversed_by_bayes(CLD(position_noise=noise), where)

    @given(stable_processes(noise=("full", "chain")), intervals())
    def test_the_reversal_of_random_processes_is_the_backward_kernel(
        self, process: StableProcess, where: Any
    ) -> None:
        self.assert_reversed_by_bayes(process.sde(4.0), where)

    @staticmethod
    def assert_reversed_by_bayes(sde: LinearSDE, where: Any) -> None:
        """Bayes: z_u | z_t has the mean S Psi^T S^-1 z_t and the covariance S - K S K^T."""
        sigma, reversal = sde.stationary_covariance, sde.stationary_reversal
        assert sigma is not None
        assert reversal is not None
        psi = sde.transition(*where).mean
        gain = torch.linalg.solve(sigma, psi @ sigma).mT
        left = sigma - gain @ sigma @ gain.mT
        kernel = reversal.transition(*where)
        # Rounding over the clock B, amplified by the change to coordinates in which S = I and
        # back: 64 eps (1 + |A| B) cond(S); S^-1 S costs the condition once more.
        grid = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
        size = float(torch.linalg.matrix_norm(sde.drift(grid), 1).mean())
        condition = float(torch.linalg.cond(sigma))
        tolerance = 64 * EPS * (1 + size) * condition**2
        assert norm(kernel.mean - gain) <= tolerance
        assert norm(kernel.covariance - left) <= tolerance * norm(sigma)

    @pytest.mark.parametrize("name", STATIONARY)
    def test_the_reversal_of_the_reversal_is_the_process(self, name: str) -> None:
        sde = DECLARED[name][0]()
        back = sde.stationary_reversal
        assert back is not None
        assert back.driven == sde.driven
        again = back.stationary_reversal
        assert again is not None
        # Multiplications by S, whose condition number is at most 4.
        assert torch.allclose(again.drift(TIMES), sde.drift(TIMES), rtol=32 * EPS, atol=1e-14)
        assert torch.equal(again.diffusion(TIMES), sde.diffusion(TIMES))

    def test_the_reversal_of_cld_turns_the_coupling_and_keeps_the_friction(self) -> None:
        sde = CLD(mass=0.25, friction=1.0, beta=4.0)
        reversal = sde.stationary_reversal
        assert reversal is not None
        expected = tensor([[0.0, -16.0], [4.0, -16.0]])
        assert torch.allclose(reversal.drift(0.5), expected, rtol=16 * EPS, atol=0)

    def test_a_singular_stationary_law_has_no_reversal(self) -> None:
        # Noise never reaches the first component, whose stationary variance is zero.
        sde = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
        assert sde.stationary_reversal is None

    def test_a_wrong_stationary_law_is_refused(self) -> None:
        with pytest.raises(ValueError, match="stationary_covariance must satisfy"):
            LinearSDE.from_functions(
                lambda t: tensor([[-1.0]]),
                lambda t: tensor([[1.0]]),
                stationary_covariance=[[1.0]],
            )

    def test_a_right_stationary_law_is_the_prior(self) -> None:
        sde = LinearSDE.from_functions(
            lambda t: -(1 + t) * tensor([[0.5]]),
            lambda t: torch.sqrt(1 + t) * tensor([[1.0]]),
            stationary_covariance=[[1.0]],
        )
        assert sde.prior.covariance.item() == 1.0


class TestFromFunctions:
    """Processes given by F(t) and G(t)."""

    @given(stable_processes(), intervals(), log_uniform(0.5, 4.0))
    def test_functions_agree_with_matrices(
        self, process: StableProcess, where: Any, rate: float
    ) -> None:
        ours = process.sde((rate, 2 * rate))
        theirs = LinearSDE.from_functions(
            lambda t: rate * (1 + t) * process.A,
            lambda t: torch.sqrt(rate * (1 + t)) * process.Q_root,
        )
        assert theirs.driven == ours.driven
        first, second = ours.transition(*where), theirs.transition(*where)
        # The promise of kernels, in the coordinates in which the stationary law is the identity.
        tolerance = 1e-12 * process.condition
        assert norm(first.mean - second.mean) <= tolerance
        assert norm(first.covariance - second.covariance) <= tolerance * norm(first.covariance)

    def test_functions_may_return_lists(self) -> None:
        sde = LinearSDE.from_functions(lambda t: [[-0.5]], lambda t: [[1.0]])
        # VP with the constant rate 1 in closed form; a few roundings.
        assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(math.exp(-0.5), rel=32 * EPS)

    def test_a_prior_may_be_given(self) -> None:
        sde = LinearSDE.from_functions(
            lambda t: [[-0.5]], lambda t: [[1.0]], prior_covariance=[[4.0]]
        )
        assert sde.prior.covariance.item() == 4.0

    def test_kernels_over_no_times_are_empty(self) -> None:
        sde = LinearSDE.from_functions(lambda t: [[-0.5]], lambda t: [[1.0]])
        assert sde.marginal(torch.empty(0, dtype=torch.float64)).mean.shape == (0, 1, 1)

    @pytest.mark.parametrize(
        ("drift", "diffusion", "message"),
        [
            (lambda t: [[-1.0, 0.0]], lambda t: [[1.0]], "drift must .*square"),
            (lambda t: -1.0, lambda t: [[1.0]], "drift must .*one matrix per time"),
            (lambda t: [-1.0], lambda t: [[1.0]], "drift must .*one matrix per time"),
            (lambda t: [[-1.0]], lambda t: 1.0, "diffusion must .*one matrix per time"),
            (lambda t: [[-1.0]], lambda t: [[1.0], [1.0]], "diffusion must .*as many rows"),
            (lambda t: [[math.nan]], lambda t: [[1.0]], "drift must be finite.*t = 0"),
            (lambda t: [[-1.0]], lambda t: [[1 / (1 - t)]], "diffusion must be finite.*t = 1"),
            (lambda t: [[-1.0]], lambda t: [[0.0]], "diffusion must have a nonzero entry"),
        ],
    )
    def test_functions_that_do_not_fit_are_refused(
        self, drift: Any, diffusion: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            LinearSDE.from_functions(drift, diffusion)


NUMBERS = [-1.0, math.nan, math.inf]
POSITIVE = [(CLD, "mass"), (CLD, "friction"), (PSLD, "mass"), (HOLD, "friction")]
POSITIVE += [(HOLD, "inverse_mass"), (VESDE, "sigma_min"), (CLD, "beta"), (PSLD, "beta")]
POSITIVE += [(HOLD, "beta")]
NOT_NEGATIVE = [(CLD, "velocity_scale"), (CLD, "position_noise"), (PSLD, "gamma"), (PSLD, "nu")]
NOT_NEGATIVE += [(PSLD, "velocity_scale"), (HOLD, "auxiliary_scale")]


class TestRefusals:
    """Parameters, matrices and times that make no process."""

    @pytest.mark.parametrize("value", [0.0, *NUMBERS])
    @pytest.mark.parametrize(("process", "name"), POSITIVE)
    def test_parameters_that_have_to_be_positive_are_checked(
        self, process: Any, name: str, value: float
    ) -> None:
        with pytest.raises(ValueError, match=rf"{name} must be finite and positive; got {value}"):
            process(**{name: value})

    @pytest.mark.parametrize("value", NUMBERS)
    @pytest.mark.parametrize(("process", "name"), NOT_NEGATIVE)
    def test_parameters_that_may_be_zero_are_checked(
        self, process: Any, name: str, value: float
    ) -> None:
        with pytest.raises(ValueError, match=rf"{name} must be finite and at least 0; got {value}"):
            process(**{name: value})

    @pytest.mark.parametrize("value", NUMBERS)
    @pytest.mark.parametrize("process", [VPSDE, SubVPSDE])
    @pytest.mark.parametrize("name", ["beta_min", "beta_max"])
    def test_rates_of_vp_are_checked(self, process: Any, name: str, value: float) -> None:
        with pytest.raises(ValueError, match="beta"):
            process(**{name: value})

    @pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (1.0, math.nan), (1, -1)])
    def test_noise_levels_of_ve_have_to_increase(self, low: float, high: float) -> None:
        with pytest.raises(ValueError, match="sigma_max"):
            VESDE(low, high)

    @pytest.mark.parametrize("coupling", [0.0, math.nan, math.inf])
    def test_hold_without_coupling_is_refused(self, coupling: float) -> None:
        with pytest.raises(ValueError, match="coupling"):
            HOLD(coupling=coupling)

    def test_psld_without_friction_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"gamma \+ nu"):
            PSLD(gamma=0.0, nu=0.0)

    @pytest.mark.parametrize("process", [VPSDE, SubVPSDE, VESDE, CLD, PSLD, HOLD])
    def test_unknown_options_are_refused(self, process: Any) -> None:
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
    def test_matrices_that_do_not_fit_are_refused(self, A: Any, Q_root: Any, message: str) -> None:
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
    def test_what_is_no_covariance_is_refused(self, covariance: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LinearSDE.from_matrices([[0, 1], [-1, -1]], [[0], [1]], initial_covariance=covariance)
        with pytest.raises(ValueError, match=message):
            CLD().marginal(0.5, covariance)

    @pytest.mark.parametrize("t", [-1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("as_tensor", [False, True])
    @declared
    def test_times_outside_the_interval_are_refused(
        self, name: str, as_tensor: bool, t: float
    ) -> None:
        sde = DECLARED[name][0]()
        where = tensor([0.5, t]) if as_tensor else t
        for call in (sde.drift, sde.diffusion, sde.marginal, lambda t: sde.transition(0.0, t)):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
                call(where)
        with pytest.raises(ValueError, match=r"s must lie in \[0, 1\]"):
            sde.transition(where, 1.0)

    @pytest.mark.parametrize(
        "t", [torch.tensor(1), torch.tensor([True]), torch.tensor(0.5j), "0.5", None, True, [0.5]]
    )
    def test_times_of_another_type_are_refused(self, t: Any) -> None:
        with pytest.raises(TypeError, match="floating-point tensor or a real number"):
            CLD().marginal(t)
        with pytest.raises(TypeError, match="s must be"):
            CLD().transition(t, 1.0)

    @pytest.mark.parametrize("t", [1, torch.tensor(1.0), tensor(1.0), torch.tensor(1.0).half()])
    def test_whole_numbers_and_all_floating_point_types_are_times(self, t: Any) -> None:
        assert torch.equal(CLD().marginal(t).mean, CLD().marginal(1.0).mean)

    def test_the_earlier_time_comes_first(self) -> None:
        with pytest.raises(ValueError, match=r"s = 0\.5, t = 0\.2\. Pass the earlier time first"):
            CLD().transition(0.5, 0.2)
        with pytest.raises(ValueError, match="s must not be later than t"):
            CLD().transition_matrix(0.5, 0.2)
        with pytest.raises(ValueError, match="later"):
            CLD().transition(tensor([0.1, 0.5]), tensor([0.2, 0.4]))

    def test_times_that_do_not_broadcast_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"broadcast; got shapes \(2,\) and \(3,\)"):
            CLD().transition(torch.zeros(2), torch.ones(3))


DRAWN: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.1, 3.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
}
drawn = pytest.mark.parametrize("name", list(DRAWN))
SAMPLES = 20_000


def assert_moments(draws: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """Sample moments of (n, k) draws within 5 standard errors of those of the normal law.

    Var of a sample covariance of normals: (S_ii S_jj + S_ij^2) / n.
    """
    n = len(draws)
    variance = covariance.diagonal()
    error = (draws.mean(0) - mean).abs()
    assert (error <= 5 * (variance / n).sqrt() + 1e-12).all()
    centred = draws - mean
    spread = (variance[:, None] * variance + covariance**2) / n
    assert ((centred.mT @ centred / n - covariance).abs() <= 5 * spread.sqrt() + 1e-12).all()


class TestDraws:
    """augment and perturb."""

    @drawn
    def test_the_augmented_state_starts_from_the_initial_law(self, name: str) -> None:
        sde = DRAWN[name]()
        x = torch.full((SAMPLES,), 0.7, dtype=torch.float64)
        z = sde.augment(x, torch.Generator().manual_seed(1))
        mean = torch.zeros(sde.components, dtype=torch.float64)
        mean[0] = 0.7
        assert_moments(z, mean, sde.marginal(0.0).covariance)

    @pytest.mark.parametrize("name", ["VP", "sub-VP", "CLD", "PSLD", "HOLD"])
    def test_augmenting_keeps_the_data(self, name: str) -> None:
        x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(DRAWN[name]().augment(x)[:, 0], x)

    @pytest.mark.parametrize("conditioning", ["data", "all"])
    @pytest.mark.parametrize("t", [1e-3, 0.3])
    @drawn
    def test_perturbed_data_has_the_law_of_the_forward_process(
        self, name: str, t: float, conditioning: Any
    ) -> None:
        sde = DRAWN[name]()
        x = torch.full((SAMPLES,), 0.7, dtype=torch.float64)
        z, noise = sde.perturb(
            x, t, conditioning=conditioning, generator=torch.Generator().manual_seed(2)
        )
        kernel = sde.marginal(t)
        # Whitened, so that the small variances of short times are tested, too.
        residual = z - 0.7 * kernel.mean[:, 0]
        white = torch.linalg.solve_triangular(kernel.root, residual.mT, upper=False).mT
        k = sde.components
        zero, identity = torch.zeros(k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
        assert_moments(white, zero, identity)
        assert_moments(noise, zero, identity)

    @pytest.mark.parametrize("t", [1e-6, 0.3, 1.0])
    @drawn
    def test_given_the_data_the_noise_explains_the_state(self, name: str, t: float) -> None:
        sde = DRAWN[name]()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z, noise = sde.perturb(x, t, generator=torch.Generator().manual_seed(1))
        kernel = sde.marginal(t)
        expected = kernel.mean[:, :1] * x[:, None] + torch.einsum("ij,bjd->bid", kernel.root, noise)
        # Sums of at most four products of numbers below 10 (VE: 3).
        assert torch.allclose(z, expected, rtol=0, atol=8 * 10 * EPS)

    @pytest.mark.parametrize("name", ["VP", "CLD", "PSLD", "HOLD"])
    def test_given_the_whole_state_the_noise_leads_back_to_the_data(self, name: str) -> None:
        sde = DRAWN[name]()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z, noise = sde.perturb(
            x, 0.2, conditioning="all", generator=torch.Generator().manual_seed(1)
        )
        kernel = sde.transition(0.0, 0.2)
        start = torch.linalg.solve(kernel.mean, z - torch.einsum("ij,bjd->bid", kernel.root, noise))
        # The transition is undone: a few roundings times its condition number.
        tolerance = 64 * EPS * float(torch.linalg.cond(kernel.mean)) * float(z.abs().max())
        assert torch.allclose(start[:, 0], x, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("conditioning", ["data", "all"])
    @drawn
    def test_times_may_differ_between_samples(self, name: str, conditioning: Any) -> None:
        sde = DRAWN[name]()
        x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = tensor([0.01, 0.5, 1.0])
        draw = {"conditioning": conditioning}
        together, _ = sde.perturb(x, t, generator=torch.Generator().manual_seed(1), **draw)
        for i, single in enumerate(t.tolist()):
            alone, _ = sde.perturb(x, single, generator=torch.Generator().manual_seed(1), **draw)
            # A batch shares the number of doublings of its longest time: about 64 eps |A| B.
            assert torch.allclose(together[i], alone[i], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("conditioning", ["data", "all"])
    @drawn
    def test_a_seed_decides_the_draw(self, name: str, conditioning: Any) -> None:
        sde = DRAWN[name]()
        x = torch.ones(5, 2)

        def draw(seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            return sde.perturb(x, 0.5, conditioning=conditioning, generator=generator)[0]

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))
        if name not in {"VP", "sub-VP"}:
            first = sde.augment(x, torch.Generator().manual_seed(0))
            assert torch.equal(first, sde.augment(x, torch.Generator().manual_seed(0)))
            assert not torch.equal(first, sde.augment(x, torch.Generator().manual_seed(1)))

    @pytest.mark.parametrize("axes", [(), (3,), (1, 8, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @drawn
    def test_draws_have_the_type_and_shape_of_the_data(
        self, name: str, dtype: torch.dtype, axes: tuple[int, ...]
    ) -> None:
        sde = DRAWN[name]()
        x = torch.ones(4, *axes, dtype=dtype)
        states = [sde.augment(x), *sde.perturb(x, 0.5), *sde.perturb(x, 0.5, conditioning="all")]
        for z in states:
            assert z.dtype == dtype
            assert z.device == x.device
            assert z.shape == (4, sde.components, *axes)

    @drawn
    def test_several_data_axes_are_perturbed_as_one(self, name: str) -> None:
        sde = DRAWN[name]()
        x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        one, _ = sde.perturb(x.flatten(1), 0.5, generator=torch.Generator().manual_seed(1))
        several, _ = sde.perturb(x, 0.5, generator=torch.Generator().manual_seed(1))
        assert torch.equal(one, several.flatten(2))

    @drawn
    def test_data_are_not_changed(self, name: str) -> None:
        x = torch.ones(3, 2)
        sde = DRAWN[name]()
        sde.augment(x)
        sde.perturb(x, 0.5, conditioning="all")
        assert torch.equal(x, torch.ones(3, 2))

    def test_an_unknown_conditioning_is_refused(self) -> None:
        with pytest.raises(ValueError, match="conditioning must be 'data' or 'all'; got 'none'"):
            CLD().perturb(torch.zeros(2, 1), 0.5, conditioning="none")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "x", [torch.zeros(2, dtype=torch.int64), [0.0], torch.tensor(0.0), 1.0]
    )
    def test_data_that_are_no_batch_of_numbers_are_refused(self, x: Any) -> None:
        for call in (CLD().augment, lambda x: CLD().perturb(x, 0.5)):
            with pytest.raises(TypeError, match="data must be a floating-point tensor of shape"):
                call(x)

    @pytest.mark.parametrize("t", [torch.full((3,), 0.5), torch.full((2, 1), 0.5)])
    @pytest.mark.parametrize("conditioning", ["data", "all"])
    def test_times_that_do_not_fit_the_batch_are_refused(self, t: Any, conditioning: Any) -> None:
        with pytest.raises(ValueError, match=r"one time or for \(2,\) times"):
            CLD().perturb(torch.zeros(2, 1), t, conditioning=conditioning)


@pytest.mark.parametrize("name", ["VP", "CLD", "PSLD", "HOLD"])
def test_gradients_reach_a_learnable_rate(name: str) -> None:
    # With the constant rate b, dPsi/db = t A Psi and dS/db = t (A S + S A^T + Q Q^T).
    sde = DRAWN[name]()
    A, Q_root = sde.drift(0.5) / 4, sde.diffusion(0.5) / 2
    rate, t = tensor(4.0).requires_grad_(), 0.5
    schedule = Schedule(lambda t: rate * torch.ones_like(t), lambda s, t: rate * (t - s))
    own = LinearSDE.from_matrices(A, Q_root, schedule)
    k = sde.components
    initial = torch.eye(k, dtype=torch.float64) / 4
    kernel = own.marginal(t, initial)
    psi, S = kernel.mean.detach(), kernel.covariance.detach()
    flow = A @ S
    expected_psi, expected = t * A @ psi, t * (flow + flow.mT + Q_root @ Q_root.mT)
    for value, slope in ((kernel.mean, expected_psi), (kernel.covariance, expected)):
        for i in range(k):
            for j in range(k):
                (found,) = torch.autograd.grad(value[i, j], rate, retain_graph=True)
                # Forward and backward pass over |A| B doublings: the promise of the kernels.
                assert abs(found - slope[i, j]) <= 1e-12 * (norm(slope) + norm(S))
