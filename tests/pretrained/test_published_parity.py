"""Published networks against numbers of the codes that published them; see tests/data/README.md.

Tolerances: single precision, some tens of layers, relative to the largest number of the output.
"""

import dataclasses
import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.score.matching import PerturbedData
from cldsde.solvers.noise import RecordedNoise
from published_data import CLD_SGM, MODELS, SCORE_SDE, case, load
from tolerances import rounding

RELATIVE = rounding(80, dtype=torch.float32)  # tens of layers, relative to the largest output
every_case = pytest.mark.parametrize("name", list(MODELS))
# The codes train networks of discrete levels with tables of the levels.
continuous_cases = pytest.mark.parametrize("name", [name for name in MODELS if "level" not in name])


@functools.cache
def loaded(name):
    """A score, and the numbers of its code in the shapes and units of this package."""
    found = case(name)
    if name in SCORE_SDE:
        for key in {"state", "loss_state", "x0"} & set(found):
            found[key] = unit(name, found[key])
        for key in {"state", "loss_state", "noise", "loss_noise"} & set(found):
            found[key] = found[key].unsqueeze(1)
    with TemporaryDirectory() as folder:
        return load(name, Path(folder)), found


def assert_close(ours, theirs):
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=RELATIVE * scale)


def unit(name, x):
    """States of networks of data in [0, 1], in the units of data in [−1, 1]."""
    return 2 * x - 1 if name.startswith("ve") else x


@every_case
def test_every_averaged_weight_is_used_and_every_weight_is_loaded(name):
    score, found = loaded(name)
    own = torch.cat([x.flatten() for x in score.network.state_dict().values()])
    # The weights of 1 × 1 convolutions are transposed; the codes store no other copy.
    assert torch.equal(own.sort().values, found["weights"].float().sort().values)
    assert not score.training
    assert not any(p.requires_grad for p in score.parameters())


@every_case
def test_network_score_and_a_step_of_euler_maruyama_are_the_same(name):
    score, found = loaded(name)
    label = found.get("label", found["t"]).float()
    clock = label.log() if score.network.embedding.frequencies is not None else label
    theirs = found["network"]
    if name.startswith("ve"):
        # The published VE networks end with the division by the noise level, which belongs to the
        # score here.
        largest, smallest, count = found["sigmas"].tolist()
        sigma = label
        if MODELS[name].parameterisation.levels:
            sigma = largest * (smallest / largest) ** (label.double() / (count - 1))
        theirs = theirs * sigma.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        assert_close(score.network(found["state"].flatten(1, 2), clock), theirs.float())
    ours = score(found["state"], found["t"].double()).flatten(1, 2)
    assert_close(ours, found["score"] / 2 if name.startswith("ve") else found["score"])

    step = 1 / found["steps"].item() if "steps" in found else 0.0625
    times = torch.tensor([0.5, 0.5 - step], dtype=torch.float64)
    process, driven = ReverseProcess(score.sde, score), found["noise"][:, list(score.sde.driven)]
    for scale, key in ((1, "em"), (0, "em_mean")):
        noise = RecordedNoise([scale * driven])
        made = solvers.solve(process, solvers.EulerMaruyama(), found["state"], times, noise=noise)
        assert_close(made.state.flatten(1, 2), unit(name, found[key]))


def test_a_step_of_sscs_is_the_same():
    score, found = loaded("cld_fourier")
    times, noise = torch.tensor([1.0, 0.5]).double(), [found["noise"], found["noise2"]]
    arguments = (ReverseProcess(score.sde, score), solvers.SSCS(), found["state"], times)
    made = solvers.solve(*arguments, noise=RecordedNoise(noise))
    assert_close(made.state, found["sscs"])


@continuous_cases
def test_training_losses_and_states_are_the_same(name):
    """The process perturbs data as the code does: mean, root and order of the normals."""
    score, found = loaded(name)
    x0, state, noise = (found[key] for key in ("x0", "loss_state", "loss_noise"))
    t, eps = found["loss_t"].double(), MODELS[name].parameterisation.numerical_eps
    pair = PerturbedData.draw(score.sde, x0, t, generator=torch.Generator().manual_seed(0))
    ours = score.loss(dataclasses.replace(pair, z=state, noise=noise[:, -1:]))
    if name in CLD_SGM:
        ours = ours * x0[0].numel()
    # Their states and losses add `numerical_eps` to the variances, ours do not.
    kernel = score.sde.marginal(t)
    added = eps / kernel.covariance.diagonal(dim1=-2, dim2=-1).min().item()
    torch.testing.assert_close(ours, found["loss"], rtol=RELATIVE + 10 * added, atol=0)
    made = kernel.mean.float() @ score.sde.embed(x0).flatten(2)
    made = made + kernel.root.float() @ noise.flatten(2)
    tolerance = {"rtol": RELATIVE, "atol": RELATIVE * 3 + 3 * eps**0.5}
    torch.testing.assert_close(made.reshape_as(state), state, **tolerance)
