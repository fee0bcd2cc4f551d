"""Runs made of published checkpoints, to sample and evaluate as runs of ``cldsde train`` are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cldsde.images.config import RunConfig
from cldsde.images.errors import setting
from cldsde.images.model import MODEL, DiffusionModel, ImageSpace, make_model, save_model
from cldsde.images.runs import RunFolder, check_folder
from cldsde.images.schema import with_overrides
from cldsde.pretrained.checkpoints import load_weights, read_checkpoint
from cldsde.pretrained.published import check_levels, recognise
from cldsde.pretrained.published_models import Family, PublishedModel

__all__ = ["ImportedModel", "read_published"]


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A published model as a run has it.

    Attributes
    ----------
    model
        Score with averaged weights.
    config
        Configuration of the run.
    space
        The images.
    images_seen
        Length of the training.
    """

    model: DiffusionModel
    config: RunConfig
    space: ImageSpace
    images_seen: int

    def check(self, out: Path) -> None:
        """Raise a SettingError if a folder cannot become the run."""
        check_folder(out, self.config.to_dict())

    def write(self, out: Path) -> Path:
        """Write the run folder; return the file of the weights."""
        folder = RunFolder(out, self.config.to_dict(), free=self.config.FREE)
        weights = self.model.state_dict()
        save_model(folder / MODEL, weights, self.config, self.space, self.images_seen)
        return folder / MODEL


def read_published(
    path: Path,
    family: Family,
    name: str | None = None,
    overrides: Sequence[str] = (),
    *,
    shape: tuple[int, int, int] | None = None,
) -> ImportedModel:
    """Read a checkpoint of CLD-SGM or score_sde_pytorch; code in it is not run.

    Parameters
    ----------
    path
        The checkpoint.
    family
        The code that wrote it.
    name
        Name of its published settings; None recognises them by the weights.
    overrides
        ``section.key=value`` of the run's configuration that differ from the published settings.
    shape
        Channels, rows and columns of the images, if they differ.

    Raises
    ------
    SettingError, ValueError, OSError
        If the checkpoint cannot be read, is of another network, or a setting does not fit.
    """
    checkpoint = read_checkpoint(path)
    published = recognise(checkpoint, path, family, name)
    images = max(1, checkpoint.step * published.batch)
    config = RunConfig.from_dict(with_overrides(_settings(published, images), overrides))
    space = ImageSpace(shape or published.shape)
    with setting("network.options"):
        model = make_model(config, space)
    load_weights(model.score.network.network, checkpoint, path)  # type: ignore[arg-type]
    check_levels(published, checkpoint, path)
    return ImportedModel(model, config, space, images)


def _settings(model: PublishedModel, images: int) -> dict[str, Any]:
    """Configuration of a run with published settings, in plain types."""
    how = dataclasses.asdict(model.parameterisation)
    del how["log_clock"]  # the network says so
    folder = {"path": f"data/{model.data}", "size": model.shape[1]}
    data = {"name": "folder", "options": folder}
    if model.data == "CIFAR10":
        data = {"name": "torchvision", "options": {"name": "CIFAR10", "path": "data"}}
    return {
        "data": {**data, "flip": True},
        "process": {"name": model.process, "options": dict(model.options)},
        "network": {"name": "NCSNpp", "options": dict(model.network)},
        "score": how,
        "training": {
            "images": images,
            "batch": model.batch,
            "t_min": model.t_min,
            "times": "uniform",
        },
    }
