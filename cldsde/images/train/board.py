"""Numbers of a training for TensorBoard, which shows them: no training fails for want of them.

Events are written here and at once: TensorBoard's own writer does it in a thread, whose errors
reach stderr as tracebacks.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cldsde.images.files import brief

_NUMBERS = itertools.count()  # of files of one process within a second


class Board:
    """A folder of TensorBoard's events.

    What cannot be written is said once, in one line on stderr, and left out from then on: all
    numbers are in ``metrics.jsonl`` as well.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder = folder
        self._open = ExitStack()
        self._records: Any = None
        parts = (f"{time.time():.0f}", socket.gethostname(), os.getpid(), next(_NUMBERS))
        name = ".".join(map(str, ("events.out.tfevents", *parts)))
        with self._trying():
            folder.mkdir(exist_ok=True)
            self._records = RecordWriter(self._open.enter_context((folder / name).open("wb")))
            self._write(file_version="brain.Event:2")
            self._write(step=first, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: Mapping[str, float], seen: int) -> None:
        """Write numbers by their names, for so many images seen."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._trying():
            self._write(step=seen, summary=Summary(value=parts))

    def add_picture(self, name: str, file: Path, seen: int) -> None:
        """Show a PNG by its name, for so many images seen."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = Summary.Image(encoded_image_string=file.read_bytes())
        with self._trying():
            self._write(step=seen, summary=Summary(value=[Summary.Value(tag=name, image=content)]))

    def close(self) -> None:
        """Close the file."""
        with self._trying():
            self._open.close()

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._records is not None:
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._records = None
            with suppress(OSError):
                self._open.close()
            line = (
                f"TensorBoard's events cannot be written to {self._folder} "
                f"({error.strerror or brief(error)}); metrics.jsonl has all numbers"
            )
            tqdm.write(line, file=sys.stderr)  # not into a bar
