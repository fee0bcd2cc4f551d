"""Tables of comparisons: what is best, how many digits, and why something is not there."""

from cldsde.images.compare.report import measures_of, plot_measure, tables


def row(model: str, label: str, *cells: dict, adaptive: bool = False) -> dict:
    fixed = {"atol": 0.0078} if label == "GGF" else {}
    about = {"model": model, "label": label, "adaptive": adaptive, "fixed": fixed}
    return {**about, "cells": list(cells)}


def cell(budget: float, nfe: float, *values: float, measure: str = "fd") -> dict:
    return {"budget": budget, "nfe": nfe, "repeats": 2, "measures": {measure: list(values)}}


CLD = {"process": "CLD()", "parameters": {"score": 1234, "autoencoder": 0}, "shape": [1, 8, 8]}
CLD |= {"images": 10, "prior_images": None, "seconds": None}
RESULTS = {
    "rows": [
        row("CLD", "EM", cell(10, 10, 12.25, 12.75), cell(20, 20, 0.5, 0.54)),
        row("CLD", "SSCS", cell(10, 10, 14.0, 15.0), cell(20, 20, 0.4, 0.44)),
        row("VP", "PC", cell(10, 9, 0.3, 0.32), {"budget": 20, "repeats": 0, "reason": "NaN"}),
        row("VP", "ODE", cell(1e-3, 87.4, 0.0123456), adaptive=True),
    ],
    "models": {"CLD": {**CLD, "bits": {"reason": "no"}}},
}


def test_the_best_of_a_model_at_each_budget_is_marked_and_costs_are_shown():
    fixed, adaptive, models = tables(RESULTS)
    text = fixed.markdown().splitlines()
    assert text[2:7] == [
        "| model | sampler | 10 | 20 |",
        "| --- | --- | ---: | ---: |",
        "| CLD | EM | **12.5 ± 0.4** | 0.520 ± 0.028 |",
        "| CLD | SSCS | 14.5 ± 0.7 | **0.420 ± 0.028** |",
        "| VP | PC | 0.310 ± 0.014 (9) |  |",
    ]
    assert fixed.remarks[0].startswith("In brackets")
    assert fixed.remarks[1] == "Bold: the best sampler of a model at a budget."
    assert fixed.remarks[2] == "VP, PC, 20: NaN."
    assert "| VP | ODE | 0.0123 (87) |" in adaptive.markdown()
    assert models.remarks == ["CLD has no bits per dim: no."]


def test_the_tolerance_of_a_column_is_explained_below_the_table():
    rows = [row("VP", name, cell(0.1, 87.4, 0.01), adaptive=True) for name in ("ODE", "GGF")]
    [table] = tables({"rows": rows, "models": {}})
    expected = "A tolerance is rtol and atol of the solver. For VP, GGF, it is rtol: atol = 0.0078."
    assert table.remarks[1] == expected


def test_differences_between_models_stand_in_their_table_and_below():
    bits = {"bits_per_dim": 3.0, "standard_error": None, "is_bound": False}
    pixels = {**CLD, "bits": {**bits, "quantity": "a density", "t_min": 0.001}}
    latent = {**CLD, "parameters": {"score": 1234, "autoencoder": 5678}}
    latent |= {"images": 250048, "prior_images": 150016}
    latent["bits"] = {**bits, "is_bound": True, "quantity": "a bound", "t_min": 0.01}
    models = {"VP": pixels, "VE": pixels, "LSGM": latent}
    rows = [row(name, "EM", cell(10, 10, 1.0)) for name in models]
    measures, table = tables({"rows": rows, "models": models})
    assert not any(entry.best for line in measures.rows for entry in line)
    found = [[entry.text for entry in line[2:]] for line in table.rows]
    assert found[2] == ["1,234", "5,678", "250,048", "150,016", "", "≤ 3.000"]
    assert found[0][:4] == ["1,234", "", "10", ""]
    assert table.remarks == [
        "Bits of VP, VE: a density; t_min = 0.001.",
        "Bits of LSGM: a bound; t_min = 0.01.",
    ]


def test_a_higher_precision_is_better():
    cells = (("A", "x", 0.4), ("A", "y", 0.6), ("B", "y", 0.7))
    rows = [row(a, b, cell(5, 5, value, measure="precision")) for a, b, value in cells]
    [table] = tables({"rows": rows, "models": {}})
    assert [line[2].best for line in table.rows] == [False, True, False]


def test_each_model_has_a_panel_with_the_rows_of_the_others_in_grey():
    figure = plot_measure(RESULTS, *measures_of(RESULTS))
    cld, vp = figure.axes
    assert [axes.get_title() for axes in (cld, vp)] == ["CLD", "VP"]
    assert [text.get_text() for text in vp.get_legend().get_texts()] == ["PC", "ODE"]
    grey = [line for line in cld.get_lines() if line.get_color() == "0.82"]
    assert len(grey) == 2
