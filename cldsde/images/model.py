"""Score models of images: made from a configuration, and loaded from a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from cldsde.errors import SettingError, require, setting
from cldsde.images.checks import Scale, listed
from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import Images, channel_statistics
from cldsde.images.latent import VAE
from cldsde.images.networks import NETWORKS, parameter_count
from cldsde.images.power_averages import combined, wanted_width
from cldsde.images.runs import CONFIG, SNAPSHOTS, STATE
from cldsde.images.streams import stream_seed
from cldsde.images.tensor_files import load_tensors
from cldsde.linear import LinearSDE
from cldsde.messages import imported, one_line
from cldsde.pretrained.published_score import PublishedScore
from cldsde.score import DenoiserScore, MixedScore

MODEL = "model.safetensors"
"""File of a run that holds the averaged weights."""

KIND = "an image model of cldsde, version 2"
STATE_KIND = "a training state of cldsde, version 2"
"""Kinds of files with weights, which other files do not have."""


class DiffusionModel(nn.Module):
    """A score of images, or a score of latent variables with their autoencoder."""

    def __init__(self, score: MixedScore | PublishedScore, vae: VAE | None = None) -> None:
        super().__init__()
        self.score = score
        self.vae = vae


@dataclass(frozen=True)
class ImageSpace:
    """The images of a model."""

    shape: tuple[int, int, int]  # (C, H, W)
    levels: Scale = 256  # number of grey levels, or range of continuous numbers
    dequantised: bool = False  # whether training spread the levels over their bins
    classes: int | None = None  # number of classes that the network sees, if any
    always_classes: bool = False  # whether it cannot sample an image of no class
    class_names: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> ImageSpace:
        """The space with these values of its fields, in JSON types."""
        fields: list[Any] = [tuple(x) if isinstance(x, list) else x for x in values]
        return cls(*fields)

    @classmethod
    def of(cls, images: Images, config: RunConfig) -> ImageSpace:
        """The space of a configuration's data; raise a SettingError if they do not fit."""
        conditional = config.network.conditional
        labelled = images.labels is not None or not conditional
        require(labelled, "network.conditional", "the images have no classes")
        continuous = not isinstance(images.levels, int)
        msg = "must be false: continuous numbers have no grey levels"
        require(not (config.data.dequantise and continuous), "data.dequantise", msg)
        msg = "must be absent: the autoencoder of a latent model predicts grey levels"
        require(config.latent is None or not continuous, "latent", msg)
        return cls(
            *(images.shape, images.levels, config.data.dequantise),
            images.classes if conditional else None,
            conditional and config.network.label_dropout == 0,
            images.class_names if conditional else None,
        )

    def label(self, text: int | str | None) -> int | Literal["all"] | None:
        """The class of a name or number, or ``"all"``; raise a SettingError if there is none."""
        if text is None:
            return None
        names, count = self.class_names or (), self.classes or 0
        msg = "the network was not trained with classes (network.conditional)"
        require(self.classes is not None, "label", msg)
        if text == "all":
            return "all"
        if text in names:
            return names.index(str(text))
        or_named = f", or one of {', '.join(names)}" if names else ""
        msg = f"must be 'all', a number from 0 to {count - 1}{or_named}; got {text!r}"
        require(str(text).isdecimal() and int(text) < count, "label", msg)
        return int(text)


class Statistics(NamedTuple):
    """Mean and variance of the data for the reference, float64; see `channel_statistics`."""

    data_mean: Tensor
    data_variance: Tensor


def data_statistics(config: RunConfig, images: Images, *, progress: bool = False) -> Statistics:
    """Mean and variance for a configuration's reference; raise if some variance is 0."""
    options: Any = {"dequantise": config.data.dequantise, "progress": progress}
    per = config.score.reference
    found = Statistics(*channel_statistics(images, per=per, **options))
    varies, msg = bool((found.data_variance > 0).all()), "all pixels of all training images have "
    require(varies or per != "scalar", "data", f"{msg}the same value")
    msg = f"with {per!r} some variance of the data is 0; use a coarser reference"
    require(varies, "score.reference", msg)
    return found


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """A score of images that can be sampled."""

    score: MixedScore | PublishedScore | DenoiserScore = dataclasses.field(repr=False)
    space: ImageSpace
    digest: str
    sampling: SamplingConfig  # its default settings
    vae: VAE | None = dataclasses.field(default=None, repr=False)
    # Smallest time of the training; None if the score raises an error outside its noise levels.
    t_min: float | None = None

    @property
    def process(self) -> LinearSDE:
        """The forward process."""
        return self.score.sde

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the process."""
        return self.space.shape if self.vae is None else self.vae.latent_shape


@dataclass(frozen=True, kw_only=True)
class TrainedModel(ImageModel):
    """The model of a run, with its configuration."""

    model: DiffusionModel = dataclasses.field(repr=False)
    config: RunConfig = dataclasses.field(repr=False)
    images_seen: int


def make_networks(
    config: RunConfig, space: ImageSpace, device: str = "cpu"
) -> tuple[nn.Module, VAE | None]:
    """The network, and the autoencoder of a latent model, with weights of the configuration's seed.

    On the device ``"meta"`` they have no weights. Raises a SettingError if one does not fit the
    images, or a network of one's own cannot be imported.
    """
    shape, vae, latent, network = space.shape, None, config.latent, config.network
    if latent is not None:
        with torch.random.fork_rng(devices=[]), torch.device(device), setting("latent"):
            torch.manual_seed(stream_seed(config.seed, "autoencoder"))
            assert isinstance(space.levels, int)
            vae = VAE(space.shape, space.levels, latent)
        shape = vae.latent_shape
    with setting("network.name"):
        kind: Any = NETWORKS.get(network.name) or imported(network.name)
    sde = config.process.make()
    sizes = (sde.components, len(sde.driven)) if config.score.inputs == "state" else (1, 1)
    with setting("network"):
        options = network.checked_options(kind)
    with torch.random.fork_rng(devices=[]), torch.device(device), setting("network.options"):
        torch.manual_seed(config.seed)
        return kind(shape, *sizes, classes=space.classes, **options), vae


def check_model(config: RunConfig, space: ImageSpace) -> int:
    """Number of parameters; raise a SettingError if a network does not fit. No weight is made."""
    return sum(parameter_count(x) for x in make_networks(config, space, "meta") if x is not None)


def make_model(
    config: RunConfig, space: ImageSpace, statistics: Statistics | None = None
) -> DiffusionModel:
    """An untrained model, with weights of the configuration's seed.

    Without statistics of the data, weights are going to be loaded that include them.
    """
    sde, (network, vae) = config.process.make(), make_networks(config, space)
    shape = space.shape if vae is None else vae.latent_shape
    log_clock = config.network.options.get("fourier_scale") is not None
    published = config.score.published(log_clock=log_clock)
    if published is not None:
        return DiffusionModel(PublishedScore(network, sde, published))
    if statistics is None or vae is not None:
        sizes = {"scalar": (), "channel": (shape[0], 1, 1), "pixel": shape}
        size = sizes[config.score.reference]
        statistics = Statistics(torch.zeros(size, device="cpu"), torch.ones(size, device="cpu"))
    mixing, inputs = config.score.mixing, config.score.inputs
    logits = None if mixing is None else torch.full((shape[0], 1, 1), mixing, device="cpu")
    score = MixedScore(network, sde, *statistics, inputs=inputs, mixing_logits=logits)
    return DiffusionModel(score, vae)


def model_notes(config: RunConfig, space: ImageSpace, images_seen: int) -> dict[str, str]:
    """Notes that weights have in a file."""
    shape, *others = dataclasses.astuple(space)
    notes = {"shape": json.dumps(shape), "space": json.dumps(others)}
    notes |= {"images_seen": str(images_seen), "config": config.model_digest()}
    return notes | {"training": config.training_digest()}


def weights_of(path: Path | str) -> tuple[Path, Path]:
    """Run folder and file of weights: of a run, a snapshot, or the raw ones in a state."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return path, path / MODEL
    return path.parents[path.parent.name == SNAPSHOTS], path


def copy_weights(model: DiffusionModel, source: Path) -> None:
    """Copy weights of another run, or of a diffusers `UNet2DModel`; the statistics stay."""
    own = ("data_mean", "data_variance")
    require(source.is_dir(), "training.init_from", f"there is no folder {source}")
    try:
        if (source / MODEL).is_file():
            weights, _ = load_tensors(source / MODEL, KIND)
            kept = {name: x for name, x in model.state_dict().items() if name.endswith(own)}
            model.load_state_dict({**weights, **kept})
        else:
            copy_network(model, source / "unet" if (source / "unet").is_dir() else source)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        msg = f"weights of {source} cannot be used ({one_line(error)[:300]})"
        raise SettingError("training.init_from", msg) from error


def copy_network(model: DiffusionModel, source: Path) -> None:
    """Copy the weights of a diffusers `UNet2DModel` to the network of a model."""
    options = {"local_files_only": True, "use_safetensors": True}
    unet = UNet2DModel.from_pretrained(source, low_cpu_mem_usage=False, **options)
    model.score.network.get_submodule("network").load_state_dict(unet.state_dict())


def load_model(
    run: Path | str, device: torch.device | str = "cpu", *, trust: bool = False
) -> TrainedModel:
    """Load the model of a run, or of a file in it; see `weights_of`."""
    run, file = weights_of(run)
    if not (run / CONFIG).is_file():
        raise ValueError(f"there is no run of cldsde train in {run}: no {run / CONFIG}")
    if not file.is_file() and wanted_width(file) is None:
        name = file.relative_to(run)
        there = sorted(x.name for x in run.glob("*.safetensors"))
        msg = f"{run} has no {name}; it has {listed(there)}"
        if (run / "models").is_dir():
            msg = f"{run} is of a comparison; see {run / 'models'}"
        raise ValueError(msg)
    try:
        config = RunConfig.from_dict(json.loads((run / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, OSError, RecursionError) as error:
        msg = f"{run / CONFIG} is no configuration of an image model ({error})"
        raise ValueError(msg) from error
    msg = f"the network of {run}, {config.network.name}, is code outside of cldsde; set `trust` "
    require(trust or ":" not in config.network.name, "trust", f"{msg}if you trust the code")
    return read_model(file, config, device)


def read_model(file: Path, config: RunConfig, device: torch.device | str = "cpu") -> TrainedModel:
    """Load a model file that was written for a configuration; runs no code of the file.

    A file ``power-0.075.safetensors`` of a run need not be there; see `power_averages.combined`.
    A training state has the raw weights, without average, of its last step.
    """
    raw, width = file.name == STATE, wanted_width(file)
    if width is None:
        tensors, metadata = load_tensors(file, STATE_KIND if raw else KIND)
    else:
        tensors, metadata = combined(file, width, KIND, config)
    if raw:
        start = "model."
        tensors = {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}
    try:
        if metadata["config"] != config.model_digest():
            msg = "it was written for another process, other networks or data than those configured"
            raise ValueError(msg)
        own = config.training_digest()
        if metadata.get("training", own) != own:
            raise ValueError("it belongs to another run, with another seed or other training")
        shape, others = (json.loads(metadata[name]) for name in ("shape", "space"))
        space = ImageSpace.from_json([shape, *others])
        model = make_model(config, space)
        model.load_state_dict(tensors)
        seen = int(metadata["images_seen"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be used: {one_line(error)}") from error
    return as_trained(model, config, space, metadata["sha256"], seen, device)


def as_trained(
    model: DiffusionModel,
    config: RunConfig,
    space: ImageSpace,
    digest: str,
    images_seen: int,
    device: torch.device | str,
) -> TrainedModel:
    """A model on a device, ready to sample, with what a run says about it."""
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    how: dict[str, Any] = {"sampling": config.sampling, "t_min": config.training.t_min}
    how |= {"model": model, "config": config, "space": space, "images_seen": images_seen}
    return TrainedModel(score=model.score, vae=model.vae, digest=digest, **how)
