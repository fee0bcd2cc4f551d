"""Train CLD on handwritten digits and sample new ones, in minutes on a CPU.

The demonstration is a comparison, as cldsde compare makes them. It trains a score network on the
8×8 digits that ship with scikit-learn, and samples it with Euler–Maruyama, SSCS and the exponential
multistep solver at several budgets of score evaluations. The same command resumes an interrupted
demonstration.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from cldsde.cli import compare
from cldsde.cli.options import DEVICE, SEED, flag, option

OPTIONS = (
    flag("--quick", "a smaller version, in a few minutes: too few images to rank solvers"),
    option("--out DIR", Path, "folder, made if missing", default=Path("cldsde-demo")),
    option("--seed N", SEED, "seed of weights, training and sampling", default=0),
    DEVICE,
)
_QUICK = (
    *("samples=300", "base.training.images=51_200", "base.training.learning_rate=2e-3"),
    *("base.training.warmup=3_200", "base.training.ema_decay=0.99"),
    *("base.training.save_every=6_400", "base.training.sample_every=51_200"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options, open the folder, and return the remaining work."""
    how = {"config": "demo", "set": _QUICK if options.quick else (), "print_config": False}
    return compare.prepare(Namespace(**{**vars(options), **how, "quick": False}))
