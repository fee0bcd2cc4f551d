"""Published networks against numbers of the codes that published them; see tests/data/README.md.

Tolerances: single precision, some tens of layers, relative to the largest number of the output.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.pretrained import load_cld_sgm, load_score_sde
from cldsde.score.matching import PerturbedData
from cldsde.solvers.noise import RecordedNoise
from published_data import CLD_SGM, MODELS, SCORE_SDE, case, save_checkpoint

RELATIVE = 1e-5
every_case = pytest.mark.parametrize("name", list(MODELS))
# The codes train networks of discrete levels with tables of the levels.
continuous_cases = pytest.mark.parametrize(
    "name", [name for name in MODELS if "levels" not in name]
)


@pytest.fixture
def load(tmp_path):
    def loaded(name):
        file = save_checkpoint(name, tmp_path)
        loader = load_cld_sgm if name in CLD_SGM else load_score_sde
        return loader(file, MODELS[name])

    return loaded


def assert_close(ours, theirs):
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=RELATIVE * scale)


def unit(name, x):
    """States of networks of data in [0, 1], as data in [−1, 1] have them."""
    return 2 * x - 1 if name.startswith("ve") else x


@every_case
def test_the_network_returns_the_same_numbers(name, load):
    found = case(name)
    network = load(name).network
    label = found.get("label", found["t"]).float()
    state = unit(name, found["state"]) if name in SCORE_SDE else found["state"].flatten(1, 2)
    clock = label.log() if network.embedding.frequencies is not None else label
    theirs = found["network"]
    if name.startswith("ve"):
        # The published VE networks end with the division by the noise level, which is ours of the
        # score.
        largest, smallest, count = found["sigmas"].tolist()
        sigma = label
        if MODELS[name].parameterisation.levels:
            sigma = largest * (smallest / largest) ** (label.double() / (count - 1))
        theirs = theirs * sigma.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        assert_close(network(state, clock), theirs.float())


@every_case
def test_the_score_is_the_same(name, load):
    found, score = case(name), load(name)
    state, theirs = found["state"], found["score"]
    if name in SCORE_SDE:
        state = unit(name, state).unsqueeze(1)
    ours = score(state, found["t"].double()).flatten(1, 2)
    assert_close(ours, theirs / 2 if name.startswith("ve") else theirs)


@every_case
def test_a_step_of_euler_maruyama_is_the_same(name, load):
    found, score = case(name), load(name)
    step = 1 / found["steps"].item() if "steps" in found else 0.0625
    times = torch.tensor([0.5, 0.5 - step], dtype=torch.float64)
    state, noise = found["state"], found["noise"]
    if name in SCORE_SDE:
        state, noise = unit(name, state).unsqueeze(1), noise.unsqueeze(1)
    process = ReverseProcess(score.sde, score)
    driven = noise[:, list(score.sde.driven)]
    made = solvers.solve(
        process, solvers.EulerMaruyama(), state, times, noise=RecordedNoise([driven])
    ).state.flatten(1, 2)
    assert_close(made, unit(name, found["em"]))
    silent = solvers.solve(
        process, solvers.EulerMaruyama(), state, times, noise=RecordedNoise([0 * driven])
    ).state.flatten(1, 2)
    assert_close(silent, unit(name, found["em_mean"]))


def test_a_step_of_sscs_is_the_same(load):
    found, score = case("cld_fourier"), load("cld_fourier")
    made = solvers.solve(
        ReverseProcess(score.sde, score),
        solvers.SSCS(),
        found["state"],
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        noise=RecordedNoise([found["noise"], found["noise2"]]),
    ).state
    assert_close(made, found["sscs"])


@continuous_cases
def test_the_training_loss_is_the_same(name, load):
    found, score = case(name), load(name)
    x0, state, noise = (found[key] for key in ("x0", "loss_state", "loss_noise"))
    if name in SCORE_SDE:
        x0, state, noise = unit(name, x0), unit(name, state).unsqueeze(1), noise.unsqueeze(1)
    g = torch.Generator().manual_seed(0)
    pair = PerturbedData.draw(score.sde, x0, found["loss_t"].double(), generator=g)
    pair = dataclasses.replace(pair, z=state, noise=noise[:, -1:])
    ours = score.loss(pair)
    if name in CLD_SGM:
        ours = ours * x0[0].numel()
    # Their states and losses add `numerical_eps` to the variances, ours do not.
    eps = MODELS[name].parameterisation.numerical_eps
    smallest = score.sde.marginal(found["loss_t"].double()).covariance.diagonal(dim1=-2, dim2=-1)
    added = eps / smallest.min().item()
    torch.testing.assert_close(ours, found["loss"], rtol=RELATIVE + 10 * added, atol=0)


@continuous_cases
def test_states_are_the_codes_own(name, load):
    """The process perturbs data as the code does: mean, root and order of the normals."""
    found, score = case(name), load(name)
    x0, state, noise = (found[key] for key in ("x0", "loss_state", "loss_noise"))
    if name in SCORE_SDE:
        x0, state, noise = unit(name, x0), unit(name, state).unsqueeze(1), noise.unsqueeze(1)
    kernel = score.sde.marginal(found["loss_t"].double())
    made = kernel.mean.float() @ score.sde.embed(x0).flatten(2)
    made = made + kernel.root.float() @ noise.flatten(2)
    eps = MODELS[name].parameterisation.numerical_eps
    torch.testing.assert_close(
        made.reshape_as(state), state, rtol=RELATIVE, atol=RELATIVE * 3 + 3 * eps**0.5
    )
