"""Learning rates of a training, step by step."""

from __future__ import annotations

import math

from cldsde.images.config import RunConfig

def step_of_stage(config: RunConfig, step: int) -> int:
    """Steps since the stage began."""
    first = config.pretraining_steps
    return step if step < first else step - first


def learning_rates(config: RunConfig, step: int) -> list[float]:
    """That of the score, and of the autoencoder if there is one."""
    settings, latent, first = config.training, config.latent, config.pretraining_steps
    steps = first if step < first else settings.steps - first
    done = step_of_stage(config, step)
    share = min(1.0, (done + 1) * settings.batch / max(1, settings.warmup))
    if settings.decay == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * done / steps))
    peaks = [settings.learning_rate]
    if latent is not None:
        peaks.append(latent.learning_rate if step < first else latent.joint_learning_rate)
    return [share * peak for peak in peaks]
