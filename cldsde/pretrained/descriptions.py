"""Processes and solvers as names and options, for configurations in JSON files."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cldsde import linear, solvers
from cldsde.linear.identity import same_process
from cldsde.linear.sde import LinearSDE
from cldsde.solvers import SamplerSettings
from cldsde.solvers.base import Solver


def process_of(given: object) -> LinearSDE:
    """Process from itself, its name such as ``"CLD"``, or its description."""
    found: LinearSDE = _made(given, linear, LinearSDE, "process")
    return found


def solver_of(given: object) -> Solver:
    """Solver from itself, the name of its class, or its description."""
    found: Solver = _made(given, solvers, Solver, "solver")
    return found


def settings_of(given: object) -> SamplerSettings:
    """Settings from themselves, their fields or a file."""
    if isinstance(given, SamplerSettings):
        return given
    if isinstance(given, str | Path):
        return SamplerSettings.load(given)
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"settings must be a SamplerSettings, or a file of them; got {kind}")
    return SamplerSettings.of_fields(given)


def described_process(sde: LinearSDE) -> dict[str, Any] | None:
    """Name and options of a process; None if they do not determine it."""
    kind = type(sde)
    names = inspect.signature(kind).parameters
    options = {name: getattr(sde, name) for name in names if getattr(sde, name, None) is not None}
    found = _description(kind, linear, options)
    return found if found and same_process(process_of(found), sde) else None


def described_solver(solver: Solver) -> dict[str, Any] | None:
    """Name and options of a solver; None if they do not determine it."""
    if not dataclasses.is_dataclass(solver):
        return None
    options = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}
    found = _description(type(solver), solvers, options)
    return found if found and solver_of(found) == solver else None


def _description(kind: type, home: ModuleType, options: dict[str, Any]) -> dict[str, Any] | None:
    if getattr(home, kind.__name__, None) is not kind:
        return None
    try:
        loaded: dict[str, Any] = json.loads(json.dumps(options))
    except TypeError:  # a function, a schedule or a solver has no JSON form
        return None
    return {"name": kind.__name__, "options": loaded}


def _made(given: object, home: ModuleType, kind: type, name: str) -> Any:
    if isinstance(given, kind):
        return given
    if isinstance(given, str):
        given = {"name": given, "options": {}}
    if not (isinstance(given, Mapping) and set(given) == {"name", "options"}):
        hint = " (write it with parentheses)" if isinstance(given, type) else ""
        raise TypeError(
            f"{name} must be a {kind.__name__}, the name of its class, or a mapping of 'name' and "
            f"'options'; got {given!r}{hint}"
        )
    classes = {word: x for word in home.__all__ if inspect.isclass(x := getattr(home, word))}
    known = {
        word: x
        for word, x in classes.items()
        if issubclass(x, kind) and x is not kind and not inspect.isabstract(x)
    }
    if given["name"] not in known:
        raise ValueError(f"{name} must be one of {', '.join(sorted(known))}; got {given['name']!r}")
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given["options"].items()
    }
    try:
        return known[given["name"]](**options)
    except TypeError as error:
        msg = f"{name}: {given['name']} does not take the options {options}: {error}"
        raise ValueError(msg) from error
