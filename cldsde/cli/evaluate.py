"""Measure a trained run, or samples in files: Fréchet distances, FID, KID, bits per dim.

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

from cldsde.cli.options import (
    INTERRUPTED,
    add_device_argument,
    needs_images,
    option,
    path_of,
    resolve_device,
)
from cldsde.cli.sample import add_model_arguments, add_sampling_arguments, model_of, sampling_of

if TYPE_CHECKING:
    from cldsde.images.config import RunConfig, SamplingConfig
    from cldsde.images.evaluate.evaluation import Evaluation, Model

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde evaluate``."""
    text = "a run; or FILE.npz, or a folder of pictures"
    option(parser, "target", "RUN|SAMPLES", text, nargs="?")
    add_model_arguments(parser)
    add_sampling_arguments(parser, several=True)
    text = "some of fd, fid, kid, isc, prc, bpd, with commas"
    option(parser, "--metrics", "LIST", text, default="fd")
    option(parser, "--samples", "N", "images per repetition", type=int, default=1000)
    option(parser, "--repeats", "N", "repetitions with other seeds", type=int, default=1)
    option(parser, "--seed", "N", "first seed", type=int, default=0)
    option(parser, "--reference", "RUN|CONFIG", "data set to compare samples in files with")
    option(parser, "--part", "NAME", "part of the data: train or held_out", default="train")
    text = "features for fd: classifier, trained on the data's classes, or module:attribute"
    option(parser, "--features", "NAME", text, default="classifier")
    option(parser, "--weights", "FILE", "Inception weights, for fid, kid, isc and prc")
    text = "held-out images for bpd"
    option(parser, "--likelihood-images", "N", text, type=int, default=64)
    option(parser, "--data", "PATH", "path of the data set, if not as configured")
    option(parser, "--batch", "N", "images per batch", type=int, default=64)
    text = "file of results; RUN/evaluation.json or SAMPLES-evaluation.json by default"
    option(parser, "--out", "FILE", text)
    add_device_argument(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, load model and data; return the remaining work."""
    with needs_images():
        from cldsde.images.config import load_config
        from cldsde.images.runs import CONFIG
    missing = "--reference is missing: the run or configuration whose data to compare with"
    target, source = path_of(options.target), path_of(options.reference)
    if options.model is None:
        if target is None:
            msg = "a run, samples or --model is needed"
            raise ValueError(msg)
        if not target.exists():
            msg = f"there is no run and no file {target}"
            raise ValueError(msg)
    if options.part not in {"train", "held_out"}:
        msg = f"--part must be train or held_out; got {options.part!r}"
        raise ValueError(msg)
    is_run = options.model is None and target is not None and (target / CONFIG).is_file()
    if is_run and source is not None:
        msg = "--reference is for samples; a run is compared with its own data"
        raise ValueError(msg)
    device, model = resolve_device(options.device), None
    if is_run or options.model is not None:
        model = model_of(options, options.target, device)
    if is_run:
        assert target is not None
        name = "evaluation" if options.process is None else f"evaluation-{options.process}"
        out, folder, config = _out(options, target / f"{name}.json"), target, target / CONFIG
    else:
        if source is None:
            raise ValueError(missing)
        default = Path("model-evaluation.json")
        if target is not None:
            place = target.resolve() if target.name in {"", ".."} else target
            default = place.parent / f"{place.name}-evaluation.json"
        out = _out(options, default)
        # A classifier is kept in the run whose data it was trained on, or beside the results.
        folder = source if source.is_dir() else out.with_name(f"{out.stem}-reference")
        config = source / CONFIG if source.is_dir() else source
    loaded = load_config(config)
    if model is not None:
        return _of_model(options, model, _evaluation(options, loaded, folder), out)
    assert target is not None
    return _of_samples(options, target, loaded, folder, out)


def _of_model(
    options: Namespace, model: Model, evaluation: Evaluation, out: Path
) -> Callable[[], None]:
    from cldsde.images.evaluate.results import markdown_table

    evaluation.check(shape=model.space.shape)
    recipes = _recipes(options, model)
    _check_writable(out, evaluation)

    def work() -> None:
        found = evaluation.of_run(model, recipes, out)
        if found["recipes"]:
            print(markdown_table(found))
            _print_notes(found)
        bits = found["likelihood"]
        if bits is not None:
            value = f"{bits['bits_per_dim']:.3f} ± {bits['standard_error'] or 0:.3f}"
            print(f"{value} bits per dim ({bits['quantity']})")
            if not model.space.dequantised and model.vae is None:
                _note(
                    "the model was trained without dequantisation, and has no useful density of "
                    "dequantised images"
                )
        print(f"All is in {out.resolve()}")

    return work


def _of_samples(
    options: Namespace, samples: Path, config: RunConfig, folder: Path, out: Path
) -> Callable[[], None]:
    from cldsde.images.data.samples import load_samples
    from cldsde.images.errors import SettingError
    from cldsde.images.evaluate.results import markdown_table
    from cldsde.images.files import write_whole

    images = load_samples(samples)
    count, channels, height, width = images.shape
    evaluation = _evaluation(options, config, folder)
    evaluation.check(count, shape=(channels, height, width))
    if "bpd" in evaluation.metrics:
        raise SettingError("metrics", "samples have no likelihood; bpd is for runs")
    _check_writable(out, evaluation)

    def work() -> None:
        cell = evaluation.measure(images, evaluation.metrics)
        text = json.dumps({"samples": str(samples), "measures": cell}, indent=1) + "\n"
        write_whole(out, lambda path: path.write_text(text))
        name = (samples.resolve() if samples.name in {"", ".."} else samples).name
        found = {"recipes": [{"sampling": {"solver": name, "nfe": ""}, "cells": {"": cell}}]}
        print(markdown_table(found))
        _print_notes(found)
        print(f"All is in {out.resolve()}")

    return work


def _print_notes(found: dict[str, Any]) -> None:
    """Note on stderr that there are fewer images than a distance needs."""
    cells = [cell for row in found["recipes"] for cell in row["cells"].values()]
    measures = [measure for cell in cells for name, measure in cell.items() if name[:3] == "fd "]
    few = [measure for measure in measures if measure["singular"]]
    if few:
        _note(
            f"Fréchet distances of {few[0]['samples']} images in {few[0]['feature_count']} "
            "features are strongly biased; use more images than features"
        )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _out(options: Namespace, default: Path) -> Path:
    """The file of results."""
    out = path_of(options.out) if options.out else default
    assert out is not None
    if out.is_dir():
        msg = f"--out must name a file; {out} is a folder"
        raise ValueError(msg)
    return out


def _check_writable(out: Path, evaluation: Evaluation) -> None:
    """Raise unless results, and the files beside them, can be written."""
    from cldsde.images.files import check_writable

    check_writable(out.parent)
    if evaluation.fills_folder:
        check_writable(evaluation.folder)


def _evaluation(options: Namespace, config: RunConfig, folder: Path) -> Evaluation:
    from cldsde.images.evaluate.evaluation import Evaluation

    source = config.data
    if options.data is not None:
        place = {"path": str(path_of(options.data))}
        source = dataclasses.replace(source, options={**source.options, **place})
    names = ("part", "samples", "repeats", "batch", "features", "likelihood_images")
    return Evaluation(
        data=source.load(),
        metrics=[name.strip() for name in options.metrics.split(",")],
        first_seed=options.seed,
        weights=path_of(options.weights),
        folder=folder,
        device=resolve_device(options.device),
        progress=True,
        **{name: getattr(options, name) for name in names},
    )


def _recipes(options: Namespace, model: Model) -> list[SamplingConfig]:
    """Each solver with each budget."""
    from cldsde.images.sample.sampler import check_sampling

    words = [] if options.nfe is None else options.nfe.split(",")
    if not all(word.strip().isdigit() for word in words):
        msg = f"--nfe must be numbers with commas; got {options.nfe!r}"
        raise ValueError(msg)
    budgets: list[int | None] = [int(word) for word in words] or [None]
    recipes = []
    for solver in [None] if options.solver is None else options.solver.split(","):
        for nfe in budgets:
            one = options.clone()
            one.solver, one.nfe = solver and solver.strip(), nfe
            recipe = sampling_of(one, model.sampling)
            check_sampling(model.score, recipe)
            recipes.append(recipe)
    return recipes
