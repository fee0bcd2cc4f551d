"""Facts about a training before it starts, and measurements of its first steps."""

from __future__ import annotations

import sys
import time

import torch

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.data.sets import TORCHVISION_SHAPES
from cldsde.images.model import ImageSpace, check_model
from cldsde.images.train.learner import Learner

# MiB of weight, average, gradient and Adam's two moments of a parameter, in single precision.
_MEMORY = 5 * 4 / 2**20


def outlook(config: RunConfig) -> list[str]:
    """Lines about the size of a training, of data that need not be there."""
    options = config.data.options
    try:
        if config.data.name == "torchvision":
            space = ImageSpace(TORCHVISION_SHAPES[options["name"]])
        elif config.data.name == "folder":
            space = ImageSpace((options.get("channels", 3), options["size"], options["size"]))
        else:
            space = ImageSpace.of(config.data.load().train, config)
    except (ValueError, OSError, ImportError) as error:
        return [f"parameters: unknown without the data ({error})"]
    count = check_model(config, space)
    unknown = config.network.conditional and space.classes is None
    more = " without the embedding of the classes" if unknown else ""
    kept = "weights, average, gradients and moments, and activations"
    return [
        f"parameters: {count:,}{more}, images of {'×'.join(map(str, space.shape))}",
        f"memory: {_MEMORY * count:,.0f} MiB for {kept}",
        "images per second, peak memory: cldsde train --dry-run measures them",
    ]


def summary(config: RunConfig, data: DataSet, device: str) -> list[str]:
    """Lines about data, model, length, device and memory of a training."""
    train, settings = data.train, config.training
    held = 0 if data.held_out is None else len(data.held_out)
    classes = "no classes" if train.classes is None else f"{train.classes} classes"
    of_data = f"{len(train):,} images of {'×'.join(map(str, train.shape))}, {train.levels} levels"
    count = check_model(config, ImageSpace.of(train, config))
    if device in {"auto", "cuda"} and torch.cuda.is_available():
        device = f"{device} ({torch.cuda.get_device_name()})"
    return [
        f"data: {of_data}, {classes}; {held:,} held out ({held / (len(train) + held):.0%})",
        *(f"skipped: {reason}" for reason in train.skipped),
        f"model: {config.process.name}, {config.network.name}, {count:,} parameters",
        f"training: {settings.images:,} images in {settings.steps:,} steps of {settings.batch}",
        f"device: {device}, {settings.precision}, {_MEMORY * count:,.0f} MiB and activations",
    ]


def measure_steps(learner: Learner) -> tuple[float, int]:
    """Make two training steps; return images per second of the second, and peak memory in bytes."""
    device, batches = learner.engine.device, [learner.feed.load(step) for step in range(2)]
    on_gpu = device.type == "cuda"
    for step, batch in enumerate(batches):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        learner.step(step, batch)
    if on_gpu:
        torch.cuda.synchronize(device)
    speed = learner.config.training.batch / (time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else _peak()
    return speed, memory


def _peak() -> int:
    """Peak memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
