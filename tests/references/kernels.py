"""Kernels of linear SDEs to more than fifty digits, with mpmath.

The package builds the Cholesky factor directly, from short steps and their doublings in float64.
This module sums the power series of the covariance over the whole interval, with so many digits
that cancellation does not matter, and factorises it afterwards. Parameters are the exact values of
the float64 numbers given.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch

DIGITS = 110
"""Digits that survive: 60 wanted, and 50 for the grading of a 4 x 4 covariance at B = 1e-8."""

Matrix = Any  # mpmath is not typed


class Kernel(NamedTuple):
    """z_t = mean z_s + root xi: mpmath matrices, root lower triangular with diagonal >= 0."""

    mean: Matrix
    covariance: Matrix
    root: Matrix


def as_tensors(kernels: Iterable[Sequence[Matrix]]) -> tuple[torch.Tensor, ...]:
    """Each member of several kernels as one tensor (n, k, k), rounded once to float64."""
    members = zip(*kernels, strict=True)
    return tuple(
        torch.tensor([[[*map(float, r)] for r in m.tolist()] for m in ms], dtype=torch.float64)
        for ms in members
    )


def initial_covariance(kind: str, k: int) -> torch.Tensor | None:
    """Covariances of z_0: the process's own, none, of some components alone, or correlated."""
    index = torch.arange(k, dtype=torch.float64)
    eye = torch.eye(k, dtype=torch.float64)
    correlated = 0.4 ** (index[:, None] - index).abs() / (1 + index[:, None] + index)
    return {
        "own": None,
        "zero": 0 * eye,
        "full": correlated + 0.25 * eye,
        "data": 0.1225 * (index == 0) * eye,
        "auxiliary": 0.04 * (index > 0) * eye,
        "last": 0.04 * (index == k - 1) * eye,
    }[kind]


def matrix(values: Any) -> Matrix:
    """An mpmath matrix of the exact values of floats, of nested sequences or of a tensor."""
    if isinstance(values, mp.matrix):
        return values
    rows = values.tolist() if isinstance(values, torch.Tensor) else values
    return mp.matrix([[mp.mpf(x) for x in row] for row in rows])


def array(values: Matrix) -> Any:
    """A numpy array of the same numbers, whose products take a tenth of the time."""
    return np.array(values.tolist(), dtype=object)


def rows(values: Matrix) -> tuple[tuple[Any, ...], ...]:
    """The rows of a matrix, which can be hashed."""
    return tuple(map(tuple, values.tolist()))


def cholesky(sigma: Matrix) -> Matrix:
    """Lower factor of a positive semi-definite matrix; a column without variance stays zero."""
    k = sigma.rows
    root = mp.zeros(k, k)
    for j in range(k):
        pivot = sigma[j, j] - mp.fsum(root[j, i] ** 2 for i in range(j))
        if pivot <= sigma[j, j] * mp.mpf(10) ** (5 - DIGITS):
            continue
        root[j, j] = mp.sqrt(pivot)
        for i in range(j + 1, k):
            rest = sigma[i, j] - mp.fsum(root[i, m] * root[j, m] for m in range(j))
            root[i, j] = rest / root[j, j]
    return root


class Clock(NamedTuple):
    """A rate beta(t) and B(s, t), its integral: both take mpmath numbers and numpy arrays."""

    rate: Callable[[Any], Any]
    integral: Callable[[Any, Any], Any]


def clock_of(schedule: float | tuple[float, float]) -> Clock:
    """The clock of a number (constant rate) or of a pair of end values (linear rate)."""
    first, last = schedule if isinstance(schedule, tuple) else (schedule, schedule)

    def rate(t: Any) -> Any:
        return first * (1 - t) + last * t

    return Clock(rate, lambda s, t: (t - s) * rate((s + t) / 2))


def variance_clock(low: float, high: float) -> Clock:
    """The clock of VE, sigma(t)^2 - sigma(s)^2 with sigma = low (high / low)^t."""

    def variance(t: Any) -> Any:
        return (low ** (1 - t) * high**t) ** 2

    return Clock(
        lambda t: 2 * math.log(high / low) * variance(t), lambda s, t: variance(t) - variance(s)
    )


class Reference:
    """A process known exactly.

    Subclasses give ``own``, the covariance of z_0 given the data, ``moments(s, t)``, Psi and the
    noise covariance over [s, t], and ``slopes(t)``, F and G G^T.
    """

    own: Matrix
    moments: Callable[[Any, Any], tuple[Matrix, Matrix]]
    slopes: Callable[[Any], tuple[Matrix, Matrix]]

    def transition(self, s: float, t: float) -> Kernel:
        """Kernel of z_t given z_s."""
        with mp.workdps(DIGITS):
            psi, noise = self.moments(mp.mpf(s), mp.mpf(t))
            return Kernel(psi, noise, cholesky(noise))

    def marginal(self, t: float, initial: Any = None) -> Kernel:
        """Kernel of z_t given the mean of z_0, whose covariance is `initial` (None: its own)."""
        with mp.workdps(DIGITS):
            psi, noise = self.moments(mp.mpf(0), mp.mpf(t))
            start = self.own if initial is None else matrix(initial)
            sigma = psi * start * psi.T + noise
            return Kernel(psi, sigma, cholesky(sigma))


class Homogeneous(Reference):
    """F = beta(t) A, G = sqrt(beta(t)) Q_root: Van Loan's block exponential over the clock."""

    def __init__(self, A: Any, Q_root: Any, clock: Clock, own: Any = None) -> None:
        with mp.workdps(DIGITS):
            self.A, self.Q_root, self.clock = matrix(A), matrix(Q_root), clock
            self.Q = self.Q_root * self.Q_root.T
            k = self.A.rows
            self.own = mp.zeros(k, k) if own is None else matrix(own)

    def slopes(self, t: Any) -> tuple[Matrix, Matrix]:
        return self.A * self.clock.rate(t), self.Q * self.clock.rate(t)

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        clock = self.clock.integral(s, t)
        return power_series((rows(self.A * clock),), (rows(self.Q * clock),))


class SubVP(Reference):
    """The mean of VP with g^2 = beta (1 - exp(-2 B(0, t))), in closed form."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.own = clock, mp.zeros(1, 1)

    def slopes(self, t: Any) -> tuple[Matrix, Matrix]:
        rate, clock = self.clock.rate(t), self.clock.integral(mp.mpf(0), t)
        return mp.matrix([[-rate / 2]]), mp.matrix([[-rate * mp.expm1(-2 * clock)]])

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        # With b = B(0, u): integral of e^{b - b_t} (1 - e^{-2 b}) db from b_s to b_t.
        first, last = (self.clock.integral(mp.mpf(0), u) for u in (s, t))
        variance = 2 * mp.exp(-last) * (mp.cosh(last) - mp.cosh(first))
        return mp.matrix([[mp.exp((first - last) / 2)]]), mp.matrix([[variance]])


class Polynomial(Reference):
    """F(t) = sum F_i t^i and G(t) = sum G_i t^i: power series of the moment equations."""

    def __init__(self, drift: Sequence[Any], diffusion: Sequence[Any], own: Any = None) -> None:
        with mp.workdps(DIGITS):
            self.drift = [matrix(m) for m in drift]
            root = [matrix(m) for m in diffusion]
            k = self.drift[0].rows
            self.noise = [mp.zeros(k, k) for _ in range(2 * len(root) - 1)]
            for i, left in enumerate(root):
                for j, right in enumerate(root):
                    self.noise[i + j] += left * right.T
            self.own = mp.zeros(k, k) if own is None else matrix(own)

    def slopes(self, t: Any) -> tuple[Matrix, Matrix]:
        first, second = (
            sum((c * t**i for i, c in enumerate(cs)), 0 * cs[0]) for cs in (self.drift, self.noise)
        )
        return first, second

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        h = t - s
        drift, noise = (
            tuple(rows(m * h) for m in recentred(cs, s, h)) for cs in (self.drift, self.noise)
        )
        return power_series(drift, noise)


@functools.cache
def power_series(drift: Any, noise: Any) -> tuple[Matrix, Matrix]:
    """Psi(1) and Sigma(1) of Psi' = F Psi and Sigma' = F Sigma + Sigma F^T + Q.

    F = sum F_i x^i and Q = sum Q_i x^i, given as tuples of rows. In integers of units of 2^-bits:
    products of mpmath's matrices take ten times as long.
    """
    # The terms rise to e^|F| before they fall, and Psi may be as small as e^-|F|.
    size = int(mp.fsum(abs(v) for m in drift for row in m for v in row))
    with mp.workdps(DIGITS + size + 60):
        bits, half = mp.mp.prec, 1 << (mp.mp.prec - 1)
        F, Q = (
            [np.array([[int(mp.ldexp(v, bits)) for v in row] for row in m], object) for m in ms]
            for ms in (drift, noise)
        )
        psi, cov = [np.diag(np.full(len(F[0]), 1 << bits, object))], [0 * F[0]]
        n = quiet = 0
        while quiet <= len(F) + len(Q):
            rate = sum(f @ psi[n - j] for j, f in enumerate(F[: n + 1]))
            half_gain = sum(f @ cov[n - j] for j, f in enumerate(F[: n + 1]))
            gain = half_gain + half_gain.T + ((Q[n] << bits) if n < len(Q) else 0)
            n += 1
            psi.append((rate + n * half) // (n << bits))
            cov.append((gain + n * half) // (n << bits))
            quiet = 0 if psi[-1].any() or cov[-1].any() else quiet + 1
        return tuple(
            mp.matrix([[mp.ldexp(mp.mpf(v), -bits) for v in row] for row in sum(terms).tolist()])
            for terms in (psi, cov)
        )


def recentred(coefficients: Sequence[Matrix], s: Any, h: Any) -> list[Matrix]:
    """Coefficients in x of sum_i C_i (s + h x)^i."""
    moved = [0 * c for c in coefficients]
    for i, c in enumerate(coefficients):
        for j in range(i + 1):
            moved[j] += c * (mp.binomial(i, j) * s ** (i - j) * h**j)
    return moved


def vp(beta_min=0.1, beta_max=20.0):
    """dx = -beta/2 x dt + sqrt(beta) dw, beta linear."""
    return Homogeneous([[-0.5]], [[1.0]], clock_of((beta_min, beta_max)))


def sub_vp(beta_min=0.1, beta_max=20.0):
    """The drift of VP, with g^2 = beta (1 - exp(-2 B(0, t)))."""
    return SubVP(clock_of((beta_min, beta_max)))


def ve(sigma_min=0.01, sigma_max=50.0):
    """dx = sqrt(2 log(sigma_max/sigma_min)) sigma(t) dw, geometric; own variance sigma_min^2."""
    with mp.workdps(DIGITS):
        own = [[mp.mpf(sigma_min) ** 2]]
    return Homogeneous([[0.0]], [[1.0]], variance_clock(sigma_min, sigma_max), own)


def cld(beta=4.0, mass=0.25, friction=1.0, velocity_scale=0.04, position_noise=0.0):
    """A = [[0, 1/M], [-1, -Gamma/M]], Q = diag(eps^2, 2 Gamma); v_0 has variance gamma M."""
    with mp.workdps(DIGITS):
        M, v = mp.mpf(mass), mp.sqrt(2 * mp.mpf(friction))
        A = [[0, 1 / M], [-1, -friction / M]]
        Q_root = [[position_noise, 0], [0, v]] if position_noise else [[0], [v]]
        return Homogeneous(A, Q_root, clock_of(beta), [[0, 0], [0, velocity_scale * M]])


def psld(beta=8.0, gamma=0.01, nu=4.01, mass=0.25, velocity_scale=0.04):
    """A = [[-Gamma, 1/M], [-1, -nu]] / 2, Q = diag(Gamma, M nu); v_0 has variance gamma M."""
    with mp.workdps(DIGITS):
        M, root = mp.mpf(mass), [[mp.sqrt(gamma), 0], [0, mp.sqrt(mp.mpf(mass) * nu)]]
        A = [[-gamma / mp.mpf(2), 1 / (2 * M)], [-0.5, -nu / mp.mpf(2)]]
        return Homogeneous(A, root, clock_of(beta), [[0, 0], [0, velocity_scale * M]])


def hold(beta=4.0, coupling=8**0.5, friction=27**0.5, inverse_mass=1.0, auxiliary_scale=0.04):
    """A = [[0, 1, 0], [-1, 0, g], [0, -g, -xi]], Q = diag(0, 0, 2 xi / L), L the inverse mass."""
    with mp.workdps(DIGITS):
        g, xi, variance = coupling, friction, 1 / mp.mpf(inverse_mass)
        A, start = [[0, 1, 0], [-1, 0, g], [0, -g, -xi]], auxiliary_scale * variance
        Q_root, own = [[0], [0], [mp.sqrt(2 * xi * variance)]], mp.diag([0, start, start])
        return Homogeneous(A, Q_root, clock_of(beta), own)
