"""`ProbabilityFlow`: its solution, tolerance and counts, samples on their own, and its ends."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, GaussianMixture, ReverseProcess
from cldsde.solvers import ProbabilityFlow, solve
from cldsde.solvers.probability_flow import _growth
from gaussian_data import DATA, PROCESSES, check_flow
from probes import Recording, generator, noting, start, tensor
from score import cases
from tolerances import EPS32, standard_error

CRITICAL, END = CLD(), 1e-2
METHODS = {"bosh3": "RK23", "dopri5": "RK45", "dopri8": "DOP853"}  # names in scipy
every_method = pytest.mark.parametrize("method", METHODS)
every_pace = pytest.mark.parametrize("pace", ["batch", "sample"])


def run(sde, score, state, eps=END, **options):
    return solve(ReverseProcess(sde, score), ProbabilityFlow(**options), state, tensor([1.0, eps]))


def linear(z, t):
    return -4 * z[:, 1:]


# Many steps of order eight, whose number shows the weights of the two error estimates.
TIGHT = 1e-10
STEPS = [("CLD", "dopri8", "sample", 1, TIGHT, TIGHT)] + [
    (*case, *tolerances)
    for method in METHODS
    for case in (("VE", method, "batch", 20), ("CLD", method, "sample", 1))
    for tolerances in ((1e-6, 1e-4), (1e-4, 1e-6))
]


@pytest.mark.one_in(13)
@pytest.mark.parametrize(("name", "method", "pace", "samples", "rtol", "atol"), STEPS)
def test_steps_are_those_of_scipy(name, method, rtol, atol, pace, samples):
    sde = PROCESSES[name][0]
    process = ReverseProcess(sde, cases.mixture().score(sde))
    state, solver = start(sde, (samples, 2)), ProbabilityFlow(method=method)

    def velocity(t, flat):
        z = torch.from_numpy(flat).reshape(state.shape)
        return process.probability_flow(z, t).numpy().ravel()

    options = {"rtol": rtol, "atol": atol}
    expected = solve_ivp(velocity, (1.0, 0.3), state.numpy().ravel(), METHODS[method], **options)
    found = run(sde, process.score, state, 0.3, method=method, pace=pace, **options)
    # The same formulas; a rejection may tip over by rounding, and is repeated within tolerance.
    room = max(solver.facts.nfe_per_step, 0.05 * expected.nfev)
    assert abs(found.nfev - expected.nfev) <= room
    last = torch.from_numpy(expected.y[:, -1]).reshape(state.shape)
    if rtol > TIGHT:
        assert ((found.state - last).abs() <= atol + rtol * last.abs()).all()


@every_pace
@every_method
def test_the_last_evaluation_is_at_the_end(method, pace):
    # Few and long steps: the last one often starts above twice the end, when t - (t - end) is
    # not end.
    for eps in torch.logspace(-3, -0.5, 4, dtype=torch.float64).tolist():
        score = Recording(linear)
        options = {"method": method, "rtol": 0.1, "atol": 0.1, "pace": pace}
        run(CRITICAL, score, start(CRITICAL), eps, **options)
        times = torch.cat(score.times)
        assert (times.max(), times.min()) == (1.0, eps)


@every_pace
def test_fixed_steps_have_their_length_and_callbacks_get_the_time_of_each_sample(pace):
    calls, solver = [], ProbabilityFlow(pace=pace).with_step(0.25)
    process, ends = ReverseProcess(CRITICAL, linear), tensor([1.0, END])
    solve(process, solver, start(CRITICAL), ends, callback=noting(calls))
    assert [t.tolist() for _, t, _ in calls] == [[t] * 3 for t in (0.75, 0.5, 0.25, END)]


@pytest.mark.parametrize("order", [2, 7])
def test_steps_grow_by_the_root_of_the_error(order):
    errors = torch.tensor([2.0 ** -(order + 1), 3.0 ** (order + 1), 0.9, 0.0, 1e30, math.nan])
    # Hairer, Nørsett and Wanner (1993), (II.4.13), with factor 0.9 and limits 0.2 and 10.
    expected = torch.tensor([1.8, 0.3, 0.9 * 0.9 ** (-1 / (order + 1)), 10.0, 0.2, 0.2])
    for rejected in (False, True):
        growth = _growth(errors, order, after_rejection=torch.full((6,), rejected))
        wanted = expected.clamp_max(1.0) if rejected else expected
        torch.testing.assert_close(growth, wanted, rtol=4 * EPS32, atol=0)


@pytest.mark.filterwarnings("ignore:the solve failed")
def test_a_sample_that_fails_takes_its_batch_with_it_unless_steps_are_its_own():
    def score(z, t):
        return torch.where(z[:, 1:] > 10, math.nan, -4 * z[:, 1:])

    state = start(CRITICAL)
    state[0] += 100.0
    assert not run(CRITICAL, score, state).stats["success"].any()
    alone = run(CRITICAL, score, state, pace="sample")
    assert alone.stats["success"].tolist() == [False, True, True]


@every_pace
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_far_above_the_tolerance_do_not_overflow_half_precision(dtype, pace):
    score = Recording(GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(CRITICAL))
    z = CRITICAL.prior.sample((500, 1), generator=generator()).to(dtype)
    found = run(CRITICAL, score, z, rtol=1e-2, atol=1e-2, pace=pace)
    assert found.success
    assert {t.dtype for t in score.times} == {torch.float32}  # at least single precision
    # Standard errors of the mean, and two roundings of the state.
    error = standard_error(0.5, 500, number=5) + 2 * torch.finfo(dtype).eps
    assert float(found.data.float().mean()) == pytest.approx(0.3, abs=error)


@every_method
def test_a_trial_step_out_of_the_domain_is_repeated_shorter(method):
    # As of a network in half precision: all stages of the first attempt but one are numbers.
    name, factors, tolerance = "VE", [1.0, 1.0, 1.0, math.nan], 1e-4
    sde, state = PROCESSES[name][0], torch.full((1, 1, 1), 10.0, dtype=torch.float64)

    def score(z, t):
        return DATA.score(sde)(z, t) * (factors.pop(0) if factors else 1.0)

    found = run(sde, score, state, method=method, rtol=tolerance, atol=tolerance)
    assert found.success
    check_flow(found.state, state, name, END, found.stats["attempts"], tolerance)
