"""Train CLD on handwritten digits and draw new ones, in minutes on a CPU.

Trains a score network by hybrid score matching on the 8×8 digits that ship with scikit-learn,
samples it with Euler–Maruyama, SSCS and the exponential multistep solver at several budgets of
score evaluations, and writes a run folder with pictures and a table. The same command resumes an
interrupted demonstration.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.devices import add_device_argument, resolve_device
from cldsde.cli.extras import needs_images

INTERRUPTED = "interrupted; the same command goes on"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde demo``."""
    parser.add_argument("--quick", action="store_true", help="the same in small, in one minute")
    parser.add_argument(
        "--out", type=str, metavar="DIR", default="cldsde-demo", help="run folder, made if missing"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of weights, training and sampling"
    )
    add_device_argument(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, open the run folder, and return the work that is left."""
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
        shares = " ".join(
            f"{digit}: {share:.0%}" for digit, share in enumerate(report.class_shares)
        )
        print(f"\n{report.table()}\n")
        print(f"{report.sentence()}\n")
        if options.quick:
            print(
                f"Trained for a moment and measured on {config.samples} images: enough to see it "
                "work, too few to rank solvers.\n"
            )
        print(
            f"FD of samples of a Gaussian fitted to the pixels: {report.baseline:.2f}\n"
            f"Classifier on held-out digits: {report.accuracy:.1%}. "
            f"Classes among samples: {shares}\n"
            f"Took {report.seconds:.0f} s. Everything is in {folder.path.resolve()}:\n"
            "  samples.png       real beside generated digits\n"
            "  trajectories.png  data and velocity, diffused and generated\n"
            "  distances.png     FD against score evaluations (table.md, results.json)\n"
            "  samples.npz       the generated images\n"
            "  model             the trained model: cldsde sample takes that folder"
        )

    return work
