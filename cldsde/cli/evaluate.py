"""Measure a trained run, or samples in files: Fréchet distances, FID, KID, bits per dim.

A run is sampled with each combination of ``--solver`` and ``--nfe``, and its images are compared
with the run's own data set. Samples in files are compared with the data set of ``--reference``.
Distances are biased by the number of images: compare equal numbers only. Several processes, started
by ``torchrun``, share the sampling.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cldsde.cli.models import DATA, FEATURES, MODEL, RECIPE, SOLVERS, data_of, model_of, recipes_of
from cldsde.cli.options import DEVICE, INTEGERS, LIST, join_processes, option, reject
from cldsde.errors import require
from cldsde.messages import counted

_TARGET = "a run, or a file of its weights; FILE.npz, or a folder of pictures"
_METRICS = "some of fd, fid, kid, isc, prc, bpd, with commas"
_OUT = "file of results; RUN/evaluation.jsonl or SAMPLES-evaluation.jsonl by default"
OPTIONS = (
    option("RUN|SAMPLES", Path, _TARGET, nargs="?", dest="target"),
    *MODEL,
    option("--solver NAMES", LIST, f"solver, or several with commas: {SOLVERS}"),
    option("--nfe N", INTEGERS, "score evaluations per image, or several with commas"),
    *RECIPE,
    option("--metrics LIST", LIST, _METRICS, default="fd"),
    option("--samples N", int, "images per repetition", default=1000),
    option("--repeats N", int, "repetitions with other seeds", default=1),
    option("--seed N", int, "first seed", default=0),
    option("--reference RUN|CONFIG", Path, "run or configuration of the data of files or --model"),
    option("--part NAME", str, "part of the data: train or held_out", default="train"),
    FEATURES,
    option("--weights FILE", Path, "Inception weights, for fid, kid, isc and prc"),
    option("--likelihood-images N", int, "held-out images for bpd", default=64),
    DATA,
    option("--batch N", int, "images per batch", default=64),
    option("--out FILE", Path, _OUT),
    DEVICE,
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, load model and data; return the remaining work."""
    from cldsde.files import check_writable
    from cldsde.images.data.pixels import load_samples
    from cldsde.images.evaluate.evaluation import Evaluation, Measurements
    from cldsde.images.evaluate.results import read_results
    from cldsde.images.sample.sampler import make_plan

    source, out = _places(options)
    target, (state, device) = options.target, join_processes(options.device)
    of_model = options.model is not None or options.reference is None
    model = model_of(options, target, device) if of_model else None
    beside = out.with_name(f"{out.stem}-reference")
    names = [*Measurements.__dataclass_fields__, "part"]
    how = {name: getattr(options, name) for name in names}
    # A classifier is kept in the run whose data it was trained on, or beside the results.
    how |= {"folder": source if source.is_dir() else beside, "first_seed": options.seed}
    data = data_of(options.data, source)
    how["progress"] = state.is_main_process
    evaluation = Evaluation(data=data, device=device, **how)
    if model is None:
        images = load_samples(target, evaluation.data.train)
        evaluation.check(shape=images.shape[1:], images=len(images))
    else:
        evaluation.check(shape=model.space.shape)
        recipes = list(recipes_of(options, model))
        plans = [make_plan(model.score, recipe, shape=model.data_shape) for recipe in recipes]
    check_writable(out.parent)
    if evaluation.fills_folder:
        try:
            check_writable(evaluation.folder)
        except OSError:
            evaluation = dataclasses.replace(evaluation, folder=beside)
            check_writable(beside)

    def work() -> None:
        evaluation.data.train.keep_decoded(progress=state.is_main_process)
        if model is None:
            found = evaluation.of_samples(images, _named(target).name, out)
        else:
            if state.is_main_process:
                print(*plans, sep="\n\n", file=sys.stderr)
            found = evaluation.of_run(model, recipes, out)
        if not state.is_main_process:
            return
        _report(read_results(out).values(), model)
        failures = [one.failed for one in found if one.failed is not None]
        if failures:
            raise FloatingPointError(f"{failures[0]}; delete {out} to have it tried again")
        print(f"All is in {out.resolve()}")

    return work


_OF_SAMPLING = (
    *("solver", "nfe", "grid", "t_start", "t_end", "denoise", "set", "settings"),
    *("process", "process_set"),
)


def _places(options: Namespace) -> tuple[Path, Path]:
    """The run or configuration whose data to compare with, and the file of results."""
    from cldsde.images.checks import output_place
    from cldsde.images.model import MODEL, weights_of
    from cldsde.images.power_averages import wanted_width
    from cldsde.images.runs import CONFIG

    target, reference = options.target, options.reference
    if target is None and options.model is None:
        raise ValueError("a run, samples or --model is needed")
    if target is not None and not (target.parent if wanted_width(target) else target).exists():
        raise ValueError(f"there is no run and no file {target}")
    run, weights = weights_of(target or Path())
    is_run = options.model is None and (run / CONFIG).is_file()
    msg = "is for samples; a run is compared with its own data"
    require(not is_run or reference is None, "reference", msg)
    msg = "is missing: the run or configuration whose data to compare with"
    require(is_run or reference is not None, "reference", msg)
    if not is_run and options.model is None:
        reject(options, _OF_SAMPLING, "must be left out for samples, which are there already")
    place, process = _named(target or Path("model")), f"-{options.process}" * bool(options.process)
    default = place.with_name(f"{place.name}-evaluation.jsonl")
    of_file = "" if weights.name == MODEL else f"-{weights.stem}"
    out = options.out or (run / f"evaluation{of_file}{process}.jsonl" if is_run else default)
    require(not out.is_dir(), "out", f"must name a file; {out} is a folder")
    return run if is_run else reference, output_place(out)


def _report(stored: Collection[Any], model: Any) -> None:
    from cldsde.images.evaluate.results import bits_text, markdown_table, notes

    if table := markdown_table(stored):
        print(table)
    for bits in (one.about for one in stored if one.metric == "bpd" and one.numbers):
        count = counted(bits["images"], "image")
        print(f"{bits_text(bits)} bits per dim of {count} ({bits['quantity']})")
    dequantised = model is None or model.vae is not None or model.space.dequantised
    for note in notes(stored, dequantised=dequantised):
        print(f"note: {note}", file=sys.stderr)


def _named(target: Path) -> Path:
    """A path that ends in a name. Links are not followed: results are beside the link."""
    return Path(os.path.abspath(target))
