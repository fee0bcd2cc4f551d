"""`solve` along the way: requested states, callbacks, failures, last steps, gradients, tracing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from cldsde import CLD, PSLD, VPSDE, GaussianMixture, LinearSDE, ReverseProcess, solvers
from cldsde.score.times import coefficients_at
from cldsde.solvers import Langevin, PredictorCorrector, SampleNoise
from cldsde.solvers.authoring import GridSolver, Memory
from cldsde.validation import propagate_moments
from probes import Recording, Smooth, generator, initial, named_solvers, start, untouchable
from tolerances import rounding, standard_error, standard_error_of_variance

FLOW = 1e-7  # tolerance of the adaptive flow
SOLVERS: dict[str, Any] = named_solvers() | {
    "flow": solvers.ProbabilityFlow(rtol=FLOW, atol=FLOW, pace="sample"),
    "GGF": solvers.GottaGoFast(rtol=0.05, atol=0.02),
}
SEEDS = [3, 1, 4, 15, 9, 2]
GRID = solvers.root_times(1.0, 0.1, 5)
ENDS = GRID[[0, -1]]
SDE = CLD(1.0)
PROCESS = ReverseProcess(SDE, Smooth(SDE))
DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
# A few steps of states of size ten, whose tables are computed for grids of other lengths.
TABLES = rounding(1e4, 10.0)

every_adaptive = pytest.mark.parametrize("method", ["flow", "GGF"])
every_kind = pytest.mark.parametrize("method", ["euler-maruyama", "sscs", "flow", "GGF"])


def run(method: str, state: torch.Tensor, times: torch.Tensor = GRID, **options: Any) -> Any:
    """A solve of a few samples, each with its own noise."""
    process, solver = options.pop("process", PROCESS), options.pop("solver", SOLVERS[method])
    options = {"noise": SampleNoise(SEEDS[: len(state)]), **options}
    return solvers.solve(process, solver, state, times, **options)


def states(samples: int = 3) -> torch.Tensor:
    return start(SDE, (samples, 2))


class TestRequestedStates:
    """``t_eval``."""

    @pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [0], [5], [2, 3], [0, 4]], ids=str)
    @every_kind
    def test_the_start_may_be_among_them_and_the_end_need_not(
        self, method: str, chosen: list[int]
    ) -> None:
        state, times = states(), GRID[chosen]
        solution = run(method, state, t_eval=times)
        assert solution.success
        assert torch.equal(solution.t, times)
        assert solution.y.shape == (len(chosen), *state.shape)
        assert solution.y.isfinite().all()
        if 0 in chosen:
            assert torch.equal(solution.y[0], state)
        assert torch.equal(solution.y[-1], solution.state) == (5 in chosen)
        every = run(method, state, t_eval=None if chosen == [5] else GRID)
        if method == "flow":  # its steps differ, and their errors are some tens of tolerances
            assert torch.allclose(solution.state, every.state, rtol=0, atol=100 * FLOW)
        elif method != "GGF":
            assert torch.equal(solution.state, every.state)

    def test_the_last_state_alone_is_the_default_and_a_requested_start_is_a_copy(self) -> None:
        state = states()
        solution = run("sscs", state)
        assert torch.equal(solution.t, GRID[-1:])
        assert solution.t.dtype == torch.float64
        assert torch.equal(solution.y[0], solution.state)
        kept = run("flow", state, t_eval=GRID).y
        before = state.clone()
        state.zero_()
        assert torch.equal(kept[0], before)

    def test_grids_and_times_may_be_in_single_precision(self) -> None:
        grid = GRID.float()
        solution = run("euler-maruyama", states(), grid, t_eval=grid[2:])
        assert torch.equal(solution.t, grid[2:].double())
        assert torch.equal(solution.state, run("euler-maruyama", states(), grid.double()).state)

    @every_adaptive
    def test_a_stop_does_not_shorten_the_steps_after_it(self, method: str) -> None:
        # The second stop of each pair cuts a step to a length of 1e-6.
        n, pairs = 64, torch.tensor([0.85, 0.7, 0.55, 0.4, 0.25], dtype=torch.float64)
        stops = torch.stack([pairs, pairs - 1e-6], dim=1).flatten()
        solver = {
            "flow": solvers.ProbabilityFlow(rtol=1e-4, atol=1e-4, pace="sample"),
            "GGF": solvers.GottaGoFast(rtol=0.02, atol=0.01),
        }[method]
        state, noise = states(n), [SampleNoise(range(n)) for _ in range(2)]
        plain = run(method, state, ENDS, solver=solver, noise=noise[0]).stats["nfev"]
        found = run(method, state, ENDS, solver=solver, noise=noise[1], t_eval=stops).stats["nfev"]
        more = (found - plain).double() / solver.facts.nfe_per_step
        # A stop costs the attempt that it cuts, and two ends are rejected. GGF's paths change.
        room = standard_error(float(more.std()), n) if method == "GGF" else 0.0
        assert more.mean() <= len(stops) + 2 + room
        assert more.mean() + room > 0

    def test_a_step_that_ends_at_the_end_is_the_last(self) -> None:
        ends = torch.tensor([1.0, 0.5])  # exact in binary, as the step
        solution = run("flow", states(), ends, solver=SOLVERS["flow"].with_step(0.25))
        assert solution.success
        assert solution.stats["attempts"] == 2

    def test_gotta_go_fast_keeps_its_distribution_between_stops(self) -> None:
        sde, n = VPSDE(0.5, 5.0), 4000
        process = ReverseProcess(sde, DATA.score(sde))
        kernel = sde.marginal(1.0, initial(sde))
        noise = torch.randn(n, 1, 1, generator=generator(1), dtype=torch.float64)
        state = kernel.mean[0, 0] * 0.3 + kernel.root * noise
        stops = torch.tensor([0.8, 0.4, 0.1], dtype=torch.float64)
        solver = solvers.GottaGoFast(rtol=0.01, atol=0.002)
        solution = solvers.solve(process, solver, state, ENDS, t_eval=stops, generator=generator(2))
        bias = 2 * 0.01  # of the steps, each within its tolerance
        for t, y in zip(stops.tolist(), solution.y, strict=True):
            kernel = sde.marginal(t, initial(sde))
            white = (y.flatten() - 0.3 * kernel.mean[0, 0]) / kernel.root.flatten()
            assert abs(float(white.mean())) <= standard_error(1.0, n) + bias
            assert abs(float(white.var()) - 1) <= standard_error_of_variance(1.0, n) + bias


class TestUnmergedSteps:
    """SSCS draws its half-steps apart if its state is wanted at each grid time."""

    SDE = CLD()
    PROCESS = ReverseProcess(SDE, DATA.score(SDE))
    OPTIONS = (
        {"score_step": "euler"},
        {"score_step": "midpoint"},
        {"score_step": "gaussian", "data_variance": 0.25},
    )

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = self.SDE.marginal(1.0, initial(self.SDE))
        return 0.3 * kernel.mean[:, :1], kernel.covariance

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_merging_keeps_the_distribution(self, options: Any) -> None:
        merged, apart = (
            propagate_moments(self.PROCESS, solver, GRID, *self.start())
            for solver in (solvers.SSCS(**options), solvers.SSCS(merge=False, **options))
        )
        for one, other in zip(merged, apart, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=TABLES)

    @pytest.mark.parametrize("wanted", ["t_eval", "callback"])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_the_distribution_at_each_time_is_that_of_a_solve_to_there(
        self, options: Any, wanted: str
    ) -> None:
        # The solve is affine in the noise: unit vectors give its exact covariance.
        n, (mean, covariance) = len(GRID) - 1, self.start()
        k, units = 2, 2 * n * 2
        state = mean.expand(1 + k + units, k, 1).clone()
        state[1 : 1 + k, :, 0] += torch.linalg.cholesky(covariance).mT
        draws = torch.zeros(2 * n, len(state), k, 1, dtype=torch.float64)
        for i in range(units):
            draws[i // k, 1 + k + i, i % k] = 1.0
        seen: list[torch.Tensor] = []
        extra: dict[str, Any] = {"t_eval": GRID[1:]}
        if wanted == "callback":
            extra = {"callback": lambda step, t, z: seen.append(z)}
        noise, solver = solvers.RecordedNoise(list(draws)), solvers.SSCS(**options)
        solution = solvers.solve(self.PROCESS, solver, state, GRID, noise=noise, **extra)
        found = solution.y if wanted == "t_eval" else torch.stack(seen)
        assert len(found) == n
        for i, y in enumerate(found[..., 0]):
            m, C = propagate_moments(self.PROCESS, solver, GRID[: i + 2], mean, covariance)
            difference = y[1:] - y[0]
            assert torch.allclose(y[:1].mT, m, rtol=0, atol=TABLES)
            assert torch.allclose(difference.mT @ difference, C, rtol=0, atol=TABLES)

    def test_only_unmerged_states_belong_to_grid_times(self) -> None:
        assert not solvers.SSCS().facts.state_on_grid
        assert solvers.SSCS(merge=False).facts.state_on_grid
        with pytest.raises(ValueError, match="state at each grid time"):
            PredictorCorrector(solvers.SSCS(), Langevin())
        solver = PredictorCorrector(solvers.SSCS(merge=False), Langevin(snr=0.05))
        z = start(self.SDE, (3, 1))
        solution = solvers.solve(self.PROCESS, solver, z, GRID, generator=generator())
        assert solution.success
        assert solution.nfev == 2 * (len(GRID) - 1)


class TestCallbacks:
    """Their arguments, and how they stop a solve."""

    @pytest.mark.parametrize(
        "method", ["euler-maruyama", "sscs-midpoint", "predictor-corrector", "multistep-2"]
    )
    def test_they_see_each_step_in_order(self, method: str) -> None:
        calls: list[Any] = []

        def watch(step: int, t: float, z: torch.Tensor) -> None:
            calls.append((step, t, z.view(3, 4).clone()))  # in one piece

        solution = run(method, states(), t_eval=GRID[1:], callback=watch)
        assert [step for step, _, _ in calls] == [1, 2, 3, 4, 5]
        assert [t for _, t, _ in calls] == GRID[1:].tolist()
        assert all(type(t) is float for _, t, _ in calls)
        assert torch.equal(torch.stack([z for _, _, z in calls]), solution.y.flatten(2))

    @every_adaptive
    def test_they_see_the_time_of_each_sample(self, method: str) -> None:
        calls: list[Any] = []

        def watch(step: int, t: torch.Tensor, z: torch.Tensor) -> None:
            calls.append((step, t.clone(), z.view(6, 2, 2).clone()))

        state = states(6)
        solution = run(method, state, ENDS, callback=watch)
        assert torch.equal(solution.state, run(method, state, ENDS).state)
        assert [step for step, _, _ in calls] == list(range(1, solution.stats["attempts"] + 1))
        times = torch.stack([torch.ones(6), *[t for _, t, _ in calls]])
        assert (times.diff(dim=0) <= 0).all()
        assert (times[-1] == 0.1).all()
        # A sample's state changes when its time does.
        path = torch.stack([state, *[z for _, _, z in calls]])
        assert torch.equal((path.diff(dim=0) != 0).flatten(2).any(2), times.diff(dim=0) < 0)
        assert torch.equal(path[-1], solution.state)

    @pytest.mark.parametrize("method", ["euler-maruyama", "stochastic-heun", "sscs", "multistep-2"])
    @pytest.mark.parametrize("denoise", [False, True])
    def test_true_stops_at_once(self, method: str, denoise: bool) -> None:
        state, times, score = states(), GRID[[0, 2, 3, 5]], Recording(PROCESS.score)
        solution = run(
            method,
            state,
            process=ReverseProcess(SDE, score),
            t_eval=times,
            denoise=denoise,
            callback=lambda step, t, z: step == 3,
        )
        assert (solution.success, solution.status) == (False, 2)
        assert solution.raise_for_failure() is solution
        assert solution.message == "stopped by the callback after 3 steps"
        assert solution.nfev == score.calls == 3 * SOLVERS[method].facts.nfe_per_step
        assert solution.stats["steps"] == 3
        assert solution.stats["success"].tolist() == [False] * 3
        every = run(method, state, t_eval=times)
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

        score, times = Recording(PROCESS.score), torch.tensor([1.0, 0.15], dtype=torch.float64)
        solution = run(
            method,
            states(),
            ENDS,
            process=ReverseProcess(SDE, score),
            callback=callback,
            denoise=denoise,
            t_eval=times,
        )
        assert (last[0] > 0.15).all()
        assert (solution.status, solution.message) == (2, "stopped by the callback")
        assert not solution.stats["success"].any()
        assert solution.stats["attempts"] == 3
        assert solution.nfev == score.calls
        assert torch.equal(solution.state, last[1])
        assert torch.equal(solution.data, solution.state[:, 0])
        assert solution.y[0].isfinite().all()
        assert solution.y[1].isnan().all()

    @pytest.mark.parametrize("value", [None, False, 0])
    def test_other_values_do_not_stop(self, value: Any) -> None:
        assert run("flow", states(), callback=lambda *x: value).status == 0

    @every_kind
    def test_after_the_last_step_there_is_nothing_to_stop(self, method: str) -> None:
        def at_end(step: int, t: Any, z: torch.Tensor) -> bool:
            return bool((torch.as_tensor(t) <= 0.1).all())

        solution = run(method, states(), callback=at_end)
        assert (solution.success, solution.status) == (True, 0)
        assert solution.message.startswith("reached the end of the ")
        assert torch.equal(solution.y[0], solution.state)

    @every_adaptive
    def test_samples_that_have_arrived_before_a_stop_have_arrived(self, method: str) -> None:
        solution = run(method, states(6), ENDS, callback=lambda step, t, z: bool((t <= 0.1).any()))
        success = solution.stats["success"]
        assert solution.status == 2
        assert 0 < int(success.sum()) < 6
        assert torch.equal(solution.y[0, success], solution.state[success])
        assert solution.y[0, ~success].isnan().all()

    @pytest.mark.parametrize("method", ["euler-maruyama", "flow"])
    def test_their_errors_are_raised(self, method: str) -> None:
        def callback(step: int, t: Any, z: torch.Tensor) -> None:
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            run(method, states(), callback=callback)


class TestLastStep:
    """``denoise``."""

    @every_kind
    @pytest.mark.parametrize("make", [lambda: VPSDE(0.5, 5.0), lambda: PSLD(2.0)])
    def test_a_step_to_zero_is_an_euler_step_without_noise(self, method: str, make: Any) -> None:
        sde = make()
        score = Recording(Smooth(sde))
        process, z = ReverseProcess(sde, score), start(sde, (3, 2))
        plain = run(method, z, process=process)
        solution = run(method, z, process=process, denoise="step")
        assert torch.equal(solution.state, plain.state)
        assert torch.equal(solution.stats["nfev"], plain.stats["nfev"] + 1)
        assert (score.times[-1] == 0.1).all()
        z, t = solution.state, 0.1
        F, G = sde.drift(t), sde.diffusion(t)
        driven = torch.zeros_like(z)
        driven[:, list(sde.driven)] = score.score(z, torch.full((3,), t, dtype=z.dtype)).detach()
        drift = torch.einsum("ij,bjd->bid", F, z) - torch.einsum("ij,bjd->bid", G @ G.mT, driven)
        assert torch.allclose(solution.data, (z - t * drift)[:, 0], rtol=0, atol=TABLES)

    def test_a_score_that_does_not_determine_the_data_is_rejected(self) -> None:
        sde = CLD(friction=0.4)
        t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
        kernel = sde.marginal(t)
        b = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, 1, 0]
        zero = float(t[(b[1:] * b[:-1] < 0).nonzero().flatten()[0]])
        plan = solvers.plan(
            ReverseProcess(sde, untouchable), solvers.SSCS(), solvers.uniform_times(1.0, zero, 4)
        )
        with pytest.raises(ValueError, match="does not determine x_0"):
            plan.solve(start(sde), denoise=True)

    def test_a_prediction_that_is_not_finite_is_reported(self) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.full_like(z[:, 1:], 0.0 if t[0] > 0.1 else math.nan)

        with pytest.warns(solvers.SolveWarning, match="not finite"):
            solution = run(
                "euler-maruyama", states(), process=ReverseProcess(SDE, score), denoise=True
            )
        assert solution.state.isfinite().all()
        assert not solution.success


def failing() -> ReverseProcess:
    """No score for samples with a number beyond 100."""

    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        lost = (z.abs() > 100).flatten(1).any(1).reshape(-1, *(1,) * (z.ndim - 1))
        return torch.where(lost, math.nan, PROCESS.score(z, t))

    return ReverseProcess(SDE, score)


class TestFailures:
    """Samples that fail do so alone."""

    @pytest.mark.parametrize("denoise", [False, True, "step"])
    @every_adaptive
    def test_a_lost_sample_changes_no_other(self, method: str, denoise: Any) -> None:
        state, others = states(4), [0, 2, 3]
        state[1] = 1e6
        times = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64)
        options: dict[str, Any] = {"process": failing(), "t_eval": times, "denoise": denoise}
        with pytest.warns(solvers.SolveWarning):
            solution = run(method, state, ENDS, **options)
        noise = SampleNoise([SEEDS[i] for i in others])
        alone = run(method, state[others], ENDS, noise=noise, **options)
        assert alone.success
        assert solution.status == 1
        assert solution.stats["success"].tolist() == [True, False, True, True]
        assert "1 of 4 samples: the step length underflowed" in solution.message
        for found, expected in (
            (solution.state[others], alone.state),
            (solution.data[others], alone.data),
            (solution.y[:, others], alone.y),
        ):
            assert torch.allclose(found, expected, rtol=0, atol=TABLES)
        assert torch.equal(solution.stats["nfev"][others], alone.stats["nfev"])
        assert torch.equal(solution.y[0], state)
        assert solution.y[1:, 1].isnan().all()

    @every_adaptive
    def test_a_failure_of_all_is_not_counted(self, method: str) -> None:
        with pytest.warns(solvers.SolveWarning):
            solution = run(method, torch.full((2, 2, 2), 1e6), ENDS, process=failing())
        assert not solution.stats["success"].any()
        assert solution.message.startswith("the step length underflowed")

    @every_adaptive
    def test_max_nfev_bounds_each_sample(self, method: str) -> None:
        state = states(6)
        state[::2] *= 5
        every = run(method, state, ENDS)
        counts = every.stats["nfev"]
        most = int(counts.median())  # enough for some
        assert counts.min() <= most < counts.max()
        solver = {
            "flow": solvers.ProbabilityFlow(rtol=1e-7, atol=1e-7, max_nfev=most, pace="sample"),
            "GGF": solvers.GottaGoFast(rtol=0.05, atol=0.02, max_nfev=most),
        }[method]
        with pytest.warns(solvers.SolveWarning):
            solution = run(method, state, ENDS, solver=solver)
        arrived = counts <= most
        assert torch.equal(solution.stats["success"], arrived)
        assert torch.equal(solution.stats["nfev"][arrived], counts[arrived])
        assert (solution.stats["nfev"] <= most).all()
        assert torch.allclose(solution.state[arrived], every.state[arrived], rtol=0, atol=TABLES)
        assert f"{int((~arrived).sum())} of 6 samples: max_nfev: {most}" in solution.message
        assert torch.equal(solution.y[0].isfinite().all(-1).all(-1), arrived)


class TestScores:
    """The times and the coefficients of a score."""

    def test_a_score_in_single_precision_is_evaluated_at_rounded_times(self) -> None:
        score = Recording(PROCESS.score)
        process = ReverseProcess(SDE, score)
        run("sscs", states().float(), process=process, denoise=True)
        assert {t.dtype for t in score.times} == {torch.float32}
        assert [t[0].item() for t in score.times] == GRID.float().tolist()

    def test_coefficients_are_computed_once_from_exact_times(self) -> None:
        made: list[torch.Tensor] = []

        class Slope(NamedTuple):
            slope: torch.Tensor

        class Score:
            def make(self, t: torch.Tensor) -> Slope:
                made.append(t)
                return Slope(1 / (0.1 + t))

            def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                (slope,) = coefficients_at(self, t, z, self.make, z.dtype, 0)
                assert slope.dtype == torch.float32
                return -slope * z[:, 1:]

        run("sscs", states().float(), process=ReverseProcess(SDE, Score()), denoise=True)
        assert [t.dtype for t in made] == [torch.float64] * 2
        assert torch.equal(torch.cat(made), GRID)

    @pytest.mark.parametrize("method", ["euler-maruyama", "sscs-midpoint", "multistep-2"])
    def test_coefficients_of_the_grid_give_the_samples_of_coefficients_of_each_time(
        self, method: str
    ) -> None:
        score = DATA.score(SDE)
        process = ReverseProcess(SDE, lambda z, t: score(z, t.clone()))
        z = start(SDE, (3, 1))
        told = run(method, z, process=process).state
        known = run(method, z, process=ReverseProcess(SDE, score)).state
        assert torch.allclose(told, known, rtol=0, atol=TABLES)

    def test_data_of_another_dimension_are_rejected(self) -> None:
        with pytest.raises(ValueError, match="1 numbers per component"):
            run("sscs", states(), process=ReverseProcess(SDE, DATA.score(SDE)))


class TestResults:
    """The solution, and what is shown."""

    def test_a_solution_prints_its_facts_in_one_line(self) -> None:
        solution = run("euler-maruyama", states())
        assert repr(solution) == (
            "Solution(success=True, nfev=5, state=(3, 2, 2), message='reached the end of the grid')"
        )
        assert solution.raise_for_failure() is solution

    def test_progress_is_shown_on_stderr_if_asked_for(self, capsys: Any) -> None:
        run("euler-maruyama", states())
        quiet = capsys.readouterr()
        run("euler-maruyama", states(), progress=True)
        shown = capsys.readouterr()
        assert quiet.out == quiet.err == shown.out == ""
        assert "EulerMaruyama" in shown.err
        assert "5/5" in shown.err

    @pytest.mark.parametrize("method", ["euler-maruyama", "sscs"])
    def test_equal_starts_become_independent_samples(self, method: str) -> None:
        n = 4000
        z = torch.zeros(n, 2, 2, dtype=torch.float64)
        x = solvers.solve(PROCESS, SOLVERS[method], z, GRID, generator=generator()).data
        white = (x - x.mean(0)) / x.std(0)
        # Neighbouring samples, samples half a batch apart, and data axes of one sample.
        for pairs in (
            white[:-1] * white[1:],
            white[: n // 2] * white[n // 2 :],
            white[:, :1] * white[:, 1:],
        ):
            assert (pairs.mean(0).abs() <= standard_error(1.0, len(pairs))).all()

    @pytest.mark.parametrize("name", ["VP", "CLD", "PSLD"])
    def test_without_noise_and_with_the_stationary_score_sscs_is_the_reversed_transition(
        self, name: str
    ) -> None:
        sde: LinearSDE = {"VP": VPSDE, "CLD": CLD, "PSLD": PSLD}[name]()
        stationary, z = sde.stationary_covariance, start(sde)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -torch.linalg.solve(stationary, z)[:, list(sde.driven)]

        noise = solvers.RecordedNoise([torch.zeros_like(z)] * len(GRID))
        found = run("sscs", z, process=ReverseProcess(sde, score), noise=noise).state
        expected = torch.einsum("ij,bjd->bid", sde.stationary_reversal.transition(0.1, 1).mean, z)
        # The kick vanishes: what is left is exact, however long the steps are.
        assert torch.allclose(found, expected, rtol=0, atol=TABLES)


class TestGradients:
    """``differentiable=True`` for states on the way."""

    @every_kind
    def test_states_on_the_way_have_gradients(self, method: str) -> None:
        state = states().requires_grad_()
        solution = run(method, state, t_eval=GRID[[0, 2]], differentiable=True)
        first, second = (
            torch.autograd.grad(y.sum(), state, retain_graph=True)[0] for y in solution.y
        )
        assert torch.equal(first, torch.ones_like(state))
        assert second.isfinite().all()
        assert (second != 0).any()

    def test_a_lost_sample_spoils_no_gradient_of_others(self) -> None:
        z = states()
        z[1] = 1e6
        z.requires_grad_()
        with pytest.warns(solvers.SolveWarning):
            solution = run("euler-maruyama", z, process=failing(), differentiable=True)
        (gradient,) = torch.autograd.grad(solution.state[[0, 2]].sum(), z)
        assert gradient[[0, 2]].isfinite().all()


# One solver of each class, and further forms of its step.
TRACED = {type(x): name for name, x in SOLVERS.items() if isinstance(x, GridSolver)}
TRACED = {kind: name for kind, name in TRACED.items() if kind is not solvers.TorchSDE}


@pytest.mark.parametrize("method", [*TRACED.values(), "sscs", "multistep-2-sde", "multistep-3"])
def test_steps_are_one_graph_of_the_same_bits(method: str) -> None:
    sde: LinearSDE = VPSDE() if method.startswith("edm") else SDE
    solver, times, driven = SOLVERS[method], GRID[[0, 2, 5]], list(sde.driven)
    tables = solver.prepare(ReverseProcess(sde, untouchable), times)

    def score(z: torch.Tensor, i: int) -> torch.Tensor:
        return -(z[:, driven] + 0.1 * z[:, driven].sin())

    def through(z: torch.Tensor) -> torch.Tensor:
        memory: Memory = ()
        for i in range(len(times) - 1):
            z, memory = solver.step(z, memory, tables, i, score, solvers.FreshNoise())
        return z

    torch._dynamo.reset()
    traced, z = torch.compile(through, backend="eager", fullgraph=True), start(sde)
    torch.manual_seed(0)
    found = traced(z)
    torch.manual_seed(0)
    assert torch.equal(found, through(z))
