"""Facts about a training before it starts."""

from __future__ import annotations

import torch

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.model import ImageSpace, make_network, make_vae
from cldsde.images.networks import parameter_count

_COPIES = 5  # of each parameter: weights, average, gradient and Adam's two moments


def summary(config: RunConfig, data: DataSet, device: str) -> list[str]:
    """Lines about data, model, length, device and memory of a training."""
    train, held_out, settings = data.train, data.held_out, config.training
    held = 0 if held_out is None else len(held_out)
    classes = "no classes" if train.classes is None else f"{train.classes} classes"
    shape = "×".join(map(str, train.shape))
    space = ImageSpace.of(train, config)
    vae = make_vae(config, space, device="meta")
    shape_of_state = space.shape if vae is None else vae.latent_shape
    network = make_network(config, shape_of_state, space.classes, "meta")
    count = parameter_count(network) + (0 if vae is None else parameter_count(vae))
    memory = 4 * _COPIES * count / 2**20
    of_data = f"{len(train):,} images of {shape}, {train.levels} levels, {classes}"
    return [
        f"data: {of_data}; {held:,} held out ({held / (len(train) + held):.0%})",
        *(f"skipped: {reason}" for reason in getattr(data, "skipped", ())),
        f"model: {config.process.name}, {config.network.name}, {count:,} parameters",
        f"training: {settings.images:,} images in {settings.steps:,} steps of {settings.batch}",
        f"device: {_name(device)}, {settings.precision}, {memory:,.0f} MiB and activations",
    ]


def _name(device: str) -> str:
    if device in {"auto", "cuda"} and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name()})"
    return device
