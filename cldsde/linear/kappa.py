"""Times of given signal-to-noise ratios, and the time of VP as a function of the ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cldsde.linear.checks import as_float64, as_number
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.renamed import takes_old

_BETA_MIN, _BETA_MAX = 0.1, 20.0  # of the default `VPSDE`


@takes_old(log_snr="kappa")
def times_of_kappa(
    sde: LinearSDE, kappa: Tensor | float, T: float = 1.0, eps: float = 1e-9
) -> Tensor:
    """Times at which a process has given values of κ, half the log of the signal-to-noise ratio.

    The same time means a different noise level in each process. To transfer ε or t_min from one
    process to another, match κ. The result has the shape of ``kappa``, and is float64 on the CPU
    and accurate to the rounding of log t. If no time has the value, it is the nearer end.

    Parameters
    ----------
    sde
        The forward process.
    kappa
        Values of κ (`LinearSDE.kappa`), a number or a tensor of any shape; TypeError for anything
        else, and ValueError for NaN.
    T, eps
        Ends of the search interval, 0 < ε ≤ T ≤ 1; ValueError otherwise.

    Examples
    --------
    >>> from cldsde import CLD, VPSDE
    >>> level = CLD().kappa(2e-2)
    >>> print(f"{level:.2f} {times_of_kappa(VPSDE(), level):.4f}")
    3.22 0.0086
    """
    check_process(sde)
    T, eps = as_number(T, "T"), as_number(eps, "eps")
    try:
        kappa = as_float64(kappa).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"kappa must be a number or a tensor of real numbers; got {kappa!r}"
        raise TypeError(msg) from error
    if bool(kappa.isnan().any()):
        raise ValueError(f"kappa must not be NaN; got {kappa.tolist()}")
    if not 0 < eps <= T <= 1:
        msg = f"eps and T must have 0 < eps ≤ T ≤ 1; got eps = {eps:g}, T = {T:g}"
        raise ValueError(msg)
    return first_times(sde.kappa, kappa, T, eps)


def first_times(
    function: Callable[[Tensor], Tensor], target: Tensor, T: float = 1.0, eps: float = 1e-9
) -> Tensor:
    """Times in [ε, T] at which a function first falls to each value, or the nearer end.

    A fall that lasts less than 4 % of its time may be missed.
    """
    shape, target = target.shape, target.flatten()
    points = torch.linspace(math.log(eps), math.log(T), 513, dtype=torch.float64, device="cpu")
    points = points.unsqueeze(1)  # the first points are the same for all values
    # Distances of the next points to the time that the secant proposes, relative to the bracket.
    # The better the secant, the narrower is the next bracket; it is at most half as wide.
    steps = 2 * 0.25 ** torch.arange(1, 14, dtype=torch.float64, device="cpu").unsqueeze(1)
    offsets = torch.cat([-steps, torch.zeros_like(steps[:1]), steps.flip(0)])
    for _ in range(60):
        # Larger values come first: the function decreases with t until it first falls so far.
        values = function(points.exp().clamp(eps, T)).cummin(0)[0].expand(-1, len(target))
        points = points.expand(-1, len(target))
        bracket = (values[1:-1] > target).sum(0, keepdim=True)
        low, high = points.gather(0, bracket), points.gather(0, bracket + 1)
        first, last = values.gather(0, bracket), values.gather(0, bracket + 1)
        width = high - low
        if bool((width <= 4 * torch.finfo(torch.float64).eps * low.abs().clamp_min(1)).all()):
            break
        share = ((first - target) / (first - last)).nan_to_num(0.5).clamp(0, 1)
        inner = (low + width * (share + offsets)).clamp(low, high)
        points = torch.cat([low, inner, high])
    return ((low + high) / 2).exp().clamp(eps, T).reshape(shape)


def kappa_range(sde: LinearSDE) -> tuple[float, float]:
    """Smallest and largest κ at which `times_of_kappa` finds a regular time of a process."""
    ends = torch.tensor([sde.regular_until, 1e-9], dtype=torch.float64, device="cpu")
    first, last = sde.kappa(ends).tolist()
    return first, last


# Processes of one component differ in clock and scale alone: at equal κ they have the same û = x/α.
# Grids and polynomials in one clock make their samples the same, too. VP's clock is smooth and
# extends to all κ, unlike the time of rectified flow, in which large noise is a short interval.


def vp_time(kappa: Tensor) -> Tensor:
    """Time t with β_min t + ½(β_max − β_min) t² = log(1 + e^{−2κ}); above 1 for κ < −5.02."""
    total = torch.logaddexp(torch.zeros_like(kappa), -2 * kappa)
    # The root of the quadratic equation in the form that does not cancel for small B.
    slope = _BETA_MAX - _BETA_MIN
    return 2 * total / (_BETA_MIN + (_BETA_MIN**2 + 2 * slope * total).sqrt())


def kappa_of_vp_time(t: Tensor) -> Tensor:
    """κ = −½ log(e^{B(t)} − 1), the inverse of `vp_time`."""
    total = t * (_BETA_MIN + 0.5 * (_BETA_MAX - _BETA_MIN) * t)
    # log(e^B − 1) = B + log(1 − e^{−B}), which does not overflow for large B.
    return -0.5 * (total + (-torch.expm1(-total)).log())
