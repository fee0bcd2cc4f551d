"""Configurations of comparisons: models that share a base, and samplers of them, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import DataSet
from cldsde.images.errors import SettingError, setting
from cldsde.images.evaluate.evaluation import METRICS
from cldsde.images.sample.sampler import check_sampling, make_solver
from cldsde.images.schema import (
    Count,
    Flag,
    Positive,
    as_toml,
    check_name,
    from_dict,
    plain,
    read_file,
    section,
    with_overrides,
)
from cldsde.images.sections import Time
from cldsde.images.train.engine import check_run
from cldsde.solvers import canonical_name

PRESETS = {
    name: Path(__file__).with_name("presets") / f"{name}.toml"
    for name in ("fashion_mnist", "cld_variants", "quick")
}
"""Comparisons that come with the package."""

_TOLERANCES = ("rtol", "atol")  # what a tolerance of a row sets
_IMAGES = 2**20  # with seeds of their own, for each seed of a comparison


@section
class RowConfig:
    """A sampler of a model, at several budgets.

    Attributes
    ----------
    model
        Name of the model.
    solver
        Name of the solver.
    label
        What the row is called; the name of the solver if empty.
    grid, t_end, denoise, options
        See `SamplingConfig`.
    nfe
        Budgets of score evaluations an image, for solvers on a grid.
    tolerances
        Each sets ``rtol`` and ``atol``, or the one of them that ``options`` does not set, for
        solvers that choose their steps.
    """

    model: str
    solver: str
    label: str = ""
    grid: Literal["uniform", "quadratic", "root", "log_snr", "logistic", "karras"] = "root"
    t_end: Time = 1e-3
    denoise: Flag = True
    options: Mapping[str, Any] = field(default_factory=dict)
    nfe: tuple[Count, ...] = ()
    tolerances: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no solver of that name can do."""
        object.__setattr__(self, "solver", canonical_name(self.solver))
        object.__setattr__(self, "label", self.label or self.solver)
        solver = make_solver(self._recipe())
        given, other = "nfe", "tolerances"
        if solver.facts.adaptive:
            given, other = other, given
        if not getattr(self, given) or getattr(self, other):
            msg = f"{self.solver} needs a list of {given}, and no {other}"
            raise SettingError(given, msg)
        if len(set(getattr(self, given))) < len(getattr(self, given)):
            raise SettingError(given, f"must differ; got {list(getattr(self, given))}")
        if self.tolerances and len(self.fixed) == len(_TOLERANCES):
            msg = f"set nothing: options has {' and '.join(self.fixed)}; leave one out"
            raise SettingError("tolerances", msg)
        self.recipes()

    @property
    def budgets(self) -> tuple[int, ...] | tuple[float, ...]:
        """Score evaluations, or tolerances."""
        return self.nfe or self.tolerances

    @property
    def fixed(self) -> dict[str, Any]:
        """What ``options`` sets of what a tolerance would set."""
        return {name: self.options[name] for name in _TOLERANCES if name in self.options}

    def recipes(self) -> list[SamplingConfig]:
        """One for each budget."""
        if self.nfe:
            return [self._recipe(nfe=nfe) for nfe in self.nfe]
        return [
            self._recipe(options={**dict.fromkeys(_TOLERANCES, tolerance), **self.options})
            for tolerance in self.tolerances
        ]

    def _recipe(self, **changes: Any) -> SamplingConfig:
        own = {name: getattr(self, name) for name in ("solver", "grid", "t_end", "denoise")}
        recipe = SamplingConfig(**{**own, "options": self.options, **changes})
        make_solver(recipe)
        return recipe


@section
class ComparisonConfig:
    """Which models are compared, and how.

    Attributes
    ----------
    seed
        Of weights and training of all models; that of each image follows from it.
    samples
        Images of a cell of the table, for each repeat.
    repeats
        Sets of images, with seeds of their own, whose spread is reported.
    batch
        Images at once.
    metrics
        Of `cldsde.images.evaluate.evaluation.METRICS`.
    features, weights
        See `cldsde.images.evaluate.evaluation.Evaluation`.
    likelihood_images
        Held-out images whose likelihood is computed.
    base
        Sections of a `RunConfig` that all models share.
    models
        Names to sections that are merged into the base, key by key.
    rows
        Samplers of the models.
    """

    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32 // _IMAGES)] = 0
    samples: Annotated[Count, Field(ge=2)] = 1000
    repeats: Count = 1
    batch: Count = 64
    metrics: tuple[str, ...] = ("fd", "bpd")
    features: str = "classifier"
    weights: str | None = None
    likelihood_images: Count = 64
    base: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any]
    rows: tuple[RowConfig, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be compared; build the configuration of each model."""
        if self.samples * self.repeats > _IMAGES:
            product = f"{self.samples:,} times {self.repeats:,}"
            msg = f"times repeats must be at most {_IMAGES:,}; got {product}"
            raise SettingError("samples", msg)
        for name in ("metrics", "models", "rows"):
            if not getattr(self, name):
                raise SettingError(name, "is empty")
        for metric in self.metrics:
            check_name(metric, METRICS, "metrics")
        if set(self.metrics) == {"bpd"}:
            msg = "must hold one of samples, such as fd; got bpd alone"
            raise SettingError("metrics", msg)
        for i, row in enumerate(self.rows):
            check_name(row.model, self.models, f"rows[{i}].model")
        names = [(row.model, row.label) for row in self.rows]
        twice = [
            f"{label!r} of {model}" for model, label in names if names.count((model, label)) > 1
        ]
        if twice:
            msg = f"labels of a model must differ; got twice {twice[0]}"
            raise SettingError("rows", msg)
        first, *others = self.runs
        for name in others:
            data, expected = self.runs[name].data, self.runs[first].data
            if (data.name, data.options) != (expected.name, expected.options):
                msg = f"must be the data of {first}: samples are compared with it"
                raise SettingError(f"models.{name}.data", msg)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComparisonConfig:
        """Check and build a comparison from plain types.

        Raises
        ------
        SettingError
            If a key is unknown, missing or of the wrong type, or a value out of range.
        """
        return from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, defaults included."""
        values: dict[str, Any] = plain(self)
        return values

    def to_toml(self) -> str:
        """As a TOML file that `load_comparison` reads; see `as_toml` for what is None."""
        return as_toml(self)

    @property
    def first_seed(self) -> int:
        """Seed of the first image of each cell; others follow one by one."""
        return self.seed * _IMAGES

    def shared(self) -> dict[str, Any]:
        """What all cells depend on: models, rows, metrics and repeats may be added later."""
        return {name: getattr(self, name) for name in ("seed", "samples", "batch", "features")}

    @cached_property
    def runs(self) -> dict[str, RunConfig]:
        """The configuration of each model."""
        return {name: self._run(name) for name in self.models}

    def place(self, model: str, error: SettingError) -> SettingError:
        """An error of a model's configuration with the full name of its key."""
        path = error.key.split(".")
        shared = not _holds(self.models[model], path) and _holds(self.base, path)
        return error.within("base" if shared else f"models.{model}")

    def _run(self, name: str) -> RunConfig:
        allowed = all(letter.isalnum() or letter in "_+-" for letter in name)
        if not allowed or name[:1] in {"", "+", "-"}:
            msg = f"a name is made of letters, digits, '_', '+' and '-'; got {name!r}"
            raise SettingError("models", msg)
        own = self.models[name]
        if not isinstance(own, Mapping):
            raise SettingError(f"models.{name}", f"must be a section; got {own!r}")
        try:
            return RunConfig.from_dict({"seed": self.seed, **_merged(self.base, own)})
        except SettingError as error:
            raise self.place(name, error) from error


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read a comparison from a file in TOML, YAML or JSON, with overrides such as ``samples=64``.

    Raises
    ------
    ValueError
        If the file cannot be read, or for the reasons of `ComparisonConfig.from_dict`.
    """
    return ComparisonConfig.from_dict(with_overrides(read_file(path), overrides))


def check_comparison(config: ComparisonConfig, *, device: str = "auto") -> DataSet:
    """Refuse what cannot be trained or sampled, before anything is made; return the images.

    Raises
    ------
    ValueError
        If data, networks, processes, solvers and device do not fit; the message names the key.
    """
    data = next(iter(config.runs.values())).data.load()
    for name, run in config.runs.items():
        try:
            check_run(run, data, device=device)
        except SettingError as error:
            raise config.place(name, error) from error
    for i, row in enumerate(config.rows):
        sde = config.runs[row.model].process.make()
        for recipe in row.recipes():
            with setting(f"rows[{i}]"):
                check_sampling(lambda z, t: z, recipe, sde)
    return data


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The base with a model's own values in their places, sections key by key."""
    merged = dict(base)
    for key, value in own.items():
        there = merged.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            merged[key] = _merged(there, value)
        else:
            merged[key] = value
    return merged


def _holds(section: Any, path: Sequence[str]) -> bool:
    """Whether a value stands at a path of keys, in nested sections."""
    for key in path:
        if not isinstance(section, Mapping) or key not in section:
            return False
        section = section[key]
    return True
