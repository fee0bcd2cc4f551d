"""Predictor–corrector sampling: its evaluations, the correction's formula, and what it samples."""

import math
from dataclasses import dataclass

import pytest
import torch

from cldsde import CLD, HOLD, VESDE, VPSDE, ReverseProcess, solvers
from cldsde.solvers import Langevin, PredictorCorrector
from cldsde.solvers.authoring import Facts, GridSolver
from probes import Recording, generator, start, untouchable
from score import cases
from tolerances import standard_error_of_variance

PROCESSES = {"VP": VPSDE(), "VE": VESDE(0.05, 20.0), "CLD": CLD(), "HOLD": HOLD()}
GRID = solvers.quadratic_times(1.0, 1e-2, 5)
FEW = 1e-13  # a dozen roundings of numbers of size 1
every_norm = pytest.mark.parametrize("norm", ["sample", "batch"])


@dataclass(frozen=True, kw_only=True)
class Stay(GridSolver):
    """A predictor that evaluates the score and returns the state."""

    facts = Facts(applies_to="everything", nfe_per_step=1)

    def prepare(self, process, times):
        return None

    def evaluation_times(self, process, times):
        return times[:-1]

    def step(self, z, memory, tables, i, score, noise):
        score(z, i)
        return z, ()


def by_hand(z, s, xi, alpha, snr):
    """Song et al. (2021), algorithms 4 and 5, with norms of samples."""
    rows = []
    for one, slope, noise in zip(z, s, xi, strict=True):
        eta = 2 * alpha * (snr * math.sqrt(noise.square().sum() / slope.square().sum())) ** 2
        rows.append(one + eta * slope + math.sqrt(2 * eta) * noise)
    return torch.stack(rows)


@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize(
    ("predictor", "stages"),
    [
        (solvers.EulerMaruyama(), 1),
        (solvers.ReverseDiffusion(), 1),
        (solvers.Ancestral(), 1),
        (solvers.StochasticHeun(), 2),
        (solvers.ExponentialMultistep(order=2), 1),
        (solvers.EDMHeun(), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_corrections_come_before_each_step(predictor, stages, corrections):
    sde = VPSDE() if isinstance(predictor, solvers.EDMHeun) else CLD()
    score, state = Recording(cases.mixture().score(sde)), start(sde)
    process, solver = (
        ReverseProcess(sde, score),
        PredictorCorrector(predictor, Langevin(steps=corrections)),
    )
    found = solvers.solve(process, solver, state, GRID, generator=generator())
    assert solver.facts.nfe_per_step == corrections + stages
    assert found.nfev == score.calls == 5 * (corrections + stages)
    expected = []
    for t, u in zip(GRID.tolist(), GRID.tolist()[1:], strict=False):
        expected += [t] * corrections + [t, u][:stages]
    assert [t[0].item() for t in score.times] == expected
    assert solver.evaluation_times(process, GRID).tolist() == expected
    assert torch.equal(score.states[0], state)
    assert (score.states[1][:, -1] != state[:, -1]).all()


class TestCorrection:
    """The correction is the published formula, on the driven components alone."""

    @pytest.mark.parametrize("name", list(PROCESSES))
    def test_it_is_the_formula(self, name):
        sde, snr = PROCESSES[name], 0.3
        times = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
        process, driven = ReverseProcess(sde, cases.mixture().score(sde)), list(sde.driven)
        draws = list(torch.randn(2, 3, 1, 2, dtype=torch.float64, generator=generator()))
        solver, noise = PredictorCorrector(Stay(), Langevin(snr=snr)), solvers.RecordedNoise(draws)
        found = solvers.solve(process, solver, start(sde), times, noise=noise).state
        # The clock of VP, its alpha_t^2 / alpha_u^2 = 1 - b.
        clock, z = 0.1 * times + 0.5 * 19.9 * times**2, start(sde)
        for i in range(2):
            alpha = math.exp(-float(clock[i] - clock[i + 1])) if name == "VP" else 1.0
            s = process.score(z, times[i])
            z = z.clone()
            z[:, driven] = by_hand(z[:, driven], s, draws[i], alpha, snr)
        # Two scores with an error of 1e-12.
        assert torch.allclose(found, z, rtol=1e-10, atol=1e-10)
        still = [i for i in range(sde.components) if i not in driven]
        assert torch.equal(found[:, still], start(sde)[:, still])

    def test_all_driven_components_move(self):
        sde, z = CLD(position_noise=0.3), start(CLD())
        xi = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator())
        s = cases.mixture().score(sde)(z, 0.5)
        found = Langevin().correct(z, sde.driven, 1.0, s, xi)
        assert torch.allclose(found, by_hand(z, s, xi, 1.0, 0.16), rtol=FEW, atol=FEW)

    def test_batch_norms_are_means_of_norms_as_published(self):
        z, s, xi = torch.randn(3, 6, 1, 3, 4, dtype=torch.float64, generator=generator())
        before, alpha, snr = z.clone(), 0.7, 0.16
        found = Langevin(snr=snr, norm="batch").correct(z, (0,), alpha, s, xi)
        noise_norm, score_norm = (x.reshape(6, -1).norm(dim=-1).mean() for x in (xi, s))
        eta = (snr * noise_norm / score_norm) ** 2 * 2 * alpha
        assert torch.allclose(found, z + eta * s + (2 * eta).sqrt() * xi, rtol=FEW, atol=FEW)
        assert torch.equal(z, before)

    def test_only_with_norms_of_samples_a_sample_does_not_depend_on_its_batch(self):
        z, s, xi = torch.randn(3, 6, 1, 7, generator=generator())
        for norm, same in (("sample", True), ("batch", False)):
            corrector = Langevin(norm=norm)
            together = corrector.correct(z, (0,), 1.0, s, xi)
            alone = corrector.correct(z[2:3], (0,), 1.0, s[2:3], xi[2:3])
            assert torch.equal(together[2:3], alone) is same

    @every_norm
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [0.0, 1e-30])
    def test_without_a_score_the_state_stays_finite(self, size, dtype, norm):
        xi = torch.randn(2, 1, 3, dtype=dtype, generator=generator())
        s = torch.full((2, 1, 3), size, dtype=dtype)
        found = Langevin(norm=norm).correct(torch.ones_like(xi), (0,), 1.0, s, xi)
        assert found.isfinite().all()

    @every_norm
    @pytest.mark.parametrize(("components", "driven"), [(1, 0), (2, 1)])
    def test_a_gaussian_keeps_its_variance_to_first_order(self, components, driven, norm):
        # With many dimensions norms are their expectations: eta = 2 (r sigma^2)^2 / V at variance
        # V, and V = (1 - eta / sigma^2)^2 V + 2 eta holds for V = sigma^2 (1 + r^2), to O(1/D).
        batch, dimension, r, sigma, g = 20, 1000, 0.3, 0.7, generator()
        z = sigma * torch.randn(batch, components, dimension, generator=g, dtype=torch.float64)
        before, corrector = z.clone(), Langevin(snr=r, norm=norm)
        # Deviations decay by 1 - 2 r^2 per step: by 1e-5 in 60.
        for _ in range(60):
            xi = torch.randn(batch, 1, dimension, generator=g, dtype=torch.float64)
            z = corrector.correct(z, (driven,), 1.0, -z[:, driven : driven + 1] / sigma**2, xi)
        found = float(z[:, driven].square().mean()) / sigma**2
        error = standard_error_of_variance(1.0, batch * dimension) + 4 / dimension
        assert found / (1 + r**2) == pytest.approx(1, abs=error)
        rest = [i for i in range(components) if i != driven]
        assert torch.equal(z[:, rest], before[:, rest])


EM = solvers.EulerMaruyama()
NO_GRID_STATE = "predictor must have a state at each grid time"


class TestRejected:
    @pytest.mark.parametrize(
        ("predictor", "corrector", "message"),
        [
            *[
                (x, Langevin(), NO_GRID_STATE)
                for x in (
                    solvers.SSCS(),
                    solvers.SSCS(score_step="midpoint"),
                    solvers.ExponentialMultistep(corrector=True),
                    solvers.ProbabilityFlow(),
                    solvers.GottaGoFast(),
                )
            ],
            *[(x, Langevin(), "predictor must be a solver") for x in (None, "EM", Langevin())],
            *[(EM, x, "corrector must be a Langevin") for x in (None, 0.16, Langevin, EM)],
        ],
    )
    def test_pairs(self, predictor, corrector, message):
        with pytest.raises((TypeError, ValueError), match=message):
            PredictorCorrector(predictor, corrector)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *[({"snr": x}, "snr must be finite and positive") for x in (0.0, math.nan)],
            *[({"steps": x}, "steps must be a positive integer") for x in (0, 1.0, None, True)],
            *[({"norm": x}, "norm must be one of 'sample', 'batch'") for x in ("mean", None)],
        ],
        ids=str,
    )
    def test_options_of_the_corrector(self, options, message):
        with pytest.raises(ValueError, match=message):
            Langevin(**options)

    def test_processes_that_the_predictor_rejects(self):
        process = ReverseProcess(CLD(friction=0.5), untouchable)
        solver = PredictorCorrector(solvers.Ancestral(), Langevin())
        with pytest.raises(ValueError, match="determine"):
            solvers.plan(process, solver, solvers.uniform_times(1, 0, 300))

    def test_predictors_whose_steps_differ_in_their_evaluations(self):
        process = ReverseProcess(VPSDE(), untouchable)
        solver = PredictorCorrector(solvers.EDMHeun(churn=1.5), Langevin())
        message = "equally often in each step; .* takes 19 evaluations in 10 steps. A grid"
        with pytest.raises(ValueError, match=message):
            solvers.plan(process, solver, solvers.root_times(1.0, 0.0, 10))
