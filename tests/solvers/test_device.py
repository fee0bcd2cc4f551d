"""On a device: the bits of the CPU, results on the device, no double precision, little traffic."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cldsde
from cldsde import (
    DenoiserScore,
    GaussianMixture,
    GuidedScore,
    LinearSDE,
    MixedScore,
    NoisePath,
    PredictionDenoiser,
    ReverseProcess,
    solvers,
)
from cldsde.score import ScoreDenoiser, score_matching_loss
from probes import start
from simulated_device import Generator, SimulatedDevice, Traffic, needs_simulation, simulated_device

pytestmark = needs_simulation

PROCESSES: dict[str, Callable[[], LinearSDE]] = {
    "VP": cldsde.VPSDE,
    "CLD": cldsde.CLD,
    "PSLD": cldsde.PSLD,
    "VE": cldsde.VESDE,
}
SOLVERS = {  # with few attempts
    name: dataclasses.replace(solver, rtol=0.5, atol=0.5) if solver.facts.adaptive else solver
    for name, solver in solvers.named_solvers().items()
}
ADAPTIVE = {
    "flow-sample": solvers.ProbabilityFlow(pace="sample", rtol=0.01, atol=0.01),
    "flow-batch": solvers.ProbabilityFlow(pace="batch", rtol=0.01, atol=0.01),
    "gotta-go-fast-bridge": solvers.GottaGoFast(noise_on_reject="bridge", rtol=0.5, atol=0.5),
    "gotta-go-fast-fresh": solvers.GottaGoFast(noise_on_reject="fresh", rtol=0.5, atol=0.5),
}
# torchsde and torchdiffeq read values back in each step and take times in float64.
LIBRARIES = {name for name in SOLVERS if name.startswith("torch")}
ON_GRID = [name for name in SOLVERS if not SOLVERS[name].facts.adaptive and name not in LIBRARIES]
PATH_DRIVEN = ["stochastic-heun", "exponential-euler", "reverse-diffusion"]

every_process = pytest.mark.parametrize("process", PROCESSES)
every_score = pytest.mark.parametrize("score", ["function", "mixture"])


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with simulated_device() as device:
        yield device


def mixture() -> GaussianMixture:
    return GaussianMixture(
        [0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.2]]]
    )


def reverse(process: str, score: str) -> ReverseProcess:
    sde = PROCESSES[process]()
    if score == "mixture":
        return ReverseProcess(sde, mixture().score(sde))
    spread = float(sde.prior.covariance.diagonal().max())

    def function(z: Tensor, t: Tensor) -> Tensor:
        driven = torch.stack([z[:, i] for i in sde.driven], dim=1)
        clock = t.reshape(-1, *(1,) * (z.ndim - 1))
        return 0.1 * driven.sin() - driven / (0.3 + spread * clock.square())

    return ReverseProcess(sde, function)


def solved(
    process: ReverseProcess,
    solver: Any,
    place: str,
    noise: str = "fresh",
    *,
    steps: int = 4,
    end: float = 0.05,
) -> solvers.Solution:
    """A small batch on a device, from the same state with the same noise on every device."""
    state = start(process.sde, dtype=torch.float32).to(place)
    times = solvers.quadratic_times(process.sde.T, end, steps)
    source = NOISES[noise](process.sde, times, place)
    solution = solvers.solve(process, solver, state, times, noise=source)
    assert solution.success
    return solution


def seeded(place: str, seed: int = 0) -> torch.Generator:
    return (torch.Generator() if place == "cpu" else Generator()).manual_seed(seed)


@functools.cache
def expected(process: str, name: str, score: str, noise: str = "fresh") -> solvers.Solution:
    """The solution on the CPU; skips the test if the solver does not apply to the process."""
    # Brownian paths use matrix products on the CPU, which round otherwise than the device's sums,
    # unless products may be less precise.
    torch.set_float32_matmul_precision("high")
    try:
        with torch.device("cpu"):
            return solved(reverse(process, score), SOLVERS[name], "cpu", noise)
    except ValueError as error:
        pytest.skip(f"{name} does not apply to {process}: {error}")
    finally:
        torch.set_float32_matmul_precision("highest")


NOISES: dict[str, Callable[[LinearSDE, Tensor, str], Any]] = {
    "fresh": lambda sde, times, place: solvers.FreshNoise(seeded(place)),
    "fresh, of the CPU": lambda sde, times, place: solvers.FreshNoise(seeded("cpu")),
    "samples": lambda sde, times, place: solvers.SampleNoise([3, 4, 5]),
    "path": lambda sde, times, place: solvers.BrownianPath(
        sde, times, (3, 2), generator=seeded("cpu"), device=place
    ),
    "recorded": lambda sde, times, place: solvers.RecordedNoise(
        torch.randn(4, 3, len(sde.driven), 2, generator=seeded("cpu"), device="cpu").to(place)
    ),
}


def spent(device: SimulatedDevice, *args: Any, **grid: Any) -> tuple[Traffic, solvers.Solution]:
    """What `solved` costs, and its solution."""
    before = device.traffic()
    solution = solved(*args, "sim", **grid)
    return device.traffic() - before, solution


def check_same(found: list[Tensor], on_cpu: list[Tensor], device: SimulatedDevice) -> None:
    """The same bits, on the device, where nothing was ever in double precision."""
    assert device.traffic().float64 == 0
    for one, other in zip(found, on_cpu, strict=True):
        assert one.device == torch.device("sim:0")
        assert torch.equal(one.cpu(), other)


def states(solution: solvers.Solution) -> list[Tensor]:
    return [solution.state, solution.data, solution.y]


class OnDevice:
    """States on the device, whatever the default device is."""

    @every_score
    @every_process
    @pytest.mark.parametrize("name", SOLVERS)
    def test_solvers_give_the_bits_of_the_cpu(
        self, process: str, name: str, score: str, place: SimulatedDevice
    ) -> None:
        on_cpu = expected(process, name, score)
        found = solved(reverse(process, score), SOLVERS[name], "sim")
        if name in LIBRARIES:
            place.reset()
        check_same(states(found), states(on_cpu), place)
        assert (found.nfev, found.message) == (on_cpu.nfev, on_cpu.message)

    @every_process
    @pytest.mark.parametrize(
        ("noise", "name"),
        [(noise, "euler-maruyama") for noise in NOISES] + [("path", name) for name in PATH_DRIVEN],
    )
    def test_noise_sources_give_the_bits_of_the_cpu(
        self, process: str, name: str, noise: str, place: SimulatedDevice
    ) -> None:
        on_cpu = expected(process, name, "function", noise)
        found = solved(reverse(process, "function"), SOLVERS[name], "sim", noise)
        check_same(states(found), states(on_cpu), place)

    @every_process
    @pytest.mark.parametrize("times", [0.3, (0.9, 0.1, 0.4)])
    def test_mixture_scores_give_the_bits_of_the_cpu(
        self, process: str, times: Any, place: SimulatedDevice
    ) -> None:
        def found(device: str) -> list[Tensor]:
            sde, data = PROCESSES[process](), mixture()
            z = start(sde, dtype=torch.float32).to(device)
            t = torch.tensor(times, device=device)
            return [
                data.score(sde)(z, t),
                data.log_prob(sde, z, t),
                data.posterior_mean(sde, z, t),
                data.sample(4, generator=seeded(device), device=device),
                sde.prior.sample((3, 2), generator=seeded(device), device=device),
            ]

        with torch.device("cpu"):
            on_cpu = found("cpu")
        check_same(found("sim"), on_cpu, place)

    @every_process
    @pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
    def test_mixed_scores_train_and_evaluate_to_the_bits_of_the_cpu(
        self, process: str, optimiser: type[torch.optim.Optimizer], place: SimulatedDevice
    ) -> None:
        def found(device: str) -> list[Tensor]:
            sde = PROCESSES[process]()
            model = MixedScore(Network(sde), sde, 0.1, 0.5).to(device)
            steps = optimiser(model.parameters(), lr=0.1)
            x = mixture().sample(5, generator=seeded(device), device=device).reshape(5, 2, 1)
            t = torch.linspace(0.1, 1.0, 5, dtype=torch.float64, device="cpu")
            losses = []
            for _ in range(2):
                generator = seeded(device, 1)
                loss = score_matching_loss(model, sde, x, t, generator=generator).mean()
                steps.zero_grad()
                loss.backward()
                steps.step()
                losses.append(loss.detach())
            z = start(sde, (3, 2, 1), dtype=torch.float32).to(device)
            scores = [model(z, 0.5), model(z, torch.tensor([0.9, 0.1, 0.4], device=device))]
            return [x.detach() for x in (*losses, *scores, *model.parameters())]

        with torch.device("cpu"):
            on_cpu = found("cpu")
        check_same(found("sim"), on_cpu, place)


class Network(nn.Module):
    """A small network of state and clock, with the same weights wherever it is made."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.mix = nn.Conv1d(2 * sde.components, 2 * len(sde.driven), 1, device="cpu")
        for i, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=seeded("cpu", i))

    def forward(self, z: Tensor, clock: Tensor) -> Tensor:
        return nn.functional.silu(self.mix(z)) * clock.reshape(-1, 1, 1).sigmoid()


class TestOnDevice(OnDevice):
    """States on the device; the default device is the CPU."""

    @pytest.fixture
    def place(self, device: SimulatedDevice) -> SimulatedDevice:
        return device


class TestDefaultDevice(OnDevice):
    """The default device is set first: coefficients stay on the CPU, in float64."""

    @pytest.fixture
    def place(self, device: SimulatedDevice) -> Iterator[SimulatedDevice]:
        torch.set_default_device("sim")
        yield device
        torch.set_default_device(None)

    @every_process
    def test_coefficients_stay_on_the_cpu(self, process: str, place: SimulatedDevice) -> None:
        sde = PROCESSES[process]()
        kernel = sde.marginal(0.5)
        made = [kernel.mean, kernel.root, sde.prior.root, sde.drift(0.5), sde.diffusion(0.5)]
        made.append(solvers.quadratic_times(sde.T, 0.05, 4))
        assert {(x.device.type, x.dtype) for x in made} == {("cpu", torch.float64)}
        assert place.traffic() == Traffic()


class TestTrafficOfGridSolvers:
    """Nothing is copied or read back inside the loop."""

    @every_score
    @every_process
    @pytest.mark.parametrize("name", ON_GRID)
    def test_steps_copy_nothing_and_wait_for_nothing(
        self, process: str, name: str, score: str, device: SimulatedDevice
    ) -> None:
        expected(process, name, score)
        # It waits to know whether the first and the last state are finite.
        few, _ = spent(device, reverse(process, score), SOLVERS[name], steps=4)
        many, _ = spent(device, reverse(process, score), SOLVERS[name], steps=9)
        assert many.to_device == few.to_device
        assert many.selections == 0
        assert many.waits == few.waits <= 2


class TestDenoisers:
    """Networks of other processes: the bits of the CPU, and coefficients copied before the loop."""

    @staticmethod
    def solved(name: str, place: str, steps: int) -> Tensor:
        sde = PROCESSES[name]()
        path = NoisePath.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))
        noise = PredictionDenoiser(lambda x, index: (0.001 * index).unsqueeze(1) * x.sin(), path)
        score = DenoiserScore(noise, sde)
        inner = DenoiserScore(ScoreDenoiser(score), sde)
        process = ReverseProcess(sde, GuidedScore(inner, score, 2.0, interval=(0.1, 1.0)))
        state = start(sde, dtype=torch.float32).to(place)
        times = solvers.quadratic_times(0.8, 0.05, steps)
        return solvers.solve(
            process, SOLVERS["euler-maruyama"], state, times, generator=seeded(place)
        ).state

    @every_process
    def test_denoisers_copy_nothing_within_the_loop(
        self, process: str, device: SimulatedDevice
    ) -> None:
        with torch.device("cpu"):
            on_cpu = self.solved(process, "cpu", 4)
        before = device.traffic()
        found = self.solved(process, "sim", 4)
        few = device.traffic() - before
        check_same([found], [on_cpu], device)
        before = device.traffic()
        self.solved(process, "sim", 9)
        many = device.traffic() - before
        assert many.to_device == few.to_device
        assert (many.waits, many.selections) == (few.waits, 0)

    def test_samples_in_one_call(self, device: SimulatedDevice) -> None:
        sde = PROCESSES["CLD"]()
        on_cpu, there = (
            cldsde.sample(sde, mixture().score(sde), (3, 2), nfe=4, device=place)
            for place in ("cpu", "sim")
        )
        check_same([there], [on_cpu], device)


class TestTrafficOfAdaptiveSolvers:
    """An attempt copies one tensor to the device and waits once."""

    @every_score
    @every_process
    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_attempts_copy_once_and_wait_once(
        self, process: str, name: str, score: str, device: SimulatedDevice
    ) -> None:
        # The difference leaves out what is done once per solve.
        short, early = spent(device, reverse(process, score), ADAPTIVE[name], end=0.99)
        long, late = spent(device, reverse(process, score), ADAPTIVE[name], end=0.1)
        attempts = late.stats["attempts"] - early.stats["attempts"]
        assert attempts > 0
        extra = long.to_device - short.to_device
        assert extra <= attempts * (2 if score == "mixture" else 1)
        assert long.waits - short.waits <= attempts
        assert long.selections == 0
