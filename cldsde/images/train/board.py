"""Numbers and pictures of a training for TensorBoard; a training does not fail without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cldsde.messages import brief


class Board:
    """A folder of TensorBoard's events; events of an earlier process from ``first`` on are hidden.

    If the events cannot be written, one line on stderr says so, and no more events are written: all
    numbers are in ``metrics.jsonl`` as well.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        with self._trying():
            self._writer = SummaryWriter(folder, purge_step=first)

    def add(self, values: Mapping[str, float], seen: int) -> None:
        """Write numbers by their names, for so many images seen."""
        with self._trying():
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, seen)
                self._writer.flush()

    def add_picture(self, name: str, file: Path, seen: int) -> None:
        """Show a picture by its name, for so many images seen."""
        with self._trying(), Image.open(file) as opened:
            if self._writer is not None:
                pixels = np.asarray(opened.convert("RGB"))
                self._writer.add_image(name, pixels, seen, dataformats="HWC")

    def close(self) -> None:
        """Close the file."""
        with self._trying():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            reason = error.strerror or brief(error)
            msg = f"TensorBoard's events cannot be written to {self._folder} ({reason}); "
            tqdm.write(f"{msg}metrics.jsonl has all numbers", file=sys.stderr)  # not into a bar
