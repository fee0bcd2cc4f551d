"""Likelihoods of images under latent models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cldsde.images.data import to_unit
from cldsde.images.evaluate.distances import images_sha256
from cldsde.images.evaluate.likelihoods import check_levels, mean_bits
from cldsde.images.evaluate.shared import (
    UndefinedLikelihoodError,
    check_count,
    package_versions,
    parts,
)
from cldsde.images.model import DiffusionModel
from cldsde.images.train.objectives import Batch, Times, bit_per_dim, negative_evidence_lower_bound
from cldsde.linear.checks import check_between
from cldsde.progress import progress_bar
from cldsde.score import TimeSampler

_QUANTITY = (
    "negative evidence lower bound of a latent model whose prior stops at t_min; an upper bound on "
    "the bits of the discrete images"
)


def latent_likelihood(
    model: DiffusionModel,
    images: Tensor,
    *,
    levels: int = 256,
    batch: int = 64,
    seed: int = 0,
    t_min: float = 1e-3,
    samples: int = 16,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Bits a dimension of a latent model on images, by its evidence lower bound.

    Parameters
    ----------
    model
        A model with an autoencoder, on ``device``, in evaluation mode.
    images
        uint8 ``(N, C, H, W)`` with values below ``levels``.
    levels
        Number of grey levels, 2 … 256.
    batch
        Images at a time.
    seed
        Of the latent variables, times and noise.
    t_min
        Time at which the prior's process ends.
    samples
        Draws of latent variables, time and noise of each image.
    device
        Where to compute.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    dict
        As `likelihood` returns.

    Raises
    ------
    UndefinedLikelihoodError
        If the autoencoder's law of pixels is not one of so many levels.
    TypeError, ValueError
        If an argument is out of range, or the model has no autoencoder or is in training mode.
    """
    if model.vae is None:
        msg = "model must have an autoencoder; take likelihood for a model of pixels"
        raise ValueError(msg)
    if model.training:
        msg = "model must be in evaluation mode; call .eval()"
        raise ValueError(msg)
    sde = model.score.sde
    check_levels(images, levels)
    law = model.vae.likelihood
    if law.levels != levels:
        msg = (
            f"the autoencoder's law of pixels, {type(law).__name__}, is of {law.levels} grey "
            f"levels, and no bound on the bits of images of {levels} follows from it"
        )
        raise UndefinedLikelihoodError(msg)
    for name, value in {"batch": batch, "samples": samples}.items():
        check_count(value, name)
    check_count(seed, "seed", least=0)
    check_between(t_min, 1e-300, sde.T * (1 - 1e-9), "t_min")
    generator = torch.Generator().manual_seed(seed)
    sampler = TimeSampler.importance(sde, t_min, weighting="likelihood")
    found = []
    with progress_bar(None, shown=progress, total=len(images), desc="likelihood") as bar:
        for part in parts(images, batch):
            x = to_unit(part, levels).to(device)
            total = torch.zeros(len(x), dtype=torch.float64)
            for _ in range(samples):
                times = Times(*sampler.sample(len(x), generator=generator))
                with torch.no_grad():
                    bound = negative_evidence_lower_bound(
                        model, Batch(x, None, (times, times)), generator, t_min
                    )
                total += bound.cpu().double()
            found.append(bit_per_dim(x) * total / samples)
            bar.update(len(part))
    return {
        **mean_bits(torch.cat(found)),
        "quantity": _QUANTITY,
        "is_bound": True,
        "nfev": samples,
        "images_sha256": images_sha256(images),
        "process": repr(sde),
        "settings": {
            "levels": levels,
            "batch": batch,
            "seed": seed,
            "t_min": t_min,
            "samples": samples,
            "device": str(device),
        },
        "versions": package_versions("cldsde", "torch", "diffusers"),
    }
