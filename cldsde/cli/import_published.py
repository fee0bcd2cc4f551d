"""Make a run of a published checkpoint, of CLD-SGM or score_sde_pytorch.

The run is sampled and evaluated as a run of ``cldsde train`` is. Code in the checkpoint is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import flag, needs_images, option, set_option
from cldsde.pretrained.published_models import PUBLISHED


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde import``."""
    option(parser, "path", "PATH", "checkpoint, such as checkpoint_800000.pth", kind=Path)
    text = f"code that wrote the checkpoint: {' or '.join(PUBLISHED)}"
    option(parser, "--as", "CODE", text, dest="family", required=True)
    text = "published settings, such as cifar10 or vp/cifar10_ddpmpp_deep_continuous; by default "
    option(parser, "--config", "NAME", f"{text}settings that fit the weights and the folder")
    set_option(parser, "setting of data or sampling, such as data.options.path=images")
    option(parser, "--out", "RUN", "folder of the run", required=True, kind=Path)
    flag(parser, "--overwrite", "replace the model of a run")


def prepare(options: Namespace) -> Callable[[], None]:
    """Read and check the checkpoint; return the work that is left."""
    if options.family not in PUBLISHED:
        raise ValueError(f"--as must be {' or '.join(PUBLISHED)}; got {options.family!r}")
    with needs_images():
        from cldsde.images.networks import parameter_count
        from cldsde.images.published import read_published
    found = read_published(options.path, options.family, options.config, options.set)
    if found.is_at(options.out, overwrite=options.overwrite):
        return lambda: print(f"The run in {options.out.resolve()} has this model already")

    def work() -> None:
        found.write(options.out)
        count = parameter_count(found.model)
        name, shape = found.config.process.name, "×".join(map(str, found.space.shape))
        place = options.out.resolve()
        print(f"{name}, {count:,} parameters, images of {shape}. The run is in {place}")

    return work
