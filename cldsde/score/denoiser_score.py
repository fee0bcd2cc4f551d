r"""Score of any linear SDE from a denoiser D(u, σ) = E[x_0 | x_0 + σn = u], and the converse.

A network trained with one process so samples with any other. Given noisy data u = x_0 + σ n, a
state at the time of the noise level σ is

.. math:: z = ψ u + L P ξ, \qquad P = I − w w^⊤ / w^⊤ w, \quad w = L^{-1} ψ.

Its best estimate of the data is u, and LPξ is independent of the data. The score at z gives
E[x_0 | z] = D(u, σ). An exact score gives the same for every ξ. A network needs one ξ per sample,
or it gets states that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import LevelLike, TimeLike, check_state, shaped, two_increasing
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.random import standard_normal
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import whiten
from cldsde.score.denoisers import Denoiser, as_denoiser, checked_levels, outside_levels
from cldsde.score.protocol import Score, as_score
from cldsde.score.times import PlannedTime, coefficients_at

# Noise level in place of infinity, for denoisers that know it: data of a standard deviation of 1
# are invisible in single precision.
_ALL_NOISE = 1e8


class _Rows(NamedTuple):
    """Coefficients of a `DenoiserScore` at times ``*``."""

    estimate: Tensor  # (*, 1, k), maps the state to û
    level: Tensor  # (*), σ
    state: Tensor  # (*, d, k)
    value: Tensor  # (*, d, 1)


class DenoiserScore(Score):
    r"""Score of any linear SDE from a denoiser, such as an EDM or k-diffusion model.

    .. math:: s = −Σ_t^{-1}\,(z − ψ\,D(û, σ)), \qquad û = ψ^⊤Σ_t^{-1}z / ψ^⊤Σ_t^{-1}ψ, \quad
              σ = e^{-κ(t)}

    with κ = ½ log SNR (`LinearSDE.kappa`). û = x_0 + σ n is a sufficient statistic of the state
    for the data, so E[x_0 | z_t] = D(û, σ). The denoiser may have been trained with any other
    process. The conversion is exact, and one score evaluation evaluates the denoiser once.

    Parameters
    ----------
    denoiser
        Function denoiser(u, sigma, \*\*conditions) of ``(B, *D)`` and ``(B,)`` that returns an
        estimate of the data ``(B, *D)``, such as an EDM or k-diffusion model or a `Denoiser`. A
        module gets data in the precision of its parameters, a function single precision at least.
    sde
        The process to sample with.
    noise_levels
        Smallest and largest σ that the denoiser was trained on. None: the levels of a `Denoiser`,
        or any level for other functions.

    Raises
    ------
    TypeError, ValueError
        If ``denoiser`` is not callable, ``sde`` is not a process, or ``noise_levels`` are not two
        increasing numbers ≥ 0.

    Examples
    --------
    Normal data of variance 4, sampled with critically damped Langevin dynamics:

    >>> import torch, cldsde
    >>> def denoiser(u, sigma):
    ...     return u * (4 / (4 + sigma**2)).unsqueeze(1)
    >>> sde = cldsde.CLD()
    >>> x = cldsde.sample(sde, DenoiserScore(denoiser, sde), (2000, 3))
    >>> bool((x.var(0) - 4).abs().max() < 0.6)
    True
    """

    predicts_data = True
    sde: LinearSDE

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        sde: LinearSDE,
        *,
        noise_levels: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_process(sde)
        self.denoiser = as_denoiser(denoiser)
        self.sde = sde
        levels = self.denoiser.noise_levels if noise_levels is None else noise_levels
        self.noise_levels = None if levels is None else two_increasing(levels, "noise_levels")
        if self.noise_levels is not None and self.noise_levels[0] < 0:
            raise ValueError(f"noise_levels must be at least 0; got {self.noise_levels}")
        self.depends_on_place = self.denoiser.depends_on_place
        self.shared_conditions = self.denoiser.shared_conditions

    def extra_repr(self) -> str:
        """Process and levels, for the representation."""
        return f"sde={self.sde!r}, noise_levels={self.noise_levels}"

    def forward(
        self, z: Tensor, t: TimeLike, *, planned: PlannedTime | None = None, **conditions: Any
    ) -> Tensor:
        """Score of the driven components, ``(B, len(driven), *D)``; see `Score` for the arguments.

        ``t`` may be one time for all, above 0. Conditions, such as class labels, are passed to the
        denoiser. A solver passes none: give it a `ConditionalScore`. A ValueError is raised if the
        denoiser returns another shape, or if the noise level at a time lies outside of the
        denoiser's. Solvers check the levels before the first evaluation.
        """
        wide, rows, data = self._denoised(z, t, planned, **conditions)
        return (apply_blocks(rows.state, wide) + apply_blocks(rows.value, data)).to(z.dtype)

    def data_prediction(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """The denoiser's own estimate of the data, ``(B, *D)``; see `forward`."""
        return self._denoised(z, t, **options)[2][:, 0].to(z.dtype)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if the noise level at a time, ``(n,)`` float64, is out of range."""
        self.denoiser.check_times(self._sigma(t))

    @property
    def evaluates_once(self) -> bool:
        """Whether the denoiser is evaluated once at every time."""
        return type(self).evaluations is DenoiserScore.evaluations and self.denoiser.evaluates_once

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each time."""
        if self.evaluates_once:
            return super().evaluations(t)
        sigma = (-self.sde.kappa(t)).exp()
        known = self.noise_levels
        return self.denoiser.evaluations(sigma if known is None else sigma.clamp(*known))

    def _denoised(
        self, z: Tensor, t: TimeLike, planned: PlannedTime | None = None, **conditions: Any
    ) -> tuple[Tensor, _Rows, Tensor]:
        """States in single precision at least, coefficients, and the estimate ``(B, 1, *D)``."""
        check_state(z, self.sde.components)
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        rows = coefficients_at(self, t, z, self._rows, wide.dtype, planned=planned)
        u = apply_blocks(rows.estimate, wide)[:, 0]
        # Copy the levels, because the denoiser may change them in place.
        sigma = rows.level.expand(len(z)).clone()
        at = planned and planned.mapped(t, self, self._sigma, sigma)
        data = self.denoiser(u, sigma, planned=at, **conditions)
        if not isinstance(data, Tensor) or data.shape != u.shape:
            raise ValueError(
                f"denoiser must return a tensor like its input, {tuple(u.shape)}; "
                f"got {shaped(data)}"
            )
        return wide, rows, data.to(wide.dtype).unsqueeze(1)

    def _rows(self, t: Tensor) -> _Rows:
        whitened = whiten(self.sde, self.sde.marginal(t), t)
        score, information = whitened.convert("data", "score"), whitened.information()
        level = self._checked(information.rsqrt(), t)
        # At infinite noise the state of one component is its noise, and û = σ n for a large σ.
        noise = level[..., None, None] * whitened.inverse[..., :1, :]
        estimate = torch.where(information[..., None, None] == 0, noise, whitened.estimate())
        return _Rows(estimate, level, score.state, score.value)

    def _sigma(self, t: Tensor) -> Tensor:
        """Noise levels of times; raise if one is outside of the denoiser's range."""
        return self._checked((-self.sde.kappa(t)).exp(), t)

    def _checked(self, sigma: Tensor, t: Tensor) -> Tensor:
        if not bool(sigma.isfinite().all()):
            known = self.noise_levels is not None and self.noise_levels[1] == torch.inf
            if not (known and self.sde.components == 1):
                raise ValueError(
                    f"t must be earlier than {float(t[~sigma.isfinite()].min()):.6g}, because the "
                    f"noise level is infinite there; take t ≤ {self.sde.regular_until:.15g}"
                )
            sigma = sigma.clamp(max=_ALL_NOISE)
        if self.noise_levels is None or not sigma.numel():
            return sigma
        low, high = self.noise_levels
        outside = outside_levels(sigma, low, high)
        if bool(outside.any()):
            bounds = torch.tensor([low, high], dtype=torch.float64, device="cpu")
            end, start = times_of_kappa(self.sde, -bounds.clamp(1e-300, 1e300).log()).tolist()
            raise ValueError(
                f"the noise level at t must be one that the denoiser was trained on, {low:.6g} to "
                f"{high:.6g}; got σ = {float(sigma[outside][0]):.6g} at t = "
                f"{float(t[outside][0]):.6g}. Sample from t = {start:.6g} down to t = {end:.6g}"
            )
        return sigma.clamp(low, high)


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
        low, high = (-self.sde.kappa(ends)).exp().tolist()
        known = self.score.noise_levels or (low, high)
        self.noise_levels: tuple[float, float] = max(low, known[0]), min(high, known[1])

    def forward(
        self, u: Tensor, sigma: LevelLike, *, planned: PlannedTime | None = None, **conditions: Any
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
        return times_of_kappa(self.sde, -known.log(), eps=self.start)

    def _lift(self, levels: Tensor) -> _Lift:
        t = self._times(levels)
        kernel = self.sde.marginal(t)
        whitened = whiten(self.sde, kernel, t)
        data = whitened.convert("score", "data")
        # û maps L P ξ to 0.
        eye = torch.eye(self.sde.components, dtype=torch.float64, device="cpu")
        rest = (eye - whitened.psi @ whitened.estimate()) @ kernel.root
        return _Lift(t, whitened.psi, rest, data.state, data.value)
