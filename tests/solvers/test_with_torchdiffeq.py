"""`TorchDiffEq`: torchdiffeq's methods follow the probability flow, and report their ends."""

import pytest
import torch

from cldsde import CLD, ReverseProcess
from cldsde.solvers import TorchDiffEq, root_times, solve
from gaussian_data import check_flow, reverse
from probes import Recording, noting, start, tensor
from tolerances import EPS, KERNEL

CRITICAL, END = CLD(), 0.05
GRID = root_times(1.0, END, 9)
STATE = start(CRITICAL, (4, 1))

# With these tolerances the errors of all steps add up to less than 5 % of the result.
ADAPTIVE = {"dopri8": 1e-7, "dopri5": 1e-6, "bosh3": 1e-4, "fehlberg2": 1e-5, "adaptive_heun": 2e-6}


def close(found, expected):
    # Two ways to a covariance, and torchdiffeq's interpolant at a step's end.
    assert (found - expected).abs().max() <= KERNEL * (1 + expected.abs().max())


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_fixed_steps_evaluate_the_score_at_the_declared_times(method):
    process, calls, solver = reverse("HOLD", Recording), [], TorchDiffEq(method=method)
    state = start(process.sde, (4, 1))
    found = solve(process, solver, state, GRID, t_eval=GRID, callback=noting(calls))
    declared = solver.evaluation_times(process, GRID)
    times = torch.cat(process.score.function.times)[::4]
    assert (times - declared).abs().max() <= 4 * EPS
    assert found.nfev == len(declared) == 9 * solver.facts.nfe_per_step
    assert [call[:2] for call in calls] == list(enumerate(GRID.tolist()))[1:]
    assert torch.equal(torch.stack([z for _, _, z in calls]), found.y[1:])


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("name", "method"), [("VE", x) for x in ADAPTIVE] + [("HOLD", "dopri5")])
def test_adaptive_steps_follow_the_flow_of_gaussian_data(method, name):
    tolerance, wanted, calls = ADAPTIVE[method], (0.77, 0.5, 0.2), []
    solver = TorchDiffEq(method=method, rtol=tolerance, atol=tolerance)
    process = reverse(name, Recording)
    state = start(process.sde, (4, 1))
    ends, t_eval = tensor([1.0, 0.2]), tensor(wanted)
    found = solve(process, solver, state, ends, t_eval=t_eval, callback=noting(calls))
    steps = found.stats["steps"]
    for t, y in zip(wanted, found.y, strict=True):
        check_flow(y, state, name, t, steps, tolerance)
        # torchdiffeq reads its interpolant at the end of the step onto a requested time.
        close(y, next(z for _, at, z in calls if at == t))
    assert [step for step, _, _ in calls] == list(range(1, steps + 1))
    times = [1.0, *[t for _, t, _ in calls]]
    assert times == sorted(set(times), reverse=True)
    # Two evaluations at the start, then all stages but the first of each attempt.
    assert found.nfev == process.score.function.calls
    attempts, left = divmod(found.nfev - 2, solver.facts.nfe_per_step)
    assert left == 0
    assert attempts >= steps > 5


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_callback_stops_the_solve_and_states_before_are_kept(method):
    seen, process = [], ReverseProcess(CRITICAL, Recording(lambda z, t: -4 * z[:, 1:]))

    def enough(step, t, z):
        seen.append(z.clone())
        return t <= GRID[4]

    solver = TorchDiffEq(method=method, rtol=1e-3, atol=1e-3)
    options = {"t_eval": GRID[[0, 2, 4, 9]], "denoise": True}
    found = solve(process, solver, STATE, GRID, callback=enough, **options)
    assert (found.status, found.message) == (2, "stopped by the callback")
    assert found.nfev == process.score.function.calls
    assert found.stats["steps"] == len(seen)
    every = solve(process, solver, STATE, GRID, **options)
    close(found.y[:3], every.y[:3])
    close(found.state, seen[-1])
    assert torch.equal(found.data, found.y[2][:, 0])
    assert found.y[3].isnan().all()
    last = solve(process, solver, STATE, GRID, callback=lambda n, t, z: t == END)
    assert last.status == 0


def test_gradients_of_adaptive_steps_are_those_of_fine_steps():
    # torchdiffeq would differentiate its estimate of the first step.
    gradients, tolerance = [], 1e-6
    for solver in (TorchDiffEq(rtol=tolerance, atol=tolerance), TorchDiffEq(method="rk4")):
        strength, times = tensor(1.3).requires_grad_(), root_times(1.0, 0.5, 50)
        score = Recording(lambda z, t, k=strength: -k * z[:, 1:] + z[:, :1].sin())
        process, state = ReverseProcess(CRITICAL, score), start(CRITICAL, (1, 1))
        found = solve(process, solver, state, times, differentiable=True)
        gradients += torch.autograd.grad(found.data.sum(), strength)
        if solver.facts.adaptive:
            # A thousandth of the interval; Dormand and Prince's second stage is at a fifth of it.
            first = 5 * (1 - score.times[1].item())
            assert first == pytest.approx(0.5e-3, rel=1e4 * EPS, abs=0)
    # Some ten steps with a relative error of the tolerance, which the flow lengthens tenfold.
    assert gradients[0].item() == pytest.approx(gradients[1].item(), rel=100 * tolerance, abs=0)
    assert gradients[1].abs() > 0.1
