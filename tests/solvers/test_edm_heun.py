"""`EDMHeun` is algorithm 2 of Karras et al. (2022), written anew in numpy.

The reference works on data scaled to x/alpha, with the noise levels

    VE   low (high / low)^t,        VP   (e^B - 1)^1/2,        sub-VP   2 sinh(B / 2),

B the integral of beta from 0 to t and alpha = e^{-B/2} (1 for VE), and with the data prediction D
of a mixture in closed form. Of the package it uses nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

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
    Schedule,
    SubVPSDE,
    solvers,
)
from cldsde.solvers import EDMHeun, Langevin, PredictorCorrector
from cldsde.solvers.authoring import Memory
from cldsde.validation import propagate_moments
from probes import Recording, generator, known_score, no_waiting, start, untouchable
from score.exact import Constant

Array = np.ndarray[Any, np.dtype[np.float64]]
Denoiser = Callable[[Array, float], Array]


class Levels(NamedTuple):
    """The scale alpha and the noise level sigma = std / alpha of a process, in numpy."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]


def clock(t: Array) -> Array:
    return 0.1 * t + 7.9 * t**2 / 2


def ones(t: Array) -> Array:
    return np.ones_like(t)


def half(t: Array) -> Array:
    return np.exp(-clock(t) / 2)


PROCESSES: dict[str, tuple[Callable[[], LinearSDE], Levels]] = {
    "VE": (lambda: VESDE(0.1, 5.0), Levels(ones, lambda t: 0.1 * 50.0**t)),
    "VE, from 0": (
        lambda: LinearSDE.from_matrices([[0.0]], [[1.0]], Schedule.geometric(0.1, 5.0)),
        Levels(ones, lambda t: 0.1 * np.sqrt(np.expm1(2 * t * math.log(50.0)))),
    ),
    "VP": (lambda: VPSDE(0.1, 8.0), Levels(half, lambda t: np.sqrt(np.expm1(clock(t))))),
    "sub-VP": (lambda: SubVPSDE(0.1, 8.0), Levels(half, lambda t: 2 * np.sinh(clock(t) / 2))),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))

WEIGHTS = np.array([0.3, 0.3, 0.4])
CENTRES = np.array([[-1.0, 0.2], [0.8, 0.8], [0.4, -1.0]])
VARIANCES = np.array([0.04, 0.09])
MODES = GaussianMixture(
    WEIGHTS.tolist(), CENTRES.tolist(), [np.diag(VARIANCES).tolist()] * len(WEIGHTS)
)
MEAN, VARIANCE = 0.3, 0.25
DATA = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])
POINT = np.array([0.7, -1.2])


def denoise(x: Array, sigma: float) -> Array:
    """E[x_0 | x_0 + sigma n = x] for the data of three modes."""
    total = VARIANCES + sigma**2
    away = x[:, None] - CENTRES
    log_terms = np.log(WEIGHTS) - 0.5 * (away**2 / total).sum(-1)
    shares = np.exp(log_terms - log_terms.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    means = CENTRES + VARIANCES / total * away
    result: Array = (shares[..., None] * means).sum(1)
    return result


def algorithm(
    D: Denoiser,
    x: Array,
    levels: Array,
    draws: Sequence[Array] = (),
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    noise_scale: float = 1.0,
) -> Array:
    """Algorithm 2, but that no level is raised above the first."""
    n, normals = len(levels) - 1, iter(draws)
    for i in range(n):
        low, high = churn_range
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= levels[i] <= high else 0.0
        sigma = min(levels[i] * (1 + gamma), levels[0])
        if sigma > levels[i]:
            added = math.sqrt(sigma**2 - levels[i] ** 2)
            x = x + added * noise_scale * next(normals)
        slope = (x - D(x, sigma)) / sigma
        step = levels[i + 1] - sigma
        following = x + step * slope
        if levels[i + 1] > 0:
            other = (following - D(following, levels[i + 1])) / levels[i + 1]
            following = x + step * (slope + other) / 2
        x = following
    assert next(normals, None) is None
    return x


def normals(count: int, shape: tuple[int, ...] = (4, 1, 2)) -> list[torch.Tensor]:
    g = generator(3)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def both(
    name: str,
    times: torch.Tensor,
    draws: Sequence[torch.Tensor] = (),
    data: GaussianMixture = MODES,
    D: Denoiser = denoise,
    **options: Any,
) -> tuple[Array, Array]:
    """Data of the solver and of the algorithm, in the solver's scale; all the noise is used."""
    make, levels = PROCESSES[name]
    sde, t = make(), times.numpy()
    z = start(sde, (4, 2))
    noise = solvers.RecordedNoise(draws)
    process = ReverseProcess(sde, data.score(sde))
    solution = solvers.solve(process, EDMHeun(**options), z, times, noise=noise)
    assert solution.success
    with pytest.raises(ValueError, match="which are used up"):
        noise.normal(z, 1)
    alpha = levels.alpha(t)
    expected = algorithm(
        D,
        z[:, 0].numpy() / alpha[0],
        levels.sigma(t),
        [draw[:, 0].numpy() for draw in draws],
        **options,
    )
    return solution.data.numpy(), alpha[-1] * expected


def close(found: Array, expected: Array) -> None:
    # Scores and predictions convert with an error of some 1e-13 of states of size 10, which the
    # slope of the prediction between the modes may raise.
    assert found.dtype == expected.dtype == np.float64
    assert abs(found - expected).max() <= 1e-10


N = 9
GRID = solvers.root_times(1.0, 0.02, N)
TO_ZERO = torch.cat([GRID, torch.zeros(1, dtype=torch.float64)])
CHURNS: list[dict[str, Any]] = [
    {"churn": 1.5},
    {"churn": 1.5, "noise_scale": 1.007},
    {"churn": 100.0, "noise_scale": 0.9},
]


class TestAlgorithm:
    """Numbers are those of the algorithm, given the same normals."""

    @every_process
    @pytest.mark.parametrize("steps", [1, 2, N])
    def test_without_churn(self, name: str, steps: int) -> None:
        close(*both(name, solvers.root_times(1.0, 0.02, steps)))

    @every_process
    @pytest.mark.parametrize("options", CHURNS, ids=str)
    def test_with_churn(self, name: str, options: dict[str, Any]) -> None:
        # All steps but the first have noise.
        close(*both(name, GRID, normals(N - 1), **options))

    @every_process
    @pytest.mark.parametrize("options", CHURNS[1:], ids=str)
    def test_with_churn_in_a_range_of_levels(self, name: str, options: dict[str, Any]) -> None:
        levels = PROCESSES[name][1].sigma(GRID.numpy())
        # Ends of the range between levels, and three levels inside.
        low, high = math.sqrt(levels[6] * levels[7]), math.sqrt(levels[3] * levels[4])
        close(*both(name, GRID, normals(3), **options, churn_range=(low, high)))
        close(*both(name, GRID, normals(N - 7), **options, churn_range=(0.0, low)))
        close(*both(name, GRID, normals(3), **options, churn_range=(high, math.inf)))
        close(*both(name, GRID, **options, churn_range=(2 * levels[0], math.inf)))

    @every_process
    def test_a_short_grid_raises_no_level_above_the_first(self, name: str) -> None:
        # The second level times sqrt(2) is above the first.
        levels = PROCESSES[name][1]
        times = torch.cat([torch.tensor([1.0, 0.97], dtype=torch.float64), GRID[2:]])
        sigma = levels.sigma(times.numpy())
        assert sigma[1] < sigma[0] < math.sqrt(2) * sigma[1]
        close(*both(name, times, normals(len(times) - 2), churn=100.0))

    @every_process
    @pytest.mark.parametrize("options", [{}, *CHURNS], ids=str)
    def test_a_grid_that_ends_at_zero(self, name: str, options: dict[str, Any]) -> None:
        close(*both(name, TO_ZERO, normals(N if options else 0), **options))
        one = torch.tensor([1.0, 0.0], dtype=torch.float64)
        close(*both(name, one, **options))

    @every_process
    def test_the_last_step_is_euler_s_where_the_level_is_zero_alone(self, name: str) -> None:
        make, levels = PROCESSES[name]
        sde, t = make(), TO_ZERO[-2:].numpy()
        score, z = Recording(MODES.score(sde)), start(sde, (4, 2))
        found = solvers.solve(ReverseProcess(sde, score), EDMHeun(), z, TO_ZERO[-2:]).data.numpy()
        sigma, alpha = levels.sigma(t), levels.alpha(t)
        x = z[:, 0].numpy() / alpha[0]
        slope = (x - denoise(x, sigma[0])) / sigma[0]
        euler = x + (sigma[1] - sigma[0]) * slope
        if name == "VE":
            # Its level at time 0 is 0.1.
            assert [at[0].item() for at in score.times] == TO_ZERO[-2:].tolist()
            assert abs(found - euler).max() > 1e-3
            slope = (slope + (euler - denoise(euler, sigma[1])) / sigma[1]) / 2
            close(found, x + (sigma[1] - sigma[0]) * slope)
        else:
            assert [at[0].item() for at in score.times] == TO_ZERO[-2:-1].tolist()
            close(found, alpha[1] * euler)

    @every_process
    def test_a_level_that_is_an_end_of_the_range_is_inside_however_it_is_rounded(
        self, name: str
    ) -> None:
        levels = PROCESSES[name][1].sigma(GRID.numpy())
        process = ReverseProcess(PROCESSES[name][0](), MODES.score(PROCESSES[name][0]()))

        def churned(low: float, high: float) -> torch.Tensor:
            # Four levels have churn, or the record is not used up.
            noise, z = solvers.RecordedNoise(normals(4)), start(process.sde, (4, 2))
            solver = EDMHeun(churn=1.5, churn_range=(low, high))
            state = solvers.solve(process, solver, z, GRID, noise=noise).state
            with pytest.raises(ValueError, match="which are used up"):
                noise.normal(z, 1)
            return state

        low, high = float(levels[7]), float(levels[4])
        expected = churned(0.99 * low, 1.01 * high)
        for s, r in ((math.inf, 0.0), (low, high), (0.0, math.inf)):
            assert torch.equal(churned(math.nextafter(low, s), math.nextafter(high, r)), expected)
        for only in (low, high):
            solver = EDMHeun(churn=1.5, churn_range=(only, only))
            noise = solvers.RecordedNoise(normals(1))
            solvers.solve(process, solver, start(process.sde, (4, 2)), GRID, noise=noise)
            with pytest.raises(ValueError, match="which are used up"):
                noise.normal(start(process.sde, (4, 2)), 1)

    @pytest.mark.parametrize("name", ["VE, from 0", "VP", "sub-VP"])
    def test_the_last_step_to_level_zero_is_the_data_prediction(self, name: str) -> None:
        make, levels = PROCESSES[name]
        sde = make()
        times = torch.tensor([0.3, 0.0], dtype=torch.float64)
        z = start(sde, (4, 2))
        found = solvers.solve(ReverseProcess(sde, MODES.score(sde)), EDMHeun(), z, times).data
        t = times.numpy()
        x = z[:, 0].numpy() / levels.alpha(t)[0]
        close(found.numpy(), denoise(x, float(levels.sigma(t)[0])))

    def test_the_options_matter(self) -> None:
        # Otherwise agreement with the algorithm would say little.
        draws = normals(N - 1)
        levels = PROCESSES["VP"][1].sigma(GRID.numpy())
        results = [both("VP", GRID)[0], both("VP", TO_ZERO)[0]]
        results += [both("VP", GRID, draws, **options)[0] for options in CHURNS]
        bounds = (0.999 * float(levels[7]), 1.001 * float(levels[4]))
        results.append(both("VP", GRID, draws[:4], churn=1.5, churn_range=bounds)[0])
        for one, other in itertools.combinations(results, 2):
            assert abs(one - other).max() > 1e-3


class TestDiffusers:
    """It does what the schedulers of the library diffusers do."""

    @staticmethod
    def setting(name: str, times: torch.Tensor) -> tuple[Array, torch.Tensor, torch.Tensor]:
        make, levels = PROCESSES[name]
        t = times.numpy()
        z = start(make(), (4, 2))
        sigma = torch.from_numpy(levels.sigma(t))
        return levels.alpha(t), sigma, z[:, 0] / levels.alpha(t)[0]

    @staticmethod
    def prediction(x: torch.Tensor, sigma: Any) -> torch.Tensor:
        return torch.from_numpy(denoise(x.numpy(), float(sigma)))

    @pytest.mark.parametrize("name", ["VE, from 0", "VP", "sub-VP"])
    @pytest.mark.parametrize("kind", ["sample", "epsilon"])
    def test_heun(self, name: str, kind: str) -> None:
        diffusers = pytest.importorskip("diffusers")
        alpha, sigma, x = self.setting(name, TO_ZERO)
        n = len(sigma) - 1
        scheduler = diffusers.HeunDiscreteScheduler(prediction_type=kind)
        scheduler.set_timesteps(n)
        inner = sigma[1:-1].repeat_interleave(2)
        scheduler.sigmas = torch.cat([sigma[:1], inner, sigma[-1:]])
        scheduler.set_begin_index(0)
        for i, timestep in enumerate(scheduler.timesteps):
            # The second stage of a step asks at its end, where the next step begins.
            level = sigma[(i + 1) // 2]
            output = self.prediction(x, level)
            if kind == "epsilon":
                output = (x - output) / level
            x = scheduler.step(output, timestep, x).prev_sample
        assert i == 2 * n - 2
        assert x.dtype == torch.float64
        close(both(name, TO_ZERO)[0], alpha[-1] * x.numpy())

    @every_process
    @pytest.mark.parametrize("options", CHURNS, ids=str)
    def test_karras_ve(
        self, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = pytest.importorskip("diffusers.schedulers.deprecated.scheduling_karras_ve")
        alpha, sigma, x = self.setting(name, GRID)
        # It knows no highest level: none is raised that would cross it.
        bounds = (float(sigma[7]) * 0.99, float(sigma[4]) * 1.01)
        assert bounds[1] * math.sqrt(2) < sigma[0]
        scheduler = module.KarrasVeScheduler(
            s_noise=options.get("noise_scale", 1.0),
            s_churn=options["churn"],
            s_min=bounds[0],
            s_max=bounds[1],
        )
        scheduler.set_timesteps(N)
        # It draws at every step, also where it adds nothing, and in single precision.
        draws = normals(N)
        source = iter(draws)
        monkeypatch.setattr(module, "randn_tensor", lambda shape, generator: next(source)[:, 0])
        for level, low in itertools.pairwise(sigma):
            raised, high = scheduler.add_noise_to_input(x, level)
            output = (self.prediction(raised, high) - raised) / high
            one = scheduler.step(output, high, low, raised)
            output = (self.prediction(one.prev_sample, low) - one.prev_sample) / low
            x = scheduler.step_correct(
                output, high, low, raised, one.prev_sample, one.derivative
            ).prev_sample
        assert x.dtype == torch.float64
        found = both(name, GRID, draws[4:8], **options, churn_range=bounds)[0]
        close(found, alpha[-1] * x.numpy())


@functools.cache
def flow_error(name: str, n: int) -> float:
    """Error of the flow of Gaussian data, which scales (x - m) with the standard deviation."""
    make, levels = PROCESSES[name]
    sde, t = make(), np.array([1.0, 0.05])
    z = start(sde, (4, 1))
    process = ReverseProcess(sde, DATA.score(sde))
    found = solvers.solve(process, EDMHeun(), z, solvers.root_times(1.0, 0.05, n)).data.numpy()
    alpha, deviation = levels.alpha(t), np.sqrt(VARIANCE + levels.sigma(t) ** 2)
    x = MEAN + (z[:, 0].numpy() / alpha[0] - MEAN) * deviation[1] / deviation[0]
    return float(np.linalg.norm(found - alpha[1] * x))


@functools.cache
def law_error(name: str, n: int, options: tuple[tuple[str, Any], ...]) -> float:
    """Error of the moments of Gaussian data, started from the exact ones."""
    make, levels = PROCESSES[name]
    sde, t = make(), np.array([1.0, 0.05])
    alpha = levels.alpha(t)
    covariance = alpha**2 * (VARIANCE + levels.sigma(t) ** 2)
    m, C = propagate_moments(
        ReverseProcess(sde, DATA.score(sde)),
        EDMHeun(**dict(options)),
        solvers.root_times(1.0, 0.05, n),
        torch.full((1, 1), alpha[0] * MEAN, dtype=torch.float64),
        torch.full((1, 1), covariance[0], dtype=torch.float64),
    )
    return math.hypot(m.item() - alpha[1] * MEAN, C.item() - covariance[1])


@functools.cache
def modes_error(name: str, n: int) -> float:
    """Error of the flow of the data of three modes, by a Runge-Kutta rule of order 8."""
    make, levels = PROCESSES[name]
    sde, t = make(), np.array([1.0, 0.1])
    z, sigma = start(sde, (6, 2)), levels.sigma(t)

    def slope(x: float, flat: Array) -> Array:
        # In the logarithm of the level.
        y = flat.reshape(6, 2)
        return (y - denoise(y, math.exp(x))).ravel()

    solution = solve_ivp(
        slope,
        np.log(sigma),
        (z[:, 0].numpy() / levels.alpha(t)[0]).ravel(),
        method="DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    assert solution.success
    expected = levels.alpha(t)[1] * solution.y[:, -1].reshape(6, 2)
    process = ReverseProcess(sde, MODES.score(sde))
    found = solvers.solve(process, EDMHeun(), z, solvers.root_times(1.0, 0.1, n)).data.numpy()
    return float(np.linalg.norm(found - expected))


# With errors c h^2 (1 + d h + ...) the slope is 2 + d h / (2 log 2): a quarter leaves room for the
# second term, and a declaration that is off by a half is more than a quarter away.
CLOSE = 0.25
NOISY: list[dict[str, Any]] = [
    {"churn": 0.5},
    {"churn": 5.0},
    {"churn": 20.0},
    {"churn": 5.0, "churn_range": (0.3, 3.0)},
]


def check_order(slope: float, declared: float | None) -> None:
    assert declared is not None
    assert abs(slope - declared) < CLOSE
    for wrong in (-0.5, 0.5):
        assert abs(slope - declared - wrong) > CLOSE


class TestOrders:
    """Halving the steps divides the error by four."""

    @every_process
    def test_the_flow_of_gaussian_data(self, name: str) -> None:
        facts = EDMHeun().facts
        assert facts.weak_order is facts.strong_order is None
        check_order(math.log2(flow_error(name, 80) / flow_error(name, 160)), facts.ode_order)

    @every_process
    def test_the_flow_of_modes(self, name: str) -> None:
        coarse, fine = (modes_error(name, n) for n in (80, 160))
        assert fine > 1e-7  # the reference is good to some 1e-10
        check_order(math.log2(coarse / fine), EDMHeun().facts.ode_order)

    @every_process
    @pytest.mark.parametrize("options", [{}, *NOISY], ids=str)
    def test_the_law(self, name: str, options: dict[str, Any]) -> None:
        facts = EDMHeun(**options).facts
        assert facts.strong_order is None
        coarse, fine = (law_error(name, n, tuple(options.items())) for n in (80, 160))
        check_order(math.log2(coarse / fine), facts.weak_order if options else facts.ode_order)

    @every_process
    def test_noise_of_another_scale_changes_the_law_whatever_the_steps(self, name: str) -> None:
        # The noise that is added adds up to a variance that does not vanish with the steps; with
        # the scale 1 the error of 160 steps is less than a hundredth.
        options = (("churn", 5.0), ("noise_scale", 1.1))
        coarse, fine = (law_error(name, n, options) for n in (80, 160))
        assert abs(coarse / fine - 1) < 0.1
        assert fine > 100 * law_error(name, 160, options[:1])

    @pytest.mark.parametrize("noise_scale", [0.9, 1.0000001, 1.1])
    def test_noise_of_another_scale_has_no_order(self, noise_scale: float) -> None:
        facts = EDMHeun(churn=5.0, noise_scale=noise_scale).facts
        assert facts.weak_order is facts.strong_order is facts.ode_order is None
        # Without churn there is no noise that it could scale.
        assert EDMHeun(noise_scale=noise_scale).facts == EDMHeun().facts


class TestPoint:
    """Data that are one point: the slope is constant along the flow, and each step exact."""

    DATA = GaussianMixture([1.0], [POINT.tolist()], [[[0.0, 0.0], [0.0, 0.0]]])

    @every_process
    @pytest.mark.parametrize("times", [GRID, GRID[[0, -1]]], ids=["nine steps", "one step"])
    def test_the_flow_is_exact(self, name: str, times: torch.Tensor) -> None:
        make, levels = PROCESSES[name]
        sde, t = make(), GRID[[0, -1]].numpy()
        z = start(sde, (4, 2))
        process = ReverseProcess(sde, self.DATA.score(sde))
        found = solvers.solve(process, EDMHeun(), z, times).data.numpy()
        alpha, sigma = levels.alpha(t), levels.sigma(t)
        expected = alpha[1] * (POINT + (z[:, 0].numpy() / alpha[0] - POINT) * sigma[1] / sigma[0])
        # Kernels promise 1e-12, of data that start at a size of 15.
        assert abs(found - expected).max() <= 1e-12 * abs(z[:, 0].numpy() / alpha[0]).max()

    @pytest.mark.parametrize("name", ["VE, from 0", "VP", "sub-VP"])
    @pytest.mark.parametrize("churn", [0.0, 3.0])
    def test_a_grid_that_ends_at_zero_ends_at_the_point(self, name: str, churn: float) -> None:
        sde = PROCESSES[name][0]()
        process = ReverseProcess(sde, self.DATA.score(sde))
        found = solvers.solve(
            process, EDMHeun(churn=churn), start(sde, (4, 2)), TO_ZERO, generator=generator()
        ).data.numpy()
        assert abs(found - POINT).max() <= 1e-12

    @every_process
    @pytest.mark.parametrize("churn", [0.5, 3.0, 100.0])
    def test_churn_keeps_the_law_given_the_point(self, name: str, churn: float) -> None:
        make, levels = PROCESSES[name]
        sde, t = make(), GRID[[0, -1]].numpy()
        alpha, sigma = levels.alpha(t), levels.sigma(t)
        m, C = propagate_moments(
            ReverseProcess(sde, self.DATA.score(sde)),
            EDMHeun(churn=churn),
            GRID,
            torch.from_numpy(alpha[0] * POINT)[None],
            torch.eye(2, dtype=torch.float64) * (alpha[0] * sigma[0]) ** 2,
        )
        assert abs(m.numpy() - alpha[1] * POINT).max() <= 1e-12
        assert abs(C.numpy() - np.eye(2) * (alpha[1] * sigma[1]) ** 2).max() <= 1e-12


def raised(name: str, times: torch.Tensor, options: dict[str, Any]) -> list[float]:
    """Levels at which the score is asked, by the algorithm."""
    levels = PROCESSES[name][1].sigma(times.numpy())
    low, high = options.get("churn_range", (0.0, math.inf))
    n, result = len(levels) - 1, []
    for i in range(n):
        gamma = min(options.get("churn", 0.0) / n, math.sqrt(2) - 1)
        gamma = gamma if low <= levels[i] <= high else 0.0
        result += [min(levels[i] * (1 + gamma), levels[0]), levels[i + 1]]
    return result[:-1] if levels[-1] == 0 else result


class TestCounting:
    """Evaluations of the score and draws of noise: their number, and their times."""

    @pytest.mark.parametrize(
        "times",
        [GRID[1:], TO_ZERO[1:], GRID[[1, 4]], TO_ZERO[[1, -1]]],
        ids=["above 0", "to 0", "one step", "one step to 0"],
    )
    @pytest.mark.parametrize("options", [{}, *NOISY[2:], {"churn": 1e3}], ids=str)
    @every_process
    def test_evaluations_are_counted_and_at_the_levels_of_the_algorithm(
        self, name: str, options: dict[str, Any], times: torch.Tensor
    ) -> None:
        sde, n = PROCESSES[name][0](), len(times) - 1
        score = Recording(MODES.score(sde))
        process, solver = ReverseProcess(sde, score), EDMHeun(**options)
        solution = solvers.solve(process, solver, start(sde), times, generator=generator())
        assert solution.success
        assert solver.facts.nfe_per_step == 2
        ends_at_data = PROCESSES[name][1].sigma(times.numpy())[-1] == 0
        assert solution.nfev == score.calls == 2 * n - ends_at_data
        assert solution.stats["steps"] == n
        found = [t[0].item() for t in score.times]
        assert max(found) == found[0] == times[0].item()
        # Where the grid ends at level 0 the last evaluations are at the time before, or above.
        asked = times[:-1] if ends_at_data else times
        assert min(found) >= asked[-1].item()
        for t in score.times:
            assert t.shape == (3,)
            assert (t == t[0]).all()
        levels = PROCESSES[name][1].sigma(np.array(found))
        assert np.allclose(levels, raised(name, times, options), rtol=1e-12, atol=0)
        # Levels that are not raised are those of the grid, to the bit.
        assert found[1::2] == asked[1:].tolist()
        if not options:
            assert found[::2] == times[:-1].tolist()

    @every_process
    def test_without_churn_no_noise_is_drawn(self, name: str) -> None:
        sde = PROCESSES[name][0]()
        process = ReverseProcess(sde, MODES.score(sde))
        solver = EDMHeun(noise_scale=1.01, churn_range=(0.1, 1.0))
        silent = solvers.RecordedNoise([])
        assert solvers.solve(process, solver, start(sde), GRID, noise=silent).success

    @every_process
    def test_denoising_costs_one_more(self, name: str) -> None:
        make, levels = PROCESSES[name]
        sde, t = make(), GRID.numpy()
        process, z = ReverseProcess(sde, MODES.score(sde)), start(sde, (4, 2))
        solution = solvers.solve(process, EDMHeun(), z, GRID, denoise=True)
        assert solution.nfev == 2 * N + 1
        x = algorithm(denoise, z[:, 0].numpy() / levels.alpha(t)[0], levels.sigma(t))
        close(solution.data.numpy(), denoise(x, float(levels.sigma(t)[-1])))


RANGE = r"churn_range must be \(S_min, S_max\) with 0 ≤ S_min ≤ S_max; got"


class TestRefusals:
    """What is refused, before anything is evaluated."""

    @pytest.mark.parametrize("make", [CLD, PSLD, HOLD])
    @pytest.mark.parametrize("options", [{}, {"churn": 3.0}], ids=str)
    def test_processes_of_more_components(self, make: Any, options: dict[str, Any]) -> None:
        sde = make()
        process = ReverseProcess(sde, untouchable)
        message = rf"needs a process of one component; .* has {sde.components}. Use Exponential"
        for solver in (EDMHeun(**options), PredictorCorrector(EDMHeun(**options), Langevin())):
            with pytest.raises(ValueError, match=message + "Multistep, with stochasticity"):
                solvers.solve(process, solver, start(sde), GRID)

    @pytest.mark.parametrize("churn", [-0.1, math.nan, math.inf, -math.inf])
    def test_churn_that_is_negative_or_not_finite(self, churn: float) -> None:
        with pytest.raises(ValueError, match="churn must be finite and at least 0; got"):
            EDMHeun(churn=churn)

    @pytest.mark.parametrize("noise_scale", [0.0, -1.0, math.nan, math.inf])
    def test_scales_of_the_noise_that_are_not_positive(self, noise_scale: float) -> None:
        with pytest.raises(ValueError, match="noise_scale must be finite and positive; got"):
            EDMHeun(noise_scale=noise_scale)

    @pytest.mark.parametrize("option", ["churn", "noise_scale"])
    @pytest.mark.parametrize("value", ["1", None, True])
    def test_what_is_no_number(self, option: str, value: Any) -> None:
        options: dict[str, Any] = {option: value}
        with pytest.raises(TypeError, match=f"{option} must be a real number; got"):
            EDMHeun(**options)

    @pytest.mark.parametrize(
        "churn_range", [(-0.1, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (1.0, -math.inf)]
    )
    def test_ranges_that_are_none(self, churn_range: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=RANGE):
            EDMHeun(churn_range=churn_range)

    @pytest.mark.parametrize(
        "churn_range", [[0.0, 1.0], (1.0,), (0.0, 1.0, 2.0), (), None, 1.0, "01"], ids=str
    )
    def test_what_is_no_range(self, churn_range: Any) -> None:
        with pytest.raises(ValueError, match=RANGE):
            EDMHeun(churn_range=churn_range)

    def test_unknown_and_positional_options(self) -> None:
        wrong: Any = EDMHeun
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrong(steps=3)
        with pytest.raises(TypeError, match="positional"):
            wrong(1.0)


OPTIONS: list[dict[str, Any]] = [{}, CHURNS[1]]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


class TestSteps:
    """Bits, types, shapes, and no waiting."""

    @pytest.mark.parametrize("times", [GRID, TO_ZERO], ids=["above 0", "to 0"])
    @every_option
    @every_process
    def test_one_seed_gives_the_same_bits(
        self, name: str, options: dict[str, Any], times: torch.Tensor
    ) -> None:
        sde = PROCESSES[name][0]()
        process, state = ReverseProcess(sde, MODES.score(sde)), start(sde)
        before = state.clone()

        def run(seed: int) -> torch.Tensor:
            return solvers.solve(
                process, EDMHeun(**options), state, times, generator=generator(seed)
            ).state

        first = run(0)
        assert torch.equal(first, run(0))
        assert torch.equal(state, before)
        # No sample keeps a number where there is noise, and all do where there is none.
        assert ((first != run(1)) == bool(options)).all()

    @pytest.mark.parametrize("kind", ["mixture", "mixed", "plain"])
    @pytest.mark.parametrize("times", [GRID, TO_ZERO], ids=["above 0", "to 0"])
    @every_option
    @every_process
    def test_a_step_waits_for_no_value(
        self,
        name: str,
        options: dict[str, Any],
        times: torch.Tensor,
        kind: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sde, solver = PROCESSES[name][0](), EDMHeun(**options)
        score: Any = MODES.score(sde)
        if kind == "mixed":
            score = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))
        elif kind == "plain":
            score = lambda z, t: -z  # noqa: E731
        process, z = ReverseProcess(sde, score), start(sde)
        known = known_score(process, solver, times, z)
        tables, noise = solver.prepare(process, times), solvers.FreshNoise(generator())
        with no_waiting(monkeypatch), torch.no_grad():
            memory: Memory = ()
            for i in range(len(times) - 1):
                z, memory = solver.step(z, memory, tables, i, known, noise)
                assert memory == ()
        assert z.isfinite().all()

    @every_option
    @every_process
    def test_networks_are_sampled_in_their_precision(
        self, name: str, options: dict[str, Any]
    ) -> None:
        sde = PROCESSES[name][0]()
        score = MixedScore(Constant(sde, 0.1), sde, torch.zeros(()), torch.ones(()))
        for dtype, times in itertools.product((torch.float32, torch.float64), (GRID, TO_ZERO)):
            z = start(sde, (3, 1, 4, 4), dtype)
            solution = solvers.solve(
                ReverseProcess(sde, score), EDMHeun(**options), z, times, generator=generator()
            )
            assert solution.success
            assert solution.state.dtype == solution.data.dtype == dtype
            assert solution.state.shape == z.shape

    @every_option
    @every_process
    def test_single_precision_agrees_with_double(self, name: str, options: dict[str, Any]) -> None:
        sde = PROCESSES[name][0]()
        process, z = ReverseProcess(sde, DATA.score(sde)), start(sde, (8, 1), torch.float32)
        draws = [torch.randn(8, 1, 1, generator=generator(i)) for i in range(N - 1)]
        found, expected = (
            solvers.solve(
                process,
                EDMHeun(**options),
                z.to(dtype),
                GRID,
                noise=solvers.RecordedNoise(draws),
            ).state
            for dtype in (torch.float32, torch.float64)
        )
        # Nine steps with a few roundings of 6e-8 each, of states up to 15.
        size = float(z.abs().max().clamp_min(1.0))
        assert (found.double() - expected).abs().max() <= 9 * 6e-8 * 4 * size

    @pytest.mark.parametrize("axes", [(1, 8, 8), (4, 16)])
    @every_option
    @every_process
    def test_several_data_axes_equal_flattened_ones(
        self, name: str, options: dict[str, Any], axes: tuple[int, ...]
    ) -> None:
        sde = PROCESSES[name][0]()
        eye = 0.1 * torch.eye(64, dtype=torch.float64)
        means = torch.linspace(-1, 1, 64, dtype=torch.float64)
        data = GaussianMixture([1, 1], torch.stack([means, -means]), torch.stack([eye, eye]))
        process, flat = ReverseProcess(sde, data.score(sde)), start(sde, (3, 64))
        one, several = (
            solvers.solve(process, EDMHeun(**options), z, GRID, generator=generator()).state
            for z in (flat, flat.reshape(3, 1, *axes))
        )
        assert torch.equal(several.flatten(2), one)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_option
    @every_process
    def test_streams_of_samples_give_the_same_bits_in_any_batch(
        self, name: str, options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        sde, seeds = PROCESSES[name][0](), [11, 3, 2**31, 0, 5]
        process = ReverseProcess(sde, lambda z, t: -(z + 0.1 * z.sin()))

        def sample(chosen: list[int]) -> torch.Tensor:
            noise = solvers.SampleNoise([seeds[i] for i in chosen])
            state = noise.start(sde, (3, 5), dtype=dtype)
            return solvers.solve(process, EDMHeun(**options), state, TO_ZERO, noise=noise).state

        together = sample([0, 1, 2, 3, 4])
        for chosen in ([2], [4, 0], [4, 3, 2, 1, 0], [1, 3, 1]):
            assert torch.equal(sample(chosen), together[chosen])
        assert all((together[i] != together[j]).all() for i in range(5) for j in range(i))

    def test_solvers_are_frozen_values(self) -> None:
        assert EDMHeun() == EDMHeun(churn=0.0, churn_range=(0.0, math.inf), noise_scale=1.0)
        assert hash(EDMHeun(churn=1.0)) == hash(EDMHeun(churn=1.0))
        assert EDMHeun() != EDMHeun(churn=1.0)
        frozen: Any = EDMHeun()
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.churn = 1.0


class TestCompany:
    """With states on the grid, a callback, and a corrector."""

    @pytest.mark.parametrize("times", [GRID, TO_ZERO], ids=["above 0", "to 0"])
    @every_process
    def test_states_on_the_grid_are_those_of_the_algorithm(
        self, name: str, times: torch.Tensor
    ) -> None:
        make, levels = PROCESSES[name]
        sde, t, seen = make(), times.numpy(), []
        z, n = start(sde, (4, 2)), len(times) - 1
        solution = solvers.solve(
            ReverseProcess(sde, MODES.score(sde)),
            EDMHeun(),
            z,
            times,
            t_eval=times,
            callback=lambda step, at, z: seen.append((step, at)),
        )
        assert seen == list(enumerate(t.tolist()))[1:]
        assert torch.equal(solution.t, times)
        alpha, sigma = levels.alpha(t), levels.sigma(t)
        for i in range(1, n + 1):
            x = z[:, 0].numpy() / alpha[0]
            x = algorithm(denoise, x, sigma[: i + 1])
            close(solution.y[i][:, 0].numpy(), alpha[i] * x)

    def test_a_callback_stops_it(self) -> None:
        sde = VPSDE(0.1, 8.0)
        process = ReverseProcess(sde, MODES.score(sde))
        solution = solvers.solve(
            process, EDMHeun(), start(sde), GRID, callback=lambda step, t, z: step == 3
        )
        assert solution.status == 2
        assert solution.nfev == 6

    @pytest.mark.parametrize("churn", [0.0, 1.5])
    @every_process
    def test_a_corrector_works_before_each_step(self, name: str, churn: float) -> None:
        make, levels = PROCESSES[name]
        sde, t, snr = make(), GRID.numpy(), 0.1
        alpha, sigma = levels.alpha(t), levels.sigma(t)
        z, draws = start(sde, (4, 2)), normals(2 * N)
        solver = PredictorCorrector(EDMHeun(churn=churn), Langevin(snr=snr))
        assert solver.facts.nfe_per_step == 3
        source = iter(draws)
        x = z[:, 0].numpy()
        for i in range(N):
            # The correction, Song et al. (2021), algorithms 4 and 5.
            xi = next(source)[:, 0].numpy()
            level = float(sigma[i])
            s = (denoise(x / alpha[i], level) - x / alpha[i]) / level**2 / alpha[i]
            ratio = np.linalg.norm(xi, axis=1) / np.linalg.norm(s, axis=1)
            eta = 2 * (alpha[i] / alpha[i + 1]) ** 2 * (snr * ratio[:, None]) ** 2
            x = x + eta * s + np.sqrt(2 * eta) * xi
            # One step of the algorithm: churn is that of all steps, the first level that of the
            # grid.
            high = min(level * (1 + churn / N), float(sigma[0])) if churn else level
            y = x / alpha[i]
            if high > level:
                y = y + math.sqrt(high**2 - level**2) * next(source)[:, 0].numpy()
            x = alpha[i + 1] * algorithm(denoise, y, np.array([high, sigma[i + 1]]))
        used = N + (N - 1 if churn else 0)
        noise = solvers.RecordedNoise(draws[:used])
        score = Recording(MODES.score(sde))
        solution = solvers.solve(ReverseProcess(sde, score), solver, z, GRID, noise=noise)
        assert solution.nfev == score.calls == 3 * N
        assert abs(solution.data.numpy() - x).max() <= 1e-9 * max(1.0, float(abs(x).max()))

    @pytest.mark.parametrize("churn", [0.0, 1.5])
    @pytest.mark.parametrize("name", ["VE, from 0", "VP", "sub-VP"])
    def test_a_corrector_needs_a_grid_that_ends_above_level_zero(
        self, name: str, churn: float
    ) -> None:
        sde = PROCESSES[name][0]()
        process = ReverseProcess(sde, untouchable)
        solver = PredictorCorrector(EDMHeun(churn=churn), Langevin())
        message = (
            r"equally often in each step; .* takes 19 evaluations in 10 steps. "
            r"A grid that ends above"
        )
        with pytest.raises(ValueError, match=message):
            solvers.solve(process, solver, start(sde), TO_ZERO)

    @pytest.mark.parametrize("churn", [0.0, 1.5])
    def test_of_a_level_that_stays_above_zero_it_takes_time_zero(self, churn: float) -> None:
        sde = VESDE(0.1, 5.0)
        solver = PredictorCorrector(EDMHeun(churn=churn), Langevin())
        process = ReverseProcess(sde, MODES.score(sde))
        solution = solvers.solve(process, solver, start(sde), TO_ZERO, generator=generator())
        assert solution.success
        assert solution.nfev == 3 * (N + 1)
