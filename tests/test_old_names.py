"""Old names warn, and do what the new ones do."""

import pytest
import torch

import cldsde
from cldsde import CLD, VPSDE, MixedScore, Observation, ReverseProcess, score, solvers
from cldsde.images.config import RunConfig, SamplingConfig

OLD = {"log_snr": (-1.0, 2.0), "stochasticity": (0.5, 1.0)}
T = torch.tensor([0.1, 0.7], dtype=torch.float64)


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
