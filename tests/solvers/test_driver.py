"""`solve` along the way: times that are kept, callbacks, samples that fail, gradients, tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cldsde import CLD, PSLD, VPSDE, GaussianMixture, LinearSDE, ReverseProcess, solvers
from cldsde.solvers import Langevin, PredictorCorrector, SampleNoise
from cldsde.solvers.authoring import GridSolver, Memory, Solver
from cldsde.validation import propagate_moments
from probes import Recording, generator, initial, start, untouchable

MULTISTEP = solvers.ExponentialMultistep
SOLVERS: dict[str, GridSolver] = {
    "EM": solvers.EulerMaruyama(),
    "Heun": solvers.StochasticHeun(),
    "exponential Euler": solvers.ExponentialEuler(),
    "SSCS, euler": solvers.SSCS(),
    "SSCS, midpoint": solvers.SSCS(score_step="midpoint"),
    "SSCS, gaussian": solvers.SSCS(score_step="gaussian", data_variance=0.5),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "ancestral": solvers.Ancestral(),
    "multistep, 1": MULTISTEP(order=1),
    "multistep, 2": MULTISTEP(order=2),
    "multistep, 3": MULTISTEP(order=3),
    "multistep, 2, stochastic": MULTISTEP(order=2, stochasticity=1.0),
    "multistep, 3, stochastic": MULTISTEP(order=3, stochasticity=0.5),
    "multistep, 1, corrector": MULTISTEP(order=1, corrector=True),
    "multistep, 2, corrector": MULTISTEP(order=2, corrector=True, stochasticity=0.5),
    "multistep, noise": MULTISTEP(order=2, prediction="noise"),
    "PC": PredictorCorrector(solvers.ReverseDiffusion(), Langevin(steps=2)),
    "splitting": solvers.Splitting(),
    "EDM": solvers.EDMHeun(),
    "EDM, churn": solvers.EDMHeun(churn=1.0),
    "torchsde, euler": solvers.TorchSDE(),
    "torchsde, srk": solvers.TorchSDE(method="srk"),
    "torchsde, heun": solvers.TorchSDE(method="heun"),
    "torchsde, midpoint": solvers.TorchSDE(method="midpoint"),
}
ADAPTIVE: dict[str, Solver] = {
    "flow": solvers.ProbabilityFlow(rtol=1e-7, atol=1e-7, pace="sample"),
    "GGF": solvers.GottaGoFast(rtol=0.05, atol=0.02),
}
SEEDS = [3, 1, 4, 15, 9, 2]
GRID = solvers.root_times(1.0, 0.1, 5)
ENDS = torch.tensor([1.0, 0.1], dtype=torch.float64)

every_solver = pytest.mark.parametrize("method", list(SOLVERS))
every_adaptive = pytest.mark.parametrize("method", list(ADAPTIVE))


@pytest.mark.parametrize("method", [*SOLVERS, *ADAPTIVE, "flow, one pace", "torchdiffeq"])
def test_the_precision_of_networks_is_not_that_of_solvers(method: str) -> None:
    """Autocast is for what the score computes."""
    more = {
        "flow, one pace": solvers.ProbabilityFlow(rtol=1e-5, atol=1e-5, pace="batch"),
        "torchdiffeq": solvers.TorchDiffEq(rtol=1e-4, atol=1e-4),
    }
    solver = {**SOLVERS, **ADAPTIVE, **more}[method]
    sde = CLD() if method == "splitting" else VPSDE()
    data = GaussianMixture([1.0], [[0.3, -0.2]], [[[0.25, 0.1], [0.1, 0.16]]])
    process = ReverseProcess(sde, data.score(sde))
    z = sde.prior.sample((8, 2), generator=generator())
    times = ENDS if solver.facts.adaptive else GRID
    found = []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            noise = generator()
            found.append(solvers.solve(process, solver, z, times, generator=noise, denoise=True))
    assert torch.equal(found[0].data, found[1].data)
    assert found[0].nfev == found[1].nfev


@pytest.mark.parametrize("method", ["EM", "SSCS, euler", "flow", "flow, one pace", "GGF"])
def test_callbacks_see_states_in_one_piece(method: str) -> None:
    more = {"flow, one pace": solvers.ProbabilityFlow(rtol=1e-3, atol=1e-3, pace="batch")}
    solver = {**SOLVERS, **ADAPTIVE, **more}[method]
    sde = CLD()
    process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    z = sde.prior.sample((5, 1), generator=generator())
    seen = []

    def watch(step: int, t: object, z: torch.Tensor) -> None:
        seen.append(z.view(5, 2).clone())

    times = ENDS if solver.facts.adaptive else GRID
    last = solvers.solve(process, solver, z, times, generator=generator(), callback=watch).state
    assert torch.equal(seen[-1], last.view(5, 2))


class Nonlinear(nn.Module):
    """A score that is smooth, acts on each number alone and has a parameter."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.driven = list(sde.driven)
        # About that of the prior, so that states stay of its size.
        variance = float(sde.prior.covariance[self.driven[0], self.driven[0]])
        self.slope = nn.Parameter(torch.tensor(1.1 / variance, dtype=torch.float64))

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at = t.reshape(-1, *(1,) * (z.ndim - 1))
        pull = self.slope * z[:, self.driven] + 0.3 * torch.tanh(z[:, :1])
        return -(1 + 0.5 * at) * pull


def process_of(method: str) -> ReverseProcess:
    sde: LinearSDE = VPSDE(0.5, 5.0) if method.startswith("EDM") else CLD(1.0)
    return ReverseProcess(sde, Nonlinear(sde))


def run(method: str, state: torch.Tensor, times: torch.Tensor, **options: Any) -> Any:
    """A solve of few samples, the noise of each its own."""
    process = options.pop("process", None) or process_of(method)
    solver = options.pop("solver", None) or {**SOLVERS, **ADAPTIVE}[method]
    options = {"noise": SampleNoise(SEEDS[: len(state)]), **options}
    return solvers.solve(process, solver, state, times, **options)


def failed(*args: Any, **options: Any) -> Any:
    """A solve that fails, and says so."""
    with pytest.warns(solvers.SolveWarning, match="the solve failed"):
        return run(*args, **options)


def state_of(method: str, samples: int = 3) -> torch.Tensor:
    return start(process_of(method).sde, (samples, 2))


class TestTrajectories:
    """States at the times that are asked for."""

    # How much noise is put back by churning depends on the number of steps.
    @pytest.mark.parametrize("method", [name for name in SOLVERS if name != "EDM, churn"])
    def test_they_are_those_of_solves_that_end_there(self, method: str) -> None:
        state = state_of(method)
        solution = run(method, state, GRID, t_eval=GRID[1:])
        assert solution.success
        assert torch.equal(solution.t, GRID[1:])
        solver = SOLVERS[method]
        if isinstance(solver, solvers.SSCS):
            solver = solver.on_grid()
        for i, y in enumerate(solution.y):
            shorter = run(method, state, GRID[: i + 2], solver=solver)
            # Tables of a part of the grid differ by rounding.
            assert torch.allclose(y, shorter.state, rtol=0, atol=1e-10)
        assert torch.equal(solution.y[-1], solution.state)

    @every_solver
    def test_keeping_them_changes_no_bit(self, method: str) -> None:
        state = state_of(method)
        solver = SOLVERS[method]
        if isinstance(solver, solvers.SSCS):
            solver = solver.on_grid()
        plain = run(method, state, GRID, solver=solver)
        kept = run(method, state, GRID, solver=solver, t_eval=GRID[::2])
        assert torch.equal(kept.state, plain.state)
        assert kept.nfev == plain.nfev

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "flow", "GGF"])
    def test_without_times_the_last_one_is_kept(self, method: str) -> None:
        solution = run(method, state_of(method), GRID)
        assert torch.equal(solution.t, GRID[-1:])
        assert solution.t.dtype == torch.float64
        assert solution.y.shape == (1, 3, 2, 2)
        assert torch.equal(solution.y[0], solution.state)

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "flow", "GGF"])
    @pytest.mark.parametrize(
        "chosen", [[0, 1, 2, 3, 4, 5], [0], [5], [0, 5], [2, 3], [0, 4], [1]], ids=str
    )
    def test_the_start_may_be_among_them_and_the_end_not(
        self, method: str, chosen: list[int]
    ) -> None:
        state = state_of(method)
        times = GRID[chosen]
        solution = run(method, state, GRID, t_eval=times)
        assert solution.success
        assert torch.equal(solution.t, times)
        assert solution.y.shape == (len(chosen), *state.shape)
        assert solution.y.isfinite().all()
        if 0 in chosen:
            assert torch.equal(solution.y[0], state)
        assert torch.equal(solution.y[-1], solution.state) == (5 in chosen)
        if method != "GGF":
            # The solve goes on to the end; GGF's paths are others where its steps are. The end
            # alone is what a solve without times keeps, and lets SSCS merge its moves.
            every = run(method, state, GRID, t_eval=None if chosen == [5] else GRID)
            assert torch.allclose(solution.state, every.state, rtol=0, atol=1e-4)

    def test_times_of_single_precision_are_those_of_a_grid_of_it(self) -> None:
        grid = GRID.float()
        solution = run("EM", state_of("EM"), grid, t_eval=grid[2:])
        assert torch.equal(solution.t, grid[2:].double())

    @pytest.mark.parametrize("method", ["EM", "flow"])
    def test_the_start_that_is_kept_is_a_copy(self, method: str) -> None:
        state = state_of(method)
        solution = run(method, state, GRID, t_eval=GRID)
        before = solution.y[0].clone()
        state.zero_()
        assert torch.equal(solution.y[0], before)

    @pytest.mark.parametrize("stops", [(0.5,), (0.83, 0.5, 0.2), (1.0, 0.7), (0.1000001, 0.1)])
    def test_the_flow_has_the_states_of_solves_that_end_there(
        self, stops: tuple[float, ...]
    ) -> None:
        state, times = state_of("flow"), torch.tensor(stops, dtype=torch.float64)
        solution = run("flow", state, ENDS, t_eval=times)
        assert torch.equal(solution.t, times)
        for t, y in zip(stops, solution.y, strict=True):
            if t == 1.0:
                assert torch.equal(y, state)
                continue
            shorter = run("flow", state, torch.tensor([1.0, t], dtype=torch.float64))
            # Some tens of steps, each with an error of the tolerance.
            assert torch.allclose(y, shorter.state, rtol=1e-5, atol=1e-5)

    def test_steps_before_the_first_stop_are_those_of_a_solve_that_ends_there(self) -> None:
        state, stop = state_of("GGF", 6), 0.437
        times = torch.tensor([stop, 0.2], dtype=torch.float64)
        solution = run("GGF", state, ENDS, t_eval=times)
        shorter = run("GGF", state, torch.tensor([1.0, stop], dtype=torch.float64))
        # Samples that arrive leave the batch of one, and go on in that of the other: the score
        # acts on each number alone, so that at most the coefficients of their times are rounded.
        assert torch.allclose(solution.y[0], shorter.state, rtol=0, atol=1e-9)
        assert not torch.allclose(solution.y[1], shorter.state, rtol=0, atol=1e-2)

    @every_adaptive
    def test_a_stop_does_not_shorten_the_steps_after_it(self, method: str) -> None:
        # In pairs, so that the second of each cuts a step to a length of 1e-6.
        n, pairs = 64, torch.tensor([0.85, 0.7, 0.55, 0.4, 0.25], dtype=torch.float64)
        stops = torch.stack([pairs, pairs - 1e-6], dim=1).flatten()
        solver = {
            "flow": solvers.ProbabilityFlow(rtol=1e-4, atol=1e-4, pace="sample"),
            "GGF": solvers.GottaGoFast(rtol=0.02, atol=0.01),
        }[method]
        state, noise = state_of(method, n), [SampleNoise(range(n)) for _ in range(2)]
        plain = run(method, state, ENDS, solver=solver, noise=noise[0]).stats["nfev"]
        found = run(method, state, ENDS, solver=solver, noise=noise[1], t_eval=stops).stats["nfev"]
        more = (found - plain).double() / solver.facts.nfe_per_step
        # A stop costs the attempt that it cuts, and two more ends are rejected, say. GGF's paths
        # are others then, with some attempts more or less: 4 standard errors.
        room = 4 * float(more.std()) / math.sqrt(n) if method == "GGF" else 0.0
        assert more.mean() <= len(stops) + 2 + room
        assert more.mean() + room > 0

    def test_ggf_keeps_its_law(self) -> None:
        sde, n = VPSDE(0.5, 5.0), 4000
        data = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
        process = ReverseProcess(sde, data.score(sde))
        law = sde.marginal(1.0, initial(sde))
        noise = torch.randn(n, 1, 1, generator=generator(1), dtype=torch.float64)
        state = law.mean[0, 0] * 0.3 + law.covariance.sqrt() * noise
        stops = torch.tensor([0.8, 0.6, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        solver = solvers.GottaGoFast(rtol=0.01, atol=0.002)
        solution = solvers.solve(process, solver, state, ENDS, t_eval=stops, generator=generator(2))
        assert solution.success
        for t, y in zip(stops.tolist(), solution.y, strict=True):
            law = sde.marginal(t, initial(sde))
            white = (y.flatten() - 0.3 * law.mean[0, 0]) / law.covariance.sqrt().flatten()
            # Five standard errors, and as much for the bias of the steps.
            assert abs(float(white.mean())) <= 5 / math.sqrt(n) + 0.02
            assert abs(float(white.var()) - 1) <= 5 * math.sqrt(2 / n) + 0.02


class TestUnmerged:
    """SSCS where its state is wanted at each grid time."""

    SDE = CLD()
    DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    OPTIONS = (
        {"score_step": "euler"},
        {"score_step": "midpoint"},
        {"score_step": "gaussian", "data_variance": 0.25},
    )

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        law = self.SDE.marginal(1.0, initial(self.SDE))
        return 0.3 * law.mean[:, :1], law.covariance

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_the_law_at_the_end_is_that_of_merged_steps(self, options: Any) -> None:
        process = ReverseProcess(self.SDE, self.DATA.score(self.SDE))
        grid = solvers.quadratic_times(1.0, 0.02, 20)
        merged, apart = (
            propagate_moments(process, solvers.SSCS(merge=merge, **options), grid, *self.start())
            for merge in (True, False)
        )
        for one, other in zip(merged, apart, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("wanted", ["t_eval", "callback"])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_the_law_at_each_time_is_that_of_a_solve_to_there(
        self, options: Any, wanted: str
    ) -> None:
        # The solve is affine in the noise: unit vectors give its exact covariance.
        process = ReverseProcess(self.SDE, self.DATA.score(self.SDE))
        n, (mean, covariance) = len(GRID) - 1, self.start()
        k, units = 2, 2 * n * 2
        state = torch.zeros(1 + k + units, k, 1, dtype=torch.float64)
        state[:] = mean
        state[1 : 1 + k, :, 0] += torch.linalg.cholesky(covariance).mT
        draws = torch.zeros(2 * n, len(state), k, 1, dtype=torch.float64)
        for i in range(units):
            draws[i // k, 1 + k + i, i % k] = 1.0
        seen: list[torch.Tensor] = []
        extra: dict[str, Any] = {"t_eval": GRID[1:]}
        if wanted == "callback":
            extra = {"callback": lambda step, t, z: seen.append(z)}
        solution = solvers.solve(
            process,
            solvers.SSCS(**options),
            state,
            GRID,
            noise=solvers.RecordedNoise(list(draws)),
            **extra,
        )
        states = solution.y if wanted == "t_eval" else torch.stack(seen)
        assert len(states) == n
        for i, y in enumerate(states[..., 0]):
            grid = GRID[: i + 2]
            m, C = propagate_moments(process, solvers.SSCS(**options), grid, mean, covariance)
            difference = y[1:] - y[0]
            # A difference of two states, each rounded.
            assert torch.allclose(y[:1].mT, m, rtol=0, atol=1e-12)
            assert torch.allclose(difference.mT @ difference, C, rtol=0, atol=1e-12)

    def test_the_laws_between_converge_to_the_marginals(self) -> None:
        process = ReverseProcess(self.SDE, self.DATA.score(self.SDE))
        errors = []
        for n in (40, 80):
            grid = solvers.quadratic_times(1.0, 0.05, n)
            worst = 0.0
            for stop in (n // 4, n // 2, n):
                law = self.SDE.marginal(grid[stop], initial(self.SDE))
                solver = solvers.SSCS(score_step="midpoint", merge=False)
                m, C = propagate_moments(process, solver, grid[: stop + 1], *self.start())
                worst = max(worst, float((C - law.covariance).abs().max()))
                assert (m - 0.3 * law.mean[:, :1]).abs().max() < 5e-3
            errors.append(worst)
        # Of second order.
        assert errors[1] < 5e-3
        assert errors[0] / errors[1] > 3

    def test_merged_states_belong_to_no_grid_time_and_unmerged_ones_do(self) -> None:
        assert not solvers.SSCS().facts.state_on_grid
        assert solvers.SSCS(merge=False).facts.state_on_grid
        with pytest.raises(ValueError, match="state at each grid time"):
            PredictorCorrector(solvers.SSCS(), Langevin())
        solver = PredictorCorrector(solvers.SSCS(merge=False), Langevin(snr=0.05))
        process = ReverseProcess(self.SDE, self.DATA.score(self.SDE))
        z = start(self.SDE, (3, 1))
        solution = solvers.solve(process, solver, z, GRID, generator=generator())
        assert solution.success
        assert solution.nfev == 2 * (len(GRID) - 1)


class TestStates:
    """A state that a score has seen is not written to."""

    @pytest.mark.parametrize("method", [*SOLVERS, *ADAPTIVE])
    def test_a_score_may_keep_the_states_that_it_is_given(self, method: str) -> None:
        process, seen = process_of(method), []
        inner = process.score

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append((z, z.clone()))
            return inner(z, t)

        run(method, state_of(method), GRID, process=ReverseProcess(process.sde, score))
        assert seen
        assert all(torch.equal(kept, then) for kept, then in seen)


class TestCallbacks:
    """What they are called with, and how they stop a solve."""

    @pytest.mark.parametrize("method", ["EM", "SSCS, midpoint", "PC", "multistep, 2"])
    def test_they_see_each_step_in_order(self, method: str) -> None:
        calls: list[Any] = []
        solution = run(
            method, state_of(method), GRID, t_eval=GRID[1:], callback=lambda *x: calls.append(x)
        )
        assert solution.success
        assert [step for step, _, _ in calls] == [1, 2, 3, 4, 5]
        assert [t for _, t, _ in calls] == GRID[1:].tolist()
        assert all(type(t) is float for _, t, _ in calls)
        assert torch.equal(torch.stack([z for _, _, z in calls]), solution.y)

    @every_adaptive
    def test_with_a_time_for_each_sample_they_see_all_of_them(self, method: str) -> None:
        calls: list[Any] = []

        def callback(step: int, t: torch.Tensor, z: torch.Tensor) -> None:
            calls.append((step, t.clone(), z.clone()))

        state = state_of(method, 6)
        solution = run(method, state, ENDS, callback=callback)
        plain = run(method, state, ENDS)
        assert torch.equal(solution.state, plain.state)
        assert [step for step, _, _ in calls] == list(range(1, solution.stats["attempts"] + 1))
        times = torch.stack([torch.ones(6), *[t for _, t, _ in calls]])
        assert times.shape == (len(calls) + 1, 6)
        assert (times.diff(dim=0) <= 0).all()
        assert (times[-1] == 0.1).all()
        # A sample's state changes where its time does.
        states = torch.stack([state, *[z for _, _, z in calls]])
        assert states.shape == (len(calls) + 1, *state.shape)
        moved = (states.diff(dim=0) != 0).flatten(2).any(2)
        assert torch.equal(moved, times.diff(dim=0) < 0)
        assert torch.equal(states[-1], solution.state)

    @pytest.mark.parametrize("method", ["EM", "Heun", "SSCS, euler", "multistep, 2"])
    @pytest.mark.parametrize("denoise", [False, True])
    def test_true_stops_at_once(self, method: str, denoise: bool) -> None:
        state = state_of(method)
        score = Recording(process_of(method).score)
        process = ReverseProcess(process_of(method).sde, score)
        times = GRID[[0, 2, 3, 5]]
        solution = run(
            method,
            state,
            GRID,
            process=process,
            t_eval=times,
            denoise=denoise,
            callback=lambda step, t, z: step == 3,
        )
        assert not solution.success
        assert solution.status == 2
        assert solution.message == "stopped by the callback after 3 steps"
        assert solution.nfev == score.calls == 3 * SOLVERS[method].facts.nfe_per_step
        assert solution.stats["steps"] == 3
        assert not solution.stats["success"].any()
        assert solution.stats["success"].shape == (3,)
        # States that were not reached are NaN.
        assert torch.equal(solution.t, times)
        every = run(method, state, GRID, t_eval=times)
        assert torch.equal(solution.y[:3], every.y[:3])
        assert solution.y[3].isnan().all()
        assert torch.equal(solution.state, every.y[2])
        assert torch.equal(solution.data, solution.state[:, 0])

    @every_adaptive
    @pytest.mark.parametrize("denoise", [False, "step"])
    def test_true_stops_samples_at_times_of_their_own(self, method: str, denoise: Any) -> None:
        last: list[Any] = []

        def callback(step: int, t: torch.Tensor, z: torch.Tensor) -> bool:
            last[:] = [t.clone(), z.clone()]
            return step == 3

        score = Recording(process_of(method).score)
        process = ReverseProcess(process_of(method).sde, score)
        solution = run(
            method,
            state_of(method),
            ENDS,
            process=process,
            callback=callback,
            denoise=denoise,
            t_eval=torch.tensor([1.0, 0.15], dtype=torch.float64),
        )
        assert (last[0] > 0.15).all()
        assert not solution.success
        assert solution.status == 2
        assert solution.message == "stopped by the callback"
        assert not solution.stats["success"].any()
        assert solution.stats["attempts"] == 3
        assert solution.nfev == score.calls
        assert torch.equal(solution.state, last[1])
        assert torch.equal(solution.data, solution.state[:, 0])
        assert solution.y[0].isfinite().all()
        assert solution.y[1].isnan().all()

    @pytest.mark.parametrize("method", ["EM", "flow"])
    @pytest.mark.parametrize("value", [None, False, 0])
    def test_anything_else_does_not(self, method: str, value: Any) -> None:
        solution = run(method, state_of(method), GRID, callback=lambda *x: value)
        assert solution.success
        assert solution.status == 0

    def test_after_the_last_step_there_is_nothing_to_stop(self) -> None:
        solution = run("EM", state_of("EM"), GRID, callback=lambda step, t, z: step == 5)
        assert solution.success
        assert solution.stats["success"].all()
        assert solution.message == "reached the end of the grid"

    @every_adaptive
    def test_so_it_is_where_each_sample_has_its_time(self, method: str) -> None:
        solution = run(
            method, state_of(method), ENDS, callback=lambda step, t, z: bool((t <= 0.1).all())
        )
        assert solution.stats["success"].all()
        assert solution.success
        assert solution.status == 0
        assert solution.message == "reached the end of the interval"
        assert torch.equal(solution.y[0], solution.state)

    @every_adaptive
    def test_samples_that_have_arrived_before_have_arrived(self, method: str) -> None:
        solution = run(
            method, state_of(method, 6), ENDS, callback=lambda step, t, z: bool((t <= 0.1).any())
        )
        success = solution.stats["success"]
        assert solution.status == 2
        assert 0 < int(success.sum()) < 6
        assert torch.equal(solution.y[0, success], solution.state[success])
        assert solution.y[0, ~success].isnan().all()

    @pytest.mark.parametrize("method", ["EM", "flow"])
    def test_what_cannot_be_called_is_refused(self, method: str) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match="callback must be callable"):
            run(method, state_of(method), GRID, process=process, callback=3)

    @pytest.mark.parametrize("method", ["EM", "flow"])
    def test_their_errors_are_raised(self, method: str) -> None:
        def callback(step: int, t: Any, z: torch.Tensor) -> None:
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            run(method, state_of(method), GRID, callback=callback)


class TestLastStep:
    """``denoise="step"``: an Euler step to time 0 without its noise."""

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "flow", "GGF"])
    @pytest.mark.parametrize("make", [lambda: VPSDE(0.5, 5.0), CLD, PSLD])
    def test_it_is_that_step(self, method: str, make: Callable[[], LinearSDE]) -> None:
        sde = make()
        score = Recording(Nonlinear(sde))
        process = ReverseProcess(sde, score)
        state = start(sde, (3, 2))
        plain = run(method, state, GRID, process=process)
        calls = score.calls
        solution = run(method, state, GRID, process=process, denoise="step")
        assert torch.equal(solution.state, plain.state)
        assert solution.nfev == plain.nfev + 1
        assert score.calls == 2 * calls + 1
        assert (score.times[-1] == 0.1).all()
        z, t = solution.state, 0.1
        pull = score.score(z, torch.full((3,), t, dtype=torch.float64))
        F, G = sde.drift(t), sde.diffusion(t)
        driven = torch.zeros_like(z)
        driven[:, list(sde.driven)] = pull.detach()
        drift = torch.einsum("ij,bjd->bid", F, z) - torch.einsum("ij,bjd->bid", G @ G.mT, driven)
        assert torch.allclose(solution.data, (z - t * drift)[:, 0], rtol=0, atol=1e-12)

    def test_each_sample_counts_it(self) -> None:
        plain, more = (run("GGF", state_of("GGF"), ENDS, denoise=x) for x in (False, "step"))
        assert torch.equal(more.stats["nfev"], plain.stats["nfev"] + 1)

    @pytest.mark.parametrize("method", ["EM", "flow", "GGF"])
    @pytest.mark.parametrize("denoise", [True, "step"])
    def test_there_is_none_from_time_zero(self, method: str, denoise: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        times = solvers.uniform_times(1.0, 0.0, 4)
        with pytest.raises(ValueError, match="times must end above 0"):
            run(method, state_of(method), times, process=process, denoise=denoise)

    @pytest.mark.parametrize("value", ["full", "", "True", 1, 0, None, 1.0, torch.tensor(True)])
    @pytest.mark.parametrize("method", ["EM", "flow"])
    def test_other_ways_are_refused(self, method: str, value: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(ValueError, match="denoise must be True, False or 'step'"):
            run(method, state_of(method), GRID, process=process, denoise=value)


class TestRefusals:
    """Times that cannot be kept, before any evaluation."""

    @pytest.mark.parametrize(
        "t_eval",
        [
            torch.tensor([]),
            torch.tensor(0.5),
            torch.tensor([[0.5]]),
            torch.tensor([0.5, 0.5]),
            torch.tensor([1.0, math.nan]),
            torch.tensor([math.nan]),
            torch.tensor([0.1, 1.0], dtype=torch.float64),
            torch.tensor([1.0, 0.05]),
            torch.tensor([1.5]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "flow", "GGF"])
    def test_what_are_no_times(self, method: str, t_eval: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(ValueError, match="t_eval must"):
            run(method, state_of(method), GRID, process=process, t_eval=t_eval)

    @pytest.mark.parametrize(
        "t_eval", [[0.5, 0.1], (0.5,), 0.5, "all", True, GRID.numpy()], ids=str
    )
    @pytest.mark.parametrize("method", ["EM", "flow"])
    def test_what_is_no_tensor(self, method: str, t_eval: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match="t_eval must be a tensor"):
            run(method, state_of(method), GRID, process=process, t_eval=t_eval)

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "EDM"])
    @pytest.mark.parametrize("shift", [1e-15, 1e-3])
    def test_times_between_those_of_a_grid(self, method: str, shift: float) -> None:
        process = ReverseProcess(process_of(method).sde, untouchable)
        times = GRID[1:4].clone()
        times[1] += shift
        with pytest.raises(ValueError, match="t_eval must be times of the grid"):
            run(method, state_of(method), GRID, process=process, t_eval=times)


class Failing(Nonlinear):
    """No score of samples with a number beyond 100."""

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        lost = (z.abs() > 100).flatten(1).any(1)
        value = super().forward(z, t)
        return torch.where(lost.reshape(-1, *(1,) * (z.ndim - 1)), math.nan, value)


def failing() -> ReverseProcess:
    sde = CLD(1.0)
    return ReverseProcess(sde, Failing(sde))


class TestFailures:
    """Samples that fail do so alone."""

    @pytest.mark.parametrize("denoise", [False, True, "step"])
    @every_adaptive
    def test_others_are_what_they_are_without_it(self, method: str, denoise: Any) -> None:
        process = failing()
        state = state_of(method, 4)
        state[1] = 1e6
        others, seeds = [0, 2, 3], SEEDS[:4]
        times = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64)
        options: dict[str, Any] = {"process": process, "t_eval": times, "denoise": denoise}
        solution = failed(method, state, ENDS, noise=SampleNoise(seeds), **options)
        alone = run(
            method, state[others], ENDS, noise=SampleNoise([seeds[i] for i in others]), **options
        )
        assert alone.success
        assert not solution.success
        assert solution.status == 1
        assert solution.stats["success"].tolist() == [True, False, True, True]
        assert "1 of 4 samples" in solution.message
        assert "step length underflowed" in solution.message
        # For the flow but for rounding; GGF's lengths have ten bits, and rounding stays rounding.
        for found, expected in (
            (solution.state[others], alone.state),
            (solution.data[others], alone.data),
            (solution.y[:, others], alone.y),
        ):
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)
            assert found.isfinite().all()
        assert torch.equal(solution.stats["nfev"][others], alone.stats["nfev"])
        # It stays where it failed, and came to no time after the start.
        assert torch.equal(solution.y[0], state)
        assert solution.y[1:, 1].isnan().all()

    def test_with_noise_of_their_own_nothing_but_rounding_changes(self) -> None:
        process = failing()
        state = state_of("GGF", 4)
        state[2] = 1e6
        others = [0, 1, 3]
        solution = failed("GGF", state, ENDS, process=process)
        noise = SampleNoise([SEEDS[i] for i in others])
        alone = run("GGF", state[others], ENDS, process=process, noise=noise)
        # Coefficients of one time for all are applied by another kernel than those of many times.
        assert torch.allclose(solution.state[others], alone.state, rtol=0, atol=1e-12)

    @every_adaptive
    def test_all_of_them_are_not_counted(self, method: str) -> None:
        process = failing()
        solution = failed(method, torch.full((2, 2, 2), 1e6), ENDS, process=process)
        assert not solution.stats["success"].any()
        assert solution.message.startswith("the step length underflowed")

    @every_adaptive
    def test_evaluations_are_those_of_a_sample(self, method: str) -> None:
        state = state_of(method, 6)
        state[::2] *= 5
        every = run(method, state, ENDS)
        counts = every.stats["nfev"]
        # Enough for some and not for others.
        most = int(counts.median())
        assert counts.min() <= most < counts.max()
        solver: Any = {
            "flow": solvers.ProbabilityFlow(rtol=1e-7, atol=1e-7, max_nfev=most, pace="sample"),
            "GGF": solvers.GottaGoFast(rtol=0.05, atol=0.02, max_nfev=most),
        }[method]
        solution = failed(method, state, ENDS, solver=solver)
        arrived = counts <= most
        assert torch.equal(solution.stats["success"], arrived)
        assert torch.equal(solution.stats["nfev"][arrived], counts[arrived])
        assert (solution.stats["nfev"] <= most).all()
        assert torch.allclose(solution.state[arrived], every.state[arrived], rtol=0, atol=1e-6)
        assert f"{int((~arrived).sum())} of 6 samples: max_nfev: {most}" in solution.message
        assert solution.y[0, ~arrived].isnan().all()
        assert solution.y[0, arrived].isfinite().all()

    def test_on_a_grid_the_mask_says_which(self) -> None:
        process = failing()
        state = state_of("EM")
        state[1] = 1e6
        solution = failed("EM", state, GRID, process=process, denoise=True)
        assert solution.stats["success"].tolist() == [True, False, True]
        assert solution.status == 1
        alone = run(
            "EM",
            state[[0, 2]],
            GRID,
            process=process,
            denoise=True,
            noise=SampleNoise([SEEDS[0], SEEDS[2]]),
        )
        assert torch.equal(solution.data[[0, 2]], alone.data)


EVERY = {**SOLVERS, **ADAPTIVE}


class TestGradients:
    """``differentiable=True``."""

    @pytest.mark.parametrize("denoise", [False, "step"])
    @pytest.mark.parametrize("method", list(EVERY))
    def test_they_are_finite_differences(self, method: str, denoise: Any) -> None:
        solver: Any = EVERY[method]
        if method == "flow":
            # Step lengths follow the state, and their derivative is left out: it is as small as
            # the tolerance.
            solver = solvers.ProbabilityFlow(method="dopri8", rtol=1e-10, atol=1e-10, pace="sample")
        process = process_of(method)
        score: Any = process.score
        state = start(process.sde, (2, 2))
        weights = torch.randn(state[:, 0].shape, generator=generator(5), dtype=torch.float64)
        along = torch.randn(state.shape, generator=generator(6), dtype=torch.float64)

        def value(z: torch.Tensor) -> torch.Tensor:
            solution = run(
                method,
                z,
                GRID,
                process=process,
                solver=solver,
                noise=SampleNoise([3, 4]),
                denoise=denoise,
                differentiable=True,
            )
            assert solution.success
            return (weights * solution.data).sum()

        z = state.clone().requires_grad_()
        by_state, by_slope = torch.autograd.grad(value(z), [z, score.slope])
        h = 1e-5
        if method == "GGF":
            # The ten bits of a step length do not follow the state, but jump, the less likely the
            # shorter the way.
            h = 1e-7
        with torch.no_grad():
            steps = [float(value(state + s * h * along)) for s in (1, -1)]
            values = []
            for s in (h, -2 * h):
                score.slope.add_(s)
                values.append(float(value(state)))
            score.slope.add_(h)
        differences = [(steps[0] - steps[1]) / (2 * h), (values[0] - values[1]) / (2 * h)]
        found = [float((by_state * along).sum()), float(by_slope)]
        for one, other in zip(found, differences, strict=True):
            # Third derivatives times h^2, and rounding over h.
            assert abs(one - other) <= 1e-6 * (1 + abs(other))
            assert abs(other) > 1e-5

    @pytest.mark.parametrize("method", list(EVERY))
    def test_recording_changes_no_bit_and_is_not_the_default(self, method: str) -> None:
        process, state = process_of(method), state_of(method).requires_grad_()
        plain = run(method, state.detach(), GRID, process=process, t_eval=GRID[::5])
        recorded = run(method, state, GRID, process=process, t_eval=GRID[::5], differentiable=True)
        for solution, wanted in ((plain, False), (recorded, True)):
            assert solution.state.requires_grad == wanted
            assert solution.data.requires_grad == wanted
            assert solution.y.requires_grad == wanted
        assert torch.equal(plain.state, recorded.state)
        assert torch.is_grad_enabled()
        with torch.no_grad():
            assert not run(method, state, GRID, differentiable=True).state.requires_grad

    @pytest.mark.parametrize("method", ["EM", "flow", "GGF"])
    def test_states_on_the_way_have_them_too(self, method: str) -> None:
        state = state_of(method).requires_grad_()
        solution = run(method, state, GRID, t_eval=GRID[[0, 2]], differentiable=True)
        for y in solution.y:
            (gradient,) = torch.autograd.grad(y.sum(), state, retain_graph=True)
            assert gradient.isfinite().all()
            assert (gradient != 0).any()
        (first,) = torch.autograd.grad(solution.y[0].sum(), state, retain_graph=True)
        assert torch.equal(first, torch.ones_like(state))

    def test_a_sample_that_fails_spoils_no_gradient_of_others(self) -> None:
        process = failing()
        state = state_of("EM")
        state[1] = 1e6
        z = state.clone().requires_grad_()
        solution = failed("EM", z, GRID, process=process, differentiable=True)
        (gradient,) = torch.autograd.grad(solution.state[[0, 2]].sum(), z)
        assert gradient[[0, 2]].isfinite().all()


class Later(solvers.NoiseSource):
    """Draws that remember themselves."""

    def __init__(self) -> None:
        self.draws: list[torch.Tensor] = []

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        shape = (len(z), rows, *z.shape[2:])
        self.draws.append(torch.randn(shape, generator=generator(len(self.draws)), dtype=z.dtype))
        return self.draws[-1]


class TestTracing:
    """Steps are tensor work that a compiler sees whole."""

    STEPS = solvers.root_times(1.0, 0.1, 3)
    TRACED = tuple(name for name in SOLVERS if not name.startswith("torchsde"))

    def steps(self, method: str) -> Any:
        process, solver = process_of(method), SOLVERS[method]
        tables, driven = solver.prepare(process, self.STEPS), list(process.sde.driven)

        def score(z: torch.Tensor, i: int) -> torch.Tensor:
            return -(z[:, driven] + 0.1 * z[:, driven].sin())

        def through(z: torch.Tensor, noise: solvers.NoiseSource) -> torch.Tensor:
            memory: Memory = ()
            for i in range(len(self.STEPS) - 1):
                z, memory = solver.step(z, memory, tables, i, score, noise)
            return z

        return through

    def compare(self, method: str, noises: tuple[Any, Any]) -> None:
        through, z = self.steps(method), state_of(method)
        torch._dynamo.reset()
        traced = torch.compile(lambda z: through(z, noises[0]), backend="eager", fullgraph=True)
        torch.manual_seed(0)
        found = traced(z)
        torch.manual_seed(0)
        assert torch.equal(found, through(z, noises[1]))

    @pytest.mark.parametrize("method", TRACED)
    def test_with_fresh_noise_they_are_one_graph_of_the_same_bits(self, method: str) -> None:
        self.compare(method, (solvers.FreshNoise(), solvers.FreshNoise()))

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler", "multistep, 2"])
    def test_so_they_are_without_gradients(self, method: str) -> None:
        with torch.no_grad():
            self.compare(method, (solvers.FreshNoise(), solvers.FreshNoise()))

    @pytest.mark.parametrize("method", ["EM", "SSCS, euler"])
    def test_so_they_are_with_recorded_noise(self, method: str) -> None:
        later = Later()
        self.steps(method)(state_of(method), later)
        self.compare(method, tuple(solvers.RecordedNoise(later.draws) for _ in range(2)))


class TestBits:
    """One seed, one result."""

    @pytest.mark.parametrize("method", list(EVERY))
    def test_they_are_those_of_the_seed(self, method: str) -> None:
        state = state_of(method)
        options: dict[str, Any] = {"noise": None, "t_eval": GRID[::5], "denoise": "step"}
        one, same, other = (
            run(method, state, GRID, generator=generator(seed), **options) for seed in (1, 1, 2)
        )
        assert torch.equal(one.y, same.y)
        assert torch.equal(one.data, same.data)
        solver: Any = EVERY[method]
        deterministic = method in ("flow", "EDM") or (
            isinstance(solver, MULTISTEP) and solver.stochasticity == 0
        )
        assert torch.equal(one.state, other.state) == deterministic
