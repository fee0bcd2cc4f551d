"""The adaptive probability flow: its solution, tolerance and count, and samples on their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torchdiffeq import odeint

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.solvers import ProbabilityFlow, Solution, solve
from cldsde.validation import propagate_moments
from probes import Recording, initial, start, untouchable
from score import exact

EPS = torch.finfo(torch.float64).eps
FAMILIES: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
}
METHODS = {"bosh3": ("RK23", 3), "dopri5": ("RK45", 6), "dopri8": ("DOP853", 12)}
ORDERS = {"bosh3": 3, "dopri5": 5, "dopri8": 8}

LEVELS = {"bosh3": (1e-4, 10**-6.5), "dopri5": (1e-5, 1e-10), "dopri8": (1e-6, 1e-12)}

every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_method = pytest.mark.parametrize("method", list(METHODS))
every_pace = pytest.mark.parametrize("pace", ["batch", "sample"])
may_fail = pytest.mark.filterwarnings("ignore:the solve failed")


def ends(eps: float = 1e-2, T: float = 1.0) -> torch.Tensor:
    return torch.tensor([T, eps], dtype=torch.float64)


def run(
    sde: LinearSDE,
    score: Any,
    state: torch.Tensor,
    eps: float = 1e-2,
    *,
    denoise: bool = False,
    **options: Any,
) -> Solution:
    process, solver = ReverseProcess(sde, score), ProbabilityFlow(**options)
    return solve(process, solver, state, ends(eps), denoise=denoise)


def gaussian(mean: float = 0.3, variance: float = 0.25, dimension: int = 2) -> GaussianMixture:
    eye = variance * torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture([1.0], [[mean] * dimension], eye.unsqueeze(0))


def exact_flow(sde: LinearSDE, z: torch.Tensor, eps: float) -> torch.Tensor:
    """Flow of `gaussian`, z_t = Psi m + R_t c with a constant c."""
    root = sde.probability_flow_root(ends(eps), initial(sde))
    means = 0.3 * sde.marginal(ends(eps)).mean[..., :1]
    move = root[1] @ torch.linalg.inv(root[0])
    return torch.einsum("ij,bjd->bid", move, z - means[0]) + means[1]


def growth(sde: LinearSDE, eps: float) -> float:
    """How many times the flow of `gaussian` may lengthen an error that it meets on its way."""
    times = torch.linspace(1.0, eps, 50, dtype=torch.float64)
    root = sde.probability_flow_root(times, initial(sde))
    moves = root[-1] @ torch.linalg.inv(root)
    return float(torch.linalg.matrix_norm(moves, 2).max())


class Labelled:
    """A score under VE whose last data axis stands still and may hold the sample's number."""

    sigma_min, sigma_max = 0.05, 20.0

    def __init__(self) -> None:
        self.sde = VESDE(self.sigma_min, self.sigma_max)
        self.inner = exact.mixture().score(self.sde)

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(z[..., :2], t), torch.zeros_like(z[..., :1])], dim=-1)

    def start(self, n: int) -> torch.Tensor:
        """Starts of different sizes, so that samples need different numbers of steps."""
        scale = torch.logspace(0, 2, n, dtype=torch.float64)[:, None, None]
        label = torch.arange(n, dtype=torch.float64)[:, None, None]
        return torch.cat([start(self.sde, (n, 2)) * scale, label], dim=-1)


class TestSolution:
    """The flow that is found is the flow."""

    @every_family
    def test_it_is_the_linear_flow_of_gaussian_data(self, name: str) -> None:
        sde, eps = FAMILIES[name](), 1e-2
        eye = np.eye(sde.components)

        def velocity(t: float, flat: np.ndarray) -> np.ndarray:
            F, G = sde.drift(t), sde.diffusion(t)
            pull = 0.5 * G @ G.mT @ torch.linalg.inv(sde.marginal(t, initial(sde)).covariance)
            return ((F + pull).numpy() @ flat.reshape(eye.shape)).ravel()

        reference = solve_ivp(velocity, (1.0, eps), eye.ravel(), "DOP853", rtol=1e-12, atol=1e-12)
        move = torch.from_numpy(reference.y[:, -1].reshape(eye.shape))
        means = 0.3 * sde.marginal(ends(eps)).mean[..., :1]
        state = start(sde)
        expected = torch.einsum("ij,bjd->bid", move, state - means[0]) + means[1]
        tolerance = 1e-9
        found = run(
            sde, gaussian().score(sde), state, eps, method="dopri8", rtol=tolerance, atol=tolerance
        )
        assert found.success
        # Each accepted step errs by at most the tolerance in units of 1 + |z|, a root mean square
        # over 2k numbers, and the flow lengthens that by no more than `growth`.
        size = (1 + float(state.abs().max())) * math.sqrt(2 * sde.components)
        bound = found.stats["attempts"] * tolerance * size * growth(sde, eps)
        assert float((found.state - expected).abs().max()) <= bound
        assert bound < 1e-5
        # Both references, one of which is used below; the first has errors of its own, 1e-12 a
        # step in a few hundred steps, lengthened likewise.
        assert torch.allclose(exact_flow(sde, state, eps), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_it_is_that_of_torchdiffeq(self, name: str) -> None:
        sde = FAMILIES[name]()
        score, state, tolerance = exact.mixture().score(sde), start(sde), 1e-7
        process = ReverseProcess(sde, score)
        expected = odeint(
            lambda t, z: process.probability_flow(z, t),
            state,
            ends(),
            method="dopri5",
            rtol=tolerance,
            atol=tolerance,
            options={"step_t": ends()[1:]},
        )[-1]
        found = run(sde, score, state, rtol=tolerance, atol=tolerance)
        assert found.success
        # Two solutions with errors as above; modes may part by a factor that a mixture allows, for
        # which 10 is added.
        size = (1 + float(state.abs().max())) * math.sqrt(2 * sde.components)
        bound = 20 * found.stats["attempts"] * tolerance * size * growth(sde, 1e-2)
        assert float((found.state - expected).abs().max()) <= bound
        assert bound < 0.05

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_data_may_be_numbers(self, dtype: torch.dtype) -> None:
        sde, v = VESDE(0.05, 20.0), 0.25
        state = start(sde, (5,), dtype)
        assert state.shape == (5, 1)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -z / (v + (0.05 * 400**t) ** 2).unsqueeze(1)

        found = run(sde, score, state)
        variance = v + (0.05 * 400 ** ends()) ** 2
        expected = state * (variance[1] / variance[0]).sqrt().to(dtype)
        assert found.state.shape == (5, 1)
        assert found.data.shape == (5,)
        # 50 steps of 1e-5 at most, in units of 1 + |z|.
        assert torch.allclose(found.state, expected, rtol=0, atol=5e-4 * 40)

    @every_family
    def test_single_precision_states_agree_with_double(self, name: str) -> None:
        sde = FAMILIES[name]()
        score, state = gaussian().score(sde), start(sde, dtype=torch.float32)
        found = run(sde, score, state, rtol=1e-4, atol=1e-4)
        expected = exact_flow(sde, state.double(), 1e-2)
        assert found.success
        assert found.state.dtype == found.data.dtype == torch.float32
        size = (1 + float(state.abs().max())) * math.sqrt(2 * sde.components)
        # The tolerance is far above rounding, 6e-8.
        bound = 2 * found.stats["attempts"] * 1e-4 * size * growth(sde, 1e-2)
        assert float((found.state - expected).abs().max()) <= bound

    def test_the_state_is_not_changed_and_shapes_are_kept(self) -> None:
        sde = CLD()
        state = start(sde, (2, 1, 2))
        before = state.clone()
        found = run(sde, gaussian().score(sde), state)
        assert torch.equal(state, before)
        assert found.state.shape == (2, 2, 1, 2)
        assert found.data.shape == (2, 1, 2)
        flat = run(sde, gaussian().score(sde), state.flatten(2))
        assert torch.equal(flat.state, found.state.flatten(2))

    @every_pace
    def test_denoising_is_the_data_prediction_and_counts_one_evaluation(self, pace: str) -> None:
        sde = CLD()
        process, state = ReverseProcess(sde, exact.mixture().score(sde)), start(sde)
        plain = run(sde, process.score, state, pace=pace)
        denoised = run(sde, process.score, state, pace=pace, denoise=True)
        assert torch.equal(plain.data, plain.state[:, 0])
        assert torch.equal(denoised.state, plain.state)
        expected = process.data_prediction(denoised.state, 1e-2)
        assert torch.allclose(denoised.data, expected, rtol=1e-10, atol=1e-10)
        assert denoised.nfev == plain.nfev + 1
        assert torch.equal(denoised.stats["nfev"], plain.stats["nfev"] + 1)


class TestTolerance:
    """Errors follow the tolerance, and the number of steps follows the order."""

    @every_method
    @pytest.mark.parametrize("name", ["VP", "VE", "CLD"])
    def test_errors_are_as_large_as_the_tolerance(self, name: str, method: str) -> None:
        sde = FAMILIES[name]()
        state = start(sde, (16, 2))
        expected = exact_flow(sde, state, 1e-2)
        errors, attempts = [], []
        levels = LEVELS[method]
        for tolerance in levels:
            options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "pace": "sample"}
            found = run(sde, gaussian().score(sde), state, method=method, **options)
            errors.append(float((found.state - expected).square().mean().sqrt()))
            attempts.append(found.stats["attempts"])
        # The step length is that at which the estimate, of order p, meets the tolerance; the error
        # of what is kept is proportional to it, h^p each, so error ~ tolerance and
        # steps ~ tolerance^(-1/p). Coarse runs take as few as ten attempts, a third of them to find
        # the first step and its rejections: log10(3/2) p / decades, 0.2 to 0.3.
        decades = math.log10(levels[0] / levels[1])
        slope = math.log10(errors[0] / errors[1]) / decades
        assert 0.8 <= slope <= 1.2
        rate = ORDERS[method] * math.log10(attempts[1] / attempts[0]) / decades
        assert 0.65 <= rate <= 1.2

    @every_method
    @pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-3), (1e-7, 1e-4), (1e-4, 1e-7)])
    @pytest.mark.parametrize("name", ["VP", "VE", "CLD"])
    def test_evaluations_are_as_many_as_those_of_scipy(
        self, name: str, rtol: float, atol: float, method: str
    ) -> None:
        sde = FAMILIES[name]()
        process, state = ReverseProcess(sde, exact.mixture().score(sde)), start(sde, (1, 2))

        def velocity(t: float, flat: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(flat.reshape(state.shape))
            return process.probability_flow(z, t).numpy().ravel()

        scipy_method, stages = METHODS[method]
        expected = solve_ivp(
            velocity, (1.0, 1e-2), state.numpy().ravel(), scipy_method, rtol=rtol, atol=atol
        )
        found = run(sde, process.score, state, method=method, rtol=rtol, atol=atol)
        # The same formulas; a rejection may tip over by rounding.
        assert abs(found.nfev - expected.nfev) <= max(stages, 0.05 * expected.nfev)
        scale = atol + rtol * np.abs(expected.y[:, -1])
        assert np.all(np.abs(found.state.numpy().ravel() - expected.y[:, -1]) <= scale)


class TestSamples:
    """With ``pace="sample"`` each sample has step lengths of its own, whatever the others do."""

    # Coefficients of one time or of several differ by rounding, as do sums in batches of other
    # sizes. Against error estimates of the size of the tolerance these are a part in 1e9 or so,
    # and so are changes of the step length, of which the result feels its own error times that; a
    # thousandth of the tolerance is ample.
    TOLERANCE = 1e-8

    @every_method
    @pytest.mark.parametrize("name", ["VP", "VE", "CLD"])
    def test_a_sample_does_not_depend_on_its_batch(self, name: str, method: str) -> None:
        sde = FAMILIES[name]()
        score, state = exact.mixture().score(sde), start(sde)
        state[1] *= 3
        options: dict[str, Any] = {"method": method, "rtol": 1e-4, "atol": 1e-4, "pace": "sample"}
        together = run(sde, score, state, **options)
        alone = [run(sde, score, state[i : i + 1], **options) for i in range(3)]
        found = torch.cat([one.state for one in alone])
        assert torch.allclose(together.state, found, rtol=self.TOLERANCE, atol=self.TOLERANCE)
        assert together.stats["nfev"].tolist() == [one.nfev for one in alone]

    @every_method
    def test_the_order_of_samples_does_not_matter(self, method: str) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde, (7, 2))
        state *= torch.logspace(0, 1, 7, dtype=torch.float64)[:, None, None]
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        one = run(sde, score, state, method=method, pace="sample")
        other = run(sde, score, state[order], method=method, pace="sample")
        assert torch.allclose(
            one.state[order], other.state, rtol=self.TOLERANCE, atol=self.TOLERANCE
        )
        assert torch.equal(one.stats["nfev"][order], other.stats["nfev"])

    @every_method
    def test_evaluations_are_those_that_each_sample_saw(self, method: str) -> None:
        labelled = Labelled()
        score = Recording(labelled)
        state = labelled.start(6)
        found = run(labelled.sde, score, state, method=method, pace="sample")
        seen = Counter(i for z in score.states for i in z[:, 0, 2].tolist())
        assert found.success
        assert found.stats["nfev"].dtype == torch.int64
        assert found.stats["nfev"].tolist() == [seen[i] for i in range(6)]
        assert found.nfev == max(seen.values())
        assert len(set(seen.values())) > 1
        # Two at the start, then all stages but the first of each attempt.
        stages = METHODS[method][1]
        assert all((n - 2) % stages == 0 for n in seen.values())
        assert found.nfev == 2 + stages * found.stats["attempts"]
        assert len(score.states) == found.nfev
        assert torch.equal(found.state[:, 0, 2], state[:, 0, 2])

    def test_samples_that_arrived_are_asked_no_more(self) -> None:
        labelled = Labelled()
        score = Recording(labelled)
        found = run(labelled.sde, score, labelled.start(6), pace="sample")
        sizes = [len(z) for z in score.states]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 6
        assert sizes[-1] < 6
        last = {
            i: t
            for z, ts in zip(score.states, score.times, strict=True)
            for i, t in zip(z[:, 0, 2].tolist(), ts.tolist(), strict=True)
        }
        assert set(last.values()) == {1e-2}
        slowest = found.stats["nfev"].argmax().item()
        assert slowest in score.states[-1][:, 0, 2].tolist()

    @every_pace
    @every_method
    @every_family
    def test_times_stay_in_the_interval(self, name: str, method: str, pace: str) -> None:
        # Few and long steps: the last one often starts above twice the end, where t - (t - end)
        # is not end.
        sde = FAMILIES[name]()
        for eps in torch.logspace(-3, -0.5, 8, dtype=torch.float64).tolist():
            score = Recording(gaussian().score(sde))
            run(sde, score, start(sde), eps, method=method, rtol=0.1, atol=0.1, pace=pace)
            times = torch.cat(score.times)
            assert times.dtype == torch.float64
            assert times.max().item() == 1.0
            assert times.min().item() == eps

    @pytest.mark.parametrize(
        ("dtype", "asked"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_times_have_the_type_of_the_state_or_single_precision(
        self, dtype: torch.dtype, asked: torch.dtype
    ) -> None:
        sde = CLD()
        score = Recording(lambda z, t: -4 * z[:, 1:])
        found = run(sde, score, start(sde).to(dtype), rtol=0.05, atol=0.05, pace="sample")
        assert found.state.dtype == dtype
        assert {t.dtype for t in score.times} == {asked}
        assert {t.shape for t in score.times} <= {(n,) for n in (1, 2, 3)}
        rounded = ends().to(asked)
        assert min(t.min().item() for t in score.times) == rounded[1].item()

    @every_pace
    @every_method
    def test_an_empty_batch_stays_empty(self, method: str, pace: str) -> None:
        sde = CLD()
        for denoise in (False, True):
            found = run(
                sde, untouchable, torch.zeros(0, 2, 2), method=method, pace=pace, denoise=denoise
            )
            assert found.success
            assert found.state.shape == (0, 2, 2)
            assert found.data.shape == (0, 2)
            assert found.nfev == 0


class TestBatch:
    """By default the whole batch has one step size."""

    @every_method
    @every_family
    def test_steps_are_those_of_scipy(self, name: str, method: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        state = sde.prior.sample(
            (20, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

        def velocity(t: float, y: Any) -> Any:
            return process.probability_flow(torch.from_numpy(y).reshape(state.shape), t).flatten()

        expected = solve_ivp(
            velocity, (1.0, 1e-2), state.numpy().ravel(), METHODS[method][0], rtol=1e-4, atol=1e-4
        )
        solver = ProbabilityFlow(method=method, rtol=1e-4, atol=1e-4)
        found = solve(process, solver, state, ends())
        # The same formulas; a rejection may tip over by rounding, and is repeated within tolerance.
        stages = METHODS[method][1]
        assert abs(found.nfev - expected.nfev) <= max(stages, 0.05 * expected.nfev)
        last = torch.from_numpy(expected.y[:, -1]).reshape(state.shape)
        assert ((found.state - last).abs() <= 1e-4 * (1 + last.abs())).all()

    @every_method
    def test_samples_share_their_evaluations(self, method: str) -> None:
        labelled = Labelled()
        score, state = Recording(labelled), labelled.start(6)
        found = run(labelled.sde, score, state, method=method)
        assert found.success
        assert found.stats["nfev"].tolist() == [found.nfev] * 6
        assert len(score.states) == found.nfev == 2 + METHODS[method][1] * found.stats["attempts"]
        assert {z.shape for z in score.states} == {state.shape}
        assert all((t == t[0]).all() for t in score.times)

    def test_a_sample_depends_on_its_batch(self) -> None:
        labelled = Labelled()
        state = labelled.start(6)
        together = run(labelled.sde, labelled, state)
        # Within the tolerance: a few hundred steps that err by 1e-5 of states up to 100.
        alone = run(labelled.sde, labelled, state[:1])
        assert alone.nfev != together.nfev
        assert not torch.equal(alone.state, together.state[:1])
        assert torch.allclose(alone.state, together.state[:1], rtol=0, atol=300 * 1e-5 * 100)

    def test_all_samples_have_arrived_when_one_has(self) -> None:
        sde, times = CLD(), []
        process = ReverseProcess(sde, gaussian().score(sde))
        solve(
            process,
            ProbabilityFlow(),
            start(sde),
            ends(),
            callback=lambda number, t, z: times.append((t.shape, len(set(t.tolist())))),
        )
        assert set(times) == {(torch.Size([3]), 1)}

    @may_fail
    def test_a_sample_that_fails_takes_the_others_with_it(self) -> None:
        labelled = Labelled()

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.where(z[..., 2:] == 0, math.nan, labelled(z, t))

        state = labelled.start(3)
        assert not run(labelled.sde, score, state).stats["success"].any()
        alone = run(labelled.sde, score, state, pace="sample")
        assert alone.stats["success"].tolist() == [False, True, True]


@may_fail
class TestFailure:
    """What cannot be done ends soon, is said, and leaves a finite state."""

    @every_pace
    @every_method
    @pytest.mark.parametrize("denoise", [False, True])
    def test_too_few_evaluations_are_reported(self, method: str, denoise: bool, pace: str) -> None:
        sde = CLD()
        score = Recording(exact.mixture().score(sde))
        for most in (20, 50):
            score.states.clear()
            found = run(
                sde,
                score,
                start(sde),
                method=method,
                rtol=1e-12,
                atol=1e-12,
                max_nfev=most,
                pace=pace,
                denoise=denoise,
            )
            assert not found.success
            assert found.status == 1
            assert f"max_nfev: {most}" in found.message
            assert len(score.states) == found.nfev <= most
            assert found.nfev > most - METHODS[method][1]
            assert found.state.isfinite().all()
            assert torch.equal(found.data, found.state[:, 0])

    @every_pace
    @every_method
    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_the_start_counts_too(self, method: str, most: int, pace: str) -> None:
        options: dict[str, Any] = {"method": method, "max_nfev": most, "pace": pace}
        found = run(CLD(), lambda z, t: -z[:, 1:], start(CLD()), **options)
        assert not found.success
        assert found.nfev <= most

    def test_enough_evaluations_are_enough(self) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde)
        needed = run(sde, score, state).nfev
        assert run(sde, score, state, max_nfev=needed).success
        assert not run(sde, score, state, max_nfev=needed - 1).success

    @every_pace
    @every_method
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("since", [1.0, 0.5])
    def test_a_score_that_is_not_finite_is_reported(
        self, method: str, value: float, since: float, pace: str
    ) -> None:
        sde = CLD()

        def sick(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.where((t <= since)[:, None, None], value, -4 * z[:, 1:])

        found = run(sde, sick, start(sde), method=method, pace=pace)
        assert not found.success
        assert "the score is not finite" in found.message
        assert found.state.isfinite().all()
        # Once met, the distance to the first NaN, or the step, shrinks fivefold in at most four
        # attempts: two rejections, one step, one that may grow. 1e-14 is 21 times that.
        score = Recording(sick)
        run(sde, score, start(sde)[:1], method=method, pace=pace)
        healthy = [float(t) > since for t in score.times]
        first = healthy.index(False) if False in healthy else len(healthy)
        assert len(healthy) - first <= 84 * METHODS[method][1]

    @every_method
    def test_a_trial_step_out_of_the_domain_is_repeated_shorter(self, method: str) -> None:
        # As of a network in half precision, which has no number far from where samples are.
        sde, state = VESDE(0.05, 20.0), torch.full((1, 1, 1), 10.0, dtype=torch.float64)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            variance = (1 + (0.05 * 400**t) ** 2)[:, None, None]
            return -z / variance * (calls.pop(0) if calls else 1.0)

        # All stages of the first attempt but one are numbers.
        calls = [1.0, 1.0, 1.0, math.nan]
        found = run(sde, score, state, method=method)
        assert found.success
        variance = 1 + (0.05 * 400 ** ends()) ** 2
        # 100 steps of 1e-5 in units of 11 at most.
        assert torch.allclose(
            found.state, state * (variance[1] / variance[0]).sqrt(), rtol=0, atol=1e-2
        )

    @every_method
    @pytest.mark.parametrize("tolerance", [1e-300, 1e-17])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tolerances_out_of_reach_end(
        self, method: str, tolerance: float, dtype: torch.dtype
    ) -> None:
        sde = CLD()
        found = run(
            sde,
            exact.mixture().score(sde),
            start(sde, dtype=dtype),
            method=method,
            rtol=tolerance,
            atol=tolerance,
            max_nfev=300,
        )
        assert not found.success
        assert "max_nfev" in found.message or "cannot be met" in found.message
        assert found.nfev <= 300
        assert found.state.isfinite().all()

    @every_method
    def test_a_jump_in_time_is_passed(self, method: str) -> None:
        sde = VESDE(0.05, 20.0)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -z * torch.where(t > 0.5, 0.01, 0.03)[:, None, None]

        state = start(sde)
        found = run(sde, score, state, method=method)
        sigma = 0.05 * 400 ** torch.tensor([1.0, 0.5, 1e-2], dtype=torch.float64)
        passed = 0.01 * (sigma[0] ** 2 - sigma[1] ** 2) + 0.03 * (sigma[1] ** 2 - sigma[2] ** 2)
        assert found.success
        # A few hundred steps of 1e-5 in units of 1 + |z| < 100.
        expected = state * torch.exp(-0.5 * passed)
        assert torch.allclose(found.state, expected, rtol=0, atol=0.2)
        assert torch.allclose(found.state, expected, rtol=0, atol=500 * 1e-5 * 50)

    def test_a_jump_that_catches_the_path_ends(self) -> None:
        # The score points to zero from both sides: the path chatters about it.
        sde = CLD()
        found = run(sde, lambda z, t: -30 * z[:, 1:].sign(), start(sde), max_nfev=3000)
        assert found.nfev <= 3000
        assert found.state.isfinite().all()
        assert found.success or "max_nfev" in found.message or "cannot be met" in found.message

    def test_a_step_that_ends_just_above_the_end_is_no_underflow(self) -> None:
        # Nothing moves, so steps grow tenfold from 1e-6: two of them end within a few roundings of
        # these ends.
        sde = VESDE(0.05, 20.0)
        state = torch.ones(1, 1, 1, dtype=torch.float64)
        process = ReverseProcess(sde, lambda z, t: torch.zeros_like(z))
        for roundings in range(-20, 21):
            times = ends(1 - 1e-6 - 1e-5 + roundings * EPS / 2)
            assert solve(process, ProbabilityFlow(), state, times).success


class TestRefusals:
    """Options and uses that are refused."""

    @pytest.mark.parametrize("method", ["rk4", "RK45", "", None])
    def test_unknown_methods(self, method: Any) -> None:
        with pytest.raises(ValueError, match="method must be one of 'bosh3', 'dopri5', 'dopri8'"):
            ProbabilityFlow(method=method)

    @pytest.mark.parametrize("option", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [0.0, -1e-5, math.nan, math.inf])
    def test_tolerances_that_are_not_positive(self, option: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{option} must be finite and positive"):
            ProbabilityFlow(**{option: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("option", ["rtol", "atol", "max_nfev"])
    @pytest.mark.parametrize("value", ["1", None, True])
    def test_options_that_are_no_numbers(self, option: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{option} must be a real number"):
            ProbabilityFlow(**{option: value})

    def test_unknown_paces(self) -> None:
        with pytest.raises(ValueError, match="pace must be one of 'batch', 'sample'; got 'both'"):
            ProbabilityFlow(pace="both")  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [0, -1])
    def test_less_than_one_evaluation(self, value: int) -> None:
        with pytest.raises(ValueError, match="max_nfev must be"):
            ProbabilityFlow(max_nfev=value)

    def test_options_without_a_name(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            ProbabilityFlow("dopri5")  # type: ignore[misc]

    def test_moments_are_for_grids(self) -> None:
        process = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match="fixed grid; ProbabilityFlow is adaptive"):
            propagate_moments(
                process,
                ProbabilityFlow(),  # type: ignore[arg-type]
                ends(),
                torch.zeros(2, 1),
                torch.eye(2),
            )

    @pytest.mark.parametrize("rows", [2, 3])
    def test_scores_of_another_shape(self, rows: int) -> None:
        with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 2\)"):
            run(CLD(), lambda z, t: torch.zeros(3, rows, 2), start(CLD()))

    def test_states_that_are_not_finite(self) -> None:
        state = start(CLD())
        state[0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="state must be finite"):
            run(CLD(), untouchable, state)

    @pytest.mark.parametrize(("method", "order"), list(ORDERS.items()))
    def test_solvers_are_values_that_declare_their_order(self, method: str, order: int) -> None:
        solver = ProbabilityFlow(method=method)
        assert solver == ProbabilityFlow(method=method)
        assert hash(solver) == hash(ProbabilityFlow(method=method))
        assert solver.facts.ode_order == order
        assert solver.facts.nfe_per_step == METHODS[method][1]
        assert solver.facts.weak_order is None


@every_pace
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_far_above_the_tolerance_do_not_overflow_half_precision(
    dtype: torch.dtype, pace: Any
) -> None:
    sde, data = CLD(), GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    start = sde.prior.sample((500, 1), generator=torch.Generator().manual_seed(0)).to(dtype)
    ends = torch.tensor([1.0, 1e-2], dtype=torch.float64)
    solver = ProbabilityFlow(rtol=1e-2, atol=1e-2, pace=pace)
    found = solve(ReverseProcess(sde, data.score(sde)), solver, start, ends)
    assert found.success
    # Five standard errors of the mean, and two roundings to eight bits.
    assert abs(float(found.data.float().mean()) - 0.3) <= 5 * 0.5 / 500**0.5 + 2 * 2**-9
