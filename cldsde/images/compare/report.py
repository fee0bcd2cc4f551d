"""Report of a comparison, from its file of results and its pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cldsde.files import write_whole
from cldsde.images.compare.tables import MEASURES, measures_of, tables
from cldsde.images.figures import is_whole_picture
from cldsde.validation.page import data_uri, render_page

RESULTS = "comparison.json"
"""File of a comparison that holds all its numbers."""
FORMAT = "a comparison of cldsde, version 2"
"""Format of the file of results, in the file itself."""
_BODY = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
_COLOURS = (0, 1, 2, 3, 4, 5, 6, 8, 9)  # of matplotlib's cycle, without the grey of the others


def read_comparison(file: Path) -> dict[str, Any]:
    """Results of a comparison so far, from their file."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to have it made again") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != FORMAT:
        older = str(kind).startswith(FORMAT.partition(",")[0])
        advice = "delete it to have it made again" if older else "choose another folder"
        raise ValueError(f"{file} is not {FORMAT}; {advice}")
    return found  # type: ignore[no-any-return]


def write_report(folder: Path) -> None:
    """Write ``table.md``, a plot of each measure and ``report.html`` beside `RESULTS`."""
    results = read_comparison(folder / RESULTS)
    found = tables(results)
    text = "\n\n".join(table.markdown() for table in found) + "\n"
    write_whole(folder / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    plots = []
    for measure in measures_of(results):
        figure, file = plot_measure(results, measure), folder / f"{measure}.svg"
        for each in (file, file.with_suffix(".png")):
            write_whole(each, lambda path, figure=figure: figure.savefig(path, dpi=150))  # type: ignore[misc]
        plots.append((MEASURES[measure], data_uri(file.read_bytes(), "image/svg+xml")))
    page = render_page(
        "Comparison of models and samplers",
        _BODY,
        results=results,
        tables=found,
        plots=plots,
        pictures=[
            (row, data_uri((folder / row["picture"]).read_bytes(), "image/png"))
            for row in results["rows"]
            if row["picture"] is not None and is_whole_picture(folder / row["picture"])
        ],
    )
    write_whole(folder / "report.html", lambda file: file.write_text(page, encoding="utf-8"))


def plot_measure(results: Mapping[str, Any], measure: str) -> Figure:
    """Plot a measure against score evaluations, one panel per model, the others in grey.

    Shows means over repeats, and bands of one standard deviation.
    """
    rows = []
    for row in results["rows"]:
        cells = [cell for cell in row["cells"] if measure in cell.get("measures", ())]
        if cells:
            values = [cell["measures"][measure] for cell in cells]
            spreads = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in values]
            line = [cell["nfe"] for cell in cells], list(map(statistics.mean, values)), spreads
            rows.append((row["model"], row["label"], line))
    models = list(dict.fromkeys(model for model, _, _ in rows))
    labels = list(dict.fromkeys(label for _, label, _ in rows))
    columns = min(3, len(models))
    height = math.ceil(len(models) / columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * height), layout="constrained")
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for axes, model in zip(grid.flat, models, strict=False):
        for own, label, (nfe, means, spreads) in rows:
            if own != model:
                axes.plot(nfe, means, color="0.82", linewidth=1, zorder=1)
                continue
            i = labels.index(label)
            colour, marker = f"C{_COLOURS[i % len(_COLOURS)]}", "osD^v<>P"[i % 8]
            axes.plot(nfe, means, label=label, color=colour, marker=marker, markersize=5, zorder=2)
            band = np.subtract(means, spreads), np.add(means, spreads)
            axes.fill_between(nfe, *band, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(model)
        axes.legend(fontsize="small", framealpha=0.85)
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.grid(visible=True, alpha=0.3)
    for axes in grid.flat[len(models) :]:
        axes.set_axis_off()
    figure.supxlabel("score evaluations per image (NFE)", fontsize="medium")
    figure.supylabel(MEASURES[measure], fontsize="medium")
    return figure
