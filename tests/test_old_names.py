"""Old names warn, and do what the new ones do."""

import json

import pytest
import torch

import cldsde
from cldsde import CLD, VPSDE, MixedScore, Observation, ReverseProcess, score, solvers
from cldsde.images.config import RunConfig, SamplingConfig

OLD = {"log_snr": (-1.0, 2.0), "stochasticity": (0.5, 1.0)}
T = torch.tensor([0.1, 0.7], dtype=torch.float64)


def settings(**how):
    how = how or {"kappa": (-1.0, 1.0)}
    return solvers.SamplerSettings(stochasticity=(1.0,), process=VPSDE(), **how)


def weighted(name):
    model = MixedScore(lambda x, t: x, CLD(), data_mean=0.0, data_variance=1.0)
    return getattr(model, name)(mean=0.5)(T)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: CLD().log_snr(T), lambda: CLD().kappa(T)),
        (lambda: solvers.times_of_log_snr(CLD(), 1.0), lambda: solvers.times_of_kappa(CLD(), 1.0)),
        (
            lambda: solvers.times_of_kappa(CLD(), log_snr=1.0),
            lambda: solvers.times_of_kappa(CLD(), 1.0),
        ),
        (lambda: score.log_snr_density(CLD())(T), lambda: score.kappa_density(CLD())(T)),
        (lambda: weighted("log_snr_weighting"), lambda: weighted("kappa_weighting")),
        (lambda: solvers.LevelNoise(*OLD.values()).log_snr, lambda: OLD["log_snr"]),
        (lambda: settings().log_snr, lambda: (-1.0, 1.0)),
        (lambda: settings(log_snr=(-1.0, 1.0)), settings),
        (lambda: solvers.LevelNoise(**OLD), lambda: solvers.LevelNoise(*OLD.values())),
        (
            lambda: solvers.ExponentialMultistep(variable="log_snr"),
            lambda: solvers.ExponentialMultistep(variable="kappa"),
        ),
    ],
)
def test_an_old_name_warns_and_does_the_same(old, new):
    with pytest.warns(DeprecationWarning, match="is called .*kappa") as caught:
        found = old()
    assert caught[0].filename == __file__
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, new())
    else:
        assert found == new()


@pytest.mark.parametrize("seeds", [[3], torch.tensor([3, 4])])
def test_sample_posterior_takes_its_seeds_by_the_old_name(seeds):
    seen = Observation.matrix([[1.0]], torch.tensor([0.1]), noise_std=0.1)
    process = ReverseProcess(CLD(), lambda z, t: -4 * z[:, 1:])
    times = solvers.root_times(1.0, seen.end_time(CLD(), (1,)), 3)
    new = solvers.sample_posterior(process, seen, times, seed=seeds)
    with pytest.warns(DeprecationWarning, match="^seeds is called seed now") as caught:
        old = solvers.sample_posterior(process, seen, times, seeds=seeds)
    assert caught[0].filename == __file__
    assert torch.equal(old.samples, new.samples)
    with pytest.raises(TypeError, match="seed must be given once; got seeds, its old name, too"):
        solvers.sample_posterior(process, seen, times, seed=3, seeds=seeds)


def test_both_names_of_an_argument_are_rejected():
    with pytest.raises(TypeError, match="kappa must be given once; got log_snr, its old name, too"):
        solvers.times_of_kappa(VPSDE(), kappa=1.0, log_snr=1.0)


def test_unknown_names_of_a_module_stay_unknown():
    with pytest.raises(AttributeError, match="has no attribute 'log_snr_time'"):
        _ = solvers.log_snr_time
    assert not hasattr(cldsde.score, "log_snr")


def test_configurations_of_older_files_are_read_and_keep_their_digest():
    training = {"images": 64, "weighting": "log_snr", "log_snr_mean": 0.5, "log_snr_std": 2.0}
    new = {"images": 64, "weighting": "kappa", "kappa_mean": 0.5, "kappa_std": 2.0}
    found, same = (RunConfig.from_dict({"training": x}) for x in (training, new))
    assert found == same
    # Computed by version 0.2 for the first dictionary.
    assert found.training_digest()[:16] == "90e35c93e4a87c10"
    old = SamplingConfig(solver="multistep-2", grid="log_snr", options={"variable": "log_snr"})
    assert old == SamplingConfig(solver="multistep-2", grid="kappa", options={"variable": "kappa"})


def test_default_settings_is_recommend():
    process = ReverseProcess(VPSDE(), lambda z, t: -z)
    with pytest.warns(DeprecationWarning, match="default_settings is called recommend"):
        found = solvers.default_settings(process, (3, 64, 64), 5)
    assert found == solvers.recommend(process, 5, shape=(3, 64, 64))


@pytest.mark.parametrize("name", ["uniform_times", "root_times", "kappa_times", "vp_times"])
def test_grids_took_the_process_first(name):
    grid, sde = getattr(solvers, name), CLD()
    new = rf"is called {name}\(T, eps, n, sde=sde\) now"
    with pytest.warns(DeprecationWarning, match=new) as caught:
        found = grid(sde, 1.0, 0.1, n=3)
    assert caught[0].filename == __file__
    assert torch.equal(found, grid(1.0, 0.1, 3, sde=sde))
    with pytest.warns(DeprecationWarning, match="karras_times"):
        assert len(solvers.karras_times(sde, 1.0, 0.1, 3, 7.0)) == 4


def noised(**how):
    x = 3 * torch.ones(2, 3)
    return cldsde.pretrained.sample_k_diffusion(lambda x, s: 0.5 * x, x, [3.0, 1.0, 0.1], **how)


@pytest.mark.parametrize(
    ("new", "make"),
    [("seed", lambda: 3), ("generator", lambda: torch.Generator().manual_seed(3))],
)
def test_noise_of_k_diffusion_may_be_a_seed_or_a_generator_for_one_release(new, make):
    with pytest.warns(DeprecationWarning, match=f"noise={new} is called {new}") as caught:
        found = noised(noise=make())
    assert caught[0].filename == __file__
    assert torch.equal(found, noised(**{new: make()}))
    with pytest.raises(ValueError, match=f"{new} and noise are alternatives"):
        noised(noise=solvers.SampleNoise([1, 2]), **{new: make()})


@pytest.mark.parametrize("old", ["CLD(beta=4.0, mass=0.25)", repr(cldsde.HOLD())])
def test_settings_of_version_0_2_know_their_process_by_its_text(tmp_path, old):
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"log_snr": [-1, 1], "stochasticity": [1], "process": old}))
    sde = {"C": CLD, "H": cldsde.HOLD}[old[0]]()
    assert len(solvers.SamplerSettings.load(file).times(sde)) == 2


@pytest.mark.parametrize("text", ["LinearSDE(F=<function f>)", "os.system('x')", "Schedule(1)", ""])
def test_a_text_that_determines_no_process_is_rejected(tmp_path, text):
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"log_snr": [-1, 1], "stochasticity": [1], "process": text}))
    with pytest.raises(ValueError, match=r"old\.json .*does not determine a process of cldsde"):
        solvers.SamplerSettings.load(file)
