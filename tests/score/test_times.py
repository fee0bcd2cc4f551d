"""Times that are known before a score is called: tables of coefficients, and when they are made."""

import pickle

import pytest
import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
from cldsde.score.times import KnownTimes
from probes import generator, start

GRID = solvers.root_times(1.0, 0.1, 4)
SOLVERS = {
    "Euler-Maruyama": solvers.EulerMaruyama(),
    "multistep": solvers.ExponentialMultistep(order=2, stochasticity=1.0),
    "flow, batch": solvers.ProbabilityFlow(rtol=0.1, atol=0.1, first_step=0.3),
    "flow, sample": solvers.ProbabilityFlow(rtol=0.1, atol=0.1, first_step=0.3, pace="sample"),
}
every_solver = pytest.mark.parametrize("name", list(SOLVERS))
# Matrices over all numbers of a state, and products for each eigen-direction.
every_size = pytest.mark.parametrize("dimension", [2, 40])


def mixture(dimension, shift=0.0, weights=(1.0, 2.0)):
    means = torch.stack([torch.full((dimension,), x, dtype=torch.float64) for x in (-1.0, 1.0)])
    covariances = 0.1 * torch.eye(dimension, dtype=torch.float64).expand(2, -1, -1)
    return GaussianMixture(torch.as_tensor(weights), means + shift, covariances)


def last(name, score, dimension):
    process = ReverseProcess(CLD(), score)
    state, g = start(process.sde, (3, dimension)), generator()
    solver = SOLVERS[name]
    found = solvers.solve(process, solver, state, GRID, generator=g, differentiable=True)
    return found.data.square().mean()


@every_solver
@every_size
def test_weights_and_means_of_a_mixture_are_differentiated(name, dimension):
    """As if the score knew nothing of its times, but for the rounding of float64."""

    def gradients(known):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        weights = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        score = mixture(dimension, shift, weights).score(CLD())
        used = score if known else lambda z, t: score(z, t.clone())
        return torch.autograd.grad(last(name, used, dimension), [shift, weights])

    for found, expected in zip(gradients(known=True), gradients(known=False), strict=True):
        assert bool(found.ne(0).any())
        # A few dozen steps, each of which amplifies rounding by at most 10.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_sees_means_that_were_changed_in_place(dimension, dtype):
    data = mixture(dimension)
    process = ReverseProcess(CLD(), data.score(CLD()))
    sampler = solvers.plan(process, solvers.EulerMaruyama(), GRID)
    state = start(process.sde, (3, dimension), dtype)
    sampler.solve(state, generator=generator())
    data.means += 3.0
    found = sampler.solve(state, generator=generator())
    fresh = solvers.solve(
        ReverseProcess(CLD(), mixture(dimension, 3.0).score(CLD())),
        solvers.EulerMaruyama(),
        state,
        GRID,
        generator=generator(),
    )
    assert torch.equal(found.state, fresh.state)


def test_each_dtype_has_a_table_that_is_made_once(monkeypatch):
    data = mixture(2)
    made = []
    marginal = GaussianMixture._marginal

    def counted(self, *arguments):
        made.append(arguments)
        return marginal(self, *arguments)

    monkeypatch.setattr(GaussianMixture, "_marginal", counted)
    process = ReverseProcess(CLD(), data.score(CLD()))
    sampler = solvers.plan(process, solvers.EulerMaruyama(), GRID)
    for dtype in 3 * [torch.float32, torch.float64]:
        sampler.solve(start(process.sde, (3, 2), dtype), generator=generator())
    assert len(made) == 2


def test_known_times_of_samples_are_for_that_many_samples():
    score = mixture(2).score(CLD())
    z = start(CLD(), (3, 2))
    times = KnownTimes(torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64))
    (t,) = times.arguments(z)
    assert torch.equal(score(z, t), score(z, times.times[0]))
    with pytest.raises(ValueError, match="one time per sample, 6; got 3 times"):
        score(torch.cat([z, z]), t)


def test_a_plan_can_be_pickled_after_it_was_used():
    process = ReverseProcess(CLD(), mixture(2).score(CLD()))
    sampler = solvers.plan(process, solvers.SSCS(), GRID)
    state = start(process.sde, (3, 2))
    found = sampler.solve(state, generator=generator(), denoise=True)
    copy = pickle.loads(pickle.dumps(sampler))
    again = copy.solve(state, generator=generator(), denoise=True)
    assert torch.equal(found.data, again.data)


@pytest.mark.parametrize("planned", [False, True])
def test_a_failed_solve_warns_at_the_line_that_asked_for_it(planned):
    process = ReverseProcess(CLD(), lambda z, t: z[:, 1:] * torch.nan)
    state, solver = start(process.sde, (3, 2)), solvers.SSCS()
    solved = (
        (lambda: solvers.plan(process, solver, GRID).solve(state))
        if planned
        else (lambda: solvers.solve(process, solver, state, GRID))
    )
    with pytest.warns(solvers.SolveWarning, match="the solve failed") as caught:
        solved()
    assert caught[0].filename == __file__
    assert not solvers.solve(process, solver, state, GRID, warn=False).success
