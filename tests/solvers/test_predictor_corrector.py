"""Predictor–corrector sampling: its count, the correction's formula, and what it samples."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, VESDE, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.solvers import Langevin, PredictorCorrector
from cldsde.solvers.authoring import Facts, GridSolver, Memory, Solver
from probes import generator, known_score, no_waiting, start
from score import exact

FAMILIES: dict[str, Any] = {"VP": VPSDE, "VE": lambda: VESDE(0.05, 20.0), "CLD": CLD, "HOLD": HOLD}
PREDICTORS: dict[str, Solver] = {
    "EM": solvers.EulerMaruyama(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "ancestral": solvers.Ancestral(),
    "Heun": solvers.StochasticHeun(),
    "multistep": solvers.ExponentialMultistep(order=2),
}
GRID = solvers.quadratic_times(1.0, 1e-2, 5)

every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_predictor = pytest.mark.parametrize("predictor", list(PREDICTORS))


class Recording:
    """A plain score that remembers the times and states that it was asked at."""

    def __init__(self, score: Any) -> None:
        self.score = score
        self.times: list[float] = []
        self.states: list[torch.Tensor] = []

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(z),)
        assert (t == t[0]).all()
        self.times.append(t[0].item())
        self.states.append(z.clone())
        result: torch.Tensor = self.score(z, t)
        return result


@dataclass(frozen=True, kw_only=True)
class Stay(GridSolver):
    """A predictor that asks for the score and stays where it is."""

    @property
    def facts(self) -> Facts:
        return Facts(applies_to="everything", nfe_per_step=1)

    def prepare(self, process: ReverseProcess, times: torch.Tensor) -> None:
        return None

    def evaluation_times(self, process: ReverseProcess, times: torch.Tensor) -> torch.Tensor:
        return times[:-1]

    def step(
        self, z: torch.Tensor, memory: Any, tables: Any, i: int, score: Any, noise: Any
    ) -> tuple[torch.Tensor, Any]:
        score(z, i)
        return z, ()


class TestCounting:
    """Evaluations of the score: their number and their times."""

    @pytest.mark.parametrize("denoise", [False, True])
    @pytest.mark.parametrize("corrections", [1, 3])
    @every_predictor
    @every_family
    def test_evaluations_are_counted_and_asked_on_the_grid(
        self, name: str, predictor: str, corrections: int, denoise: bool
    ) -> None:
        sde = FAMILIES[name]()
        inner = PREDICTORS[predictor]
        solver = PredictorCorrector(inner, Langevin(steps=corrections))
        score = Recording(exact.mixture().score(sde))
        process = ReverseProcess(sde, score)
        solution = solvers.solve(
            process, solver, start(sde), GRID, denoise=denoise, generator=generator()
        )
        stages = inner.facts.nfe_per_step
        assert solver.facts.nfe_per_step == corrections + stages
        assert solution.nfev == len(score.times) == 5 * (corrections + stages) + denoise
        expected = []
        for t, u in zip(GRID.tolist()[:-1], GRID.tolist()[1:], strict=True):
            expected += [t] * corrections + ([t, u] if stages == 2 else [t])
        assert score.times == expected + ([GRID[-1].item()] if denoise else [])
        assert solver.evaluation_times(process, GRID).tolist() == expected

    def test_the_corrector_comes_first(self) -> None:
        sde = VPSDE()
        score = Recording(exact.mixture().score(sde))
        state = start(sde)
        solver = PredictorCorrector(solvers.StochasticHeun(), Langevin())
        solvers.solve(ReverseProcess(sde, score), solver, state, GRID, generator=generator())
        assert torch.equal(score.states[0], state)
        assert (score.states[1] != state).all()

    @every_family
    def test_tables_and_plain_scores_give_the_same_samples(self, name: str) -> None:
        sde = FAMILIES[name]()
        exact_score = exact.mixture().score(sde)
        solver = PredictorCorrector(solvers.StochasticHeun(), Langevin(steps=2))
        one, other = (
            solvers.solve(
                ReverseProcess(sde, score), solver, start(sde), GRID, generator=generator()
            ).state
            for score in (exact_score, Recording(exact_score))
        )
        # Coefficients of one time or of a grid differ by rounding.
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


class TestCorrection:
    """The correction is the published formula, on the driven components alone."""

    @staticmethod
    def by_hand(
        z: torch.Tensor, s: torch.Tensor, xi: torch.Tensor, alpha: float, snr: float
    ) -> torch.Tensor:
        rows = []
        for one, pull, noise in zip(z, s, xi, strict=True):
            eta = 2 * alpha * (snr * math.sqrt(noise.square().sum() / pull.square().sum())) ** 2
            rows.append(one + eta * pull + math.sqrt(2 * eta) * noise)
        return torch.stack(rows)

    @pytest.mark.parametrize("snr", [0.05, 0.16, 0.5])
    @pytest.mark.parametrize("name", ["VP", "VE", "CLD", "HOLD"])
    def test_it_is_the_formula(self, name: str, snr: float) -> None:
        sde = FAMILIES[name]()
        times = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
        score = exact.mixture().score(sde)
        driven = list(sde.driven)
        assert len(driven) == 1
        draws = [torch.randn(3, 1, 2, dtype=torch.float64, generator=generator(i)) for i in (1, 2)]
        solver = PredictorCorrector(Stay(), Langevin(snr=snr))
        found = solvers.solve(
            ReverseProcess(sde, score),
            solver,
            start(sde),
            times,
            noise=solvers.RecordedNoise(draws),
        ).state
        z = start(sde)
        # The clock of VP, its alpha_t^2 / alpha_u^2 = 1 - b.
        clock = 0.1 * times + 0.5 * 19.9 * times**2
        for i in range(2):
            alpha = math.exp(-float(clock[i] - clock[i + 1])) if name == "VP" else 1.0
            s = score(z, times[i])
            z = z.clone()
            z[:, driven] = self.by_hand(z[:, driven], s, draws[i], alpha, snr)
        # Two scores, right to 1e-12, and a dozen roundings.
        assert torch.allclose(found, z, rtol=1e-10, atol=1e-10)
        still = [i for i in range(sde.components) if i not in driven]
        assert torch.equal(found[:, still], start(sde)[:, still])

    def test_position_noise_makes_the_position_move_too(self) -> None:
        sde = CLD(position_noise=0.3)
        score = exact.mixture().score(sde)
        xi = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator())
        z = start(sde)
        s = score(z, 0.5)
        found = Langevin().correct(z, sde.driven, 1.0, s, xi)
        assert torch.allclose(found, self.by_hand(z, s, xi, 1.0, 0.16), rtol=1e-13, atol=1e-13)

    def test_batch_norms_are_means_of_norms_as_published(self) -> None:
        g = generator()
        z, s, xi = (torch.randn(6, 1, 3, 4, dtype=torch.float64, generator=g) for _ in range(3))
        alpha, snr = 0.7, 0.16
        found = Langevin(snr=snr, norm="batch").correct(z, (0,), alpha, s, xi)
        noise_norm = xi.reshape(6, -1).norm(dim=-1).mean()
        score_norm = s.reshape(6, -1).norm(dim=-1).mean()
        eta = (snr * noise_norm / score_norm) ** 2 * 2 * alpha
        expected = z + eta * s + (2 * eta).sqrt() * xi
        assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)

    def test_with_norms_of_samples_a_sample_does_not_depend_on_its_batch(self) -> None:
        g = generator()
        z, s, xi = (torch.randn(6, 1, 7, generator=g) for _ in range(3))
        for norm, same in (("sample", True), ("batch", False)):
            corrector = Langevin(norm=norm)  # type: ignore[arg-type]
            together = corrector.correct(z, (0,), 1.0, s, xi)
            alone = corrector.correct(z[2:3], (0,), 1.0, s[2:3], xi[2:3])
            assert torch.equal(together[2:3], alone) is same

    def test_the_state_is_not_changed(self) -> None:
        z = torch.ones(2, 2, 3)
        Langevin().correct(z, (1,), 1.0, torch.ones(2, 1, 3), torch.ones(2, 1, 3))
        assert torch.equal(z, torch.ones(2, 2, 3))

    @pytest.mark.parametrize("norm", ["sample", "batch"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [0.0, 1e-30])
    def test_without_a_score_the_state_stays_finite(
        self, size: float, dtype: torch.dtype, norm: Any
    ) -> None:
        xi = torch.randn(2, 1, 3, dtype=dtype, generator=generator())
        s = torch.full((2, 1, 3), size, dtype=dtype)
        found = Langevin(norm=norm).correct(torch.ones(2, 1, 3, dtype=dtype), (0,), 1.0, s, xi)
        assert found.isfinite().all()

    def test_one_sample_without_a_score_does_not_spoil_the_others(self) -> None:
        s = torch.ones(3, 1, 4)
        s[1] = 0
        xi = torch.randn(3, 1, 4, generator=generator())
        found = Langevin().correct(torch.zeros(3, 1, 4), (0,), 1.0, s, xi)
        assert found[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("norm", ["sample", "batch"])
    @pytest.mark.parametrize(("components", "driven"), [(1, 0), (2, 1)])
    def test_a_gaussian_keeps_its_variance_to_first_order(
        self, components: int, driven: int, norm: Any
    ) -> None:
        # With many dimensions norms are their expectations: eta = 2 (r sigma^2)^2 / V at variance
        # V, and V = (1 - eta / sigma^2)^2 V + 2 eta holds for V = sigma^2 (1 + r^2), to O(1/D).
        batch, dimension, r, sigma = 50, 2000, 0.3, 0.7
        g = generator()
        z = sigma * torch.randn(batch, components, dimension, generator=g, dtype=torch.float64)
        before = z.clone()
        corrector = Langevin(snr=r, norm=norm)
        rest = [i for i in range(components) if i != driven]
        # Deviations decay by 1 - 2 r^2 a step: by 1e-5 in 60.
        for _ in range(60):
            xi = torch.randn(batch, 1, dimension, generator=g, dtype=torch.float64)
            z = corrector.correct(z, (driven,), 1.0, -z[:, driven : driven + 1] / sigma**2, xi)
        found = float(z[:, driven].square().mean()) / sigma**2
        # Five standard errors of a variance, and the next order in 1/D.
        assert abs(found / (1 + r**2) - 1) <= 5 * math.sqrt(2 / (batch * dimension)) + 4 / dimension
        assert torch.equal(z[:, rest], before[:, rest])


class TestSampling:
    """The whole method."""

    CASES = (
        ("VP", "reverse diffusion", 1e-3),
        ("VE", "reverse diffusion", 1e-3),
        ("CLD", "EM", 1e-2),
    )

    @pytest.mark.parametrize(("name", "predictor", "eps"), CASES)
    def test_a_mixture_is_sampled_right(self, name: str, predictor: str, eps: float) -> None:
        sde, n, r, steps = FAMILIES[name](), 4000, 0.16, 150
        weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        means = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]], dtype=torch.float64)
        width = 0.3
        data = GaussianMixture(
            weights, means, width**2 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2)
        )
        solver = PredictorCorrector(PREDICTORS[predictor], Langevin(snr=r, norm="batch"))
        x = solvers.solve(
            ReverseProcess(sde, data.score(sde)),
            solver,
            start(sde, (n, 2)),
            solvers.quadratic_times(1.0, eps, steps),
            generator=generator(),
            denoise=True,
        ).data
        distance = torch.cdist(x, means)
        nearest = distance.argmin(1)
        shares = torch.bincount(nearest, minlength=4) / n
        # Five standard errors, and as much as a first-order method may be off, 1/steps.
        spread = (weights * (1 - weights) / n).sqrt()
        assert ((shares - weights).abs() <= 5 * spread + 1 / steps).all()
        # Mean square distances from the centres are 2 width^2, n degrees of freedom each axis; the
        # corrector widens by r^2 at least, a first-order predictor by some steps^-1 of the clock.
        variance = float(distance.amin(1).square().mean()) / 2 / width**2
        assert abs(variance - 1) <= 5 / math.sqrt(n) + 2 * r**2 + 10 / steps

    @pytest.mark.parametrize("norm", ["sample", "batch"])
    @every_family
    def test_one_seed_gives_the_same_bits(self, name: str, norm: Any) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        solver = PredictorCorrector(solvers.EulerMaruyama(), Langevin(norm=norm, steps=2))

        def run(seed: int) -> torch.Tensor:
            return solvers.solve(process, solver, start(sde), GRID, generator=generator(seed)).state

        assert torch.equal(run(0), run(0))
        assert (run(0) != run(1)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("axes", [(), (1, 4, 4)])
    def test_results_have_the_shape_and_type_of_the_state(
        self, axes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        sde = CLD()
        solver = PredictorCorrector(solvers.EulerMaruyama(), Langevin())
        process = ReverseProcess(sde, lambda z, t: -4 * z[:, 1:])
        solution = solvers.solve(process, solver, start(sde, (4, *axes), dtype), GRID)
        assert solution.success
        assert solution.state.shape == (4, 2, *axes)
        assert solution.state.dtype == dtype

    @pytest.mark.parametrize("norm", ["sample", "batch"])
    def test_an_empty_batch_stays_empty(self, norm: Any) -> None:
        solver = PredictorCorrector(solvers.EulerMaruyama(), Langevin(norm=norm))
        process = ReverseProcess(CLD(), lambda z, t: -z[:, 1:])
        solution = solvers.solve(process, solver, torch.zeros(0, 2, 2), GRID)
        assert solution.state.shape == (0, 2, 2)

    @pytest.mark.parametrize("norm", ["sample", "batch"])
    @pytest.mark.parametrize("predictor", ["EM", "reverse diffusion", "ancestral", "Heun"])
    @every_family
    def test_a_step_waits_for_no_value(
        self, name: str, predictor: str, norm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde = FAMILIES[name]()
        solver = PredictorCorrector(PREDICTORS[predictor], Langevin(norm=norm, steps=2))
        score = exact.mixture().score(sde)
        process, z = ReverseProcess(sde, score), start(sde)
        known = known_score(process, solver, GRID, z)
        tables, noise = solver.prepare(process, GRID), solvers.FreshNoise(generator())
        with no_waiting(monkeypatch):
            memory: Memory = ()
            for i in range(len(GRID) - 1):
                z, memory = solver.step(z, memory, tables, i, known, noise)
        assert z.isfinite().all()


class TestRefusals:
    """Options and predictors that are refused."""

    @pytest.mark.parametrize(
        "predictor",
        [
            solvers.SSCS(),
            solvers.SSCS(score_step="midpoint"),
            solvers.SSCS(score_step="gaussian"),
            solvers.ExponentialMultistep(corrector=True),
            solvers.ExponentialMultistep(order=1, stochasticity=1.0, corrector=True),
            solvers.ProbabilityFlow(),
            solvers.GottaGoFast(),
        ],
    )
    def test_predictors_without_a_state_at_grid_times(self, predictor: Solver) -> None:
        with pytest.raises(ValueError, match="predictor must have a state at each grid time"):
            PredictorCorrector(predictor, Langevin())

    @pytest.mark.parametrize("predictor", [None, "EM", solvers.EulerMaruyama, Langevin()])
    def test_predictors_that_are_no_solvers(self, predictor: Any) -> None:
        with pytest.raises(TypeError, match="predictor must be a solver"):
            PredictorCorrector(predictor, Langevin())

    @pytest.mark.parametrize("corrector", [None, 0.16, Langevin, solvers.EulerMaruyama()])
    def test_correctors_that_are_none(self, corrector: Any) -> None:
        with pytest.raises(TypeError, match="corrector must be a Langevin"):
            PredictorCorrector(solvers.EulerMaruyama(), corrector)

    @pytest.mark.parametrize("snr", [0.0, -0.1, math.nan, math.inf])
    def test_ratios_that_are_not_positive(self, snr: float) -> None:
        with pytest.raises(ValueError, match="snr must be finite and positive"):
            Langevin(snr=snr)

    @pytest.mark.parametrize("steps", [0, -1, 1.0, "1", None, True])
    def test_steps_that_are_no_positive_integer(self, steps: Any) -> None:
        with pytest.raises(ValueError, match="steps must be a positive integer"):
            Langevin(steps=steps)

    @pytest.mark.parametrize("norm", ["mean", "", None])
    def test_unknown_norms(self, norm: Any) -> None:
        with pytest.raises(ValueError, match="norm must be one of 'sample', 'batch'"):
            Langevin(norm=norm)

    def test_what_the_predictor_refuses(self) -> None:
        process = ReverseProcess(CLD(friction=0.5), lambda z, t: pytest.fail("asked"))
        solver = PredictorCorrector(solvers.Ancestral(), Langevin())
        with pytest.raises(ValueError, match="determine"):
            solvers.solve(process, solver, torch.zeros(1, 2, 1), solvers.uniform_times(1, 0, 300))

    def test_solvers_are_frozen_values(self) -> None:
        def make() -> PredictorCorrector:
            return PredictorCorrector(solvers.EulerMaruyama(), Langevin(snr=0.2))

        assert make() == make()
        assert hash(make()) == hash(make())
        with pytest.raises(dataclasses.FrozenInstanceError):
            make().corrector = Langevin()  # type: ignore[misc]
