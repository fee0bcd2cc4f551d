"""Fixtures of all benchmarks: `threads`, `race` and a description of the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits

from interleaved import interleave, ratio

# Once a large tensor is freed, as networks do, glibc keeps freed memory for reuse. Otherwise states
# may be in new memory at each step, whose page faults can take as long as the step.
torch.empty(7_000_000)

DEFAULT_THREADS = torch.get_num_threads()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = DEFAULT_THREADS
    machine_info["python"] = platform.python_version()


@pytest.fixture(scope="session", params=["default threads", "one thread"])
def threads(request: Any) -> Iterator[str]:
    """Run the benchmarks first with torch's default threads and then with one.

    Nothing sets the default: `torch.set_num_threads` stops MKL from choosing fewer threads, even
    when it is given the number that torch had.
    """
    if request.param == "default threads":
        yield request.param
        return
    with threadpool_limits(1):  # scipy's linear algebra has threads of its own
        torch.set_num_threads(1)
        yield request.param
        torch.set_num_threads(DEFAULT_THREADS)


@pytest.fixture
def race(benchmark: Any, request: Any, threads: str) -> Callable[..., None]:
    """Time rivals alternately; keep medians and the ratios of the first rival to the others.

    With one thread the clock is processor time, with default threads it is wall time. ``at_most``
    limits ratios; it is a target with one thread only. ``below`` limits seconds per unit. A run
    does ``units`` of ``unit``; a function is given the rival's name after all runs.
    """
    alone = threads == "one thread"

    def run(
        question: str,
        rivals: Mapping[str, Callable[[], object]],
        *,
        at_most: Mapping[str, float] | None = None,
        below: Mapping[str, float] | None = None,
        unit: str = "run",
        units: int = 1,
        rounds: int = 9,
    ) -> None:
        rounds = 0 if benchmark.disabled else rounds
        clock = time.process_time if alone else time.perf_counter
        taken = benchmark.pedantic(interleave, args=(rivals, rounds, clock))
        if benchmark.disabled:
            return
        subject, *others = rivals
        benchmark.extra_info.update(
            topic=request.module.__name__.rpartition("bench_")[2],
            question=f"{question}, {threads}",
            unit=unit,
            rounds=rounds,
            seconds={name: statistics.median(times) / units for name, times in taken.items()},
            ratios={name: ratio(taken[subject], taken[name]) for name in others},
            at_most=dict(at_most or {}) if alone else {},
            below=dict(below or {}),
        )

    return run
