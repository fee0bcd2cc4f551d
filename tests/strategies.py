"""Hypothesis strategies: random processes, times, shapes, dtypes and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st

from cldsde import CLD, LinearSDE

Noise = Literal["full", "chain", "deficient"]


@dataclasses.dataclass(frozen=True)
class StableProcess:
    """A = -(D + R) Sigma^-1 and Q_root Q_root^T = 2 D: stable, with the stationary N(0, Sigma).

    R is skew and D positive semi-definite; A is scaled to ||A||_1 = 1, so that a clock of B means
    ||A||_1 B = B. In the coordinates in which Sigma is the identity every exp(A B) has norm <= 1
    and every covariance started from zero is <= I.
    """

    A: torch.Tensor
    Q_root: torch.Tensor
    stationary: torch.Tensor
    noise: Noise
    seed: int

    @property
    def components(self) -> int:
        return self.A.shape[0]

    @property
    def condition(self) -> float:
        """Condition number of the stationary covariance."""
        return float(torch.linalg.cond(self.stationary))

    def sde(self, schedule: Any = 1.0) -> LinearSDE:
        return LinearSDE.from_matrices(self.A, self.Q_root, schedule=schedule)

    def __repr__(self) -> str:
        return f"stable_process({self.seed}, {self.components}, {self.noise!r})"


def rotation(rng: np.random.Generator, k: int) -> Any:
    return np.linalg.qr(rng.standard_normal((k, k)))[0]


def stable_process(seed: int, components: int, noise: Noise = "full") -> StableProcess:
    """The process that a seed stands for.

    Noise "full": D has full rank and no structure. "chain": noise enters the last component alone
    and reaches component i through i + 1, as in Langevin dynamics. The diagonal of the root is then
    graded, h^(k - i - 1/2). "deficient": D has rank k - 1 (one, for k = 1) in random directions; at
    short times the rows of the root are nearly parallel.
    """
    rng = np.random.default_rng(seed)
    k = components
    signs = rng.choice([-1.0, 1.0], size=max(k - 1, 0))
    skew = np.zeros((k, k))
    if noise == "chain":
        scale = np.diag(np.exp(rng.uniform(-0.7, 0.7, k)))
        root = np.zeros((k, 1))
        root[-1, 0] = math.sqrt(2 * np.exp(rng.uniform(-1.0, 1.0)))
        for i in range(k - 1):
            skew[i, i + 1] = signs[i] * rng.uniform(0.5, 2.0)
    else:
        scale = rotation(rng, k) * np.exp(rng.uniform(-0.7, 0.7, k))
        rates = np.exp(rng.uniform(-2.0, 1.0, k))
        if noise == "deficient" and k > 1:
            rates[0] = 0.0
        root = rotation(rng, k) * np.sqrt(2 * rates)
        for i, j in itertools.combinations(range(k), 2):
            skew[i, j] = rng.uniform(0.5, 2.0) * rng.choice([-1.0, 1.0])
    stationary = scale @ scale.T
    drift = -(root @ root.T / 2 + skew - skew.T) @ np.linalg.inv(stationary)
    size = np.abs(drift).sum(axis=0).max()
    matrices = map(torch.from_numpy, (drift / size, root / np.sqrt(size), stationary))
    return StableProcess(*matrices, noise, seed)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def stable_processes(noise: Any = ("full", "chain", "deficient")) -> Any:
    """Random stable processes with one to four components."""
    return st.builds(stable_process, seeds(), st.integers(1, 4), st.sampled_from(noise))


def covariances(components: int) -> st.SearchStrategy[torch.Tensor]:
    """Covariances of z_0: zero, of the last component alone, or full (condition number < 60)."""

    def build(seed: int, kind: str) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        sigma = np.zeros((components, components))
        if kind == "last":
            sigma[-1, -1] = np.exp(rng.uniform(-4.0, 1.0))
        if kind == "full":
            factor = rotation(rng, components) * np.exp(rng.uniform(-1.0, 1.0, components))
            sigma = factor @ factor.T
        return torch.from_numpy(sigma)

    return st.builds(build, seeds(), st.sampled_from(["zero", "last", "full"]))


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


@st.composite
def clds(draw: st.DrawFn) -> CLD:
    """CLD with any damping, critical or beside it by 1e-12 ... 1, mass, schedule and velocity."""
    mass = draw(st.one_of(st.just(0.25), log_uniform(0.05, 2.0)))
    gap, sign = draw(log_uniform(1e-12, 0.9)), draw(st.sampled_from([-1.0, 0.0, 1.0]))
    return CLD(
        beta=draw(schedules()),
        mass=mass,
        friction=(1 + sign * gap) * 2 * math.sqrt(mass),  # critical: Gamma^2 = 4 M
        velocity_scale=draw(st.one_of(st.just(0.04), log_uniform(1e-3, 1.0))),
    )


def shapes(dims: int = 3, side: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of batches of times or of data: (), (3,), (2, 1, 4), …, empty ones not included."""
    return st.lists(st.integers(1, side), max_size=dims).map(tuple)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from([torch.float32, torch.float64])
