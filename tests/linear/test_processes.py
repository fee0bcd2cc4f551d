"""Processes: declarations, stationary distributions and priors, samples, rejected arguments."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, SubVPSDE
from probes import generator, tensor, untouchable
from strategies import intervals, schedules, stable_processes
from tolerances import KERNEL, rounding, standard_error

TIMES = torch.tensor([0.0, 1e-6, 0.2, 0.7, 1.0], dtype=torch.float64)


def diagonal(*entries: float) -> torch.Tensor:
    return tensor(entries).diag()


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2).max())


def close(found: torch.Tensor, expected: torch.Tensor, operations: float = 4) -> bool:
    """Entry by entry, to the rounding of so many operations."""
    return torch.allclose(found, expected, rtol=rounding(operations), atol=0)


# Process, driven components, covariance of the prior, covariance of z_0.
Declaration = tuple[Callable[[], LinearSDE], tuple[int, ...], torch.Tensor, torch.Tensor]
HEAVY = partial(CLD, (0.1, 8.0), mass=2.0, friction=0.3, velocity_scale=1.0)
LIGHT = partial(HOLD, inverse_mass=4.0, auxiliary_scale=1.0)
DECLARED: dict[str, Declaration] = {
    "VP": (VPSDE, (0,), diagonal(1.0), diagonal(0.0)),
    "sub-VP": (SubVPSDE, (0,), diagonal(1.0), diagonal(0.0)),
    "VE": (partial(VESDE, 0.1, 3.0), (0,), diagonal(9.0), diagonal(0.01)),
    "CLD": (CLD, (1,), diagonal(1.0, 0.25), diagonal(0.0, 0.01)),
    "CLD, heavy": (HEAVY, (1,), diagonal(1.0, 2.0), diagonal(0.0, 2.0)),
    "PSLD": (PSLD, (0, 1), diagonal(1.0, 0.25), diagonal(0.0, 0.01)),
    "PSLD, gamma=0": (
        partial(PSLD, gamma=0.0, mass=3.0),
        (1,),
        diagonal(1.0, 3.0),
        diagonal(0.0, 0.12),
    ),
    "HOLD": (HOLD, (2,), diagonal(1.0, 1.0, 1.0), diagonal(0.0, 0.04, 0.04)),
    "HOLD, L=4": (LIGHT, (2,), diagonal(0.25, 0.25, 0.25), diagonal(0.0, 0.25, 0.25)),
}
STATIONARY = [make for name, (make, *_) in DECLARED.items() if name not in {"VE", "sub-VP"}]
STATIONARY += [partial(CLD, friction=friction, position_noise=1.0) for friction in (0.5, 3.0)]
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


# Stationary distributions ----------------------------------------------------------------------


@pytest.mark.parametrize("make", STATIONARY)
def test_the_stationary_covariance_of_a_process_solves_the_lyapunov_equation(make):
    sde = make()
    sigma, F, G = sde.stationary_covariance, sde.drift(TIMES), sde.diffusion(TIMES)
    assert norm(sde.prior.covariance - sigma) <= rounding(4, norm(sigma))
    # Three products of k x k matrices.
    flow = F @ sigma
    assert norm(flow + flow.mT + G @ G.mT) <= rounding(16, norm(F) * norm(sigma))


@given(stable_processes(), schedules())
def test_the_stationary_covariance_of_matrices_is_found(process, schedule):
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
def test_without_a_stationary_distribution_the_prior_is_the_marginal_at_the_end(A):
    k = len(A)
    sde = LinearSDE.from_matrices(A, torch.eye(k), 2.0, initial_covariance=torch.eye(k))
    assert torch.equal(sde.prior.covariance, sde.marginal(1.0).covariance)
    for process in (sde, VESDE(), SubVPSDE()):
        assert process.stationary_covariance is None
        assert process.stationary_reversal is None
    # Noise never reaches the first component, whose stationary variance is zero.
    singular = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
    assert singular.stationary_reversal is None


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


@given(stable_processes(noise=("full", "chain")), intervals())
def test_the_reversal_of_matrices_is_the_backward_kernel(process, where):
    assert_reversed_by_bayes(process.sde(4.0), where)


@pytest.mark.parametrize("make", STATIONARY)
def test_the_reversal_of_each_process_is_the_backward_kernel(make):
    sde = make()
    for where in ((0.0, 1e-8), (0.3, 0.31), (0.1, 1.0)):
        assert_reversed_by_bayes(sde, where)
    back = sde.stationary_reversal
    assert back.driven == sde.driven
    again = back.stationary_reversal
    # Multiplications by S, whose condition number is at most 4.
    bound = rounding(32, norm(sde.drift(TIMES)))
    assert norm(again.drift(TIMES) - sde.drift(TIMES)) <= bound
    assert torch.equal(again.diffusion(TIMES), sde.diffusion(TIMES))


def test_a_stationary_covariance_that_is_given_must_be_right():
    def declare(covariance):
        return LinearSDE.from_functions(
            lambda t: -(1 + t) * tensor([[0.5]]),
            lambda t: torch.sqrt(1 + t) * tensor([[1.0]]),
            stationary_covariance=covariance,
        )

    assert declare([[1.0]]).prior.covariance.item() == 1.0
    with pytest.raises(ValueError, match="stationary_covariance must satisfy"):
        declare([[2.0]])


LANGEVIN = {"mass": 0.25, "velocity_scale": 0.04}
DEFAULTS = [
    (VPSDE, {"beta_min": 0.1, "beta_max": 20.0}),
    (SubVPSDE, {"beta_min": 0.1, "beta_max": 20.0}),
    (VESDE, {"sigma_min": 0.01, "sigma_max": 50.0}),
    (CLD, {"beta": 4.0, "friction": 1.0, "position_noise": 0.0, **LANGEVIN}),
    (PSLD, {"beta": 8.0, "gamma": 0.01, "nu": 4.01, **LANGEVIN}),
    (HOLD, {"beta": 4.0, "inverse_mass": 1.0, "auxiliary_scale": 0.04}),
]


@pytest.mark.parametrize(("process", "values"), DEFAULTS)
def test_defaults_are_the_documented_values(process, values):
    found, expected = process().marginal(0.7), process(**values).marginal(0.7)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.root, expected.root)


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


MATRICES = [
    ([[1.0, 2.0]], [[1.0]], "A must be square"),
    ([1.0], [[1.0]], "A must be a matrix"),
    (torch.zeros(0, 0), [[1.0]], "A must be a matrix"),
    ([[math.nan]], [[1.0]], "A must be finite"),
    ([[-1.0]], [[1.0], [1.0]], "Q_root must be a matrix of shape 1 × any"),
    ([[-1.0]], [1.0], "Q_root must be a matrix"),
    ([[-1.0]], [[math.inf]], "Q_root must be finite"),
    ([[-1.0]], [[0.0]], "Q_root must have a nonzero entry"),
]


@pytest.mark.parametrize(("A", "Q_root", "message"), MATRICES)
def test_matrices_that_do_not_fit_are_rejected(A, Q_root, message):
    with pytest.raises(ValueError, match=message):
        LinearSDE.from_matrices(A, Q_root)


COVARIANCES = [
    ([[1.0]], r"initial_covariance must be a matrix of shape 2 × 2; got shape \(1, 1\)"),
    ([[1.0, 0.5], [0.0, 1.0]], "must be symmetric"),
    ([[1.0, 2.0], [2.0, 1.0]], "must be positive semi-definite"),
    ([[-1.0, 0.0], [0.0, 1.0]], "must be positive semi-definite"),
    ([[math.nan, 0.0], [0.0, 1.0]], "must be finite"),
]


@pytest.mark.parametrize(("covariance", "message"), COVARIANCES)
def test_wrong_initial_covariances_are_rejected(covariance, message):
    for call in (
        partial(LinearSDE.from_matrices, [[0, 1], [-1, -1]], [[0], [1]]),
        partial(CLD().marginal, 0.5),
        partial(CLD().posterior, 0.1, 0.5),
    ):
        with pytest.raises(ValueError, match=message):
            call(initial_covariance=covariance)


@pytest.mark.parametrize("sde", [SubVPSDE(), CLD()])
def test_times_outside_the_interval_are_rejected(sde):
    for t in (-1e-9, 1 + 1e-9, math.nan, -math.inf):
        for where in (t, tensor([0.5, t])):
            for call in (sde.drift, sde.diffusion, sde.marginal, partial(sde.transition, 0.0)):
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


NO_STEPS = [
    (0.5, 0.2, r"s = 0\.5, t = 0\.2\. Pass the earlier time first"),
    (tensor([0.1, 0.5]), tensor([0.2, 0.4]), "s must not be later than t"),
    (torch.zeros(2), torch.ones(3), r"broadcast; got shapes \(2,\) and \(3,\)"),
]


@pytest.mark.parametrize(("s", "t", "message"), NO_STEPS)
def test_pairs_of_times_that_make_no_step_are_rejected(s, t, message):
    for call in (CLD().transition, CLD().transition_matrix):
        with pytest.raises(ValueError, match=message):
            call(s, t)


# Samples ---------------------------------------------------------------------------------------

drawn = pytest.mark.parametrize("name", ["sub-VP", "VE", "CLD", "PSLD", "HOLD"])
each_conditioning = pytest.mark.parametrize("conditioning", ["data", "all"])


@each_conditioning
@drawn
def test_the_augmented_state_and_the_noise_have_their_distributions(name, conditioning):
    sde, n = DECLARED[name][0](), 10_000
    x = torch.full((n,), 0.7, dtype=torch.float64)
    z = sde.augment(x, generator(1))
    deviation = sde.initial_covariance.diagonal().sqrt()
    z[:, 0] -= 0.7
    assert not z[:, deviation == 0].any()
    noise = sde.perturb(x, 0.5, conditioning=conditioning, generator=generator(2))[1]
    one = standard_error(1.0, n, number=5)
    for draws in (noise, (z / deviation)[:, deviation > 0]):
        # Standard normals: 1 / n and (1 + [i = j]) / n.
        assert (draws.mean(0).abs() <= one).all()
        eye = torch.eye(draws.shape[1], dtype=torch.float64)
        assert ((draws.mT @ draws / n - eye).abs() <= one * (1 + eye).sqrt()).all()


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
@pytest.mark.parametrize("name", ["VE", "HOLD"])
def test_draws_follow_the_seed_and_the_shape_type_and_times_of_the_data(name, conditioning):
    sde = DECLARED[name][0]()

    def draws(x, seed, t=0.5):
        pair = sde.perturb(x, t, conditioning=conditioning, generator=generator(seed))
        return [sde.augment(x, generator(seed)), *pair]

    for axes in ((), (3,), (1, 8, 8)):
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(3, *axes, dtype=dtype)
            for z in draws(x, 0):
                assert (z.dtype, z.shape) == (dtype, (3, sde.components, *axes))
            assert torch.equal(x, torch.ones_like(x))
    first, again, other = draws(x, 0), draws(x, 0), draws(x, 1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(draws(x.flatten(1), 0)[1], first[1].flatten(2))
    assert torch.equal(first[0][:, 0], x) is (name != "VE")
    t = tensor([0.01, 0.5, 1.0])
    together = draws(x, 0, t)[1]
    for i, time in enumerate(t):
        # A batch shares the number of doublings of its longest time.
        alone = draws(x, 0, time)[1][i]
        assert torch.allclose(together[i], alone, rtol=KERNEL, atol=KERNEL)


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


class Bare(LinearSDE):
    """A process that does not call the constructor of its base."""

    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LinearSDE([[-1.0]]), TypeError, "dynamics must be a Dynamics.* got list"),
        (lambda: LinearSDE.from_matrices("A", [[1.0]]), TypeError, "A must be a matrix of real"),
        (lambda: VPSDE.from_alphas_cumprod(["a"]), TypeError, "table must be a sequence of real"),
        (lambda: ReverseProcess(Bare(), untouchable), TypeError, "sde must be initialised; Bare"),
        (lambda: CLD(beta=1e308).transition(0.0, 1.0), OverflowError, "overflows float64"),
        (
            lambda: CLD().posterior(0.1, 0.5, stochasticity=torch.tensor([1, 2])),
            TypeError,
            "stochasticity must be a floating-point tensor",
        ),
        (
            lambda: CLD().posterior(0.1, 0.5, stochasticity=torch.tensor([-1.0])),
            ValueError,
            "stochasticity must be finite and at least 0",
        ),
    ],
)
def test_bad_declarations_and_stochasticities_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()
