"""Reading and checking of configurations: sections are dataclasses that pydantic validates.

Every error is a `SettingError` that names the key by its place in the file.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, cast, dataclass_transform

import pydantic
import tomli_w
import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import to_jsonable_python

from cldsde.errors import SettingError, require, setting
from cldsde.messages import brief, nearest

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1, le=2**40)]
Natural = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]  # not a text
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Shape = Annotated[Sequence[Count], Field(min_length=3, max_length=3)]  # (C, H, W) of an image
Width = Annotated[int, Strict(), Field(ge=1, le=2**14)]  # channels of a level of a network
Channels = Annotated[Sequence[Width], Field(min_length=1)]  # of each level
Blocks = Annotated[int, Strict(), Field(ge=1, le=256)]  # of a level
Levels = Annotated[int, Strict(), Field(ge=2, le=256)]  # number of grey levels


def _rising(ends: Sequence[float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError("should rise from the first number to the second")
    return float(ends[0]), float(ends[1])


_Two = Field(min_length=2, max_length=2)
Range = Annotated[Sequence[Number], _Two, AfterValidator(_rising)]  # of continuous numbers

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def section(kind: type[T]) -> type[T]:
    """Make a frozen keyword-only dataclass that pydantic checks, with errors as data.

    A text below fields, after one or several, is the description of these keys.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    made = pydantic.dataclasses.dataclass(kind, frozen=True, kw_only=True, config=config)
    validate: Callable[..., None] = made.__init__

    def checked(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _setting_error(error, made) from None

    made.__init__ = checked  # type: ignore[method-assign]
    # Tools and doctests read the arguments off it.
    checked.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return cast(type[T], made)


class Configuration:
    """A section that is a whole file, from and to plain types."""

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Check and build a configuration from plain types."""
        msg = f"must be a section; got {values!r}"
        require(isinstance(values, Mapping), "the configuration", msg)
        return cls(**{str(key): value for key, value in cast(Any, values).items()})

    def to_dict(self) -> dict[str, Any]:
        """The configuration in JSON types, defaults included."""
        values: dict[str, Any] = plain(self)
        return values

    def to_toml(self) -> str:
        """The configuration as a TOML file; the word ``"none"`` stands for None."""
        return tomli_w.dumps(_replaced(self.to_dict(), None, "none"))


def _current(value: Any) -> Any:
    return "kappa" if value == "log_snr" else value


KAPPA = BeforeValidator(_current)
"""Reads the word ``"log_snr"`` of older files as ``"kappa"``."""


def _setting_error(error: ValidationError, kind: type[Any]) -> SettingError:
    """The first error of a validation, as data."""
    first = _errors(error)[0]
    place, cause = first["loc"], first.get("ctx", {}).get("error")
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    key = "".join(parts).removeprefix(".")
    if isinstance(cause, SettingError):
        return cause.within(key)
    if first["type"] == "unexpected_keyword_argument":
        for part in place[:-1]:
            hints = [typing.get_type_hints(kind)[part]] if isinstance(part, str) else []
            for hint in hints:  # grows: types inside of other types
                hints += typing.get_args(hint)
                kind = cast(Any, hint) if dataclasses.is_dataclass(hint) else kind
        known = [entry.name for entry in dataclasses.fields(kind)]
        return SettingError(key, _unknown(str(place[-1]), known))
    return SettingError(key, _reason(error))


def _errors(error: ValidationError) -> list[Any]:
    """Errors in their order; missing keys are last, because a misspelt key is missing, too."""
    return sorted(error.errors(include_url=False), key=lambda one: one["type"] == "missing")


def _reason(error: ValidationError) -> str:
    """The message of pydantic as a clause about the value."""
    first, *others = _errors(error)
    if first["type"] == "missing":
        return "is missing"
    if first["type"] in {"dataclass_type", "mapping_type", "dict_type"}:
        return f"must be a section; got {first['input']!r}"
    # Each member of a union reports an error about the same value.
    same = [first, *(one for one in others if one["input"] is first["input"])]
    # Of the types in use, only sequences reject a text without saying what should be there.
    wanted = [one["msg"].partition("should ")[2] or "be a list" for one in same]
    wanted = [text.replace("a valid tuple", "a list") for text in wanted]
    wanted = [text.partition(" after validation")[0] for text in wanted]
    either = " or ".join([wanted[0], *(text.removeprefix("be ") for text in wanted[1:])])
    return f"must {either}; got {first['input']!r}"


def check_name(name: str, known: Iterable[str], key: str) -> None:
    """Raise a SettingError, with the nearest valid name, for an unknown name."""
    msg = f"must be one of {', '.join(known)}; got {name!r}{nearest(name, known)}"
    require(name in known, key, msg)


def check_keys(values: Mapping[Any, Any], known: Iterable[str], prefix: str) -> None:
    """Raise a SettingError, with the nearest valid name, for an unknown key."""
    for key in values:
        require(key in known, f"{prefix}.{key}".removeprefix("."), _unknown(str(key), list(known)))


def _unknown(key: str, known: Sequence[str]) -> str:
    return f"unknown key{nearest(key, known)} (known: {', '.join(known) or 'none'})"


def checked_options(
    make: Any, options: Mapping[str, Any], given: Sequence[str] = (), key: str = "options"
) -> dict[str, Any]:
    """Check options against the signature of a function or class; convert sections to dataclasses.

    Arguments in ``given`` are no options. Errors name options below ``key``. What ``make`` passes
    on as ``**options`` goes to ``make.options_of``, whose arguments are options, too.
    """
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for one in filter(None, (getattr(make, "__dict__", {}).get("options_of"), make)):
        function = inspect.getattr_static(one, "__init__") if isinstance(one, type) else one
        hints |= typing.get_type_hints(function, include_extras=True)
        parameters |= inspect.signature(one).parameters
    kept = {name: x for name, x in parameters.items() if name not in given}
    parameters = {name: x for name, x in kept.items() if x.kind is not x.VAR_KEYWORD}
    check_keys(options, parameters, key)
    for name, parameter in parameters.items():
        there = name in options or parameter.default is not parameter.empty
        require(there, f"{key}.{name}".removeprefix("."), "is missing")
    return {
        name: check_type(value, hints.get(name, Any), f"{key}.{name}".removeprefix("."))
        for name, value in options.items()
    }


def checked(function: F) -> F:
    """Check the arguments of a function by its annotations; errors are SettingErrors."""
    signature = inspect.signature(function)
    rest = {key for key, x in signature.parameters.items() if x.kind is x.VAR_KEYWORD}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {key: x for key, x in bound.arguments.items() if key not in rest}
        bound.arguments |= checked_options(function, given, key="")
        return function(*bound.args, **bound.kwargs)

    return cast(F, call)


def check_type(value: object, hint: Any, key: str) -> Any:
    """Return a value that fits an annotation, made of a section if need be, or raise an error."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        options = checked_options(hint, value, key=key)
        with setting(key):
            return hint(**options)
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError as error:
        raise SettingError(key, _reason(error)) from None


def read_file(path: Path) -> dict[str, Any]:
    """Values of a file in TOML, YAML or JSON, by its suffix.

    In TOML, which has no null, the word ``"none"`` stands for None. Errors have the path as key.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": lambda text: _replaced(tomllib.loads(text), "none", None),
        ".yaml": lambda text: yaml.load(text, _Loader),
        ".yml": lambda text: yaml.load(text, _Loader),
        ".json": lambda text: json.loads(text, object_pairs_hook=_unique),
    }
    require(path.suffix in readers, str(path), f"a configuration ends in {', '.join(readers)}")
    try:
        # Some editors begin a file with a mark of its byte order.
        values = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
        json.dumps(values, default=str)  # fails if YAML refers to itself
    except OSError as error:
        raise SettingError(str(path), f"cannot be read ({brief(error)})") from error
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        msg = f"is not valid {path.suffix[1:].upper()} ({' '.join(str(error).split())})"
        raise SettingError(str(path), msg) from error
    msg = f"must hold sections such as [training]; got {type(values).__name__}"
    require(isinstance(values, dict), str(path), msg)
    return cast(dict[str, Any], values)


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping with unique keys, as in TOML."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with unique keys, and with numbers such as 1e-3 as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _unique([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_overrides(words: Iterable[str], example: str, name: str = "set") -> dict[str, Any]:
    """Values of ``key=value`` words, each in TOML or a bare word; errors have ``name`` as key."""
    values = {}
    for word in words:
        key, separator, text = (part.strip() for part in word.partition("="))
        require(bool(separator and key), name, f"takes key=value, such as {example}; got {word!r}")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        values[key] = _replaced(value, "none", None)
    return values


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A configuration with values of ``section.key=value`` words; missing sections are made."""
    changed: dict[str, Any] = plain(values)
    for path, value in parse_overrides(overrides, "training.batch=64").items():
        place: Any = changed
        *outer, last = path.split(".")
        for key in outer:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            require(isinstance(place, dict), path, f"{key} is not a section")
        place[last] = value
    return changed


def leaves(config: Mapping[str, Any], *, without: Iterable[str] = ()) -> dict[str, Any]:
    """Values by their full names, ``section.key``, without some keys or sections."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = leaves(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}.{name}".removesuffix("."): x for name, x in inner.items()}
    left_out = tuple(f"{name}." for name in without)
    return {key: x for key, x in found.items() if not f"{key}.".startswith(left_out)}


def plain(value: Any) -> Any:
    """A value in JSON types: sections as mappings, paths as texts, tuples as lists."""
    return to_jsonable_python(value)


def _replaced(value: Any, old: object, new: object) -> Any:
    """A nested value with another one in each place of ``old``."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old and type(value) is type(old) else value
