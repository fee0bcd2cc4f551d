"""Time grids: decreasing float64 tensors of n + 1 times from T to ε, both ends exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_positive
from cldsde.linear.kappa import kappa_of_vp_time, times_of_kappa, vp_time
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.renamed import warn_of_old

P = ParamSpec("P")


def _process_by_name(grid: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Take the process as the first argument, too, as older versions did, with a warning."""

    @functools.wraps(grid)
    def called(*args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], LinearSDE):
            warn_of_old(f"{grid.__name__}(sde, T, eps, n)", f"{grid.__name__}(T, eps, n, sde=sde)")
            return grid(*args[1:], **{"sde": args[0], **options})
        return grid(*args, **options)

    return called


@_process_by_name
def uniform_times(T: float, eps: float, n: int, *, sde: LinearSDE | None = None) -> Tensor:
    """Uniform grid, t_i = T + (i/n)(ε − T).

    The result is a decreasing float64 tensor ``(n + 1,)``. Values out of range raise a ValueError.

    Parameters
    ----------
    T, eps
        Ends, 0 ≤ ε < T.
    n
        Number of steps, at least 1.
    sde
        The process. This grid, `quadratic_times` and `root_times` do not depend on it.

    Examples
    --------
    >>> uniform_times(1.0, 0.2, 4)
    tensor([1.0000, 0.8000, 0.6000, 0.4000, 0.2000], dtype=torch.float64)
    """
    fraction = _fractions(T, eps, n)
    return _with_ends(T + fraction * (eps - T), T, eps)


@_process_by_name
def quadratic_times(T: float, eps: float, n: int, *, sde: LinearSDE | None = None) -> Tensor:
    """Quadratic grid, t_i = ε + (T − ε)(1 − i/n)²: steps shrink linearly towards the data.

    Dockhorn et al. (2022, appendix) use this grid for CLD. See `uniform_times` for arguments,
    result and errors.
    """
    fraction = _fractions(T, eps, n)
    return _with_ends(eps + (T - eps) * (1 - fraction) ** 2, T, eps)


@_process_by_name
def root_times(T: float, eps: float, n: int, *, sde: LinearSDE | None = None) -> Tensor:
    """Grid uniform in √t, t_i = (√T + (i/n)(√ε − √T))².

    Its last step, 2d√ε + d² with d = (√T − √ε)/n, is longer than the last step of
    `quadratic_times`. See `uniform_times` for arguments, result and errors.
    """
    fraction = _fractions(T, eps, n)
    return _with_ends((T**0.5 + fraction * (eps**0.5 - T**0.5)) ** 2, T, eps)


@_process_by_name
def kappa_times(T: float, eps: float, n: int, *, sde: LinearSDE) -> Tensor:
    """Grid uniform in κ(t), half the log of the signal-to-noise ratio (`LinearSDE.kappa`).

    For VP it is the grid of DPM-Solver (Lu et al. 2022). See `uniform_times` for arguments, result
    and errors. If κ(T) or κ(ε) is not finite, a ValueError is raised, and without a process a
    TypeError.

    Examples
    --------
    >>> from cldsde import VPSDE
    >>> kappa_times(1.0, 0.01, 4, sde=VPSDE())
    tensor([1.0000, 0.7706, 0.4494, 0.1003, 0.0100], dtype=torch.float64)
    """
    levels = _between(_fractions(T, eps, n), _kappa_ends(sde, T, eps))
    return _with_ends(times_of_kappa(sde, levels, T, eps), T, eps)


@_process_by_name
def karras_times(T: float, eps: float, n: int, rho: float = 7.0, *, sde: LinearSDE) -> Tensor:
    """Grid uniform in σ^{1/ρ}, with σ = e^{−κ} for any process (Karras et al. 2022, equation 5).

    Under CLD it is less accurate than `root_times` for the probability flow of several modes. See
    `kappa_times` for the other arguments, the result and the errors.

    Parameters
    ----------
    rho
        ρ > 0; larger values put more steps near the data.
    """
    check_positive(rho, "rho")
    powers = _between(_fractions(T, eps, n), (-_kappa_ends(sde, T, eps) / rho).exp())
    return _with_ends(times_of_kappa(sde, -rho * powers.log(), T, eps), T, eps)


@_process_by_name
def logistic_times(
    T: float, eps: float, n: int, center: float = 0.7, rate: float = 0.75, *, sde: LinearSDE
) -> Tensor:
    r"""Grid uniform in a logistic function of κ(t), half the log of the signal-to-noise ratio.

    The function is :math:`1/(1 + e^{r(κ − κ_0)})`. Steps are shortest around κ₀, the noise level at
    which samples choose their modes. Little changes at very high or very low noise. The grid is for
    exact scores with ``ExponentialMultistep(order=3, corrector=True)``, and the same in κ for every
    noise schedule. See `kappa_times` for the other arguments, the result and the errors; κ(T) =
    −∞ is allowed.

    Parameters
    ----------
    center
        κ₀, at which steps in κ are shortest. The default is for data with a standard deviation of
        about 1.
    rate
        r > 0.
    """
    check_positive(rate, "rate")
    fractions, ends = _fractions(T, eps, n), _kappa_ends(sde, T, eps, finite=False)
    levels = _between(fractions, torch.sigmoid(-rate * (ends - center)))
    return _with_ends(times_of_kappa(sde, center - levels.logit() / rate, T, eps), T, eps)


@_process_by_name
def vp_times(T: float, eps: float, n: int, *, sde: LinearSDE) -> Tensor:
    """Grid uniform in t^¾, with t the time at which the default `cldsde.VPSDE` has the same κ.

    The noise of `cldsde.RectifiedFlow` and some others grows fast near t = 1. This grid has more
    steps there than `root_times`. See `kappa_times` for arguments, result and errors.
    """
    return times_of_vp_powers(sde, T, eps, _fractions(T, eps, n), 0.75)


def times_of_vp_powers(sde: LinearSDE, T: float, eps: float, fractions: Tensor, p: float) -> Tensor:
    """Grid at fractions ``(n + 1,)`` of the way between both ends in VP's time to the power p."""
    powers = _between(fractions, vp_time(_kappa_ends(sde, T, eps)) ** p)
    levels = kappa_of_vp_time(powers ** (1 / p))
    return _with_ends(times_of_kappa(sde, levels, T, eps), T, eps)


def _kappa_ends(sde: LinearSDE, T: float, eps: float, *, finite: bool = True) -> Tensor:
    if not eps > 0:
        msg = f"eps must be above 0 for a grid in the signal-to-noise ratio; got {eps:g}"
        raise ValueError(msg)
    ends = check_process(sde).kappa(torch.tensor([T, eps], dtype=torch.float64, device="cpu"))
    if finite and not bool(ends.isfinite().all()):
        raise ValueError(
            f"T must be a time with a finite signal-to-noise ratio; at T = {T:g} nothing of the "
            f"data is left: take T ≤ {sde.regular_until:.15g}, or logistic_times"
        )
    return ends


def _between(fractions: Tensor, ends: Tensor) -> Tensor:
    """Values at fractions of the way from one end to the other."""
    return ends[0] + fractions * (ends[1] - ends[0])


def _fractions(T: float, eps: float, n: int) -> Tensor:
    n = as_integer(n, 1, "n")
    if not (math.isfinite(T) and T > 0):
        raise ValueError(f"T must be finite and positive; got {T:g}")
    if not 0 <= eps < T:
        raise ValueError(f"eps must lie in [0, T) with T = {T:g}; got {eps:g}")
    return torch.arange(n + 1, dtype=torch.float64, device="cpu") / n


def _with_ends(times: Tensor, T: float, eps: float) -> Tensor:
    times[0], times[-1] = T, eps
    if not bool((times.diff() < 0).all()):
        raise ValueError(
            f"n must be smaller: {len(times) - 1} steps from {T:g} to {eps:g} are below the "
            "resolution of float64"
        )
    return times
