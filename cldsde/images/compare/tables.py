"""Tables of a comparison, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MEASURES = {
    "fd": "Fréchet distance",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
}
"""Measures by their names in results."""
_MODEL_HEAD = [
    "model",
    "process",
    "parameters of the score",
    "of the autoencoder",
    "images",
    "of which the prior",
    "seconds",
    "bits a dimension",
]
_HIGHER = {"isc", "precision", "recall"}  # is better


class Entry(NamedTuple):
    """What stands at a place of a table."""

    text: str
    best: bool = False
    number: bool = True


class Table(NamedTuple):
    """A table with its title, and remarks on what it lacks."""

    title: str
    head: list[str]
    rows: list[list[Entry]]
    remarks: list[str]

    def markdown(self) -> str:
        """With its title above and its remarks below."""
        numbers = [entry.number for entry in self.rows[0]]
        lines = [
            "| " + " | ".join(self.head) + " |",
            "| " + " | ".join("---:" if number else "---" for number in numbers) + " |",
        ]
        for row in self.rows:
            texts = [entry.text.replace("|", "\\|") for entry in row]
            marked = [
                f"**{text}**" if entry.best else text
                for text, entry in zip(texts, row, strict=True)
            ]
            lines.append("| " + " | ".join(marked) + " |")
        return "\n".join([f"## {self.title}", "", *lines, *(f"\n{x}" for x in self.remarks)])


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Each measure at each budget and at each tolerance, and the models."""
    found = []
    for measure in measures_of(results):
        name = MEASURES[measure]
        for adaptive, columns in ((False, "score evaluations"), (True, "tolerance")):
            rows = [row for row in results["rows"] if row["adaptive"] == adaptive]
            if rows:
                table = _measure_table(f"{name} against {columns}", rows, measure)
                found.append(table._replace(remarks=table.remarks + _of_latent(rows, results)))
    if results["models"]:
        found.append(_model_table(results["models"]))
    return found


def measures_of(results: Mapping[str, Any]) -> list[str]:
    """Names of what was measured, in the order of `MEASURES`."""
    there = {
        name
        for row in results["rows"]
        for cell in row["cells"]
        for name in cell.get("measures", ())
    }
    return [name for name in MEASURES if name in there]


def _measure_table(title: str, rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    budgets = sorted({cell["budget"] for row in rows for cell in row["cells"]})
    if rows[0]["adaptive"]:
        budgets.reverse()
    means = {
        (i, cell["budget"]): statistics.mean(cell["measures"][measure])
        for i, row in enumerate(rows)
        for cell in row["cells"]
        if measure in cell.get("measures", ())
    }
    of_model: dict[tuple[str, float], list[float]] = {}
    for (i, budget), mean in means.items():
        of_model.setdefault((rows[i]["model"], budget), []).append(mean)
    best = max if measure in _HIGHER else min
    bests = {
        key: best(values)
        for key, values in of_model.items()
        if len(values) > 1 and not rows[0]["adaptive"]  # where costs differ, too
    }
    lines, remarks = [], []
    for i, row in enumerate(rows):
        cells = {cell["budget"]: cell for cell in row["cells"]}
        line = [Entry(row["model"], number=False), Entry(row["label"], number=False)]
        for budget in budgets:
            cell = cells.get(budget, {})
            mean = means.get((i, budget))
            text = "" if mean is None else _measured(cell, measure, budget)
            leads = mean is not None and mean == bests.get((row["model"], budget))
            line.append(Entry(text, leads))
            if "reason" in cell:
                remarks.append(f"{row['model']}, {row['label']}, {budget:g}: {cell['reason']}.")
        lines.append(line)
    if rows[0]["adaptive"]:
        remarks.insert(0, _of_tolerances(rows))
    if bests:
        remarks.insert(0, "Bold: the best sampler of a model at a budget.")
    if any("(" in entry.text for line in lines for entry in line[2:]):
        remarks.insert(0, "In brackets: score evaluations that an image took in the mean.")
    return Table(title, ["model", "sampler", *(f"{b:g}" for b in budgets)], lines, remarks)


def _of_tolerances(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which of a solver's tolerances the columns are."""
    remark = "A tolerance is rtol and atol of the solver."
    for row in rows:
        for name, value in row["fixed"].items():
            other = "rtol" if name == "atol" else "atol"
            remark += f" Of {row['model']}, {row['label']}, it is {other}: {name} = {value}."
    return remark


def _of_latent(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[str]:
    """What an evaluation and an image of the latent models are among rows."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        model = results["models"].get(name)
        if model is not None and model["latent_shape"] is not None:
            pair = (_size(model["latent_shape"]), _size(model["shape"]))
            shapes.setdefault(pair, []).append(name)
    return [
        f"{', '.join(names)}: an evaluation of the score is of {latent} latent variables, not of "
        f"{image} pixels; that of the decoder is not counted; images are means of p(x | z), not "
        "draws of it."
        for (latent, image), names in shapes.items()
    ]


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _measured(cell: Mapping[str, Any], measure: str, budget: float) -> str:
    values = cell["measures"][measure]
    mean = statistics.mean(values)
    # Three digits; of what is small no more than four behind the point.
    size = math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else 0
    digits = min(max(2 - size, 0), 4)
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text if cell["nfe"] == budget else f"{text} ({cell['nfe']:.0f})"


def _model_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    lines, remarks = [], []
    kinds: dict[tuple[str, float], list[str]] = {}
    for name, model in models.items():
        bits, seconds = model["bits"] or {}, model["seconds"]
        text = ""
        if "bits_per_dim" in bits:
            text = f"{'≤ ' if bits['is_bound'] else ''}{bits['bits_per_dim']:.3f}"
            error = bits["standard_error"]
            text += "" if error is None else f" ± {error:.3f}"
            kinds.setdefault((bits["quantity"], bits["t_min"]), []).append(name)
        elif bits:
            remarks.append(f"{name} has no bits a dimension: {bits['reason']}.")
        parameters, prior_images = model["parameters"], model["prior_images"]
        lines.append(
            [
                Entry(name, number=False),
                Entry(model["process"], number=False),
                Entry(f"{parameters['score']:,}"),
                Entry(f"{parameters['autoencoder']:,}" if parameters["autoencoder"] else ""),
                Entry(f"{model['images']:,}"),
                Entry("" if prior_images is None else f"{prior_images:,}"),
                Entry("" if seconds is None else f"{seconds:,.0f}"),
                Entry(text),
            ]
        )
    told = [
        f"Bits of {', '.join(names)}: {quantity}; t_min = {t_min:g}."
        for (quantity, t_min), names in kinds.items()
    ]
    return Table("Models", _MODEL_HEAD, lines, told + remarks)
