"""Encoding: deterministic solvers on increasing grids, from data to noise and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cldsde import CLD, VPSDE, GaussianMixture, LinearSDE, RectifiedFlow, ReverseProcess, solvers

DATA = GaussianMixture([0.5, 0.2, 0.3], [[-1.0], [0.2], [1.2]], [[[0.35**2]]] * 3)
PROCESSES: dict[str, LinearSDE] = {"VP": VPSDE(), "CLD": CLD(), "rectified flow": RectifiedFlow()}
EPS = 0.02


def process_and_states(name: str, n: int = 200) -> tuple[ReverseProcess, torch.Tensor]:
    """The exact reverse process, and states at the end of sampling."""
    sde, g = PROCESSES[name], torch.Generator().manual_seed(0)
    x = DATA.sample(n, generator=g, dtype=torch.float64)
    z = sde.transition(0.0, EPS).sample(sde.augment(x, generator=g), generator=g)
    return ReverseProcess(sde, DATA.score(sde)), z


def round_trip(
    process: ReverseProcess, solver: Any, z: torch.Tensor, T: float, n: int
) -> torch.Tensor:
    """Largest error of the data after encoding and decoding with n evaluations each."""
    times = solvers.root_times(T, EPS, n)
    code = solvers.solve(process, solver, z, times.flip(0))
    assert code.success
    back = solvers.solve(process, solver, code.state, times)
    return (back.data - z[:, 0]).abs().max()


@pytest.mark.parametrize("name", list(PROCESSES))
def test_fifty_evaluations_bring_data_back_to_a_thousandth(name: str) -> None:
    process, z = process_and_states(name)
    solver = solvers.ExponentialMultistep(order=3, corrector=True)
    assert float(round_trip(process, solver, z, 1.0, 50)) <= 1e-3


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize(
    "solver",
    [
        solvers.ExponentialMultistep(order=1),
        solvers.ExponentialMultistep(order=2),
        solvers.ExponentialMultistep(order=3),
        solvers.ExponentialMultistep(order=2, corrector=True),
        solvers.ExponentialMultistep(order=2, prediction="noise"),
        solvers.EDMHeun(),
    ],
    ids=lambda s: f"{type(s).__name__}-{s!r:.60}",
)
def test_the_round_trip_converges_at_the_order_of_the_solver(name: str, solver: Any) -> None:
    if isinstance(solver, solvers.EDMHeun) and name == "CLD":
        pytest.skip("of one component")
    process, z = process_and_states(name)
    # Where other methods than predictions of the data start.
    T = min(0.99, process.sde.regular_until)
    errors = [float(round_trip(process, solver, z, T, n)) for n in (100, 200)]
    order = math.log2(errors[0] / errors[1])
    # Errors there and back partly cancel, so that the order may be one higher, not lower; at these
    # steps rates are within 0.3 of their limits.
    assert order > solver.facts.ode_order - 0.3, (order, errors)


@pytest.mark.parametrize("pace", ["batch", "sample"])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_adaptive_flows_come_back_within_their_tolerance(name: str, pace: Any) -> None:
    process, z = process_and_states(name, 20)
    T = process.sde.regular_until
    solver = solvers.ProbabilityFlow(rtol=1e-9, atol=1e-9, pace=pace)
    times = torch.tensor([EPS, T], dtype=torch.float64)
    code = solvers.solve(process, solver, z, times)
    back = solvers.solve(process, solver, code.state, times.flip(0))
    # A hundred steps each way with errors of 1e-9, which the flow may stretch.
    assert float((back.data - z[:, 0]).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", list(PROCESSES))
def test_codes_have_the_distribution_of_the_noise(name: str) -> None:
    process, z = process_and_states(name, 20_000)
    solver = solvers.ExponentialMultistep(order=3, corrector=True)
    code = solvers.solve(process, solver, z, solvers.root_times(1.0, EPS, 50).flip(0)).state
    law = (
        process.sde.marginal(1.0, [[float(DATA.sample(20_000).var()), 0], [0, 0.01]])
        if (name == "CLD")
        else process.sde.prior
    )
    # Five standard errors of a variance from 20,000 samples; what the prior leaves out is smaller.
    found = code[:, 0].var()
    assert float(found) == pytest.approx(float(law.covariance[0, 0]), rel=5 * math.sqrt(2 / 20_000))


def test_encoding_with_a_gaussian_is_a_known_map() -> None:
    sde = RectifiedFlow()
    data = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1)
    times = solvers.root_times(1.0, EPS, 400).flip(0)
    solver = solvers.ExponentialMultistep(order=3, corrector=True)
    code = solvers.solve(ReverseProcess(sde, data.score(sde)), solver, z, times).state
    deviation = math.sqrt((1 - EPS) ** 2 * 0.25 + EPS**2)
    # Third order: the step's cube, of a flow of unit rates.
    assert torch.allclose(code, (z - (1 - EPS) * 0.3) / deviation, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "kind"),
    [
        (solvers.EulerMaruyama(), "stochastic"),
        (solvers.SSCS(), "stochastic"),
        (solvers.ExponentialMultistep(stochasticity=1.0), "stochastic"),
        (solvers.EDMHeun(churn=1.0), "stochastic"),
        (solvers.TorchDiffEq(), "for decreasing grids only"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_solvers_are_rejected_before_any_evaluation(solver: Any, kind: str) -> None:
    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    process, z = ReverseProcess(VPSDE(), score), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match=f"times must decrease for .*, which is {kind}"):
        solvers.solve(process, solver, z, solvers.uniform_times(1.0, EPS, 4).flip(0))


def test_denoising_is_rejected() -> None:
    process, z = process_and_states("VP", 2)
    times = solvers.uniform_times(1.0, EPS, 4).flip(0)
    with pytest.raises(ValueError, match="denoise must be False for an increasing grid"):
        solvers.solve(process, solvers.ExponentialMultistep(), z, times, denoise=True)


@pytest.mark.parametrize(
    "solver", [solvers.ExponentialMultistep(corrector=True), solvers.ProbabilityFlow()]
)
def test_states_on_the_way_are_those_of_shorter_grids(solver: Any) -> None:
    process, z = process_and_states("VP", 4)
    times = solvers.uniform_times(0.9, EPS, 8).flip(0)
    seen: list[float] = []

    def note(step: int, t: Any, z: torch.Tensor) -> None:
        seen.append(float(torch.as_tensor(t).flatten()[0]))

    found = solvers.solve(process, solver, z, times, t_eval=times[[0, 4, 8]], callback=note)
    assert found.y.shape == (3, *z.shape)
    assert torch.equal(found.t, times[[0, 4, 8]])
    assert torch.equal(found.y[0], z)
    assert torch.equal(found.y[2], found.state)
    assert seen == sorted(seen)
    # Half-way states are saved before a correction by the next step, or cut a step short: errors
    # are those of the solver at these steps.
    shorter = solvers.solve(process, solver, z, times[:5]).state
    assert torch.allclose(found.y[1], shorter, atol=2e-3)


def test_times_of_states_must_run_as_the_grid_does() -> None:
    process, z = process_and_states("VP", 2)
    times = solvers.uniform_times(0.9, EPS, 8).flip(0)
    with pytest.raises(ValueError, match="t_eval must run in the direction of times"):
        solvers.solve(process, solvers.ExponentialMultistep(), z, times, t_eval=times.flip(0))


def test_data_themselves_are_no_states_to_start_from() -> None:
    process, z = process_and_states("VP", 2)
    times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"times must start above 0 .* draw states at a t > 0"):
        solvers.solve(process, solvers.ExponentialMultistep(), z, times)
