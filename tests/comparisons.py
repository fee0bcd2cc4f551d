"""A comparison that takes seconds, for the tests of its parts and of its command."""

import copy
import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "samples": 6,
    "repeats": 2,
    "batch": 6,
    "metrics": ["fd"],
    "features": "flat_features:flat",
    "likelihood_images": 2,
    "base": {
        "data": {"name": "digits", "dequantise": True},
        "network": {"options": {"channels": [8], "groups": 4}},
        "training": {
            "images": 32,
            "batch": 16,
            "learning_rate": 1e-3,
            "held_out": 8,
            "log_every": 16,
            "save_every": 16,
            "sample_every": 32,
            "sample_grid": 4,
        },
        "sampling": {"solver": "euler-maruyama", "nfe": 3},
    },
    "models": {"CLD": {}, "VP": {"process": {"name": "VPSDE"}, "network": {"options": {}}}},
    "rows": [
        {"model": "CLD", "label": "EM", "solver": "euler-maruyama", "nfe": [3, 5]},
        {"model": "VP", "label": "ODE", "solver": "probability-flow", "tolerances": [0.5]},
        {"model": "CLD", "label": "SSCS | midpoint", "solver": "sscs-midpoint", "nfe": [4]},
    ],
}


def tiny(**changes: Any) -> dict[str, Any]:
    """`TINY` with some of its keys changed."""
    return copy.deepcopy({**TINY, **changes})


def feature_module(folder: Path) -> Path:
    """Write the module of `TINY`'s features into a folder; return the folder."""
    folder.mkdir(exist_ok=True)
    text = "def flat(images):\n    return images.flatten(1).float()[:, ::8] / 255\n"
    (folder / "flat_features.py").write_text(text)
    return folder


def numbers(file: Path) -> Any:
    """Results of a comparison without measured times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(x) for key, x in value.items() if key != "seconds"}
        return [timeless(x) for x in value] if isinstance(value, list) else value

    return timeless(json.loads(file.read_text()))
