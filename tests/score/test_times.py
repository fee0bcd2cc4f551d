"""Times that are known before a score is called: tables of coefficients, and when they are made."""

import pickle

import pytest
import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
from probes import generator, start
from tolerances import rounding

SDE, GRID, EULER = CLD(), solvers.root_times(1.0, 0.1, 4), solvers.EulerMaruyama()
COARSE = solvers.ProbabilityFlow(rtol=0.1, atol=0.1, first_step=0.3, pace="sample")
# Matrices over all numbers of a state, and products for each eigen-direction.
every_size = pytest.mark.parametrize("dimension", [2, 40])


def mixture(dimension, shift=0.0, weights=(1.0, 2.0)):
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, dimension) + shift
    covariances = 0.1 * torch.eye(dimension, dtype=torch.float64).expand(2, -1, -1)
    return GaussianMixture(torch.as_tensor(weights), means, covariances)


def plan(data, solver=EULER):
    return solvers.plan(ReverseProcess(SDE, data.score(SDE)), solver, GRID)


@pytest.mark.parametrize("solver", [EULER, COARSE])
@every_size
def test_weights_and_means_of_a_mixture_are_differentiated(solver, dimension):
    """As if the score knew nothing of its times, but for the rounding of float64."""

    def gradients(known):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        weights = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        score = mixture(dimension, shift, weights).score(SDE)
        process = ReverseProcess(SDE, score if known else lambda z, t: score(z, t.clone()))
        state, options = start(SDE, (3, dimension)), {"generator": generator()}
        found = solvers.solve(process, solver, state, GRID, differentiable=True, **options)
        return torch.autograd.grad(found.data.square().mean(), [shift, weights])

    for found, expected in zip(gradients(known=True), gradients(known=False), strict=True):
        assert found.ne(0).any()
        # A few dozen steps, each of which amplifies rounding by at most 10.
        torch.testing.assert_close(found, expected, rtol=rounding(100, 5e3), atol=rounding(100, 50))


@every_size
def test_a_plan_sees_means_that_were_changed_in_place(dimension):
    data, state = mixture(dimension), start(SDE, (3, dimension))
    sampler = plan(data)
    sampler.solve(state, generator=generator())
    data.means += 3.0
    found = sampler.solve(state, generator=generator())
    fresh = plan(mixture(dimension, 3.0)).solve(state, generator=generator())
    assert torch.equal(found.state, fresh.state)


def test_a_plan_can_be_pickled_after_it_was_used():
    sampler, state = plan(mixture(2), solvers.SSCS()), start(SDE, (3, 2))
    found = sampler.solve(state, generator=generator(), denoise=True)
    again = pickle.loads(pickle.dumps(sampler)).solve(state, generator=generator(), denoise=True)
    assert torch.equal(found.data, again.data)
