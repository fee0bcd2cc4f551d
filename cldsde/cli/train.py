"""Train a score model on images, from a configuration file.

Writes a run folder: the resolved configuration, metrics, grids of samples and checkpoints. The same
command resumes an interrupted run. On several GPUs or machines: ``torchrun --nproc-per-node 8 -m
cldsde train CONFIG …``, or ``accelerate launch``.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from cldsde.cli.options import DEVICE, SEED, flag, join_processes, option, several
from cldsde.errors import require

OPTIONS = (
    option("CONFIG", Path, "file in TOML, YAML or JSON"),
    several("--set KEY=VALUE", "override of a key, such as training.batch=64"),
    option("--seed N", SEED, "seed of weights, data order, times and noise"),
    option("--out DIR", Path, "run folder; the name of the configuration by default"),
    flag("--resume", "fail if there is no run to resume"),
    option("--init-from RUN", str, "run, or diffusers folder, whose weights to start from"),
    DEVICE,
    flag("--dry-run", "check everything, measure loading and steps, and write no run"),
    flag("--print-config", "print the resolved configuration and stop"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the configuration, read the data, open the run folder; return the remaining work."""
    from cldsde.images import train as training
    from cldsde.images.config import load_config
    from cldsde.images.runs import CONFIG, RunFolder, check_folder

    given = {"seed": options.seed, "training.init_from": options.init_from}
    more = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    config = load_config(options.config, [*options.set, *more])
    if options.print_config:
        comments = "".join(f"# {line}\n" for line in training.outlook(config))
        return lambda: print(comments + config.to_toml(), end="")
    out = options.out or Path(options.config.stem)
    there = not options.resume or (out / CONFIG).exists()
    require(there, "resume", f"{out} holds no run to resume")
    state, own = join_processes(options.device)
    device = "cpu" if own == "cpu" else options.device
    started = int(os.environ.get("WORLD_SIZE", "1"))
    formed = started == state.num_processes
    require(formed, "device", f"the {started} processes do not form a group")
    data = config.data.load()
    facts = "\n".join(training.summary(config, data, device))
    data, decoding = training.rehearsal(data) if options.dry_run else (data, 0.0)
    shown, processes = state.is_main_process, state.num_processes
    if shown and not options.dry_run:  # before pictures are decoded
        check_folder(out, config.to_dict(), free=config.FREE)
    how: dict[str, Any] = {"device": device, "processes": processes, "run": out}
    statistics = training.check_run(config, data, **how, progress=shown)
    if options.dry_run:

        def measure() -> None:
            found = training.rehearse(config, data, decoding, device=device, statistics=statistics)
            print("\n".join([facts, *found]))

        return measure
    with state.main_process_first():
        shared = not state.is_main_process
        run = RunFolder(out, config.to_dict(), shared=shared, free=config.FREE)

    def work() -> None:
        if state.is_main_process:
            print(facts, file=sys.stderr)
        with closing(run):
            training.train(config, data, run, device=device, statistics=statistics, progress=True)
        if state.is_main_process:
            seen = config.training.steps * config.training.batch
            print(f"Trained on {seen:,} images. The run is in {out.resolve()}")

    return work
