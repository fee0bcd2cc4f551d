"""Train models and compare their samplers: tables, plots and samples, in resumable pieces.

Each model of the comparison is trained, unless it is trained already, and sampled with each of its
rows at each budget of score evaluations or tolerance. The same command resumes an interrupted
comparison, also with rows and models that were added to the file. The folders in DIR/models are
runs of cldsde train, which cldsde sample and cldsde evaluate take.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import (
    SEED,
    device_option,
    flag,
    needs_images,
    option,
    resolve_device,
    set_option,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde compare``."""
    text = (
        "file in TOML, YAML or JSON, or a comparison of the package: fashion_mnist (the default), "
    )
    option(parser, "config", "CONFIG", f"{text}cld_variants or quick", nargs="?")
    flag(parser, "--quick", "digits and tiny networks, under ten minutes")
    text = "folder, made if missing; comparison- and the name of the configuration by default"
    option(parser, "--out", "DIR", text, kind=Path)
    set_option(parser, "override of a key, such as base.training.images=1000")
    option(parser, "--seed", "N", "seed of training and of all images", kind=SEED)
    device_option(parser)
    flag(parser, "--print-config", "print the resolved configuration and stop")


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the comparison, read the data, open all folders; return the remaining work."""
    with needs_images():
        from cldsde.images.compare import PRESETS, Comparison, load_comparison
        from cldsde.images.compare.report import RESULTS
        from cldsde.images.schema import check_name
    if options.quick and options.config is not None:
        raise ValueError(f"--quick is a comparison of its own; got {options.config}, too")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        msg = "a comparison is one process; train its models by cldsde train --out DIR/models/NAME"
        raise ValueError(msg)
    name = "quick" if options.quick else options.config or "fashion_mnist"
    path = PRESETS.get(name, Path(name).expanduser())
    if not path.suffix:
        check_name(name, PRESETS, "config")
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_comparison(path, [*options.set, *seed])
    if options.print_config:
        return lambda: print(config.to_toml(), end="")
    out = options.out or Path(f"comparison-{path.stem}")
    comparison = Comparison(config, out, device=resolve_device(options.device), progress=True)

    def work() -> None:
        comparison.run()
        print((out / "table.md").read_text(encoding="utf-8"))
        print(f"All is in {out.resolve()}: report.html, table.md, {RESULTS}, models, samples")

    return work
