"""`solve`: what is refused, what is counted, what is asked, and what comes back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    MixedScore,
    ReverseProcess,
    SubVPSDE,
    solvers,
)
from cldsde.score.times import coefficients_at
from cldsde.solvers.authoring import GridSolver, Memory
from probes import Recording, generator, known_score, no_waiting, start, untouchable
from score import exact
from score.exact import Constant

FAMILIES = exact.FAMILIES
EM, SSCS = solvers.EulerMaruyama(), solvers.SSCS()
SPLITTABLE = [name for name in FAMILIES if name not in {"sub-VP", "VE"}]
CASES = [("EM", name) for name in FAMILIES] + [("SSCS", name) for name in SPLITTABLE]
SOLVERS: dict[str, GridSolver] = {"EM": EM, "SSCS": SSCS}

every_case = pytest.mark.parametrize(("method", "name"), CASES)
every_solver = pytest.mark.parametrize("method", list(SOLVERS))


class TestCounting:
    """Evaluations of the score: their number and their times."""

    @pytest.mark.parametrize("denoise", [False, True])
    @pytest.mark.parametrize("steps", [1, 2, 7])
    @every_case
    def test_evaluations_are_counted_and_stay_in_the_interval(
        self, method: str, name: str, steps: int, denoise: bool
    ) -> None:
        sde = FAMILIES[name]()
        score = Recording(exact.mixture().score(sde))
        # The end avoids the times at which the underdamped process hides its data.
        times = solvers.quadratic_times(1.0, 1e-3, steps)
        solver = SOLVERS[method]
        solution = solvers.solve(
            ReverseProcess(sde, score),
            solver,
            start(sde),
            times,
            generator=generator(),
            denoise=denoise,
        )
        assert solution.success
        assert solution.nfev == score.calls == steps * solver.facts.nfe_per_step + denoise
        assert solution.stats["steps"] == steps
        expected = times if denoise else times[:-1]
        assert [t[0].item() for t in score.times] == expected.tolist()
        for t in score.times:
            assert t.shape == (3,)
            assert (t == t[0]).all()

    @every_solver
    def test_a_single_precision_score_is_asked_at_rounded_times(self, method: str) -> None:
        sde = CLD()
        score = Recording(exact.mixture().score(sde))
        times = solvers.uniform_times(0.9, 1e-3, 5)
        state = start(sde, dtype=torch.float32)
        process = ReverseProcess(sde, score)
        solvers.solve(process, SOLVERS[method], state, times, denoise=True)
        assert {t.dtype for t in score.times} == {torch.float32}
        assert [t[0].item() for t in score.times] == times.float().tolist()

    @every_solver
    def test_a_score_that_knows_its_times_gives_the_samples_of_one_that_is_told_them(
        self, method: str
    ) -> None:
        sde, times = CLD(), solvers.quadratic_times(1.0, 1e-2, 10)
        score = exact.mixture().score(sde)
        told = lambda z, t: score(z, t.clone())  # noqa: E731
        known, found = (
            solvers.solve(
                ReverseProcess(sde, each), SOLVERS[method], start(sde), times, generator=generator()
            )
            for each in (score, told)
        )
        # Coefficients of one time or of a grid differ by rounding, which the flow may amplify by
        # the ratio of standard deviations at its ends.
        assert torch.allclose(found.state, known.state, rtol=1e-10, atol=1e-10)

    def test_coefficients_are_made_once_from_exact_times(self) -> None:
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

        sde, times = CLD(), solvers.uniform_times(0.9, 1e-3, 4)
        process, state = ReverseProcess(sde, Score()), start(sde, dtype=torch.float32)
        solvers.solve(process, SSCS, state, times, denoise=True)
        grid, last = made
        assert grid.dtype == last.dtype == torch.float64
        assert torch.equal(torch.cat([grid, last]), times)


class TestResults:
    """States, data, types, shapes, and failure."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("axes", [(), (2,), (1, 8, 8)])
    @pytest.mark.parametrize("denoise", [False, True])
    @every_case
    def test_results_have_the_shape_and_type_of_the_state(
        self, method: str, name: str, denoise: bool, axes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        sde = FAMILIES[name]()
        size = math.prod(axes)
        eye = 0.1 * torch.eye(size, dtype=torch.float64)
        data = GaussianMixture([1.0, 1.0], [[-1.0] * size, [1.0] * size], torch.stack([eye, eye]))
        state = start(sde, (4, *axes), dtype)
        solution = solvers.solve(
            ReverseProcess(sde, data.score(sde)),
            SOLVERS[method],
            state,
            solvers.quadratic_times(1.0, 1e-3, 4),
            generator=generator(),
            denoise=denoise,
        )
        assert solution.success
        assert solution.state.shape == state.shape == (4, sde.components, *axes)
        assert solution.data.shape == (4, *axes)
        assert solution.state.dtype == solution.data.dtype == dtype

    @pytest.mark.parametrize("axes", [(1, 8, 8), (4, 16)])
    @pytest.mark.parametrize("kind", ["mixture", "mixed"])
    @every_case
    def test_several_data_axes_equal_flattened_ones(
        self, method: str, name: str, kind: str, axes: tuple[int, ...]
    ) -> None:
        sde = FAMILIES[name]()
        score: Any
        if kind == "mixture":
            eye = 0.1 * torch.eye(64, dtype=torch.float64)
            means = torch.linspace(-1, 1, 64, dtype=torch.float64)
            data = GaussianMixture([1, 1], torch.stack([means, -means]), torch.stack([eye, eye]))
            score = data.score(sde)
        else:
            score = MixedScore(Constant(sde, 0.1), sde, torch.zeros(()), torch.ones(()))
        process, solver = ReverseProcess(sde, score), SOLVERS[method]
        times = solvers.quadratic_times(1.0, 1e-3, 5)
        flat = start(sde, (3, 64))
        one = solvers.solve(process, solver, flat, times, generator=generator(), denoise=True)
        shaped = flat.reshape(*flat.shape[:2], *axes)
        several = solvers.solve(process, solver, shaped, times, generator=generator(), denoise=True)
        assert torch.equal(several.state.flatten(2), one.state)
        assert torch.equal(several.data.flatten(1), one.data)

    @every_case
    def test_without_denoising_the_data_is_the_first_component(
        self, method: str, name: str
    ) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        times = solvers.quadratic_times(1.0, 1e-3, 5)
        plain = solvers.solve(process, SOLVERS[method], start(sde), times, generator=generator())
        assert torch.equal(plain.data, plain.state[:, 0])
        denoised = solvers.solve(
            process, SOLVERS[method], start(sde), times, generator=generator(), denoise=True
        )
        # The table has one row more; its other rows are the same to rounding, which the flow may
        # amplify as above.
        assert torch.allclose(denoised.state, plain.state, rtol=1e-10, atol=1e-10)
        expected = process.data_prediction(denoised.state, 1e-3)
        # The same coefficients from a table or from one time: the score's relative accuracy, 1e-10,
        # times states that a few steps may leave at a size of 100.
        assert torch.allclose(denoised.data, expected, rtol=1e-8, atol=1e-8)

    @every_case
    def test_one_seed_gives_the_same_bits(self, method: str, name: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        times = solvers.quadratic_times(1.0, 1e-2, 5)

        def run(seed: int) -> torch.Tensor:
            state = start(sde)
            return solvers.solve(
                process, SOLVERS[method], state, times, generator=generator(seed)
            ).state

        assert torch.equal(run(0), run(0))
        # No sample keeps a number.
        assert (run(0) != run(1)).all()

    @every_case
    def test_the_state_is_not_changed(self, method: str, name: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        state = start(sde)
        before = state.clone()
        for steps in (1, 4):
            times = solvers.uniform_times(1.0, 0.1, steps)
            solvers.solve(process, SOLVERS[method], state, times)
            assert torch.equal(state, before)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("denoise", [False, True])
    @every_solver
    def test_a_score_that_is_not_finite_is_reported(
        self, method: str, denoise: bool, value: float
    ) -> None:
        sde = CLD()

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            result = torch.zeros_like(z[:, 1:])
            result[1] = value
            return result

        with pytest.warns(solvers.SolveWarning, match="not finite"):
            solution = solvers.solve(
                ReverseProcess(sde, score),
                SOLVERS[method],
                start(sde),
                solvers.uniform_times(1.0, 0.1, 3),
                denoise=denoise,
            )
        assert not solution.success
        assert solution.status == 1
        assert "not finite" in solution.message
        assert solution.nfev == 3 + denoise
        # The other samples are what they would have been.
        assert solution.state[[0, 2]].isfinite().all()

    def test_a_prediction_that_is_not_finite_is_reported(self) -> None:
        sde = CLD()

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.full_like(z[:, 1:], 0.0 if t[0] > 0.1 else math.nan)

        times = solvers.uniform_times(1.0, 0.1, 3)
        process = ReverseProcess(sde, score)
        with pytest.warns(solvers.SolveWarning, match="not finite"):
            solution = solvers.solve(process, EM, start(sde), times, denoise=True)
        assert solution.state.isfinite().all()
        assert not solution.success

    def test_a_solution_prints_its_facts_in_one_line(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        solution = solvers.solve(process, EM, start(sde), solvers.uniform_times(1.0, 0.1, 3))
        assert repr(solution) == (
            "Solution(success=True, nfev=3, state=(3, 2, 2), message='reached the end of the grid')"
        )
        assert solution.status == 0

    @pytest.mark.parametrize("times_dtype", [torch.float32, torch.float64])
    def test_grids_of_either_precision_are_taken(self, times_dtype: torch.dtype) -> None:
        sde = CLD()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        times = torch.tensor([1.0, 0.5, 0.25], dtype=times_dtype)
        solution = solvers.solve(process, EM, start(sde), times, generator=generator())
        expected = solvers.solve(process, EM, start(sde), times.double(), generator=generator())
        assert torch.equal(solution.state, expected.state)

    def test_no_gradients_are_recorded(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        times = solvers.uniform_times(1.0, 0.1, 3)
        with torch.no_grad():
            solution = solvers.solve(process, SSCS, start(sde).requires_grad_(), times)
        assert not solution.state.requires_grad
        assert torch.is_grad_enabled()

    def test_progress_is_shown_when_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        sde = CLD()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        times = solvers.uniform_times(1.0, 0.1, 3)
        solvers.solve(process, EM, start(sde), times)
        quiet = capsys.readouterr()
        assert (quiet.out, quiet.err) == ("", "")
        solvers.solve(process, EM, start(sde), times, progress=True)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "EulerMaruyama" in shown.err
        assert "3/3" in shown.err

    @every_case
    def test_an_empty_batch_stays_empty(self, method: str, name: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        state = torch.zeros(0, sde.components, 2)
        times = solvers.uniform_times(1.0, 0.1, 2)
        solution = solvers.solve(process, SOLVERS[method], state, times, denoise=True)
        assert solution.data.shape == (0, 2)


class TestNoise:
    """Fresh and recorded normals."""

    @every_case
    def test_identical_starts_become_independent_samples(self, method: str, name: str) -> None:
        sde, n = FAMILIES[name](), 4000
        data = GaussianMixture([1.0], [[0.3, 0.3]], [[[0.25, 0.0], [0.0, 0.25]]])
        state = torch.zeros(n, sde.components, 2, dtype=torch.float64)
        times = solvers.quadratic_times(1.0, 0.05, 12)
        x = solvers.solve(
            ReverseProcess(sde, data.score(sde)),
            SOLVERS[method],
            state,
            times,
            generator=generator(),
        ).data
        white = (x - x.mean(0)) / x.std(0)
        # Correlations of neighbouring samples, of samples half a batch apart, and of data axes of
        # one sample: 5 standard errors, 1/sqrt(pairs).
        for pairs in (
            white[:-1] * white[1:],
            white[: n // 2] * white[n // 2 :],
            (white[:, 0] * white[:, 1]).unsqueeze(1),
        ):
            assert (pairs.mean(0).abs() <= 5 / math.sqrt(len(pairs))).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_solver
    def test_recorded_noise_replays_fresh_noise(self, method: str, dtype: torch.dtype) -> None:
        sde = CLD()

        class Recorder(solvers.NoiseSource):
            def __init__(self) -> None:
                self.fresh, self.draws = solvers.FreshNoise(generator()), []

            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                self.draws.append(self.fresh.normal(z, rows))
                return self.draws[-1]

        process = ReverseProcess(sde, exact.mixture().score(sde))
        times, state = solvers.uniform_times(1.0, 0.1, 4), start(sde, dtype=dtype)
        recorder = Recorder()
        solver = SOLVERS[method]
        first = solvers.solve(process, solver, state, times, noise=recorder)
        fresh = solvers.solve(process, solver, state, times, generator=generator())
        noise = solvers.RecordedNoise(recorder.draws)
        again = solvers.solve(process, solver, state, times, noise=noise)
        assert torch.equal(first.state, fresh.state)
        assert torch.equal(first.state, again.state)

    def test_euler_maruyama_draws_for_the_driven_directions_alone(self) -> None:
        process = ReverseProcess(CLD(), exact.mixture().score(CLD()))
        draws = [torch.zeros(3, 1, 2, dtype=torch.float64)] * 4
        times = solvers.uniform_times(1.0, 0.1, 4)
        noise = solvers.RecordedNoise(draws)
        assert solvers.solve(process, EM, start(CLD()), times, noise=noise).success

    def test_sscs_draws_once_more_than_it_steps(self) -> None:
        process = ReverseProcess(CLD(), exact.mixture().score(CLD()))
        draws = [torch.zeros(3, 2, 2, dtype=torch.float64)] * 5
        times = solvers.uniform_times(1.0, 0.1, 4)
        noise = solvers.RecordedNoise(draws)
        assert solvers.solve(process, SSCS, start(CLD()), times, noise=noise).success

    @pytest.mark.parametrize(
        ("draws", "got"),
        [
            ([], r"\d recorded draws"),
            ([torch.zeros(3, 1, 2)] * 3, r"\d recorded draws"),
            ([torch.zeros(3, 2, 2)] * 4, r"\(3, 2, 2\)"),
            ([torch.zeros(2, 1, 2)] * 4, r"\(2, 1, 2\)"),
        ],
    )
    def test_a_record_that_does_not_fit_is_refused(self, draws: Any, got: str) -> None:
        process = ReverseProcess(CLD(), exact.mixture().score(CLD()))
        times = solvers.uniform_times(1.0, 0.1, 4)
        with pytest.raises(ValueError, match=rf"shape \(3, 1, 2\).*; got {got}"):
            solvers.solve(process, EM, start(CLD()), times, noise=solvers.RecordedNoise(draws))

    def test_noise_and_generator_are_alternatives(self) -> None:
        process = ReverseProcess(CLD(), untouchable)
        times = solvers.uniform_times(1.0, 0.1, 4)
        source = solvers.FreshNoise()
        with pytest.raises(ValueError, match="alternatives; got both"):
            solvers.solve(process, EM, start(CLD()), times, generator=generator(), noise=source)


GRID = solvers.uniform_times(1.0, 0.1, 4)


class TestRefusals:
    """What is refused, and that nothing has been evaluated by then."""

    @pytest.mark.parametrize(
        ("state", "error"),
        [
            (torch.zeros(3, 1, 2), ValueError),
            (torch.zeros(3, 3, 2), ValueError),
            (torch.zeros(2), ValueError),
            (torch.zeros(()), ValueError),
            (torch.zeros(3, 2, 2, dtype=torch.int64), TypeError),
            (torch.zeros(3, 2, 2, dtype=torch.complex64), TypeError),
            ([[[0.0], [0.0]]], TypeError),
            (None, TypeError),
        ],
    )
    @every_solver
    def test_states_that_do_not_fit(self, method: str, state: Any, error: type[Exception]) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(error, match=r"state must (be|have)"):
            solvers.solve(process, SOLVERS[method], state, GRID)

    @pytest.mark.parametrize(
        ("times", "error", "message"),
        [
            (torch.tensor([1.0]), ValueError, "at least 2 decreasing times"),
            (torch.tensor(1.0), ValueError, "at least 2 decreasing times"),
            (torch.ones(2, 2), ValueError, "at least 2 decreasing times"),
            (torch.empty(0), ValueError, "at least 2 decreasing times"),
            (torch.tensor([1.0, 0.5, 0.5, 0.1]), ValueError, r"got 0\.5 before 0\.5"),
            (torch.tensor([1.0, 0.4, 0.5, 0.1]), ValueError, r"got 0\.4 before 0\.5"),
            (torch.tensor([1.0, math.nan, 0.1]), ValueError, "times must lie in"),
            (torch.tensor([1.5, 0.5]), ValueError, r"times must lie in \[0, 1\]"),
            (torch.tensor([1.0, -0.5]), ValueError, r"times must lie in \[0, 1\]"),
            (torch.tensor([1, 0]), TypeError, "times must be a floating-point"),
            ([1.0, 0.5], (TypeError, ValueError), "times must be a tensor"),
            (None, (TypeError, ValueError), "times must be a tensor"),
            (10, (TypeError, ValueError), "times must be a tensor"),
        ],
    )
    @every_solver
    def test_grids_that_do_not_decrease_in_the_interval(
        self, method: str, times: Any, error: Any, message: str
    ) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(error, match=message):
            solvers.solve(process, SOLVERS[method], start(CLD()), times)

    @pytest.mark.parametrize("solver", [solvers.SSCS, None, "SSCS", 50])
    def test_what_is_no_solver(self, solver: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match=r"solver must be a solver, such as SSCS\(\); got"):
            solvers.solve(process, solver, start(CLD()), GRID)

    def test_a_solver_without_parentheses_is_explained(self) -> None:
        process: Any = ReverseProcess(CLD(), untouchable)
        wrong: Any = solvers.SSCS
        with pytest.raises(TypeError, match="write it with parentheses"):
            solvers.solve(process, wrong, start(CLD()), GRID)

    @pytest.mark.parametrize("process", [CLD(), None, untouchable])
    def test_what_is_no_reverse_process(self, process: Any) -> None:
        with pytest.raises(TypeError, match="process must be a ReverseProcess; got"):
            solvers.solve(process, EM, start(CLD()), GRID)

    @pytest.mark.parametrize("argument", ["noise", "generator"])
    @pytest.mark.parametrize("value", [42, "seed", solvers.FreshNoise])
    def test_what_is_no_source_of_noise(self, argument: str, value: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match=f"{argument} must be"):
            solvers.solve(process, EM, start(CLD()), GRID, **{argument: value})

    @every_solver
    def test_a_start_of_the_data_is_refused_where_it_has_to_be_predicted(self, method: str) -> None:
        process = ReverseProcess(CLD(), untouchable)
        times = solvers.uniform_times(1.0, 0.0, 4)
        with pytest.raises(ValueError, match=r"no density at t = 0; take t > 0"):
            solvers.solve(process, SOLVERS[method], start(CLD()), times, denoise=True)

    @every_solver
    def test_denoising_where_the_score_does_not_determine_the_data(self, method: str) -> None:
        sde = CLD(friction=0.4)
        t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
        kernel = sde.marginal(t)
        b = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, 1, 0]
        zero = float(t[(b[1:] * b[:-1] < 0).nonzero().flatten()[0]])
        times = solvers.uniform_times(1.0, zero, 4)
        process = ReverseProcess(sde, untouchable)
        with pytest.raises(ValueError, match="does not determine x_0"):
            solvers.solve(process, SOLVERS[method], start(sde), times, denoise=True)

    @pytest.mark.parametrize(
        "make",
        [
            VESDE,
            SubVPSDE,
            lambda: LinearSDE.from_matrices([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]]),
            lambda: LinearSDE.from_functions(lambda t: [[-1.0]], lambda t: [[1.0]]),
            lambda: LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]]),
        ],
        ids=["VE", "sub-VP", "free", "functions", "singular"],
    )
    def test_sscs_without_a_stationary_law_to_split_at(self, make: Any) -> None:
        sde = make()
        process = ReverseProcess(sde, untouchable)
        with pytest.raises(
            ValueError, match=r"SSCS needs .*stationary distribution.* Use StochasticHeun"
        ):
            solvers.solve(process, SSCS, start(sde), GRID)

    @pytest.mark.parametrize("shape", [(3, 2, 2), (3, 1, 1), (1, 1, 2), (3, 2), (3, 1, 2, 1)])
    @every_solver
    def test_scores_of_another_shape(self, method: str, shape: tuple[int, ...]) -> None:
        process = ReverseProcess(CLD(), lambda z, t: torch.zeros(shape))
        with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 2\).*got"):
            solvers.solve(process, SOLVERS[method], start(CLD()), GRID)

    @every_solver
    def test_scores_that_are_no_tensors(self, method: str) -> None:
        process = ReverseProcess(CLD(), lambda z, t: None)  # type: ignore[arg-type,return-value]
        with pytest.raises(TypeError, match="score must return a real floating-point tensor"):
            solvers.solve(process, SOLVERS[method], start(CLD()), GRID)

    @pytest.mark.parametrize("dimension", [1, 3])
    @every_solver
    def test_states_of_another_dimension_than_the_data(self, method: str, dimension: int) -> None:
        process = ReverseProcess(CLD(), exact.mixture().score(CLD()))
        with pytest.raises(ValueError, match="2 numbers per component"):
            solvers.solve(process, SOLVERS[method], start(CLD(), (3, dimension)), GRID)

    @pytest.mark.parametrize("solver", [solvers.EulerMaruyama, solvers.SSCS])
    def test_unknown_options(self, solver: Any) -> None:
        with pytest.raises(TypeError, match="unexpected keyword"):
            solver(steps=10)
        with pytest.raises(TypeError, match="positional"):
            solver(10)


class TestSolvers:
    """Solvers are values, and their step is tensor work."""

    @pytest.mark.parametrize("solver", [solvers.EulerMaruyama, solvers.SSCS])
    def test_solvers_are_frozen_values(self, solver: Any) -> None:
        assert solver() == solver()
        assert hash(solver()) == hash(solver())
        assert solver().facts.nfe_per_step == 1
        assert solver().facts.weak_order == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver().option = 1

    @pytest.mark.parametrize("kind", ["mixture", "mixed", "plain"])
    @every_case
    def test_a_step_waits_for_no_value(
        self, method: str, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Each of these would stop the host until the device has the number.
        sde, solver, times = FAMILIES[name](), SOLVERS[method], GRID
        score: Any = exact.mixture().score(sde)
        if kind == "mixed":
            score = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))
        elif kind == "plain":
            score = lambda z, t: -z[:, list(sde.driven)]  # noqa: E731
        process, z = ReverseProcess(sde, score), start(sde)
        known = known_score(process, solver, times, z)
        tables, noise = solver.prepare(process, times), solvers.FreshNoise(generator())
        with no_waiting(monkeypatch), torch.no_grad():
            memory: Memory = ()
            for i in range(len(times) - 1):
                z, memory = solver.step(z, memory, tables, i, known, noise)
        assert z.isfinite().all()

    @every_case
    def test_tables_hold_numbers_of_the_host(self, method: str, name: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, untouchable)
        tables = SOLVERS[method].prepare(process, GRID)

        def entries(table: Any) -> Any:
            if isinstance(table, list | tuple):
                return [x for part in table for x in entries(part)]
            return [table]

        numbers = entries(tables)
        assert any(isinstance(x, float) for x in numbers)
        assert all(x is None or isinstance(x, float | int) for x in numbers)

    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    def test_without_noise_and_with_the_stationary_score_sscs_is_the_reversed_transition(
        self, make: Any
    ) -> None:
        # The kick vanishes: what is left is exact over the whole interval, whatever the steps.
        sde = make()
        stationary = sde.stationary_covariance

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -torch.linalg.solve(stationary, z)[:, list(sde.driven)]

        state = start(sde)
        draws = [torch.zeros_like(state)] * (len(GRID))
        noise = solvers.RecordedNoise(draws)
        found = solvers.solve(ReverseProcess(sde, score), SSCS, state, GRID, noise=noise).state
        mean = sde.stationary_reversal.transition(0.1, 1.0).mean
        expected = torch.einsum("ij,bjd->bid", mean, state)
        # Five moves, each with the promise of the kernels, 1e-12.
        assert torch.allclose(found, expected, rtol=0, atol=5e-12 * float(state.abs().max()))
