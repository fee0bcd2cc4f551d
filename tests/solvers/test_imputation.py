"""Imputation: known data come back, independent data are unchanged, the rest is conditional."""

import pytest
import scipy.linalg
import torch

from cldsde import CLD, HOLD, VESDE, VPSDE, ReverseProcess, solvers
from cldsde.linear.blocks import apply_blocks
from cldsde.solvers import EulerMaruyama, Imputation, RecordedNoise
from probes import Recorder, Recording, generator, noting
from tolerances import rounding

PROCESSES = {"VP": VPSDE(), "VE": VESDE(0.05, 20.0), "CLD": CLD(), "HOLD": HOLD()}
CRITICAL = PROCESSES["CLD"]
SSCS, Multistep = solvers.SSCS(), solvers.ExponentialMultistep
# Solvers with the number of normals that each draws per step.
SOLVERS = {
    "EM": (EulerMaruyama(), 1),
    "SSCS": (SSCS, 2),
    "Heun": (solvers.StochasticHeun(), 1),
    "multistep": (Multistep(order=2, stochasticity=1.0), 1),
    "multistep flow": (Multistep(order=2), 0),
}
# SSCS needs a stationary distribution, which VE has not.
PAIRS = [("VE", "Heun"), *((f, s) for f in ("VP", "CLD", "HOLD") for s in SOLVERS)]
GRID = solvers.quadratic_times(1.0, 1e-2, 6)
IMAGE = (3, 2, 4)
KNOWN = torch.randn(IMAGE, generator=generator(1), dtype=torch.float64)
MASK = torch.rand(IMAGE, generator=generator(2)) < 0.5
GREY = torch.tensor([True, False, False])[:, None, None]
BASIS = torch.from_numpy(scipy.linalg.helmert(3, full=True))  # of the channels, grey first
STEPS = rounding(512, 10.0)  # a few steps of sums of a few numbers


def pull(z, t):
    """The score of independent normal numbers, in any basis."""
    return -z[:, -1:]


def prior(sde, batch=2, shape=IMAGE):
    return sde.prior.sample((batch, *shape), generator=generator(3), dtype=torch.float64)


def sample(solver, sde=CRITICAL, state=None, times=GRID, score=None, **options):
    state = prior(sde) if state is None else state
    if "noise" not in options:
        options["generator"] = generator()
    process = ReverseProcess(sde, pull if score is None else score)
    return solvers.solve(process, solver, state, times, **options)


def noisy(sde, t, xi):
    """Known data at a time, with the given normals."""
    kernel, z0 = sde.marginal(t), torch.zeros_like(xi)
    z0[:, 0] = KNOWN
    return apply_blocks(kernel.mean, z0) + apply_blocks(kernel.root, xi)


def close(found, expected, size=STEPS):
    torch.testing.assert_close(found, expected, rtol=0, atol=size)


def of_the_solver(noise, per_step):
    """Draws of the solver: one for the start comes before, and one for the known part per step."""
    own = [draw for i, draw in enumerate(noise.draws[1:]) if i % (per_step + 1) < per_step]
    assert len(noise.draws) == 1 + (per_step + 1) * (len(GRID) - 1)
    return RecordedNoise(own)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_the_known_part_has_its_distribution_and_the_rest_has_the_solver_s_bits(family, name):
    sde, noise, (solver, per_step), calls = PROCESSES[family], Recorder(), SOLVERS[name], []
    imputation, options = Imputation(solver, KNOWN, MASK), {"callback": noting(calls)}
    found = sample(imputation, sde, noise=noise, denoise=True, **options)
    for t, (_, _, z), xi in zip(
        GRID[1:], calls, noise.draws[per_step + 1 :: per_step + 1], strict=True
    ):
        close(z[..., MASK], noisy(sde, t, xi)[..., MASK])
    own = of_the_solver(noise, per_step)
    alone = sample(solver.on_grid(), sde, noise=own, denoise=True)
    assert torch.equal(found.data[:, ~MASK], alone.data[:, ~MASK])
    assert torch.equal(found.state[..., ~MASK], alone.state[..., ~MASK])
    assert found.nfev == alone.nfev


@pytest.mark.covering
@pytest.mark.parametrize("name", ["EM", "SSCS"])
@pytest.mark.parametrize("known", [KNOWN, torch.stack([KNOWN, -KNOWN])], ids=["one", "each"])
@pytest.mark.parametrize("mask", [MASK, torch.tensor(True)], ids=["some", "all"])
def test_known_data_come_back_exactly_if_the_grid_ends_at_the_data(name, known, mask):
    times = solvers.uniform_times(1.0, 0.0, 5)
    imputation = Imputation(SOLVERS[name][0], known, mask)
    data = sample(imputation, times=times).data
    imposed = imputation.impose(-data.float())
    mask, known = mask.expand(data.shape), known.expand(data.shape)
    assert torch.equal(imposed, torch.where(mask, known, -data).float())
    assert torch.equal(data[mask], known[mask])
    assert (data[~mask] != known[~mask]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_known_grey_is_kept(dtype):
    imputation, times = Imputation(SSCS, KNOWN, GREY, BASIS), solvers.uniform_times(1.0, 0.0, 5)
    data = sample(imputation, state=prior(CRITICAL).to(dtype), times=times).data
    size = rounding(12, float(data.abs().max()), dtype)
    close(data.mean(1), KNOWN.mean(0).to(dtype).expand(2, -1, -1), size)
    imposed = imputation.impose(data - 1)
    close(imposed.mean(1), data.mean(1), 2 * size)
    close(*(x - x.mean(1, keepdim=True) for x in (imposed, data)), 2 * size)


@pytest.mark.parametrize("name", SOLVERS)
def test_colours_independent_of_the_grey_are_the_solver_s(name):
    # Independent Gaussian channels of one variance are independent in each basis.
    noise, (solver, per_step) = Recorder(), SOLVERS[name]
    found = sample(Imputation(solver, KNOWN, GREY, BASIS), noise=noise).data
    alone = sample(solver.on_grid(), noise=of_the_solver(noise, per_step)).data
    close(*(torch.einsum("ij,bjhw->bihw", BASIS[1:], x) for x in (found, alone)))


@pytest.mark.covering
@pytest.mark.parametrize("jump", [1, 4, 10])
@pytest.mark.parametrize(("name", "resample"), [("SSCS", 1), ("SSCS", 3), ("Heun", 3)])
def test_the_score_is_evaluated_at_the_announced_times(name, resample, jump):
    score, solver = Recording(pull), SOLVERS[name][0]
    process = ReverseProcess(CRITICAL, score)
    imputation = Imputation(solver, KNOWN, MASK, resample=resample, jump=jump)
    found = solvers.solve(process, imputation, prior(CRITICAL), GRID, generator=generator())
    once = solver.on_grid().evaluation_times(process, GRID).reshape(6, -1).tolist()
    groups = [once[i : i + jump] for i in range(0, 6, jump)]
    times = [t[0].item() for t in score.times]
    assert times == [t for group in groups for step in group * resample for t in step]
    assert times == imputation.evaluation_times(process, GRID).tolist()
    assert found.nfev == len(times) == imputation.facts.nfe_per_step * 6


def test_the_way_back_is_the_forward_process():
    inner, noise = EulerMaruyama(), Recorder()
    nothing = Imputation(inner, KNOWN, torch.tensor(False), resample=2, jump=6)
    found = sample(nothing, noise=noise).state
    assert len(noise.draws) == 13
    there = sample(inner, noise=RecordedNoise(noise.draws[:6])).state
    back = CRITICAL.transition(GRID[-1], GRID[0])
    state = apply_blocks(back.mean, there) + apply_blocks(back.root, noise.draws[6])
    close(found, sample(inner, state=state, noise=RecordedNoise(noise.draws[7:])).state)
