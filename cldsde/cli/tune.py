"""Fit samplers of few evaluations to a model: noise levels, noise and order.

The search tries settings with the same random numbers, and compares their images with the data of
the run by Fréchet distances in features of two networks. A report with new seeds follows. Ctrl-C
ends the command and keeps the best settings so far. The option ``--settings`` of sample and
evaluate takes the file.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli.models import DATA, FEATURES, MODEL, data_of, model_of
from cldsde.cli.options import DEVICE, INTEGERS, ONE_SEED, flag, option, resolve_device
from cldsde.errors import require, setting
from cldsde.solvers import SamplerSettings
from cldsde.solvers.fitting import TRIES

_REFERENCE = (
    "run or configuration whose data to compare with; default for RUN: its own data, and for "
    "--model: images of the model with 50 evaluations"
)
_OUT = "FILE.json for one number of evaluations, or a folder; RUN or the current folder by default"
OPTIONS = (
    option("RUN", Path, "run of cldsde train, or a file of its weights", nargs="?"),
    *MODEL,
    option("--nfe N", INTEGERS, "evaluations per image, or several with commas", default=[5]),
    option("--reference RUN|CONFIG", Path, _REFERENCE),
    DATA,
    FEATURES,
    option("--images N", int, "images per try", default=500),
    option("--tries N", int, "tries of the search and of the comparison at its end", default=TRIES),
    option("--seed N", ONE_SEED, "seed of the search and its images; 0 by default"),
    option("--out PATH", Path, _OUT),
    flag("--overwrite", "replace existing files"),
    DEVICE,
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, load model and data; return the remaining work."""
    from cldsde.files import check_writable
    from cldsde.images.evaluate.classifier import CLASSIFIER
    from cldsde.images.model import MODEL as MODEL_FILE
    from cldsde.images.model import weights_of
    from cldsde.images.tuning import SETS, Tuning

    device, run = resolve_device(options.device), options.run
    model = model_of(options, run, device)
    own, weights = weights_of(run or Path())
    source = options.reference or (run and own)
    require(source is not None or options.data is None, "data", "needs a run or --reference")
    out = options.out or own
    single = out.suffix == ".json"
    msg = "must be a folder for several numbers of evaluations; got a file"
    require(not single or len(options.nfe) == 1, "out", msg)
    name = "sampler" if weights.name == MODEL_FILE else f"sampler-{weights.stem}"
    files = {nfe: out if single else out / f"{name}-{nfe}.json" for nfe in options.nfe}
    for file in filter(Path.exists, files.values()):
        msg = f"{file} is there already; name another place, or set `overwrite`"
        require(options.overwrite, "out", msg)
        with setting("out"):
            SamplerSettings.load(file)  # --overwrite replaces nothing but settings
    folder = out.parent if single else out
    classifier = folder / CLASSIFIER
    if source is not None and source != folder:
        # The data of another run must not get the name that the classifier of a run's own data has.
        kept, other = source / CLASSIFIER, folder / f"classifier-{source.stem}.safetensors"
        classifier = kept if kept.exists() else other
    data = None if source is None else data_of(options.data, source)
    seed = (options.seed or range(1))[0]
    tuning = Tuning(model, data, classifier, options.features, options.images, seed, device)
    for nfe in files:
        tuning.check(nfe, options.tries)
    check_writable(folder)  # makes it, when nothing else can be rejected

    def work() -> None:
        for nfe, file in files.items():
            search = tuning.search(nfe, options.tries)
            try:
                search.run(progress=True)
            finally:
                if search.tries:
                    search.best.save(file)
                    print(f"Settings are in {file.resolve()}", file=sys.stderr)
            found = tuning.report(search.best, nfe)
            images = f"{SETS} sets of {options.images} new images"
            print(f"{nfe} evaluations, Fréchet distances of {images}:")
            for features, measured in found.items():
                print(f"  in {features}: {measured}")
            (gain, error), *others = (measured.gain for measured in found.values())
            if not gain > 3 * error:
                print("  The first gain is less than three standard errors: prefer the default.")
            elif any(other < -3 * scatter for other, scatter in others):
                print("  In some features the distance rose by over three standard errors.")

    return work
