"""Noise of a solver as a function of the noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import as_number


@dataclass(frozen=True)
class LevelNoise:
    """Stochasticity λ as a function of the noise level, for any process.

    Parameters
    ----------
    log_snr
        Increasing finite κ = ½ log SNR, one or more.
    stochasticity
        λ ≥ 0 at each of them; linear in κ between them and constant outside.

    Raises
    ------
    TypeError
        If a value is not a number.
    ValueError
        If κ does not increase, λ is negative, or their numbers differ.

    Examples
    --------
    >>> noise = LevelNoise((-3.0, 0.0, 2.0), (0.5, 1.5, 1.0))
    >>> noise.at(torch.tensor([-4.0, -1.5, 2.0], dtype=torch.float64))
    tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """

    log_snr: tuple[float, ...]
    stochasticity: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("log_snr", "stochasticity"):
            object.__setattr__(self, name, numbers(getattr(self, name), name))
        kappa, levels = self.log_snr, self.stochasticity
        increasing = all(x < y for x, y in pairwise(kappa))
        if not (kappa and increasing and all(map(math.isfinite, kappa))):
            raise ValueError(f"log_snr must be increasing finite κ, one or more; got {kappa!r}")
        if len(levels) != len(kappa) or not all(0 <= x < math.inf for x in levels):
            msg = f"stochasticity must be one finite λ ≥ 0 for each of {len(kappa)} κ; "
            raise ValueError(f"{msg}got {levels!r}")

    def at(self, log_snr: Tensor) -> Tensor:
        """λ at values of κ ``(n,)``, float64 on the CPU."""
        found = np.interp(log_snr.detach().numpy(), self.log_snr, self.stochasticity)
        return torch.as_tensor(found, device="cpu")


def numbers(values: object, name: str) -> tuple[float, ...]:
    """A sequence of numbers as a tuple; raise a TypeError that names it for something else."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    try:
        return tuple(as_number(x, name) for x in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers; got {values!r}") from error
