"""Configurations of image models: typed, checked, from TOML, YAML or JSON files and overrides."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, Field, Strict
from torch import nn

from cldsde import linear
from cldsde.errors import require, setting
from cldsde.images.data import DATA_SETS, DataSet
from cldsde.images.networks import NETWORKS
from cldsde.images.schema import (
    KAPPA,
    Configuration,
    Count,
    Flag,
    Natural,
    Number,
    Share,
    check_keys,
    check_name,
    checked_options,
    read_file,
    section,
    with_overrides,
)
from cldsde.images.training_config import LatentConfig, Time, TrainingConfig
from cldsde.linear import LinearSDE, Schedule
from cldsde.pretrained.published_score import Code, Parameterisation
from cldsde.solvers.named import canonical_name

StartTime = Annotated[Number, Field(gt=0, le=1)] | None
Grid = Annotated[Literal["uniform", "quadratic", "root", "kappa", "logistic", "karras"], KAPPA]


def _rate(value: object) -> object:
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    finite = all(type(x) in {int, float} and abs(x) < math.inf for x in numbers)  # type: ignore[arg-type]
    if not finite and value != "cosine":
        raise ValueError("should be a finite number, a pair of them for a rate, or 'cosine'")
    return tuple(numbers) if len(numbers) == 2 else value


PROCESSES = ("CLD", "PSLD", "HOLD", "VPSDE", "SubVPSDE", "VESDE", "RectifiedFlow", "CosineVP")


@section
class DataConfig:
    """The data set and its augmentation."""

    name: str = "digits"
    """``"digits"``, ``"fashion_mnist"``, ``"torchvision"``, ``"folder"`` or ``"array"``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the data set's function in `cldsde.images.data`: ``digits``, ``fashion_mnist``,
    ``torchvision_set``, ``image_folder`` or ``array_file``."""
    flip: Flag = False
    """Mirror each image, left to right, with probability one half."""
    crop: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    """Smallest share of height and width of a random part of each image, which is resized to the
    size of the image; 1 takes whole images."""
    dequantise: Flag = False
    """Spread each grey level uniformly over its bin, as likelihoods need."""

    def __post_init__(self) -> None:
        check_name(self.name, DATA_SETS, "name")
        options = checked_options(DATA_SETS[self.name], self.options)
        # A run is evaluated and resumed in other folders, too.
        for key in ("path", "cache"):
            require(options.get(key) != "", f"options.{key}", "must not be empty")
            if options.get(key) not in {None, "auto"}:
                options[key] = os.path.abspath(Path(options[key]).expanduser())
        object.__setattr__(self, "options", options)

    def load(self) -> DataSet:
        """Read the images; raise a SettingError if they are missing or an option does not fit."""
        with setting("data.options"):
            return DATA_SETS[self.name](**self.options)


@section
class ProcessConfig:
    """The forward process."""

    name: str = "CLD"
    """A class of `cldsde.linear`: ``"CLD"``, ``"PSLD"``, ``"HOLD"``, ``"VPSDE"``, ``"SubVPSDE"``,
    ``"VESDE"``, ``"RectifiedFlow"`` or ``"CosineVP"``."""
    options: Mapping[str, Annotated[Any, AfterValidator(_rate)]] = field(default_factory=dict)
    """Arguments of the class: numbers; a pair for a rate β that is linear in time; ``"cosine"`` for
    ``schedule`` of VP and sub-VP, or ``beta`` of CLD, PSLD and HOLD."""

    def __post_init__(self) -> None:
        check_name(self.name, PROCESSES, "name")
        self.make()

    def make(self) -> LinearSDE:
        """The process."""
        kind = getattr(linear, self.name)
        check_keys(self.options, inspect.signature(kind).parameters, "options")
        cosine = {key: Schedule.cosine() for key, x in self.options.items() if x == "cosine"}
        with setting("options"):
            return kind(**{**self.options, **cosine})  # type: ignore[no-any-return]


@section
class NetworkConfig:
    """The score network."""

    name: str = "UNet"
    """A class of `cldsde.images.networks`, such as ``"UNet"`` or ``"NCSNpp"``; or ``module:Class``
    of a network of one's own, see the page "Train an image model"."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"channels": (32, 64)})
    """Arguments of the class; of ``"NCSNpp"`` see ``cldsde.pretrained.ncsnpp.NCSNpp``."""
    conditional: Flag = False
    """Whether the network sees the images' classes."""
    label_dropout: Share = 0.1
    """Share of the images whose class is hidden from the network, for sampling without class and
    for guidance."""

    def __post_init__(self) -> None:
        if ":" not in self.name:  # code of one's own is imported when the network is made
            check_name(self.name, NETWORKS, "name")
            object.__setattr__(self, "options", self.checked_options(NETWORKS[self.name]))

    def checked_options(self, kind: type[nn.Module]) -> dict[str, Any]:
        """The options, checked against a network class."""
        return checked_options(kind, self.options, ("shape", "inputs", "outputs", "classes"))


@section
class ScoreConfig:
    """Parts of the score."""

    reference: Literal["scalar", "channel", "pixel"] = "scalar"
    """Gaussian whose score is added to the network's in closed form, see `cldsde.MixedScore`: with
    one mean and variance for the whole set (``"scalar"``), per channel or per pixel. For a latent
    model it is standard normal."""
    inputs: Literal["state", "estimate"] = "state"
    """Input of the network: all components (``"state"``), or the linear combination of them that
    carries all information about the data (``"estimate"``)."""
    prediction: Literal["noise", "velocity", "flow"] = "noise"
    """The prediction whose squared error is the loss: ``"noise"``, or for processes of one
    component ``"velocity"`` or ``"flow"``. With the process ``"RectifiedFlow"``, ``"flow"`` is flow
    matching. The network returns the same quantity for all three. The key has no effect if
    ``training.weighting`` is ``"kappa"`` (the loss is of the output) or ``"likelihood"``."""
    mixing: Number | None = None
    """None: the network's part is added to the reference's. A number m: each channel learns the
    weights of the two parts. The weight of the network's part starts at 1/(1 + e^−m)."""
    code: Literal["cldsde"] | Code = "cldsde"
    """Code whose parameterisation the score has: ``"cldsde"``, or a published code, ``"cld-sgm"``,
    ``"score-sde-vp"`` or ``"score-sde-ve"``; see
    ``cldsde.pretrained.published_score.Parameterisation``."""
    mixed: Flag = False
    numerical_eps: Annotated[Number, Field(ge=0)] = 0.0
    levels: Count | None = None
    """Options of the published parameterisations."""

    def published(self, *, log_clock: bool) -> Parameterisation | None:
        """The published parameterisation; ``log_clock``: the network has Fourier features."""
        if self.code == "cldsde":
            return None
        how = {name: getattr(self, name) for name in ("mixed", "numerical_eps", "levels")}
        with setting("code"):
            return Parameterisation(code=self.code, log_clock=log_clock, **how)

    def __post_init__(self) -> None:
        own = (self.reference, self.inputs, self.prediction, self.mixing)
        theirs = (self.mixed, self.numerical_eps, self.levels)
        msg = "must be a published code for mixed, numerical_eps or levels; got 'cldsde'"
        require(self.code != "cldsde" or theirs == (False, 0.0, None), "code", msg)
        msg = f"must be 'cldsde' for reference, inputs, prediction or mixing; got {self.code!r}"
        require(self.code == "cldsde" or own == ("scalar", "state", "noise", None), "code", msg)
        self.published(log_clock=False)
        for name, needed in (("inputs", "state"), ("prediction", "noise")):
            msg = f"must be None if {name} is {getattr(self, name)!r}; got {self.mixing}"
            require(self.mixing is None or getattr(self, name) == needed, "mixing", msg)


RECOMMENDED = "recommended"
"""Solver of a recipe that chooses as `cldsde.sample` does."""


@section
class SamplingConfig:
    """Sampling of grids during training, and defaults of ``cldsde sample``."""

    solver: Annotated[str, AfterValidator(canonical_name)] = RECOMMENDED
    """Name of a solver; a short one, such as ``em``, becomes the full one. ``"recommended"`` takes
    solver, grid and end of `cldsde.sample` for ``nfe`` evaluations."""
    nfe: Annotated[int, Strict(), Field(ge=2, le=1_000_000)] = 50
    """Most score evaluations per image, with the last denoising; adaptive solvers ignore it."""
    grid: Grid | None = None
    """Grid of times: ``"uniform"``, ``"quadratic"``, ``"root"``, ``"kappa"``, ``"logistic"`` or
    ``"karras"``. None: the recommended solver's grid, and ``"root"`` for other solvers."""
    t_start: StartTime = None
    t_end: Time | None = None
    """Times at which sampling starts and ends (ε). None: as `cldsde.sample` chooses them, with D
    the number of values of an image or of its latent variables. Solvers other than the recommended
    one start at κ = −3.3 (κ: half the log of the signal-to-noise ratio), or at a smaller κ if D
    times the evaluations exceeds 29,000, and end at 3.3. Both ends are within the
    noise levels of the process. With ``--process`` they are also within the noise levels of the
    training. Without ``--process`` sampling may end below ``training.t_min``."""
    denoise: Flag = True
    """Return the data prediction at ε instead of the state there."""
    options: Mapping[str, Annotated[Any, KAPPA]] = field(default_factory=dict)
    """Fields of the solver that differ from its defaults, such as ``rtol``."""

    def __post_init__(self) -> None:
        if self.grid is None and self.solver != RECOMMENDED:
            object.__setattr__(self, "grid", "root")


_ADDED: dict[str, dict[str, Any]] = {
    "data": {"crop": 1.0},
    "score": {"code": "cldsde", "mixed": False, "numerical_eps": 0, "levels": None},
    "training": {
        "reduction": "mean",
        "optimiser": "AdamW",
        "optimiser_options": {},
        "ema_decays": [],
        "power_averages": False,
    },
}  # settings that version 0.2 did not have, and the values that it had in effect


_OLD_NAMES = {"log_snr_mean": "kappa_mean", "log_snr_std": "kappa_std"}
"""Keys of the training in older files, which digests keep."""

_PLACE = ("path", "workers", "download", "cache", "cache_gib")
"""Options of the data that do not change the images."""


@section
class RunConfig(Configuration):
    """Everything that a trained model depends on."""

    seed: Natural = 0
    """Seed of weights, order of the images, times and noise."""
    data: DataConfig = field(default_factory=DataConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    training: TrainingConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The sections."""
    latent: LatentConfig | None = None
    """The autoencoder of a latent model; None for a model of pixels."""

    FREE: ClassVar[tuple[str, ...]] = (
        "sampling",
        *(f"data.options.{key}" for key in _PLACE),
        *(f"training.{key}" for key in ("images", "micro_batch", "precision", "compile")),
        *(f"training.{key}" for key in ("log_every", "save_every", "sample_every", "held_out")),
        *(f"training.{key}" for key in ("sample_grid", "snapshots", "snapshots_by", "measure")),
        *(f"training.{key}" for key in ("measure_samples", "trackers", "keep_state", "init_from")),
    )
    """Settings that do not change the model: a run may be resumed with others."""

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Check and build a configuration from plain types, with names of older files."""
        training = values.get("training") if isinstance(values, Mapping) else None
        if isinstance(training, Mapping):
            training = {_OLD_NAMES.get(key, key): x for key, x in training.items()}
            values = {**cast(Any, values), "training": training}
        return super().from_dict(values)

    def __post_init__(self) -> None:
        process, score, training, latent = self.process, self.score, self.training, self.latent
        sde, kind = process.make(), score.prediction
        if score.code != "cldsde":
            given = f"if score.code is {score.code!r}"
            require(latent is None, "latent", f"must be absent {given}")
            msg = f"must be 'uniform', and training.weighting not 'kappa', {given}"
            uniform = training.times != "importance" and training.weighting != "kappa"
            require(uniform, "training.times", msg)
            msg = f"must be a process with one driven component {given}; got {process.name}"
            require(len(sde.driven) == 1, "process.name", msg)
        if kind != "noise":
            msg = f"must be 'noise' for {process.name}, which has {sde.components} components; got "
            require(sde.components == 1, "score.prediction", f"{msg}{kind!r}")
            how = training.conditioning
            msg = f"must be 'data' if score.prediction is {kind!r}; got {how!r}"
            require(how == "data", "training.conditioning", msg)
        if latent is not None:
            msg = "must be false: a latent model has a distribution of grey levels"
            require(not self.data.dequantise, "data.dequantise", msg)
            msg = f"must be 'scalar' for a latent model; got {score.reference!r}"
            require(score.reference == "scalar", "score.reference", msg)
            msg = f"must leave some of the {training.images} images to the second stage; got "
            left = self.pretraining_steps < training.steps
            require(left, "latent.pretraining", f"{msg}{latent.pretraining}")

    @property
    def pretraining_steps(self) -> int:
        """Optimiser steps of the first stage of a latent model; 0 for other models."""
        return 0 if self.latent is None else -(-self.latent.pretraining // self.training.batch)

    def training_digest(self) -> str:
        """Digest of all settings that the weights depend on: those that are not `FREE`."""
        return _sha256(self._digested(self.FREE))

    def model_digest(self) -> str:
        """Digest of process, networks, reference, data (not their place) and smallest time."""
        values = self._digested([f"data.options.{key}" for key in _PLACE])
        names = ("process", "network", "score", "latent", "data")
        return _sha256({name: values[name] for name in names} | {"t_min": self.training.t_min})

    def _digested(self, without: Iterable[str]) -> dict[str, Any]:
        """Plain types without some keys, and without unused settings that older runs lack."""
        values = self.to_dict()
        for name, added in _ADDED.items():
            unused = [key for key, default in added.items() if values[name][key] == default]
            values[name] = {key: x for key, x in values[name].items() if key not in unused}
        training = values["training"]
        training |= {old: training.pop(new) for old, new in _OLD_NAMES.items()}
        if training["weighting"] == "kappa":
            training["weighting"] = "log_snr"
        for path in without:
            *outer, last = path.split(".")
            functools.reduce(getitem, outer, values).pop(last, None)
        return values


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a file in TOML, YAML or JSON, with overrides ``section.key=value``.

    The value of an override is in TOML or a bare word. Raises a SettingError if the file cannot be
    read, a key is unknown or missing, or a value out of range.
    """
    return RunConfig.from_dict(with_overrides(read_file(path), overrides))
