"""Train models and compare their samplers: tables, plots and samples, in resumable pieces.

Each model of the comparison is trained, unless it is trained already, and sampled with each of its
rows at each budget of score evaluations or tolerance. The same command resumes an interrupted
comparison, also with rows and models that were added to the file. The folders in DIR/models are
runs of cldsde train, which cldsde sample and cldsde evaluate take.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli.options import DEVICE, SEED, flag, option, resolve_device, several
from cldsde.errors import require

_CONFIG = (
    "file in TOML, YAML or JSON, or a comparison of the package: fashion_mnist (the default), "
    "cld_variants, quick or demo"
)
_OUT = "folder, made if missing; comparison- and the name of the configuration by default"
OPTIONS = (
    option("CONFIG", str, _CONFIG, nargs="?"),
    flag("--quick", "digits and tiny networks, under ten minutes"),
    option("--out DIR", Path, _OUT),
    several("--set KEY=VALUE", "override of a key, such as base.training.images=1000"),
    option("--seed N", SEED, "seed of training and of all images"),
    DEVICE,
    flag("--print-config", "print the resolved configuration and stop"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the comparison, read the data, open all folders; return the remaining work."""
    from cldsde.images.compare import PRESETS, Comparison, load_comparison
    from cldsde.images.compare.report import RESULTS
    from cldsde.images.schema import check_name

    single = not options.quick or options.config is None
    require(single, "quick", f"is a comparison of its own; got {options.config}, too")
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
        files = f"report.html, table.md, {RESULTS}, samples, and the runs in models"
        print(f"All is in {out.resolve()}: {files}")

    return work
