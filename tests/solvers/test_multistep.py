"""`ExponentialMultistep`: exact where it says so, and methods of one component that it contains.

On data that are one point x0 the law at t is N(psi x0, Sigma), and the process of stochasticity l

    dz = [F z + (1 + l^2)/2 G G^T Sigma^-1 (z - psi x0)] dt + l G dw

is linear. A made-up data prediction p(t) in place of x0 keeps it linear: what the solver should do
then is known from an ODE solver, whatever the polynomials' weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

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
    solvers,
)
from cldsde.solvers import ExponentialMultistep as Multistep
from cldsde.solvers.authoring import Memory
from cldsde.validation import propagate_moments
from probes import generator, known_score, no_waiting, start, untouchable
from score import exact
from score.exact import Constant

PROCESSES: dict[str, Callable[[], LinearSDE]] = {
    "VP": lambda: VPSDE(0.1, 8.0),
    "VE": lambda: VESDE(0.1, 5.0),
    "CLD": CLD,
    "CLD, linear": lambda: CLD((1.0, 7.0)),
    "PSLD": PSLD,
    "HOLD": HOLD,
}


def level(t: torch.Tensor) -> torch.Tensor:
    """A stochasticity that is 1.5 early and 0 late."""
    return 1.5 * (t > 0.4)


VARIANTS: list[dict[str, Any]] = [
    {"order": k, "corrector": c, "stochasticity": x}
    for k in (1, 2, 3)
    for c in (False, True)
    for x in (0.0, 0.5, 1.0, level)
    if x != 0.5 or k == 3
]
VARIANTS += [{"order": k, "prediction": "noise"} for k in (1, 2, 3)]
VARIANTS += [
    {"order": k, "corrector": True, "variable": "log_snr", "stochasticity": x}
    for k in (1, 2, 3)
    for x in (0.0, 1.0)
]
VARIANTS += [
    {"order": k, "corrector": True, "variable": "log_snr", "weights": "published"} for k in (1, 2)
]


def _name(options: dict[str, Any]) -> str:
    parts = [f"{key}={getattr(x, '__name__', x)}" for key, x in options.items() if x]
    return " ".join(parts).replace("order=", "")


every_variant = pytest.mark.parametrize("options", VARIANTS, ids=_name)
every_process = pytest.mark.parametrize("name", list(PROCESSES))


def linear_flow(
    sde: LinearSDE,
    predicted: Callable[[float], float],
    z: torch.Tensor,
    ends: tuple[float, float],
    stochasticity: float = 0.0,
    tolerance: float = 1e-12,
) -> torch.Tensor:
    """The mean path of the linear process with a given data prediction, in x = log t."""
    pull = (1 + stochasticity**2) / 2

    def slope(x: float, flat: Any) -> Any:
        t = math.exp(x)
        law, G = sde.marginal(t), sde.diffusion(t)
        state = torch.from_numpy(flat).reshape(sde.components, -1)
        away = torch.linalg.solve(law.covariance, state - law.mean[:, :1] * predicted(t))
        return (t * (sde.drift(t) @ state + pull * G @ G.mT @ away)).flatten().numpy()

    begin = z.movedim(0, -1).reshape(sde.components, -1)
    solution = solve_ivp(
        slope,
        [math.log(t) for t in ends],
        begin.flatten().numpy(),
        method="DOP853",
        rtol=tolerance,
        atol=0.1 * tolerance,
    )
    assert solution.success
    end = torch.from_numpy(solution.y[:, -1])
    return end.reshape(sde.components, *z.shape[2:], len(z)).movedim(-1, 0)


POINT = GaussianMixture([1.0], [[0.7, -1.2]], [[[0.0, 0.0], [0.0, 0.0]]])
ONE = GaussianMixture([1.0], [[0.7]], [[[0.0]]])


class TestPoint:
    """Data that are one point."""

    @staticmethod
    def end(name: str) -> float:
        # The covariance of HOLD given the data grades like t^2, t^4, t^6: below, its inverse and
        # the reference's is of little use.
        return 1e-2 if name == "HOLD" else 1e-3

    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_one_deterministic_step_follows_the_flow(self, name: str) -> None:
        sde = PROCESSES[name]()
        end = {"VP": 1e-3, "CLD": 1e-2, "HOLD": 0.1}[name]  # the reference's steps shrink like t
        process, z = ReverseProcess(sde, ONE.score(sde)), start(sde, (2, 1))
        expected = linear_flow(sde, lambda t: 0.7, z, (1.0, end), tolerance=1e-10)
        times = solvers.uniform_times(1.0, end, 1)
        for options in VARIANTS:
            if options.get("stochasticity", 0.0) == 0.0:
                found = solvers.solve(process, Multistep(**options), z, times).state
                # The reference's relative error and the solve with a graded covariance.
                size = 100 * exact.rounding(sde, end) + 1e-8
                assert (found - expected).abs().max() <= size * max(1.0, float(z.abs().max()))

    @pytest.mark.parametrize(
        ("name", "steps"), [("VP", 5), ("CLD, linear", 1), ("PSLD", 5), ("HOLD", 1)]
    )
    @every_variant
    def test_the_law_given_the_point_is_kept(
        self, options: dict[str, Any], name: str, steps: int
    ) -> None:
        sde, end = PROCESSES[name](), self.end(name)
        if "prediction" in options:
            # Polynomials through the noise invert a root at every step, whose condition squares
            # what rounding leaves: one step, and not near the data.
            steps, end = 1, 0.3
        process = ReverseProcess(sde, ONE.score(sde))
        first, last = sde.marginal(1.0), sde.marginal(end)
        times = solvers.root_times(1.0, end, steps)
        mean, covariance = propagate_moments(
            process, Multistep(**options), times, 0.7 * first.mean[:, :1], first.covariance
        )
        spread = last.covariance.diagonal().sqrt()
        # Rounding of the score, in units of the spread; each step may add its own.
        size = 100 * steps * exact.rounding(sde, end)
        assert ((mean - 0.7 * last.mean[:, :1]).abs()[:, 0] <= size * (spread + 1)).all()
        assert ((covariance - last.covariance).abs() <= size * torch.outer(spread, spread)).all()

    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_the_posterior_is_sampled_at_full_stochasticity(self, name: str) -> None:
        # From a state that is known the law is p(z_eps | z_T, x_0), by Bayes' rule.
        sde, end = PROCESSES[name](), 0.05
        process = ReverseProcess(sde, ONE.score(sde))
        late, early = sde.marginal(1.0), sde.marginal(end)
        psi = sde.transition(end, 1.0).mean
        gain = torch.linalg.solve(late.covariance, psi @ early.covariance).mT
        z = torch.full((sde.components, 1), 0.4, dtype=torch.float64)
        zero = torch.zeros(sde.components, sde.components)
        times = solvers.uniform_times(1.0, end, 1)
        for k in (1, 2, 3):
            solver = Multistep(order=cast("Any", k), stochasticity=1.0)
            mean, covariance = propagate_moments(process, solver, times, z, zero)
            expected = 0.7 * early.mean[:, :1] + gain @ (z - 0.7 * late.mean[:, :1])
            assert torch.allclose(mean, expected, rtol=0, atol=1e-10)
            left = early.covariance - gain @ late.covariance @ gain.mT
            assert torch.allclose(covariance, left, rtol=0, atol=1e-10)


class TestPolynomials:
    """Weights of the predictions."""

    @pytest.mark.parametrize(
        ("stochasticity", "corrector"), [(0.0, False), (0.5, True), (1.0, False)]
    )
    @pytest.mark.parametrize(
        ("name", "order"),
        [("VP", 1), ("VP", 2), ("VP", 3), ("CLD, linear", 2), ("CLD, linear", 3), ("HOLD", 3)],
    )
    def test_a_polynomial_prediction_is_integrated_exactly(
        self, name: str, order: Any, corrector: bool, stochasticity: float
    ) -> None:
        sde, driven = PROCESSES[name](), list(PROCESSES[name]().driven)
        coefficients = [0.5, -1.5, 2.0][:order]

        def predicted(t: float) -> float:
            return sum(c * t**j for j, c in enumerate(coefficients))

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            at = float(t[0])
            law = sde.marginal(at)
            away = z - law.mean[:, :1] * predicted(at)
            return -torch.linalg.solve(law.covariance, away)[:, driven]

        solver = Multistep(order=order, corrector=corrector, stochasticity=stochasticity)
        process, z = ReverseProcess(sde, score), start(sde)
        times = solvers.quadratic_times(1.0, 0.3, 6)
        noise = torch.zeros(3, sde.components, 2, dtype=torch.float64)

        def run(grid: torch.Tensor) -> torch.Tensor:
            source = solvers.RecordedNoise([noise] * 6)
            return solvers.solve(process, solver, z, grid, noise=source).state

        # The first steps know fewer predictions than the degree needs; those after are exact.
        known = run(times[: order + 1])
        ends = float(times[order]), float(times[-1])
        expected = linear_flow(sde, predicted, known, ends, stochasticity)
        size = max(1.0, float(expected.abs().max()), float(known.abs().max()))
        assert (run(times) - expected).abs().max() <= 1e-9 * size

    @pytest.mark.parametrize("name", ["VE", "CLD, linear", "HOLD"])
    @pytest.mark.parametrize("variable", ["time", "log_snr"])
    @pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, level])
    def test_the_weights_sum_to_that_of_a_constant(
        self, name: str, variable: Any, stochasticity: Any
    ) -> None:
        sde = PROCESSES[name]()
        process = ReverseProcess(sde, lambda z, t: z)
        times = solvers.root_times(1.0, 0.01, 7)
        prepared = [
            Multistep(
                order=k, corrector=True, variable=variable, stochasticity=stochasticity
            ).prepare(process, times)
            for k in (1, 2, 3)
        ]
        for i in range(7):
            constant = torch.tensor(prepared[0].weights[i][0], dtype=torch.float64)
            for tables, count in zip(prepared, (1, 2, 3), strict=True):
                for table, more in ((tables.weights, 0), (tables.corrector, 1)):
                    blocks = torch.tensor(table[i], dtype=torch.float64)
                    assert len(blocks) == min(count, i + 1) + more
                    size = float(blocks.abs().max())
                    assert (blocks.sum(0) - constant).abs().max() <= 1e-14 * size

    @pytest.mark.parametrize("x", [0.0, 0.5, 1.0])
    def test_one_component_has_closed_forms(self, x: float) -> None:
        sde = VPSDE(0.1, 8.0)
        times = solvers.root_times(1.0, 0.02, 5)
        options: dict[str, Any] = {"variable": "log_snr", "stochasticity": x, "order": 2}
        process = ReverseProcess(sde, lambda z, t: z)
        exact_tables = Multistep(**options).prepare(process, times)
        published = Multistep(**options, weights="published").prepare(process, times)
        clock = 0.1 * times + 7.9 * times**2 / 2
        alpha, sigma = (-clock / 2).exp(), (-torch.expm1(-clock)).sqrt()
        kappa, both = (alpha / sigma).log(), 1 + x**2
        for i in range(5):
            H = kappa[i + 1] - kappa[i]
            move = sigma[i + 1] / sigma[i] * (-(x**2) * H).exp()
            P = -(sigma[i + 1] ** 2) * torch.expm1(-2 * x**2 * H)
            B = -alpha[i + 1] * torch.expm1(-both * H)
            assert abs(exact_tables.move[i][0][0] - move) <= 1e-12
            drawn = exact_tables.noise[i][0]
            assert abs(sum(entry**2 for entry in drawn) - P) <= 1e-12
            assert len(drawn) == (x > 0)
            found = [block[0][0] for block in exact_tables.weights[i]]
            if i == 0:
                assert abs(found[0] - B) <= 1e-12
                continue
            before = kappa[i] - kappa[i - 1]
            D = alpha[i + 1] * (H + torch.expm1(-both * H) / both)
            assert abs(found[0] - (B + D / before)) <= 1e-12 * (1 + D / before)
            assert abs(found[1] + D / before) <= 1e-12 * (1 + D / before)
            rounded = [block[0][0] for block in published.weights[i]]
            half = B * H / (2 * before)
            assert abs(rounded[0] - (B + half)) <= 1e-12
            assert abs(rounded[1] + half) <= 1e-12


MODES = GaussianMixture(
    [0.3, 0.3, 0.4], [[-1.0, 0.2], [0.8, 0.8], [0.4, -1.0]], [[[0.04, 0.0], [0.0, 0.09]]] * 3
)


class TestDiffusers:
    """With one component it does what the schedulers of the library diffusers do."""

    N = 9

    @pytest.fixture
    def setting(self) -> Any:
        pytest.importorskip("diffusers")
        sde = VPSDE(0.1, 8.0)
        times = solvers.root_times(1.0, 0.02, self.N)
        law = sde.marginal(times)
        alpha, sigma = law.mean[:, 0, 0], law.root[:, 0, 0]
        g = generator(3)
        draws = [torch.randn(6, 1, 2, generator=g, dtype=torch.float64) for _ in range(self.N)]
        return sde, times, alpha, sigma / alpha, start(sde, (6, 2)), draws

    @staticmethod
    def ours(setting: Any, **options: Any) -> torch.Tensor:
        sde, times, _, _, z, draws = setting
        process = ReverseProcess(sde, MODES.score(sde))
        noise = solvers.RecordedNoise(draws)
        return solvers.solve(process, Multistep(**options), z, times, noise=noise).state[:, 0]

    @staticmethod
    def prediction(setting: Any, x: torch.Tensor, i: int) -> torch.Tensor:
        sde, times, *_ = setting
        return MODES.posterior_mean(sde, x.unsqueeze(1), float(times[i]))

    @staticmethod
    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        # Both in float64; scores and predictions convert with an error of some 1e-13, which the
        # prediction's slope between the modes may raise.
        assert expected.dtype == torch.float64
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("kind", ["sample", "epsilon"])
    def test_ddim(self, setting: Any, eta: float, kind: str) -> None:
        from diffusers import DDIMScheduler

        _, _, alpha, sigma, z, draws = setting
        n = self.N
        scheduler = DDIMScheduler(
            num_train_timesteps=n + 1, clip_sample=False, prediction_type=kind
        )
        scheduler.set_timesteps(n)
        scheduler.alphas_cumprod = alpha.flip(0) ** 2
        x = z[:, 0]
        for i in range(n):
            output = self.prediction(setting, x, i)
            if kind == "epsilon":
                output = (x / alpha[i] - output) / sigma[i]
            noise = draws[i][:, 0] if eta else None
            x = scheduler.step(output, n - i, x, eta=eta, variance_noise=noise).prev_sample
        self.close(self.ours(setting, order=1, stochasticity=eta), x)

    @pytest.mark.parametrize(
        ("order", "kind", "options", "stochasticity"),
        [
            (1, "midpoint", {"order": 1}, 0.0),
            (1, "midpoint", {"order": 1}, 1.0),
            (2, "midpoint", {"order": 2, "variable": "log_snr", "weights": "published"}, 0.0),
            (2, "midpoint", {"order": 2, "variable": "log_snr", "weights": "published"}, 1.0),
            (2, "heun", {"order": 2, "variable": "log_snr"}, 0.0),
            (2, "heun", {"order": 2, "variable": "log_snr"}, 1.0),
        ],
    )
    def test_dpm_solver(
        self, setting: Any, order: int, kind: str, options: dict[str, Any], stochasticity: float
    ) -> None:
        from diffusers import DPMSolverMultistepScheduler

        _, _, _, sigma, z, draws = setting
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type="sde-dpmsolver++" if stochasticity else "dpmsolver++",
            solver_type=kind,
            prediction_type="sample",
            lower_order_final=False,
        )
        scheduler.set_timesteps(self.N)
        scheduler.sigmas = sigma
        # Its `step` rounds the state to single precision; the formulas that it chooses do not.
        x, outputs = z[:, 0], []
        for i in range(self.N):
            scheduler._step_index = i
            outputs.append(self.prediction(setting, x, i))
            noise = draws[i][:, 0]
            known = min(order, i + 1)
            if known == 1:
                x = scheduler.dpm_solver_first_order_update(outputs[-1], sample=x, noise=noise)
            else:
                x = scheduler.multistep_dpm_solver_second_order_update(
                    outputs, sample=x, noise=noise
                )
        self.close(self.ours(setting, **options, stochasticity=stochasticity), x)

    @pytest.mark.parametrize("order", [1, 2])
    def test_unipc(self, setting: Any, order: int) -> None:
        from diffusers import UniPCMultistepScheduler

        _, _, _, sigma, z, _ = setting
        scheduler = UniPCMultistepScheduler(
            solver_order=order,
            solver_type="bh2",
            prediction_type="sample",
            lower_order_final=False,
        )
        scheduler.set_timesteps(self.N)
        scheduler.sigmas, scheduler.timesteps = sigma, torch.arange(self.N)
        x = z[:, 0]
        for i in range(self.N):
            x = scheduler.step(self.prediction(setting, x, i), i, x).prev_sample
        found = self.ours(
            setting, order=order, corrector=True, variable="log_snr", weights="published"
        )
        self.close(found, x)


RINGS = [(1.0, 0.1), (2**0.5, 0.2), (2.0, 0.2)]


class TestRing:
    """Eight narrow modes on a ring under CLD: 20 evaluations with the exact score.

    Between two modes the flow is unstable, so that a few of the samples make the root mean square.
    """

    END = 1e-3

    @staticmethod
    @functools.cache
    def setting(
        radius: float, deviation: float
    ) -> tuple[ReverseProcess, torch.Tensor, torch.Tensor]:
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        covariances = (deviation**2 * torch.eye(2, dtype=torch.float64)).expand(8, 2, 2)
        ring = GaussianMixture([1.0] * 8, means, covariances)
        sde = CLD()
        process = ReverseProcess(sde, ring.score(sde))
        z = start(sde, (500, 2))

        def slope(x: float, flat: Any) -> Any:
            t = math.exp(x)
            state = torch.from_numpy(flat).reshape(z.shape)
            return t * process.probability_flow(state, t).flatten().numpy()

        ends = [0.0, math.log(TestRing.END)]
        solution = solve_ivp(
            slope, ends, z.flatten().numpy(), method="DOP853", rtol=1e-7, atol=1e-8
        )
        return process, z, torch.from_numpy(solution.y[:, -1]).reshape(z.shape)

    @classmethod
    def rms(
        cls, ring: tuple[float, float], grid: Callable[..., torch.Tensor], n: int = 20
    ) -> float:
        process, z, expected = cls.setting(*ring)
        solver = Multistep(order=3, corrector=True)
        found = solvers.solve(process, solver, z, grid(1.0, cls.END, n))
        assert found.nfev == n
        return float((found.data - expected[:, 0]).square().mean().sqrt())

    @pytest.mark.parametrize("ring", RINGS[:2])
    def test_twenty_evaluations_reach_a_hundredth(self, ring: tuple[float, float]) -> None:
        assert self.rms(ring, functools.partial(solvers.logistic_times, CLD())) < 1e-2

    @pytest.mark.parametrize("ring", RINGS)
    @pytest.mark.parametrize("n", [10, 20, 50])
    def test_the_logistic_grid_suits_mixtures(self, ring: tuple[float, float], n: int) -> None:
        # On the widest ring single samples between modes weigh most, from 6e-3 to 2e-2 at n = 20.
        error = self.rms(ring, functools.partial(solvers.logistic_times, CLD()), n)
        assert error < self.rms(ring, solvers.root_times, n) / 1.5

    def test_the_reference_is_the_limit(self) -> None:
        # An error of order 4, or 3 before the first steps are hidden, 16 or 8 times less at twice
        # the steps; the reference is good to some 1e-7.
        coarse, fine = (self.rms(RINGS[1], solvers.quadratic_times, n) for n in (100, 200))
        assert fine < coarse / 6
        assert fine < 1e-4


GRID = solvers.root_times(1.0, 0.05, 5)


class TestRefusals:
    """What is refused, before anything is evaluated."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"order": 0}, "order must be 1, 2 or 3; got 0"),
            ({"order": 4}, "order must be 1, 2 or 3; got 4"),
            ({"order": "2"}, "order must be 1, 2 or 3"),
            ({"order": 1.5}, "order must be 1, 2 or 3"),
            ({"order": 2.0}, "order must be 1, 2 or 3"),
            ({"prediction": "score"}, "prediction must be one of"),
            ({"variable": "t"}, "variable must be one of"),
            ({"weights": "approximate"}, "weights must be one of"),
            ({"stochasticity": -0.1}, "stochasticity must be finite and at least 0"),
            ({"stochasticity": math.nan}, "stochasticity must be finite and at least 0"),
            ({"stochasticity": math.inf}, "stochasticity must be finite and at least 0"),
            ({"stochasticity": "1"}, "stochasticity must be a real number"),
            ({"stochasticity": None}, "stochasticity must be a real number"),
            ({"prediction": "noise", "stochasticity": 0.5}, "which is deterministic"),
            ({"prediction": "noise", "stochasticity": level}, "which is deterministic"),
            ({"weights": "published"}, "needs variable='log_snr'"),
            ({"weights": "published", "variable": "time"}, "needs variable='log_snr'"),
            ({"weights": "published", "variable": "log_snr", "order": 3}, "order 1 or 2"),
        ],
    )
    def test_options_out_of_range(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            Multistep(**options)

    def test_unknown_and_positional_options(self) -> None:
        wrong: Any = Multistep
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrong(steps=3)
        with pytest.raises(TypeError, match="positional"):
            wrong(2)

    @pytest.mark.parametrize(
        "function",
        [
            lambda t: -t,
            lambda t: t / 0.0,
            lambda t: t * math.nan,
            lambda t: t[:-1],
            lambda t: t.unsqueeze(1),
            lambda t: 1.0,
        ],
    )
    def test_stochasticity_that_is_no_number_a_time(self, function: Any) -> None:
        process = ReverseProcess(CLD(), untouchable)
        solver = Multistep(stochasticity=function)
        with pytest.raises(ValueError, match="one finite number ≥ 0 per time"):
            solvers.solve(process, solver, start(CLD()), GRID)

    @every_process
    def test_a_grid_that_ends_at_the_data(self, name: str) -> None:
        sde = PROCESSES[name]()
        process = ReverseProcess(sde, untouchable)
        for options in ({}, {"prediction": "noise"}, {"stochasticity": 1.0}):
            solver = Multistep(**cast("Any", options))
            with pytest.raises(ValueError, match=r"must end above 0 .* denoise=True"):
                solvers.solve(process, solver, start(sde), solvers.root_times(1.0, 0.0, 4))

    @pytest.mark.parametrize("prediction", ["data", "noise"])
    def test_underdamped_processes_where_the_data_are_lost(self, prediction: Any) -> None:
        sde = CLD(friction=0.4)
        t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
        kernel = sde.marginal(t)
        weight = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, 1, 0]
        lost = float(t[(weight[1:] * weight[:-1] < 0).nonzero().flatten()[0]])
        process = ReverseProcess(sde, untouchable)
        times = torch.tensor([1.0, lost, 0.01], dtype=torch.float64)
        with pytest.raises(ValueError, match="does not determine x_0"):
            solvers.solve(process, Multistep(prediction=prediction), start(sde), times)


class TestSteps:
    """Counting, times, bits, types."""

    @pytest.mark.parametrize("steps", [1, 6])
    @every_variant
    def test_one_evaluation_a_step_inside_the_interval(
        self, options: dict[str, Any], steps: int
    ) -> None:
        sde, asked = CLD(), []
        inner = MODES.score(sde)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert (t == t[0]).all()
            asked.append(float(t[0]))
            return inner(z, t)

        times = solvers.root_times(0.9, 1e-2, steps)
        process, solver = ReverseProcess(sde, score), Multistep(**options)
        solution = solvers.solve(process, solver, start(sde), times, generator=generator())
        assert solution.success
        assert solver.facts.nfe_per_step == 1
        assert solution.nfev == steps
        assert asked == times[:-1].tolist()

    @every_variant
    def test_a_step_waits_for_no_value(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, solver = CLD(), Multistep(**options)
        score = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))
        process, z = ReverseProcess(sde, score), start(sde)
        known = known_score(process, solver, GRID, z)
        tables, noise = solver.prepare(process, GRID), solvers.FreshNoise(generator())
        with no_waiting(monkeypatch), torch.no_grad():
            memory: Memory = ()
            for i in range(len(GRID) - 1):
                z, memory = solver.step(z, memory, tables, i, known, noise)
        assert z.isfinite().all()

    @every_variant
    def test_networks_are_sampled_in_their_precision(self, options: dict[str, Any]) -> None:
        for sde in (PROCESSES["VP"](), CLD()):
            score = MixedScore(Constant(sde, 0.1), sde, torch.zeros(()), torch.ones(()))
            process = ReverseProcess(sde, score)
            for dtype in (torch.float32, torch.float64):
                z = start(sde, (3, 1, 4, 4), dtype)
                before = z.clone()
                runs = [
                    solvers.solve(
                        process, Multistep(**options), z, GRID, generator=generator(), denoise=True
                    )
                    for _ in range(2)
                ]
                assert runs[0].success
                assert runs[0].nfev == 6
                assert runs[0].state.dtype == runs[0].data.dtype == dtype
                assert torch.equal(runs[0].state, runs[1].state)
                assert torch.equal(z, before)

    @pytest.mark.parametrize(
        "options",
        # Corrected polynomials through the noise diverge with so few steps.
        VARIANTS,
        ids=_name,
    )
    def test_single_precision_agrees_with_double(self, options: dict[str, Any]) -> None:
        sde = CLD()
        process, z = ReverseProcess(sde, MODES.score(sde)), start(sde, (8, 2), torch.float32)
        draws = [torch.zeros(8, 2, 2)] * 5
        found, expected = (
            solvers.solve(
                process,
                Multistep(**options),
                z.to(dtype),
                GRID,
                noise=solvers.RecordedNoise(draws),
            ).state
            for dtype in (torch.float32, torch.float64)
        )
        # Rounding of 6e-8 in each of 5 steps; the velocity's score is divided by what the noise
        # leaves of the data, some hundred times, and a prediction between modes is steep.
        assert (found.double() - expected).abs().max() <= 1e-3

    @every_variant
    def test_samples_do_not_depend_on_their_batch(self, options: dict[str, Any]) -> None:
        sde = CLD()
        process, z = ReverseProcess(sde, lambda z, t: -z[:, 1:] / 0.25), start(sde, (5, 2))
        g = generator(4)
        draws = [torch.randn(5, 2, 2, generator=g, dtype=torch.float64) for _ in range(5)]

        def run(rows: Sequence[int]) -> torch.Tensor:
            noise = solvers.RecordedNoise([draw[list(rows)] for draw in draws])
            state = z[list(rows)]
            return solvers.solve(process, Multistep(**options), state, GRID, noise=noise).state

        together = run(range(5))
        for rows in ([2], [4, 1], [3, 2, 0]):
            assert torch.equal(run(rows), together[rows])

    def test_noise_is_drawn_only_where_there_is_stochasticity(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, MODES.score(sde))
        for options in ({}, {"stochasticity": 0}, {"stochasticity": lambda t: 0.0 * t}):
            solver = Multistep(**cast("Any", options))
            silent = solvers.RecordedNoise([])
            assert solvers.solve(process, solver, start(sde), GRID, noise=silent).success

    def test_constant_functions_are_numbers(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, MODES.score(sde))
        for x, k in itertools.product((0.5, 1.0), (1, 3)):
            found, expected = (
                solvers.solve(
                    process,
                    Multistep(order=cast("Any", k), stochasticity=value),
                    start(sde),
                    GRID,
                    generator=generator(),
                ).state
                for value in (lambda t, x=x: torch.full_like(t, x), x)
            )
            # A family of stochasticities by its ODE, or Bayes' rule where all of them are 1.
            assert torch.allclose(found, expected, rtol=0, atol=1e-8)

    def test_ancestral_is_the_first_order_at_full_stochasticity(self) -> None:
        for name, make in PROCESSES.items():
            sde = make()
            process = ReverseProcess(sde, MODES.score(sde))
            one, other = (
                solvers.solve(process, solver, start(sde), GRID, generator=generator()).state
                for solver in (solvers.Ancestral(), Multistep(order=1, stochasticity=1.0))
            )
            assert torch.allclose(one, other, rtol=0, atol=1e-9), name

    def test_solvers_are_frozen_values(self) -> None:
        assert Multistep() == Multistep(order=2, stochasticity=0.0)
        assert hash(Multistep(stochasticity=level)) == hash(Multistep(stochasticity=level))
        frozen: Any = Multistep()
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.order = 3

    def test_no_finite_score_is_no_success(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: torch.full_like(z[:, 1:], np.nan))
        solution = solvers.solve(process, Multistep(corrector=True), start(sde), GRID, warn=False)
        assert not solution.success
        assert "not finite" in solution.message
