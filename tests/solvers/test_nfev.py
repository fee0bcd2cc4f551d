"""`nfev` is the number of network evaluations, for all solvers and wrappers of scores."""

from functools import partial

import pytest
import torch

from cldsde import CLD, DenoiserScore, GuidedScore, Observation, ReverseProcess, solvers
from cldsde.score import ConditionalScore, PosteriorScore
from probes import generator, named_solvers
from score.cases import Counting
from solvers.test_plan import sde_for

BATCH = 3
SOLVERS = named_solvers(1.0)
GRID = solvers.root_times(0.9, 0.05, 4)
SEEN = Observation.mask(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), 0.3)


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
    assert found.nfev == int(counted.max())
    # Samples that have arrived are evaluated along with the others.
    assert network.samples == BATCH * found.nfev
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


def test_posterior_samples_count_the_network():
    sde, network = CLD(), Counting()
    process = ReverseProcess(sde, limited(network, sde))
    times = solvers.logistic_times(0.9, 0.02, 6, sde=sde)
    found = solvers.sample_posterior(
        process, SEEN, times, particles=4, seed=[1, 2], method="pigdm", shape=(2,)
    )
    assert network.samples == 8 * found.nfev
