"""Images as bytes with labels, found by row number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.images.checks import as_whole, check_labels, check_values

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
        self._count = as_whole(count, "count", 1)
        if len(shape) != 3 or min(shape) < 1:
            msg = f"shape must be (channels, height, width), each at least 1; got {tuple(shape)}"
            raise ValueError(msg)
        self.shape: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.levels = as_whole(levels, "levels", 2, 256)
        self.skipped: tuple[str, ...] = ()
        self.labels: Tensor | None = None
        self.classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        if labels is not None:
            if not (classes is None or isinstance(classes, int)):
                self.class_names = tuple(classes)
            known = classes if isinstance(classes, int | None) else len(classes)
            self.classes = check_labels(labels, "labels", count, known)
            self.labels = labels.to("cpu", torch.int64)
        elif classes is not None:
            msg = "classes needs labels; got classes without labels"
            raise ValueError(msg)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        shape = "×".join(str(n) for n in self.shape)
        classes = "" if self.classes is None else f", {self.classes} classes"
        return f"{type(self).__name__}({len(self)} of {shape}, {self.levels} levels{classes})"

    def load(self, rows: Tensor) -> Tensor:
        """Load rows ``(n,)`` int64, in any order and with repeats, as ``(n, C, H, W)`` uint8."""
        rows = self.check_rows(rows)
        if len(rows) == 0:
            return torch.empty((0, *self.shape), dtype=torch.uint8)
        return self._read(rows)

    def check_rows(self, rows: Tensor) -> Tensor:
        """Return row numbers on the CPU if these images have them, raise as `load` otherwise."""
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            msg = f"rows must be a tensor of int64; got {got}"
            raise TypeError(msg)
        if rows.ndim != 1:
            msg = f"rows must have one axis; got shape {tuple(rows.shape)}"
            raise ValueError(msg)
        low, high = map(int, rows.aminmax()) if len(rows) else (0, 0)
        if low < 0 or high >= len(self):
            msg = f"rows must lie in 0 … {len(self) - 1}; got {low} to {high}"
            raise IndexError(msg)
        return rows.cpu()

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """A new tensor of the images of at least one row; all rows exist."""


class ArrayImages(Images):
    """Images in memory.

    Examples
    --------
    >>> images = ArrayImages(torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2))
    >>> images
    ArrayImages(2 of 1×2×2, 256 levels)
    >>> images.load(torch.tensor([1])).flatten().tolist()
    [4, 5, 6, 7]
    """

    def __init__(
        self,
        images: Tensor,
        *,
        levels: int = 256,
        labels: Tensor | None = None,
        classes: int | Sequence[str] | None = None,
    ) -> None:
        check_values(images, levels)
        if images.ndim != 4 or images.numel() == 0:
            msg = f"images must have shape (N, C, H, W), none of them 0; got {tuple(images.shape)}"
            raise ValueError(msg)
        if images.device.type != "cpu":
            msg = f"images must be on the CPU; got {images.device}"
            raise TypeError(msg)
        shape = images.shape[1:]
        super().__init__(len(images), shape, levels=levels, labels=labels, classes=classes)
        self._images = images

    def _read(self, rows: Tensor) -> Tensor:
        return self._images[rows]


class Subset(Images):
    """Some rows ``(n,)`` of other images, in a given order; the images are shared, not copied."""

    def __init__(self, images: Images, rows: Tensor) -> None:
        rows = images.check_rows(rows).clone()
        if len(rows) == 0:
            msg = "rows must hold at least one row; got none"
            raise ValueError(msg)
        labels = None if images.labels is None else images.labels[rows]
        classes = images.class_names or images.classes
        super().__init__(
            len(rows), images.shape, levels=images.levels, labels=labels, classes=classes
        )
        self._images, self._rows = images, rows
        self.skipped = images.skipped

    def _read(self, rows: Tensor) -> Tensor:
        return self._images.load(self._rows[rows])
