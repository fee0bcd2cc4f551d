"""Results as arrays, as strict JSON, as tables of text, and in figures."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cldsde.files import write_whole

Array = NDArray[np.float64]


def plain(value: Any) -> Any:
    """Fields, dicts and sequences for JSON: lists for tuples, None for NaN and infinity."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, enum.StrEnum) else value


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON to a file, one line per entry of a list; on failure the old file stays."""
    parts = []
    for name, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            rows = ",\n".join(json.dumps(row, allow_nan=False) for row in value)
            text = f"[\n{rows}\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    whole = "{\n" + ",\n".join(parts) + "\n}\n"
    write_whole(file, lambda path: path.write_text(whole, encoding="utf-8"))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Create a matplotlib figure and its axes, without a window."""
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError as error:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
