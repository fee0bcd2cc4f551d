r"""Denoiser from a score: a network trained with one process samples with any other.

Given noisy data u = x_0 + σ n, a state at the time of the noise level σ is

.. math:: z = ψ u + L P ξ, \qquad P = I − w w^⊤ / w^⊤ w, \quad w = L^{-1} ψ.

Its best estimate of the data is u, and LPξ is independent of the data. The score at z gives
E[x_0 | z] = D(u, σ). An exact score gives the same for every ξ. A network needs one ξ per sample,
or it gets states that it was not trained on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.random import standard_normal
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import whiten
from cldsde.score.denoisers import Denoiser, checked_levels
from cldsde.score.protocol import as_score
from cldsde.score.times import PlannedTime, coefficients_at


class _Lift(NamedTuple):
    """Coefficients at noise levels ``*``."""

    time: Tensor  # (*)
    psi: Tensor  # (*, k, 1)
    rest: Tensor  # (*, k, k), L P
    state: Tensor  # (*, 1, k), of the state in the data prediction
    value: Tensor  # (*, 1, d), of the score


class ScoreDenoiser(Denoiser):
    r"""Denoiser D(u, σ) from a score of any linear SDE, to sample with other processes.

    Parameters
    ----------
    score
        Function score(z, t, \*\*conditions) of the driven components, such as a `MixedScore`.
    sde
        The process of the score. None: the score's own.
    fill
        Whether to add ξ to states of several components. Use False for scores that depend on the
        state only through its estimate of the data, such as exact scores.
    start
        Smallest time that the score was trained on, 0 < start < T.
    seed
        Seed of ξ. The i-th sample of a batch has the same ξ at every evaluation, so that the
        denoiser is a function of u, σ, the place in the batch and the batch's size.

    Raises
    ------
    TypeError
        If ``score`` is not callable or there is no process.
    ValueError
        If ``start`` is out of range. At an evaluation: if the driven score does not determine the
        data (see `Conversion`), or a noise level lies outside of the process's range.

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
        start: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.score = as_score(score)
        self.sde = check_process(self.score.sde if sde is None else sde)
        if not 0 < start < 1:
            raise ValueError(f"start must lie between 0 and 1; got {start:g}")
        self.start = start
        self.seed = seed
        self._kept: tuple[object, Tensor] | None = None
        self.fills = fill and self.sde.components > 1
        self.depends_on_place = self.fills or self.score.depends_on_place
        self.shared_conditions = self.score.shared_conditions
        ends = torch.tensor([start, 1.0], dtype=torch.float64, device="cpu")
        low, high = (-self.sde.log_snr(ends)).exp().tolist()
        known = self.score.noise_levels or (low, high)
        self.noise_levels: tuple[float, float] = max(low, known[0]), min(high, known[1])

    def forward(
        self,
        u: Tensor,
        sigma: Tensor | float,
        *,
        planned: PlannedTime | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Estimate of the data, like ``u``; see `Denoiser` for the arguments.

        The score gets states in single precision at least, and the conditions.
        """
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        lift = coefficients_at(self, sigma, u, self._lift, wide.dtype, planned=planned, levels=True)
        z = apply_blocks(lift.psi, wide.unsqueeze(1))
        if self.fills:
            z = z + apply_blocks(lift.rest, self._noise(z))
        t = lift.time.expand(len(u)).clone()
        at = planned and planned.mapped(sigma, self, self._times, t)
        if self.score.predicts_data:
            return self.score.data_prediction(z, t, planned=at, **conditions).to(u.dtype)
        score = self.score(z, t, planned=at, **conditions)
        data = apply_blocks(lift.state, z) + apply_blocks(lift.value, score)
        return data[:, 0].to(u.dtype)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if the score cannot be evaluated at a noise level."""
        self.score.check_times(self._times(t))

    @property
    def evaluates_once(self) -> bool:
        """Whether the score is evaluated once at every level."""
        return type(self).evaluations is ScoreDenoiser.evaluations and self.score.evaluates_once

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each noise level."""
        if self.evaluates_once:
            return super().evaluations(t)
        return self.score.evaluations(self._times(t))

    def _noise(self, z: Tensor) -> Tensor:
        """Noise of the seed, drawn on the CPU once per shape, dtype and device of the states."""
        kind = (z.shape, z.dtype, z.device)
        kept = self._kept
        if kept is None or kept[0] != kind:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.inference_mode(False), torch.no_grad():
                drawn = standard_normal(
                    z.shape, generator=generator, dtype=z.dtype, device=z.device
                )
            self._kept = kept = kind, drawn
        return kept[1]

    def _times(self, levels: Tensor) -> Tensor:
        known = checked_levels(levels, *self.noise_levels)
        return times_of_log_snr(self.sde, -known.log(), eps=self.start)

    def _lift(self, levels: Tensor) -> _Lift:
        t = self._times(levels)
        kernel = self.sde.marginal(t)
        whitened = whiten(self.sde, kernel, t)
        data = whitened.convert("score", "data")
        # û maps L P ξ to 0.
        eye = torch.eye(self.sde.components, dtype=torch.float64, device="cpu")
        rest = (eye - whitened.psi @ whitened.estimate()) @ kernel.root
        return _Lift(t, whitened.psi, rest, data.state, data.value)
