"""Write a run as a pipeline of diffusers, which DDPMPipeline.from_pretrained loads.

The network is a plain UNet2DModel. Its scheduler has the run's process, solver and grid. Import
cldsde.images before you load the pipeline. The command cldsde sample --model FOLDER generates the
images of the run.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli.options import option
from cldsde.errors import SettingError

_SOLVER = "solver with one evaluation per step, as multistep-2; the run's own by default"
OPTIONS = (
    option("RUN", Path, "run of cldsde train, or a file of its weights"),
    option("FOLDER", Path, "folder of the pipeline, made if missing"),
    option("--solver NAME", str, _SOLVER),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Load and check the run; return the remaining work."""
    from cldsde.images.model import load_model
    from cldsde.images.sample.export import check_export, export
    from cldsde.images.sample.sampler import changed_recipe

    try:
        run, folder = load_model(options.run), options.folder
    except SettingError as error:
        if error.key != "trust":
            raise
        msg = "must be 'UNet' for a pipeline of a UNet2DModel; the run has a network of your own"
        raise SettingError("network.name", msg) from error
    if options.solver is not None:
        sampling = changed_recipe(run.sampling, solver=options.solver)
        config = dataclasses.replace(run.config, sampling=sampling)
        run = dataclasses.replace(run, config=config, sampling=sampling)
    check_export(run, folder)

    def work() -> None:
        export(run, folder)
        print(f"The pipeline is in {folder.resolve()}. Import cldsde.images, and load it with")
        print("DDPMPipeline.from_pretrained")

    return work
