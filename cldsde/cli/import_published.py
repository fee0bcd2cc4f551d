"""Make a run of a published checkpoint, of CLD-SGM or score_sde_pytorch.

The run is sampled and evaluated as a run of ``cldsde train`` is. Code in the checkpoint is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import add_set_argument, needs_images, option
from cldsde.pretrained.published_models import PUBLISHED

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]

INTERRUPTED = "interrupted; nothing was written"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde import``."""
    option(parser, "path", "PATH", "checkpoint, such as checkpoint_800000.pth")
    text = f"code that wrote the checkpoint: {' or '.join(PUBLISHED)}"
    option(parser, "--as", "CODE", text, dest="family", required=True)
    text = "published settings, such as cifar10 or vp/cifar10_ddpmpp_deep_continuous; by default "
    option(parser, "--config", "NAME", f"{text}settings that fit the weights and the folder")
    add_set_argument(parser, "setting of data or sampling, such as data.options.path=images")
    option(parser, "--out", "RUN", "folder of the run", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace the model of a run")


def prepare(options: Namespace) -> Callable[[], None]:
    """Read and check the checkpoint; return the work that is left.

    Raises
    ------
    ImportError
        If the extra ``images`` is not installed.
    ValueError
        If the checkpoint cannot be used, or the folder holds something else.
    OSError
        If a file cannot be read or the folder cannot be written.
    """
    if options.family not in PUBLISHED:
        msg = f"--as must be {' or '.join(PUBLISHED)}; got {options.family!r}"
        raise ValueError(msg)
    with needs_images():
        from cldsde.images.networks import parameter_count
        from cldsde.images.published import read_published
    path, out = (Path(name).expanduser() for name in (options.path, options.out))
    found = read_published(path, options.family, options.config, options.set or [])
    if found.is_at(out, overwrite=options.overwrite):
        return lambda: print(f"The run in {out.resolve()} has this model already")

    def work() -> None:
        found.write(out)
        count = parameter_count(found.model)
        name, shape = found.config.process.name, "×".join(map(str, found.space.shape))
        print(f"{name}, {count:,} parameters, images of {shape}. The run is in {out.resolve()}")

    return work
