"""Processes: stationary distributions and priors, and samples of states and noise."""

from functools import partial

import pytest
import torch
from hypothesis import given

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, CosineVP, LinearSDE, RectifiedFlow, SubVPSDE
from probes import check_normal, generator, norm, tensor
from strategies import intervals, schedules, stable_processes
from tolerances import rounding

TIMES = tensor([0.0, 1e-6, 0.2, 0.7, 1.0])
STATIONARY = [VPSDE, CLD, PSLD, HOLD, partial(HOLD, inverse_mass=4.0, auxiliary_scale=1.0)]
STATIONARY += [partial(CLD, (0.1, 8.0), mass=2.0, friction=0.3, velocity_scale=1.0)]
STATIONARY += [partial(PSLD, gamma=0.0, mass=3.0)]
STATIONARY += [partial(CLD, friction=friction, position_noise=1.0) for friction in (0.5, 3.0)]


@pytest.mark.parametrize("A", [[[0.0, 1.0], [0.0, 0.0]], [[0.1]], [[0.0, 1.0], [-1.0, 0.0]]])
def test_without_a_stationary_distribution_the_prior_is_the_marginal_at_the_end(A):
    k = len(A)
    sde = LinearSDE.from_matrices(A, torch.eye(k), 2.0, initial_covariance=torch.eye(k))
    assert torch.equal(sde.prior.covariance, sde.marginal(1.0).covariance)
    for process in (sde, VESDE(), SubVPSDE(), RectifiedFlow()):
        assert process.stationary_covariance is process.stationary_reversal is None
    # A square root and its square.
    assert float(VESDE(0.1, 3.0).prior.covariance) == pytest.approx(9.0, rel=rounding(4), abs=0)
    for process in (SubVPSDE(), RectifiedFlow(), CosineVP()):
        assert float(process.prior.covariance) == 1.0
    assert CosineVP().stationary_reversal is not None
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


@given(stable_processes(), schedules(), intervals())
def test_matrices_have_a_stationary_covariance_and_the_backward_kernel(process, schedule, where):
    sde = process.sde(schedule)
    found = sde.stationary_covariance
    assert torch.equal(found, found.mT)
    flow = process.A @ found
    residual = flow + flow.mT + process.Q_root @ process.Q_root.mT
    # A linear system of k^2 <= 16 equations is solved with a residual of 16 eps of its terms.
    assert norm(residual) <= rounding(16 * 16, max(1.0, norm(found)))
    assert norm(sde.prior.covariance - found) <= rounding(64, norm(found))
    assert_reversed_by_bayes(sde, where)


@pytest.mark.parametrize("make", STATIONARY)
def test_each_process_has_its_stationary_covariance_and_the_backward_kernel(make):
    sde = make()
    sigma, F, G = sde.stationary_covariance, sde.drift(TIMES), sde.diffusion(TIMES)
    assert norm(sde.prior.covariance - sigma) <= rounding(4, norm(sigma))
    # Three products of k x k matrices.
    flow = F @ sigma
    assert norm(flow + flow.mT + G @ G.mT) <= rounding(16, norm(F) * norm(sigma))
    for where in ((0.0, 1e-8), (0.3, 0.31), (0.1, 1.0)):
        assert_reversed_by_bayes(sde, where)
    back = sde.stationary_reversal
    assert back.driven == sde.driven
    # Multiplications by S, whose condition number is at most 4.
    assert norm(back.stationary_reversal.drift(TIMES) - F) <= rounding(32, norm(F))
    assert torch.equal(back.stationary_reversal.diffusion(TIMES), G)


def of_functions(**options):
    return LinearSDE.from_functions(
        lambda t: -(1 + t) * tensor([[0.5]]), lambda t: [[torch.sqrt(1 + t)]], **options
    )


def test_a_prior_may_be_given_and_a_stationary_covariance_that_is_given_must_be_right():
    assert of_functions(prior_covariance=[[4.0]]).prior.covariance.item() == 4.0
    assert of_functions(stationary_covariance=[[1.0]]).prior.covariance.item() == 1.0
    with pytest.raises(ValueError, match="stationary_covariance must satisfy"):
        of_functions(stationary_covariance=[[2.0]])


# Samples ---------------------------------------------------------------------------------------

PROCESSES = [SubVPSDE(), VESDE(0.1, 3.0), CLD(), PSLD(), HOLD()]
drawn = pytest.mark.parametrize("sde", PROCESSES)


@drawn
def test_the_augmented_state_has_the_initial_covariance_about_the_data(sde):
    z = sde.augment(torch.full((10_000,), 0.7, dtype=torch.float64), generator(1))
    check_normal(z, sde.initial_covariance, tensor([0.7] + [0.0] * (sde.components - 1)))


@pytest.mark.parametrize("t", [1e-6, 0.3, 1.0, [0.01, 0.5, 0.7, 1.0]])
@drawn
def test_the_noise_explains_the_state(sde, t):
    t = tensor(t)
    x = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    z, noise = sde.perturb(x, t, generator=generator(1))
    kernel = sde.marginal(t)
    # Sums of at most four products of numbers below 10 (VE: 3).
    rest = z - kernel.mean[..., :1] * x[:, None] - kernel.root @ noise
    assert rest.abs().max() <= rounding(8, 10)
    # Given the whole state, the transition leads back to the data.
    z, noise = sde.perturb(x, t, conditioning="all", generator=generator(1))
    kernel = sde.transition(0.0, t)
    start = torch.linalg.solve(kernel.mean, z - kernel.root @ noise)
    bound = rounding(64, float(torch.linalg.cond(kernel.mean).max()) * float(start.abs().max()))
    if not isinstance(sde, VESDE):  # whose data are blurred at the start
        assert (start[:, 0] - x).abs().max() <= bound


@pytest.mark.parametrize("axes", [(), (3,), (1, 8, 8)])
def test_draws_have_the_shape_and_the_type_of_the_data(axes):
    sde, x = HOLD(), torch.ones(3, *axes)
    given, of_all = (sde.perturb(x, 0.5, conditioning=kind) for kind in ("data", "all"))
    for draw in (sde.augment(x), *given, *of_all):
        assert (draw.dtype, draw.shape) == (torch.float32, (3, 3, *axes))
