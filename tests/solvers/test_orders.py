"""Orders of the fixed-grid solvers, from exact moments.

The reference uses none of the package's kernels. Both the reverse SDE and the probability flow
carry p_T to p_t, so that the moments of z_t are the exact answer for either.
"""

import functools
import math
import re

import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, ReverseProcess, solvers
from cldsde.solvers import EDMHeun, Splitting, TorchDiffEq, TorchSDE
from cldsde.solvers import ExponentialMultistep as Multistep
from cldsde.solvers.named import published_solvers
from gaussian_data import EVERY, PROCESSES, SLOPE, flow, moments_error, reverse
from probes import PUBLISHED, WORDS, generator, normals, start, tensor
from score import cases
from tolerances import EPS, KERNEL

GRIDS = {"uniform": solvers.uniform_times, "root": solvers.root_times}


@functools.cache
def error(solver, name, n, grid="root", T=1.0, end=0.05):
    return moments_error(solver, name, GRIDS[grid](T, end, n))


def order(solver, name, coarse=40, factor=2, **options):
    """Slope of the error between ``coarse`` and ``factor * coarse`` steps."""
    first, last = (error(solver, name, n, **options) for n in (coarse, factor * coarse))
    return math.log(first / last) / math.log(factor)


def declared(solver):
    facts = solver.facts
    assert (facts.weak_order is None) != (facts.ode_order is None)
    return facts.weak_order if facts.ode_order is None else facts.ode_order


NAMED = solvers.named_solvers()
# These have an order on VP that is above the declared one, or reach it with shorter steps.
LATER = ("unipc-3", "sa-solver-2", "sa-solver-3")
SDE, LATE = {"stochasticity": 1.0}, {"scheme": "OBAB", "score_time": "end"}
# Solvers, and the processes on which the slope is the declared one.
TABLE = {
    "Euler-Maruyama": (solvers.EulerMaruyama(), EVERY),
    "Heun": (solvers.StochasticHeun(), EVERY),
    "exponential Euler": (solvers.ExponentialEuler(), ["VE", "CLD, linear", "HOLD"]),
    "reverse diffusion": (solvers.ReverseDiffusion(), ["VE", "CLD, linear"]),
    "ancestral": (solvers.Ancestral(), ["VE", "CLD, linear"]),
    "SSCS": (solvers.SSCS(), ["VP", "CLD, linear", "HOLD"]),
    "SSCS, midpoint": (solvers.SSCS(score_step="midpoint"), ["VP", "CLD, linear", "PSLD", "HOLD"]),
    "SSCS, wrong slope": (solvers.SSCS(score_step="gaussian", data_variance=1.0), ["CLD, linear"]),
    "1": (Multistep(order=1), ["VP", "VE"]),
    "2": (Multistep(order=2), ["VP", "CLD, linear", "PSLD", "HOLD"]),
    "3": (Multistep(order=3), ["CLD"]),
    "1 corrected": (Multistep(order=1, corrector=True), ["VE", "CLD"]),
    "2 corrected": (Multistep(order=2, corrector=True), ["VE", "CLD, linear"]),
    "noise, 1": (Multistep(order=1, prediction="noise"), ["CLD"]),
    "noise, 2": (Multistep(order=2, prediction="noise"), ["VE", "CLD", "HOLD"]),
    "log-SNR, 2": (Multistep(order=2, variable="kappa"), ["VP", "CLD"]),
    "VP's time, 2": (Multistep(order=2, variable="vp_time"), ["VP", "CLD"]),
    "published, 2 corrected": (Multistep(order=2, corrector=True, **PUBLISHED), ["VP", "CLD"]),
    "2 at falling noise": (Multistep(order=2, stochasticity=lambda t: t), ["VP", "CLD"]),
    "1 at 1": (Multistep(order=1, **SDE), ["VP", "VE"]),
    "1 at 0.5": (Multistep(order=1, stochasticity=0.5), ["VP", "CLD"]),
    "1 corrected at 1": (Multistep(order=1, corrector=True, **SDE), ["VP", "CLD"]),
    "2 at 1": (Multistep(order=2, **SDE), ["VP", "VE", "CLD, linear", "HOLD"]),
    "EDM": (EDMHeun(), ["VP", "VE"]),
    "EDM, churn": (EDMHeun(churn=10.0), ["VE"]),
    "EDM, churn in a range": (EDMHeun(churn=5.0, churn_range=(0.3, 3.0)), ["VP", "VE"]),
    **{word: (Splitting(scheme=word), ["CLD"]) for word in WORDS},
    "OBAB, shared": (Splitting(scheme="OBAB", shared_score=True), ["CLD", "PSLD"]),
    "OBAB, at the end": (Splitting(**LATE), ["CLD", "PSLD"]),
    **{name: (x, ["VP"]) for name, x in published_solvers().items() if name not in LATER},
    "sa-solver-3": (solvers.sa_solver(3), ["VE"]),
    "torchsde, euler": (TorchSDE(method="euler"), ["VE", "HOLD"]),
    "torchsde, srk": (TorchSDE(method="srk"), ["VE", "HOLD"]),
    "torchsde, heun": (TorchSDE(method="heun"), ["CLD, linear"]),
    "torchsde, euler_heun": (TorchSDE(method="euler_heun"), ["HOLD"]),
}
SOLVERS = {method: solver for method, (solver, _) in TABLE.items()}
# At 40 steps the second term of these errors, d h / (2 log 2), is above a quarter.
FINE = {
    *(("exponential Euler", "HOLD"), ("reverse diffusion", "CLD, linear"), ("SSCS", "HOLD")),
    *(("2", "PSLD"), ("2 at falling noise", "VP"), ("2 at falling noise", "CLD")),
    *(("1 corrected at 1", "CLD"), ("BOAOB", "CLD")),
}


@pytest.mark.covering
@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, (_, names) in TABLE.items() for name in names]
)
def test_the_order_is_the_declared_one(method, name):
    slope = order(SOLVERS[method], name, 80 if (method, name) in FINE else 40)
    assert abs(slope - declared(SOLVERS[method])) < SLOPE


AWAY = {"coarse": 320, "grid": "uniform", "T": 0.5, "end": 0.2}
FEW, ANY = {"coarse": 20, "factor": 8, "end": 0.2}, math.inf
# Solvers, their declared order, a process, the least slope there, and how far it may be above.
SPECIAL = [
    # With noise every higher order ends at two. The polynomial's error, h^3 or smaller, hides the
    # error of the noise, h^2 with a small constant, until the steps are short: on VP, away from
    # the data, it shows. With a velocity the constant is smaller still: over a factor of eight the
    # slope is between the declared order and the polynomial's order.
    (Multistep(order=2, corrector=True, **SDE), 2, "VP", 2, SLOPE, AWAY),
    (Multistep(order=3, **SDE), 2, "VP", 2, SLOPE, AWAY),
    (Multistep(order=3, **SDE), 2, "CLD", 2, ANY, FEW),
    # A first step of order q errs by h^(q+1), once. Near the limit from above.
    (Multistep(order=3, corrector=True), 3, "VE", 3, 2 * SLOPE, {"coarse": 320}),
    (Multistep(order=3, prediction="noise"), 2, "VE", 2, 2 * SLOPE, {"coarse": 320}),
    # The data prediction hardly moves at T if there is a velocity, which hides the first steps.
    (Multistep(order=3, corrector=True), 3, "CLD", 4, ANY, {}),
    (Multistep(order=3, prediction="noise"), 2, "CLD", 3, ANY, {}),
    (solvers.unipc(3), 3, "VP", 3, ANY, {}),
    (solvers.sa_solver(2), 2, "VE", 2, 2 * SLOPE, {"coarse": 80}),
    (TorchDiffEq(method="rk4"), 4, "VP", 4, SLOPE, {"coarse": 20}),
]


@pytest.mark.parametrize(
    ("solver", "claim", "name", "least", "above", "options"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (x[5].get("coarse") == 320)) for x in SPECIAL],
    ids=str,
)
def test_special_orders(solver, claim, name, least, above, options):
    assert declared(solver) == claim
    assert least - SLOPE < order(solver, name, **options) < least + above


FLOWS = [name for name, x in NAMED.items() if x.facts.adaptive and x.facts.ode_order]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", FLOWS)
def test_fixed_steps_of_adaptive_solvers_have_the_declared_order(method):
    z, ends, errors = start(PROCESSES["VE"][0], (4, 1)), tensor([1.0, 0.05]), []
    # Few steps keep errors far above rounding, and still tell orders apart, which are whole.
    for n in (8, 16):
        found = solvers.solve(reverse("VE"), NAMED[method].with_step(0.95 / n), z, ends).state
        errors.append(float((found - flow(z, "VE", 0.05)).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - declared(NAMED[method])) < 2 * SLOPE


def test_every_declared_order_is_measured():
    measured = {solver for solver, names in TABLE.values() if names} | {row[0] for row in SPECIAL}
    orders = {name for name, x in NAMED.items() if x.facts.weak_order or x.facts.ode_order}
    rest = {name for name in orders if NAMED[name] not in measured}
    assert rest == set(FLOWS), f"add rows to TABLE for {rest - set(FLOWS)}"


def test_orders_in_names_are_those_of_the_solvers():
    numbered = {name: re.search(r"-(\d)(-|$)", name) for name in NAMED}
    orders = {name: int(found[1]) for name, found in numbered.items() if found}
    assert {name: NAMED[name].order for name in orders} == orders != {}


def test_exponential_euler_is_exact_for_a_constant_score():
    sde, exact = PROCESSES["CLD, linear"]
    process, z = ReverseProcess(sde, lambda z, t: torch.ones_like(z[:, 1:])), start(sde)
    noise = solvers.RecordedNoise([torch.zeros_like(z)])
    times = tensor([1.0, 0.7])
    found = solvers.solve(process, solvers.ExponentialEuler(), z, times, noise=noise).state

    def slope(t, flat):
        F, Q = exact.clock.rate(t) * exact.A, exact.clock.rate(t) * exact.Q
        return (F @ flat.reshape(3, 2, 2) - Q[:, 1:]).ravel()

    options = {"method": "DOP853", "rtol": 1e2 * EPS, "atol": 1e2 * EPS}
    expected = solve_ivp(slope, (1.0, 0.7), z.numpy().ravel(), **options).y[:, -1]
    assert abs(found.numpy().ravel() - expected).max() <= 1e2 * KERNEL


def test_euler_maruyama_is_its_formula():
    sde, t, h = CLD((1.0, 8.0)), 0.9, 0.3
    process, xi = ReverseProcess(sde, cases.mixture().score(sde)), normals(0, 3, 1, 2)
    z, noise, times = start(sde), solvers.RecordedNoise([xi]), tensor([t, t - h])
    found = solvers.solve(process, solvers.EulerMaruyama(), z, times, noise=noise).state
    expected = z - h * process.drift(z, t) + math.sqrt(h) * sde.diffusion(t) @ xi
    assert torch.allclose(found, expected, rtol=100 * KERNEL, atol=100 * KERNEL)


def test_ancestral_sampling_is_the_multistep_method_of_order_one():
    sde, times = CLD(), tensor([0.9, 0.5, 0.2])
    process, z = ReverseProcess(sde, cases.mixture().score(sde)), start(sde)
    ours, other = solvers.Ancestral(), solvers.ExponentialMultistep(order=1, stochasticity=1.0)
    found, expected = (
        solvers.solve(process, solver, z, times, generator=generator()).state
        for solver in (ours, other)
    )
    assert torch.allclose(found, expected, rtol=100 * KERNEL, atol=100 * KERNEL)
