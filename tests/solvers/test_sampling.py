"""Samples in one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cldsde
from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    DenoiserScore,
    GaussianMixture,
    GuidedScore,
    LinearSDE,
    NoisePath,
    PredictionDenoiser,
    RectifiedFlow,
    ReverseProcess,
    solvers,
)
from cldsde.score import ConditionalScore, ScoreDenoiser
from cldsde.solvers.sampling import recommended_plan

DATA = GaussianMixture(
    [0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.25, 0.0], [0.0, 0.5]]]
)
PROCESSES: dict[str, Any] = {
    "VP": VPSDE,
    "VE": VESDE,
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
    "rectified flow": RectifiedFlow,
    "matrices": lambda: LinearSDE.from_matrices(
        [[-1, 1, 0], [0, -1, 1], [0, 0, -1]], [[0], [0], [1]], (0.1, 20)
    ),
}
UNDERDAMPED = LinearSDE.from_matrices(
    [[0, 4.0], [-4.0, -1.0]], [[0.0], [2**0.5]], initial_covariance=[[0, 0], [0, 0.04]]
)


def moments() -> tuple[Tensor, Tensor]:
    mean = DATA.weights @ DATA.means
    second = torch.einsum(
        "n,nij->ij", DATA.weights, DATA.covariances + DATA.means[:, :, None] * DATA.means[:, None]
    )
    return mean, second - mean[:, None] * mean


@pytest.mark.parametrize("name", PROCESSES)
def test_moments(name):
    """Within 4 standard errors of the exact ones at 60 evaluations."""
    sde = PROCESSES[name]()
    x = cldsde.sample(sde, DATA.score(sde), (4000, 2), nfe=60, dtype=torch.float64)
    mean, covariance = moments()
    n = len(x)
    assert ((x.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / n).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() <= 4 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("nfe", [5, 20])
def test_the_budget_and_the_window(name, nfe):
    """At most ``nfe`` evaluations, all between κ = −3.3 and κ = 3.3."""
    sde, times = PROCESSES[name](), []
    score = DATA.score(sde)

    def counted(z: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return score(z, t)

    cldsde.sample(sde, counted, (3, 2), nfe=nfe)
    assert len(times) == nfe
    levels = sde.log_snr(torch.tensor(times, dtype=torch.float64).clamp_max(1.0))
    # Times reach the score in single precision.
    assert levels.min() >= -3.3 - 1e-3
    assert levels.max() == pytest.approx(3.3, abs=1e-3)


def test_a_sample_depends_on_its_number_alone():
    sde = CLD()
    score = DATA.score(sde)
    many = cldsde.sample(sde, score, (10, 2), nfe=5, seed=3)
    some = cldsde.sample(sde, score, (4, 2), nfe=5, seed=3, batch=3)
    torch.testing.assert_close(some, many[:4], rtol=1e-5, atol=1e-5)
    other = cldsde.sample(sde, score, (10, 2), nfe=5, seed=4)
    assert not torch.isclose(other, many).any()


def test_a_process_whose_score_does_not_determine_the_data():
    """Underdamped: SSCS, which finishes with a step, not with the data prediction."""
    recipe, plan = recommended_plan(ReverseProcess(UNDERDAMPED, DATA.score(UNDERDAMPED)), nfe=20)
    assert (plan.solver, recipe.denoise) == (solvers.SSCS(), "step")
    x = cldsde.sample(UNDERDAMPED, DATA.score(UNDERDAMPED), (500, 2), nfe=400)
    mean, covariance = moments()
    # SSCS is of order 1: the bias at 400 steps is below the scatter of 500 samples.
    assert ((x.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / 500).sqrt()).all()


@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD", "VE"])
def test_levels_of_the_score_bound_the_window(name):
    """A network is never asked outside of its trained levels."""
    seen: list[Tensor] = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return x / (1 + sigma.unsqueeze(1) ** 2)

    sde = PROCESSES[name]()
    path = NoisePath(torch.ones_like, lambda t: t, interval=(0.2, 5.0))
    denoiser = PredictionDenoiser(network, path, "data")
    cldsde.sample(sde, DenoiserScore(denoiser, sde), (3, 2), nfe=6)
    levels = torch.stack(seen)
    assert levels.max() == pytest.approx(5.0, rel=1e-4)
    assert levels.min() == pytest.approx(0.2, rel=1e-4)


def test_a_solver_and_times_of_ones_own():
    sde = VESDE()
    times = solvers.karras_times(sde, 1.0, 1e-3, 18)
    x = cldsde.sample(sde, DATA.score(sde), (2000, 2), solver=solvers.EDMHeun(), times=times)
    mean, covariance = moments()
    assert ((x.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / 2000).sqrt()).all()


def test_the_dtype_and_device_of_the_score():
    sde = VPSDE()

    class Score(torch.nn.Linear):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return -z

    assert cldsde.sample(sde, Score(1, 1), (2, 3), nfe=3).dtype == torch.float32
    found = cldsde.sample(sde, Score(1, 1), (2, 3, 4), nfe=3, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert found.shape == (2, 3, 4)


@pytest.mark.parametrize("process", [VPSDE, CLD])
def test_a_grid_that_ends_at_the_data(process):
    """At t = 0 nothing is left to denoise; 200 steps of order 1."""
    sde = process()
    times = solvers.quadratic_times(sde.T, 0.0, 200)
    solver = solvers.EulerMaruyama()
    x = cldsde.sample(sde, DATA.score(sde), (2000, 2), times=times, solver=solver)
    mean, covariance = moments()
    assert ((x.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / 2000).sqrt()).all()


def test_a_denoiser_that_fills_states_up_is_a_function():
    """The same samples twice, and guidance by twice the same condition changes nothing."""
    sde, vp = CLD(), VPSDE()
    exact = DATA.score(sde)
    rough = ScoreDenoiser(lambda z, t, c=None: exact(z, t) + 0.1 * z[:, 1:].tanh(), sde)
    score = DenoiserScore(rough, vp)
    x = cldsde.sample(vp, score, (6, 2), nfe=6)
    assert torch.equal(cldsde.sample(vp, score, (6, 2), nfe=6), x)
    same = [ConditionalScore(score, c=torch.tensor(1)) for _ in range(2)]
    guided = cldsde.sample(vp, GuidedScore(*same, 5.0), (6, 2), nfe=12)
    plain = cldsde.sample(vp, same[0], (6, 2), nfe=6)
    # The guided budget of 12 is 6 evaluations of each score.
    torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-3)


def test_dropout_in_training_mode_is_pointed_out():
    class Score(torch.nn.Dropout):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return -super().forward(z)

    with pytest.warns(UserWarning, match="call its eval"):
        cldsde.sample(VPSDE(), Score(), (2, 3), nfe=3)


def test_the_first_reason_is_reported():
    """A flow whose score cannot start at t = 1, of the solver that was to be taken."""
    sde = RectifiedFlow()
    times = torch.tensor([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="data_prediction"):
        cldsde.sample(sde, lambda z, t: -z, (2, 3), times=times)


def test_a_failed_sample_raises():
    sde = VPSDE()
    with pytest.raises(FloatingPointError, match="not finite"):
        cldsde.sample(sde, lambda z, t: z * math.nan, (2, 3), nfe=4)


def refused(z: Tensor, t: Tensor) -> Tensor:
    pytest.fail("the score was evaluated")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (3,)}, ValueError, r"shape must be \(B, \*D\)"),
        ({"shape": 3}, ValueError, r"shape must be \(B, \*D\)"),
        ({"shape": (0, 2)}, ValueError, "shape must be at least 1"),
        ({"nfe": 1}, ValueError, "too few for a step.*increase nfe"),
        ({"nfe": 2.5}, TypeError, "nfe must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point type"),
        ({"times": torch.tensor([0.1, 0.5])}, ValueError, "times must decrease"),
        ({"solver": solvers.SSCS}, TypeError, "solver must be a solver"),
        ({"score": PredictionDenoiser(refused, NoisePath.linear())}, TypeError, "Wrap it: Denois"),
        ({"score": None}, TypeError, "score must be a callable"),
        ({"sde": 3}, TypeError, "sde"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"sde": VPSDE(), "score": refused, "shape": (2, 3), **change}
    with pytest.raises(error, match=message):
        cldsde.sample(**arguments)


def test_a_window_without_levels():
    sde = HOLD()  # reaches σ = 22 only
    score = DenoiserScore(lambda u, sigma: u, sde, noise_levels=(50.0, 80.0))
    with pytest.raises(ValueError, match=r"range of times .* is empty"):
        cldsde.sample(sde, score, (2, 3))


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    cldsde.sample(VPSDE(), lambda z, t: -z, (2, 3), nfe=3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("guided", [False, True], ids=["conditional", "guided"])
def test_conditions_of_samples_follow_them_into_their_batches(guided):
    """Sample i is data of variance v_i, whatever the batch; equal up to rounding of float32."""
    sde = cldsde.VPSDE()

    def denoiser(u: Tensor, sigma: Tensor, variance: Tensor) -> Tensor:
        return u * (variance / (variance + sigma**2)).unsqueeze(1)

    base = DenoiserScore(denoiser, sde)
    score: Any = ConditionalScore(base, variance=torch.linspace(0.01, 4, 10))
    if guided:
        score = cldsde.GuidedScore(score, ConditionalScore(base, variance=torch.ones(10)), 2.0)
        score = cldsde.GuidedScore(ConditionalScore(score), score, 1.5)  # scores may be nested
    whole = cldsde.sample(sde, score, (10, 3), nfe=6)
    parts = cldsde.sample(sde, score, (10, 3), nfe=6, batch=4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"condition variance .* one row per sample, 12; got 10"):
        cldsde.sample(sde, score, (12, 3), nfe=6, batch=5)


def test_a_solver_that_leaves_samples_out_needs_conditions_for_all():
    """Samples with larger variances finish at other times, and their conditions would be lost."""
    sde = cldsde.VPSDE()

    def denoiser(u: Tensor, sigma: Tensor, variance: Tensor) -> Tensor:
        return u * (variance / (variance + sigma**2)).unsqueeze(1)

    score = ConditionalScore(DenoiserScore(denoiser, sde), variance=torch.logspace(-3, 1, 20))
    solver = cldsde.solvers.ProbabilityFlow(pace="sample")
    with pytest.raises(ValueError, match=r"condition variance .* one row per sample"):
        cldsde.sample(sde, score, (20, 1), solver=solver)
