"""Batches of a training: augmented images, classes and times, each from its own random streams."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.images.config import RunConfig
from cldsde.images.data import Images, augment
from cldsde.images.latent.bound import Batch, Times
from cldsde.images.model import ImageSpace
from cldsde.images.streams import image_order, stream
from cldsde.images.train.engine import shares
from cldsde.score import TimeSampler


class Part(NamedTuple):
    """Images of one pass through the network, and their place in the batch."""

    first: int
    batch: Batch


class Feed:
    """Batches of one process of a training."""

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        space: ImageSpace,
        samplers: tuple[TimeSampler, ...],
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._config, self._images, self._space = config, images, space
        self._samplers, self._process = samplers, process
        self._share, self.part_size, self.block = shares(config, processes)

    def load(self, step: int) -> list[Part]:
        """The parts of a step's batch."""
        batch, seed = self._config.training.batch, self._config.seed
        times = tuple(
            Times(*sampler.sample(batch, generator=stream(seed, "times", step, *which)))
            for sampler, which in zip(self._samplers, ((), (1,)), strict=False)
        )
        order = image_order(seed, len(self._images), step * batch, batch)
        begin = self._process * self._share
        loaded = []
        for first in range(begin, begin + self._share, self.part_size):
            mine = slice(first, first + self.part_size)
            x, labels = self._present(step, first, order[mine])
            loaded.append(Part(first, Batch(x, labels, tuple(some.take(mine) for some in times))))
        return loaded

    def _present(self, step: int, first: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Augmented images and their classes, some of them hidden."""
        images, classes, config = self._images, self._space.classes, self._config
        kind: Any = {name: getattr(config.data, name) for name in ("flip", "crop", "dequantise")}
        shown, labels = [], []
        for block, some in enumerate(rows.split(self.block)):  # type: ignore[no-untyped-call]
            draw = stream(config.seed, "presentation", step, first // self.block + block)
            shown.append(augment(images.load(some), images.levels, generator=draw, **kind))
            if classes is not None:
                assert images.labels is not None
                hidden = torch.rand(len(some), generator=draw) < config.network.label_dropout
                labels.append(images.labels[some].masked_fill(hidden, classes))
        return torch.cat(shown), torch.cat(labels) if labels else None
