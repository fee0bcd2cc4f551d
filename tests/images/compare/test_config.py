"""Configurations of comparisons: merged, complete, and rejected by the full name of the key."""

import tomllib

import pytest

from cldsde import CLD
from cldsde.errors import SettingError
from cldsde.images.compare import config as configs
from cldsde.images.compare.config import (
    PRESETS,
    ComparisonConfig,
    RowConfig,
    check_comparison,
    load_comparison,
)
from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.solvers import recommend
from comparisons import TINY, tiny

EM = {"model": "CLD", "solver": "euler-maruyama", "nfe": [3]}
ODE = {"model": "VP", "solver": "probability-flow", "tolerances": [0.1]}


def test_models_are_the_base_with_their_own_values_in_place():
    own = {"process": {"name": "VPSDE"}, "training": {"images": 7}}
    config = ComparisonConfig.from_dict(tiny(seed=3, models={"CLD": {}, "VP": own}))
    base = {**TINY["base"], "seed": 3}
    assert config.runs["CLD"] == RunConfig.from_dict(base)
    training = {**base["training"], "images": 7}
    expected = {**base, "process": {"name": "VPSDE"}, "training": training}
    assert config.runs["VP"] == RunConfig.from_dict(expected)


def test_a_written_comparison_is_read_again(tmp_path):
    config = ComparisonConfig.from_dict(tiny())
    file = tmp_path / "again.toml"
    file.write_text(config.to_toml())
    assert load_comparison(file) == config
    assert tomllib.loads(file.read_text())["rows"][0]["denoise"] is True
    changed = load_comparison(file, ["samples=9", "base.training.images=99"])
    assert (changed.samples, changed.runs["VP"].training.images) == (9, 99)


def test_a_row_has_a_recipe_for_each_budget_under_the_full_name_of_its_solver():
    row = RowConfig(model="CLD", solver="em", nfe=(5, 9))
    found = [(recipe.solver, recipe.grid, recipe.nfe) for recipe in row.recipes()]
    assert found == [("euler-maruyama", "root", 5), ("euler-maruyama", "root", 9)]
    assert (row.label, row.t_end) == ("euler-maruyama", 1e-3)
    # The recommended solver chooses its grid and where it ends.
    recommended = RowConfig(model="CLD", solver="recommended", nfe=(5,))
    assert recommended.recipes() == [SamplingConfig(nfe=5)]


def test_a_row_may_have_settings_whose_evaluations_are_its_budgets(tmp_path):
    files = [str(tmp_path / f"{nfe}.json") for nfe in (3, 5)]
    settings = [recommend(CLD(), nfe, shape=(1, 8, 8)) for nfe in (3, 5)]
    for each, file in zip(settings, files, strict=True):
        each.save(file)
    row = RowConfig(model="CLD", settings=files)
    assert (row.recipes(), row.budgets, row.label) == (settings, (3, 5), "settings")
    with pytest.raises(SettingError, match="nfe: must be left out with settings"):
        RowConfig(model="CLD", settings=files, nfe=(3,))
    with pytest.raises(SettingError, match="options: must be left out with settings"):
        RowConfig(model="CLD", settings=files, options={"order": 3})
    with pytest.raises(SettingError, match=r"settings: must have different .* got \(3, 3\)"):
        RowConfig(model="CLD", settings=[files[0], files[0]])
    with pytest.raises(SettingError, match=r"settings: .*none\.json: No such file"):
        RowConfig(model="CLD", settings=[str(tmp_path / "none.json")])
    config = ComparisonConfig.from_dict({**tiny(), "rows": [{"model": "CLD", "settings": files}]})
    assert ComparisonConfig.from_dict(config.to_dict()) == config
    check_comparison(config)
    other = ComparisonConfig.from_dict({**tiny(), "rows": [{"model": "VP", "settings": files}]})
    with pytest.raises(SettingError, match=r"rows\[0\].settings: settings must be for this pro"):
        check_comparison(other)


@pytest.mark.parametrize(("options", "atol"), [({}, 0.1), ({"atol": 0.02}, 0.02)])
def test_a_tolerance_sets_both_but_those_that_options_set(options, atol):
    row = RowConfig(model="VP", solver="gotta-go-fast", options=options, tolerances=(0.1,))
    assert row.recipes()[0].options == {"rtol": 0.1, "atol": atol}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "sample: unknown key; did you mean samples?"),
        ({"seed": 2**31}, "seed: must be less than 4096"),
        ({"metrics": ["fdd"]}, "metrics: must be one of .* did you mean fd?"),
        ({"models": {"../A": {}}, "rows": [{**EM, "model": "../A"}]}, "models: a name is made of"),
        ({"models": {"CLD": {}, "VP": {"data": {"name": "fashion_mnist"}}}}, "be the data of CLD"),
        ({"base": {**TINY["base"], "trainig": {}}}, "models.CLD.trainig: unknown key; did you"),
        ({"rows": []}, "rows: is empty"),
        ({"rows": [EM, {**EM, "label": "euler-maruyama"}]}, "rows: labels of a model must differ"),
        ({"rows": [EM, {**ODE, "model": "CLF"}]}, r"rows\[1\].model: must be .* did you mean CLD?"),
        ({"rows": [{**EM, "tolerances": [0.1]}]}, r"rows\[0\].nfe: euler-maruyama needs"),
        ({"rows": [{**ODE, "nfe": [3]}]}, r"rows\[0\].tolerances: probability-flow"),
    ],
)
def test_wrong_keys_and_values_are_rejected_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig.from_dict(tiny(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{**EM, "model": "VE", "solver": "sscs"}]}, r"rows\[0\].solver: SSCS needs"),
        ({"rows": [{**EM, "solver": "sscs-midpoint", "nfe": [2]}]}, r"rows\[0\].nfe: 2 evalu"),
        (
            {"models": {"CLD": {}, "VE": {"training": {"batch": 12, "micro_batch": 5}}}},
            "models.VE.training.micro_batch: must divide",
        ),
    ],
)
def test_a_comparison_that_cannot_be_made_is_rejected_before_any_work(changes, message):
    values = {"models": {"CLD": {}, "VE": {"process": {"name": "VESDE"}}}, "rows": [EM], **changes}
    with pytest.raises(ValueError, match=message):
        configs.check_comparison(ComparisonConfig.from_dict(tiny(**values)), device="cpu")


# Comparisons of many models. The solvers of the demonstration are also in the comparison "quick".
LONG = ("cld_variants", "fashion_mnist", "demo")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in PRESETS]
)
def test_the_comparisons_of_the_package_can_be_made(name):
    config = load_comparison(PRESETS[name], ["base.data.name=digits", "base.data.options={}"])
    configs.check_comparison(config, device="cpu")
    assert len({repr(run.network) for run in config.runs.values()}) == 1
