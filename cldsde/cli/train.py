"""Train a score model on images, from a configuration file.

Writes a run folder: the resolved configuration, metrics, grids of samples and checkpoints. The same
command goes on where an interrupted run was left. On several GPUs or machines: ``torchrun
--nproc-per-node 8 -m cldsde train CONFIG …``, or ``accelerate launch``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.devices import add_device_argument, resolve_device
from cldsde.cli.extras import needs_images

INTERRUPTED = "interrupted; the same command goes on"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde train``."""
    parser.add_argument("config", type=str, metavar="CONFIG", help="file in TOML, YAML or JSON")
    parser.add_argument(
        "--set",
        type=str,
        action="append",
        metavar="KEY=VALUE",
        help="override of a key, such as training.batch=64; may be repeated",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of weights, data order, times and noise"
    )
    parser.add_argument(
        "--out",
        type=str,
        metavar="DIR",
        help="run folder, made if missing; the name of the configuration by default",
    )
    parser.add_argument(
        "--resume", action="store_true", help="refuse to begin a new run where there is none"
    )
    parser.add_argument(
        "--init-from",
        type=str,
        metavar="RUN",
        help="run, or diffusers folder, whose weights to start from",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, measure two steps, write nothing and stop",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the configuration, read the data, open the run folder; return the work that is left."""
    with needs_images():
        from cldsde.images.config import load_config
    overrides = list(options.set or [])
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    if options.init_from is not None:
        overrides.append(f"training.init_from={json.dumps(options.init_from)}")
    path = Path(options.config).expanduser()
    config = load_config(path, overrides)
    if options.print_config:
        return lambda: print(config.to_toml(), end="")
    resolved = resolve_device(options.device)
    # Without a GPU processes find each other only where they are told that there is none.
    device = "cpu" if resolved == "cpu" else options.device
    with needs_images():
        from accelerate import PartialState

        from cldsde.images.runs import CONFIG, RunFolder
        from cldsde.images.train import check_run, rehearse, summary, train
    out = Path(options.out).expanduser() if options.out else Path(path.stem)
    if options.resume and not (out / CONFIG).exists():
        msg = f"--resume: {out} holds no run to go on with"
        raise ValueError(msg)
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        msg = (
            f"--device {options.device}: {started} processes were started, and do not form a group"
        )
        raise ValueError(msg)
    data = config.data.load()
    statistics = check_run(config, data, device=device, processes=state.num_processes)
    facts = summary(config, data, device)
    if options.dry_run:

        def measure() -> None:
            found = rehearse(config, data, device=device, statistics=statistics)
            print("\n".join(facts))
            print(
                f"measured: {found.images_per_second:,.0f} images per second, "
                f"{found.memory / 2**20:,.0f} MiB at most; "
                f"{config.training.images / found.images_per_second / 60:,.1f} minutes in all"
            )

        return measure
    with state.main_process_first():
        shared = not state.is_main_process
        run = RunFolder(out, config.to_dict(), shared=shared, free=config.FREE)

    def work() -> None:
        if state.is_main_process:
            print("\n".join(facts), file=sys.stderr)
        train(config, data, run, device=device, statistics=statistics, progress=True)
        if state.is_main_process:
            seen = config.training.steps * config.training.batch
            print(f"Trained on {seen:,} images. The run is in {out.resolve()}")

    return work
