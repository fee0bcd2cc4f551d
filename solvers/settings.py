"""Settings of a sampler with few evaluations, for one process and network; JSON on disk."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cldsde.files import write_whole
from cldsde.linear.kappa import kappa_range, times_of_kappa
from cldsde.linear.sde import LinearSDE, check_process

from .exponential_multistep import ExponentialMultistep, LevelNoise, Variable, numbers

_REACHED = 1e-6  # distance in κ from a level that counts as reached


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Noise levels, noise and order of a sampler with few evaluations.

    The sampler is `ExponentialMultistep`, which ends with the data prediction. n levels are n
    network evaluations, or 2n with guidance. Values out of range raise a ValueError, and values of
    another type a TypeError. The page "Fit a sampler to your network" fits settings.

    Parameters
    ----------
    kappa
        Increasing κ = ½ log SNR of the n evaluations. The last one is the data prediction.
    stochasticity
        λ ≥ 0 of the n − 1 steps.
    process
        ``repr`` of the process that the settings are for.
    order, corrector, variable
        See `ExponentialMultistep`.
    network
        Name of the network that the settings were fitted to.

    Examples
    --------
    >>> from cldsde import VPSDE, sample
    >>> few = SamplerSettings(kappa=(-3, 0, 3), stochasticity=(1, 0.5), process=repr(VPSDE()))
    >>> sample(VPSDE(), lambda z, t: -z, (1000, 2), settings=few).shape
    torch.Size([1000, 2])
    """

    kappa: tuple[float, ...]
    stochasticity: tuple[float, ...]
    process: str
    order: int = 2
    corrector: bool = False
    variable: Variable = "vp_time"
    network: str = ""

    def __post_init__(self) -> None:
        for name in ("kappa", "stochasticity"):
            object.__setattr__(self, name, numbers(getattr(self, name), name))
        for name, kind in (("process", str), ("corrector", bool), ("network", str)):
            if not isinstance(given := getattr(self, name), kind):
                raise TypeError(f"{name} must be of type {kind.__name__}; got {given!r}")
        levels = self.kappa
        if len(levels) < 2 or not all(-math.inf < x < y < math.inf for x, y in pairwise(levels)):
            raise ValueError(f"kappa must be two or more increasing finite κ; got {levels!r}")
        steps, given = len(levels) - 1, len(self.stochasticity)
        if given != steps:
            raise ValueError(f"stochasticity must be one λ for each of {steps} steps; got {given}")
        _ = self.solver  # it checks the other values

    @property
    def nfe(self) -> int:
        """Number of evaluations, without guidance."""
        return len(self.kappa)

    @property
    def solver(self) -> ExponentialMultistep:
        """The solver, on `times` or from one of them on."""
        return ExponentialMultistep(
            order=self.order,
            stochasticity=LevelNoise(self.kappa[:-1], self.stochasticity),
            corrector=self.corrector,
            variable=self.variable,
        )

    def times(self, sde: LinearSDE) -> Tensor:
        """Decreasing times ``(n,)`` of a process at which it has the noise levels.

        Raises a ValueError if the settings are for another process, or it does not reach a level.
        """
        if repr(check_process(sde)) != self.process:
            raise ValueError(
                f"settings must be for this process, {sde!r}; got settings for {self.process}"
            )
        wanted = torch.tensor(self.kappa, dtype=torch.float64, device="cpu")
        times = times_of_kappa(sde, wanted, sde.regular_until)
        if bool(((sde.kappa(times) - wanted).abs() > _REACHED).any()):
            first, last = kappa_range(sde)
            raise ValueError(
                f"kappa must be levels that {sde!r} reaches, from {first:.4g} to {last:.4g}; got "
                f"{self.kappa!r}"
            )
        return times

    def save(self, file: str | Path) -> None:
        """Write the settings as JSON."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(Path(file), lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read settings that `save` wrote; raise ValueError if the file does not hold any."""
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} does not hold sampler settings in JSON: {error}") from error
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(found, dict) or not needed <= set(found) <= names:
            raise ValueError(f"{file} must hold the settings {', '.join(sorted(names))} in JSON")
        return cls(**found)
