"""Reading of configurations: files, overrides, and values checked against annotations.

Every error names the key, by its place in the file, what it got and what it allows.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import operator
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
import yaml
from jsonargparse import ArgumentParser

__all__ = [
    "as_toml",
    "check_keys",
    "check_name",
    "checked_options",
    "from_dict",
    "parse_overrides",
    "read_file",
    "with_overrides",
]


def read_file(path: Path) -> dict[str, Any]:
    """What a file in TOML, YAML or JSON holds, by its suffix.

    In TOML, which has no null, the word ``"none"`` stands for None.

    Raises
    ------
    ValueError
        If it cannot be read or is no such file.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": lambda text: _from_toml(tomllib.loads(text)),
        ".yaml": _load_yaml,
        ".yml": _load_yaml,
        ".json": json.loads,
    }
    if path.suffix not in readers:
        msg = f"{path}: a configuration ends in {', '.join(readers)}; got {str(path)!r}"
        raise ValueError(msg)
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror or error})"
        raise ValueError(msg) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        msg = f"{path} is no {path.suffix[1:]} ({' '.join(str(error).split())})"
        raise ValueError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path} must hold sections such as [training]; got {type(values).__name__}"
        raise ValueError(msg)  # noqa: TRY004 one kind of error for whatever a file holds
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key stands once, as in TOML."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            msg = f"{twice[0]} stands there twice"
            raise ValueError(msg)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def parse_overrides(overrides: Iterable[str], example: str = "rtol=0.01") -> dict[str, Any]:
    """Values of ``key=value`` words, each as TOML writes it, or else a bare word.

    Raises
    ------
    ValueError
        If a word is no ``key=value``.
    """
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            msg = f"--set takes key=value, such as {example}; got {override!r}"
            raise ValueError(msg)
        values[key.strip()] = _value(text.strip())
    return values


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A configuration with some values put at ``section.key``; sections are made where missing.

    Raises
    ------
    ValueError
        If a word is no ``key=value``, or a key goes through what is no section.
    """
    changed = _copied(values)
    for path, value in parse_overrides(overrides, "training.batch=64").items():
        section: Any = changed
        *outer, last = path.split(".")
        for key in outer:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                msg = f"--set {path}: {key} is no section"
                raise ValueError(msg)  # noqa: TRY004
        section[last] = value
    return changed


def as_toml(config: Any) -> str:
    """A configuration, a dataclass, as `read_file` reads it.

    TOML has no None: a field that is None by default is left out, and everywhere else the word
    ``"none"`` stands for it.
    """
    values: dict[str, Any] = _for_toml(config)
    return tomli_w.dumps(values)


def _for_toml(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            entry.name: _for_toml(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
            if getattr(value, entry.name) is not None or entry.default is not None
        }
    if isinstance(value, Mapping):
        return {key: _for_toml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_toml(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return "none" if value is None else value


def _from_toml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_toml(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_toml(item) for item in value]
    return None if value == "none" else value


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def from_dict(kind: type[Any], values: object, prefix: str = "") -> Any:
    """A dataclass, and those in it, from a mapping.

    Parameters
    ----------
    kind
        The dataclass.
    values
        Keys to values in plain types.
    prefix
        Its place in the file, such as ``"training."``.

    Raises
    ------
    ValueError
        If a key is unknown, missing or of the wrong type, or a value out of range.
    """
    if not isinstance(values, Mapping):
        msg = f"{prefix.rstrip('.') or 'the configuration'} must be a section; got {values!r}"
        raise ValueError(msg)  # noqa: TRY004
    hints = typing.get_type_hints(kind)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    check_keys(values, fields, prefix)
    made = {}
    for name, entry in fields.items():
        hint = hints[name]
        section = _section(hint)
        if section is not None and section is not hint and values.get(name) is None:
            continue
        if section is not None:
            if name in values or _is_required(entry):
                made[name] = from_dict(section, values.get(name, {}), f"{prefix}{name}.")
        elif name in values:
            made[name] = _checked_value(values[name], hint, f"{prefix}{name}")
        elif _is_required(entry):
            msg = f"{prefix}{name} is missing"
            raise ValueError(msg)
    try:
        return kind(**made)
    except (TypeError, ValueError) as error:
        msg = f"{prefix}{error}"
        raise ValueError(msg) from error


def _section(hint: Any) -> type[Any] | None:
    """The dataclass that an annotation asks for, or allows beside None."""
    union = typing.get_origin(hint) in {typing.Union, types.UnionType}
    parts = typing.get_args(hint) if union else (hint,)
    return next((part for part in parts if _is_section(part)), None)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return entry.default is missing and entry.default_factory is missing


def _checked_value(value: object, hint: Any, name: str) -> Any:
    """The value as the type that an annotation asks for; numbers in quotes are no numbers."""
    if _is_section(hint):
        return from_dict(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple and _is_section(typing.get_args(hint)[0]):
        if not isinstance(value, list | tuple):
            msg = f"{name} must be a list of sections; got {value!r}"
            raise ValueError(msg)
        kind = typing.get_args(hint)[0]
        return tuple(from_dict(kind, part, f"{name}[{i}].") for i, part in enumerate(value))
    if typing.get_origin(hint) is typing.get_origin(Mapping[str, Any]):
        if not isinstance(value, Mapping):
            msg = f"{name} must be a section; got {value!r}"
            raise ValueError(msg)
        return dict(value)
    hint = _without_functions(hint)
    leaves = set(_leaves(hint))
    if value is None:
        fits = type(None) in leaves
    else:
        fits = not _holds_text(value) or bool(leaves & {str, Path}) or _has_words(hint)
    if isinstance(value, float) and not math.isfinite(value):
        fits = False
    try:
        if not fits:
            raise TypeError
        return None if value is None else _parser(hint).parse_object({"value": value}).value
    except Exception as error:  # the parser's errors are of several kinds
        hint_on_yaml = ""
        if isinstance(value, str) and {int, float} & leaves and _is_number(value):
            hint_on_yaml = ", a text: YAML wants 1.0e-3, not 1e-3, and no quotes"
        msg = f"{name} must be {_words(hint)}; got {value!r}{hint_on_yaml}"
        raise ValueError(msg) from error


def _without_functions(hint: Any) -> Any:
    """An annotation without the functions of a union, which no file can hold."""
    parts = typing.get_args(hint)
    kept = [part for part in parts if typing.get_origin(part) is not Callable]
    return functools.reduce(operator.or_, kept) if 0 < len(kept) < len(parts) else hint


def _holds_text(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_text(part) for part in value)
    return isinstance(value, str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@functools.cache
def _parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _leaves(hint: Any) -> Iterable[Any]:
    parts = typing.get_args(hint)
    if not parts or typing.get_origin(hint) is Literal:
        return [hint]
    return [leaf for part in parts for leaf in _leaves(part)]


def _has_words(hint: Any) -> bool:
    """Whether some value of an annotation is one of given words."""
    return any(typing.get_origin(leaf) is Literal for leaf in _leaves(hint))


def _words(hint: Any) -> str:
    """An annotation in words."""
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "none"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(_words(part) for part in parts)
    if origin is not None and issubclass(origin, Sequence):
        return f"a list, each {_words(parts[0])}"
    return str(hint)


def check_name(name: str, known: Iterable[str], key: str) -> None:
    """Raise ValueError, with the nearest valid name, for one that is not known."""
    if name not in known:
        msg = f"{key} must be one of {', '.join(known)}; got {name!r}{_nearest(name, known)}"
        raise ValueError(msg)


def check_keys(values: Mapping[Any, Any], known: Iterable[str], prefix: str) -> None:
    """Raise ValueError, with the nearest valid name, for a key that is not known."""
    for key in values:
        if key not in known:
            names = list(known)
            listed = ", ".join(names) or "none"
            hint = _nearest(str(key), names)
            msg = f"{prefix}{key} is not known{hint} (there are: {listed})"
            raise ValueError(msg)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def checked_options(
    make: Callable[..., Any], options: Mapping[str, Any], given: Sequence[str] = ()
) -> dict[str, Any]:
    """Options of a function or class, checked against its signature."""
    call = inspect.getattr_static(make, "__init__") if isinstance(make, type) else make
    hints = typing.get_type_hints(call)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(make).parameters.items()
        if name not in given
    }
    check_keys(options, parameters, "options.")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            msg = f"options.{name} is missing"
            raise ValueError(msg)
    return {
        name: _checked_value(value, hints[name], f"options.{name}")
        for name, value in options.items()
    }
