"""Train CLD on handwritten digits and sample new ones, in minutes on a CPU.

Trains a score network by hybrid score matching on the 8×8 digits that ship with scikit-learn,
samples it with Euler–Maruyama, SSCS and the exponential multistep solver at several budgets of
score evaluations, and writes a run folder with pictures and a table. The same command resumes an
interrupted demonstration.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import (
    INTERRUPTED,
    add_device_argument,
    needs_images,
    option,
    resolve_device,
)

__all__ = ["INTERRUPTED", "add_arguments", "prepare"]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde demo``."""
    parser.add_argument("--quick", action="store_true", help="a smaller version, in a few minutes")
    option(parser, "--out", "DIR", "run folder, made if missing", default="cldsde-demo")
    option(parser, "--seed", "N", "seed of weights, training and sampling", type=int, default=0)
    add_device_argument(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, open the run folder, and return the remaining work."""
    with needs_images():
        from cldsde.images.demo import DemoConfig, run_demo
        from cldsde.images.runs import RunFolder
    if not 0 <= options.seed < 2**63:
        msg = f"--seed must be from 0 to 2^63 - 1; got {options.seed}"
        raise ValueError(msg)
    if not options.out.strip():
        msg = "--out must be the name of a folder; got an empty one"
        raise ValueError(msg)
    make = DemoConfig.quick if options.quick else DemoConfig
    config = make(seed=options.seed, device=resolve_device(options.device))
    folder = RunFolder(Path(options.out).expanduser(), config.resolved())

    def work() -> None:
        report = run_demo(config, folder)
        shares = enumerate(report.class_shares)
        print(f"\n{report.table()}\n\n{report.sentence()}\n")
        if options.quick:
            print(
                f"Trained briefly and measured on {config.samples} images: enough to see it "
                "work, too few to rank solvers.\n"
            )
        print(
            f"FD of samples of a Gaussian fitted to the pixels: {report.baseline:.2f}\n"
            f"Classifier on held-out digits: {report.accuracy:.1%}. Classes among samples: "
            f"{' '.join(f'{digit}: {share:.0%}' for digit, share in shares)}\n"
            f"Took {report.seconds:.0f} s. Everything is in {folder.path.resolve()}:\n"
            "  samples.png       real and generated digits\n"
            "  trajectories.png  data and velocity, diffused and generated\n"
            "  distances.png     FD against score evaluations (table.md, results.json)\n"
            "  samples.npz       the generated images\n"
            "  model             the trained model: cldsde sample takes that folder"
        )

    return work
