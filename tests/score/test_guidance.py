"""Classifier-free guidance of any two scores, and what it costs."""

import pytest
import torch

from cldsde import CLD, VPSDE, GaussianMixture, GuidedScore, RectifiedFlow, ReverseProcess, solvers
from cldsde.score import ConditionalScore, DenoiserScore
from probes import generator, tensor
from tolerances import rounding

SINGLE = rounding(100, dtype=torch.float32)
COARSE = {"rtol": 0.1, "atol": 0.1}


class Counting:
    """A denoiser of normal data with a condition for its variance; counts calls and samples."""

    def __init__(self):
        self.calls = 0
        self.samples = 0

    def __call__(self, u, sigma, variance):
        self.calls += 1
        self.samples += len(u)
        variance = variance.reshape(-1, *(1,) * (u.ndim - 1))
        return u * variance / (variance + sigma.reshape(-1, 1) ** 2)


def pair(sde, network):
    score = DenoiserScore(network, sde)
    return [ConditionalScore(score, variance=torch.tensor(x)) for x in (0.5, 2.0)]


def start(sde):
    return sde.prior.sample((6, 2), generator=generator())


@pytest.mark.parametrize("sde", [VPSDE(), CLD()])
def test_guidance_is_linear_and_batched(sde):
    """One call of twice the batch gives what two calls do, to rounding."""
    network, z, t = Counting(), start(sde), torch.tensor(0.5).expand(6)
    given, free = pair(sde, network)
    found = GuidedScore(given, free, 3.0)(z, t)
    assert (network.calls, network.samples) == (1, 12)
    expected = free(z, 0.5) + 3.0 * (given(z, 0.5) - free(z, 0.5))
    torch.testing.assert_close(found, expected, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize(("weight", "counted"), [(0.0, 10), (1.0, 10), (2.0, 20)])
@pytest.mark.parametrize("solver", [solvers.EulerMaruyama(), solvers.ExponentialMultistep()])
def test_nfev_counts_the_network(weight, counted, solver):
    """Ten steps, each of them one sample of the network or two."""
    sde, network = CLD(), Counting()
    process = ReverseProcess(sde, GuidedScore(*pair(sde, network), weight))
    plan = solvers.plan(process, solver, solvers.root_times(0.7, 0.01, 10))
    found = plan.solve(start(sde), generator=generator())
    assert found.nfev == plan.nfev == counted
    assert network.samples == counted * 6


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "solver",
    [
        solvers.EulerMaruyama(),
        solvers.ProbabilityFlow(**COARSE),
        solvers.ProbabilityFlow(**COARSE, pace="sample"),
        solvers.GottaGoFast(**COARSE),
        solvers.TorchDiffEq(**COARSE),
    ],
    ids=repr,
)
def test_guidance_in_an_interval_of_noise_levels(solver):
    """Outside of it only the conditional score is evaluated; every evaluation is counted."""
    sde, network = CLD(), Counting()
    given, free = pair(sde, network)
    guided = GuidedScore(given, free, 2.0, interval=(0.2, 2.0))
    times = solvers.root_times(0.7, 0.01, 10)
    process, options = ReverseProcess(sde, guided), {"generator": generator(), "denoise": True}
    found = solvers.solve(process, solver, start(sde), times, **options)
    assert found.success
    assert network.samples == int(found.stats["nfev"].sum())
    if not solver.facts.adaptive:
        levels = (-sde.log_snr(torch.cat([times[:-1], times[-1:]]))).exp()
        inside = int(((levels > 0.2) & (levels <= 2.0)).sum())
        assert found.nfev == 11 + inside
    ends = solvers.times_of_log_snr(sde, -tensor([0.2, 2.0]).log())
    assert guided.evaluations(ends).tolist() == [1, 2]
    for t in (0.7, 0.3, 0.01):
        z = start(sde)
        level = float((-sde.log_snr(t)).exp())
        inside = 0.2 < level <= 2.0
        expected = free(z, t) + (2.0 if inside else 1.0) * (given(z, t) - free(z, t))
        torch.testing.assert_close(guided(z, t), expected, rtol=SINGLE, atol=SINGLE)


def test_samples_at_times_of_their_own_are_guided_one_by_one():
    sde = CLD()
    guided = GuidedScore(*pair(sde, Counting()), 2.0, interval=(0.2, 2.0))
    z, t = start(sde), torch.linspace(0.05, 0.9, 6)
    apart = torch.cat([guided(z[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(guided(z, t), apart, rtol=SINGLE, atol=SINGLE)


def test_guidance_where_a_state_tells_nothing_of_the_data():
    """At t = 1 of a flow the data predictions are combined: with one Gaussian they are its mean."""
    sde = RectifiedFlow()
    scores = [GaussianMixture([1.0], [[mean]], [[[0.25]]]).score(sde) for mean in (2.0, -1.0)]
    guided = GuidedScore(*scores, 3.0)
    z = sde.prior.sample((5, 1), generator=generator(), dtype=torch.float64)
    expected = torch.full((5, 1), -1.0 + 3.0 * (2.0 + 1.0), dtype=torch.float64)
    torch.testing.assert_close(guided.data_prediction(z, 1.0), expected, rtol=rounding(), atol=0)
    outside = GuidedScore(*scores, 3.0, interval=(0.1, 0.5)).data_prediction(z, 1.0)
    assert torch.equal(outside, scores[0].data_prediction(z, 1.0))
    solver = solvers.ExponentialMultistep(order=2)
    found = solvers.solve(ReverseProcess(sde, guided), solver, z, torch.tensor([1.0, 0.5, 0.1]))
    assert found.success
