"""Train models and compare their samplers: tables, plots and samples, in resumable pieces.

Each model of the comparison is trained, or taken up where it is trained already, and sampled with
each of its rows at each budget of score evaluations or tolerance. The same command goes on where an
interrupted one was left, and with rows and models that were added to the file. The folders in
DIR/models are runs: cldsde sample and cldsde evaluate take them, and cldsde train may have made
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.devices import add_device_argument, resolve_device
from cldsde.cli.extras import needs_images

INTERRUPTED = "interrupted; the same command goes on"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde compare``."""
    parser.add_argument(
        "config",
        type=str,
        nargs="?",
        metavar="CONFIG",
        help="file in TOML, YAML or JSON, or a comparison of the package: fashion_mnist (the "
        "default), cld_variants or quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="digits and tiny networks, under ten minutes"
    )
    parser.add_argument(
        "--out",
        type=str,
        metavar="DIR",
        help="folder, made if missing; comparison- and the name of the configuration by default",
    )
    parser.add_argument(
        "--set",
        type=str,
        action="append",
        metavar="KEY=VALUE",
        help="override of a key, such as base.training.images=1000; may be repeated",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of training and of all images")
    add_device_argument(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the comparison, read the data, open all folders; return the work that is left."""
    with needs_images():
        from cldsde.images.compare import PRESETS, Comparison, load_comparison
        from cldsde.images.compare.report import RESULTS
        from cldsde.images.schema import check_name
    if options.quick and options.config is not None:
        msg = f"--quick is a comparison of its own; got {options.config}, too"
        raise ValueError(msg)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        msg = "a comparison is one process; train its models by cldsde train --out DIR/models/NAME"
        raise ValueError(msg)
    overrides = list(options.set or [])
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    name = "quick" if options.quick else options.config or "fashion_mnist"
    path = PRESETS.get(name, Path(name).expanduser())
    if not path.suffix:
        check_name(name, PRESETS, "config")
    config = load_comparison(path, overrides)
    if options.print_config:
        return lambda: print(config.to_toml(), end="")
    if options.out is not None and not options.out.strip():
        msg = "--out must be the name of a folder; got an empty one"
        raise ValueError(msg)
    out = Path(options.out or f"comparison-{path.stem}").expanduser()
    comparison = Comparison(config, out, device=resolve_device(options.device), progress=True)

    def work() -> None:
        comparison.run()
        print((out / "table.md").read_text(encoding="utf-8"))
        print(f"All is in {out.resolve()}: report.html, table.md, {RESULTS}, models, samples")

    return work
