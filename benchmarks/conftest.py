"""What all benchmarks share: `race`, and a description of the machine."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from interleaved import ratio, seconds

ROUNDS = 9


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=time.process_time, disable_gc=True))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["python"] = platform.python_version()


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Time rivals in turn and keep the medians, and the ratios of the first to the others.

    Targets are ``at_most``, limits of these ratios, and ``below``, one of the seconds a unit. Each
    run does ``units`` of what is reported, a ``unit``; where rivals differ in their number,
    ``units`` is a function of the name, asked when all have run.
    """

    def run(
        question: str,
        rivals: Mapping[str, Callable[[], object]],
        *,
        at_most: Mapping[str, float] | None = None,
        below: float | None = None,
        unit: str = "run",
        units: int | Callable[[str], int] = 1,
        rounds: int = ROUNDS,
    ) -> None:
        subject, *others = rivals
        taken: dict[str, list[float]] = {name: [] for name in others}
        turns = deque(others)

        def let_others_run() -> None:
            # In another order each time: who runs after whom finds other things in the caches.
            turns.rotate(1)
            for name in turns:
                taken[name].append(seconds(rivals[name]))
            gc.collect()

        benchmark.group = question
        benchmark.pedantic(rivals[subject], setup=let_others_run, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:
            return
        # Without the first round, which warms up.
        found = {subject: list(benchmark.stats.stats.data)}
        found |= {name: times[-rounds:] for name, times in taken.items()}
        for name, times in found.items():
            count = units(name) if callable(units) else units
            found[name] = [t / count for t in times]
        benchmark.extra_info.update(
            question=question,
            unit=unit,
            rounds=rounds,
            seconds={name: statistics.median(times) for name, times in found.items()},
            ratios={name: ratio(found[subject], found[name]) for name in others},
            at_most=dict(at_most or {}),
            below=below,
        )

    return run
