"""The best averaged weights of a training, by a metric."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from cldsde.images.runs import RunFolder


def keep_snapshot(
    run: RunFolder,
    save: Callable[[Path], object],
    seen: int,
    metrics: Mapping[str, float],
    by: str,
    count: int,
) -> None:
    """Write the weights with their metrics, and keep the files with the smallest metric ``by``."""
    folder, name = run / "snapshots", f"{seen:012d}.safetensors"
    folder.mkdir(exist_ok=True)
    record = folder / "values.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    save(folder / name)
    # A run may be resumed with another metric, in which files from before have no value.
    known[name] = metrics
    values = {x: m.get(by, math.inf) if isinstance(m, dict) else math.inf for x, m in known.items()}
    kept = sorted(known, key=lambda x: (values[x], x))[:count]
    run.write_json("snapshots/values.json", {name: known[name] for name in sorted(kept)})
    for file in folder.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
