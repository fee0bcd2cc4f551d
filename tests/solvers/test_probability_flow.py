"""`ProbabilityFlow`: its solution, tolerance and counts, samples on their own, and its ends."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, ReverseProcess
from cldsde.solvers import ProbabilityFlow, solve
from cldsde.solvers.probability_flow import _growth
from probes import Recording, generator, start
from references import cld, dense, hold, psld, ve, vp
from score import cases
from tolerances import EPS32, standard_error

PROCESSES = {
    "VP": (VPSDE(), dense(vp())),
    "VE": (VESDE(0.05, 20.0), dense(ve(0.05, 20.0))),
    "CLD": (CLD(), dense(cld())),
    "PSLD": (PSLD(), dense(psld())),
    "HOLD": (HOLD(), dense(hold())),
}
CRITICAL, END = PROCESSES["CLD"][0], 1e-2
# Name in scipy, evaluations per attempt, and order.
METHODS = {"bosh3": ("RK23", 3, 3), "dopri5": ("RK45", 6, 5), "dopri8": ("DOP853", 12, 8)}
every_method = pytest.mark.parametrize("method", list(METHODS))
every_pace = pytest.mark.parametrize("pace", ["batch", "sample"])
may_fail = pytest.mark.filterwarnings("ignore:the solve failed")


def ends(eps=END, T=1.0):
    return torch.tensor([T, eps], dtype=torch.float64)


def run(sde, score, state, eps=END, **options):
    return solve(ReverseProcess(sde, score), ProbabilityFlow(**options), state, ends(eps))


def gaussian(sde):
    return GaussianMixture([1.0], [[0.3, 0.3]], [[[0.25, 0.0], [0.0, 0.25]]]).score(sde)


def flown(name, z):
    """Where the flow of `gaussian` takes states, and how often it lengthens errors on the way."""
    exact_process = PROCESSES[name][1]
    moves = exact_process.flow(1.0, *np.linspace(1.0, END, 50)[1:])
    growth = np.linalg.norm(moves[-1] @ np.linalg.inv(moves), 2, axis=(1, 2)).max()
    away = z.double().numpy() - exact_process.mean(1.0)[:, None]
    return torch.from_numpy(exact_process.mean(END)[:, None] + moves[-1] @ away), growth


class TestSolution:
    @pytest.mark.parametrize("name", list(PROCESSES))
    def test_it_is_the_flow_of_gaussian_data(self, name):
        sde = PROCESSES[name][0]
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            state = start(sde, dtype=dtype)
            expected, growth = flown(name, state)
            options = {"method": "dopri8", "rtol": tolerance, "atol": tolerance}
            found = run(sde, gaussian(sde), state, **options)
            assert found.success
            assert found.state.dtype == dtype
            # Each step errs by at most the tolerance in units of 1 + |z|, a root mean square over
            # 2k numbers, and the flow lengthens that; in single precision rounding is far below.
            size = (1 + float(state.abs().max())) * math.sqrt(2 * sde.components)
            bound = found.stats["attempts"] * tolerance * size * growth
            assert (found.state - expected).abs().max() <= bound
            assert bound < 1e4 * tolerance

    @every_method
    @pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-3), (1e-7, 1e-4), (1e-4, 1e-7)])
    @pytest.mark.parametrize(
        ("name", "pace", "samples"), [("VE", "batch", 20), ("CLD", "sample", 1)]
    )
    def test_steps_are_those_of_scipy(self, name, method, rtol, atol, pace, samples):
        sde = PROCESSES[name][0]
        process = ReverseProcess(sde, cases.mixture().score(sde))
        state, (scipy_method, stages, _) = start(sde, (samples, 2)), METHODS[method]

        def velocity(t, flat):
            z = torch.from_numpy(flat).reshape(state.shape)
            return process.probability_flow(z, t).numpy().ravel()

        options = {"rtol": rtol, "atol": atol}
        expected = solve_ivp(velocity, (1.0, END), state.numpy().ravel(), scipy_method, **options)
        found = run(sde, process.score, state, method=method, pace=pace, **options)
        # The same formulas; a rejection may tip over by rounding, and is repeated within tolerance.
        assert abs(found.nfev - expected.nfev) <= max(stages, 0.05 * expected.nfev)
        last = torch.from_numpy(expected.y[:, -1]).reshape(state.shape)
        assert ((found.state - last).abs() <= atol + rtol * last.abs()).all()

    def test_the_error_of_order_eight_is_scipy_s(self):
        # Many steps, whose number shows the weights of the two error estimates.
        process = ReverseProcess(CRITICAL, cases.mixture().score(CRITICAL))
        state = start(CRITICAL, (1, 2))

        def velocity(t, flat):
            z = torch.from_numpy(flat).reshape(state.shape)
            return process.probability_flow(z, t).numpy().ravel()

        options = {"rtol": 1e-10, "atol": 1e-10}
        expected = solve_ivp(velocity, (1.0, END), state.numpy().ravel(), "DOP853", **options)
        found = run(CRITICAL, process.score, state, method="dopri8", **options)
        # A rejection may tip over by rounding.
        assert abs(found.nfev - expected.nfev) <= 0.05 * expected.nfev

    @every_pace
    @every_method
    def test_the_last_evaluation_is_at_the_end(self, method, pace):
        # Few and long steps: the last one often starts above twice the end, when t - (t - end) is
        # not end.
        for eps in torch.logspace(-3, -0.5, 8, dtype=torch.float64).tolist():
            score = Recording(gaussian(CRITICAL))
            options = {"method": method, "rtol": 0.1, "atol": 0.1, "pace": pace}
            run(CRITICAL, score, start(CRITICAL), eps, **options)
            times = torch.cat(score.times)
            assert (times.max(), times.min()) == (1.0, eps)

    @every_pace
    def test_fixed_steps_have_their_length(self, pace):
        times, solver = [], ProbabilityFlow(pace=pace).with_step(0.25)
        process = ReverseProcess(CRITICAL, lambda z, t: -4 * z[:, 1:])
        keep = lambda n, t, z: times.append(float(t[0]))  # noqa: E731
        solve(process, solver, start(CRITICAL), ends(), callback=keep)
        assert times == [0.75, 0.5, 0.25, END]


@pytest.mark.parametrize("order", [2, 4, 7])
def test_steps_grow_by_the_root_of_the_error(order):
    errors = torch.tensor([2.0 ** -(order + 1), 3.0 ** (order + 1), 0.9, 0.0, 1e30, math.nan])
    growth = _growth(errors, order, after_rejection=torch.zeros(6, dtype=torch.bool))
    # Hairer, Nørsett and Wanner (1993), (II.4.13), with factor 0.9 and limits 0.2 and 10.
    expected = torch.tensor([1.8, 0.3, 0.9 * 0.9 ** (-1 / (order + 1)), 10.0, 0.2, 0.2])
    torch.testing.assert_close(growth, expected, rtol=4 * EPS32, atol=0)
    after = _growth(errors, order, after_rejection=torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(after, expected.clamp_max(1.0), rtol=4 * EPS32, atol=0)


@may_fail
def test_a_sample_that_fails_takes_its_batch_with_it_unless_steps_are_its_own():
    def score(z, t):
        return torch.where(z[:, 1:] > 10, math.nan, -4 * z[:, 1:])

    state = start(CRITICAL)
    state[0] += 100.0
    assert not run(CRITICAL, score, state).stats["success"].any()
    alone = run(CRITICAL, score, state, pace="sample")
    assert alone.stats["success"].tolist() == [False, True, True]


def test_callbacks_of_a_batch_with_one_step_length_get_the_time_of_each_sample():
    seen, process = [], ReverseProcess(CRITICAL, lambda z, t: -4 * z[:, 1:])
    keep = lambda number, t, z: seen.append((t.shape, len(set(t.tolist()))))  # noqa: E731
    solve(process, ProbabilityFlow(), start(CRITICAL), ends(), callback=keep)
    assert set(seen) == {(torch.Size([3]), 1)}


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_times_have_the_type_of_the_state_or_single_precision(self, dtype):
        score = Recording(lambda z, t: -4 * z[:, 1:])
        state = start(CRITICAL).to(dtype)
        found = run(CRITICAL, score, state, rtol=0.05, atol=0.05, pace="sample")
        assert found.state.dtype == dtype
        expected = torch.float32 if dtype == torch.bfloat16 else dtype
        assert {t.dtype for t in score.times} == {expected}
        assert min(t.min() for t in score.times) == ends().to(expected)[1]

    @every_pace
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_errors_far_above_the_tolerance_do_not_overflow_half_precision(self, dtype, pace):
        score = GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(CRITICAL)
        z = CRITICAL.prior.sample((500, 1), generator=generator()).to(dtype)
        found = run(CRITICAL, score, z, rtol=1e-2, atol=1e-2, pace=pace)
        assert found.success
        # Standard errors of the mean, and two roundings to eight bits.
        error = standard_error(0.5, 500, number=5) + 2 * 2**-9
        assert float(found.data.float().mean()) == pytest.approx(0.3, abs=error)


@may_fail
class TestEnds:
    """A solve that cannot end stops soon, says why, and leaves a finite state."""

    @every_method
    def test_a_trial_step_out_of_the_domain_is_repeated_shorter(self, method):
        # As of a network in half precision, which has no number far from where samples are.
        sde, state = PROCESSES["VE"][0], torch.full((1, 1, 1), 10.0, dtype=torch.float64)
        # All stages of the first attempt but one are numbers.
        factors = [1.0, 1.0, 1.0, math.nan]

        def score(z, t):
            variance = (1 + (0.05 * 400**t) ** 2)[:, None, None]
            return -z / variance * (factors.pop(0) if factors else 1.0)

        found = run(sde, score, state, method=method)
        assert found.success
        variance = 1 + (0.05 * 400 ** ends()) ** 2
        # 100 steps of 1e-5 in units of 11 at most.
        expected = state * (variance[1] / variance[0]).sqrt()
        assert torch.allclose(found.state, expected, rtol=0, atol=1e-2)

    def test_a_jump_that_catches_the_path_ends(self):
        # The score points to zero from both sides: the path chatters about it.
        found = run(CRITICAL, lambda z, t: -30 * z[:, 1:].sign(), start(CRITICAL), max_nfev=3000)
        assert found.nfev <= 3000
        assert found.state.isfinite().all()
        assert found.success or "max_nfev" in found.message or "cannot be met" in found.message


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *[
                ({"method": x}, "method must be one of 'bosh3', 'dopri5', 'dopri8'")
                for x in ("rk4", "RK45", None)
            ],
            *[
                ({k: 0.0}, f"{k} must be finite and positive")
                for k in ("rtol", "atol", "first_step")
            ],
            ({"max_step": -1.0}, "max_step must be finite and positive"),
            *[({k: "1"}, f"{k} must be a real number") for k in ("rtol", "atol", "max_nfev")],
            ({"pace": "both"}, "pace must be one of 'batch', 'sample'; got 'both'"),
            ({"max_nfev": 0}, "max_nfev must be"),
        ],
        ids=str,
    )
    def test_bad_options_are_rejected(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            ProbabilityFlow(**options)

    @every_method
    def test_it_declares_its_order_and_evaluations(self, method):
        facts = ProbabilityFlow(method=method).facts
        assert (facts.nfe_per_step, facts.ode_order) == METHODS[method][1:]
        assert facts.weak_order is facts.strong_order is None
