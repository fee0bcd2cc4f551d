r"""The denoiser inside a score: what was learnt with one process, for every other.

A state that agrees with data plus noise, u = x_0 + σ n, is

.. math:: z = ψ u + L P ξ, \qquad P = I − w w^⊤ / w^⊤ w, \quad w = L^{-1} ψ,

at the time of the noise level σ: its best estimate of the data is u, and the rest is noise that
tells nothing of the data. The score at z gives E[x_0 | z] = D(u, σ). An exact score gives the same
for every ξ. A network that was trained on states needs the noise: without it, or with one pattern
for all samples, it sees states that it was not trained on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.random import standard_normal
from cldsde.linear.sde import LinearSDE
from cldsde.score.conversion import Conversion, whiten
from cldsde.score.denoisers import read_levels
from cldsde.score.times import coefficients_at, with_known

__all__ = ["ScoreDenoiser"]

_EARLIEST = 1e-5


class _Lift(NamedTuple):
    """Coefficients at noise levels ``*``."""

    time: Tensor  # (*)
    psi: Tensor  # (*, k, 1)
    rest: Tensor  # (*, k, k), L P
    state: Tensor  # (*, 1, k), of the state in the data prediction
    value: Tensor  # (*, 1, d), of the score


class ScoreDenoiser(nn.Module):
    r"""Denoiser D(u, σ) of a score of any linear SDE, to sample with other processes.

    Parameters
    ----------
    score
        score(z, t, \*\*conditions) of the driven components, such as a `MixedScore`.
    sde
        The process of the score. None takes its attribute ``sde``.
    fill
        Whether to add ξ to states of several components. False is for scores that depend on the
        state through its estimate of the data alone, such as exact ones.
    generator
        Source of ξ. None makes one with seed 0 on the device of the first evaluation.

    Raises
    ------
    ValueError
        If the driven score does not determine the data at an evaluation; see `Conversion`.

    Examples
    --------
    The exact score of CLD as a score of VP:

    >>> import torch
    >>> from cldsde import CLD, VPSDE, DenoiserScore, GaussianMixture
    >>> data = GaussianMixture([0.5, 0.5], [[-1.0], [2.0]], [[[0.1]], [[0.2]]])
    >>> vp = VPSDE()
    >>> score = DenoiserScore(ScoreDenoiser(data.score(CLD()), fill=False), vp)
    >>> z = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(5, 1, 1)
    >>> bool(torch.allclose(score(z, 0.3), data.score(vp)(z, 0.3)))
    True
    """

    def __init__(
        self,
        score: Any,
        sde: LinearSDE | None = None,
        *,
        fill: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.score = score
        self.sde: LinearSDE = score.sde if sde is None else sde
        self.fill = fill
        self.generator = generator

    @property
    def levels(self) -> tuple[float, float]:
        """Smallest and largest noise level of the process."""
        ends = torch.tensor([_EARLIEST, self.sde.T], dtype=torch.float64, device="cpu")
        low, high = (-self.sde.log_snr(ends)).exp().tolist()
        return low, high

    def forward(self, u: Tensor, sigma: Tensor | float, **conditions: Any) -> Tensor:
        """Estimate of the data, like ``u``.

        Parameters
        ----------
        u
            Data plus noise of level σ, ``(B, *D)``.
        sigma
            Noise levels, one or ``(B,)``.
        conditions
            Passed to the score.
        """
        dtype = torch.promote_types(u.dtype, torch.float32)
        lift = coefficients_at(self, sigma, u, self._lift, dtype, 0, read_levels)
        z = apply_blocks(lift.psi, u.unsqueeze(1))
        if self.fill and self.sde.components > 1:
            z = z + apply_blocks(lift.rest, self._noise(z))
        t = with_known(lift.time.expand(len(u)), sigma, self, self._times)
        score = self.score(z, t, **conditions)
        return (apply_blocks(lift.state, z) + apply_blocks(lift.value, score))[:, 0]

    def _noise(self, z: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(z.device).manual_seed(0)
        return standard_normal(z.shape, generator=self.generator, dtype=z.dtype, device=z.device)

    def _times(self, levels: Tensor) -> Tensor:
        return times_of_log_snr(self.sde, -levels.log(), eps=_EARLIEST)

    def _lift(self, levels: Tensor) -> _Lift:
        t = self._times(levels)
        kernel = self.sde.marginal(t)
        law = whiten(self.sde, kernel, t)
        data = Conversion.at(self.sde, t, "score", "data")
        k = self.sde.components
        # û = wᵀL⁻¹z/q takes L P ξ to 0.
        estimate = law.signal.mT @ law.inverse / law.information()[..., None, None]
        eye = torch.eye(k, dtype=torch.float64, device="cpu")
        rest = (eye - law.psi @ estimate) @ kernel.root
        return _Lift(t, law.psi, rest, data.state, data.value)
