"""Timing of rivals that cannot be told apart by what else the machine does.

All of them run in turn, round after round, in one process, and what is measured is the processor
time of the process. So a load by others slows each alike, and ratios of a round hardly change.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["interleave", "ratio", "seconds"]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one run, in which Python collects no garbage of the others."""
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        run()
        return time.process_time() - began
    finally:
        gc.enable()


def interleave(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round, after one round that does not count."""
    for run in rivals.values():
        run()
    turns = [{name: seconds(run) for name, run in rivals.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in rivals}


def ratio(subject: Sequence[float], rival: Sequence[float]) -> float:
    """The median over the rounds of one's time in units of the other's."""
    return statistics.median(a / b for a, b in zip(subject, rival, strict=True))
