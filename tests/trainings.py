"""Trainings of a second on images of noise, and what tests compare of them."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.model import DiffusionModel
from cldsde.images.runs import METRICS, RunFolder
from cldsde.images.train.loop import train
from tiny_runs import noise_images

DATA = DataSet(noise_images(classes=3), noise_images(16, 1, classes=3))


def configured(base: Mapping[str, Any], **sections: Any) -> RunConfig:
    """Settings with some keys of their sections changed."""
    changed = {
        name: {**base.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return RunConfig.from_dict({**base, **changed})


def trained(folder: Path, settings: RunConfig, data: DataSet = DATA) -> DiffusionModel:
    with closing(RunFolder(folder, settings.to_dict(), free=settings.FREE)) as run:
        return train(settings, data, run, device="cpu")


def interrupt(folder: Path, settings: RunConfig, seen: int) -> None:
    """Train until so many images were seen, and no further; the state may be older."""

    class InterruptedRun(RunFolder):
        def log(self, record: Mapping[str, Any]) -> None:
            super().log(record)
            if record["images"] == seen:
                raise KeyboardInterrupt

    with (
        closing(InterruptedRun(folder, settings.to_dict())) as run,
        pytest.raises(KeyboardInterrupt),
    ):
        train(settings, DATA, run, device="cpu")


def metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics without measured times."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: x for key, x in line.items() if key != "seconds"} for line in lines]


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
