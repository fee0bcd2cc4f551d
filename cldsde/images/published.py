"""Runs made of published checkpoints, to sample and evaluate as runs of ``cldsde train`` are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cldsde.errors import require, setting
from cldsde.images.config import RunConfig
from cldsde.images.model import (
    KIND,
    MODEL,
    ImageSpace,
    TrainedModel,
    as_trained,
    make_model,
    model_notes,
)
from cldsde.images.runs import CONFIG, RunFolder, check_folder
from cldsde.images.schema import parse_overrides, with_overrides
from cldsde.images.tensor_files import save_tensors, tensors_digest
from cldsde.pretrained.published import load_weights, read_checkpoint, recognise
from cldsde.pretrained.published_models import Family, PublishedModel

_OPEN = ("data.name", "data.options", "sampling")
"""Settings that a checkpoint does not determine."""


def check_out(run: TrainedModel, out: Path, *, overwrite: bool = False) -> None:
    """Raise a SettingError if a folder holds a run that must not be overwritten, or other files."""
    config, file = run.config.to_dict(), out / CONFIG
    check_folder(out, config, free=[*config])
    begun = not file.is_file() or json.loads(file.read_text()) == config
    free = overwrite or (begun and not (out / MODEL).exists())  # else it was interrupted
    require(free, "out", f"{out} holds a run; choose another folder, or set `overwrite`")


def write_run(run: TrainedModel, out: Path) -> None:
    """Write the run folder, over any other run in it."""
    config = run.config.to_dict()
    folder = RunFolder(out, config, free=config)
    folder.write_json(CONFIG, config)
    notes = model_notes(run.config, run.space, run.images_seen)
    save_tensors(folder / MODEL, KIND, run.model.state_dict(), notes)


def read_published(
    path: Path, family: Family, name: str | None = None, overrides: Sequence[str] = ()
) -> TrainedModel:
    """Read a checkpoint of CLD-SGM or score_sde_pytorch; code in it is not run.

    ``name`` is the name of its published settings; None recognises them by the weights.
    ``overrides`` are ``section.key=value`` of data and sampling. Raises an error if it cannot be
    read, is of another network, or a setting does not fit.
    """
    for key in parse_overrides(overrides, "sampling.nfe=100"):
        free = f"{key}.".startswith(tuple(f"{name}." for name in _OPEN))
        require(free, key, f"is determined by the checkpoint; these can be set: {', '.join(_OPEN)}")
    checkpoint = read_checkpoint(path)
    published = recognise(checkpoint, path, family, name)
    images = max(1, checkpoint.step * published.batch)
    config = RunConfig.from_dict(with_overrides(_settings(published, images), overrides))
    space = ImageSpace(published.shape)
    with setting("network.options"):
        model = make_model(config, space)
    network: Any = model.score.network.network
    load_weights(network, checkpoint, path, published.sigmas)
    return as_trained(model, config, space, tensors_digest(model.state_dict()), images, "cpu")


def _settings(model: PublishedModel, images: int) -> dict[str, Any]:
    """Configuration of a run with published settings, in plain types."""
    how = dataclasses.asdict(model.parameterisation)
    del how["log_clock"]  # the network says so
    folder = {"path": f"data/{model.data}", "size": model.shape[1]}
    data = {"name": "folder", "options": folder}
    if model.data == "CIFAR10":
        data = {"name": "torchvision", "options": {"name": "CIFAR10", "path": "data"}}
    training = {"images": images, "batch": model.batch, "t_min": model.t_min, "times": "uniform"}
    return {
        "data": {**data, "flip": True},
        "process": {"name": model.process, "options": dict(model.options)},
        "network": {"name": "NCSNpp", "options": dict(model.network)},
        "score": how,
        "training": training,
    }
