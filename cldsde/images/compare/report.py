"""Report of a comparison, from its file of results and its pictures: tables, plots and a page."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cldsde.files import write_whole
from cldsde.images.data.pixels import is_whole_picture
from cldsde.images.evaluate.results import bits_text
from cldsde.tables import Entry, Table, mean_and_spread

MEASURES = {
    "fd": "Fréchet distance",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
}
"""Measures by their names in results."""
_MODEL_HEAD = ["model", "process", "parameters of the score", "of the autoencoder", "images"]
_MODEL_HEAD += ["of which the prior", "seconds", "bits per dim"]
_HIGHER = {"isc", "precision", "recall"}  # is better


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Tables of each measure by budget and by tolerance, and of the models."""
    found = []
    for measure in measures_of(results):
        for adaptive in (False, True):
            rows = [row for row in results["rows"] if row["adaptive"] == adaptive]
            if rows:
                found.append(_measure_table(rows, measure))
    if results["models"]:
        found.append(_model_table(results["models"]))
    return found


def measures_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the measures among results, in the order of `MEASURES`."""
    cells = [cell for row in results["rows"] for cell in row["cells"]]
    return [name for name in MEASURES if any(name in cell.get("measures", ()) for cell in cells)]


def _measure_table(rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    adaptive = rows[0]["adaptive"]
    found = [(row, cell) for row in rows for cell in row["cells"]]
    budgets = sorted({cell["budget"] for _, cell in found}, reverse=adaptive)
    means: dict[tuple[str, float], list[float]] = {}
    for row, cell in found:
        if measure in cell.get("measures", ()):
            mean = statistics.mean(cell["measures"][measure])
            means.setdefault((row["model"], cell["budget"]), []).append(mean)
    # Adaptive solvers differ in cost, too.
    best = max if measure in _HIGHER else min
    bests = {key: best(x) for key, x in means.items() if len(x) > 1 and not adaptive}
    lines, reasons, brackets = [], [], False
    for row in rows:
        entries = dict.fromkeys(budgets, Entry(""))
        for cell in row["cells"]:
            budget, values = cell["budget"], cell.get("measures", {}).get(measure)
            if values is not None:
                mean = statistics.mean(values)
                text = mean_and_spread(values, _digits(mean))
                if cell["nfe"] != budget:
                    text, brackets = f"{text} ({cell['nfe']:.0f})", True
                entries[budget] = Entry(text, mean == bests.get((row["model"], budget)))
            if "reason" in cell:
                reasons.append(f"{row['model']}, {row['label']}, {budget:g}: {cell['reason']}.")
        names = [Entry(row[key], number=False) for key in ("model", "label")]
        lines.append([*names, *entries.values()])
    remarks = ["In brackets: mean score evaluations per image."] if brackets else []
    remarks += ["Bold: the best sampler of a model at a budget."] if bests else []
    if adaptive:
        remark = "A tolerance is rtol and atol of the solver."
        for row in rows:
            for name, value in row["fixed"].items():
                other = "rtol" if name == "atol" else "atol"
                remark += f" For {row['model']}, {row['label']}, it is {other}: {name} = {value}."
        remarks.append(remark)
    title = f"{MEASURES[measure]} against {'tolerance' if adaptive else 'score evaluations'}"
    head = ["model", "sampler", *(f"{budget:g}" for budget in budgets)]
    return Table(title, head, lines, remarks + reasons)


def _digits(mean: float) -> int:
    """Digits after the point: three in all, but at most four after the point."""
    size = math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else 0
    return min(max(2 - size, 0), 4)


def _model_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    lines, remarks = [], []
    kinds: dict[tuple[str, float], list[str]] = {}
    for name, model in models.items():
        numbers = [model["parameters"]["score"], model["parameters"]["autoencoder"] or None]
        numbers += [model["images"], model["prior_images"], model["seconds"]]
        texts = ["" if number is None else f"{number:,.0f}" for number in numbers]
        bits, text = model["bits"] or {}, ""
        if "bits_per_dim" in bits:
            text = bits_text(bits)
            kinds.setdefault((bits["quantity"], bits["t_min"]), []).append(name)
        elif bits:
            remarks.append(f"{name} has no bits per dim: {bits['reason']}.")
        words = [Entry(name, number=False), Entry(model["process"], number=False)]
        lines.append([*words, *map(Entry, [*texts, text])])
    about = [
        f"Bits of {', '.join(names)}: {quantity}; t_min = {t_min:g}."
        for (quantity, t_min), names in kinds.items()
    ]
    return Table("Models", _MODEL_HEAD, lines, about + remarks)


RESULTS = "comparison.json"
"""File of a comparison that holds all its numbers."""
FORMAT = "a comparison of cldsde, version 2"
"""Format of the file of results, in the file itself."""
_TEMPLATE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
_PAGE = Environment(autoescape=True).from_string(_TEMPLATE)
_COLOURS = (0, 1, 2, 3, 4, 5, 6, 8, 9)  # of matplotlib's cycle, without the grey of the others


def read_comparison(file: Path) -> dict[str, Any]:
    """Results of a comparison so far, from their file."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to have it made again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file} is not {FORMAT}; choose another folder")
    return found


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
        plots.append((MEASURES[measure], _data_uri(file.read_bytes(), "image/svg+xml")))
    page = _PAGE.render(
        results=results,
        tables=found,
        plots=plots,
        pictures=[
            (row, _data_uri((folder / row["picture"]).read_bytes(), "image/png"))
            for row in results["rows"]
            if row["picture"] is not None and is_whole_picture(folder / row["picture"])
        ],
    )
    write_whole(folder / "report.html", lambda file: file.write_text(page, encoding="utf-8"))


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def plot_measure(results: Mapping[str, Any], measure: str) -> Figure:
    """Plot mean ± standard deviation of repeats, one panel per model, the others in grey."""
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
    for place, model in enumerate(models, 1):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(height, columns, place, sharex=first, sharey=first)
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
        axes.grid(visible=True, alpha=0.3)
    figure.supxlabel("score evaluations per image (NFE)", fontsize="medium")
    figure.supylabel(MEASURES[measure], fontsize="medium")
    return figure
