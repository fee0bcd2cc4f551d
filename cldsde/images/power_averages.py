"""Averages of weights with power-function profiles, combined after a training.

The profile of an average of the weights of t steps is (γ + 1) τ^γ / t^(γ+1). Its relative width σ
is its standard deviation over t. A linear combination of saved averages approximates the average
of another width. Its coefficients minimise the squared error of the profile. See Karras et al.
(2024, arXiv:2312.02696), §3.1 and appendix C.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

from cldsde.errors import require
from cldsde.images.config import RunConfig
from cldsde.images.runs import SNAPSHOTS
from cldsde.images.tensor_files import load_tensors, tensors_digest
from cldsde.messages import counted

WIDTHS = (0.05, 0.10)
"""Relative widths of the averages that a training saves."""
_LARGEST_ERROR = 0.2  # of a profile; twelve checkpoints leave 0.11 at a width of 0.25
_NEGLIGIBLE = 1e-9  # of a combination; single precision rounds weights by 6e-8


def wanted_width(file: Path) -> float | None:
    """The width in the name of a file that is made when it is read: ``power-0.075.safetensors``."""
    found = re.fullmatch(r"power-(0\.\d+)\.safetensors", file.name)
    return None if found is None or file.is_file() else float(found[1])


def power(width: float) -> float:
    """γ of a relative width: σ² = (γ + 1) / ((γ + 2)² (γ + 3))."""

    def excess(gamma: float) -> float:
        return (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) - width**2

    return float(brentq(excess, 0.0, 1 / width, xtol=1e-13))


def combination(
    steps: Sequence[float], widths: Sequence[float], width: float
) -> tuple[list[float], float]:
    """Coefficients, of sum 1, of averages whose combination has a width after the last step.

    Returned with the relative error of the combined profile, in the norm of L².
    """
    t, gamma = np.array([*steps, max(steps)]), np.array([power(x) for x in (*widths, width)])
    s, delta = t[:, None], gamma[:, None]
    inner = (delta + 1) * (gamma + 1) / (delta + gamma + 1) / np.maximum(s, t)
    inner *= np.minimum(1, t / s) ** delta * np.minimum(1, s / t) ** gamma  # of two profiles
    found = np.linalg.lstsq(inner[:-1, :-1], inner[:-1, -1], rcond=None)[0]
    found /= found.sum()
    residual = np.array([*found, -1.0])
    squared = float(residual @ inner @ residual / inner[-1, -1])
    return found.tolist(), max(squared, 0.0) ** 0.5


def combined(
    place: Path, width: float, kind: str, config: RunConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of a width after the last saved step, and notes; ``place`` is a file in the run."""
    run, saved = place.parent, []
    for file in sorted((run / SNAPSHOTS).glob("power-*-*.safetensors"), key=lambda x: x.stem[-12:]):
        _, own, seen = file.stem.split("-")
        saved.append((file, int(seen) / config.training.batch, float(own)))
    require(bool(saved), "training.power_averages", f"{run} has saved no averages to combine")
    if not 0.05 <= width <= 0.25:
        raise ValueError(f"{place}: the width must lie in [0.05, 0.25]")
    first = config.pretraining_steps  # a stage of its own
    if saved[-1][1] > first:
        saved = [(file, t - first, own) for file, t, own in saved if t > first]
    files, steps, widths = zip(*saved, strict=True)
    shares, error = combination(steps, widths, width)
    if error > _LARGEST_ERROR:
        msg = f"{place}: {counted(len({*steps}), 'checkpoint')} cannot give this width (error of "
        raise ValueError(f"{msg}its profile: {error:.0%}); a smaller one or more checkpoints can")
    base, notes = load_tensors(files[-1], kind)
    sums = {name: x.double() for name, x in base.items()}
    for file, share in zip(files[:-1], shares[:-1], strict=True):
        if abs(share) < _NEGLIGIBLE:
            continue
        weights, others = load_tensors(file, kind)
        require(others["training"] == notes["training"], "run", f"{file} is of another training")
        for name, x in weights.items():  # differences, so that constants keep their bits
            sums[name] += share * (x.double() - base[name].double())
    found = {name: x.to(base[name].dtype) for name, x in sums.items()}
    return found, {**notes, "sha256": tensors_digest(found, notes)}
