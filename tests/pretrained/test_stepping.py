"""Steps from data predictions that a caller brings are those of `solve`."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VPSDE, DenoiserScore, ReverseProcess, solvers
from cldsde.pretrained.stepping import PathSteps, recommended_steps
from probes import check_normal, generator
from tolerances import rounding

MULTISTEP = solvers.ExponentialMultistep
PROCESSES = {"CLD": CLD(), "VP": VPSDE(), "PSLD": PSLD(), "HOLD": HOLD()}
SOLVERS = {"noise": MULTISTEP(order=2, stochasticity=1.0), "order 3": MULTISTEP(order=3)}
SOLVERS |= {"corrector": MULTISTEP(order=2, corrector=True), "euler": solvers.EulerMaruyama()}
SOLVERS |= {"exponential": solvers.ExponentialEuler(), "ancestral": solvers.Ancestral()}
N = 5
SHAPE = (3, 2, 4)
# Six steps of a smooth denoiser, each of which multiplies by numbers up to 1/ψ = 250 at the start.
EXACT = rounding(2**14)


def denoiser(u, sigma):
    return torch.tanh(u / (1 + sigma.reshape(-1, 1, 1).square()))


def made(sde, solver, times=None):
    times = solvers.root_times(0.9, 1e-2, N) if times is None else times
    levels = torch.cat([sde.kappa(times), torch.tensor([math.inf])])
    scales = torch.sigmoid(2 * levels).sqrt(), torch.sigmoid(-2 * levels).sqrt()
    return PathSteps(sde, solver, levels, *scales), scales, times


def advanced(steps, scales, x, noise, indices, denoiser=denoiser):
    """x after the steps with the given indices."""
    for i in indices:
        signal, spread = (scale[i] for scale in scales)
        data = denoiser(x / signal, (spread / signal).expand(len(x)))
        x = steps.step(i, x, data, noise)
    return x


def fresh():
    """Normals that are the same in each call."""
    return solvers.FreshNoise(generator(5))


def start():
    return torch.randn(SHAPE, generator=generator(7)).double()


@pytest.mark.covering
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("first", [0, 2])
def test_steps_are_those_of_solve_from_any_level(name, method, first):
    sde, solver = PROCESSES[name], SOLVERS[method]
    steps, scales, times = made(sde, solver)
    found = advanced(steps, scales, start(), fresh(), range(first, N + 1))
    again = fresh()
    state = steps._started(first, start().unsqueeze(1), again)
    process = ReverseProcess(sde, DenoiserScore(denoiser, sde))
    expected = solvers.solve(process, solver, state, times[first:], noise=again, denoise=True)
    size = max(1.0, float(expected.state.abs().max()))  # exponential Euler is unstable here
    assert torch.allclose(found, expected.data, rtol=0, atol=EXACT * size)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_start_has_the_distribution_of_the_process(name):
    """Covariance of the state given x_0 = 0: that of Σ."""
    sde, count = PROCESSES[name], 200_000
    steps, scales, times = made(sde, MULTISTEP())
    x = scales[1][0] * torch.randn(count, 1, generator=generator(0)).double()
    z = steps._started(0, x.unsqueeze(1), solvers.FreshNoise(generator(1)))[..., 0]
    check_normal(z, sde.marginal(times[0]).covariance)


@pytest.mark.covering
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", SOLVERS)
def test_a_changed_x_is_the_x_of_the_state(name, method):
    """The state after a change shows the new x, and w is as before."""
    steps, scales, _ = made(PROCESSES[name], SOLVERS[method])
    x = advanced(steps, scales, start(), fresh(), range(2))
    before, shift = steps._state, torch.linspace(-1, 1, x.numel()).double().reshape(x.shape)
    after = steps._changed(2, x + shift)
    blocks = steps._blocks
    close = rounding(64, float(after.abs().max()))  # products of a few numbers of this size
    seen = torch.tensor(blocks.seen[2], dtype=torch.float64)
    found = (seen @ after.flatten(2))[:, 0]
    assert torch.allclose(found, (x + shift).flatten(1), rtol=0, atol=close)
    change = (after - before).flatten(2)
    expected = torch.tensor(blocks.of_x[2], dtype=torch.float64) @ shift.flatten(1).unsqueeze(1)
    assert torch.allclose(change, expected, rtol=0, atol=close)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("solver", [MULTISTEP(order=3), MULTISTEP(order=2, corrector=True)])
def test_a_correction_keeps_a_change_and_leaves_other_entries_as_they_were(solver, in_place):
    def end(solver, shift, data=denoiser):
        steps, scales, _ = made(CLD(), solver)
        x = advanced(steps, scales, start(), fresh(), range(2), data)
        x = x if in_place else x.clone()
        x[..., 0] += shift
        return advanced(steps, scales, x, fresh(), range(2, N), data)

    assert torch.equal(end(solver, 1.0)[..., 1:], end(solver, 0.0)[..., 1:])
    # If the data are 0, steps of every order are exact, with and without a correction.
    found, expected = (end(x, 1.0, lambda u, _: 0 * u) for x in (solver, MULTISTEP(order=1)))
    assert torch.allclose(found, expected, rtol=0, atol=EXACT)


def test_marginals_stay_right_if_known_parts_are_replaced():
    """Normal data of variance 1: every second entry of x is drawn anew from its marginal."""
    sde, count = CLD(), 20_000
    steps, scales, _ = made(
        sde, MULTISTEP(order=2, stochasticity=1.0), solvers.root_times(1, 1e-2, 40)
    )
    noise = solvers.FreshNoise(generator(0))
    x = torch.randn(count, 2, generator=generator(1)).double()
    for i in range(41):
        signal, x = scales[0][i], x.clone()
        x[:, 0] = torch.randn(count, generator=generator(i + 2)).double()  # α² + σ² = 1
        x = steps.step(i, x, signal * x, noise)  # E[x_0 | x] = α x
    # The last step returns E[x_0 | x], whose variance is α² at the last level.
    free = float(x[:, 1].var() / scales[0][40] ** 2)
    # Four standard errors of a variance, and 1 % of bias of 40 steps.
    assert abs(free - 1) <= 4 * math.sqrt(2 / count) + 0.01


def test_noisier_levels_are_left_by_deterministic_steps():
    """From infinite noise and a level beyond the process, to its first level."""
    sde = CLD()
    levels = torch.tensor([-math.inf, -7.0, -3.0, 0.0, math.inf], dtype=torch.float64)
    scales = torch.sigmoid(levels), torch.sigmoid(-levels)
    steps = PathSteps(sde, MULTISTEP(), levels, *scales)
    assert steps.first == 2
    x, data = start(), torch.full(SHAPE, 0.5, dtype=torch.float64)
    found = steps.step(1, steps.step(0, x, data, fresh()), data, fresh())
    assert torch.allclose(found, scales[0][2] * data + scales[1][2] * x, rtol=0, atol=EXACT)


def test_a_sample_of_another_shape_is_rejected():
    steps, scales, _ = made(CLD(), MULTISTEP())
    x = advanced(steps, scales, start(), fresh(), range(1))
    with pytest.raises(ValueError, match="sample must keep its shape"):
        steps.step(1, x[:2], x[:2], fresh())


@pytest.mark.parametrize(
    ("name", "first", "n", "last", "order", "stochasticity", "variable"),
    [
        ("VP", -3.0, 8, math.inf, 3, 0.5, "vp_time"),
        ("VP", -3.0, 9, math.inf, 2, 1.0, "vp_time"),
        ("CLD", -3.0, 4, math.inf, 3, 1.0, "vp_time"),
        ("CLD", -3.0, 5, math.inf, 3, 1.0, "time"),
        # Parts of a sampling.
        ("VP", -1.0, 4, math.inf, 2, 1.0, "vp_time"),
        ("VP", -3.0, 4, 3.5, 2, 1.0, "vp_time"),
    ],
)
def test_order_and_noise_between_given_levels(name, first, n, last, order, stochasticity, variable):
    levels = torch.linspace(first, 3.0, n + 1, dtype=torch.float64)
    levels = torch.cat([levels, torch.tensor([last])])
    scales = torch.sigmoid(2 * levels).sqrt(), torch.sigmoid(-2 * levels).sqrt()
    found = recommended_steps(PROCESSES[name], None, levels, *scales).solver
    assert (found.order, found.stochasticity) == (order, stochasticity)
    assert found.variable == variable
