"""Facts about a training before it starts, and measurements of its first steps."""

from __future__ import annotations

import time
from statistics import fmean

import torch

from cldsde.images.config import RunConfig
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.data.sets import TORCHVISION_SHAPES
from cldsde.images.model import ImageSpace, Statistics, check_model
from cldsde.images.sample.sampler import ahead
from cldsde.images.train.learner import learning

_REHEARSAL = 2.0  # seconds of steps, or of decoding, that are measured at least


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
    return [
        f"parameters: {count:,}{more}, images of {'×'.join(map(str, space.shape))}",
        f"memory: {_memory(config, count)} without activations",
    ]


def summary(config: RunConfig, data: DataSet, device: str) -> list[str]:
    """Lines about data, model, length, device and memory of a training."""
    train, settings = data.train, config.training
    held = 0 if data.held_out is None else len(data.held_out)
    classes = "no classes" if train.classes is None else f"{train.classes} classes"
    scale = f"{train.levels} levels"
    if not isinstance(train.levels, int):
        scale = f"numbers from {train.levels[0]:g} to {train.levels[1]:g}"
    of_data = f"{len(train):,} images of {'×'.join(map(str, train.shape))}, {scale}"
    count = check_model(config, ImageSpace.of(train, config))
    return [
        f"data: {of_data}, {classes}; {held:,} held out ({held / (len(train) + held):.0%})",
        *(f"skipped: {reason}" for reason in train.skipped),
        f"model: {config.process.name}, {config.network.name}, {count:,} parameters",
        f"training: {settings.images:,} images in {settings.steps:,} steps of {settings.batch}",
        f"device: {device}, {settings.precision}, {_memory(config, count)} and activations",
    ]


def _memory(config: RunConfig, count: int) -> str:
    """MiB of weights, averages, gradients and Adam's two moments, in single precision."""
    averages = 1 + len(config.training.ema_decays) + 2 * config.training.power_averages
    return f"{(4 + averages) * 4 * count / 2**20:,.0f} MiB"


def rehearsal(data: DataSet) -> tuple[DataSet, float]:
    """Some images in place of pictures that a training decodes once; seconds for all of them."""
    train, parts, seconds, began = data.train, [], 0.0, time.perf_counter()
    if not train.decodes_once:
        return data, 0.0
    for rows in torch.split(torch.arange(len(train), device="cpu"), 8):
        parts.append(train.load(rows))
        seconds = time.perf_counter() - began
        if seconds > _REHEARSAL:
            break
    images, count = torch.cat(parts), sum(len(part) for part in data if part is not None)
    labels = None if train.labels is None else train.labels[: len(images)]
    classes = train.class_names or train.classes
    kept = ArrayImages(images, levels=train.levels, labels=labels, classes=classes)
    return DataSet(kept, data.held_out), seconds / len(images) * count


def rehearse(
    config: RunConfig, data: DataSet, decoding: float, *, device: str, statistics: Statistics
) -> list[str]:
    """Make some steps of each stage; return lines about the time and memory of the training.

    ``decoding`` are the seconds by `rehearsal`. The first step, which allocates memory, does not
    count.
    """
    first, speeds, total = config.pretraining_steps, [], decoding
    with learning(config, data, device, statistics) as learner:
        place = learner.engine.device
        for stage in (range(first), range(first, config.training.steps)):
            seconds: list[float] = []
            last = time.perf_counter()
            for step, parts in zip(stage, ahead(learner.load, stage), strict=True):
                learner.step(step, parts)
                if place.type == "cuda":
                    torch.cuda.synchronize(place)
                seconds.append(time.perf_counter() - last)
                last += seconds[-1]
                if len(seconds) > 3 and sum(seconds[1:]) > _REHEARSAL:
                    break
            if seconds:
                mean = fmean(seconds[1:] or seconds)
                speeds.append(config.training.batch / mean)
                total += mean * len(stage)
        memory = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0
    shown = " and ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in speeds)
    stages = " in the two stages" if len(speeds) > 1 else ""
    return [
        *([f"decoding, once: {decoding / 60:,.1f} minutes"] if decoding else []),
        f"measured, with loading: {shown} images per second{stages}",
        *([f"peak memory of the GPU: {memory / 2**20:,.0f} MiB"] if memory else []),
        f"{total / 60:,.1f} minutes in all, without checkpoints and samples",
    ]
