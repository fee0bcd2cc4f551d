"""Score models of images: made from a configuration, and loaded from a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import Images, channel_statistics
from cldsde.images.errors import SettingError, setting
from cldsde.images.files import load_tensors, save_tensors
from cldsde.images.latent import VAE
from cldsde.images.networks import NETWORKS
from cldsde.images.runs import CONFIG
from cldsde.images.streams import stream_seed
from cldsde.pretrained import PublishedScore
from cldsde.score import MixedScore

__all__ = [
    "KIND",
    "MODEL",
    "DiffusionModel",
    "ImageModel",
    "ImageSpace",
    "Statistics",
    "check_model",
    "data_statistics",
    "load_model",
    "make_model",
    "make_network",
    "make_vae",
    "read_model",
    "save_model",
]

MODEL = "model.safetensors"
"""File of a run that holds the averaged weights."""

KIND = "an image model of cldsde, version 2"
"""Kind of the file, which other files do not have."""


class DiffusionModel(nn.Module):
    """What is trained: a score, and for a latent model the autoencoder in whose space it lives.

    Parameters
    ----------
    score
        Of images, or of latent variables.
    vae
        The autoencoder; None where the process lives among the pixels.
    """

    def __init__(self, score: MixedScore | PublishedScore, vae: VAE | None = None) -> None:
        super().__init__()
        self.score = score
        self.vae = vae


@dataclass(frozen=True)
class ImageSpace:
    """What kind of images a model makes.

    Attributes
    ----------
    shape
        ``(C, H, W)``.
    levels
        Grey levels.
    dequantised
        Whether the model saw levels spread over their bins.
    classes
        Number of classes that the network is told of; None where it is told none.
    always_classes
        Whether it always is: then it cannot sample an image of no class.
    class_names
        Names of the classes, if the data set has them.
    """

    shape: tuple[int, int, int]
    levels: int = 256
    dequantised: bool = False
    classes: int | None = None
    always_classes: bool = False
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, images: Images, config: RunConfig) -> ImageSpace:
        """That of a configuration's data.

        Raises
        ------
        SettingError
            If classes are wanted of images that have none.
        """
        conditional = config.network.conditional
        if conditional and (images.labels is None or images.classes is None):
            raise SettingError("network.conditional", "the images have no classes")
        return cls(
            images.shape,
            images.levels,
            config.data.dequantise,
            images.classes if conditional else None,
            conditional and config.network.label_dropout == 0,
            images.class_names if conditional else None,
        )

    def class_number(self, label: int | str) -> int:
        """The class of a name or number.

        Raises
        ------
        SettingError
            If there is no such class; the key is ``"label"``.
        """
        if self.classes is None:
            msg = "the network was not trained with classes (network.conditional)"
            raise SettingError("label", msg)
        names = self.class_names or ()
        if label in names:
            return names.index(str(label))
        if not str(label).isdigit() or int(label) >= self.classes:
            named = f", or one of {', '.join(names)}" if names else ""
            msg = f"must be 'all', a number from 0 to {self.classes - 1}{named}; got {label!r}"
            raise SettingError("label", msg)
        return int(label)


class Statistics(NamedTuple):
    """Mean and variance of the data in [−1, 1], for the reference of the score.

    Attributes
    ----------
    data_mean, data_variance
        ``()``, ``(C, 1, 1)`` or ``(C, H, W)``, float64.
    """

    data_mean: Tensor
    data_variance: Tensor


def data_statistics(config: RunConfig, images: Images) -> Statistics:
    """Mean and variance as a configuration's reference takes them.

    Raises
    ------
    SettingError
        If some variance is 0.
    """
    found = Statistics(
        *channel_statistics(images, per=config.score.reference, dequantise=config.data.dequantise)
    )
    if not bool((found.data_variance > 0).all()):
        msg = f"with {config.score.reference!r} some variance of the data is 0; take a coarser one"
        raise SettingError("score.reference", msg)
    return found


@dataclass(frozen=True)
class ImageModel:
    """A trained model and what it was trained to make.

    Attributes
    ----------
    model
        Score and autoencoder, with averaged weights, in evaluation mode.
    space
        The images it makes.
    config
        The configuration of its run.
    images_seen
        How long it was trained.
    digest
        Of the weights: sha256.
    """

    model: DiffusionModel
    space: ImageSpace
    config: RunConfig
    images_seen: int
    digest: str

    @property
    def score(self) -> MixedScore | PublishedScore:
        """The score."""
        return self.model.score

    @property
    def sampling(self) -> SamplingConfig:
        """How it is sampled, unless a request says otherwise."""
        return self.config.sampling

    @property
    def t_min(self) -> float | None:
        """Smallest time that the network was trained on."""
        return self.config.training.t_min

    @property
    def vae(self) -> VAE | None:
        """The autoencoder; None where there is none."""
        return self.model.vae


def make_vae(config: RunConfig, space: ImageSpace, device: str = "cpu") -> VAE | None:
    """The autoencoder, with the weights of the configuration's seed; None where there is none.

    Raises
    ------
    ValueError
        If it does not fit the images.
    """
    latent = config.latent
    if latent is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.device(device), setting("latent"):
        torch.manual_seed(stream_seed(config.seed, "autoencoder"))
        return VAE(
            space.shape,
            space.levels,
            latent_channels=latent.latent_channels,
            channels=latent.channels,
            blocks=latent.blocks,
            groups=latent.groups,
            likelihood=latent.likelihood,
        )


def make_network(
    config: RunConfig, shape: Sequence[int], classes: int | None, device: str = "cpu"
) -> nn.Module:
    """The network, with the weights of the configuration's seed; none on the device ``"meta"``.

    Parameters
    ----------
    config
        The configuration.
    shape
        ``(C, H, W)`` of what the process is of: images or latent variables.
    classes
        Number of classes that it is told of; None: none.
    device
        Where to make it.

    Raises
    ------
    ValueError
        If it does not fit the shape.
    """
    sde, whole = config.process.make(), config.score.inputs == "state"
    with torch.random.fork_rng(devices=[]), torch.device(device), setting("network.options"):
        torch.manual_seed(config.seed)
        return NETWORKS[config.network.name](
            shape,
            *((sde.components, len(sde.driven)) if whole else (1, 1)),
            classes=classes,
            **config.network.options,
        )


def check_model(config: RunConfig, space: ImageSpace) -> None:
    """Refuse networks that do not fit the images, before any weight is made.

    Raises
    ------
    ValueError
        If one does not.
    """
    vae = make_vae(config, space, device="meta")
    make_network(config, space.shape if vae is None else vae.latent_shape, space.classes, "meta")


def make_model(
    config: RunConfig, space: ImageSpace, statistics: Statistics | None = None
) -> DiffusionModel:
    """An untrained model; its weights are those of the configuration's seed.

    Parameters
    ----------
    config
        The configuration.
    space
        The images.
    statistics
        Of the data; None where weights are going to be loaded, which bring their own.

    Raises
    ------
    ValueError
        If a network does not fit the images.
    """
    vae = make_vae(config, space)
    shape = space.shape if vae is None else vae.latent_shape
    log_clock = config.network.options.get("fourier_scale") is not None
    published = config.score.published(log_clock=log_clock)
    if published is not None:
        network = make_network(config, shape, space.classes)
        return DiffusionModel(PublishedScore(network, config.process.make(), published))
    if statistics is None or vae is not None:
        sizes = {"scalar": (), "channel": (shape[0], 1, 1), "pixel": shape}
        size = sizes[config.score.reference]
        statistics = Statistics(torch.zeros(size), torch.ones(size))
    mixing = config.score.mixing
    logits = None if mixing is None else torch.full((shape[0], 1, 1), mixing)
    score = MixedScore(
        make_network(config, shape, space.classes),
        config.process.make(),
        *statistics,
        inputs=config.score.inputs,
        mixing_logits=logits,
    )
    return DiffusionModel(score, vae)


def save_model(
    file: Path,
    weights: Mapping[str, Tensor],
    config: RunConfig,
    space: ImageSpace,
    images_seen: int,
) -> None:
    """Write a model file, whole or not at all."""
    metadata = {
        "shape": json.dumps(space.shape),
        "space": json.dumps(
            [
                *(space.levels, space.dequantised, space.classes, space.always_classes),
                space.class_names,
            ]
        ),
        "images_seen": str(images_seen),
        "config": config.model_digest(),
    }
    save_tensors(file, KIND, weights, metadata)


def load_model(run: Path | str, device: torch.device | str = "cpu") -> ImageModel:
    """Load the model of a run; runs no code of the file's.

    Parameters
    ----------
    run
        Folder of the run.
    device
        Where to put the model.

    Raises
    ------
    ValueError
        If there is no such run, it has no model yet, the file is damaged, or was written for
        another configuration.
    """
    run = Path(run).expanduser()
    if not (run / CONFIG).is_file():
        state = "is no folder" if not run.is_dir() else f"holds no {CONFIG}"
        msg = f"{run} is no run of cldsde train: it {state}"
        raise ValueError(msg)
    file = run / MODEL
    if not file.is_file():
        msg = f"{run} has no {MODEL} yet: its training has not come to the first checkpoint"
        if (run / "models").is_dir():
            msg = f"{run} is of a comparison; its models are in {run / 'models'}"
        raise ValueError(msg)
    try:
        config = RunConfig.from_dict(json.loads((run / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        msg = f"{run / CONFIG} is no configuration of an image model ({error})"
        raise ValueError(msg) from error
    return read_model(file, config, device)


def read_model(file: Path, config: RunConfig, device: torch.device | str = "cpu") -> ImageModel:
    """Load a model file that was written for a configuration; runs no code of the file's.

    Raises
    ------
    ValueError
        If the file is damaged, or was written for another configuration.
    """
    tensors, metadata = load_tensors(file, KIND)
    try:
        if metadata["config"] != config.model_digest():
            msg = "it was written for another process, other networks or data than those configured"
            raise ValueError(msg)
        channels, height, width = json.loads(metadata["shape"])
        levels, dequantised, classes, always, *names = json.loads(metadata["space"])
        named = tuple(names[0]) if names and names[0] else None  # older files have no names
        space = ImageSpace(
            (channels, height, width), levels, dequantised, classes, always, class_names=named
        )
        model = make_model(config, space)
        model.load_state_dict(tensors)
        seen = int(metadata["images_seen"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        msg = f"{file} cannot be used: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    return ImageModel(model, space, config, seen, metadata["sha256"])
