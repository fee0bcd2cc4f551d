"""Fréchet distances of few evaluations: the noise levels of `cldsde.sample` beside the root grid.

``python benchmarks/fitted_levels.py docs/data/fitted-levels-VP.json RUN…`` samples the network of
each run of ``cldsde train`` under VP, with the solver of `cldsde.sample` for up to 9 evaluations,
on its noise levels and on `root_times` from κ = −3.3 to 3.3. Both have the same seeds. With
``--dynamics CLD`` it samples under CLD. The features come from a classifier, and from a network
with random weights. The script can be interrupted and keeps finished sets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beside_diffusers import DYNAMICS, Distances, check_kept
from cldsde import DenoiserScore, LinearSDE, sample
from cldsde.files import write_whole
from cldsde.images.model import load_model
from cldsde.solvers import root_times, times_of_kappa
from cldsde.solvers.recommended import Choice, choices_of


def both(sde: LinearSDE, nfe: int) -> dict[str, Choice]:
    """The choice of `sample` for a number of evaluations, and its solver on the root grid."""
    own = choices_of(sde, nfe - 1)[0]
    return {"sample": own, "root_times": replace(own, grid=root_times, ends=(-3.3, 3.3))}


def options(sde: LinearSDE, row: Choice, nfe: int) -> dict[str, Any]:
    """Solver and grid of a row."""
    first, last = times_of_kappa(sde, torch.tensor(row.ends)).tolist()
    return {"solver": row.solver, "times": row.grid(first, last, nfe - 1, sde=sde)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--dynamics", choices=DYNAMICS, default="VP")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 7, 9])
    parser.add_argument("--images", type=int, default=500, help="images per set")
    parser.add_argument("--sets", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"recipes": {}, "networks": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    sde = DYNAMICS[arguments.dynamics]()
    recipes = {
        str(nfe): [repr(row.solver), row.grid.__name__, row.ends]
        for nfe in arguments.nfe
        for row in [both(sde, nfe)["sample"]]
    }
    about = {"dynamics": arguments.dynamics}
    check_kept(results.setdefault("about", about), about)
    check_kept(results["recipes"], recipes)
    results["recipes"] |= recipes
    for run in arguments.runs:
        model = load_model(run)
        space, distances = model.space, Distances(run, model)
        score = DenoiserScore(model.score.denoiser, sde)
        shape = (arguments.images, *space.shape)
        found = results["networks"].setdefault(run.name, {})
        network = {
            "data": model.config.data.name,
            "process": repr(model.score.sde),
            "weights": sum(x.numel() for x in model.score.parameters()),
            "shape": space.shape,
            "images": arguments.images,
            "trained_on": model.images_seen,
        }
        check_kept(found.setdefault("about", network), network)
        for nfe in arguments.nfe:
            rows = found.setdefault(str(nfe), {name: {} for name in both(sde, nfe)})
            for name, row in both(sde, nfe).items():
                for seed in range(len(rows[name].get("distances", [])), arguments.sets):
                    x = sample(sde, score, shape, seed=seed, batch=250, **options(sde, row, nfe))
                    distances.add(rows[name], x)
                    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
                    save = partial(Path.write_text, data=text, encoding="utf-8")
                    write_whole(arguments.results, save)
            print(run.name, nfe, rows, flush=True)


if __name__ == "__main__":
    main()
