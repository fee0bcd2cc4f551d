"""Images as bytes or numbers, with labels, found by row number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cldsde.images.checks import Scale, check_images, check_labels, check_values
from cldsde.images.schema import Count, Levels, Range, checked
from cldsde.progress import progress_bar

CHUNK = 2**22
"""Numbers that are held at once when a whole data set is read."""


class Images(ABC):
    """Images of one shape ``(C, H, W)``, as bytes or float32, found by row number.

    Bytes are 0 … levels − 1; of continuous numbers, ``levels`` is the range ``(low, high)``. Labels
    are classes ``(N,)``; ``classes`` is their number or their names, and None stands for the
    largest label + 1. ``class_names`` are the names if they are known, ``skipped`` the files of the
    source that were left out, and the reasons.
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        *,
        levels: Scale = 256,
        labels: Tensor | None = None,
        classes: int | Sequence[str] | None = None,
    ) -> None:
        self._count, self.levels = count, levels
        self.shape: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.skipped: tuple[str, ...] = ()
        if labels is None and classes is not None:
            raise ValueError(f"classes needs labels; got {classes!r} and no labels")
        names = None if isinstance(classes, int | None) else tuple(classes)
        known = classes if isinstance(classes, int | None) else len(classes)
        self.classes = None if labels is None else check_labels(labels, count, known)
        self.class_names: tuple[str, ...] | None = names
        self.labels = None if labels is None else labels.to("cpu", torch.int64)

    def __len__(self) -> int:
        return self._count

    def load(self, rows: Tensor) -> Tensor:
        """Load rows ``(n,)`` int64, in any order and with repeats, as ``(n, C, H, W)``."""
        self.check_rows(rows)
        if len(rows) == 0:
            dtype = torch.uint8 if isinstance(self.levels, int) else torch.float32
            return torch.empty((0, *self.shape), dtype=dtype, device="cpu")
        return self._read(rows.cpu())

    @property
    def decodes_once(self) -> bool:
        """Whether `keep_decoded` is going to take its time."""
        return False

    def keep_decoded(self, *, progress: bool = False) -> None:  # noqa: B027 -- nothing to do
        """Make later reads fast, if images are decoded when they are read."""

    def sums(self, rows: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Sums of each pixel over rows, or all images, for statistics: ``(2, C, H, W)``.

        Of bytes these are the sums of levels and of their squares, int64. Of continuous numbers
        they are the mean and the sum of squared deviations from it, float64.
        """
        rows = torch.arange(len(self), device="cpu") if rows is None else rows
        exact, seen = isinstance(self.levels, int), 0
        dtype = torch.int64 if exact else torch.float64
        found = torch.zeros((2, *self.shape), dtype=dtype, device="cpu")
        with progress_bar(None, shown=progress, total=len(rows), desc="statistics", delay=3) as bar:
            for some in torch.split(rows, max(1, CHUNK // found[0].numel())):
                x = self.load(some).to(torch.int32 if exact else torch.float64)
                if exact:
                    found += torch.stack([y.sum(0, dtype=torch.int64) for y in (x, x.square())])
                else:  # Chan et al. 1983: nothing cancels
                    mean, seen = x.mean(0), seen + len(x)
                    shift, share = mean - found[0], len(x) / seen
                    found[1] += (x - mean).square().sum(0) + shift**2 * (1 - share) * len(x)
                    found[0] += share * shift
                bar.update(len(some))
        return found

    def check_rows(self, rows: Tensor) -> None:
        """Raise a TypeError or an IndexError unless these images have the rows."""
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
            raise TypeError(f"rows must be an int64 tensor (n,); got {rows}")
        if bool(((rows < 0) | (rows >= len(self))).any()):
            raise IndexError(f"rows must lie in 0 … {len(self) - 1}; got {rows.tolist()}")

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """A new tensor of the images of at least one row; all rows exist."""


class ArrayImages(Images):
    """Images in memory, ``(N, C, H, W)`` uint8, or floats if ``levels`` is their range."""

    @checked
    def __init__(
        self,
        images: Tensor,
        *,
        levels: Levels | Range = 256,
        labels: Tensor | None = None,
        classes: Count | Sequence[str] | None = None,
    ) -> None:
        check_images(images, "images", least=1)
        levels = levels if isinstance(levels, int) else (levels[0], levels[1])
        shape = images.shape[1:]
        for part in torch.split(images, max(1, CHUNK // math.prod(shape))):
            check_values(part, levels)
        super().__init__(len(images), shape, levels=levels, labels=labels, classes=classes)
        self._images = images

    def _read(self, rows: Tensor) -> Tensor:
        found = self._images[rows]
        return found.to(torch.float32) if found.is_floating_point() else found


class Subset(Images):
    """Some rows ``(n,)`` of other images, in a given order; the images are shared, not copied."""

    def __init__(self, images: Images, rows: Tensor) -> None:
        images.check_rows(rows)
        labels = None if images.labels is None else images.labels[rows]
        kind: Any = {"levels": images.levels, "classes": images.class_names or images.classes}
        super().__init__(len(rows), images.shape, labels=labels, **kind)
        self._images, self._rows = images, rows.clone()
        self.skipped = images.skipped

    @property
    def decodes_once(self) -> bool:
        """See `Images`."""
        return self._images.decodes_once

    def keep_decoded(self, *, progress: bool = False) -> None:
        """See `Images`; all images are decoded, also those that are not in the subset."""
        self._images.keep_decoded(progress=progress)

    def sums(self, rows: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """See `Images`."""
        rows = self._rows if rows is None else self._rows[rows]
        return self._images.sums(rows, progress=progress)

    def _read(self, rows: Tensor) -> Tensor:
        return self._images.load(self._rows[rows])
