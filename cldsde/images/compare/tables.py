"""Tables of a comparison, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
                table = _measure_table(rows, measure)
                table.remarks.extend(_about_latent_models(rows, results["models"]))
                found.append(table)
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


def _about_latent_models(rows: Sequence[Mapping[str, Any]], models: Mapping[str, Any]) -> list[str]:
    shapes: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] in models):
        model = models[name]
        if model["latent_shape"] is not None:
            latent, image = (" × ".join(map(str, model[key])) for key in ("latent_shape", "shape"))
            shapes.setdefault((latent, image), []).append(name)
    return [
        f"{', '.join(names)}: a score evaluation is of {latent} latent variables, not of {image} "
        "pixels; the decoder is not counted; images are means of p(x | z), not samples of it."
        for (latent, image), names in shapes.items()
    ]


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
