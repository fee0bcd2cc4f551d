"""One exact denoiser, in every convention of networks, is the exact score of every process."""

import math
from functools import partial

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, NoisePath, ReverseProcess, solvers
from cldsde.score import DenoiserScore, PredictionDenoiser, ScoreDenoiser
from probes import generator, normals, tensor, untouchable
from references import denoised
from score.cases import TWO as DATA
from score.cases import score_rounding, states
from tolerances import rounding, standard_error_of_variance

PROCESSES = {"VP": VPSDE(), "VE": VESDE(), "CLD": CLD(), "PSLD": PSLD(), "HOLD": HOLD()}
CRITICAL, VP = PROCESSES["CLD"], PROCESSES["VP"]
exact = partial(denoised, DATA)
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
KINDS = ("noise", "data", "velocity", "flow", "score")


def network(alpha, sigma, predicts):
    """Output of an ideal network for x = α(t) x_0 + σ(t) n."""

    def called(x, t):
        at = t.double().unsqueeze(1)
        a, s = alpha(at), sigma(at)
        data = exact(x / a, (s / a).squeeze(1))
        noise = (x - a * data) / s
        if predicts == "flow":
            da, ds = (torch.func.jvp(f, (at,), (torch.ones_like(at),))[1] for f in (alpha, sigma))
            return da * data + ds * noise
        values = {"noise": noise, "data": data, "score": -noise / s}
        return values.get(predicts, a * noise - s * data)

    return called


def clock(t):
    return 0.1 * t + 9.95 * t**2


def table_kappa(t):
    kappas = 0.5 * ALPHAS_CUMPROD.logit()
    low = t.floor().long().clamp(0, 998)
    return kappas[low] + (t - low) * (kappas[low + 1] - kappas[low])


half_pi = math.pi / 2
# The path, and α and σ as formulas of their own.
PATHS = {
    "linear": (NoisePath.linear(), lambda t: 1 - t, lambda t: t),
    "cosine": (NoisePath.cosine(), lambda t: (half_pi * t).cos(), lambda t: (half_pi * t).sin()),
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
    "table": (
        NoisePath.from_alphas_cumprod(ALPHAS_CUMPROD),
        lambda t: torch.sigmoid(2 * table_kappa(t)).sqrt(),
        lambda t: torch.sigmoid(-2 * table_kappa(t)).sqrt(),
    ),
}
CONVENTIONS = [(path, kind) for path in PATHS for kind in KINDS]
CONVENTIONS.remove(("table", "flow"))


def denoiser(path, predicts):
    noise_path, *functions = PATHS[path]
    return PredictionDenoiser(network(*functions, predicts), noise_path, predicts)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("process", "convention"),
    [*((name, "EDM") for name in PROCESSES), *(("CLD", convention) for convention in CONVENTIONS)],
)
def test_every_convention_gives_the_exact_score(process, convention):
    """At times of each sample; the mixture's own score has a reference in 50 digits."""
    sde = PROCESSES[process]
    found = DenoiserScore(exact if convention == "EDM" else denoiser(*convention), sde)
    levels = tensor([-2.5, 0.0, 2.5])  # within every path
    t = solvers.times_of_kappa(sde, levels)
    z = states(sde, DATA, t, n=3)
    expected, lost = DATA.score(sde)(z, t), score_rounding(sde, t)
    for rows, time in ((slice(None), t), (slice(1, 2), t[1])):
        error = (found(z[rows], time) - expected[rows]).abs().amax((1, 2))
        assert (error <= lost * expected[rows].abs().amax((1, 2))).all()


def test_levels_of_a_table_are_its_entries():
    path, index = PATHS["table"][0], tensor([0.0, 17.0, 998.0, 999.0])
    table = ALPHAS_CUMPROD[index.long()]
    torch.testing.assert_close(path.signal(index), table.sqrt(), rtol=rounding(), atol=0)
    torch.testing.assert_close(path.noise(index), (1 - table).sqrt(), rtol=rounding(100), atol=0)
    found = path.time(0.5 * table.logit())
    torch.testing.assert_close(found, index, rtol=0, atol=rounding(100, 1e4))


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
def test_clocks_by_name_and_by_function(clock, expected):
    sigma, seen = tensor([2.0, 0.1]), []
    told = PredictionDenoiser(lambda x, t: seen.append(t) or x, NoisePath.linear(), clock=clock)
    told(torch.zeros(2, 3).double(), sigma)
    torch.testing.assert_close(seen[0], expected(sigma), rtol=rounding(), atol=rounding())


def test_nothing_is_evaluated_outside_the_trained_levels():
    """The error names level, range and the times to use."""
    score = DenoiserScore(untouchable, CRITICAL, noise_levels=(0.01, 80.0))
    process = ReverseProcess(CRITICAL, score)
    start = CRITICAL.prior.sample((4, 2), generator=generator())
    message = r"0.01 to 80; got σ = 247.* Sample from t = 0.8"
    with pytest.raises(ValueError, match=message):
        solvers.solve(process, solvers.EulerMaruyama(), start, solvers.root_times(1.0, 0.1, 4))
    with pytest.raises(ValueError, match=r"0.01 to 80; got σ = "):  # at the end
        solvers.solve(process, solvers.ProbabilityFlow(), start, torch.tensor([0.8, 0.5, 1e-6]))


@pytest.mark.parametrize("process", PROCESSES)
def test_a_score_denoiser_is_the_denoiser_of_an_exact_score(process):
    """At any state of the right estimate, whatever fills it up."""
    sde = PROCESSES[process]
    sigma = tensor([0.1, 1.0, 5.0])
    u = normals(0, 3, 2)
    lost = score_rounding(sde, solvers.times_of_kappa(sde, -sigma.log()))
    for options in ({}, {"fill": False}, {"seed": 1}):
        denoise = ScoreDenoiser(DATA.score(sde), **options)
        denoise(u.float(), sigma)  # noise in single precision is not used again
        torch.testing.assert_close(denoise(u, sigma), exact(u, sigma), rtol=lost, atol=lost)


def test_states_that_are_filled_up_look_like_states():
    """The covariance of z given x_0, if u has the noise of its level: 20,000 states."""
    sigma, seen = 0.8, []
    score = lambda z, t: seen.extend((z, t[0])) or z[:, 1:]  # noqa: E731
    noise = normals(0, 20_000, 1)
    ScoreDenoiser(score, CRITICAL)(0.3 + sigma * noise, sigma)
    z, kernel = seen[0], CRITICAL.marginal(seen[1])
    off = z[..., 0] - 0.3 * kernel.mean[:, 0]
    found = off.mT @ off / len(off)
    # A product of two normals has a standard deviation of at most √2 of its scale.
    scale = kernel.covariance.diagonal().sqrt()
    tolerance = standard_error_of_variance(1.0, len(off)) * scale[:, None] * scale
    assert ((found - kernel.covariance).abs() <= tolerance).all()
