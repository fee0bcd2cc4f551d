"""Train CLD on handwritten digits and sample new ones, in minutes on a CPU.

Trains a score network by hybrid score matching on the 8×8 digits that ship with scikit-learn,
samples it with Euler–Maruyama, SSCS and the exponential multistep solver at several budgets of
score evaluations, and writes a run folder with pictures and a table. The same command resumes an
interrupted demonstration.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli.options import DEVICE, SEED, flag, option, resolve_device

OPTIONS = (
    flag("--quick", "a smaller version, in a few minutes"),
    option("--out DIR", Path, "run folder, made if missing", default=Path("cldsde-demo")),
    option("--seed N", SEED, "seed of weights, training and sampling", default=0),
    DEVICE,
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, open the run folder, and return the remaining work."""
    from cldsde.images.demo import DemoConfig, run_demo
    from cldsde.images.runs import RunFolder
    from cldsde.images.schema import plain

    device = resolve_device(options.device)
    config = DemoConfig.make(options.seed, device, quick=options.quick)
    folder = RunFolder(options.out, plain(config))

    def work() -> None:
        print(f"\n{run_demo(config, folder)}")
        if options.quick:
            print("Enough training and images to see it work, too few to rank solvers.")
        print(f"Everything is in {folder.path.resolve()}:")
        print("  samples.png       real and generated digits")
        print("  trajectories.png  data and velocity, diffused and generated")
        print("  distances.png     FD against score evaluations (table.md, results.json)")
        print("  samples.npz       the generated images")
        print("  model             the trained model: cldsde sample takes that folder")

    return work
