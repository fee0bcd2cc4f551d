"""Code of the user's own, named ``module:attribute`` in a configuration or on the command line."""

from __future__ import annotations

import importlib
from typing import Any

from cldsde.images.errors import SettingError


def named(name: object, key: str) -> Any:
    """Import the attribute that ``module:attribute`` names, or raise a SettingError.

    A ModuleNotFoundError means that the module exists, but imports another one that is missing.
    """
    module, _, attribute = str(name).partition(":")
    parts = attribute.split(".")
    if not all(part.isidentifier() for part in (*module.split("."), *parts)):
        msg = f"must be 'module:attribute', such as 'my_package.features:Network'; got {name!r}"
        raise SettingError(key, msg)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but it imports another one that is missing
        where = "install it, or add its folder to PYTHONPATH"
        msg = f"there is no module {error.name!r}; {where}; got {name!r}"
        raise SettingError(key, msg) from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        msg = f"{module!r} cannot be imported ({in_one_line(error)}); got {name!r}"
        raise SettingError(key, msg) from error
    for part in parts:
        if not hasattr(found, part):
            msg = f"{module!r} has no attribute {attribute!r}; got {name!r}"
            raise SettingError(key, msg)
        found = getattr(found, part)
    return found


def in_one_line(error: BaseException) -> str:
    """Type and message of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())
