"""Denoisers D(u, σ): their interface, and denoisers from trained networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.checks import LevelLike, check_callable, one_of, shaped
from cldsde.linear.paths import NoisePath
from cldsde.score.conversion import TRAINED, Prediction, WhitenedKernel
from cldsde.score.estimator import Estimator, compiled_module
from cldsde.score.times import PlannedTime, coefficients_at

Clock = Literal["time", "index", "sigma", "log_sigma/4", "log_snr"]
"""Form in which a network receives the noise level.

``"time"``: the path's time. ``"index"``: the nearest whole number to it, as an integer.
``"sigma"``: the noise level σ/α. ``"log_sigma/4"``: log(σ/α)/4. ``"log_snr"``: log(α²/σ²)."""
_CLOCKS: dict[Clock, Callable[[Tensor, Tensor], Tensor]] = {
    "time": lambda t, kappa: t,
    "index": lambda t, kappa: t.round(),
    "sigma": lambda t, kappa: (-kappa).exp(),
    "log_sigma/4": lambda t, kappa: -kappa / 4,
    "log_snr": lambda t, kappa: 2 * kappa,
}

# Levels beyond the end of the range by less than this relative error count as the end, because
# times in single precision have such errors.
_ROUNDING = 1e-4
_TINY = 1e-100


class Denoiser(Estimator):
    r"""Base class of denoisers: estimates of the data from data plus noise.

    A denoiser is called as denoiser(u, sigma, \*\*conditions), as EDM and k-diffusion define it: u
    is x_0 + σ n of shape ``(B, *D)``, with noise levels ``(B,)``. It returns E[x_0 | u], like u. A
    `DenoiserScore` takes any such function. A subclass defines ``forward`` with a further keyword
    ``planned``, the index of σ among levels that a solver knows; see `cldsde.score.Score`.
    """


class FunctionDenoiser(Denoiser):
    """A plain function or module as a `Denoiser`; `as_denoiser` makes it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(
        self, u: Tensor, sigma: Tensor, *, planned: PlannedTime | None = None, **conditions: Any
    ) -> Tensor:
        """Call the function with data in the precision of its parameters, if it has any."""
        return self.function(u.to(input_dtype(self.function, u.dtype)), sigma, **conditions)


def as_denoiser(denoiser: object) -> Denoiser:
    """Return a `Denoiser`, and adapt any other function; raise TypeError if it is not callable."""
    if isinstance(denoiser, Denoiser):
        return denoiser
    if isinstance(inside := compiled_module(denoiser), Denoiser):
        return inside._changed({}, forward=denoiser)
    check_callable(denoiser, "denoiser", "a callable denoiser(u, sigma)")
    return FunctionDenoiser(denoiser)  # type: ignore[arg-type]


def input_dtype(network: object, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a module's parameters, which its inputs must have; otherwise the given dtype."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), dtype)


class _Levels(NamedTuple):
    """Coefficients of a `PredictionDenoiser` at noise levels ``*``."""

    scale: Tensor  # (*), α: the network's input is α u
    state: Tensor  # (*), of u in the estimate of the data
    value: Tensor  # (*), of the network's output
    clock: Tensor  # (*)


class PredictionDenoiser(Denoiser):
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
        Prediction of the network from x = α x_0 + σ n. ``"noise"``: n. ``"data"``: x_0.
        ``"velocity"``: α n − σ x_0, often called v. ``"flow"``: α' x_0 + σ' n, the velocity of flow
        matching. ``"score"``: −n/σ.
    clock
        Form in which the network receives the noise level: one of `Clock`, or a function of the
        path's times, float64 ``(n,)`` to ``(n,)``.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, ``predicts`` or ``clock`` is unknown, or the clock is
        ``"index"`` and the times of the path are not indices.

    Examples
    --------
    A network that predicts the noise of 1,000 levels, as a score of CLD:

    >>> import torch
    >>> from cldsde import CLD, DenoiserScore
    >>> betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    >>> path = NoisePath.from_alphas_cumprod((1 - betas).cumprod(0))
    >>> network = lambda x, index: x  # predicts the noise of normal data at every level, nearly
    >>> score = DenoiserScore(PredictionDenoiser(network, path, predicts="noise"), CLD())
    >>> score(torch.randn(8, 2, 3), 0.5).shape
    torch.Size([8, 1, 3])
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        path: NoisePath,
        predicts: Prediction = "noise",
        *,
        clock: Clock | Callable[[Tensor], Tensor] = "time",
    ) -> None:
        super().__init__()
        check_callable(network, "network", "a callable network(x, clock)")
        if not isinstance(path, NoisePath):
            raise TypeError(f"path must be a NoisePath, such as NoisePath.linear(); got {path!r}")
        one_of(predicts, TRAINED, "predicts")
        if not callable(clock):
            one_of(clock, Clock, "clock")
        if clock == "index" and path.interval[1] <= 1:
            raise ValueError(
                "clock must not be 'index' for a path whose times are not indices; use 'time', or "
                "NoisePath.from_alphas_cumprod"
            )
        self.network = network
        self.path = path
        self.noise_levels: tuple[float, float] = path.noise_levels
        self.predicts = predicts
        self.clock = clock

    def extra_repr(self) -> str:
        """Path and prediction, for the representation."""
        return f"path={self.path!r}, predicts={self.predicts!r}, clock={self.clock!r}"

    def forward(
        self, u: Tensor, sigma: LevelLike, *, planned: PlannedTime | None = None, **conditions: Any
    ) -> Tensor:
        """Estimate of the data, like ``u``; see `Denoiser` for the arguments.

        ``sigma`` may be one level for all. The network gets αu in the precision of its parameters,
        and the conditions. The rest is computed in single precision at least. If a level lies
        outside of the path's, or the network returns another shape, a ValueError is raised.
        """
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        table = coefficients_at(
            self, sigma, u, self._levels, wide.dtype, planned=planned, levels=True
        )
        scale, state, value = (
            x.reshape(-1, *(1,) * (u.ndim - 1)) for x in (table.scale, table.state, table.value)
        )
        clock = table.clock.expand(len(u)).clone()
        if self.clock == "index":
            clock = clock.long()
        given = (scale * wide).to(input_dtype(self.network, wide.dtype))
        out = self.network(given, clock, **conditions)
        if not isinstance(out, Tensor) or out.shape != u.shape:
            raise ValueError(
                f"network must return a tensor like its input, {tuple(u.shape)}; got {shaped(out)}"
            )
        return (state * wide + value * out).to(u.dtype)

    def _levels(self, levels: Tensor) -> _Levels:
        # Functions of the path accept one axis of times.
        kappa = -checked_levels(levels, *self.noise_levels).flatten().log()
        t = self.path.time(kappa)
        # A tiny σ in place of 0 has the same estimate to rounding, and a finite x/σ.
        alpha, sigma = self.path.signal(t), self.path.noise(t).clamp_min(_TINY)
        psi, root = alpha[..., None, None], sigma[..., None, None]
        rates = partial(self.path.slopes, t)
        whitened = WhitenedKernel(root, 1 / root, psi, psi / root, t, (0,), rates)
        estimate = whitened.convert(self.predicts, "data")
        state, value = alpha * estimate.state[..., 0, 0], estimate.value[..., 0, 0]
        clock = self.clock(t) if callable(self.clock) else _CLOCKS[self.clock](t, kappa)
        return _Levels(*(x.reshape(levels.shape) for x in (alpha, state, value, clock)))


def outside_levels(levels: Tensor, low: float, high: float) -> Tensor:
    """Which noise levels lie outside of a range, apart from rounding."""
    return ~((levels >= low * (1 - _ROUNDING)) & (levels <= high * (1 + _ROUNDING)))


def checked_levels(levels: Tensor, low: float, high: float) -> Tensor:
    """Return levels clamped to the range of training; raise ValueError if one lies outside."""
    outside = outside_levels(levels, low, high)
    if bool(outside.any()):
        raise ValueError(
            f"sigma must lie in [{low:.6g}, {high:.6g}], the noise levels of the network's "
            f"training; got {float(levels[outside][0]):.6g}"
        )
    return levels.clamp(low, high)
