"""Images as bytes with labels, found by row number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.images.checks import check_images, check_labels, check_values
from cldsde.images.schema import Count, Levels, checked

CHUNK = 2**22
"""Numbers that are held at once when a whole data set is read."""


class Images(ABC):
    """Images of one shape ``(C, H, W)``, as bytes, found by row number.

    Values are 0 … levels − 1. Labels are classes ``(N,)``; ``classes`` is their number or their
    names, and None stands for the largest label + 1. ``class_names`` are the names if they are
    known, ``skipped`` the files of the source that were left out, and the reasons.
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        *,
        levels: int = 256,
        labels: Tensor | None = None,
        classes: int | Sequence[str] | None = None,
    ) -> None:
        self._count, self.levels = count, levels
        self.shape: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.skipped: tuple[str, ...] = ()
        self.labels: Tensor | None = None
        self.classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        if labels is None and classes is not None:
            raise ValueError(f"classes needs labels; got {classes!r} and no labels")
        if labels is not None:
            known = classes if isinstance(classes, int | None) else len(classes)
            self.class_names = None if isinstance(classes, int | None) else tuple(classes)
            self.classes = check_labels(labels, count, known)
            self.labels = labels.to("cpu", torch.int64)

    def __len__(self) -> int:
        return self._count

    def load(self, rows: Tensor) -> Tensor:
        """Load rows ``(n,)`` int64, in any order and with repeats, as ``(n, C, H, W)`` uint8."""
        self.check_rows(rows)
        if len(rows) == 0:
            return torch.empty((0, *self.shape), dtype=torch.uint8)
        return self._read(rows.cpu())

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
    """Images in memory, ``(N, C, H, W)`` uint8."""

    @checked
    def __init__(
        self,
        images: Tensor,
        *,
        levels: Levels = 256,
        labels: Tensor | None = None,
        classes: Count | Sequence[str] | None = None,
    ) -> None:
        check_values(check_images(images, "images", least=1), levels)
        shape = images.shape[1:]
        super().__init__(len(images), shape, levels=levels, labels=labels, classes=classes)
        self._images = images

    def _read(self, rows: Tensor) -> Tensor:
        return self._images[rows]


class Subset(Images):
    """Some rows ``(n,)`` of other images, in a given order; the images are shared, not copied."""

    def __init__(self, images: Images, rows: Tensor) -> None:
        images.check_rows(rows)
        labels = None if images.labels is None else images.labels[rows]
        classes = images.class_names or images.classes
        super().__init__(
            len(rows), images.shape, levels=images.levels, labels=labels, classes=classes
        )
        self._images, self._rows = images, rows.clone()
        self.skipped = images.skipped

    def _read(self, rows: Tensor) -> Tensor:
        return self._images.load(self._rows[rows])
