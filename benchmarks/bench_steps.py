"""Steps on a grid: cldsde, loops by hand, torchsde, diffrax and diffusers' schedulers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

import by_hand
from by_torchsde import EulerMaruyama
from cldsde import CLD, VPSDE, ReverseProcess, solvers
from problems import free, linear, mlp

SDE = CLD(beta=by_hand.BETA, mass=1 / by_hand.INVERSE_MASS, friction=by_hand.FRICTION)
SCORES = {"a product of matrices": linear(SDE, 2), "a small network": mlp(SDE, 2)}
MULTISTEP = solvers.ExponentialMultistep
# The tests check that cldsde and diffusers compute the same steps.
SCHEDULERS = {
    "DDIM": (MULTISTEP(order=1), "DDIMScheduler", {}),
    "DPM-Solver++(2M)": (
        MULTISTEP(variable="kappa", weights="published"),
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++"},
    ),
    "SDE-DPM-Solver++(2M)": (
        MULTISTEP(variable="kappa", weights="published", stochasticity=1.0),
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC-2": (
        MULTISTEP(variable="kappa", weights="published", corrector=True),
        "UniPCMultistepScheduler",
        {"solver_order": 2},
    ),
}


def ours(score, solver, state, times, sde=SDE):
    generator = torch.Generator().manual_seed(1)
    return partial(
        solvers.solve, ReverseProcess(sde, score), solver, state, times, generator=generator
    )


@pytest.mark.parametrize("name", SCORES)
def test_small_states(race, threads, name):
    steps, score, generator = 1000 if "product" in name else 100, SCORES[name], torch.Generator()
    state = SDE.prior.sample((4096, 2), generator=generator.manual_seed(0))
    times = solvers.uniform_times(SDE.T, 1e-3, steps)
    by_torchsde = EulerMaruyama(score, state, times)
    rivals = {
        "cldsde": ours(score, solvers.EulerMaruyama(), state, times),
        "by hand": partial(by_hand.euler_maruyama, score, state, times, generator),
        "torchsde": partial(by_torchsde.run, informed=False),
        "torchsde, given dt": partial(by_torchsde.run, informed=True),
    }
    if "product" in name and threads == "one thread" and find_spec("diffrax"):
        import by_diffrax

        rivals["diffrax, compiled"] = by_diffrax.euler_maruyama(state, times, "stepwise")
        rivals["diffrax, compiled, Brownian tree"] = by_diffrax.euler_maruyama(state, times, "tree")
    race(
        f"Euler–Maruyama, 4096 × 2 × 2, score: {name}",
        rivals,
        at_most={"by hand": 1.6, "torchsde": 1 / 4.5} if "product" in name else {},
        unit="step",
        units=steps,
        rounds=5,
    )


def test_sscs_by_hand(race):
    steps, score, generator = 1000, SCORES["a product of matrices"], torch.Generator()
    state = SDE.prior.sample((4096, 2), generator=generator.manual_seed(0))
    times = solvers.uniform_times(SDE.T, 1e-3, steps)
    race(
        "SSCS, 4096 × 2 × 2, score: a product of matrices",
        {
            "cldsde": ours(score, solvers.SSCS(), state, times),
            "by hand": partial(by_hand.sscs, score, state, times, generator),
        },
        unit="step",
        units=steps,
        rounds=5,
    )


@pytest.mark.parametrize(
    ("name", "solver", "rows"),
    [
        ("Euler–Maruyama", solvers.EulerMaruyama(), 1),
        ("SSCS", solvers.SSCS(), 2),
        ("Multistep 2, stochasticity 1", MULTISTEP(stochasticity=1.0), 2),
    ],
)
def test_images_against_their_normals(race, name, solver, rows):
    batch, steps, shape, generator = 64, 50, (3, 32, 32), torch.Generator()
    state = SDE.prior.sample((batch, *shape), generator=generator.manual_seed(0))
    times = solvers.root_times(SDE.T, 1e-3, steps)
    plan = solvers.plan(ReverseProcess(SDE, free(SDE)), solver, times)

    def draw():
        for _ in range(steps):
            torch.randn(batch, rows, *shape, generator=generator)

    race(
        f"{name}, {batch} × 2 × 3 × 32 × 32, score: free",
        {
            "cldsde": partial(plan.solve, state, generator=generator),
            "its normals": draw,
        },
        at_most={"its normals": 1.5},
        unit="step",
        units=steps,
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers(race, name):
    diffusers = pytest.importorskip("diffusers")
    (solver, kind, options), sde, steps = SCHEDULERS[name], VPSDE(), 20
    generator = torch.Generator().manual_seed(0)
    state = sde.prior.sample((16, 3, 32, 32), generator=generator)
    scheduler = getattr(diffusers, kind)(**options)
    noise = {"generator": generator} if "SDE" in name else {}

    def by_diffusers():
        scheduler.set_timesteps(steps)
        x = state[:, 0]
        for t in scheduler.timesteps:
            x = scheduler.step(x.neg(), t, x, **noise).prev_sample

    race(
        f"{name}, VP, 16 × 3 × 32 × 32, score: free",
        {
            "cldsde": ours(
                lambda z, t: z.neg(), solver, state, solvers.root_times(sde.T, 1e-3, steps), sde
            ),
            "diffusers": by_diffusers,
        },
        unit="step",
        units=steps,
    )
