"""Defaults of samplers that run inside other libraries: the solver, and the source of noise."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.pretrained.stepping import PathSteps
from cldsde.solvers import ExponentialEuler
from cldsde.solvers.base import GridSolver
from cldsde.solvers.noise import SampleNoise
from cldsde.solvers.sampling import RECOMMENDED

# A sampling that starts at a larger κ = log(α/σ) is a part of one.
_NOISE = -2.0


def recommended_steps(
    sde: LinearSDE, solver: GridSolver | None, log_snr: Tensor, signal: Tensor, noise: Tensor
) -> PathSteps:
    """Steps of `PathSteps` with a solver; None: the first recommended one that applies."""
    if solver is not None:
        return PathSteps(sde, solver, log_snr, signal, noise)
    # A part of a sampling has few steps, but may have long ones, for which order 3 is unstable.
    whole = bool(log_snr[0] <= _NOISE) and bool(log_snr[-1] == math.inf)
    n = len(log_snr) - 2 if whole else math.inf  # steps before the data prediction
    for recipe in RECOMMENDED:
        fits = sde.components <= recipe.most_components and n <= recipe.most_steps
        if fits and isinstance(recipe.solver, GridSolver) and recipe.solver.facts.score_at_start:
            try:
                return PathSteps(sde, recipe.solver, log_snr, signal, noise)
            except ValueError:  # try the next one, as `recommended_plan` does
                continue
    return PathSteps(sde, ExponentialEuler(), log_snr, signal, noise)


def streams_of(x: Tensor) -> SampleNoise:
    """One random stream per sample, which depends on the values of this sample alone."""

    def seed(row: Tensor) -> int:
        values = row.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        return int.from_bytes(hashlib.sha256(values).digest()[:4], "little")

    return SampleNoise([seed(row) for row in x])
