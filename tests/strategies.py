"""Hypothesis strategies: random processes, times, shapes, dtypes and seeds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from cldsde import LinearSDE


class StableProcess(NamedTuple):
    """A = -(D + R) Sigma^-1 and Q_root Q_root^T = 2 D: stable, with the stationary N(0, Sigma).

    R is skew and D positive definite; A is scaled to ||A||_1 = 1, so that a clock of B means
    ||A||_1 B = B. In the coordinates in which Sigma is the identity every exp(A B) has norm <= 1
    and every covariance started from zero is <= I.
    """

    A: torch.Tensor
    Q_root: torch.Tensor
    stationary: torch.Tensor

    @property
    def components(self) -> int:
        return self.A.shape[0]

    def sde(self, schedule: Any = 1.0) -> LinearSDE:
        return LinearSDE.from_matrices(self.A, self.Q_root, schedule=schedule)


def stable_process(seed: int, k: int) -> StableProcess:
    """The process that a seed stands for."""
    rng = np.random.default_rng(seed)

    def factor(rates: Any) -> Any:
        return np.linalg.qr(rng.standard_normal((k, k)))[0] * rates

    scale = factor(np.exp(rng.uniform(-0.7, 0.7, k)))
    root = factor(np.exp(rng.uniform(-1.0, 0.5, k)))
    skew = np.triu(rng.uniform(0.5, 2.0, (k, k)) * rng.choice([-1.0, 1.0], (k, k)), 1)
    stationary = scale @ scale.T
    drift = -(root @ root.T / 2 + skew - skew.T) @ np.linalg.inv(stationary)
    size = np.abs(drift).sum(axis=0).max()
    matrices = map(torch.from_numpy, (drift / size, root / np.sqrt(size), stationary))
    return StableProcess(*matrices)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def stable_processes() -> Any:
    """Random stable processes with one to four components."""
    return st.builds(stable_process, seeds(), st.integers(1, 4))


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive numbers whose logarithm is spread evenly, both ends included."""
    exponents = st.floats(math.log(low), math.log(high))
    return exponents.map(lambda x: min(max(math.exp(x), low), high))


def times(high: float = 1.0) -> st.SearchStrategy[float]:
    """Times in [1e-8, high], as likely near 1e-8 as near 1."""
    return log_uniform(1e-8, high)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float]:
    """Two times in [0, 1]: the step between is log-uniform, and the first time may be zero."""
    start = draw(st.one_of(st.just(0.0), times(high=0.9), st.floats(0.1, 0.9)))
    return start, min(start + draw(times()), 1.0)


def schedules() -> st.SearchStrategy[float | tuple[float, float]]:
    """Constant or linear rates: a number, or a pair of end values."""
    rates = log_uniform(0.1, 8.0)
    return st.one_of(rates, st.tuples(rates, rates))


def shapes(dims: int = 3, side: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of batches of times or of data: (), (3,), (2, 1, 4), …, empty ones not included."""
    return st.lists(st.integers(1, side), max_size=dims).map(tuple)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from([torch.float32, torch.float64])
