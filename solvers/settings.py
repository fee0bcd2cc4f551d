"""Samplers as values: everything that decides a sample beside network, process and seed."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cldsde import linear
from cldsde.files import write_whole
from cldsde.linear.identity import as_fingerprint, same_process
from cldsde.linear.kappa import kappa_range, times_of_kappa
from cldsde.linear.reprs import shown
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.messages import counted
from cldsde.renamed import takes_old, warn_of_old
from cldsde.tables import Entry, Table

from .exponential_multistep import ExponentialMultistep, LevelNoise, Variable, numbers

_REACHED = 1e-6  # distance in κ from a level that counts as reached
_ROUNDED = 1e-9  # distance in κ from an end of the process that counts as this end


@takes_old(log_snr="kappa")
@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """A sampler as a value: noise levels, noise per step, order and end of `ExponentialMultistep`.

    Network, process, seed and these settings decide a sample. `recommend` chooses settings, and
    `fit_sampler` fits them to a network. `str` of settings is a table. Values out of range raise a
    ValueError, and values of another type a TypeError.

    Parameters
    ----------
    kappa
        Increasing κ = ½ log SNR of the grid, two or more. With ``denoise`` each is one network
        evaluation, or two with guidance.
    stochasticity
        λ ≥ 0 of the steps, one fewer.
    process
        The process that the settings are for: a `LinearSDE`, or numbers that identify it. The
        attribute has the numbers: equal processes have the same, whatever their names.
    process_name
        Name of the process in tables and errors; its ``repr`` by default. Samples do not depend on
        the name.
    order, corrector, variable
        See `ExponentialMultistep`.
    denoise
        Whether the data prediction at the last level is the sample, rather than the state there.
    network
        Name of the network that the settings were fitted to.

    Examples
    --------
    >>> from cldsde import VPSDE, sample
    >>> few = SamplerSettings(kappa=(-3, 0, 3), stochasticity=(1, 0.5), process=VPSDE())
    >>> sample(VPSDE(), lambda z, t: -z, (1000, 2), settings=few).shape
    torch.Size([1000, 2])
    """

    kappa: tuple[float, ...]
    stochasticity: tuple[float, ...]
    process: tuple[float, ...]
    process_name: str = field(default="", compare=False)
    order: int = 2
    corrector: bool = False
    variable: Variable = "vp_time"
    denoise: bool = True
    network: str = ""

    def __post_init__(self) -> None:
        given: Any = self.process
        given = _process_of_text(given) if isinstance(given, str) else given  # of version 0.2
        if isinstance(given, LinearSDE):
            object.__setattr__(self, "process_name", self.process_name or repr(given))
        object.__setattr__(self, "process", as_fingerprint(given))
        for name in ("kappa", "stochasticity"):
            object.__setattr__(self, name, numbers(getattr(self, name), name))
        kinds = {"process_name": str, "corrector": bool, "denoise": bool, "network": str}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be of type {kind.__name__}; got {value!r}")
        levels = self.kappa
        if len(levels) < 2 or not all(-math.inf < x < y < math.inf for x, y in pairwise(levels)):
            raise ValueError(f"kappa must be two or more increasing finite κ; got {levels!r}")
        steps, count = len(levels) - 1, len(self.stochasticity)
        if count != steps:
            raise ValueError(f"stochasticity must be one λ for each of {steps} steps; got {count}")
        _ = self.solver  # it checks the other values

    def __str__(self) -> str:
        """Table of the levels, their σ = e^−κ, and λ of the step from each."""
        words = [f"order {self.order}", f"in {self.variable}", *["corrector"] * self.corrector]
        words += [counted(self.nfe, "evaluation")]
        name, network = self.process_name or "unnamed process", self.network
        title = f"{name}{f', network {network}' if network else ''}: {', '.join(words)}"
        end = "data prediction" if self.denoise else "end"
        noise = [*(f"{x:.3g}" for x in self.stochasticity), end]
        rows = [
            [Entry(str(i)), Entry(f"{kappa:.4g}"), Entry(f"{math.exp(-kappa):.4g}"), Entry(last)]
            for i, (kappa, last) in enumerate(zip(self.kappa, noise, strict=True), 1)
        ]
        return f"{title}\n{Table('', ['level', 'κ', 'σ', 'λ'], rows, []).markdown()}"

    @property
    def nfe(self) -> int:
        """Number of evaluations, without guidance."""
        return len(self.kappa) - (not self.denoise)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels σ = e^−κ, decreasing float64, and a last 0 if the end is denoised."""
        kappa = [*self.kappa, *[math.inf] * self.denoise]
        return torch.tensor(kappa, dtype=torch.float64, device="cpu").neg().exp()

    @property
    def log_snr(self) -> tuple[float, ...]:
        """Old name of ``kappa``."""
        warn_of_old("SamplerSettings.log_snr", "kappa")
        return self.kappa

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
        if not same_process(check_process(sde), self.process):
            given = self.process_name or "another process"
            msg = f"settings must be for this process, {sde!r}; got settings for {given}"
            raise ValueError(msg)
        wanted = torch.tensor(self.kappa, dtype=torch.float64, device="cpu")
        first, last = kappa_range(sde)
        times = times_of_kappa(sde, wanted, sde.regular_until)
        if bool(((sde.kappa(times) - wanted).abs() > _REACHED).any()):
            raise ValueError(
                f"kappa must be levels that {sde!r} reaches, from {first:.4g} to {last:.4g}; got "
                f"{self.kappa!r}"
            )
        # A start at the end of the process is one from its prior, which rounding must not hide.
        times[wanted < first + _ROUNDED] = sde.regular_until
        return times

    def as_dict(self) -> dict[str, Any]:
        """The fields in JSON types; ``SamplerSettings(**fields)`` is equal."""
        return asdict(self)

    def save(self, file: str | Path) -> None:
        """Write the settings as JSON."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        write_whole(Path(file), lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read settings that `save` wrote; raise ValueError if the file does not hold any.

        Files of version 0.2 are read, too.
        """
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} does not hold sampler settings in JSON: {error}") from error
        try:
            return cls.of_fields(found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} does not hold sampler settings: {error}") from error

    @classmethod
    def of_fields(cls, found: object) -> Self:
        """Settings from a mapping of their fields; raise a ValueError that names what is wrong."""
        names = [x.name for x in fields(cls)]
        needed = {x.name for x in fields(cls) if x.default is MISSING}
        if isinstance(found, Mapping):
            found = {"kappa" if name == "log_snr" else name: x for name, x in found.items()}
        if not isinstance(found, dict) or not needed <= set(found) <= {*names}:
            got = list(found) if isinstance(found, dict) else found
            raise ValueError(f"settings must have the fields {', '.join(names)}; got {got}")
        return cls(**found)

    @classmethod
    def of(
        cls,
        sde: LinearSDE,
        solver: ExponentialMultistep,
        times: Tensor,
        *,
        denoise: bool = True,
        network: str = "",
    ) -> Self:
        """The settings of a solver on decreasing times of a process."""
        return cls(
            kappa=tuple(sde.kappa(times).tolist()),
            stochasticity=tuple(solver.stochasticities(sde, times[:-1]).tolist()),
            process=sde,  # type: ignore[arg-type]
            order=solver.order,
            corrector=solver.corrector,
            variable=solver.variable,
            denoise=denoise,
            network=network,
        )


def _process_of_text(text: str) -> LinearSDE:
    """Process from its ``repr``, such as ``CLD(beta=4.0)``; raise ValueError for another text."""

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        words = ast.unparse(node.func).split(".")
        found: Any = linear
        for word in words:
            if word.startswith("_"):
                raise ValueError(word)
            found = getattr(found, word)
        kinds = (linear.LinearSDE, linear.Schedule)
        owner = found if len(words) == 1 else getattr(linear, words[0])
        if not (isinstance(owner, type) and issubclass(owner, kinds)):
            raise ValueError(words)  # noqa: TRY004
        options = {str(x.arg): value(x.value) for x in node.keywords}
        if len(words) == 1 and issubclass(owner, LinearSDE):
            default: Any = found()  # its options are not rounded to six digits, as the text is
            for name, given in options.items():
                if shown(kept := getattr(default, name)) == shown(given):
                    options[name] = kept
        return found(*map(value, node.args), **options)

    try:
        return check_process(value(ast.parse(text, mode="eval").body))
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"process must be a LinearSDE or numbers that identify it; got {text!r}, which does "
            "not determine a process of cldsde: make the settings again"
        ) from error
