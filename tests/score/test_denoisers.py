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

PROCESSES = {"VP": VPSDE, "VE": VESDE, "CLD": CLD, "PSLD": PSLD, "HOLD": HOLD}
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.25, 0.0], [0.0, 0.5]]], dtype=torch.float64
)
DATA = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
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


def network(alpha: Any, sigma: Any, rates: Any, predicts: str, seen: list[Tensor]) -> Any:
    """What an ideal network returns for x = α(t) x_0 + σ(t) n."""

    def called(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        a, s = (f(t.double()).unsqueeze(1) for f in (alpha, sigma))
        data = exact(x / a, (s / a).squeeze(1))
        noise = (x - a * data) / s
        if predicts == "flow":
            a_rate, s_rate = (f(t.double()).unsqueeze(1) for f in rates)
            return a_rate * data + s_rate * noise
        return {
            "noise": noise,
            "data": data,
            "velocity": a * noise - s * data,
            "score": -noise / s,
        }[predicts]

    return called


def vp_alpha(t: Tensor) -> Tensor:
    return (-0.5 * (0.1 * t + 9.95 * t**2)).exp()


def vp_sigma(t: Tensor) -> Tensor:
    return (-torch.expm1(-(0.1 * t + 9.95 * t**2))).sqrt()


def vp_rates() -> Any:
    beta = lambda t: 0.1 + 19.9 * t  # noqa: E731
    return (
        lambda t: -0.5 * beta(t) * vp_alpha(t),
        lambda t: 0.5 * beta(t) * vp_alpha(t) ** 2 / vp_sigma(t),
    )


def table_log_snr(t: Tensor) -> Tensor:
    kappas = 0.5 * ALPHAS_CUMPROD.logit()
    low = t.floor().long().clamp(0, 998)
    return kappas[low] + (t - low) * (kappas[low + 1] - kappas[low])


half_pi = math.pi / 2
# The path, and α, σ and their rates as formulas of their own.
PATHS: dict[str, tuple[NoisePath, Any, Any, Any]] = {
    "linear": (
        NoisePath.linear(),
        lambda t: 1 - t,
        lambda t: t,
        (lambda t: -torch.ones_like(t), torch.ones_like),
    ),
    "cosine": (
        NoisePath.cosine(),
        lambda t: (half_pi * t).cos(),
        lambda t: (half_pi * t).sin(),
        (lambda t: -half_pi * (half_pi * t).sin(), lambda t: half_pi * (half_pi * t).cos()),
    ),
    "VP": (NoisePath.of(VPSDE()), vp_alpha, vp_sigma, vp_rates()),
    "sigma": (
        NoisePath(torch.ones_like, lambda t: t, interval=(1e-4, 1e3)),
        torch.ones_like,
        lambda t: t,
        (torch.zeros_like, torch.ones_like),
    ),
    "a path of one's own": (
        NoisePath(lambda t: 1 - t**2, lambda t: t.sqrt() * t, interval=(1e-4, 1 - 1e-5)),
        lambda t: 1 - t**2,
        lambda t: t**1.5,
        (lambda t: -2 * t, lambda t: 1.5 * t.sqrt()),
    ),
    "table": (
        NoisePath.from_alphas_cumprod(ALPHAS_CUMPROD),
        lambda t: torch.sigmoid(2 * table_log_snr(t)).sqrt(),
        lambda t: torch.sigmoid(-2 * table_log_snr(t)).sqrt(),
        None,
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


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("convention", ["EDM", *CONVENTIONS], ids=str)
def test_every_convention_gives_the_exact_score(process, convention):
    """To 1e-9 of the largest entry; the mixture's own score has a reference in 50 digits."""
    sde = PROCESSES[process]()
    found = exact if convention == "EDM" else denoiser(*convention)
    score, reference = DenoiserScore(found, sde), DATA.score(sde)
    levels = (-2.5, 0.0, 2.5)  # within every path, and every process but HOLD at the first
    for t in solvers.times_of_log_snr(sde, torch.tensor(levels, dtype=torch.float64)).tolist():
        z = states(sde, t)
        expected = reference(z, t)
        assert (score(z, t) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("process", PROCESSES)
def test_times_of_each_sample(process):
    """A batch whose samples have times of their own is as its samples one by one."""
    sde = PROCESSES[process]()
    score = DenoiserScore(denoiser("linear", "flow"), sde)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z = states(sde, 0.5, 3)
    apart = torch.cat([score(z[i : i + 1], t[i]) for i in range(3)])
    torch.testing.assert_close(score(z, t), apart, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("convention", ["EDM", *CONVENTIONS[::3]], ids=str)
def test_samples_have_the_moments_of_the_data(process, convention):
    """Within 4 standard errors: 4,000 samples, 60 steps of order 2 to κ = 4.5."""
    sde = PROCESSES[process]()
    found = exact if convention == "EDM" else denoiser(*convention)
    start, end = solvers.times_of_log_snr(sde, torch.tensor([-4.0, 4.5])).tolist()
    x = solvers.sample(
        sde,
        DenoiserScore(found, sde),
        (4000, 2),
        times=solvers.root_times(start, end, 60),
        dtype=torch.float64,
    )
    mean = WEIGHTS @ MEANS
    spread = torch.einsum("n,nij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None])
    covariance = spread - mean[:, None] * mean
    n = len(x)
    assert ((x.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / n).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    error = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - covariance).abs() <= 4 * error).all()


class TestNoisePath:
    @pytest.mark.parametrize("path", [p for p in PATHS if p != "table"])
    def test_the_time_of_a_level(self, path):
        """Against scipy's root finder."""
        noise_path, alpha, sigma, _ = PATHS[path]
        for kappa in (-3.0, 0.0, 4.0):

            def off(t: float, kappa: float = kappa) -> float:
                at = torch.tensor(t, dtype=torch.float64)
                return float((alpha(at) / sigma(at)).log()) - kappa

            low, high = noise_path.interval
            wanted = brentq(off, max(low, 1e-9), min(high, 1e3) * (1 - 1e-12), xtol=1e-15)
            found = noise_path.time(torch.tensor([kappa], dtype=torch.float64))
            assert float(found) == pytest.approx(wanted, rel=1e-11)

    def test_levels_of_a_table_are_its_entries(self):
        path = PATHS["table"][0]
        index = torch.tensor([0.0, 17.0, 998.0, 999.0], dtype=torch.float64)
        table = ALPHAS_CUMPROD[index.long()]
        torch.testing.assert_close(path.signal(index), table.sqrt(), rtol=1e-14, atol=0)
        torch.testing.assert_close(path.noise(index), (1 - table).sqrt(), rtol=1e-13, atol=0)
        kappa = 0.5 * table.logit()
        torch.testing.assert_close(path.time(kappa), index, rtol=0, atol=1e-9)

    def test_a_table_that_ends_without_signal_is_cut_before(self):
        """Of tables with zero signal at the end (Lin et al. 2024) the finite levels are used."""
        table = torch.cat([ALPHAS_CUMPROD[:10], torch.zeros(1, dtype=torch.float64)])
        assert NoisePath.from_alphas_cumprod(table).interval == (0.0, 9.0)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: NoisePath(1.0, lambda t: t), TypeError, "signal must be a function"),
            (
                lambda: NoisePath(lambda t: 1.0, lambda t: t),
                TypeError,
                "signal must return a tensor",
            ),
            (
                lambda: NoisePath(lambda t: t.sum(), lambda t: t),
                ValueError,
                "signal must return one value per time",
            ),
            (
                lambda: NoisePath(lambda t: 1 - t, lambda t: t * (1 - t)),
                ValueError,
                "noise/signal that increases with t; got a decrease after t = 0.99",
            ),
            (
                lambda: NoisePath(lambda t: 1 - t, lambda t: (t - 0.5).abs()),
                ValueError,
                "increases with t; got a decrease after t = 0",
            ),
            (lambda: NoisePath(lambda t: 1 / t, lambda t: t), ValueError, "signal must be finite"),
            (lambda: NoisePath(lambda t: 1 - 2 * t, lambda t: t), ValueError, "signal must be fin"),
            (
                lambda: NoisePath(torch.ones_like, lambda t: t, interval=(1.0, 1.0)),
                ValueError,
                "interval must be two increasing numbers",
            ),
            (
                lambda: NoisePath.from_alphas_cumprod(ALPHAS_CUMPROD.flip(0)),
                ValueError,
                "table must decrease",
            ),
            (
                lambda: NoisePath.from_alphas_cumprod([0.9, 0.5]),
                ValueError,
                "table must be a tensor",
            ),
            (lambda: NoisePath.of(CLD()), ValueError, "sde must have one component; got CLD"),
        ],
    )
    def test_paths_that_are_none(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


class TestClocks:
    """What the network is told, at σ = 2 and σ = 0.1."""

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
        torch.testing.assert_close(seen[0], expected(sigma), rtol=1e-14, atol=1e-14)

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
        torch.testing.assert_close(seen[0], alpha * u, rtol=1e-12, atol=0)

    def test_single_precision_keeps_the_times_of_a_grid(self):
        """Levels of a solver's times reach the path in double precision."""
        seen: list[Tensor] = []
        found = denoiser("linear", "noise", seen)
        sde = VPSDE()
        times = solvers.root_times(0.8, 0.01, 5)
        start = torch.zeros(2, 1, 2)
        score = DenoiserScore(found, sde)
        solvers.solve(ReverseProcess(sde, score), solvers.EulerMaruyama(), start, times)
        sigma = (-sde.log_snr(times[:-1])).exp()
        wanted = (sigma / (1 + sigma)).float()
        assert torch.equal(torch.stack([t[0] for t in seen]), wanted)


class TestErrors:
    def test_nothing_is_evaluated_outside_the_trained_levels(self):
        """The error names level, range and the times to use, which then work."""
        asked: list[Tensor] = []

        def counted(u: Tensor, sigma: Tensor) -> Tensor:
            asked.append(sigma)
            return exact(u, sigma)

        sde = CLD()
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

    def test_levels_of_a_network_without_a_process(self):
        found = denoiser("table", "noise")
        with pytest.raises(ValueError, match=r"sigma must lie in \[0.01.*, 157.*\].*got 200"):
            found(torch.zeros(2, 2), 200.0)

    @pytest.mark.parametrize("shape", [(4, 3), (4, 1, 2), (3, 2)])
    def test_a_network_that_returns_another_shape(self, shape):
        sde = VPSDE()
        wrong = DenoiserScore(lambda u, sigma: torch.zeros(shape), sde)
        with pytest.raises(
            ValueError, match=r"denoiser must return a tensor like its input, \(4, 2\)"
        ):
            wrong(torch.zeros(4, 1, 2), 0.5)
        prediction = PredictionDenoiser(lambda x, t: torch.zeros(shape), NoisePath.linear())
        with pytest.raises(ValueError, match=r"network must return a tensor like its input"):
            prediction(torch.zeros(4, 2), 1.0)

    def test_arguments(self):
        with pytest.raises(TypeError, match="denoiser must be a callable"):
            DenoiserScore(None, VPSDE())
        with pytest.raises(ValueError, match="noise_levels must be two increasing numbers"):
            DenoiserScore(exact, VPSDE(), noise_levels=(1.0, 0.5))
        with pytest.raises(ValueError, match="predicts must be one of 'noise'"):
            PredictionDenoiser(exact, NoisePath.linear(), "epsilon")
        with pytest.raises(ValueError, match="clock must be one of 'time'"):
            PredictionDenoiser(exact, NoisePath.linear(), clock="steps")
        with pytest.raises(TypeError, match="path must be a NoisePath"):
            PredictionDenoiser(exact, VPSDE())
        with pytest.raises(ValueError, match=r"sigma must be one level or have shape \(4,\)"):
            denoiser("linear", "data")(torch.zeros(4, 2), torch.ones(3))


def test_gradients_of_state_and_parameters():
    """Against the derivative of the mixture's own score, and finite differences of a scale."""
    sde = PSLD()
    z = states(sde, 0.4).requires_grad_()
    score = DenoiserScore(exact, sde)(z, 0.4)
    (found,) = torch.autograd.grad(score.sum(), z)
    again = z.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(DATA.score(sde)(again, 0.4).sum(), again)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)

    scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    ideal = network(*PATHS["linear"][1:], "noise", [])
    scaled = PredictionDenoiser(lambda x, t: scale * ideal(x, t), NoisePath.linear())
    total = DenoiserScore(scaled, sde)(z.detach(), 0.4).sum()
    (slope,) = torch.autograd.grad(total, scale)
    with torch.no_grad():
        ends = [
            DenoiserScore(
                PredictionDenoiser(lambda x, t, s=s: s * ideal(x, t), NoisePath.linear()), sde
            )(z, 0.4).sum()
            for s in (1 - 1e-6, 1 + 1e-6)
        ]
    # The score is affine in the scale: the difference quotient is exact up to 1e-16/1e-6.
    assert float(slope) == pytest.approx(float(ends[1] - ends[0]) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_in_lower_precision(dtype):
    """Within a few roundings of the state's dtype of what the score is in double precision."""
    sde = CLD()
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

    sde = VPSDE()
    score = DenoiserScore(PredictionDenoiser(conditional, NoisePath.linear()), sde)
    score(torch.zeros(4, 1, 2), 0.5, class_labels=torch.arange(4))
    assert told["class_labels"].tolist() == [0, 1, 2, 3]


class TestScoreDenoiser:
    """The denoiser inside a score."""

    @pytest.mark.parametrize("process", PROCESSES)
    def test_the_denoiser_of_an_exact_score(self, process):
        """At any state of the right estimate, whatever fills it up."""
        sde = PROCESSES[process]()
        sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        u = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
        for options in ({}, {"fill": False}, {"seed": 1}):
            found = ScoreDenoiser(DATA.score(sde), **options)(u, sigma)
            torch.testing.assert_close(found, exact(u, sigma), rtol=1e-9, atol=1e-9)

    def test_a_mixed_score_under_another_process(self):
        """A network trained with VP is, under CLD, as one that is shown the estimate."""
        network = torch.nn.Module()
        network.forward = lambda x, clock: torch.tanh(x) * clock.reshape(-1, 1).cos()
        vp, cld = VPSDE(), CLD()
        trained = MixedScore(network, vp, 0.2, 0.7).double()
        shown = MixedScore(network, cld, 0.2, 0.7, inputs="estimate").double()
        z = states(cld, 0.4)
        crossed = DenoiserScore(trained.denoiser, cld)
        torch.testing.assert_close(crossed(z, 0.4), shown(z, 0.4), rtol=1e-6, atol=1e-6)

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
        law = sde.marginal(torch.tensor(t, dtype=torch.float64))
        off = z[..., 0] - 0.3 * law.mean[:, 0]
        found = off.mT @ off / len(off)
        # A product of two normals has a standard deviation of at most √2 of its scale.
        scale = law.covariance.diagonal().sqrt()
        tolerance = 4 * math.sqrt(2 / len(off)) * scale[:, None] * scale
        assert ((found - law.covariance).abs() <= tolerance).all()
