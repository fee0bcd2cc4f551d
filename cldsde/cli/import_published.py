"""Make a run of a published checkpoint, of CLD-SGM or score_sde_pytorch.

The run is sampled and evaluated as a run of ``cldsde train`` is. Code in the checkpoint is not run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli.options import Kind, flag, option, several
from cldsde.pretrained.published_models import PUBLISHED

_CODES = " or ".join(PUBLISHED)
_CODE = Kind({str(name): name for name in PUBLISHED}.__getitem__, _CODES)
_AS = f"code that wrote the checkpoint: {_CODES}"
_CONFIG = (
    "published settings, such as cifar10 or vp/cifar10_ddpmpp_deep_continuous; by default "
    "settings that fit the weights and the folder"
)
OPTIONS = (
    option("PATH", Path, "checkpoint, such as checkpoint_800000.pth"),
    option("--as CODE", _CODE, _AS, dest="family", required=True),
    option("--config NAME", str, _CONFIG),
    several("--set KEY=VALUE", "data.name, data.options.NAME, or a setting of sampling"),
    option("--out RUN", Path, "folder of the run", required=True),
    flag("--overwrite", "replace the model of a run"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Read and check the checkpoint; return the work that is left."""
    from cldsde.images.networks import parameter_count
    from cldsde.images.published import check_out, read_published, write_run

    out = options.out
    found = read_published(options.path, options.family, options.config, options.set)
    check_out(found, out, overwrite=options.overwrite)

    def work() -> None:
        write_run(found, out)
        count = parameter_count(found.model)
        name, shape = found.config.process.name, "×".join(map(str, found.space.shape))
        print(f"{name}, {count:,} parameters, images of {shape}. The run is in {out.resolve()}")

    return work
