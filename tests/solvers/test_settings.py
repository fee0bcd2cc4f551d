"""Settings of a sampler with few evaluations."""

import pickle

import pytest
import torch

import cldsde
from cldsde import CLD, VPSDE, solvers
from cldsde.solvers import SamplerSettings
from probes import tensor
from score.cases import TWO as DATA
from tolerances import rounding

LEVELS, LAMBDAS = (-3.0, -1.35, -0.33, 0.6, 2.35), (0.54, 1.29, 1.76, 1.19)


def settings(sde, **changes):
    return SamplerSettings(
        **{"kappa": LEVELS, "stochasticity": LAMBDAS, "process": repr(sde), "order": 3} | changes
    )


@pytest.mark.parametrize("sde", [VPSDE(), CLD(), cldsde.HOLD(), cldsde.RectifiedFlow()])
def test_samples_are_those_of_the_solver_on_the_levels(sde):
    given, score = settings(sde, corrector=True, network="one"), DATA.score(sde)
    times = given.times(sde)
    # A time of rectified flow near 1 has the digits of 1 − t = e^{−3}.
    torch.testing.assert_close(sde.kappa(times), tensor(LEVELS), rtol=0, atol=rounding(2**12))
    found = cldsde.sample(sde, score, (6, 2), settings=given, seed=3)
    levels = tensor(LAMBDAS)
    same = solvers.ExponentialMultistep(
        order=3, stochasticity=lambda _: levels, corrector=True, variable="vp_time"
    )
    expected = cldsde.sample(sde, score, (6, 2), solver=same, times=times, seed=3)
    assert torch.equal(found, expected)
    assert given.nfe == 5


def test_settings_survive_a_file_and_a_pickle(tmp_path):
    given = settings(CLD(), kappa=(-1 / 3, 2**0.5), stochasticity=[0.1], network="δ")
    given.save(tmp_path / "settings.json")
    assert SamplerSettings.load(tmp_path / "settings.json") == given
    assert pickle.loads(pickle.dumps(given)) == given


@pytest.mark.parametrize("text", ["{", "[1]", '{"kappa": [1, 2]}'])
def test_other_files_are_rejected(tmp_path, text):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json"):
        SamplerSettings.load(file)


def test_noise_by_level_is_linear_between_its_levels_for_any_process():
    noise = solvers.LevelNoise((-1.0, 0.0, 2.0), (0.5, 1.5, 1.0))
    solver = solvers.ExponentialMultistep(stochasticity=noise)
    for sde in (VPSDE(), CLD()):
        times = solvers.times_of_kappa(sde, tensor([-3.0, -0.5, 0.0, 1.0, 4.0]))
        expected = tensor([0.5, 1.0, 1.5, 1.25, 1.0])
        torch.testing.assert_close(
            solver.stochasticities(sde, times), expected, rtol=0, atol=rounding(2**12)
        )
