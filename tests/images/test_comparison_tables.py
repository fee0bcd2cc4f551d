"""Tables of comparisons: what is best, how many digits, and why something is not there."""

from __future__ import annotations

from cldsde.images.comparison_report import plot_measure
from cldsde.images.comparison_tables import measures_of, tables


def row(model: str, label: str, *cells: dict, adaptive: bool = False) -> dict:
    fixed = {"atol": 0.0078} if label == "GGF" else {}
    about = {"model": model, "label": label, "adaptive": adaptive, "fixed": fixed}
    return {**about, "cells": list(cells)}


def cell(budget: float, nfe: float, *values: float, measure: str = "fd") -> dict:
    return {"budget": budget, "nfe": nfe, "repeats": 2, "measures": {measure: list(values)}}


RESULTS = {
    "rows": [
        row("CLD", "EM", cell(10, 10, 12.25, 12.75), cell(20, 20, 0.5, 0.54)),
        row("VP", "PC", cell(10, 9, 150.0, 152.0), {"budget": 20, "repeats": 0, "reason": "NaN"}),
        row("VP", "ODE", cell(1e-3, 87.4, 0.0123456), adaptive=True),
    ],
    "models": {
        "CLD": {
            "process": "CLD()",
            "parameters": 1234,
            "images": 10,
            "seconds": None,
            "bits": {"reason": "no"},
        }
    },
}


def test_the_best_of_each_budget_is_marked_and_costs_are_told():
    fixed, adaptive, models = tables(RESULTS)
    text = fixed.markdown().splitlines()
    assert text[2:6] == [
        "| model | sampler | 10 | 20 |",
        "| --- | --- | ---: | ---: |",
        "| CLD | EM | **12.5 ± 0.4** | 0.520 ± 0.028 |",
        "| VP | PC | 151 ± 1 (9) |  |",
    ]
    assert fixed.remarks[0].startswith("In brackets")
    assert fixed.remarks[1] == "VP, PC, 20: NaN."
    assert "| VP | ODE | 0.0123 (87) |" in adaptive.markdown()
    assert models.remarks == ["CLD has no bits a dimension: no."]


def test_which_tolerance_a_column_is_stands_below_it():
    rows = [
        row("VP", "ODE", cell(0.1, 87.4, 0.01), adaptive=True),
        row("VP", "GGF", cell(0.1, 30.2, 0.02), adaptive=True),
    ]
    [table] = tables({"rows": rows, "models": {}})
    assert table.remarks[1] == (
        "A tolerance is rtol and atol of the solver. Of VP, GGF, it is rtol: atol = 0.0078."
    )


def test_precision_is_better_where_it_is_higher():
    rows = [
        row("A", "x", cell(5, 5, 0.4, measure="precision")),
        row("A", "y", cell(5, 5, 0.6, measure="precision")),
    ]
    [table] = tables({"rows": rows, "models": {}})
    assert [line[2].best for line in table.rows] == [False, True]


def test_each_model_has_a_panel_with_the_rows_of_the_others_in_grey():
    figure = plot_measure(RESULTS, *measures_of(RESULTS))
    cld, vp = figure.axes
    assert [axes.get_title() for axes in (cld, vp)] == ["CLD", "VP"]
    assert [text.get_text() for text in vp.get_legend().get_texts()] == ["PC", "ODE"]
    grey = [line for line in cld.get_lines() if line.get_color() == "0.82"]
    assert len(grey) == 2
