"""Configurations of image models: typed, checked, from TOML, YAML or JSON files and overrides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from cldsde.errors import require
from cldsde.images.schema import Configuration, Natural, read_file, section, with_overrides
from cldsde.images.sections import (
    DataConfig,
    LatentConfig,
    NetworkConfig,
    ProcessConfig,
    SamplingConfig,
    ScoreConfig,
    TrainingConfig,
)

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


_PLACE = ("path", "workers", "download", "cache", "cache_gib")
"""Options of the data that do not change the images."""


@section
class RunConfig(Configuration):
    """Everything that a trained model depends on.

    Attributes
    ----------
    seed
        Seed of weights, order of the images, times and noise.
    data, process, network, score, training, sampling
        The sections.
    latent
        The autoencoder of a latent model; None for a model of pixels.
    """

    seed: Natural = 0
    data: DataConfig = field(default_factory=DataConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    training: TrainingConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    latent: LatentConfig | None = None

    FREE: ClassVar[tuple[str, ...]] = (
        "sampling",
        *(f"data.options.{key}" for key in _PLACE),
        *(f"training.{key}" for key in ("images", "micro_batch", "precision", "compile")),
        *(f"training.{key}" for key in ("log_every", "save_every", "sample_every", "held_out")),
        *(f"training.{key}" for key in ("sample_grid", "snapshots", "snapshots_by", "measure")),
        *(f"training.{key}" for key in ("measure_samples", "keep_state", "init_from")),
    )
    """Settings that do not change the model: a run may be resumed with others."""

    def __post_init__(self) -> None:
        """Reject settings that do not go together."""
        process, score, training, latent = self.process, self.score, self.training, self.latent
        sde, kind = process.make(), score.prediction
        if score.code != "cldsde":
            given = f"if score.code is {score.code!r}"
            require(latent is None, "latent", f"must be absent {given}")
            msg = f"must be 'uniform', and training.weighting not 'log_snr', {given}"
            uniform = training.times != "importance" and training.weighting != "log_snr"
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
        values = self._digested()
        for path in self.FREE:
            *outer, last = path.split(".")
            place = values
            for key in outer:
                place = place[key]
            place.pop(last, None)
        return _sha256(values)

    def model_digest(self) -> str:
        """Digest of process, networks, reference, data (not their place) and smallest time."""
        values = self._digested()
        names = ("process", "network", "score", "latent", "data")
        parts = {name: values[name] for name in names} | {"t_min": self.training.t_min}
        for key in _PLACE:
            parts["data"]["options"].pop(key, None)
        return _sha256(parts)

    def _digested(self) -> dict[str, Any]:
        """Plain types without settings that older runs did not have, unless they are in use."""
        values = self.to_dict()
        added = {"code": "cldsde", "mixed": False, "numerical_eps": 0, "levels": None}
        for name, value in added.items():
            if values["score"][name] == value:
                del values["score"][name]
        if self.data.crop == 1:
            del values["data"]["crop"]
        if self.training.reduction == "mean":
            del values["training"]["reduction"]
        return values


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a file, with overrides.

    Parameters
    ----------
    path
        File in TOML, YAML or JSON, by its suffix.
    overrides
        ``section.key=value``, the value in TOML or a bare word.

    Raises
    ------
    SettingError
        If the file cannot be read, a key is unknown or missing, or a value out of range.
    """
    return RunConfig.from_dict(with_overrides(read_file(path), overrides))
