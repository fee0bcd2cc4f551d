"""Settings of a sampler with few evaluations."""

import json
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
        **{"log_snr": LEVELS, "stochasticity": LAMBDAS, "process": repr(sde), "order": 3} | changes
    )


@pytest.mark.parametrize("sde", [VPSDE(), CLD(), cldsde.HOLD(), cldsde.RectifiedFlow()])
def test_samples_are_those_of_the_solver_on_the_levels(sde):
    given, score = settings(sde, corrector=True, network="one"), DATA.score(sde)
    times = given.times(sde)
    # A time of rectified flow near 1 has the digits of 1 − t = e^{−3}.
    torch.testing.assert_close(sde.log_snr(times), tensor(LEVELS), rtol=0, atol=rounding(2**12))
    found = cldsde.sample(sde, score, (6, 2), settings=given, seed=3)
    levels = tensor(LAMBDAS)
    same = solvers.ExponentialMultistep(
        order=3, stochasticity=lambda _: levels, corrector=True, variable="vp_time"
    )
    expected = cldsde.sample(sde, score, (6, 2), solver=same, times=times, seed=3)
    assert torch.equal(found, expected)
    assert given.nfe == 5


def test_settings_survive_a_file_and_a_pickle(tmp_path):
    given = settings(CLD(), log_snr=(-1 / 3, 2**0.5), stochasticity=[0.1], network="δ")
    given.save(tmp_path / "settings.json")
    assert SamplerSettings.load(tmp_path / "settings.json") == given
    assert pickle.loads(pickle.dumps(given)) == given
    assert given.solver == pickle.loads(pickle.dumps(given.solver))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_snr": (1.0,), "stochasticity": ()}, "log_snr must be two or more increasing finite"),
        ({"log_snr": (*LEVELS[:4], 0.5)}, "log_snr must be two or more increasing finite"),
        ({"log_snr": (*LEVELS[:4], float("nan"))}, "increasing finite"),
        ({"stochasticity": LAMBDAS[:3]}, "one λ for each of 4 steps; got 3"),
        ({"stochasticity": (-0.1, 1, 1, 1)}, "one finite λ ≥ 0 for each of 4 κ"),
        ({"order": 4}, "order must be 1, 2 or 3"),
    ],
)
def test_values_out_of_range_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(CLD(), **changes)


@pytest.mark.parametrize(
    "changes", [{"log_snr": 3}, {"stochasticity": ["a"]}, {"process": CLD()}, {"corrector": 1}]
)
def test_wrong_types_are_rejected(changes):
    with pytest.raises(TypeError, match=f"{next(iter(changes))} must be"):
        settings(CLD(), **changes)


def test_settings_that_do_not_fit_are_rejected_before_an_evaluation():
    def untouchable(z, t):
        raise AssertionError("evaluated")

    def sample(sde, **options):
        cldsde.sample(sde, untouchable, (2, 3), **options)

    with pytest.raises(ValueError, match=r"for this process, VPSDE.*; got settings for CLD"):
        sample(VPSDE(), settings=settings(CLD()))
    with pytest.raises(ValueError, match=r"reaches, from -5\.0.* to 11\.\d+; got \(-7"):
        sample(VPSDE(), settings=settings(VPSDE(), log_snr=(-7.0, *LEVELS[1:])))
    with pytest.raises(ValueError, match="solver and times must be None with settings"):
        sample(CLD(), settings=settings(CLD()), solver=solvers.SSCS())
    with pytest.raises(TypeError, match="settings must be a SamplerSettings; got str"):
        sample(CLD(), settings="fast")


@pytest.mark.parametrize("text", ["{", "[1]", "{}", json.dumps({"log_snr": [1, 2]}), "\x00"])
def test_other_files_are_rejected(tmp_path, text):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json"):
        SamplerSettings.load(file)


def test_noise_by_level_is_linear_between_its_levels_for_any_process():
    noise = solvers.LevelNoise((-1.0, 0.0, 2.0), (0.5, 1.5, 1.0))
    solver = solvers.ExponentialMultistep(stochasticity=noise)
    for sde in (VPSDE(), CLD()):
        times = solvers.times_of_log_snr(sde, tensor([-3.0, -0.5, 0.0, 1.0, 4.0]))
        expected = tensor([0.5, 1.0, 1.5, 1.25, 1.0])
        torch.testing.assert_close(
            solver.stochasticities(sde, times), expected, rtol=0, atol=rounding(2**12)
        )


@pytest.mark.parametrize(
    ("levels", "values", "message"),
    [
        ((0.0, 0.0), (1.0, 1.0), "log_snr must be increasing finite κ"),
        ((), (), "log_snr must be increasing finite κ, one or more"),
        ((0.0, 1.0), (1.0,), "stochasticity must be one finite λ ≥ 0 for each of 2 κ"),
        ((0.0,), (-1.0,), "stochasticity must be one finite λ ≥ 0"),
    ],
)
def test_bad_noise_by_level_is_rejected(levels, values, message):
    with pytest.raises(ValueError, match=message):
        solvers.LevelNoise(levels, values)
