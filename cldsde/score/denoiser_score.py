r"""Score of any linear SDE from a denoiser D(u, σ).

One combination of the components is a sufficient statistic of the state for the data,

.. math:: û = \frac{ψ^⊤ Σ^{-1} z}{ψ^⊤ Σ^{-1} ψ} = x_0 + σ n, \qquad σ = e^{-κ(t)},

with κ = ½ log SNR (`LinearSDE.log_snr`). So E[x_0 | z_t] = D(û, σ), and one denoiser
D(u, σ) = E[x_0 | x_0 + σn = u] serves all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, check_callable, check_state
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.checks import two_increasing
from cldsde.score.conversion import Conversion, whiten
from cldsde.score.noise_levels import outside_levels
from cldsde.score.times import coefficients_at, with_known

__all__ = ["DenoiserScore"]


class _Rows(NamedTuple):
    """Coefficients of a `DenoiserScore` at times ``*``."""

    estimate: Tensor  # (*, 1, k), maps the state to û
    level: Tensor  # (*), σ
    state: Tensor  # (*, d, k)
    value: Tensor  # (*, d, 1)


class DenoiserScore(nn.Module):
    r"""Score of any linear SDE from a denoiser, such as an EDM or k-diffusion model.

    .. math:: s = −Σ_t^{-1}\,(z − ψ\,D(û, σ)), \qquad û = ψ^⊤Σ_t^{-1}z / ψ^⊤Σ_t^{-1}ψ, \quad
              σ = e^{-κ(t)}

    with κ = ½ log SNR (`LinearSDE.log_snr`). The denoiser may have been trained with any other
    process. The conversion is exact, and one score evaluation evaluates the denoiser once.

    Parameters
    ----------
    denoiser
        Function denoiser(u, sigma, \*\*conditions) of ``(B, *D)`` and ``(B,)`` that returns an
        estimate of the data ``(B, *D)``; see `Denoiser`. Times are converted to noise levels.
    sde
        The process to sample with.
    noise_levels
        Smallest and largest σ that the denoiser was trained on. None: the denoiser's attribute
        ``noise_levels``, or any level if it has none.

    Raises
    ------
    TypeError
        If ``denoiser`` is not callable or ``sde`` is not a process.
    ValueError
        If ``noise_levels`` are not two increasing numbers ≥ 0.

    Notes
    -----
    ``score(z, t, **conditions)`` passes conditions, such as class labels, to the denoiser. For a
    solver, wrap the score and its conditions in a `ConditionalScore`.

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

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        sde: LinearSDE,
        *,
        noise_levels: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_process(sde)
        check_callable(denoiser, "denoiser", "a callable denoiser(u, sigma)")
        self.denoiser = denoiser
        self.sde = sde
        found = noise_levels
        if found is None:
            found = getattr(denoiser, "noise_levels", None)
        self.noise_levels = None if found is None else two_increasing(found, "noise_levels")
        if self.noise_levels is not None and self.noise_levels[0] < 0:
            msg = f"noise_levels must be at least 0; got {self.noise_levels}"
            raise ValueError(msg)

    @property
    def fills(self) -> bool:
        """Whether the denoiser adds noise that depends on a sample's place in the batch."""
        return bool(getattr(self.denoiser, "fills", False))

    def extra_repr(self) -> str:
        """Process and levels, for the representation."""
        return f"sde={self.sde!r}, noise_levels={self.noise_levels}"

    def forward(self, z: Tensor, t: TimeLike, **conditions: Any) -> Tensor:
        """Score of the driven components, ``(B, len(driven), *D)``.

        Parameters
        ----------
        z
            States ``(B, k, *D)``.
        t
            One time or ``(B,)``, above 0.
        conditions
            Passed to the denoiser.

        Raises
        ------
        ValueError
            If the noise level at a time lies outside of the denoiser's, or the denoiser returns
            another shape. The levels of all times that a solver knows are checked before the first
            evaluation.
        """
        check_state(z, self.sde.components)
        dtype = torch.promote_types(z.dtype, torch.float32)
        rows = coefficients_at(self, t, z, self._rows, dtype, 0)
        u = apply_blocks(rows.estimate, z)[:, 0]
        # Copy the levels, because the denoiser may change them in place.
        sigma = with_known(rows.level.expand(len(z)).clone(), t, self, self._sigma)
        data = self.denoiser(u, sigma, **conditions)
        if not isinstance(data, Tensor) or data.shape != u.shape:
            got = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
            msg = f"denoiser must return a tensor like its input, {tuple(u.shape)}; got {got}"
            raise ValueError(msg)
        data = data.to(z.dtype).unsqueeze(1)
        return apply_blocks(rows.state, z) + apply_blocks(rows.value, data)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if the noise level at a time, ``(n,)`` float64, is out of range.

        `cldsde.solvers.plan` calls it with the times of a grid.
        """
        self._sigma(t)

    def _rows(self, t: Tensor) -> _Rows:
        whitened = whiten(self.sde, self.sde.marginal(t), t)
        score = Conversion.at(self.sde, t, "data", "score")
        information = whitened.information()[..., None, None]
        estimate = whitened.signal.mT @ whitened.inverse / information
        return _Rows(estimate, self._sigma(t), score.state, score.value)

    def _sigma(self, t: Tensor) -> Tensor:
        """Noise levels of times; raise if one is outside of the denoiser's range."""
        sigma = (-self.sde.log_snr(t)).exp()
        if not bool(sigma.isfinite().all()):
            msg = (
                f"t must be at most {self.sde.regular_until:.6g}, because the noise level at "
                f"t = {float(t.max()):g} is infinite: start earlier"
            )
            raise ValueError(msg)
        if self.noise_levels is None or not sigma.numel():
            return sigma
        low, high = self.noise_levels
        outside = outside_levels(sigma, low, high)
        if bool(outside.any()):
            raise ValueError(self._out_of_range(t[outside][0], sigma[outside][0]))
        return sigma.clamp(low, high)

    def _out_of_range(self, t: Tensor, sigma: Tensor) -> str:
        assert self.noise_levels is not None
        bounds = torch.tensor(self.noise_levels, dtype=torch.float64, device="cpu")
        end, start = times_of_log_snr(self.sde, -bounds.clamp(1e-300, 1e300).log()).tolist()
        low, high = self.noise_levels
        return (
            f"the noise level at t must be one that the denoiser was trained on, {low:.6g} to "
            f"{high:.6g}; got σ = {float(sigma):.6g} at t = {float(t):.6g}. Sample from "
            f"t = {start:.6g} down to t = {end:.6g}"
        )
