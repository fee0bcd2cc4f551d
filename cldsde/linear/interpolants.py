"""Interpolants as processes: rectified flow, the cosine path, and tables of ``alphas_cumprod``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.checks import as_float64, check_alphas_cumprod
from cldsde.linear.sde import LinearSDE
from cldsde.linear.signal_noise import SignalNoiseDynamics

__all__ = ["CosineVP", "RectifiedFlow", "alphas_cumprod_process"]


class RectifiedFlow(LinearSDE):
    r"""Rectified flow, the linear interpolant of flow matching: x_t = (1 − t) x_0 + t n.

    The SDE with these marginals (Liu et al. 2023) is

    .. math:: dx = −\frac{x}{1 − t}\,dt + \sqrt{\frac{2t}{1 − t}}\,dw.

    The prior is N(0, 1). Drift and diffusion diverge at t = 1, but distributions are finite there.
    `ExponentialMultistep` starts at t = 1, and other solvers start at `LinearSDE.regular_until`.
    ``ExponentialMultistep(order=1)`` is Euler's method for the flow-matching ODE.

    References
    ----------
    X. Liu, C. Gong and Q. Liu, *Flow straight and fast*, 2023; Y. Lipman et al., *Flow matching for
    generative modeling*, 2023; N. Ma et al., *SiT*, 2024, for stochastic sampling.

    Examples
    --------
    >>> sde = RectifiedFlow()
    >>> kernel = sde.marginal(0.25)
    >>> kernel.mean.item(), kernel.root.item()
    (0.75, 0.25)
    >>> sde.transition(0.5, 1.0).mean.item(), sde.prior.covariance.item()
    (0.0, 1.0)
    """

    def __init__(self) -> None:
        super().__init__(SignalNoiseDynamics(_falling, _rising, gain=_linear_gain))


class CosineVP(LinearSDE):
    r"""Trigonometric interpolant: x_t = cos(πt/2) x_0 + sin(πt/2) n.

    It is VP with β = π tan(πt/2): the cosine noise schedule without the offset at t = 0 and without
    the cut before t = 1 (`Schedule.cosine` has both). Drift and diffusion diverge at t = 1, but
    distributions are finite there; see `RectifiedFlow`.

    References
    ----------
    M. Albergo, N. Boffi and E. Vanden-Eijnden, *Stochastic interpolants*, 2023.

    Examples
    --------
    >>> kernel = CosineVP().marginal(1 / 3)
    >>> f"{kernel.mean.item():.4f} {kernel.root.item():.4f}"
    '0.8660 0.5000'
    """

    def __init__(self) -> None:
        super().__init__(
            SignalNoiseDynamics(_cosine, _sine, gain=_sine_gain, variance_preserving=True)
        )


def alphas_cumprod_process(table: Tensor | Sequence[float]) -> LinearSDE:
    """Process of a table ``alphas_cumprod``; see `VPSDE.from_alphas_cumprod`."""
    try:
        values = as_float64(table).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"table must be a sequence of real numbers; got {type(table).__name__}"
        raise TypeError(msg) from error
    plain = values.detach()
    if plain.ndim != 1 or not len(plain):
        msg = f"table must have one axis and at least one entry; got shape {tuple(plain.shape)}"
        raise ValueError(msg)
    check_alphas_cumprod(plain)
    angles = _Angles(values)
    # Between entries an angle has the rounding error of the number of entries times t.
    dynamics = SignalNoiseDynamics(
        angles.signal, angles.noise, gain=angles.gain, variance_preserving=True
    )
    return _TableProcess(dynamics, len(plain))


class _TableProcess(LinearSDE):
    """Variance-preserving process through a table, with a repr of its own."""

    def __init__(self, dynamics: SignalNoiseDynamics, entries: int) -> None:
        super().__init__(dynamics)
        self._entries = entries

    @override
    def __repr__(self) -> str:
        """One line with the number of entries."""
        return f"VPSDE.from_alphas_cumprod(<{self._entries} entries>)"


class _Angles:
    """α = sin φ and σ = sin θ, with angles φ and θ = π/2 − φ that are linear between entries.

    θ is 0 at t = 0. Both angles are stored, because π/2 − θ would cancel for small φ.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        full = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod])
        alpha, sigma = full.sqrt(), (1 - full).sqrt()
        self._signal, self._noise = torch.atan2(alpha, sigma), torch.atan2(sigma, alpha)

    def signal(self, t: Tensor) -> Tensor:
        return torch.sin(self._at(self._signal, t))

    def noise(self, t: Tensor) -> Tensor:
        return torch.sin(self._at(self._noise, t))

    def gain(self, s: Tensor, t: Tensor) -> Tensor:
        """Compute sin(θ_t − θ_s) without cancellation.

        The difference is the slope of the first piece times t − s, plus a correction for later
        pieces. A plain difference of the two angles would cancel over a short step.
        """
        first, _ = self._piece(s)
        last, beyond = self._piece(t)
        steps = self._noise.diff()
        step, whole = steps[first], self._noise[last] - self._noise[first + 1]
        correction = whole - (last - first - 1) * step + beyond * (steps[last] - step)
        return torch.sin(len(steps) * (t - s) * step + correction)

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the piece of each time, and the time's position in it as a fraction."""
        n = len(self._noise) - 1
        piece = (t.detach() * n).floor().clamp(0, n - 1)
        # Do not compute t·n − piece, because t·n would be rounded.
        return piece.long(), (t - piece / n) * n

    def _at(self, knots: Tensor, t: Tensor) -> Tensor:
        piece, share = self._piece(t)
        n = len(knots) - 1
        # Do not compute 1 − share, which rounding makes nonzero at the end.
        left = ((piece + 1).to(t.dtype) / n - t) * n
        return knots[piece] * left + knots[piece + 1] * share


# These are module-level functions, so that a process can be pickled and copied.


def _falling(t: Tensor) -> Tensor:
    return 1 - t


def _rising(t: Tensor) -> Tensor:
    return t.clone()


def _linear_gain(s: Tensor, t: Tensor) -> Tensor:
    return t - s


def _cosine(t: Tensor) -> Tensor:
    # cos(πt/2) would have no relative accuracy near t = 1.
    return torch.sin(math.pi / 2 * (1 - t))


def _sine(t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * t)


def _sine_gain(s: Tensor, t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * (t - s))
