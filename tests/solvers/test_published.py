"""Published samplers equal the schedulers of diffusers and the samplers of k-diffusion.

A scheduler receives the noise levels of the grid in double precision, and the same data predictions
and draws as cldsde. Its own `step` chooses the formulas.
"""

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.solvers import RecordedNoise
from gaussian_data import PROCESSES
from probes import generator, start
from score.cases import MODES
from tolerances import rounding

N = 9
VP = PROCESSES["VP"][0]
TIMES = solvers.root_times(1.0, 0.02, N)
ALPHA, SIGMA = (x[:, 0, 0] for x in (VP.marginal(TIMES).mean, VP.marginal(TIMES).root))
LEVELS = SIGMA / ALPHA
ORDERS = (1, 2, 3)
# Some 16 operations per step, on states up to 4.
ROUNDING = rounding(16 * N, 4.0)


def predicted(x, i):
    return MODES.posterior_mean(VP, x.unsqueeze(1), float(TIMES[i]))


def draws():
    return list(torch.randn(N, 6, 1, 2, generator=generator(3), dtype=torch.float64))


def difference(x, solver):
    """From the solver's samples; the draws that a deterministic solver does not take are left."""
    process, noise = ReverseProcess(VP, MODES.score(VP)), RecordedNoise(draws())
    found = solvers.solve(process, solver, start(VP, (6, 2)), TIMES, noise=noise).data
    assert x.dtype == torch.float64
    return float((found - x).abs().max())


def made(kind, monkeypatch, **options):
    """A scheduler of diffusers on the grid that computes in double precision with the draws."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, kind)(prediction_type="sample", **options)
    module = __import__(type(scheduler).__module__, fromlist=["torch"])
    double = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(module, "torch", double)
    if hasattr(module, "randn_tensor"):
        following = (draw[:, 0] for draw in draws())
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(following))
    return scheduler


def sampled(scheduler, times, **options):
    """Samples of a scheduler whose steps are called with these times."""
    x = start(VP, (6, 2))[:, 0]
    for i, t in enumerate(times):
        x = scheduler.step(predicted(x, i), t, x, **options).prev_sample
    return x


def on_levels(kind, monkeypatch, **options):
    """A multistep scheduler on the grid."""
    scheduler = made(kind, monkeypatch, lower_order_final=False, **options)
    scheduler.set_timesteps(N)
    scheduler.sigmas, scheduler.timesteps = LEVELS, torch.arange(N)
    return scheduler


def by_index(kind, monkeypatch):
    """A scheduler whose integer times count the levels of the grid from the last one."""
    options = {"clip_sample": False, "num_train_timesteps": N + 1}
    scheduler = made(kind, monkeypatch, **options)
    scheduler.set_timesteps(N + 1)
    scheduler.alphas_cumprod = ALPHA.square().flip(0)
    return scheduler


@pytest.mark.parametrize(("eta", "solver"), [(0.0, solvers.ddim()), (1.0, solvers.ddpm())])
def test_ddim_equals_diffusers(eta, solver, monkeypatch):
    found = sampled(by_index("DDIMScheduler", monkeypatch), range(N, 0, -1), eta=eta)
    assert difference(found, solver) <= ROUNDING


def test_ddpm_equals_diffusers(monkeypatch):
    found = sampled(by_index("DDPMScheduler", monkeypatch), range(N, 0, -1))
    assert difference(found, solvers.ddpm()) <= ROUNDING


HEUN = solvers.ExponentialMultistep(order=2, variable="kappa")
DPM = [(n, "heun" if n == 3 else "midpoint", solvers.dpm_solver_pp(n)) for n in ORDERS]


@pytest.mark.parametrize("sde", [False, True], ids=["ODE", "SDE"])
@pytest.mark.parametrize(("order", "kind", "solver"), [*DPM, (2, "heun", HEUN)], ids=str)
def test_dpm_solver_pp_equals_diffusers(order, kind, solver, sde, monkeypatch):
    options = {"solver_order": order, "solver_type": kind, "final_sigmas_type": "sigma_min"}
    options["algorithm_type"] = "sde-dpmsolver++" if sde else "dpmsolver++"
    scheduler = on_levels("DPMSolverMultistepScheduler", monkeypatch, **options)
    if sde:
        solver = dataclasses.replace(solver, stochasticity=1.0)
    if sde and order == 3:
        # The weight of the second difference has −1/2, and the formula +1/2.
        update = scheduler.multistep_dpm_solver_third_order_update

        def corrected(outputs, **options):
            i, log = scheduler.step_index, LEVELS.log()
            h, first, last = log[i] - log[i + 1], log[i - 1] - log[i], log[i - 2] - log[i - 1]
            slopes = (outputs[2] - outputs[1]) / first, (outputs[1] - outputs[0]) / last
            second = h**2 * (slopes[0] - slopes[1]) / (first + last)
            return update(outputs, **options) + ALPHA[i + 1] * second

        monkeypatch.setattr(scheduler, "multistep_dpm_solver_third_order_update", corrected)
    found = sampled(scheduler, range(N))
    assert difference(found, solver) <= ROUNDING


@pytest.mark.parametrize("order", ORDERS)
def test_unipc_equals_diffusers(order, monkeypatch):
    options = {"solver_order": order, "solver_type": "bh2"}
    found = sampled(on_levels("UniPCMultistepScheduler", monkeypatch, **options), range(N))
    assert difference(found, solvers.unipc(order)) <= ROUNDING


@pytest.mark.parametrize("order", ORDERS)
def test_deis_equals_diffusers(order, monkeypatch):
    found = sampled(on_levels("DEISMultistepScheduler", monkeypatch, solver_order=order), range(N))
    assert difference(found, solvers.deis(order)) <= ROUNDING


def early(t):
    return 1.2 * (t > 0.4).double()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0, early], ids=["0", "0.6", "1", "early"])
def test_sa_solver_equals_diffusers(order, level, monkeypatch):
    constant = torch.tensor(0.0 if callable(level) else level, dtype=torch.float64)
    options = {"predictor_order": order, "corrector_order": order + 1}
    options["tau_func"] = lambda i: level(TIMES[i]) if callable(level) else constant
    found = sampled(on_levels("SASolverScheduler", monkeypatch, **options), range(N))
    assert difference(found, solvers.sa_solver(order, stochasticity=level)) <= ROUNDING


# Samplers of k-diffusion with η = 1, from their formulas for x / α.


def dpmpp_sde(x, draws, order, kind):
    """`sample_dpmpp_2m_sde` of both kinds, and `sample_dpmpp_3m_sde`, whose step 2 is of Heun's."""
    log, data = LEVELS.log(), []
    for i in range(N):
        h, data = log[i] - log[i + 1], [predicted(x * ALPHA[i], i), *data]
        first = -torch.expm1(-2 * h)
        second = 1 - first / (2 * h)
        x = torch.exp(-2 * h) * x + first * data[0]
        if i > 0:
            slope = (data[0] - data[1]) / (log[i - 1] - log[i])
            if order == 3 and i > 1:
                before = (data[1] - data[2]) / (log[i - 2] - log[i - 1])
                bend = (slope - before) / (log[i - 2] - log[i])
                slope = slope + (log[i - 1] - log[i]) * bend
                x = x + (0.5 - second / (2 * h)) * h**2 * bend
            x = x + (second if kind == "heun" else first / 2) * h * slope
        x = x + draws[i][:, 0] * LEVELS[i + 1] * first.sqrt()
    return x


def euler_ancestral(x, draws):
    """`sample_euler_ancestral`."""
    for i, (now, then) in enumerate(itertools.pairwise(LEVELS)):
        up = then * (now**2 - then**2).sqrt() / now
        down = (then**2 - up**2).sqrt()
        x = x + (down - now) * (x - predicted(x * ALPHA[i], i)) / now + up * draws[i][:, 0]
    return x


DPM2_SDE, DPM3_SDE = (solvers.dpm_solver_pp(n, sde=True) for n in (2, 3))
K_DIFFUSION = {
    "sample_euler_ancestral": (euler_ancestral, solvers.ddpm()),
    "sample_dpmpp_2m_sde": (partial(dpmpp_sde, order=2, kind="midpoint"), DPM2_SDE),
    "sample_dpmpp_2m_sde, heun": (
        partial(dpmpp_sde, order=2, kind="heun"),
        dataclasses.replace(HEUN, stochasticity=1.0),
    ),
    "sample_dpmpp_3m_sde": (partial(dpmpp_sde, order=3, kind="heun"), DPM3_SDE),
}


@pytest.mark.parametrize("name", K_DIFFUSION)
def test_samplers_of_k_diffusion_with_noise_are_special_cases(name):
    sampler, solver = K_DIFFUSION[name]
    found = ALPHA[-1] * sampler(start(VP, (6, 2))[:, 0] / ALPHA[0], draws())
    assert difference(found, solver) <= ROUNDING
