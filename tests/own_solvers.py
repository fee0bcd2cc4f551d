"""Solvers as a user may name them: Euler–Maruyama with coefficients of mid time, and its faults."""

# ruff: noqa: RUF012 claims of solvers are not changed

from __future__ import annotations

from dataclasses import dataclass

import torch

from cldsde.solvers.authoring import AffineSolver, Facts, Stage, Stages, as_blocks


@dataclass(frozen=True, kw_only=True)
class CentredEuler(AffineSolver):
    CLAIMS = {"weak_order": 1}

    @property
    def facts(self):
        return Facts(applies_to="every linear SDE", nfe_per_step=1, **self.CLAIMS)

    def prepare(self, process, times):
        sde, middle = process.sde, (times[:-1] + times[1:]) / 2
        h = -times.diff()[:, None, None]
        F, G = sde.drift(middle), sde.diffusion(middle)
        state = torch.eye(sde.components, dtype=torch.float64) - h * F
        score = h * (G @ G.mT)[..., list(sde.driven)]
        noise = as_blocks(h.sqrt() * G)
        return Stages.of(Stage(as_blocks(state), as_blocks(score), noise=noise))


class Claiming(CentredEuler):
    CLAIMS = {"weak_order": 2}


class Doubtful(CentredEuler):
    CLAIMS = {"weak_order": 1.25}


class Late(CentredEuler):
    """Fails for 8,192 states, which only the work-precision diagram uses."""

    def step(self, z, *arguments):
        if len(z) == 8192:
            raise RuntimeError("too\nmany")
        return super().step(z, *arguments)


class Interrupted(CentredEuler):
    """Interrupted on processes of two components."""

    def step(self, z, *arguments):
        if z.shape[1] == 2:
            raise KeyboardInterrupt
        return super().step(z, *arguments)


@dataclass(frozen=True, kw_only=True)
class Needy(CentredEuler):
    option: float


class Key(CentredEuler):
    def __init__(self):
        raise KeyError("no\nkey")


class Exit(CentredEuler):
    def __init__(self):
        raise SystemExit(0)


def exact(process, observation, times, n, generator):
    """An exact posterior sampler."""
    return process.score.data.condition(observation).sample(n, generator=generator)


def biased(process, observation, times, n, generator):
    """A sampler that ignores the observation."""
    return process.score.data.sample(n, generator=generator)
