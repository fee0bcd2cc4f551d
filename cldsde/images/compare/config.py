"""Configurations of comparisons: models that share a base, and samplers of them, row by row."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict

from cldsde.errors import require, setting
from cldsde.images.config import RECOMMENDED, Grid, RunConfig, SamplingConfig, StartTime
from cldsde.images.data import DataSet
from cldsde.images.evaluate.evaluation import METRICS, Measurements
from cldsde.images.sample.sampler import Recipe, make_plan, make_solver
from cldsde.images.schema import (
    KAPPA,
    Configuration,
    Count,
    Flag,
    Positive,
    check_name,
    read_file,
    section,
    with_overrides,
)
from cldsde.images.train.engine import check_run
from cldsde.images.training_config import Time
from cldsde.solvers import SamplerSettings

PRESETS = {
    name: Path(__file__).with_name("presets") / f"{name}.toml"
    for name in ("fashion_mnist", "cld_variants", "quick", "demo")
}
"""Comparisons that come with the package."""

_TOLERANCES = ("rtol", "atol")
_IMAGES = 2**20  # images with seeds of their own, for each seed of a comparison


@section
class RowConfig:
    """A sampler of a model, at several budgets."""

    model: str
    """Name of the model."""
    solver: str = RECOMMENDED
    """Name of the solver."""
    label: str = ""
    """Name of the row; the name of the solver if empty."""
    settings: tuple[Path, ...] = ()
    """Files of `cldsde.solvers.SamplerSettings`, such as those of ``cldsde tune``, in place of
    ``solver``, ``nfe`` and the keys below. Their numbers of evaluations are the budgets."""
    grid: Grid | None = None
    t_start: StartTime = None
    t_end: Time | None = None
    denoise: Flag = True
    options: Mapping[str, Annotated[Any, KAPPA]] = field(default_factory=dict)
    """See `SamplingConfig`. ``t_end`` is 1e-3 by default for a solver by name."""
    nfe: tuple[Count, ...] = ()
    """Budgets of score evaluations per image, for solvers on a grid."""
    tolerances: tuple[Positive, ...] = ()
    """Tolerances of adaptive solvers. Each sets ``rtol`` and ``atol``, or the one that ``options``
    does not set."""

    def __post_init__(self) -> None:
        if self.settings:
            own = {"model", "label", "settings"}
            for name, kept in inspect.signature(type(self)).parameters.items():
                fits = name in own or getattr(self, name) in (kept.default, {})
                require(fits, name, "must be left out with settings, which replace it")
            object.__setattr__(self, "label", self.label or "settings")
            budgets = self.budgets
            msg = f"must have different numbers of evaluations in a row; got {budgets}"
            require(len({*budgets}) == len(budgets), "settings", msg)
            return
        recipe = self._recipe()
        chosen = {name: getattr(recipe, name) for name in ("solver", "grid", "t_end")}
        if recipe.t_end is None and recipe.solver != RECOMMENDED:
            chosen["t_end"] = 1e-3
        for name, value in {**chosen, "label": self.label or recipe.solver}.items():
            object.__setattr__(self, name, value)
        solver = make_solver(recipe)
        adaptive = solver is not None and solver.facts.adaptive
        needed, other = ("tolerances", "nfe") if adaptive else ("nfe", "tolerances")
        msg = f"{self.solver} needs a list of {needed}, and no {other}"
        require(bool(getattr(self, needed)) and not getattr(self, other), needed, msg)
        for recipe in self._configurations():
            make_solver(recipe)

    @cached_property
    def _read(self) -> list[SamplerSettings]:
        with setting("settings"):
            return [SamplerSettings.load(file.expanduser()) for file in self.settings]

    @property
    def budgets(self) -> tuple[int, ...] | tuple[float, ...]:
        """Score evaluations, or tolerances."""
        return tuple(each.nfe for each in self._read) or self.nfe or self.tolerances

    @property
    def fixed(self) -> dict[str, Any]:
        """Tolerances that ``options`` sets."""
        return {name: self.options[name] for name in _TOLERANCES if name in self.options}

    def recipes(self) -> list[Recipe]:
        """How to sample with each budget."""
        return [*(self._read or self._configurations())]

    def _configurations(self) -> list[SamplingConfig]:
        if self.nfe:
            return [self._recipe(nfe=nfe) for nfe in self.nfe]
        return [
            self._recipe(options={**dict.fromkeys(_TOLERANCES, tolerance), **self.options})
            for tolerance in self.tolerances
        ]

    def _recipe(self, **changes: Any) -> SamplingConfig:
        names = ("solver", "grid", "t_start", "t_end", "denoise", "options")
        return SamplingConfig(**{**{name: getattr(self, name) for name in names}, **changes})


@section
class ComparisonConfig(Measurements, Configuration):
    """Models to compare, and samplers and metrics to compare them with."""

    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32 // _IMAGES)] = 0
    """Seed of weights and training of all models; the seed of each image follows from it."""
    metrics: tuple[str, ...] = ("fd", "bpd")
    """Some of ``"fd"``, ``"fid"``, ``"kid"``, ``"isc"``, ``"prc"`` and ``"bpd"``."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a `RunConfig` that all models share."""
    models: Mapping[str, Mapping[str, Any]]
    """Names to sections that are merged into the base, key by key."""
    rows: tuple[RowConfig, ...]
    """Samplers of the models."""

    def __post_init__(self) -> None:
        product = f"{self.samples:,} times {self.repeats:,}"
        msg = f"times repeats must be at most {_IMAGES:,}; got {product}"
        require(self.samples * self.repeats <= _IMAGES, "samples", msg)
        for name in ("metrics", "models", "rows"):
            require(bool(getattr(self, name)), name, "is empty")
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
        msg = "must hold one of samples, such as fd; got bpd alone"
        require({*self.metrics} != {"bpd"}, "metrics", msg)
        names = [(row.model, row.label) for row in self.rows]
        for i, (model, label) in enumerate(names):
            check_name(model, self.models, f"rows[{i}].model")
            msg = f"labels of a model must differ; got twice {label!r} of {model}"
            require((model, label) not in names[:i], "rows", msg)
        first, data = next((name, run.data) for name, run in self.runs.items())
        for name, run in self.runs.items():
            msg = f"must be the data of {first}: samples are compared with it"
            same = (run.data.name, run.data.options) == (data.name, data.options)
            require(same, f"models.{name}.data", msg)

    @property
    def first_seed(self) -> int:
        """Seed of the first image of each cell; the others count from there."""
        return self.seed * _IMAGES

    def shared(self) -> dict[str, Any]:
        """Settings of all cells; models, rows, metrics and repeats may be added later."""
        return {name: getattr(self, name) for name in ("seed", "samples", "batch", "features")}

    @cached_property
    def runs(self) -> dict[str, RunConfig]:
        """The configuration of each model."""
        return {name: self._run(name) for name in self.models}

    def _run(self, name: str) -> RunConfig:
        msg = f"a name is made of letters, digits, '_', '+' and '-'; got {name!r}"
        require(re.fullmatch(r"\w[\w+-]*", name) is not None, "models", msg)
        with setting(f"models.{name}"):
            return RunConfig.from_dict({"seed": self.seed, **_merged(self.base, self.models[name])})


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read a comparison from a file, with overrides such as ``samples=64``; see `load_config`."""
    return ComparisonConfig.from_dict(with_overrides(read_file(path), overrides))


def check_comparison(config: ComparisonConfig, *, device: str = "auto") -> DataSet:
    """Check that all models can be trained and sampled, and return the images."""
    data = next(iter(config.runs.values())).data.load()
    for name, run in config.runs.items():
        with setting(f"models.{name}"):
            check_run(run, data, device=device)
    for i, row in enumerate(config.rows):
        for recipe in row.recipes():
            with setting(f"rows[{i}]"):
                make_plan(lambda z, t: z, recipe, config.runs[row.model].process.make())
    return data


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The base with a model's own values, sections key by key."""
    merged = {**base, **own}
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = _merged(base[key], value)
    return merged
