"""Reference solutions that do not use the package's kernels.

They use only F, G and the distribution of z_0 of a process. Transition matrices, covariances and
flows are integrated from their differential equations, with scipy's method of order 8 at a
tolerance near rounding.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.linear import LinearSDE

from .problems import Problem

Array = np.ndarray[Any, np.dtype[np.float64]]

_TOLERANCE = 1e-13
_MANY = 64


def _integrate(
    slope: Callable[[float, Array], Array], ends: tuple[float, float], start: Array, at: Array
) -> Array:
    """Solution at increasing times ``at`` within the ends, ``(len(at), *start.shape)``."""
    from scipy.integrate import solve_ivp  # imported here because it is slow to import

    def run(s: float, t: float, state: Array, stops: Array | None = None) -> Array:
        found = solve_ivp(
            lambda time, y: slope(time, y.reshape(start.shape)).flatten(),
            (s, t),
            state,
            t_eval=stops,
            method="DOP853",
            rtol=_TOLERANCE,
            atol=_TOLERANCE * 1e-3,
        )
        solution: Array = found.y
        return solution

    if len(at) > _MANY:
        first = at if at[0] > ends[0] else at[1:]
        states = run(*ends, start.flatten(), first).T.reshape(-1, *start.shape)
        return states if at[0] > ends[0] else np.concatenate([start[None], states])
    # Solve up to each time, because interpolation between steps would lose two or three digits.
    pieces, state, now = [], start.flatten(), ends[0]
    for stop in at:
        if stop > now:
            state, now = run(now, stop, state)[:, -1], stop
        pieces.append(state.reshape(start.shape))
    return np.stack(pieces)


def _coefficients(sde: LinearSDE, t: float) -> tuple[Array, Array]:
    """F and GGᵀ at a time."""
    at = torch.tensor(min(max(t, 0.0), 1.0), dtype=torch.float64, device="cpu")
    F, G = sde.drift(at).numpy(), sde.diffusion(at).numpy()
    return F, G @ G.T


def reference_kernel(sde: LinearSDE, s: float, t: float) -> tuple[Tensor, Tensor]:
    r"""Reference transition matrix and covariance of z_t given z_s, from differential equations.

    .. math:: \dotΨ = FΨ, \qquad \dot Q = FQ + QF^⊤ + GG^⊤

    Parameters
    ----------
    sde
        The process.
    s, t
        Times, s < t.

    Returns
    -------
    psi, covariance : tuple of Tensor
        ``(k, k)`` float64.

    Examples
    --------
    >>> from cldsde import CLD
    >>> psi, Q = reference_kernel(CLD(), 0.2, 0.7)
    >>> float((CLD().transition(0.2, 0.7).covariance - Q).abs().max()) < 1e-11
    True
    """
    k = sde.components

    def slope(time: float, y: Array) -> Array:
        F, noise = _coefficients(sde, time)
        moved = F @ y[1]
        return np.stack([F @ y[0], moved + moved.T + noise])

    start = np.stack([np.eye(k), np.zeros((k, k))])
    found = _integrate(slope, (s, t), start, np.array([t]))[0]
    return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy())


class GaussianReference:
    r"""Reference moments and probability flow for Gaussian data of one dimension, at given times.

    .. math::
        m_t = Ψ(t, 0)\,m_0, \qquad Σ_t = Ψ Σ_0 Ψ^⊤ + Q, \qquad
        z_u = m_u + Φ(u, t)(z_t − m_t), \qquad
        \dotΦ = \bigl(F + \tfrac12 G G^⊤ Σ^{-1}\bigr) Φ

    Parameters
    ----------
    problem
        A problem with Gaussian data of one dimension.
    times
        Times in (0, T] of the answers.

    Raises
    ------
    ValueError
        If the data are not Gaussian of one dimension.

    Examples
    --------
    >>> import torch
    >>> from cldsde.validation import problems
    >>> times = torch.tensor([0.05, 1.0], dtype=torch.float64)
    >>> mean, covariance = GaussianReference(problems()["VP"], times).moments(1.0)
    >>> mean.shape, covariance.shape
    (torch.Size([1, 1]), torch.Size([1, 1]))
    """

    def __init__(self, problem: Problem, times: Tensor) -> None:
        if not problem.exact:
            msg = f"problem must have Gaussian data of one dimension; got {problem.name!r}"
            raise ValueError(msg)
        self.problem = problem
        sde, k = problem.sde, problem.sde.components
        self._times: list[float] = sorted(set(times.tolist()))
        covariance = sde.initial_covariance.numpy().copy()
        covariance[0, 0] += float(problem.data.covariances[0, 0, 0])
        mean = np.zeros((k, 1))
        mean[0] = float(problem.data.means[0, 0])

        def moments(time: float, y: Array) -> Array:
            F, noise = _coefficients(sde, time)
            moved = F @ y[:, :k]
            return np.concatenate([moved + moved.T + noise, F @ y[:, k:]], axis=1)

        at = np.array(self._times)
        start = np.concatenate([covariance, mean], axis=1)
        found = _integrate(moments, (0.0, at[-1]), start, at)
        self._covariance, self._mean = found[:, :, :k], found[:, :, k:]

    @functools.cached_property
    def _flow(self) -> Array:
        """Φ from the first time to each, computed on first use: many need the moments only."""
        sde, k, at = self.problem.sde, self.problem.sde.components, np.array(self._times)

        def flow(time: float, y: Array) -> Array:
            # y holds Σ and Φ from the first time on.
            F, noise = _coefficients(sde, time)
            moved = F @ y[0]
            pull = noise @ np.linalg.inv(y[0]) / 2
            return np.stack([moved + moved.T + noise, (F + pull) @ y[1]])

        start = np.stack([self._covariance[0], np.eye(k)])
        return _integrate(flow, (at[0], at[-1]), start, at)[:, 1]

    def _index(self, t: float) -> int:
        i = bisect.bisect_left(self._times, t)
        if i == len(self._times) or self._times[i] != t:
            msg = f"t must be one of the {len(self._times)} times of this reference; got {t!r}"
            raise ValueError(msg)
        return i

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean ``(k, 1)`` and covariance ``(k, k)`` at a time."""
        i = self._index(t)
        return torch.from_numpy(self._mean[i].copy()), torch.from_numpy(self._covariance[i].copy())

    def flow(self, z: Tensor, t: float, u: float) -> Tensor:
        """Exact probability flow of states ``(B, k, 1)`` from t to u."""
        i, j = self._index(t), self._index(u)
        move = torch.from_numpy(self._flow[j] @ np.linalg.inv(self._flow[i]))
        return self.moments(u)[0] + move @ (z - self.moments(t)[0])
