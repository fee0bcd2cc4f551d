r"""Denoisers D(u, σ) as scores of every linear SDE, and trained networks as denoisers.

One combination of the components is a sufficient statistic of the state for the data,

.. math:: û = \frac{ψ^⊤ Σ^{-1} z}{ψ^⊤ Σ^{-1} ψ} = x_0 + σ n, \qquad σ = e^{-κ(t)},

with κ = ½ log SNR (`LinearSDE.log_snr`). So E[x_0 | z_t] = D(û, σ), and one denoiser
D(u, σ) = E[x_0 | x_0 + σn = u] serves all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, as_float64, check_state
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.checks import one_of, two_increasing
from cldsde.score.conversion import Conversion, whiten
from cldsde.score.paths import NoisePath
from cldsde.score.times import coefficients_at, with_known

__all__ = [
    "Clock",
    "Denoiser",
    "DenoiserScore",
    "PredictionDenoiser",
    "Predicts",
    "checked_levels",
    "read_levels",
]

Predicts = Literal["noise", "data", "velocity", "flow", "score"]
"""Prediction of a network from x = α x_0 + σ n.

``"noise"``: n. ``"data"``: x_0. ``"velocity"``: α n − σ x_0, often called v. ``"flow"``:
α' x_0 + σ' n, the velocity of flow matching. ``"score"``: −n/σ."""

Clock = Literal["time", "index", "sigma", "log_sigma/4", "log_snr"]
"""Form in which a network receives the noise level.

``"time"``: the path's time. ``"index"``: the nearest whole number to it, as an integer.
``"sigma"``: the noise level σ/α. ``"log_sigma/4"``: log(σ/α)/4. ``"log_snr"``: κ = log(α/σ)."""

# Levels beyond the end of the range by less than this relative error count as the end, because
# times in single precision have such errors.
_ROUNDING = 1e-4


class Denoiser(Protocol):
    """Estimate of the data from data plus noise, as EDM and k-diffusion define it.

    A denoiser may have an attribute ``noise_levels``, the smallest and the largest σ that it was
    trained on. A `DenoiserScore` raises an error before it evaluates the denoiser outside of them.
    """

    def __call__(self, u: Tensor, sigma: Tensor, /, **conditions: Any) -> Tensor:
        """E[x_0 | x_0 + σ n = u] of ``(B, *D)`` and ``(B,)``, like ``u``."""
        ...


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
        if not callable(denoiser):
            msg = f"denoiser must be a callable denoiser(u, sigma); got {denoiser!r}"
            raise TypeError(msg)
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
        outside = _outside(sigma, low, high)
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


def _outside(levels: Tensor, low: float, high: float) -> Tensor:
    """Which noise levels lie outside of a range, apart from rounding."""
    return ~((levels >= low * (1 - _ROUNDING)) & (levels <= high * (1 + _ROUNDING)))


def checked_levels(levels: Tensor, low: float, high: float) -> Tensor:
    """Return noise levels clamped to the range of training.

    Raises
    ------
    ValueError
        If a level lies outside, apart from rounding.
    """
    outside = _outside(levels, low, high)
    if bool(outside.any()):
        msg = (
            f"sigma must lie in [{low:.6g}, {high:.6g}], the noise levels of the network's "
            f"training; got {float(levels[outside][0]):.6g}"
        )
        raise ValueError(msg)
    return levels.clamp(low, high)


class _Levels(NamedTuple):
    """Coefficients of a `PredictionDenoiser` at noise levels ``*``."""

    scale: Tensor  # (*), α: the network's input is α u
    state: Tensor  # (*), of u in the estimate of the data
    value: Tensor  # (*), of the network's output
    clock: Tensor  # (*)


class PredictionDenoiser(nn.Module):
    r"""Denoiser from a trained network that predicts noise, data, velocity, flow or score.

    The time t with the noise level σ is found on the path. The network is evaluated there once, on
    :math:`x_t = α(t) u`.

    Parameters
    ----------
    network
        Function network(x, clock, \*\*conditions) of ``(B, *D)`` and ``(B,)`` that returns
        ``(B, *D)``.
    path
        Signal and noise of the network's training.
    predicts
        The network's prediction: `Predicts`.
    clock
        Form in which the network receives the noise level: one of `Clock`, or a function of the
        path's times, float64 ``(n,)`` to ``(n,)``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If ``predicts`` or ``clock`` is unknown, or the clock is ``"index"`` and the times of the
        path are not indices.

    Examples
    --------
    A network that predicts the noise of 1,000 levels, as a denoiser and as a score of CLD:

    >>> import torch
    >>> from cldsde import CLD
    >>> betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    >>> path = NoisePath.from_alphas_cumprod((1 - betas).cumprod(0))
    >>> network = lambda x, index: x  # predicts the noise of normal data at every level, nearly
    >>> denoiser = PredictionDenoiser(network, path, predicts="noise")
    >>> score = DenoiserScore(denoiser, CLD())
    >>> score(torch.randn(8, 2, 3), 0.5).shape
    torch.Size([8, 1, 3])
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        path: NoisePath,
        predicts: Predicts = "noise",
        *,
        clock: Clock | Callable[[Tensor], Tensor] = "time",
    ) -> None:
        super().__init__()
        if not callable(network):
            msg = f"network must be a callable network(x, clock); got {network!r}"
            raise TypeError(msg)
        if not isinstance(path, NoisePath):
            msg = f"path must be a NoisePath, such as NoisePath.linear(); got {path!r}"
            raise TypeError(msg)
        one_of(predicts, Predicts, "predicts")
        if not callable(clock):
            one_of(clock, Clock, "clock")
        if clock == "index" and path.interval[1] <= 1:
            msg = (
                "clock must not be 'index' for a path whose times are not indices; use 'time', or "
                "NoisePath.from_alphas_cumprod"
            )
            raise ValueError(msg)
        self.network = network
        self.path = path
        self.predicts = predicts
        self.clock = clock

    @property
    def noise_levels(self) -> tuple[float, float]:
        """Smallest and largest noise level of the path."""
        return self.path.noise_levels

    def extra_repr(self) -> str:
        """Path and prediction, for the representation."""
        return f"path={self.path!r}, predicts={self.predicts!r}, clock={self.clock!r}"

    def forward(self, u: Tensor, sigma: Tensor | float, **conditions: Any) -> Tensor:
        """Estimate of the data, like ``u``.

        Parameters
        ----------
        u
            Data plus noise of level σ, ``(B, *D)``.
        sigma
            Noise levels, one or ``(B,)``.
        conditions
            Passed to the network.

        Raises
        ------
        ValueError
            If a level lies outside of the path's, or the network returns another shape.
        """
        dtype = torch.promote_types(u.dtype, torch.float32)
        table = coefficients_at(self, sigma, u, self._levels, dtype, 0, read_levels)
        scale, state, value = (
            x.reshape(-1, *(1,) * (u.ndim - 1)) for x in (table.scale, table.state, table.value)
        )
        clock = table.clock.expand(len(u)).clone()
        if self.clock == "index":
            clock = clock.long()
        out = self.network((scale * u).to(u.dtype), clock, **conditions)
        if not isinstance(out, Tensor) or out.shape != u.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            msg = f"network must return a tensor like its input, {tuple(u.shape)}; got {got}"
            raise ValueError(msg)
        return (state * u + value * out).to(u.dtype)

    def _levels(self, levels: Tensor) -> _Levels:
        # Functions of the path accept one axis of times.
        kappa = -checked_levels(levels, *self.noise_levels).flatten().log()
        t = self.path.time(kappa)
        alpha, sigma = self.path.signal(t), self.path.noise(t)
        state, value = self._estimate(t, alpha, sigma)
        found = (alpha, state, value, self._clock(t, kappa))
        return _Levels(*(x.reshape(levels.shape) for x in found))

    def _estimate(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of u = x/α and of the network's output in the estimate of x_0."""
        one = torch.ones_like(alpha)
        if self.predicts == "data":
            return torch.zeros_like(alpha), one
        if self.predicts == "noise":
            return one, -sigma / alpha
        if self.predicts == "score":
            return one, sigma.square() / alpha
        if self.predicts == "velocity":
            power = alpha.square() + sigma.square()
            return alpha.square() / power, -sigma / power
        alpha_rate, sigma_rate = self.path.slopes(t)
        power = alpha * sigma_rate - alpha_rate * sigma
        return alpha * sigma_rate / power, -sigma / power

    def _clock(self, t: Tensor, kappa: Tensor) -> Tensor:
        if callable(self.clock):
            return self.clock(t)
        if self.clock == "index":
            return t.round()
        known = {"time": t, "sigma": (-kappa).exp(), "log_sigma/4": -kappa / 4, "log_snr": kappa}
        return known[self.clock]


def read_levels(sigma: Tensor | float, u: Tensor) -> Tensor:
    """Noise levels as float64 on the CPU, ``()`` if the batch shares one."""
    known = getattr(sigma, "known", None)
    levels = known.value if known is not None else as_float64(sigma).detach().cpu()
    if levels.shape not in (torch.Size([]), torch.Size([len(u)])):
        msg = f"sigma must be one level or have shape ({len(u)},); got {tuple(levels.shape)}"
        raise ValueError(msg)
    return levels
