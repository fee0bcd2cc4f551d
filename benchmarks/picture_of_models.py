"""The first images of several models of a comparison, a line each, as one picture.

``python benchmarks/picture_of_models.py FASHION docs/_static/cld-beside-others.png`` takes what
``cldsde compare fashion_mnist --out FASHION`` has made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cldsde.images.compare.report import RESULTS, read_comparison

ROWS = (
    ("VP", "DPM-Solver++"),
    ("CLD", "multistep SDE"),
    ("CLD-log-snr", "multistep SDE"),
    ("VE", "PC"),
    ("LSGM", "adaptive ODE"),
    ("CLD-LSGM", "multistep SDE"),
)
SIZE, GAP, ZOOM = 16, 2, 3  # of an image, between two, of the picture


def last_line(file: Path) -> np.ndarray:
    """Cut out the row of the largest budget from a picture with one row per budget."""
    sheet = np.asarray(Image.open(file).convert("L"))
    return sheet[-(SIZE + 2 * GAP) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    try:
        found = read_comparison(arguments.folder / RESULTS)
    except ValueError as error:
        sys.exit(str(error))
    pictures = {(row["model"], row["label"]): row["picture"] for row in found["rows"]}
    lines = [last_line(arguments.folder / pictures[row]) for row in ROWS]
    whole = Image.fromarray(np.concatenate(lines))
    size = (ZOOM * whole.width, ZOOM * whole.height)
    whole.resize(size, Image.Resampling.NEAREST).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
