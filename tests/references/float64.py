"""Linear processes with Gaussian data in float64, from matrix exponentials.

The data are N(m_0, v_0) per dimension.  Times may be arrays; matrices follow their axes.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from references.kernels import Clock, Homogeneous

Array = np.ndarray[Any, np.dtype[np.float64]]


class Dense(NamedTuple):
    """F = beta A, G = sqrt(beta) Q_root; ``auxiliary``: covariance of z_0 given the data."""

    A: Array
    Q_root: Array
    clock: Clock
    auxiliary: Array
    data_mean: float = 0.3
    data_variance: float = 0.25

    @property
    def Q(self) -> Array:  # noqa: N802
        return self.Q_root @ self.Q_root.T

    def psi(self, s: Any, t: Any) -> Array:
        """Transition matrix from s to t, also backwards."""
        b = np.asarray(self.clock.integral(np.asarray(s), np.asarray(t)), dtype=float)
        result: Array = expm(self.A * b[..., None, None])
        return result

    def mean(self, t: Any) -> Array:
        """Of z_t, shape (..., k)."""
        return self.data_mean * self.psi(np.zeros_like(np.asarray(t, dtype=float)), t)[..., 0]

    def covariance(self, t: Any) -> Array:
        """Of z_t: (vec Sigma, 1) obeys a linear equation with a constant matrix."""
        k = len(self.A)
        lyapunov = np.zeros((k * k + 1, k * k + 1))
        lyapunov[:-1, :-1] = np.kron(self.A, np.eye(k)) + np.kron(np.eye(k), self.A)
        lyapunov[:-1, -1] = self.Q.ravel()
        initial = self.auxiliary.copy()
        initial[0, 0] += self.data_variance
        b = np.asarray(self.clock.integral(np.asarray(0.0), np.asarray(t)), dtype=float)
        state = expm(lyapunov * b[..., None, None]) @ np.append(initial.ravel(), 1.0)
        result: Array = state[..., :-1].reshape(*np.shape(t), k, k)
        return result

    def given(self, t: Any) -> Array:
        """Covariance of z_t given the data."""
        return self._replace(data_variance=0.0).covariance(t)

    def slope(self, t: float) -> Array:
        """Matrix of the probability flow about the mean, F + G G^T Sigma^-1 / 2."""
        pull = self.Q @ np.linalg.inv(self.covariance(t)) / 2
        result: Array = self.clock.rate(t) * (self.A + pull)
        return result

    def velocity(self, t: float, z: Array) -> Array:
        """Of the probability flow, for states (B, k, D)."""
        m = self.mean(t)[:, None]
        result: Array = self.clock.rate(t) * (self.A @ m) + self.slope(t) @ (z - m)
        return result

    def flow(self, t: float, *ends: float) -> Array:
        """Matrices of the probability flow about the mean, from t to each of the ends in order."""
        k = len(self.A)
        rate = lambda u, y: (self.slope(u) @ y.reshape(k, k)).ravel()  # noqa: E731
        start, span = np.eye(k).ravel(), (t, ends[-1])
        solution = solve_ivp(rate, span, start, "DOP853", ends, rtol=1e-13, atol=1e-14)
        assert solution.success
        result: Array = solution.y.T.reshape(-1, k, k)
        return result

    def joint_root(self, s: Any, t: Any, nodes: int = 16) -> Array:
        """Lower root of the joint covariance of W_t - W_s and of the integral of Psi(t, u) G dW.

        By Gauss-Legendre quadrature and a QR factorisation, (..., r + k, r + k).
        """
        s, t = np.asarray(s)[..., None], np.asarray(t)[..., None]
        x, weights = np.polynomial.legendre.leggauss(nodes)
        u = s + (t - s) * (x + 1) / 2
        rate = np.sqrt(self.clock.rate(u))[..., None, None]
        integrand = rate * (self.psi(u, np.broadcast_to(t, u.shape)) @ self.Q_root)
        r = self.Q_root.shape[1]
        eye = np.broadcast_to(np.eye(r), (*u.shape, r, r))
        columns = np.concatenate([eye, integrand], axis=-2)
        columns = columns * np.sqrt((t - s) * weights / 2)[..., None, None]
        rows = columns.swapaxes(-1, -2).reshape(*u.shape[:-1], -1, columns.shape[-2])
        root: Array = np.linalg.qr(rows).R.swapaxes(-1, -2)
        return root


def dense(reference: Homogeneous) -> Dense:
    """The float64 form of a process of `kernels`, as in ``dense(cld((1.0, 7.0)))``."""
    A, Q_root, own = (
        np.array(m.tolist(), dtype=float) for m in (reference.A, reference.Q_root, reference.own)
    )
    return Dense(A, Q_root, reference.clock, own)
