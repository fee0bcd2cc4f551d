"""On a device: the bits of the CPU, results on the device, no double precision, little traffic."""

import dataclasses
import os
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

import cldsde
from cldsde import ReverseProcess, solvers
from cldsde.score import ConditionalScore, PosteriorScore, ScoreDenoiser, score_matching_loss
from probes import Smooth, named_solvers, start
from score.cases import mixture, normal_denoiser
from simulated_device import Generator, SimulatedDevice, needs_simulation, simulated_device
from solvers.test_plan import mixed
from tolerances import rounding

DEVICE = os.environ.get("CLDSDE_TEST_DEVICE", "sim")
"""The simulated device, or for ``tox -e gpu`` a real one, whose traffic is not counted."""
SIMULATED = DEVICE == "sim"

pytestmark = needs_simulation if SIMULATED else []

PROCESSES = {"VP": cldsde.VPSDE, "CLD": cldsde.CLD, "PSLD": cldsde.PSLD}
SOLVERS = named_solvers(0.5)
# Known data and mask are on the CPU.
SOLVERS["imputation"] = solvers.Imputation(
    SOLVERS["sscs"], torch.tensor([0.5, 0.1]), torch.tensor([True, False])
)
# torchsde and torchdiffeq read values back in each step and take times in float64.
OWN = {name: solver for name, solver in SOLVERS.items() if not name.startswith("torch")}
HOME = [(name, "VP" if name.startswith("edm") else "CLD") for name in OWN]
# One solver of each class, every third of them with a score of the package, and some on other
# processes.
CLASSES = list({type(OWN[name]): (name, process) for name, process in HOME}.values())
CASES = [("multistep-2-sde", "PSLD", "function"), ("reverse-diffusion", "VP", "mixture")]
CASES += [(*case, "function" if i % 3 else "mixture") for i, case in enumerate(CLASSES)]
COMPOSED = ["posterior", "guided", "of another process"]
CASES += [("multistep-2-sde", "CLD", score) for score in COMPOSED]
CASES += [(name, "CLD", "function") for name in SOLVERS if name.startswith("torch")]
CASES += [pytest.param(*case, "function", marks=pytest.mark.slow) for case in HOME]


@contextmanager
def the_device(default=DEVICE):
    """The device as the default device: coefficients stay on the CPU.

    The simulation slows down all operations, so results of the CPU are computed outside of it.
    """
    with simulated_device() if SIMULATED else nullcontext(SimulatedDevice()) as device:
        torch.set_default_device(default)
        try:
            yield device
        finally:
            torch.set_default_device(None)


def conditional(sde):
    """A score with conditions of the CPU."""
    variance = torch.tensor([0.5, 1.0, 2.0], device="cpu")
    score = ConditionalScore(cldsde.DenoiserScore(normal_denoiser, sde), variance=variance)
    return score.to(torch.get_default_device())


def posterior(sde):
    """A score whose operator and observation are tensors of the CPU."""
    with torch.device("cpu"):
        seen = cldsde.Observation.matrix([[1.0, 0.3], [0.2, 1.0]], torch.tensor([0.5, -0.2]), 0.3)
    return PosteriorScore(conditional(sde), seen, iterations=2).to(torch.get_default_device())


SCORES = {
    "mixture": lambda sde: mixture().score(sde),
    "function": Smooth,
    "posterior": posterior,
    "guided": lambda sde: cldsde.GuidedScore(
        conditional(sde), conditional(sde), 1.5, interval=(0.1, 3.0)
    ),
    "of another process": lambda sde: cldsde.DenoiserScore(
        ScoreDenoiser(
            cldsde.DenoiserScore(lambda u, sigma: u / (1 + sigma.square()[:, None]), sde)
        ),
        sde,
    ),
}


def reverse(process, score):
    sde = PROCESSES[process]()
    return ReverseProcess(sde, SCORES[score](sde))


def seeded(place, seed=0):
    # A generator on a real device draws other numbers than a generator on the CPU.
    return (Generator() if place == "sim" else torch.Generator("cpu")).manual_seed(seed)


NOISES = {
    "fresh": lambda sde, times, place: solvers.FreshNoise(seeded(place)),
    "samples": lambda sde, times, place: solvers.SampleNoise([3, 4, 5]),
    "path": lambda sde, times, place: solvers.BrownianPath(
        sde, times, (3, 2), generator=seeded("cpu"), device=place
    ),
    "recorded": lambda sde, times, place: solvers.RecordedNoise(
        torch.randn(3, 3, len(sde.driven), 2, generator=seeded("cpu"), device="cpu").to(place)
    ),
}


def solved(process, solver, place, noise="fresh", *, steps=3):
    """A small batch on a device, from the same state with the same noise on every device."""
    end = 0.7 if solver.facts.adaptive else 0.05  # which is a few attempts
    state = start(process.sde, dtype=torch.float32).to(place)
    times = solvers.quadratic_times(process.sde.T, end, steps)
    source = NOISES[noise](process.sde, times, place)
    solution = solvers.solve(process, solver, state, times, noise=source)
    assert solution.success
    return solution


def expected(process, name, score, noise="fresh"):
    # Brownian paths use matrix products on the CPU, which round otherwise than the device's sums,
    # unless products may be less precise.
    torch.set_float32_matmul_precision("high")
    try:
        return solved(reverse(process, score), SOLVERS[name], "cpu", noise)
    finally:
        torch.set_float32_matmul_precision("highest")


def spent(device, *args, **grid):
    """The traffic of a solve, and its solution."""
    before = device.traffic()
    solution = solved(*args, DEVICE, **grid)
    return device.traffic() - before, solution


def check_same(found, on_cpu, device):
    """The same bits, on the device, and nothing was ever in double precision."""
    assert device.traffic().float64 == 0
    if isinstance(found, solvers.Solution):
        found, on_cpu = ([x.state, x.data, x.y] for x in (found, on_cpu))
    for one, other in zip(found, on_cpu, strict=True):
        assert one.device.type == torch.device(DEVICE).type
        # A GPU and the CPU round functions of single precision differently, in the last digits.
        tolerance = 0.0 if SIMULATED else rounding(1e3, dtype=torch.float32)
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "process", "score"), CASES)
def test_solvers_give_the_bits_of_the_cpu_and_steps_wait_for_nothing(name, process, score):
    on_cpu = expected(process, name, score)
    with the_device() as device:
        few, found = spent(device, reverse(process, score), SOLVERS[name])
        if name not in OWN:
            device.reset()
        check_same(found, on_cpu, device)
        assert (found.nfev, found.message) == (on_cpu.nfev, on_cpu.message)
        if name not in OWN:
            return
        if SOLVERS[name].facts.adaptive:
            # One wait and one copy for each attempt, and for the first and the last state. A flow
            # finds its first step with two more. A mixture copies coefficients as often.
            most = found.stats["attempts"] + (2 if name == "gotta-go-fast" else 4)
            assert few.waits <= most
            assert few.to_device <= most * (2 if score == "mixture" else 1)
            return
        # It waits to know whether the first and the last state are finite.
        anew = dataclasses.replace(SOLVERS[name])  # without data that have moved already
        many, _ = spent(device, reverse(process, score), anew, steps=4)
    # Conditions, observations, known data and masks of the CPU move once.
    assert many.to_device == few.to_device
    assert many.selections == 0
    if score != "posterior":  # whose linear equations are solved on the CPU
        assert many.waits == few.waits <= 2


@pytest.mark.parametrize(
    ("noise", "name"),
    [(noise, "euler-maruyama") for noise in NOISES]
    + [("path", "exponential-euler"), ("samples", "imputation")],
)
def test_noise_sources_give_the_bits_of_the_cpu(name, noise):
    on_cpu = expected("CLD", name, "function", noise)
    with the_device() as device:
        found = solved(reverse("CLD", "function"), SOLVERS[name], DEVICE, noise)
        check_same(found, on_cpu, device)


@pytest.mark.parametrize("process", PROCESSES)
def test_mixed_scores_have_the_losses_and_gradients_of_the_cpu(process):
    def found(place):
        sde = PROCESSES[process]()
        model = mixed(sde).to(place)
        x = mixture().sample(5, generator=seeded(place), device=place)
        t = torch.linspace(0.1, 1.0, 5, dtype=torch.float64, device="cpu")
        loss = score_matching_loss(model, sde, x, t, generator=seeded(place, 1)).mean()
        loss.backward()
        z = start(sde, dtype=torch.float32).to(place)
        scores = [model(z, 0.5), model(z, torch.tensor([0.9, 0.1, 0.4], device=place))]
        gradients = [parameter.grad for parameter in model.parameters()]
        return [x.detach() for x in (loss, *scores, *gradients)]

    on_cpu = found("cpu")
    with the_device() as device:
        check_same(found(DEVICE), on_cpu, device)


def test_samples_in_one_call_have_the_bits_of_the_cpu():
    sde = PROCESSES["CLD"]()
    samples = partial(cldsde.sample, sde, mixture().score(sde), (3, 2), nfe=4)
    on_cpu = samples(device="cpu")
    with the_device(default=None) as device:
        check_same([samples(device=DEVICE)], [on_cpu], device)
