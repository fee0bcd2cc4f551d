"""The published configurations build, train and sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cldsde.images.config import load_config
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.model import ImageSpace, make_network
from cldsde.images.networks import parameter_count
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import draw_images
from cldsde.images.train.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"
# Parameters of the published networks (Dockhorn et al. 2022), 107.6 M and 65.5 M.
PUBLISHED = {
    "cifar10_cld": ((3, 32, 32), 107.6e6),
    "cifar10_vp": ((3, 32, 32), 107.6e6),
    "celebahq256_cld": ((3, 256, 256), 65.5e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_size(name):
    shape, count = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.toml")
    network = make_network(config, shape, None, device="meta")
    # diffusers' skip blocks replace convolutions of 0.9 M parameters.
    assert parameter_count(network) == pytest.approx(count, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_cld", "celebahq256_cld"])
def test_one_step_of_training_and_one_of_sampling_at_batch_one(name, tmp_path):
    shape, _ = PUBLISHED[name]
    overrides = [
        "batch=1",
        "micro_batch=1",
        "images=1",
        "held_out=1",
        "sample_grid=1",
        "precision=fp32",
    ]
    config = load_config(
        CONFIGS / f"{name}.toml",
        [*(f"training.{word}" for word in overrides), "sampling.nfe=2"],
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, *shape), generator=generator, dtype=torch.uint8)
    data = DataSet(ArrayImages(pixels), ArrayImages(pixels))
    model = train(config, data, RunFolder(tmp_path, config.to_dict()), device="cpu").score
    recipe = dataclasses.replace(config.sampling, nfe=2)
    assert draw_images(model, ImageSpace(shape), [0], recipe).images.shape == (1, *shape)
