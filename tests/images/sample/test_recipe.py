"""Recipes of sampling that differ from the recipe of a run."""

from __future__ import annotations

import pytest

from cldsde.errors import SettingError
from cldsde.images.config import SamplingConfig
from cldsde.images.sample.recipe import changed_recipe

RECIPE = SamplingConfig(solver="sscs", nfe=7, options={"merge": False})


def test_other_fields_and_options_are_kept():
    changed = changed_recipe(RECIPE, {"score_step": "midpoint"}, nfe=9)
    options = {"merge": False, "score_step": "midpoint"}
    assert changed == SamplingConfig(solver="sscs", nfe=9, options=options)


def test_another_solver_has_its_own_defaults():
    assert changed_recipe(RECIPE, solver="em") == SamplingConfig(solver="euler-maruyama", nfe=7)


def test_code_that_a_recipe_names_is_not_run_unless_the_caller_names_it():
    recipe = SamplingConfig(solver="own_solvers:CentredEuler")
    with pytest.raises(SettingError, match="solver: the run's own, own_solvers:CentredEuler, is"):
        changed_recipe(recipe, nfe=9)
    assert changed_recipe(recipe, solver=recipe.solver) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "probability-flow", "nfe": 9}, "nfe: probability-flow is adaptive; set its"),
        ({"nfe": 1}, "nfe: must be"),
        ({"grid": "cubic"}, "grid: must be 'uniform'"),
    ],
)
def test_changes_that_do_not_fit_are_rejected(changes, message):
    with pytest.raises(SettingError, match=message):
        changed_recipe(RECIPE, **changes)
