"""Alternating timing of rivals, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

__all__ = ["interleave", "ratio"]


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each rival in each round, after a warm-up round.

    With a single round, for runs of minutes, there is no warm-up. The default clock is the
    processor time of the process, which other processes hardly change.
    """
    if rounds != 1:
        for run in rivals.values():
            run()
    turns = deque(rivals)
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        # Rotate the order, because a run leaves its data in the caches for the next run.
        turns.rotate(1)
        gc.collect()
        gc.disable()
        try:
            for name in turns:
                began = clock()
                rivals[name]()
                taken[name].append(clock() - began)
        finally:
            gc.enable()
    return taken


def ratio(subject: Sequence[float], rival: Sequence[float]) -> float:
    """Median over the rounds of the subject's time divided by the rival's time."""
    return statistics.median(a / b for a, b in zip(subject, rival, strict=True))
