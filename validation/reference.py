"""Reference solutions that do not use the package's kernels.

They use only F, G and the distribution of z_0 of a process. Transition matrices, covariances and
flows are integrated from their differential equations, with scipy's method of order 8 at a
tolerance near rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cldsde.linear import LinearSDE

from .plain import Array
from .problems import Problem

_TOLERANCE = 1e-13


def dop853(
    slope: Callable[[float, Array], Array], s: float, t: float, start: Array, *, atol: float
) -> Array:
    """Solution at t of a differential equation from s, by scipy's method of order 8."""
    from scipy.integrate import solve_ivp  # imported here because it is slow to import

    found = solve_ivp(
        lambda time, y: slope(time, y.reshape(start.shape)).flatten(),
        (s, t),
        start.flatten(),
        method="DOP853",
        rtol=_TOLERANCE,
        atol=atol,
    )
    end: Array = found.y[:, -1].reshape(start.shape).copy()
    return end


def _moments(
    sde: LinearSDE, start: tuple[Array, Array], s: float, at: Array, *, flow: bool = False
) -> tuple[Array, Array]:
    """Covariances, and columns that follow the mean or the probability flow, from those at s."""
    k = sde.components

    def slope(time: float, y: Array) -> Array:
        t = torch.tensor(min(max(time, 0.0), 1.0), dtype=torch.float64, device="cpu")
        F, G = sde.drift(t).numpy(), sde.diffusion(t).numpy()
        noise, moved = G @ G.T, F @ y[:, :k]
        drift = F + noise @ np.linalg.inv(y[:, :k]) / 2 if flow else F
        return np.concatenate([moved + moved.T + noise, drift @ y[:, k:]], axis=1)

    found, now = [np.concatenate(start, axis=1)], s
    # Solve up to each time, because interpolation between steps would lose two or three digits.
    for stop in at:
        found.append(dop853(slope, now, stop, found[-1], atol=_TOLERANCE * 1e-3))
        now = stop
    moments = np.stack(found[1:])
    return moments[:, :, :k], moments[:, :, k:]


def reference_kernel(sde: LinearSDE, s: float, t: float) -> tuple[Tensor, Tensor]:
    r"""Reference transition matrix and covariance of z_t given z_s, from differential equations.

    .. math:: \dotΨ = FΨ, \qquad \dot Q = FQ + QF^⊤ + GG^⊤

    Ψ and Q are ``(k, k)`` float64. The times are numbers s < t. :doc:`/how-to/declare-a-process`
    compares a kernel with them.
    """
    k = sde.components
    covariance, psi = _moments(sde, (np.zeros((k, k)), np.eye(k)), s, np.array([t]))
    return torch.from_numpy(psi[0].copy()), torch.from_numpy(covariance[0].copy())


class GaussianReference:
    r"""Reference moments and probability flow for Gaussian data of one dimension, at given times.

    .. math::
        m_t = Ψ(t, 0)\,m_0, \qquad Σ_t = Ψ Σ_0 Ψ^⊤ + Q, \qquad
        z_u = m_u + Φ(u, t)(z_t − m_t), \qquad
        \dotΦ = \bigl(F + \tfrac12 G G^⊤ Σ^{-1}\bigr) Φ

    Parameters
    ----------
    problem
        A problem with Gaussian data of one dimension; ValueError otherwise.
    times
        Times in (0, T] of the answers.
    """

    def __init__(self, problem: Problem, times: Tensor) -> None:
        if not problem.exact:
            msg = f"problem must have Gaussian data of one dimension; got {problem.name!r}"
            raise ValueError(msg)
        self.problem = problem
        sde, k = problem.sde, problem.sde.components
        self._times = np.unique(times.tolist())
        self._index = {t: i for i, t in enumerate(self._times.tolist())}
        covariance = sde.initial_covariance.numpy().copy()
        covariance[0, 0] += float(problem.data.covariances[0, 0, 0])
        mean = np.zeros((k, 1))
        mean[0] = float(problem.data.means[0, 0])
        self._covariance, self._mean = _moments(sde, (covariance, mean), 0.0, self._times)

    @functools.cached_property
    def _flow(self) -> Array:
        """Φ from the first time to each, computed on first use: many need the moments only."""
        sde, at = self.problem.sde, self._times
        start = self._covariance[0], np.eye(sde.components)
        return _moments(sde, start, at[0], at, flow=True)[1]

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean ``(k, 1)`` and covariance ``(k, k)`` at a time."""
        i = self._position(t)
        return torch.from_numpy(self._mean[i].copy()), torch.from_numpy(self._covariance[i].copy())

    def _position(self, t: float) -> int:
        if float(t) not in self._index:
            msg = f"t must be one of the {len(self._times)} times of this reference; got {t!r}"
            raise ValueError(msg)
        return self._index[float(t)]

    def flow(self, z: Tensor, t: float, u: float) -> Tensor:
        """Exact probability flow of states ``(B, k, 1)`` from t to u."""
        before, after = self.moments(t)[0], self.moments(u)[0]
        i, j = self._position(t), self._position(u)
        move = torch.from_numpy(self._flow[j] @ np.linalg.inv(self._flow[i]))
        return after + move @ (z - before)
