"""`TorchDiffEq`: torchdiffeq's methods follow the probability flow, and report their ends."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

from cldsde import CLD, HOLD, VESDE, VPSDE, GaussianMixture, ReverseProcess
from cldsde.solvers import BrownianPath, TorchDiffEq, as_torchdiffeq, root_times, solve
from probes import Recording, generator, start, untouchable
from references import cld, dense, hold, ve, vp
from tolerances import EPS

DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
PROCESSES = {
    "VP": (VPSDE(0.1, 8.0), dense(vp(0.1, 8.0))),
    "VE": (VESDE(0.1, 5.0), dense(ve(0.1, 5.0))),
    "CLD": (CLD(), dense(cld())),
    "HOLD": (HOLD(), dense(hold())),
}
CRITICAL, END = PROCESSES["CLD"][0], 0.05
GRID = root_times(1.0, END, 9)

# Stage times and coefficients as in textbooks, weights last; torchdiffeq's "rk4" is the 3/8 rule.
TABLEAUX = {
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun2": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "heun3": ([0, 1 / 3, 2 / 3], [[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "rk4": (
        [0, 1 / 3, 2 / 3, 1],
        [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    ),
}
# Orders, and tolerances with which each method takes some ten to a thousand steps.
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = {
    "dopri8": (8, 1e-7),
    "dopri5": (5, 1e-6),
    "bosh3": (3, 1e-5),
    "fehlberg2": (2, 1e-6),
    "adaptive_heun": (2, 1e-4),
}
# Rounding of two ways to a covariance, and of torchdiffeq's interpolant at a step's end.
ROUNDING = 1e-12

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_fixed = pytest.mark.parametrize("method", list(FIXED))
every_adaptive = pytest.mark.parametrize("method", list(ADAPTIVE))
every_method = pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def process_of(name):
    sde = PROCESSES[name][0]
    return ReverseProcess(sde, Recording(DATA.score(sde)))


def simple():
    """A process whose score costs little."""
    return ReverseProcess(CRITICAL, Recording(lambda z, t: -4 * z[:, 1:] - z[:, 1:].sin()))


def state_of(name="CLD", dtype=torch.float64):
    return start(PROCESSES[name][0], (4, 1), dtype)


def close(found, expected):
    assert (found - expected).abs().max() <= ROUNDING * (1 + expected.abs().max())


@functools.cache
def flown(name, end):
    """Where the flow takes `state_of` from time 1, and how often it lengthens errors on the way."""
    exact, z = PROCESSES[name][1], state_of(name).numpy()
    moves = exact.flow(1.0, *np.linspace(1.0, end, 50)[1:])
    expected = exact.mean(end)[:, None] + moves[-1] @ (z - exact.mean(1.0)[:, None])
    growth = np.linalg.norm(moves[-1] @ np.linalg.inv(moves), 2, axis=(1, 2)).max()
    return torch.from_numpy(expected), growth


def check_flow(found, name, end, steps, tolerance):
    """Compare with the flow: each step errs by the tolerance at most, which the flow lengthens.

    The tolerance is in units of 1 + |z|, a root mean square over all numbers of the batch.
    """
    z = state_of(name)
    expected, growth = flown(name, end)
    bound = steps * tolerance * (1 + z.abs().max()) * math.sqrt(z.numel()) * growth
    assert (found - expected).abs().max() <= bound < 0.5 * z.abs().max()


class TestFixedSteps:
    """Methods with fixed steps step through the grid that they are given."""

    @every_process
    @every_fixed
    def test_a_step_is_that_of_the_textbook(self, method, name):
        process, exact, calls = process_of(name), PROCESSES[name][1], []
        solver, state = TorchDiffEq(method=method), state_of(name)
        found = solve(
            process,
            solver,
            state,
            GRID,
            t_eval=GRID,
            callback=lambda step, t, z: calls.append((step, t, z.clone())),
        )
        c, a, b = TABLEAUX[method]
        z, states = state.numpy(), [state]
        for t, u in itertools.pairwise(GRID.numpy()):
            k = []
            for shift, row in zip(c, a, strict=True):
                at = z + (u - t) * sum(w * f for w, f in zip(row, k, strict=True))
                k.append(exact.velocity(t + shift * (u - t), at))
            z = z + (u - t) * sum(w * f for w, f in zip(b, k, strict=True))
            states.append(torch.from_numpy(z))
        close(found.y, torch.stack(states))
        assert torch.equal(found.y[-1], found.state)
        assert found.success
        assert found.nfev == process.score.calls == 9 * len(c)
        assert found.stats["steps"] == 9
        assert [call[:2] for call in calls] == list(enumerate(GRID.tolist()))[1:]
        assert torch.equal(torch.stack([z for _, _, z in calls]), found.y[1:])
        facts = solver.facts
        assert (facts.ode_order, facts.nfe_per_step) == (FIXED[method], len(c))
        assert facts.weak_order is facts.strong_order is None


class TestAdaptiveSteps:
    """Methods with adaptive steps follow the flow, to their tolerance."""

    @pytest.mark.parametrize("name", ["VE", "HOLD"])
    @every_adaptive
    def test_it_is_the_flow_of_gaussian_data(self, method, name):
        tolerance, wanted, calls = ADAPTIVE[method][1], (0.77, 0.5, 0.2), []
        solver = TorchDiffEq(method=method, rtol=tolerance, atol=tolerance)
        process = process_of(name)
        found = solve(
            process,
            solver,
            state_of(name),
            double(1.0, 0.2),
            t_eval=double(*wanted),
            callback=lambda step, t, z: calls.append((step, t, z.clone())),
        )
        assert found.success
        steps = found.stats["steps"]
        for t, y in zip(wanted, found.y, strict=True):
            check_flow(y, name, t, steps, tolerance)
            # torchdiffeq reads its interpolant at the end of the step onto a requested time.
            close(y, next(z for _, at, z in calls if at == t))
        assert torch.equal(found.state, found.y[-1])
        assert [step for step, _, _ in calls] == list(range(1, steps + 1))
        times = [1.0, *[t for _, t, _ in calls]]
        assert times == sorted(set(times), reverse=True)
        # Two evaluations at the start, then all stages but the first of each attempt.
        assert found.nfev == process.score.calls
        attempts, left = divmod(found.nfev - 2, solver.facts.nfe_per_step)
        assert left == 0
        assert attempts >= steps > 5
        assert found.stats["nfev"].tolist() == [found.nfev] * 4
        assert solver.facts.ode_order == ADAPTIVE[method][0]


def test_torchdiffeq_by_itself_leaves_the_interval():
    alone, within, ends = simple(), simple(), double(1.0, 0.3)
    tolerances = {"rtol": 1e-3, "atol": 1e-3}
    odeint(as_torchdiffeq(alone), state_of(), ends, method="dopri5", **tolerances)
    solve(within, TorchDiffEq(**tolerances), state_of(), ends)
    assert min(t.min() for t in alone.score.times) < 0.3 - 1e-3
    assert min(t.min() for t in within.score.times) >= 0.3


class TestCallback:
    @every_method
    def test_it_stops_the_solve_and_states_before_are_kept(self, method):
        seen, process = [], simple()

        def enough(step, t, z):
            seen.append(z.clone())
            return t <= GRID[4]

        solver = TorchDiffEq(method=method, rtol=1e-3, atol=1e-3)
        options = {"t_eval": GRID[[0, 2, 4, 9]]}
        found = solve(process, solver, state_of(), GRID, callback=enough, denoise=True, **options)
        assert (found.status, found.message) == (2, "stopped by the callback")
        assert found.nfev == process.score.calls
        assert found.stats["steps"] == len(seen)
        assert torch.equal(found.data, found.state[:, 0])
        every = solve(simple(), solver, state_of(), GRID, **options)
        assert torch.equal(found.t, every.t)
        assert torch.equal(found.y[0], state_of())
        close(found.y[1:3], every.y[1:3])
        close(found.state, seen[-1])
        assert torch.equal(found.state, found.y[2])
        assert found.y[3].isnan().all()

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_a_stop_at_the_end_is_no_stop(self, method):
        solver = TorchDiffEq(method=method)
        found = solve(simple(), solver, state_of(), GRID, callback=lambda n, t, z: t == END)
        assert (found.status, found.message) == (0, "reached the end of the interval")


@pytest.mark.filterwarnings("ignore:the solve failed")
class TestFailure:
    """A solve that cannot end is reported, without an exception."""

    @every_fixed
    def test_too_few_evaluations_for_the_grid(self, method):
        each = len(TABLEAUX[method][0])
        every = solve(simple(), TorchDiffEq(method=method), state_of(), GRID, t_eval=GRID)
        for most in (1, 5 * each, 5 * each + 1, 9 * each - 1, 9 * each):
            process, solver = simple(), TorchDiffEq(method=method, max_nfev=most)
            found = solve(process, solver, state_of(), GRID, t_eval=GRID)
            steps = most // each
            assert found.success == (steps == 9)
            assert found.success or f"max_nfev: {most}" in found.message
            assert found.nfev == process.score.calls == most
            assert found.stats["steps"] == steps
            assert torch.equal(found.data, found.state[:, 0])
            assert torch.equal(found.state, found.y[steps])
            assert torch.equal(found.y[: steps + 1], every.y[: steps + 1])
            assert found.y[steps + 1 :].isnan().all()

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_a_limit_between_two_numbers_is_the_lower_one(self, method):
        solver = TorchDiffEq(method=method, max_nfev=10.5)
        assert solve(simple(), solver, state_of(), GRID).nfev == 10

    @every_fixed
    @pytest.mark.parametrize("since", [1.0, 0.5])
    def test_a_score_that_is_not_finite_is_reported(self, method, since):
        def sick(z, t):
            return torch.where((t <= since)[:, None, None], math.nan, -4 * z[:, 1:])

        process, solver = ReverseProcess(CRITICAL, sick), TorchDiffEq(method=method)
        found = solve(process, solver, state_of(), GRID)
        assert found.status == 1
        assert "not finite" in found.message

    def test_torchdiffeq_s_own_limit_is_reported(self):
        solver = TorchDiffEq(options={"max_num_steps": 3})
        found = solve(simple(), solver, state_of(), double(1.0, END))
        assert found.status == 1
        assert "torchdiffeq failed: max_num_steps" in found.message
        assert found.state.isfinite().all()

    @pytest.mark.parametrize("error", [ValueError, AssertionError])
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_errors_of_the_score_are_raised(self, method, error):
        def score(z, t):
            raise error("mine")

        with pytest.raises(error, match="mine"):
            solve(ReverseProcess(CRITICAL, score), TorchDiffEq(method=method), state_of(), GRID)


def test_gradients_of_adaptive_steps_are_those_of_fine_steps():
    # torchdiffeq would differentiate its estimate of the first step.
    gradients, tolerance = [], 1e-6
    for solver in (TorchDiffEq(rtol=tolerance, atol=tolerance), TorchDiffEq(method="rk4")):
        strength, times = double(1.3).requires_grad_(), root_times(1.0, 0.5, 50)
        process = ReverseProcess(CRITICAL, lambda z, t, k=strength: -k * z[:, 1:] + z[:, :1].sin())
        found = solve(process, solver, start(CRITICAL, (1, 1)), times, differentiable=True)
        gradients += torch.autograd.grad(found.data.sum(), strength)
    # Some ten steps with a relative error of the tolerance, which the flow lengthens tenfold.
    assert gradients[0].item() == pytest.approx(gradients[1].item(), rel=100 * tolerance)
    assert gradients[1].abs() > 0.1


@every_fixed
def test_fixed_steps_are_evaluated_at_the_declared_times(method):
    score, solver = Recording(lambda z, t: -4 * z[:, 1:]), TorchDiffEq(method=method)
    process = ReverseProcess(CRITICAL, score)
    solve(process, solver, state_of(), GRID)
    found = torch.stack([t.flatten()[0] for t in score.times]).double()
    declared = solver.evaluation_times(process, GRID)
    torch.testing.assert_close(found, declared, rtol=0, atol=4 * EPS)


def test_with_gradients_the_first_step_is_a_thousandth_of_the_interval():
    score, times = Recording(lambda z, t: -4 * z[:, 1:]), torch.tensor([1.0, 0.5]).double()
    state = start(CRITICAL, (1, 1)).requires_grad_()
    solver = TorchDiffEq(method="dopri5")
    solve(ReverseProcess(CRITICAL, score), solver, state, times, differentiable=True)
    # The second stage of Dormand and Prince is after a fifth of the step.
    first_step = 5 * (1 - score.times[1].item())
    assert first_step == pytest.approx(0.5e-3, rel=1e4 * EPS)  # of a difference of times near 1


class TestRejected:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *[
                ({"method": x}, "method must be one of 'dopri8', 'dopri5'")
                for x in ("RK45", "scipy_solver", "explicit_adams", "Dopri5", None)
            ],
            *[({k: 0.0}, f"{k} must be finite and positive") for k in ("rtol", "atol")],
            *[({k: "1"}, f"{k} must be a real number") for k in ("rtol", "atol", "max_nfev")],
            ({"max_nfev": 0}, "max_nfev must be"),
            *[
                ({"options": {k: 0.1, "first_step": 0.1}}, f"must not set {k}, because")
                for k in ("step_t", "step_size", "grid_constructor", "dtype")
            ],
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            TorchDiffEq(**options)

    def test_solves_that_do_not_fit(self):
        process, state = ReverseProcess(CRITICAL, untouchable), state_of()
        path = BrownianPath(CRITICAL, GRID, (4, 1), generator=generator())
        with pytest.raises(ValueError, match="noise must not be a BrownianPath"):
            solve(process, TorchDiffEq(), state, GRID, noise=path)
        for t_eval in (double(1.1, 0.5), double(0.5, 0.01), double(0.5, 0.5)):
            with pytest.raises(ValueError, match="t_eval must"):
                solve(process, TorchDiffEq(), state, GRID, t_eval=t_eval)
        for t_eval in (double(0.9, 0.7), double(END + 1e-15)):
            with pytest.raises(ValueError, match="t_eval must be times of the grid"):
                solve(process, TorchDiffEq(method="rk4"), state, GRID, t_eval=t_eval)

    def test_fixed_steps_of_a_method_that_has_them(self):
        with pytest.raises(ValueError, match="method must be adaptive to take steps of one length"):
            TorchDiffEq(method="rk4").with_step(0.1)

    def test_equal_options_have_equal_hashes(self):
        one, same = (TorchDiffEq(options={"first_step": 1e-3}) for _ in range(2))
        assert {one: 1}[same] == 1
        assert one != TorchDiffEq()
