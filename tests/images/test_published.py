"""The published configurations build, train and sample."""

import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest

from cldsde.cli import main
from cldsde.images import Run, published
from cldsde.images.config import load_config
from cldsde.images.data import DataSet
from cldsde.pretrained import published_models
from cldsde.pretrained.ncsnpp import NCSNpp
from tiny_runs import noise_images
from trainings import trained

CONFIGS = Path(__file__).parents[2] / "configs"
# Names of the published settings (Dockhorn et al. 2022).
PUBLISHED = {
    "cifar10_cld": "cifar10",
    "cifar10_vp": "cifar10_vpsde",
    "celebahq256_cld": "celeba_paper",
    "celebahq256_cld_later": "celeba_post_paper",
}
DEFAULTS = {name: x.default for name, x in inspect.signature(NCSNpp).parameters.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_are_those_of_the_published_checkpoints(name):
    config = load_config(CONFIGS / f"{name}.toml")
    model = published_models.PUBLISHED["cld-sgm"][PUBLISHED[name]]
    assert repr(config.process.make()) == repr(model.make_process())
    options = config.network.options.items()
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in options}
    assert config.network.name == "NCSNpp"
    assert DEFAULTS | given == DEFAULTS | dict(model.network)
    how = config.score.published(log_clock="fourier_scale" in config.network.options)
    # Training here needs no number added to variances.
    assert how == dataclasses.replace(model.parameterisation, numerical_eps=0.0)
    assert (config.training.batch, config.training.t_min) == (model.batch, model.t_min)


def test_the_settings_of_every_published_model_make_a_configuration():
    for models in published_models.PUBLISHED.values():
        for model in models.values():
            config = published.RunConfig.from_dict(published._settings(model, 128))
            assert repr(config.process.make()) == repr(model.make_process())


def test_the_printed_configuration_shows_parameters_and_memory(capsys):
    assert main(["train", str(CONFIGS / "cifar10_cld.toml"), "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "# parameters: 107,593,859, images of 3×32×32" in text
    # Four bytes of weights, average, gradient and two moments each.
    assert f"# memory: {20 * 107_593_859 / 2**20:,.0f} MiB" in text
    assert tomllib.loads(text)["training"]["warmup"] == 12_800_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_step_of_training_and_one_of_sampling_with_small_networks(name, tmp_path):
    words = "batch=1 micro_batch=1 images=1 held_out=1 sample_grid=1 precision=fp32"
    overrides = [f"training.{word}" for word in words.split()]
    overrides += ["network.options.channels=[4]", "network.options.attention=[]", "sampling.nfe=2"]
    config = load_config(CONFIGS / f"{name}.toml", overrides)
    trained(tmp_path, config, DataSet(*[noise_images(2, shape=(3, 8, 8))] * 2))
    [image] = Run.load(tmp_path).sample([0]).images
    assert image.shape == (3, 8, 8)
