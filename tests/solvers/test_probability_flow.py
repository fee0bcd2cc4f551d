"""`ProbabilityFlow`: its solution, tolerance and counts, samples on their own, and its ends."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, ReverseProcess
from cldsde.solvers import ProbabilityFlow, solve
from probes import Recording, generator, start
from references import cld, dense, hold, psld, ve, vp
from score import exact
from tolerances import standard_error

PROCESSES = {
    "VP": (VPSDE(), dense(vp())),
    "VE": (VESDE(0.05, 20.0), dense(ve(0.05, 20.0))),
    "CLD": (CLD(), dense(cld())),
    "PSLD": (PSLD(), dense(psld())),
    "HOLD": (HOLD(), dense(hold())),
}
CRITICAL, END = PROCESSES["CLD"][0], 1e-2
# Name in scipy, evaluations per attempt, order, and tolerances between which rates are measured.
METHODS = {
    "bosh3": ("RK23", 3, 3, (1e-4, 10**-6.5)),
    "dopri5": ("RK45", 6, 5, (1e-5, 1e-10)),
    "dopri8": ("DOP853", 12, 8, (1e-6, 1e-12)),
}
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


class Labelled:
    """A score under VE whose last data axis stands still and may hold the sample's number."""

    def __init__(self):
        self.sde = PROCESSES["VE"][0]
        self.inner = exact.mixture().score(self.sde)

    def __call__(self, z, t):
        return torch.cat([self.inner(z[..., :2], t), torch.zeros_like(z[..., :1])], dim=-1)

    def start(self, n):
        """Starts of different sizes, so that samples need different numbers of steps."""
        scale = torch.logspace(0, 2, n, dtype=torch.float64)[:, None, None]
        label = torch.arange(n, dtype=torch.float64)[:, None, None]
        return torch.cat([start(self.sde, (n, 2)) * scale, label], dim=-1)


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
    @pytest.mark.parametrize("name", ["VE", "CLD"])
    def test_errors_and_steps_follow_the_tolerance(self, name, method):
        sde, order, levels = PROCESSES[name][0], *METHODS[method][2:]
        state, errors, attempts = start(sde, (16, 2)), [], []
        for tolerance in levels:
            options = {"rtol": tolerance, "atol": tolerance, "pace": "sample"}
            found = run(sde, gaussian(sde), state, method=method, **options)
            errors.append(float((found.state - flown(name, state)[0]).square().mean().sqrt()))
            attempts.append(found.stats["attempts"])
        # The step length is that at which the estimate, of order p, meets the tolerance; the error
        # is proportional to it, so error ~ tolerance and steps ~ tolerance^(-1/p). Coarse runs take
        # as few as ten attempts, a third of them rejected or to find the first step:
        # log10(3/2) p / decades, 0.2 to 0.3.
        decades = math.log10(levels[0] / levels[1])
        assert 0.8 <= math.log10(errors[0] / errors[1]) / decades <= 1.2
        assert 0.65 <= order * math.log10(attempts[1] / attempts[0]) / decades <= 1.2

    @every_method
    @pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-3), (1e-7, 1e-4), (1e-4, 1e-7)])
    @pytest.mark.parametrize(
        ("name", "pace", "samples"), [("VE", "batch", 20), ("CLD", "sample", 1)]
    )
    def test_steps_are_those_of_scipy(self, name, method, rtol, atol, pace, samples):
        sde = PROCESSES[name][0]
        process = ReverseProcess(sde, exact.mixture().score(sde))
        state, (scipy_method, stages, *_) = start(sde, (samples, 2)), METHODS[method]

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


class TestSamples:
    """With ``pace="sample"`` each sample has step lengths of its own."""

    @every_method
    def test_evaluations_are_those_that_each_sample_saw(self, method):
        labelled, stages = Labelled(), METHODS[method][1]
        score, state = Recording(labelled), labelled.start(6)
        found = run(labelled.sde, score, state, method=method, pace="sample")
        seen = Counter(i for z in score.states for i in z[:, 0, 2].tolist())
        assert found.success
        assert found.stats["nfev"].tolist() == [seen[i] for i in range(6)]
        assert found.nfev == max(seen.values()) == score.calls
        assert len(set(seen.values())) > 1
        # Two at the start, then all stages but the first of each attempt.
        assert all((n - 2) % stages == 0 for n in seen.values())
        assert found.nfev == 2 + stages * found.stats["attempts"]
        # Samples that arrived leave the batch.
        sizes = [len(z) for z in score.states]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 6 > sizes[-1]
        assert torch.equal(found.state[:, 0, 2], state[:, 0, 2])


class TestBatch:
    """By default the whole batch has one step length."""

    @every_method
    def test_samples_share_their_evaluations_and_times(self, method):
        labelled, seen = Labelled(), []
        score, state = Recording(labelled), labelled.start(6)
        found = solve(
            ReverseProcess(labelled.sde, score),
            ProbabilityFlow(method=method),
            state,
            ends(),
            callback=lambda number, t, z: seen.append((t.shape, len(set(t.tolist())))),
        )
        assert found.success
        assert found.stats["nfev"].tolist() == [found.nfev] * 6
        assert found.nfev == score.calls == 2 + METHODS[method][1] * found.stats["attempts"]
        assert {z.shape for z in score.states} == {state.shape}
        assert all((t == t[0]).all() for t in score.times)
        assert set(seen) == {(torch.Size([6]), 1)}

    @may_fail
    def test_a_sample_that_fails_takes_the_others_with_it(self):
        labelled = Labelled()

        def score(z, t):
            return torch.where(z[..., 2:] == 0, math.nan, labelled(z, t))

        state = labelled.start(3)
        assert not run(labelled.sde, score, state).stats["success"].any()
        alone = run(labelled.sde, score, state, pace="sample")
        assert alone.stats["success"].tolist() == [False, True, True]


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

    @every_method
    def test_a_jump_in_time_is_passed(self, method):
        sde = PROCESSES["VE"][0]
        state = start(sde)
        found = run(
            sde,
            lambda z, t: -z * torch.where(t > 0.5, 0.01, 0.03)[:, None, None],
            state,
            method=method,
        )
        sigma = 0.05 * 400 ** torch.tensor([1.0, 0.5, END], dtype=torch.float64)
        passed = 0.01 * (sigma[0] ** 2 - sigma[1] ** 2) + 0.03 * (sigma[1] ** 2 - sigma[2] ** 2)
        assert found.success
        # A few hundred steps of 1e-5 in units of 1 + |z| < 50.
        expected = state * torch.exp(-0.5 * passed)
        assert torch.allclose(found.state, expected, rtol=0, atol=500 * 1e-5 * 50)

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
            *[({k: 0.0}, f"{k} must be finite and positive") for k in ("rtol", "atol")],
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
        assert (facts.nfe_per_step, facts.ode_order) == METHODS[method][1:3]
        assert facts.weak_order is facts.strong_order is None
