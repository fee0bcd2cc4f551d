"""`nfev` is the number of network evaluations, for all solvers and wrappers of scores."""

from functools import partial

import pytest
import torch

from cldsde import CLD, VPSDE, DenoiserScore, GuidedScore, Observation, ReverseProcess, solvers
from cldsde.score import ConditionalScore, PosteriorScore, flow_log_prob, log_likelihood
from cldsde.solvers.recommended import fit_grid, window
from probes import generator, named_solvers
from score.cases import Counting
from solvers.test_plan import sde_for

BATCH = 3
SOLVERS = named_solvers(1.0)
GRID = solvers.root_times(0.9, 0.05, 4)
SEEN = Observation.mask(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), 0.3)
TWIST = solvers.ExponentialMultistep(order=2, stochasticity=1.0)


def conditional(network, sde, variance=0.5):
    return ConditionalScore(DenoiserScore(network, sde), variance=torch.tensor(variance))


def guided(network, sde, **options):
    base = DenoiserScore(network, sde)
    pair = (ConditionalScore(base, variance=torch.tensor(x)) for x in (0.5, 2.0))
    return GuidedScore(*pair, 2.0, **options)


limited = partial(guided, interval=(0.2, 2.0))
SCORES = {
    "plain": lambda network, sde: DenoiserScore(partial(network, variance=torch.tensor(0.5)), sde),
    "conditional": conditional,
    "guided": guided,
    "guided in an interval": limited,
    "posterior": lambda *of: PosteriorScore(conditional(*of), SEEN, "pigdm"),
    "posterior, guided": lambda *of: PosteriorScore(limited(*of), SEEN, "pigdm"),
    "guided twice": lambda *of: GuidedScore(conditional(*of, 0.7), limited(*of), 1.5),
}
every_score = pytest.mark.parametrize("score", SCORES)


@pytest.mark.covering
@every_score
@pytest.mark.parametrize("name", SOLVERS)
def test_nfev_is_the_number_of_network_evaluations(name, score):
    sde, network = sde_for(name), Counting()
    process = ReverseProcess(sde, SCORES[score](network, sde))
    plan = solvers.plan(process, SOLVERS[name], GRID)
    state = sde.prior.sample((BATCH, 2), generator=generator())
    found = plan.solve(state, generator=generator(), denoise=True)
    assert found.success
    counted = found.stats["nfev"]
    assert network.samples == int(counted.sum())
    assert found.nfev == int(counted.max())
    if plan.nfev is not None:
        last = int(process.score.evaluations(GRID[-1]))
        assert found.nfev == plan.nfev + last


@pytest.mark.one_in(4)
@every_score
@pytest.mark.parametrize("budget", [7, 12, 20])
def test_a_sample_takes_at_most_nfe_network_evaluations(score, budget):
    sde, network = CLD(), Counting()
    made = SCORES[score](network, sde)
    solvers.sample(sde, made, (BATCH, 2), nfe=budget)
    assert budget - 4 <= network.samples / BATCH <= budget


@pytest.mark.one_in(3)
@pytest.mark.parametrize("score", ["plain", "conditional", "guided", "guided in an interval"])
@pytest.mark.parametrize("sde", [VPSDE(), CLD()], ids=["VP", "CLD"])
def test_likelihoods_count_the_network(sde, score):
    network = Counting()
    process = ReverseProcess(sde, SCORES[score](network, sde))
    x = torch.randn(BATCH, 2, generator=generator())
    loose = {"rtol": 1e-2, "atol": 1e-2}
    z = sde.perturb(x, 0.05, generator=generator())[0]
    found = flow_log_prob(process, z, 0.05, **loose)
    assert network.samples == BATCH * found.nfev
    network.samples = 0
    found = log_likelihood(process, x, 0.05, samples=2, generator=generator(), **loose)
    assert network.samples == 2 * BATCH * found.nfev


@pytest.mark.parametrize("score", ["plain", "conditional", "guided", "guided in an interval"])
def test_posterior_samples_count_the_network(score):
    sde, network = CLD(), Counting()
    process = ReverseProcess(sde, SCORES[score](network, sde))
    times = solvers.logistic_times(sde, 0.9, 0.02, 6)
    found = solvers.sample_posterior(
        process, SEEN, times, particles=4, seeds=[1, 2], method="pigdm", shape=(2,)
    )
    assert network.samples == 8 * found.nfev


@pytest.mark.slow
def test_the_longest_grid_is_found_with_guidance_in_an_interval():
    """Of all lengths, whatever the number of guided steps on each grid."""
    sde = CLD()
    for interval in ((0.05, 0.3), (0.5, 20.0)):
        score = guided(Counting(), sde, interval=interval)
        process = ReverseProcess(sde, score)
        start, end = window(process)
        grids = {m: solvers.root_times(start, end, m) for m in range(1, 25)}
        costs = {m: int(score.evaluations(grid).sum()) for m, grid in grids.items()}
        for budget in range(4, 25):
            times = fit_grid(process, TWIST, start, end, budget, denoise=True)
            assert len(times) - 1 == max(m for m, cost in costs.items() if cost <= budget)


@pytest.mark.parametrize("levels", [None, (0.05, 200.0)])
@pytest.mark.parametrize("name", ["euler-maruyama", "sscs", "reverse-diffusion", "torchsde-euler"])
def test_a_solve_without_data_prediction_may_end_at_the_data(name, levels):
    """Nothing of the score is asked at the end, which it may not allow."""
    sde, network = CLD(), Counting()
    score = DenoiserScore(network, sde, noise_levels=levels)
    process = ReverseProcess(sde, ConditionalScore(score, variance=torch.tensor(0.5)))
    state = sde.prior.sample((BATCH, 2), generator=generator())
    times = solvers.root_times(0.9, 0.0 if levels is None else 1e-4, 5)
    solver = SOLVERS[name]
    found = solvers.solve(process, solver, state, times, generator=generator())
    assert network.samples == BATCH * found.nfev
