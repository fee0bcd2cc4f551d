"""One exact denoiser, in every convention of networks, is the exact score of every process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    DenoiserScore,
    GaussianMixture,
    MixedScore,
    NoisePath,
    PredictionDenoiser,
    ReverseProcess,
    solvers,
)
from cldsde.score import ScoreDenoiser
from probes import generator
from tolerances import EPS32, rounding, standard_error

PROCESSES = {"VP": VPSDE(), "VE": VESDE(), "CLD": CLD(), "PSLD": PSLD(), "HOLD": HOLD()}
CRITICAL, VP = PROCESSES["CLD"], PROCESSES["VP"]
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.25, 0.0], [0.0, 0.5]]], dtype=torch.float64
)
DATA = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
CONDITIONED = rounding(4, 1e6)  # û loses the condition number of Σ
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)


def exact(u: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_0 + σ n = u] of the mixture, by dense matrices."""
    noise = sigma.double().reshape(-1, 1, 1, 1).square() * torch.eye(2, dtype=torch.float64)
    total = (COVARIANCES + noise).expand(len(u), -1, -1, -1)
    off = (u.double().unsqueeze(1) - MEANS).unsqueeze(-1)
    solved = torch.linalg.solve(total, off)
    log_weights = WEIGHTS.log() - 0.5 * ((off.mT @ solved)[..., 0, 0] + torch.logdet(total))
    each = MEANS + (COVARIANCES @ solved)[..., 0]
    return (log_weights.softmax(1).unsqueeze(-1) * each).sum(1).to(u.dtype)


def network(alpha: Any, sigma: Any, predicts: str, seen: list[Tensor]) -> Any:
    """Output of an ideal network for x = α(t) x_0 + σ(t) n."""

    def called(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        at = t.double().unsqueeze(1)
        a, s = alpha(at), sigma(at)
        data = exact(x / a, (s / a).squeeze(1))
        noise = (x - a * data) / s
        if predicts == "flow":
            da, ds = (torch.func.jvp(f, (at,), (torch.ones_like(at),))[1] for f in (alpha, sigma))
            return da * data + ds * noise
        return {
            "noise": noise,
            "data": data,
            "velocity": a * noise - s * data,
            "score": -noise / s,
        }[predicts]

    return called


def clock(t: Tensor) -> Tensor:
    return 0.1 * t + 9.95 * t**2


def table_log_snr(t: Tensor) -> Tensor:
    kappas = 0.5 * ALPHAS_CUMPROD.logit()
    low = t.floor().long().clamp(0, 998)
    return kappas[low] + (t - low) * (kappas[low + 1] - kappas[low])


half_pi = math.pi / 2
# The path, and α and σ as formulas of their own.
PATHS: dict[str, tuple[NoisePath, Any, Any]] = {
    "linear": (NoisePath.linear(), lambda t: 1 - t, lambda t: t),
    "cosine": (
        NoisePath.cosine(),
        lambda t: (half_pi * t).cos(),
        lambda t: (half_pi * t).sin(),
    ),
    "VP": (
        NoisePath.of(VPSDE()),
        lambda t: (-clock(t) / 2).exp(),
        lambda t: (-torch.expm1(-clock(t))).sqrt(),
    ),
    "sigma": (
        NoisePath(torch.ones_like, lambda t: t, interval=(1e-4, 1e3)),
        torch.ones_like,
        lambda t: t,
    ),
    "a path of one's own": (
        NoisePath(lambda t: 1 - t**2, lambda t: t.sqrt() * t, interval=(1e-4, 1 - 1e-5)),
        lambda t: 1 - t**2,
        lambda t: t**1.5,
    ),
    "table": (
        NoisePath.from_alphas_cumprod(ALPHAS_CUMPROD),
        lambda t: torch.sigmoid(2 * table_log_snr(t)).sqrt(),
        lambda t: torch.sigmoid(-2 * table_log_snr(t)).sqrt(),
    ),
}
CONVENTIONS = [
    (path, predicts)
    for path in PATHS
    for predicts in ("noise", "data", "velocity", "flow", "score")
    if (path, predicts) != ("table", "flow")
]


def denoiser(path: str, predicts: str, seen: list[Tensor] | None = None) -> PredictionDenoiser:
    noise_path, *functions = PATHS[path]
    ideal = network(*functions, predicts, [] if seen is None else seen)
    return PredictionDenoiser(ideal, noise_path, predicts)


def states(sde: Any, t: float, n: int = 16) -> Tensor:
    x = DATA.sample(n, generator=generator(1), dtype=torch.float64)
    return sde.perturb(x, torch.full((n,), t, dtype=torch.float64), generator=generator(2))[0]


@pytest.mark.parametrize("process", ["VP", "CLD", "HOLD"])
@pytest.mark.parametrize("convention", ["EDM", *CONVENTIONS], ids=str)
def test_every_convention_gives_the_exact_score(process, convention):
    """At times of each sample; the mixture's own score has a reference in 50 digits."""
    sde = PROCESSES[process]
    found = exact if convention == "EDM" else denoiser(*convention)
    levels = torch.tensor([-2.5, 0.0, 2.5], dtype=torch.float64)  # within every path
    t = solvers.times_of_log_snr(sde, levels)
    z = sde.perturb(DATA.sample(3, generator=generator(1), dtype=torch.float64), t)[0]
    expected = DATA.score(sde)(z, t)
    assert_scores(DenoiserScore(found, sde)(z, t), expected)
    assert_scores(DenoiserScore(found, sde)(z[1:2], t[1]), expected[1:2])


def assert_scores(found: Tensor, expected: Tensor) -> None:
    """Relative to the largest entry of each sample."""
    error = (found - expected).abs().amax((1, 2))
    assert (error <= CONDITIONED * expected.abs().amax((1, 2))).all()


def test_samples_have_the_moments_of_the_data():
    """4,000 samples, 40 steps of order 2 to κ = 4.5."""
    score = DenoiserScore(denoiser("table", "noise"), CRITICAL)
    start, end = solvers.times_of_log_snr(CRITICAL, torch.tensor([-4.0, 4.5])).tolist()
    times = solvers.root_times(start, end, 40)
    x = solvers.sample(CRITICAL, score, (4000, 2), times=times, dtype=torch.float64)
    mean = WEIGHTS @ MEANS
    spread = torch.einsum("n,nij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None])
    covariance = spread - mean[:, None] * mean
    error = standard_error(1.0, len(x))
    assert ((x.mean(0) - mean).abs() <= error * covariance.diagonal().sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() <= error * products.std(0)).all()


class TestNoisePath:
    @pytest.mark.parametrize("path", [p for p in PATHS if p != "table"])
    def test_the_time_of_a_level(self, path):
        """Against the root finder of scipy; errors are multiplied by at most 1e3."""
        noise_path, alpha, sigma = PATHS[path]
        for kappa in (-3.0, 0.0, 4.0):

            def off(t: float, kappa: float = kappa) -> float:
                at = torch.tensor(t, dtype=torch.float64)
                return float((alpha(at) / sigma(at)).log()) - kappa

            low, high = noise_path.interval
            wanted = brentq(off, max(low, 1e-9), min(high, 1e3) * (1 - 1e-12), xtol=1e-15)
            found = noise_path.time(torch.tensor([kappa], dtype=torch.float64))
            assert float(found) == pytest.approx(wanted, rel=rounding(100, 1e3))

    def test_levels_of_a_table_are_its_entries(self):
        path = PATHS["table"][0]
        index = torch.tensor([0.0, 17.0, 998.0, 999.0], dtype=torch.float64)
        table = ALPHAS_CUMPROD[index.long()]
        torch.testing.assert_close(path.signal(index), table.sqrt(), rtol=rounding(), atol=0)
        noise = (1 - table).sqrt()
        torch.testing.assert_close(path.noise(index), noise, rtol=rounding(100), atol=0)
        kappa = 0.5 * table.logit()
        torch.testing.assert_close(path.time(kappa), index, rtol=0, atol=rounding(100, 1e4))

    def test_a_table_that_ends_without_signal_is_cut_before(self):
        """Of tables with zero signal at the end (Lin et al. 2024) the finite levels are used."""
        table = torch.cat([ALPHAS_CUMPROD[:10], torch.zeros(1, dtype=torch.float64)])
        assert NoisePath.from_alphas_cumprod(table).interval == (0.0, 9.0)


class TestClocks:
    """The network's clock at σ = 2 and σ = 0.1."""

    @pytest.mark.parametrize(
        ("clock", "expected"),
        [
            ("time", lambda s: s / (1 + s)),
            ("sigma", lambda s: s),
            ("log_sigma/4", lambda s: s.log() / 4),
            ("log_snr", lambda s: -2 * s.log()),
            (lambda t: 1000 * t, lambda s: 1000 * s / (1 + s)),
        ],
    )
    def test_clocks_by_name_and_by_function(self, clock, expected):
        seen: list[Tensor] = []

        def told(x: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return x

        sigma = torch.tensor([2.0, 0.1], dtype=torch.float64)
        PredictionDenoiser(told, NoisePath.linear(), clock=clock)(torch.zeros(2, 3).double(), sigma)
        torch.testing.assert_close(seen[0], expected(sigma), rtol=rounding(), atol=rounding())

    def test_the_nearest_index_is_an_integer(self):
        """The network is told the nearest level and shown the state of the exact one."""
        seen: list[Tensor] = []

        def told(x: Tensor, t: Tensor) -> Tensor:
            seen.extend((x, t))
            return torch.zeros_like(x)

        path = NoisePath.from_alphas_cumprod(ALPHAS_CUMPROD)
        level = torch.tensor(123.4, dtype=torch.float64)
        alpha, sigma = path.signal(level), path.noise(level)
        u = torch.ones(2, 3, dtype=torch.float64)
        PredictionDenoiser(told, path, clock="index")(u, sigma / alpha)
        assert seen[1].tolist() == [123, 123]
        assert seen[1].dtype == torch.int64
        torch.testing.assert_close(seen[0], alpha * u, rtol=rounding(100, 10), atol=0)

    def test_single_precision_keeps_the_times_of_a_grid(self):
        """Levels of a solver's times reach the path in double precision."""
        seen: list[Tensor] = []
        process = ReverseProcess(VP, DenoiserScore(denoiser("linear", "noise", seen), VP))
        times = solvers.root_times(0.8, 0.01, 5)
        solvers.solve(process, solvers.EulerMaruyama(), torch.zeros(2, 1, 2), times)
        sigma = (-VP.log_snr(times[:-1])).exp()
        wanted = (sigma / (1 + sigma)).float()
        assert torch.equal(torch.stack([t[0] for t in seen]), wanted)


class TestErrors:
    def test_nothing_is_evaluated_outside_the_trained_levels(self):
        """The error names level, range and the times to use, which then work."""
        asked: list[Tensor] = []

        def counted(u: Tensor, sigma: Tensor) -> Tensor:
            asked.append(sigma)
            return exact(u, sigma)

        sde = CRITICAL
        score = DenoiserScore(counted, sde, noise_levels=(0.01, 80.0))
        process = ReverseProcess(sde, score)
        start = sde.prior.sample((4, 2), generator=generator())
        with pytest.raises(
            ValueError, match=r"0.01 to 80; got σ = 247.* Sample from t = 0.8"
        ) as error:
            solvers.solve(process, solvers.EulerMaruyama(), start, solvers.root_times(1.0, 0.1, 4))
        assert not asked
        words = str(error.value).split("t = ")
        first, last = (float(words[i].split(" ")[0]) for i in (-2, -1))
        grid = solvers.root_times(first, last, 4)
        assert solvers.solve(process, solvers.EulerMaruyama(), start, grid).success
        bounds = torch.stack(asked)
        assert bounds.min() >= 0.01
        assert bounds.max() <= 80


def test_gradients_of_state_and_parameters():
    """Against the derivative of the mixture's own score, and differences of a scale."""
    sde = PROCESSES["PSLD"]
    z = states(sde, 0.4).requires_grad_()
    score = DenoiserScore(exact, sde)(z, 0.4)
    (found,) = torch.autograd.grad(score.sum(), z)
    again = z.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(DATA.score(sde)(again, 0.4).sum(), again)
    torch.testing.assert_close(found, wanted, rtol=CONDITIONED, atol=CONDITIONED)

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    ideal = network(*PATHS["linear"][1:], "noise", [])
    scaled = PredictionDenoiser(lambda x, t: scale * ideal(x, t), NoisePath.linear())
    total = DenoiserScore(scaled, sde)(z.detach(), 0.4).sum()
    (slope,) = torch.autograd.grad(total, scale)
    scale.data.zero_()
    # The score is affine in the scale.
    change = total - DenoiserScore(scaled, sde)(z.detach(), 0.4).sum()
    assert float(slope) == pytest.approx(float(change.detach()), rel=rounding(1e6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_in_lower_precision(dtype):
    """Within a few roundings of the state's dtype of what the score is in double precision."""
    sde = CRITICAL
    z = states(sde, 0.5).to(dtype)
    found = DenoiserScore(exact, sde)(z, 0.5)
    assert found.dtype == dtype
    wanted = DATA.score(sde)(z.double(), 0.5)
    # û and the residual each take k products, of entries up to the size of the score's.
    assert (found - wanted).abs().max() <= 16 * torch.finfo(dtype).eps * wanted.abs().max()


def test_conditions_reach_the_network():
    told: dict[str, Any] = {}

    def conditional(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        told.update(conditions)
        return x

    sde = VP
    score = DenoiserScore(PredictionDenoiser(conditional, NoisePath.linear()), sde)
    score(torch.zeros(4, 1, 2), 0.5, class_labels=torch.arange(4))
    assert told["class_labels"].tolist() == [0, 1, 2, 3]


class TestScoreDenoiser:
    """The denoiser inside a score."""

    @pytest.mark.parametrize("process", PROCESSES)
    def test_the_denoiser_of_an_exact_score(self, process):
        """At any state of the right estimate, whatever fills it up."""
        sde = PROCESSES[process]
        sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        u = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
        for options in ({}, {"fill": False}, {"seed": 1}):
            found = ScoreDenoiser(DATA.score(sde), **options)(u, sigma)
            torch.testing.assert_close(found, exact(u, sigma), rtol=CONDITIONED, atol=CONDITIONED)

    def test_a_mixed_score_under_another_process(self):
        """A network trained with VP is, under CLD, as one that is shown the estimate."""
        network = torch.nn.Module()
        network.forward = lambda x, clock: torch.tanh(x) * clock.reshape(-1, 1).cos()
        vp, cld = VPSDE(), CLD()
        trained = MixedScore(network, vp, 0.2, 0.7).double()
        shown = MixedScore(network, cld, 0.2, 0.7, inputs="estimate").double()
        z = states(cld, 0.4)
        crossed = DenoiserScore(trained.denoiser, cld)
        torch.testing.assert_close(crossed(z, 0.4), shown(z, 0.4), rtol=8 * EPS32, atol=8 * EPS32)

    def test_times_are_those_of_the_levels(self):
        """Known levels keep their digits through both conversions, in single precision."""
        seen: list[Tensor] = []
        vp, cld = VPSDE(), CLD()
        plain = DATA.score(vp)

        def score(z: Tensor, t: Tensor) -> Tensor:
            seen.append(t[:1].clone())
            return plain(z, t)

        inner = ScoreDenoiser(score, vp)
        times = solvers.root_times(0.8, 0.01, 5)
        solvers.solve(
            ReverseProcess(cld, DenoiserScore(inner, cld)),
            solvers.EulerMaruyama(),
            torch.zeros(2, 2, 2),
            times,
        )
        wanted = solvers.times_of_log_snr(vp, cld.log_snr(times[:-1])).float()
        assert torch.equal(torch.cat(seen), wanted)

    def test_states_that_are_filled_up_look_like_states(self):
        """The covariance of z given x_0, if u has the noise of its level: 20,000 states."""
        sde, sigma, seen = CLD(), 0.8, []

        def score(z: Tensor, t: Tensor) -> Tensor:
            seen.append((z, float(t[0])))
            return z[:, 1:]

        noise = torch.randn(20_000, 1, generator=generator(), dtype=torch.float64)
        ScoreDenoiser(score, sde)(0.3 + sigma * noise, sigma)
        z, t = seen[0]
        kernel = sde.marginal(torch.tensor(t, dtype=torch.float64))
        off = z[..., 0] - 0.3 * kernel.mean[:, 0]
        found = off.mT @ off / len(off)
        # A product of two normals has a standard deviation of at most √2 of its scale.
        scale = kernel.covariance.diagonal().sqrt()
        tolerance = 4 * math.sqrt(2 / len(off)) * scale[:, None] * scale
        assert ((found - kernel.covariance).abs() <= tolerance).all()
