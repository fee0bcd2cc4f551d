"""Configurations of image models: typed, checked, from TOML, YAML or JSON files and overrides."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from cldsde import linear
from cldsde.images.config_files import (
    as_toml,
    check_keys,
    check_name,
    checked_options,
    from_dict,
    read_file,
    with_overrides,
)
from cldsde.images.data import DATA_SETS, DataSet
from cldsde.images.networks import NETWORKS
from cldsde.linear import LinearSDE, Schedule
from cldsde.linear.checks import check_at_least, check_between, check_positive
from cldsde.solvers import canonical_name

__all__ = [
    "DataConfig",
    "LatentConfig",
    "NetworkConfig",
    "ProcessConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "TrainingConfig",
    "load_config",
]

PROCESSES = ("CLD", "PSLD", "HOLD", "VPSDE", "SubVPSDE", "VESDE", "RectifiedFlow", "CosineVP")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to train on, and how they are presented.

    Attributes
    ----------
    name
        ``"digits"``, ``"fashion_mnist"``, ``"torchvision"``, ``"folder"`` or ``"array"``.
    options
        Arguments of the function of that name in `cldsde.images.data`.
    flip
        Mirror each image, left to right, with probability one half.
    dequantise
        Spread each grey level uniformly over its bin; what likelihoods are bounds of.
    """

    name: str = "digits"
    options: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = False
    dequantise: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown data sets and options."""
        check_name(self.name, DATA_SETS, "name")
        object.__setattr__(self, "options", checked_options(DATA_SETS[self.name], self.options))

    def load(self) -> DataSet:
        """The images."""
        try:
            return DATA_SETS[self.name](**self.options)
        except (ValueError, TypeError, OSError) as error:
            named = str(error).split()[0] in self.options
            msg = f"data.options.{error}" if named else f"data.options: {error}"
            raise ValueError(msg) from error


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """The forward process.

    Attributes
    ----------
    name
        A class of `cldsde.linear`: ``"CLD"``, ``"PSLD"``, ``"HOLD"``, ``"VPSDE"``, ``"SubVPSDE"``,
        ``"VESDE"``, ``"RectifiedFlow"`` or ``"CosineVP"``.
    options
        Its arguments: numbers; for a rate β that is linear in time a pair; ``"cosine"`` for the
        argument ``schedule``.
    """

    name: str = "CLD"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse unknown processes and options."""
        check_name(self.name, PROCESSES, "name")
        self.make()

    def make(self) -> LinearSDE:
        """The process."""
        kind = getattr(linear, self.name)
        check_keys(self.options, inspect.signature(kind).parameters, "options.")
        arguments = {key: _rate_or_number(key, value) for key, value in self.options.items()}
        try:
            process: LinearSDE = kind(**arguments)
        except (TypeError, ValueError, OverflowError) as error:
            named = str(error).split(" ")[0] in arguments
            keys = ", ".join(f"options.{key}" for key in arguments)
            msg = f"options.{error}" if named else f"{keys}: {error}"
            raise ValueError(msg) from error
        return process


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The score network.

    Attributes
    ----------
    name
        ``"UNet"`` or ``"NCSNpp"``.
    options
        Arguments of the class of that name in `cldsde.images.networks`.
    conditional
        Whether the network sees the images' classes.
    label_dropout
        Share of the images whose class is hidden from it, which images of no class and guidance
        need.
    """

    name: str = "UNet"
    options: Mapping[str, Any] = field(default_factory=lambda: {"channels": (32, 64)})
    conditional: bool = False
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse unknown networks and options."""
        check_name(self.name, NETWORKS, "name")
        given = ("shape", "inputs", "outputs", "classes")
        checked = checked_options(NETWORKS[self.name], self.options, given=given)
        object.__setattr__(self, "options", checked)
        if not 0 <= self.label_dropout < 1:
            msg = f"label_dropout must lie in [0, 1); got {self.label_dropout}"
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How the score is put together.

    Attributes
    ----------
    reference
        Gaussian whose score is given in closed form beside the network's part, see
        `cldsde.MixedScore`: with one mean and variance for the whole set (``"scalar"``), for each
        channel or for each pixel. That of a latent model is standard normal.
    inputs
        What the network is shown: all components (``"state"``), or the one combination of them that
        tells all they tell of the data (``"estimate"``).
    prediction
        The prediction whose squared error is the loss: ``"noise"``, or for processes of one
        component ``"velocity"`` or ``"flow"``. With the process ``"RectifiedFlow"``, ``"flow"`` is
        flow matching. The network returns the same quantity for all three.
    mixing
        None: the network's part is added to the reference's. A number: each channel weighs the
        two, with a learnt weight 1/(1 + e^−m) of the network's part where m starts at this number.
    """

    reference: Literal["scalar", "channel", "pixel"] = "scalar"
    inputs: Literal["state", "estimate"] = "state"
    prediction: Literal["noise", "velocity", "flow"] = "noise"
    mixing: float | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.mixing is not None and self.inputs != "state":
            msg = f"mixing must be None where inputs is {self.inputs!r}; got {self.mixing}"
            raise ValueError(msg)
        if self.mixing is not None and self.prediction != "noise":
            msg = f"mixing must be None if prediction is {self.prediction!r}; got {self.mixing}"
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The autoencoder of a model whose process lives in a latent space (LSGM).

    Attributes
    ----------
    latent_channels, channels, blocks, groups, likelihood
        Of the autoencoder, see `cldsde.images.latent.VAE`. With the likelihood ``"bernoulli"``
        images of more than two grey levels can be trained on, but have no bits a dimension.
    pretraining
        Images of the first stage, in which the prior is standard normal. In the second, which
        takes what is left of ``training.images``, autoencoder and prior are trained together.
    annealing
        Images over which the weight of the divergence from the prior rises from 0 to 1 at first.
    learning_rate, joint_learning_rate
        Peak of Adam's for the autoencoder in the first and in the second stage; warm-up and decay
        are those of ``training`` in each.
    """

    latent_channels: int = 4
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 1
    groups: int = 8
    likelihood: Literal["logistic", "bernoulli"] = "logistic"
    pretraining: int
    annealing: int = 0
    learning_rate: float = 1e-3
    joint_learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        check_at_least(self.pretraining, 1, "pretraining")
        check_at_least(self.annealing, 0, "annealing")
        check_positive(self.learning_rate, "learning_rate")
        check_positive(self.joint_learning_rate, "joint_learning_rate")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a score model is trained. Lengths are in images seen, whatever the number of processes.

    Attributes
    ----------
    images
        Images to train on, repetitions counted.
    batch
        Images of an optimiser step, over all processes.
    micro_batch
        Images that a process takes through the network at once, at most; None: its whole share.
    learning_rate
        Peak of Adam's.
    warmup
        Images over which the learning rate rises linearly.
    decay
        What follows: ``"cosine"`` to zero at the end, or ``"constant"``.
    weight_decay
        Of Adam, decoupled (AdamW).
    clip
        Largest norm of the gradient, of score and autoencoder each; None does not limit it.
    ema_decay
        Decay a step of the exponential moving average of the weights, which is what is sampled; at
        first that of (n + 1)/(n + 10) after n steps, if it is smaller.
    conditioning
        ``"data"``: hybrid score matching; ``"all"``: denoising score matching.
    weighting
        ``"reweighted"`` for quality; ``"likelihood"``; or ``"log_snr"``: noise levels count as if
        drawn with half the log of the signal-to-noise ratio normal, of `log_snr_mean` and
        `log_snr_std`, the same for every process.
    log_snr_mean, log_snr_std
        Of ``weighting = "log_snr"``; see `cldsde.score.log_snr_density`.
    times
        ``"importance"``: drawn in proportion to the loss of the untrained model, with the weights
        that undo it; ``"uniform"``; or, with weights that do not undo it, ``"logit_normal"`` or
        ``"mode"``: times count as often as they are drawn (Esser et al. 2024).
    logit_mean, logit_std
        Of ``times = "logit_normal"``; see `cldsde.score.logit_normal_density`.
    mode_scale
        Of ``times = "mode"``; see `cldsde.score.mode_density`.
    t_min
        Smallest time; the loss is the mean over [t_min, 1].
    precision
        Of the network alone: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    compile
        Compile the network with ``torch.compile``.
    held_out
        Images of the held-out set whose loss is logged, at most.
    log_every, save_every, sample_every
        Images between lines of metrics, states saved to resume from, and grids of samples.
    sample_grid
        Images of a grid.
    """

    images: int
    batch: int = 128
    micro_batch: int | None = None
    learning_rate: float = 2e-4
    warmup: int = 0
    decay: Literal["cosine", "constant"] = "constant"
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema_decay: float = 0.9999
    conditioning: Literal["data", "all"] = "data"
    weighting: Literal["reweighted", "likelihood", "log_snr"] = "reweighted"
    log_snr_mean: float = 1.2
    log_snr_std: float = 1.2
    times: Literal["importance", "uniform", "logit_normal", "mode"] = "importance"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    t_min: float = 1e-3
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    held_out: int = 1000
    log_every: int = 10_000
    save_every: int = 100_000
    sample_every: int = 100_000
    sample_grid: int = 64

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        counts = ("images", "batch", "held_out", "sample_grid")
        for name in (*counts, "log_every", "save_every", "sample_every"):
            check_at_least(getattr(self, name), 1, name)
        if self.micro_batch is not None:
            check_at_least(self.micro_batch, 1, "micro_batch")
        check_positive(self.learning_rate, "learning_rate")
        check_at_least(self.warmup, 0, "warmup")
        check_at_least(self.weight_decay, 0, "weight_decay")
        if self.clip is not None:
            check_positive(self.clip, "clip")
        if not 0 <= self.ema_decay < 1:
            msg = f"ema_decay must lie in [0, 1); got {self.ema_decay}"
            raise ValueError(msg)
        check_between(self.t_min, 1e-8, 0.5, "t_min")
        check_between(self.log_snr_mean, -20, 20, "log_snr_mean")
        check_between(self.log_snr_std, 0.01, 20, "log_snr_std")
        check_between(self.logit_mean, -20, 20, "logit_mean")
        check_between(self.logit_std, 0.01, 20, "logit_std")
        check_between(self.mode_scale, -0.99, 1.75, "mode_scale")
        if self.times in ("logit_normal", "mode") and self.weighting != "reweighted":
            msg = (
                f"weighting must be 'reweighted' if times is {self.times!r}, which is a weighting "
                f"itself; got {self.weighting!r}"
            )
            raise ValueError(msg)
        if self.weighting == "log_snr" and self.conditioning != "data":
            msg = (
                "conditioning must be 'data' where weighting is 'log_snr'; "
                f"got {self.conditioning!r}"
            )
            raise ValueError(msg)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return -(-self.images // self.batch)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How grids of samples are drawn in training, and what ``cldsde sample`` does by default.

    Attributes
    ----------
    solver
        Name of a solver; a short one, such as ``em``, becomes the full one.
    nfe
        Score evaluations an image, the last denoising included.
    grid
        Where the times of the steps lie: ``"uniform"``, ``"quadratic"``, ``"root"``, ``"log_snr"``
        or ``"logistic"``.
    t_end
        ε, where sampling ends.
    denoise
        Whether the data prediction at ε is the image, rather than the state there.
    options
        Fields of the solver that are to differ, such as ``rtol``.
    """

    solver: str = "multistep-2-sde"
    nfe: int = 50
    grid: Literal["uniform", "quadratic", "root", "log_snr", "logistic"] = "root"
    t_end: float = 1e-3
    denoise: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot sample."""
        object.__setattr__(self, "solver", canonical_name(self.solver))
        check_at_least(self.nfe, 2, "nfe")
        if self.nfe > 1_000_000:
            msg = f"nfe must be at most 1,000,000; got {self.nfe}"
            raise ValueError(msg)
        check_between(self.t_end, 1e-8, 0.5, "t_end")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a trained model depends on.

    Attributes
    ----------
    seed
        Of weights, order of the images, times and noise.
    data, process, network, score, training, sampling
        The sections.
    latent
        The autoencoder in whose latent space the process lives; None: there is none, and it lives
        among the pixels.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    training: TrainingConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    latent: LatentConfig | None = None

    FREE: ClassVar[tuple[str, ...]] = (
        "sampling",
        "training.log_every",
        "training.save_every",
        "training.sample_every",
    )
    """Settings that no weight depends on: a run may be gone on with others."""

    def __post_init__(self) -> None:
        """Refuse a seed that generators do not take, and what a latent space does not go with."""
        if not 0 <= self.seed < 2**63:
            msg = f"seed must lie between 0 and 2^63 - 1; got {self.seed}"
            raise ValueError(msg)
        if self.score.prediction != "noise":
            self._check_prediction()
        if self.latent is None:
            return
        if self.data.dequantise:
            msg = "data.dequantise must be false: a latent model has a law of grey levels"
            raise ValueError(msg)
        if self.score.reference != "scalar":
            msg = (
                "score.reference must be 'scalar': that of a latent model is standard normal; got "
                f"{self.score.reference!r}"
            )
            raise ValueError(msg)
        if self.pretraining_steps >= self.training.steps:
            msg = (
                f"latent.pretraining must leave some of training.images, {self.training.images}, "
                f"to the second stage; got {self.latent.pretraining}"
            )
            raise ValueError(msg)

    def _check_prediction(self) -> None:
        """Refuse a velocity or flow that the process or the training does not have."""
        components = self.process.make().components
        if components != 1:
            msg = (
                "score.prediction must be 'noise' for a process of several components; got "
                f"{self.score.prediction!r} for {self.process.name}, which has {components}"
            )
            raise ValueError(msg)
        if self.training.conditioning != "data":
            msg = (
                "training.conditioning must be 'data' if score.prediction is "
                f"{self.score.prediction!r}; got {self.training.conditioning!r}"
            )
            raise ValueError(msg)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check and build a configuration from plain types.

        Raises
        ------
        ValueError
            If a key is unknown, missing or of the wrong type, or a value out of range; the message
            names the key.
        """
        config: RunConfig = from_dict(cls, values, "")
        return config

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, defaults included."""
        plain: dict[str, Any] = json.loads(json.dumps(_plain(dataclasses.asdict(self))))
        return plain

    def to_toml(self) -> str:
        """As a TOML file that `load_config` reads; see `as_toml` for what is None."""
        return as_toml(self)

    @property
    def pretraining_steps(self) -> int:
        """Optimiser steps of the first stage of a latent model; 0 of any other."""
        return 0 if self.latent is None else -(-self.latent.pretraining // self.training.batch)

    def training_digest(self) -> str:
        """Digest of what the weights depend on: of everything that is not `FREE`."""
        values = self.to_dict()
        for path in self.FREE:
            *outer, last = path.split(".")
            section = values
            for key in outer:
                section = section[key]
            del section[last]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def model_digest(self) -> str:
        """Digest of what the weights mean: process, networks, reference, data and smallest time.

        Where files of the data lie is no part of it.
        """
        values = self.to_dict()
        parts = {name: values[name] for name in ("process", "network", "score", "latent", "data")}
        parts["data"]["options"].pop("path", None)
        parts["t_min"] = self.training.t_min
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a file, with overrides.

    Parameters
    ----------
    path
        File in TOML, YAML or JSON, by its suffix.
    overrides
        ``section.key=value``, the value as TOML writes it, or else a bare word.

    Raises
    ------
    ValueError
        If the file cannot be read, or for the reasons of `RunConfig.from_dict`.
    """
    values = with_overrides(read_file(path), overrides)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _rate_or_number(name: str, value: object) -> Any:
    if name == "schedule":
        if value != "cosine":
            msg = f"options.schedule must be 'cosine'; got {value!r}"
            raise ValueError(msg)
        return Schedule.cosine()
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if any(
        isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < math.inf
        for x in numbers
    ):
        msg = f"options.{name} must be a finite number, or a pair for a rate; got {value!r}"
        raise ValueError(msg)
    return tuple(numbers) if len(numbers) == 2 else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
