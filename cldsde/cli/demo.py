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

from cldsde.cli.options import SEED, device_option, flag, needs_images, option, resolve_device


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde demo``."""
    flag(parser, "--quick", "a smaller version, in a few minutes")
    text = "run folder, made if missing"
    option(parser, "--out", "DIR", text, kind=Path, default=Path("cldsde-demo"))
    option(parser, "--seed", "N", "seed of weights, training and sampling", kind=SEED, default=0)
    device_option(parser)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, open the run folder, and return the remaining work."""
    with needs_images():
        from cldsde.images.demo import DemoConfig, run_demo
        from cldsde.images.runs import RunFolder
    make = DemoConfig.quick if options.quick else DemoConfig
    config = make(seed=options.seed, device=resolve_device(options.device))
    folder = RunFolder(options.out, config.resolved())

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
