"""Gain of a sampler that `cldsde tune` fits to a model, over the default.

``python benchmarks/tuning_gain.py RUN docs/data/tuning.json`` makes the numbers of the page on
tuning. RUN is the model of ``cldsde demo``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from cldsde.images.evaluate.classifier import CLASSIFIER
from cldsde.images.model import load_model
from cldsde.images.tuning import Tuning
from cldsde.solvers import recommend
from cldsde.solvers.fitting import TRIES

NFE = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.run)
    data = model.config.data.load()
    tuning = Tuning(model, data, arguments.run / CLASSIFIER)
    tuning.check(NFE, TRIES)
    started = time.perf_counter()
    search = tuning.search(NFE, TRIES)
    search.run(progress=True)
    seconds = time.perf_counter() - started
    found = tuning.report(search.best, NFE)
    results = {
        "data": model.config.data.name,
        "process": repr(model.score.sde),
        "weights": sum(x.numel() for x in model.score.parameters()),
        "shape": model.space.shape,
        "images": tuning.images,
        "tries": TRIES,
        "minutes": round(seconds / 60, 1),
        "default": recommend(tuning.process, NFE, shape=model.space.shape).as_dict(),
        "distances": {
            name: {"default": sets.default.tolist(), "fitted": sets.fitted.tolist()}
            for name, sets in found.items()
        },
    }
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
