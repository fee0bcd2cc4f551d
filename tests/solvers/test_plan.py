"""`plan`: tables are computed once, the score is called, and one plan serves any batch."""

import pytest
import torch
from torch import nn

from cldsde import CLD, VPSDE, LinearSDE, MixedScore, ReverseProcess, solvers
from cldsde.score import Conversion, Score
from cldsde.solvers.authoring import GridSolver
from probes import Smooth, generator, named_solvers, start
from score import cases

SOLVERS = named_solvers(0.5)
ON_GRID = [name for name, solver in SOLVERS.items() if isinstance(solver, GridSolver)]
# One of each way to call the score: on a grid with and without memory, and by adaptive solvers.
FEW = ["euler-maruyama", "multistep-2-corrector", "probability-flow", "gotta-go-fast"]
FEW += ["torchdiffeq-rk4", "torchsde-srk"]
GRID = solvers.root_times(1.0, 0.05, 5)

few_solvers = pytest.mark.parametrize("name", FEW)


class Network(nn.Module):
    """A smooth network with a parameter for data of any shape."""

    def __init__(self, sde):
        super().__init__()
        self.outputs = len(sde.driven)
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, inputs, clock):
        outputs = inputs.shape[1] * self.outputs // 2 if self.outputs > 1 else 2
        return torch.tanh(self.slope * inputs[:, -outputs:] + 0.1 * clock[:, None])


def sde_for(name):
    return VPSDE(0.5, 5.0) if name.startswith("edm") else CLD(1.0)


def mixed(sde):
    return MixedScore(Network(sde), sde, torch.tensor(0.3), torch.tensor(0.5))


SCORES = {"mixture": lambda sde: cases.mixture().score(sde), "mixed": mixed, "plain": Smooth}

TABLES = ["marginal", "transition", "transition_matrix", "posterior", "noise_root", "drift"]
TABLES = [(LinearSDE, name) for name in (*TABLES, "diffusion", "kappa")] + [(Conversion, "at")]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "score"),
    [(name, "mixture") for name in ON_GRID] + [(name, x) for name in FEW[:2] for x in SCORES],
)
def test_a_second_solve_computes_no_tables(name, score, monkeypatch):
    sde = sde_for(name)
    sampler = solvers.plan(ReverseProcess(sde, SCORES[score](sde)), SOLVERS[name], GRID)
    wanted = [{}, {"denoise": True}, {"denoise": "step"}]
    wanted += [{"t_eval": GRID[1:]}, {"callback": lambda *_: None}]
    states = [start(sde, (batch, 2), torch.float32) for batch in (3, 5)]
    for options in wanted:
        sampler.solve(states[0], generator=generator(), **options)
    for owner, method in TABLES:
        monkeypatch.setattr(owner, method, None)
    for options in wanted:
        sampler.solve(states[1], generator=generator(), **options)


@few_solvers
def test_a_score_checks_all_times_at_which_it_is_evaluated(name):
    checked, sde = [], sde_for(name)
    process = ReverseProcess(sde, Smooth(sde))
    process.score.check_times = checked.append
    solvers.plan(process, SOLVERS[name], GRID)
    times = SOLVERS[name].evaluation_times(process, GRID)
    assert torch.equal(checked[0], GRID[[0, -1]] if times is None else times)
    solvers.plan(process, SOLVERS[name], GRID, denoise=True)
    assert checked[-1].tolist() == GRID[-1:].tolist()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", SOLVERS)
def test_hooks_of_a_model_change_samples_as_they_change_calls(name):
    sde = sde_for(name)
    model, untouched = mixed(sde), mixed(sde)
    model.register_forward_pre_hook(lambda module, args: (1.05 * args[0], 0.9 * args[1]))

    def sample(score):
        process, options = ReverseProcess(sde, score), {"generator": generator(), "denoise": True}
        return solvers.solve(process, SOLVERS[name], start(sde), GRID, **options).data

    class Meaning(Score):
        def forward(self, z, t, **options):
            return untouched(1.05 * z, 0.9 * t, **options)

    found = sample(model)
    assert torch.equal(found, sample(Meaning()))
    assert not torch.equal(found, sample(untouched))


@pytest.mark.one_in(3)
@few_solvers
def test_a_plan_from_inference_mode_serves_with_gradients(name):
    sde = sde_for(name)
    process, options = ReverseProcess(sde, mixed(sde)), {"denoise": True, "t_eval": GRID[1:]}

    def gradient(sampler):
        z = start(sde).requires_grad_()
        solution = sampler.solve(z, generator=generator(), differentiable=True, **options)
        return torch.autograd.grad(solution.data.sum() + solution.y.sum(), z)[0]

    with torch.inference_mode():
        sampler = solvers.plan(process, SOLVERS[name], GRID.clone())
        sampler.solve(start(sde), generator=generator(), **options)
    assert torch.equal(gradient(sampler), gradient(solvers.plan(process, SOLVERS[name], GRID)))


def test_a_plan_follows_a_model_whose_state_is_loaded():
    sde, other = CLD(), MixedScore(Network(CLD()), CLD(), torch.tensor(-0.1), torch.tensor(1.5))
    model, state = mixed(sde), start(sde)
    plan = solvers.plan(ReverseProcess(sde, model), SOLVERS["sscs"], GRID)
    before = plan.solve(state, generator=generator()).state
    model.load_state_dict(other.state_dict())
    after = plan.solve(state, generator=generator()).state
    assert torch.equal(after, plan.with_score(other).solve(state, generator=generator()).state)
    assert not torch.equal(after, before)
