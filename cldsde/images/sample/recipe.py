"""Recipes of sampling that differ from the recipe of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cldsde.errors import SettingError
from cldsde.images.config import SamplingConfig
from cldsde.images.sample.sampler import make_solver


def changed_recipe(
    recipe: SamplingConfig, options: Mapping[str, Any] | None = None, **changes: Any
) -> SamplingConfig:
    """Change fields of a recipe, and options of its solver; another solver has its own defaults.

    Raises a SettingError for a value that is not allowed, for a budget of an adaptive solver, and
    for a solver outside of cldsde that the recipe names: code is run only if the caller names it.
    """
    if "solver" not in changes and ":" in recipe.solver:
        msg = f"the run's own, {recipe.solver}, is code outside of cldsde; name it here to run it, "
        raise SettingError("solver", f"{msg}or take another")
    kept = {} if "solver" in changes else recipe.options
    changed = dataclasses.replace(recipe, **changes, options={**kept, **(options or {})})
    if "nfe" in changes and make_solver(changed).facts.adaptive:
        msg = f"{changed.solver} is adaptive; set its options rtol and atol instead"
        raise SettingError("nfe", msg)
    return changed
