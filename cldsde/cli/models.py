"""Models and recipes of the commands sample and evaluate: their options, and what these name."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldsde.cli.options import LIST, flag, option, reject, several
from cldsde.errors import SettingError, setting
from cldsde.solvers import SamplerSettings, named_solvers

if TYPE_CHECKING:
    from cldsde.images.config import ProcessConfig
    from cldsde.images.data import DataSet
    from cldsde.images.model import ImageModel
    from cldsde.images.sample.sampler import Recipe

_MODEL = "diffusers folder, or a file in it, to sample in place of a run"
_PROCESS = "process to sample with: CLD, VPSDE, …; the run's own by default, CLD for diffusers"
MODEL = (
    option("--model FOLDER|FILE", Path, _MODEL),
    option("--process NAME", str, _PROCESS),
    several("--process-set OPTION=VALUE", "option of the process, such as beta=8.0"),
    flag("--trust", "import the network that the run names by module:Class"),
)
_FEATURES = (
    "features of the Fréchet distance: classifier, trained on the data's classes; random, of a "
    "network with random weights, for data without classes; or module:attribute"
)
FEATURES = option("--features NAME", str, _FEATURES, default="classifier")
DATA = option("--data PATH", Path, "path of the data set, if not as configured")
SOLVERS = f"recommended, module:Class, or one of {', '.join(named_solvers())}"
_GRIDS = "grid of times: uniform, quadratic, root, kappa, logistic or karras"
# Without a default: the settings of the run.
RECIPE = (
    option("--grid NAME", str, _GRIDS),
    option("--t-start T", float, "time at which sampling starts"),
    option("--t-end EPS", float, "time at which sampling ends"),
    option("--denoise BOOL", bool, "end with the prediction of the data: true or false"),
    several("--set OPTION=VALUE", "option of the solver, such as rtol=0.01"),
    option("--settings FILES", LIST, "fitted samplers of cldsde tune, in place of the solver"),
)


def model_of(options: Namespace, run: Path | None, device: Any) -> ImageModel:
    """The model that the options name."""
    from cldsde.images.sample.export import is_exported
    from cldsde.images.sample.source import of_diffusers, of_run

    if (run is None) == (options.model is None):
        raise ValueError("a run or --model is needed, one of them")
    if options.process_set and options.process is None and run is not None:
        raise SettingError("process_set", "needs --process")
    process = process_config(options)
    run = options.model if run is None and is_exported(options.model) else run
    if run is None:
        return of_diffusers(options.model, process, device)
    return of_run(run, process if options.process else None, device, trust=options.trust)


def data_of(path: Path | None, source: Path) -> DataSet:
    """The data set of a run or configuration, at another path if there is one."""
    from cldsde.images.config import load_config
    from cldsde.images.runs import CONFIG

    data = load_config(source / CONFIG if source.is_dir() else source).data
    try:
        if path is not None:
            data = dataclasses.replace(data, options={**data.options, "path": str(path)})
        return data.load()
    except SettingError as error:
        raise SettingError("data", str(error).removeprefix("data.options: ")) from error


def process_config(options: Namespace) -> ProcessConfig:
    """The process that the options name; CLD if they name none."""
    from cldsde.images.config import ProcessConfig
    from cldsde.images.schema import parse_overrides

    changes = parse_overrides(options.process_set, "beta=8.0", "process_set")
    with setting("process"):
        return ProcessConfig(name=options.process or "CLD", options=changes)


def recipes_of(options: Namespace, model: ImageModel) -> Iterator[Recipe]:
    """Settings of files, or each solver with each budget; other options default to the run's."""
    from cldsde.images.sample.sampler import changed_recipe
    from cldsde.images.schema import parse_overrides

    if options.settings:
        names = ("solver", "nfe", "grid", "t_start", "t_end", "denoise", "set")
        reject(options, names, "must be left out with --settings, which replaces it")
        yield from settings_of(options)
        return

    changes = parse_overrides(options.set, "rtol=0.01")
    given = {name: getattr(options, name) for name in ("grid", "t_start", "t_end", "denoise")}
    solvers, budgets = (x if isinstance(x, list) else [x] for x in (options.solver, options.nfe))
    for solver, nfe in product(solvers, budgets):
        new = {"solver": solver, "nfe": nfe, **given}
        new = {name: value for name, value in new.items() if value is not None}
        yield changed_recipe(model.sampling, changes, **new)


def settings_of(options: Namespace) -> list[SamplerSettings]:
    """The settings in the files that the options name."""
    with setting("settings"):
        return [SamplerSettings.load(Path(file).expanduser()) for file in options.settings]
