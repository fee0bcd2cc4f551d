"""Processes: stationary distributions and priors, and samples of states and noise."""

from functools import partial

import pytest
import torch
from hypothesis import given

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE
from probes import check_normal, generator, norm, tensor
from strategies import intervals, schedules, stable_processes
from tolerances import KERNEL, rounding

TIMES = tensor([0.0, 1e-6, 0.2, 0.7, 1.0])
STATIONARY = [VPSDE, CLD, PSLD, HOLD, partial(HOLD, inverse_mass=4.0, auxiliary_scale=1.0)]
STATIONARY += [partial(CLD, (0.1, 8.0), mass=2.0, friction=0.3, velocity_scale=1.0)]
STATIONARY += [partial(PSLD, gamma=0.0, mass=3.0)]
STATIONARY += [partial(CLD, friction=friction, position_noise=1.0) for friction in (0.5, 3.0)]


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
        assert process.stationary_covariance is process.stationary_reversal is None
    # A square root and its square.
    assert float(VESDE(0.1, 3.0).prior.covariance) == pytest.approx(9.0, rel=rounding(4), abs=0)
    assert float(SubVPSDE().prior.covariance) == 1.0
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


# Samples ---------------------------------------------------------------------------------------

PROCESSES = {"sub-VP": SubVPSDE(), "VE": VESDE(0.1, 3.0), "CLD": CLD(), "PSLD": PSLD()}
PROCESSES["HOLD"] = HOLD()
drawn = pytest.mark.parametrize("name", list(PROCESSES))
each_conditioning = pytest.mark.parametrize("conditioning", ["data", "all"])


@each_conditioning
@drawn
def test_the_augmented_state_and_the_noise_have_their_distributions(name, conditioning):
    sde, n = PROCESSES[name], 10_000
    x = torch.full((n,), 0.7, dtype=torch.float64)
    z = sde.augment(x, generator(1))
    deviation = sde.initial_covariance.diagonal().sqrt()
    z[:, 0] -= 0.7
    assert not z[:, deviation == 0].any()
    noise = sde.perturb(x, 0.5, conditioning=conditioning, generator=generator(2))[1]
    for draws in (noise, (z / deviation)[:, deviation > 0]):
        check_normal(draws, torch.eye(draws.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("t", [1e-6, 0.3, 1.0])
@drawn
def test_the_noise_explains_the_state(name, t):
    sde = PROCESSES[name]
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
    sde = PROCESSES[name]

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
