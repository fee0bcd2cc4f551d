"""Measure a trained run, or samples in files: Fréchet distances, FID, KID, bits per dim.

A run is sampled with each recipe, solvers times budgets, and compared with its own data set;
samples are compared with the data set of ``--reference``. Distances are biased by the number of
images: compare equal numbers only.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import device_option, needs_images, option, resolve_device
from cldsde.cli.sample import add_model_arguments, add_sampling_arguments, model_of, sampling_of

if TYPE_CHECKING:
    from cldsde.images.config import SamplingConfig
    from cldsde.images.sample.source import Model


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde evaluate``."""
    text = "a run; or FILE.npz, or a folder of pictures"
    option(parser, "target", "RUN|SAMPLES", text, nargs="?", kind=Path)
    add_model_arguments(parser)
    add_sampling_arguments(parser, several=True)
    text = "some of fd, fid, kid, isc, prc, bpd, with commas"
    option(parser, "--metrics", "LIST", text, default="fd")
    option(parser, "--samples", "N", "images per repetition", kind=int, default=1000)
    option(parser, "--repeats", "N", "repetitions with other seeds", kind=int, default=1)
    option(parser, "--seed", "N", "first seed", kind=int, default=0)
    text = "data set to compare samples in files with"
    option(parser, "--reference", "RUN|CONFIG", text, kind=Path)
    option(parser, "--part", "NAME", "part of the data: train or held_out", default="train")
    text = "features for fd: classifier, trained on the data's classes, or module:attribute"
    option(parser, "--features", "NAME", text, default="classifier")
    option(parser, "--weights", "FILE", "Inception weights, for fid, kid, isc and prc", kind=Path)
    text = "held-out images for bpd"
    option(parser, "--likelihood-images", "N", text, kind=int, default=64)
    option(parser, "--data", "PATH", "path of the data set, if not as configured", kind=Path)
    option(parser, "--batch", "N", "images per batch", kind=int, default=64)
    text = "file of results; RUN/evaluation.jsonl or SAMPLES-evaluation.jsonl by default"
    option(parser, "--out", "FILE", text, kind=Path)
    device_option(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, load model and data; return the remaining work."""
    with needs_images():
        from cldsde.files import check_writable
        from cldsde.images.config import load_config
        from cldsde.images.data.samples import load_samples
        from cldsde.images.evaluate.evaluation import Evaluation
        from cldsde.images.evaluate.results import markdown_table, notes, read_results
        from cldsde.images.runs import CONFIG
    source, out = _places(options)
    device, target = resolve_device(options.device), options.target
    of_model = options.model is not None or source == target
    model = model_of(options, target, device) if of_model else None
    data = load_config(source / CONFIG if source.is_dir() else source).data
    if options.data is not None:
        data = dataclasses.replace(data, options={**data.options, "path": str(options.data)})
    names = ("part", "samples", "repeats", "batch", "features", "likelihood_images", "weights")
    evaluation = Evaluation(
        data=data.load(),
        metrics=[name.strip() for name in options.metrics.split(",")],
        first_seed=options.seed,
        # A classifier is kept in the run whose data it was trained on, or beside the results.
        folder=source if source.is_dir() else out.with_name(f"{out.stem}-reference"),
        device=device,
        progress=True,
        **{name: getattr(options, name) for name in names},
    )
    if model is None:
        images = load_samples(target)
        evaluation.check(shape=images.shape[1:], images=len(images))
    else:
        evaluation.check(shape=model.space.shape)
        recipes = _recipes(options, model)
    check_writable(out.parent)
    if evaluation.fills_folder:
        check_writable(evaluation.folder)

    def work() -> None:
        if model is None:
            found = evaluation.of_samples(images, _named(target).name, out)
        else:
            found = evaluation.of_run(model, recipes, out)
        stored = read_results(out).values()
        table = markdown_table(stored)
        if table:
            print(table)
        for bits in (one.about for one in stored if one.metric == "bpd" and one.numbers):
            value = f"{bits['bits_per_dim']:.3f} ± {bits['standard_error'] or 0:.3f}"
            print(f"{value} bits per dim ({bits['quantity']})")
        dequantised = model is None or model.vae is not None or model.space.dequantised
        for note in notes(stored, dequantised=dequantised):
            print(f"note: {note}", file=sys.stderr)
        failures = [one.failed for one in found if one.failed is not None]
        if failures:
            raise FloatingPointError(f"{failures[0]}; delete {out} to have it tried again")
        print(f"All is in {out.resolve()}")

    return work


def _named(target: Path) -> Path:
    """A path that ends in a name. Links are not followed: results are beside the link."""
    return Path(os.path.abspath(target))


def _places(options: Namespace) -> tuple[Path, Path]:
    """The run or configuration whose data to compare with, and the file of results."""
    from cldsde.images.runs import CONFIG

    target, source = options.target, options.reference
    if target is None and options.model is None:
        raise ValueError("a run, samples or --model is needed")
    if target is not None and not target.exists():
        raise ValueError(f"there is no run and no file {target}")
    if options.model is None and (target / CONFIG).is_file():
        if source is not None:
            raise ValueError("--reference is for samples; a run is compared with its own data")
        name = f"evaluation{f'-{options.process}' if options.process else ''}.jsonl"
        source, default = target, target / name
    elif source is None:
        msg = "--reference is missing: the run or configuration whose data to compare with"
        raise ValueError(msg)
    else:
        place = _named(target or Path("model"))
        default = place.with_name(f"{place.name}-evaluation.jsonl")
    out: Path = options.out or default
    if out.is_dir():
        raise ValueError(f"--out must name a file; {out} is a folder")
    return source, out


def _recipes(options: Namespace, model: Model) -> list[SamplingConfig]:
    """Each solver with each budget."""
    from cldsde.images.sample.sampler import check_sampling

    words = [] if options.nfe is None else options.nfe.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise ValueError(f"--nfe must be numbers with commas; got {options.nfe!r}")
    budgets: list[Any] = [int(word) for word in words] or [None]
    solvers = [None] if options.solver is None else options.solver.split(",")
    recipes = [
        sampling_of(options, model.sampling, solver=solver and solver.strip(), nfe=nfe)
        for solver in solvers
        for nfe in budgets
    ]
    for recipe in recipes:
        check_sampling(model.score, recipe)
    return recipes
