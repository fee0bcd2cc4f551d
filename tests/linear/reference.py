"""Transition laws of linear SDEs to more than fifty digits, with mpmath.

Nothing here shares an algorithm with the package.  The package builds the Cholesky factor directly,
by quadrature and doubling in float64; this module forms the covariance itself, with so many digits
that cancellation does not matter, and factorises it afterwards:

* constant matrices: Van Loan's block exponential over the clock B(s, t);
* VP, sub-VP, VE: closed forms;
* matrices polynomial in t, which need not commute: the power series of the moment equations
  Psi' = F Psi, Q' = F Q + Q F^T + G G^T;
* a constant process seen from a moving frame exp(t S): exact, and it commutes with nothing.

Parameters are the exact values of the float64 numbers given.  Every reference offers
``transition(s, t)`` and ``marginal(t, initial)`` and returns a `Law` of mpmath matrices;
`as_tensors` rounds a list of laws once, to float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mpmath as mp
import torch

DIGITS = 110
"""Digits that survive: 60 wanted, and 50 for the grading of a 4 x 4 covariance at B = 1e-8."""

Matrix = Any  # mpmath is not typed
Rows = tuple[tuple[Any, ...], ...]
Clock = Callable[[Any, Any], Any]


class Law(NamedTuple):
    """z_t = mean z_s + root xi: mpmath matrices, root lower triangular with diagonal >= 0."""

    mean: Matrix
    covariance: Matrix
    root: Matrix


def as_tensors(laws: Iterable[Law]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means, covariances and roots of several laws, each (n, k, k), rounded once to float64."""
    laws = list(laws)
    mean, covariance, root = (
        torch.tensor(
            [[[float(x) for x in row] for row in m.tolist()] for m in matrices],
            dtype=torch.float64,
        )
        for matrices in zip(*laws, strict=True)
    )
    return mean, covariance, root


def matrix(values: Any) -> Matrix:
    """An mpmath matrix of the exact values of floats, of nested sequences or of a tensor."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, mp.matrix):
        return values
    return mp.matrix([[mp.mpf(x) for x in row] for row in values])


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


# Clocks: B(s, t), the integral of the rate over [s, t] -----------------------------------------


def constant_clock(rate: float) -> Clock:
    """Rate beta."""
    return lambda s, t: mp.mpf(rate) * (t - s)


def linear_clock(first: float, last: float) -> Clock:
    """Rate first + (last - first) t."""

    def clock(s: Any, t: Any) -> Any:
        slope = mp.mpf(last) - mp.mpf(first)
        return mp.mpf(first) * (t - s) + slope * (t**2 - s**2) / 2

    return clock


def geometric_clock(first: float, last: float) -> Clock:
    """Rate first (last / first)^t."""

    def clock(s: Any, t: Any) -> Any:
        ratio = mp.mpf(last) / mp.mpf(first)
        return mp.mpf(first) * (ratio**t - ratio**s) / mp.log(ratio)

    return clock


def squared_sine_clock(rate: float, frequency: float) -> Clock:
    """Rate beta (1 + sin^2(omega t))."""

    def clock(s: Any, t: Any) -> Any:
        omega = mp.mpf(frequency)
        wave = (mp.sin(2 * omega * t) - mp.sin(2 * omega * s)) / (4 * omega)
        return mp.mpf(rate) * (3 * (t - s) / 2 - wave)

    return clock


def clock_of(schedule: float | tuple[float, float]) -> Clock:
    """The clock of a number (constant rate) or of a pair of end values (linear rate)."""
    if isinstance(schedule, tuple):
        return linear_clock(*schedule)
    return constant_clock(schedule)


# References ------------------------------------------------------------------------------------


class Reference:
    """A process known exactly; subclasses give `moments`, everything else follows from them."""

    own: Matrix
    """Covariance of z_0 given the data."""

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        """Psi and the noise covariance over [s, t]."""
        raise NotImplementedError

    def transition(self, s: float, t: float) -> Law:
        """Law of z_t given z_s."""
        with mp.workdps(DIGITS):
            psi, noise = self.moments(mp.mpf(s), mp.mpf(t))
            return Law(psi, noise, cholesky(noise))

    def marginal(self, t: float, initial: Any = None) -> Law:
        """Law of z_t given the mean of z_0, whose covariance is `initial` (None: its own)."""
        with mp.workdps(DIGITS):
            psi, noise = self.moments(mp.mpf(0), mp.mpf(t))
            start = self.own if initial is None else matrix(initial)
            sigma = psi * start * psi.T + noise
            return Law(psi, sigma, cholesky(sigma))


class Scalar(Reference):
    """One component, by closed forms for the mean factor and the variance."""

    def __init__(
        self, mean: Callable[[Any, Any], Any], variance: Callable[[Any, Any], Any], own: Any = 0
    ) -> None:
        self._mean, self._variance = mean, variance
        self.own = mp.matrix([[own]])

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        return mp.matrix([[self._mean(s, t)]]), mp.matrix([[self._variance(s, t)]])


class Homogeneous(Reference):
    """F = beta(t) A, G G^T = beta(t) Q: Van Loan's block exponential over the clock."""

    def __init__(self, drift: Any, noise: Any, clock: Clock, own: Any = None) -> None:
        with mp.workdps(DIGITS):
            self.drift, self.noise = matrix(drift), matrix(noise)
            k = self.drift.rows
            self.own = mp.zeros(k, k) if own is None else matrix(own)
        self._clock = clock

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        return van_loan(_rows(self.drift), _rows(self.noise), self._clock(s, t))


class Polynomial(Reference):
    """F(t) = sum F_i t^i and G(t) = sum G_i t^i: power series of the moment equations."""

    def __init__(self, drift: Sequence[Any], diffusion: Sequence[Any], own: Any = None) -> None:
        with mp.workdps(DIGITS):
            self._drift = [matrix(m) for m in drift]
            root = [matrix(m) for m in diffusion]
            k = self._drift[0].rows
            self._noise = [mp.zeros(k, k) for _ in range(2 * len(root) - 1)]
            for i, left in enumerate(root):
                for j, right in enumerate(root):
                    self._noise[i + j] += left * right.T
            self.own = mp.zeros(k, k) if own is None else matrix(own)

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        # The terms rise to e^{|F| h} before they fall: that many more digits are carried.
        size = mp.fsum(mp.mnorm(m, 1) for m in self._drift) * (t - s)
        with mp.workdps(DIGITS + int(2 * size) + 10):
            return self._series(s, t - s)

    def _series(self, s: Any, h: Any) -> tuple[Matrix, Matrix]:
        # x = (u - s) / h runs over [0, 1]; the sums of the coefficients in x are the values at t.
        drift = [m * h for m in _recentred(self._drift, s, h)]
        noise = [m * h for m in _recentred(self._noise, s, h)]
        k = drift[0].rows
        psi, cov = [mp.eye(k)], [mp.zeros(k, k)]
        smallest = mp.mpf(10) ** (-2 * DIGITS)
        quiet = 0
        while quiet <= len(drift) + len(noise):
            n = len(psi) - 1
            rate, gain = mp.zeros(k, k), noise[n] if n < len(noise) else mp.zeros(k, k)
            for j, f in enumerate(drift[: n + 1]):
                rate += f * psi[n - j]
                half = f * cov[n - j]
                gain = gain + half + half.T
            psi.append(rate / (n + 1))
            cov.append(gain / (n + 1))
            last = mp.mnorm(psi[-1], 1) + mp.mnorm(cov[-1], 1)
            quiet = quiet + 1 if last < smallest else 0
        return sum(psi[1:], psi[0]), sum(cov[1:], cov[0])


class MovingFrame(Reference):
    """z = exp(t S) y, where y is `Homogeneous`: exact, though F(t) commutes with no F(u).

    F(t) = S + beta(t) E A E^-1 and G(t) = sqrt(beta(t)) E Q_root, with E = exp(t S).
    """

    def __init__(self, frame: Any, process: Homogeneous) -> None:
        with mp.workdps(DIGITS):
            self._frame = matrix(frame)
        self._process = process
        self.own = process.own

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        psi, noise = self._process.moments(s, t)
        there, back = mp.expm(self._frame * t), mp.expm(self._frame * -s)
        return there * psi * back, there * noise * there.T


def van_loan(drift: Rows, noise: Rows, clock: Any) -> tuple[Matrix, Matrix]:
    """exp(A B) and the integral of exp(A u) Q exp(A u)^T over [0, B] (Van Loan 1978)."""
    return _van_loan(drift, noise, clock)


@functools.cache
def _van_loan(drift: Rows, noise: Rows, clock: Any) -> tuple[Matrix, Matrix]:
    a, q = mp.matrix(drift), mp.matrix(noise)
    k = a.rows
    # exp(-A B) grows as fast as exp(A B) decays: their product needs 2 |A| B / ln 10 more digits.
    growth = mp.mnorm(a, "f") * clock
    with mp.workdps(DIGITS + int(2 * growth / math.log(10)) + 10):
        block = mp.zeros(2 * k, 2 * k)
        block[:k, :k] = -a * clock
        block[:k, k:] = q * clock
        block[k:, k:] = a.T * clock
        exponential = mp.expm(block)
        psi = exponential[k:, k:].T
        sigma = psi * exponential[:k, k:]
        return psi, (sigma + sigma.T) / 2


def _rows(m: Matrix) -> Rows:
    return tuple(tuple(row) for row in m.tolist())


def _recentred(coefficients: Sequence[Matrix], s: Any, h: Any) -> list[Matrix]:
    """Coefficients in x of sum_i C_i (s + h x)^i."""
    k = coefficients[0].rows
    moved = [mp.zeros(k, coefficients[0].cols) for _ in coefficients]
    for i, c in enumerate(coefficients):
        for j in range(i + 1):
            moved[j] += c * (mp.binomial(i, j) * s ** (i - j) * h**j)
    return moved


# The processes of the package ------------------------------------------------------------------


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Reference:
    """dx = -beta/2 x dt + sqrt(beta) dw, beta linear."""
    clock = linear_clock(beta_min, beta_max)
    return Scalar(lambda s, t: mp.exp(-clock(s, t) / 2), lambda s, t: 1 - mp.exp(-clock(s, t)))


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Reference:
    """The drift of VP, with g^2 = beta (1 - exp(-2 B(0, t)))."""
    clock = linear_clock(beta_min, beta_max)

    def variance(s: Any, t: Any) -> Any:
        # With b = B(0, u): integral of e^{b - b_t} (1 - e^{-2 b}) db from b_s to b_t.
        first, last = clock(mp.mpf(0), s), clock(mp.mpf(0), t)
        return 2 * mp.exp(-last) * (mp.cosh(last) - mp.cosh(first))

    return Scalar(lambda s, t: mp.exp(-clock(s, t) / 2), variance)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Reference:
    """dx = sqrt(2 log(sigma_max/sigma_min)) sigma(t) dw, geometric; own variance sigma_min^2."""
    with mp.workdps(DIGITS):
        low, high = mp.mpf(sigma_min), mp.mpf(sigma_max)
        ratio, own = high / low, low**2
    return Scalar(
        lambda s, t: mp.mpf(1), lambda s, t: own * (ratio ** (2 * t) - ratio ** (2 * s)), own
    )


def cld(
    beta: float | tuple[float, float] = 4.0,
    mass: float = 0.25,
    friction: float = 1.0,
    velocity_scale: float = 0.04,
    position_noise: float = 0.0,
) -> Homogeneous:
    """A = [[0, 1/M], [-1, -Gamma/M]], Q = diag(eps^2, 2 Gamma); v_0 has variance gamma M."""
    with mp.workdps(DIGITS):
        m, gamma, eps = mp.mpf(mass), mp.mpf(friction), mp.mpf(position_noise)
        return Homogeneous(
            [[0, 1 / m], [-1, -gamma / m]],
            [[eps**2, 0], [0, 2 * gamma]],
            clock_of(beta),
            [[0, 0], [0, mp.mpf(velocity_scale) * m]],
        )


def psld(
    beta: float | tuple[float, float] = 8.0,
    gamma: float = 0.01,
    nu: float = 4.01,
    mass: float = 0.25,
    velocity_scale: float = 0.04,
) -> Homogeneous:
    """A = [[-Gamma, 1/M], [-1, -nu]] / 2, Q = diag(Gamma, M nu); v_0 has variance gamma M."""
    with mp.workdps(DIGITS):
        m, g, n = mp.mpf(mass), mp.mpf(gamma), mp.mpf(nu)
        return Homogeneous(
            [[-g / 2, 1 / (2 * m)], [-mp.mpf(1) / 2, -n / 2]],
            [[g, 0], [0, m * n]],
            clock_of(beta),
            [[0, 0], [0, mp.mpf(velocity_scale) * m]],
        )


def hold(
    beta: float | tuple[float, float] = 4.0,
    coupling: float = 2 * math.sqrt(2),
    friction: float = 3 * math.sqrt(3),
    inverse_mass: float = 1.0,
    auxiliary_scale: float = 0.04,
) -> Homogeneous:
    """A = [[0, 1, 0], [-1, 0, g], [0, -g, -xi]], Q = diag(0, 0, 2 xi / L), L the inverse mass."""
    with mp.workdps(DIGITS):
        g, xi, variance = mp.mpf(coupling), mp.mpf(friction), 1 / mp.mpf(inverse_mass)
        start = mp.mpf(auxiliary_scale) * variance
        return Homogeneous(
            [[0, 1, 0], [-1, 0, g], [0, -g, -xi]],
            [[0, 0, 0], [0, 0, 0], [0, 0, 2 * xi * variance]],
            clock_of(beta),
            [[0, 0, 0], [0, start, 0], [0, 0, start]],
        )


def from_matrices(drift: Any, noise_root: Any, clock: Clock) -> Homogeneous:
    """F = beta(t) A, G = sqrt(beta(t)) Q_root."""
    with mp.workdps(DIGITS):
        root = matrix(noise_root)
        return Homogeneous(drift, root * root.T, clock)
