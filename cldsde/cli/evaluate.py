"""Measure a trained run, or samples in files: distances, FID and its like, bits a dimension.

A run is sampled with each recipe, solvers times budgets, and compared with its own data set;
samples are compared with the data set of ``--reference``. Distances are biased by the number of
images: compare equal numbers only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.devices import add_device_argument, resolve_device
from cldsde.cli.extras import needs_images
from cldsde.cli.sample import (
    add_model_arguments,
    add_sampling_arguments,
    model_of,
    sampling_of,
)

if TYPE_CHECKING:
    from cldsde.images.config import RunConfig, SamplingConfig
    from cldsde.images.evaluate.evaluation import Evaluation
    from cldsde.images.model import ImageModel
    from cldsde.images.sample.source import OtherDynamics

INTERRUPTED = "interrupted; the same command goes on"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde evaluate``."""
    parser.add_argument(
        "target",
        type=str,
        nargs="?",
        metavar="RUN|SAMPLES",
        help="a run; or FILE.npz, or a folder of pictures",
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser, several=True)
    parser.add_argument(
        "--metrics",
        type=str,
        metavar="LIST",
        default="fd",
        help="of fd, fid, kid, isc, prc, bpd, with commas",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", default=1000, help="images of each repetition"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=1, help="repetitions with other seeds"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="seeds count from here")
    parser.add_argument(
        "--reference",
        type=str,
        metavar="RUN|CONFIG",
        help="whose data set samples in files are compared with",
    )
    parser.add_argument(
        "--part", type=str, metavar="NAME", default="train", help="of the data: train or held_out"
    )
    parser.add_argument(
        "--features",
        type=str,
        metavar="NAME",
        default="classifier",
        help="for fd: classifier, trained on the data's classes, or module:attribute",
    )
    parser.add_argument(
        "--weights", type=str, metavar="FILE", help="Inception weights, for fid, kid, isc and prc"
    )
    parser.add_argument(
        "--likelihood-images", type=int, metavar="N", default=64, help="held-out images for bpd"
    )
    parser.add_argument(
        "--data", type=str, metavar="PATH", help="where the data set is, if not as configured"
    )
    parser.add_argument("--batch", type=int, metavar="N", default=64, help="images at once")
    parser.add_argument(
        "--out",
        type=str,
        metavar="FILE",
        help="results; RUN/evaluation.json or SAMPLES-evaluation.json by default",
    )
    add_device_argument(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, load model and data; return the work that is left."""
    with needs_images():
        from cldsde.images.runs import CONFIG
    if options.model is not None:
        return _of_model(options)
    if options.target is None:
        msg = "a run, samples or --model is needed"
        raise ValueError(msg)
    target = Path(options.target).expanduser()
    if not target.exists():
        msg = f"there is no run and no file {target}"
        raise ValueError(msg)
    if options.part not in {"train", "held_out"}:
        msg = f"--part must be train or held_out; got {options.part!r}"
        raise ValueError(msg)
    is_run = (target / CONFIG).is_file()
    if is_run and options.reference is not None:
        msg = "--reference is for samples; a run is compared with its own data"
        raise ValueError(msg)
    if not is_run and options.reference is None:
        msg = "--reference is missing: the run or configuration whose data to compare with"
        raise ValueError(msg)
    return _of_run(options, target) if is_run else _of_samples(options, target)


def _of_run(options: Namespace, run: Path) -> Callable[[], None]:
    from cldsde.images.config import load_config
    from cldsde.images.runs import CONFIG

    model = model_of(options, str(run), resolve_device(options.device))
    name = "evaluation" if options.process is None else f"evaluation-{options.process}"
    return _measure(options, model, load_config(run / CONFIG), run, run / f"{name}.json")


def _of_model(options: Namespace) -> Callable[[], None]:
    """Measure a model that was trained elsewhere against the data of ``--reference``."""
    from cldsde.images.config import load_config
    from cldsde.images.runs import CONFIG

    model = model_of(options, options.target, resolve_device(options.device))
    if options.reference is None:
        msg = "--reference is missing: the run or configuration whose data to compare with"
        raise ValueError(msg)
    source = Path(options.reference).expanduser()
    config = load_config(source / CONFIG if source.is_dir() else source)
    out = _out(options, Path("model-evaluation.json"))
    folder = source if source.is_dir() else out.with_name(f"{out.stem}-reference")
    return _measure(options, model, config, folder, out)


def _measure(
    options: Namespace,
    model: ImageModel | OtherDynamics,
    config: RunConfig,
    folder: Path,
    default: Path,
) -> Callable[[], None]:
    from cldsde.images.evaluate.results import markdown_table

    evaluation = _evaluation(options, config, folder, shape=model.space.shape)
    recipes = _recipes(options, model)
    out = _out(options, default)
    _check_writable(out, evaluation)

    def work() -> None:
        found = evaluation.of_run(model, recipes, out)
        if found["recipes"]:
            print(markdown_table(found))
            _print_notes(found)
        bits = found["likelihood"]
        if bits is not None:
            spread = bits["standard_error"] or 0
            value = f"{bits['bits_per_dim']:.3f} ± {spread:.3f}"
            print(f"{value} bits a dimension ({bits['quantity']})")
            if not model.space.dequantised and model.vae is None:
                print(
                    "note: the model was trained without dequantisation, and has no density of "
                    "dequantised images to speak of",
                    file=sys.stderr,
                )
        print(f"All is in {out.resolve()}")

    return work


def _of_samples(options: Namespace, samples: Path) -> Callable[[], None]:
    from cldsde.images.config import load_config
    from cldsde.images.data.samples import load_samples
    from cldsde.images.errors import SettingError
    from cldsde.images.evaluate.results import markdown_table
    from cldsde.images.files import write_whole
    from cldsde.images.runs import CONFIG

    source = Path(options.reference).expanduser()
    config = load_config(source / CONFIG if source.is_dir() else source)
    images = load_samples(samples)
    count, *sides = images.shape
    shape = (sides[0], sides[1], sides[2])
    place = samples.resolve() if samples.name in {"", ".."} else samples
    out = _out(options, place.parent / f"{place.name}-evaluation.json")
    # A classifier is kept in the run whose data it knows, or beside the results.
    folder = source if source.is_dir() else out.with_name(f"{out.stem}-reference")
    evaluation = _evaluation(options, config, folder, count, shape=shape)
    if "bpd" in evaluation.metrics:
        raise SettingError("metrics", "samples have no likelihood; bpd is for runs")
    _check_writable(out, evaluation)

    def work() -> None:
        cell = evaluation.measure(images, evaluation.metrics)
        text = json.dumps({"samples": str(samples), "measures": cell}, indent=1) + "\n"
        write_whole(out, lambda path: path.write_text(text))
        row = {"sampling": {"solver": place.name, "nfe": ""}, "cells": {"": cell}}
        print(markdown_table({"recipes": [row]}))
        _print_notes({"recipes": [row]})
        print(f"All is in {out.resolve()}")

    return work


def _print_notes(found: dict[str, Any]) -> None:
    """Say on stderr where there are fewer images than a distance needs."""
    cells = [cell for row in found["recipes"] for cell in row["cells"].values()]
    measures = [measure for cell in cells for name, measure in cell.items() if name[:3] == "fd "]
    few = [measure for measure in measures if measure["singular"]]
    if few:
        print(
            f"note: Fréchet distances of {few[0]['samples']} images in {few[0]['feature_count']} "
            "features are strongly biased; take more images than features",
            file=sys.stderr,
        )


def _out(options: Namespace, default: Path) -> Path:
    """The file of results."""
    out = Path(options.out).expanduser() if options.out else default
    if out.is_dir():
        msg = f"--out must name a file; {out} is a folder"
        raise ValueError(msg)
    return out


def _check_writable(out: Path, evaluation: Evaluation) -> None:
    """Raise unless results, and what is kept beside them, can be written."""
    from cldsde.images.files import check_writable

    check_writable(out.parent)
    if evaluation.fills_folder:
        check_writable(evaluation.folder)


def _evaluation(
    options: Namespace,
    config: RunConfig,
    folder: Path,
    images: int | None = None,
    *,
    shape: tuple[int, int, int],
) -> Evaluation:
    from cldsde.images.evaluate.evaluation import Evaluation

    source = config.data
    if options.data is not None:
        place = {"path": str(Path(options.data).expanduser())}
        source = dataclasses.replace(source, options={**source.options, **place})
    evaluation = Evaluation(
        data=source.load(),
        part=options.part,
        metrics=[name.strip() for name in options.metrics.split(",")],
        samples=options.samples,
        repeats=options.repeats,
        first_seed=options.seed,
        batch=options.batch,
        features=options.features,
        weights=None if options.weights is None else Path(options.weights).expanduser(),
        likelihood_images=options.likelihood_images,
        folder=folder,
        device=resolve_device(options.device),
        progress=True,
    )
    evaluation.check(images, shape=shape)
    return evaluation


def _recipes(options: Namespace, model: ImageModel | OtherDynamics) -> list[SamplingConfig]:
    """Each solver with each budget."""
    from cldsde.images.sample.sampler import check_sampling

    configured = model.sampling
    words = [] if options.nfe is None else options.nfe.split(",")
    if not all(word.strip().isdigit() for word in words):
        msg = f"--nfe must be numbers with commas; got {options.nfe!r}"
        raise ValueError(msg)
    budgets: list[int | None] = [int(word) for word in words] or [None]
    recipes = []
    solvers = [None] if options.solver is None else options.solver.split(",")
    for solver in solvers:
        for nfe in budgets:
            one = options.clone()
            one.solver, one.nfe = solver and solver.strip(), nfe
            recipe = sampling_of(one, configured)
            check_sampling(model.score, recipe)
            recipes.append(recipe)
    return recipes
