"""Configurations of comparisons: merged, complete, and refused by the full name of the key."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from cldsde.images.compare.config import (
    PRESETS,
    ComparisonConfig,
    RowConfig,
    check_comparison,
    load_comparison,
)
from cldsde.images.config import RunConfig
from cldsde.images.sample.sampler import make_solver
from comparisons import TINY, tiny

EM = {"model": "CLD", "solver": "euler-maruyama", "nfe": [3]}
ODE = {"model": "VP", "solver": "probability-flow"}


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


def test_rows_have_a_recipe_for_each_budget():
    row = RowConfig(model="CLD", solver="sscs", grid="uniform", nfe=(5, 9))
    assert [(x.solver, x.grid, x.nfe) for x in row.recipes()] == [
        ("sscs", "uniform", 5),
        ("sscs", "uniform", 9),
    ]
    assert row.label == "sscs"


def test_a_short_name_of_a_solver_becomes_the_full_one():
    row = RowConfig(model="CLD", solver="em", nfe=(5,))
    assert (row.solver, row.label) == ("euler-maruyama", "euler-maruyama")
    assert row.recipes()[0].solver == "euler-maruyama"


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, {"rtol": 0.1, "atol": 0.1}), ({"atol": 0.02}, {"rtol": 0.1, "atol": 0.02})],
)
def test_a_tolerance_sets_both_but_those_that_options_set(options, expected):
    row = RowConfig(model="VP", solver="gotta-go-fast", options=options, tolerances=(0.1,))
    assert row.recipes()[0].options == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "sample: unknown key; did you mean samples?"),
        ({"samples": 1}, "samples: must be greater than or equal to 2"),
        ({"repeats": 0}, "repeats: must be"),
        ({"seed": 2**31}, "seed: must be less than 4096"),
        ({"metrics": ["fdd"]}, "metrics: must be one of .* did you mean fd?"),
        ({"metrics": ["bpd"]}, "metrics: must hold one of samples"),
        ({"models": {}}, "models: is empty"),
        ({"models": {"CLD": 3}, "rows": [EM]}, "models.CLD: must be a section"),
        ({"models": {"../A": {}}, "rows": [{**EM, "model": "../A"}]}, "models: a name is made of"),
        (
            {"models": {"CLD": {}, "VP": {"training": {"btch": 3}}}},
            "training.btch: unknown",
        ),
        ({"base": {**TINY["base"], "trainig": {}}}, "base.trainig: unknown key; did you mean tr"),
        ({"base": {}}, "models.CLD.training: is missing"),
        (
            {"models": {"CLD": {}, "VP": {"data": {"name": "fashion_mnist"}}}},
            "models.VP.data: must be the data of CLD",
        ),
        ({"rows": 3}, "rows: must be a valid tuple"),
        ({"rows": []}, "rows: is empty"),
        ({"rows": [EM, {**EM, "model": "CLF"}]}, r"rows\[1\].model: must be .* did you mean CLD\?"),
        ({"rows": [EM, {**EM, "label": "euler-maruyama"}]}, "rows: labels of a model must differ"),
        (
            {"rows": [{**EM, "solver": "sscz"}]},
            r"rows\[0\].solver: .*did you mean sscs\?",
        ),
        ({"rows": [{**EM, "nef": [3]}]}, r"rows\[0\].nef: unknown key; did you mean nfe\?"),
        ({"rows": [{**EM, "nfe": [3, 3]}]}, r"rows\[0\].nfe: must differ"),
        ({"rows": [{**EM, "nfe": [1]}]}, r"rows\[0\].nfe: must be greater"),
        ({"rows": [{**EM, "nfe": ["x"]}]}, r"rows\[0\].nfe\[0\]: must be a valid integer"),
        ({"rows": [{**EM, "nfe": [3, "4"]}]}, r"rows\[0\].nfe\[1\]: must be a valid integer"),
        ({"rows": [{**EM, "options": {"ordr": 3}}]}, r"rows\[0\].options.ordr: unknown key"),
        ({"rows": [{**EM, "tolerances": [0.1]}]}, r"rows\[0\].nfe: euler-maruyama needs"),
        (
            {"rows": [{**EM, "solver": "probability-flow"}]},
            r"rows\[0\].tolerances: probability-flow",
        ),
        (
            {"rows": [{"model": "VP", "solver": "torchdiffeq-rk4", "tolerances": [0.1]}]},
            r"rows\[0\].nfe: torchdiffeq-rk4 needs a list of nfe, and no tolerances",
        ),
        (
            {"rows": [{"model": "VP", "solver": "probability-flow", "tolerances": [-1.0]}]},
            r"rows\[0\].tolerances\[0\]: must be greater than 0",
        ),
        (
            {"rows": [{**ODE, "options": {"rtol": 0.1, "atol": 0.1}, "tolerances": [0.1, 0.01]}]},
            r"rows\[0\].tolerances: set nothing: options has rtol and atol; leave one out",
        ),
        (
            {"rows": [{**ODE, "options": {"atol": 0.1, "rtol": 0.2}, "tolerances": [0.1]}]},
            r"rows\[0\].tolerances: set nothing",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig.from_dict(tiny(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": [EM, {"model": "VE", "solver": "sscs", "nfe": [5]}]},
            r"rows\[1\].solver: SSCS needs",
        ),
        (
            {"rows": [{**EM, "solver": "sscs-midpoint", "nfe": [2]}]},
            r"rows\[0\].nfe: 2 evaluations",
        ),
        (
            {"rows": [{**EM, "solver": "torchdiffeq-rk4", "nfe": [8, 4]}]},
            r"rows\[0\].nfe: 4 evaluations are too few for a step of TorchDiffEq",
        ),
        (
            {"base": {**TINY["base"], "network": {"options": {"channels": [16, 17]}}}},
            "network.options: groups must divide",
        ),
        (
            {"models": {"CLD": {}, "VE": {"training": {"batch": 12, "micro_batch": 5}}}},
            "models.VE.training.micro_batch: must divide",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(changes, message):
    values = {"models": {"CLD": {}, "VE": {"process": {"name": "VESDE"}}}, "rows": [EM], **changes}
    with pytest.raises(ValueError, match=message):
        check_comparison(ComparisonConfig.from_dict(tiny(**values)), device="cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_the_comparisons_of_the_package_can_be_made(name):
    config = load_comparison(PRESETS[name], ["base.data.name=digits", "base.data.options={}"])
    check_comparison(config, device="cpu")
    assert len({repr(run.network) for run in config.runs.values()}) == 1


@pytest.mark.parametrize("name", ["fashion_mnist", "quick"])
def test_models_of_a_comparison_are_equal_but_for_their_processes(name):
    config = load_comparison(PRESETS[name])
    # The published solver draws fresh noise after a rejection.
    [ggf] = [row for row in config.rows if row.solver == "gotta-go-fast"]
    assert make_solver(ggf.recipes()[0]).noise_on_reject == "bridge"
    assert ggf.label == "GGF (bridge)"
    # Models of pixels are trained alike on the same images, but for one that says otherwise.
    pixels = {
        repr((run.data, dataclasses.replace(run.training, weighting="reweighted")))
        for run in config.runs.values()
        if run.latent is None
    }
    assert len(pixels) == 1
    weighed = [name for name, run in config.runs.items() if run.training.weighting != "reweighted"]
    assert all(name.endswith("log-snr") for name in weighed)
