"""Score of any linear SDE from a denoiser D(u, σ) = E[x_0 | x_0 + σn = u]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, check_state, shaped, two_increasing
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import whiten
from cldsde.score.denoisers import as_denoiser, outside_levels
from cldsde.score.protocol import Score
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

    with κ = ½ log SNR (`LinearSDE.log_snr`). û = x_0 + σ n is a sufficient statistic of the state
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
    TypeError
        If ``denoiser`` is not callable or ``sde`` is not a process.
    ValueError
        If ``noise_levels`` are not two increasing numbers ≥ 0.

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
        """Score of the driven components, ``(B, len(driven), *D)``.

        Parameters
        ----------
        z, planned
            See `Score`.
        t
            One time or ``(B,)``, above 0.
        conditions
            Passed to the denoiser, such as class labels. A solver passes none: give it a
            `ConditionalScore`.

        Raises
        ------
        ValueError
            If the noise level at a time lies outside of the denoiser's, which solvers check before
            the first evaluation, or the denoiser returns another shape.
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
        sigma = (-self.sde.log_snr(t)).exp()
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
        return self._checked((-self.sde.log_snr(t)).exp(), t)

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
            end, start = times_of_log_snr(self.sde, -bounds.clamp(1e-300, 1e300).log()).tolist()
            raise ValueError(
                f"the noise level at t must be one that the denoiser was trained on, {low:.6g} to "
                f"{high:.6g}; got σ = {float(sigma[outside][0]):.6g} at t = "
                f"{float(t[outside][0]):.6g}. Sample from t = {start:.6g} down to t = {end:.6g}"
            )
        return sigma.clamp(low, high)
