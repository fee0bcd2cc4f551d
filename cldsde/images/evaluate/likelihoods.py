"""Likelihoods of images under score models and latent models."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cldsde.images.checks import check_images, check_values
from cldsde.images.data import to_unit
from cldsde.images.evaluate.distances import images_sha256, package_versions
from cldsde.images.latent import Batch, bit_per_dim, negative_evidence_lower_bound
from cldsde.images.model import DiffusionModel
from cldsde.images.schema import Count, Levels, Natural, checked
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess, Score, TimeSampler, dequantise, log_likelihood
from cldsde.score.flow_density import Divergence

_OF_BYTES = "; an upper bound on the bits of the discrete images"
_QUANTITY = {
    "exact": "negative log-density of dequantised images, taken as states at t_min, by the "
    f"probability-flow ODE, exact up to its tolerance{_OF_BYTES}",
    "bound": "negative lower bound on the log-density of dequantised images, of a model that stops "
    f"at t_min{_OF_BYTES}",
    "latent": "negative evidence lower bound of a latent model whose prior stops at t_min"
    f"{_OF_BYTES}",
}


class UndefinedLikelihoodError(ValueError):
    """The model defines no likelihood of such images."""


@checked
def likelihood(
    model: Any,
    images: Tensor,
    *,
    kind: Literal["auto", "exact", "bound"] = "auto",
    levels: Levels = 256,
    scale: Literal["bins", "ends"] = "bins",
    batch: Count = 64,
    seed: Natural = 0,
    t_min: float = 1e-5,
    samples: int = 1,
    divergence: Divergence = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfev: int = 100_000,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Bits per dim of a score model on images, by its probability-flow ODE.

    Levels are dequantised: spread uniformly over their bins. The dequantised images depend on the
    seed alone, the noise of the estimate also on the batches. See :doc:`/how-to/compare-models`.

    Parameters
    ----------
    model
        A `ReverseProcess`, or a `Score` that knows its process; on ``device``, in evaluation mode.
    images
        uint8 ``(N, C, H, W)`` with values below ``levels``.
    kind
        ``"exact"``: the density at ``t_min``, without auxiliary components. ``"bound"``: an upper
        bound (start ``"perturb"`` of `log_likelihood`). ``"auto"``: ``"exact"`` if possible.
    levels, scale
        Number of grey levels L, 2 … 256, and the scale of the training. ``"bins"``: dequantised
        images, (level + U) / L scaled to [−1, 1]. ``"ends"``: levels on 2·level/(L − 1) − 1 with
        bins about them; a model of such levels has no useful density at small ``t_min``.
    batch, seed, device, progress
        Images per batch; seed of all noise; device; whether to show a progress bar on stderr.
    t_min, samples, divergence, rtol, atol, max_nfev
        See `log_likelihood`.

    Returns
    -------
    dict
        ``bits_per_dim``, the mean over images; its ``standard_error`` over images and noise (None
        for one image); ``quantity``, a description; ``is_bound``; ``nfev`` per image; ``images``,
        ``images_sha256``, ``process``, ``settings`` and ``versions``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, the model has no process, or is in training mode.
    """
    if isinstance(model, Score) and model.sde is not None:
        model = ReverseProcess(model.sde, model)
    if not isinstance(model, ReverseProcess):
        kinds = "a ReverseProcess, or a Score that knows its process"
        raise TypeError(f"model must be {kinds}; got {type(model).__name__}")
    _check(model.score, images, levels)
    if kind == "exact" and model.sde.components > 1:
        need = "kind='exact' needs a process without auxiliary components"
        raise ValueError(f"{need}; got {model.sde!r}; use 'bound'")
    if kind == "auto":
        kind = "exact" if model.sde.components == 1 else "bound"
    options: dict[str, Any] = {"samples": samples, "divergence": divergence}
    options |= {"rtol": rtol, "atol": atol, "max_nfev": max_nfev}
    generator = torch.Generator().manual_seed(seed)
    end = 1.0 if scale == "bins" else levels / (levels - 1)
    data = dequantise(images, count=levels, low=-end, high=end, generator=generator)
    start: Any = "replace" if kind == "exact" else "perturb"
    bits, nfev = [], 0
    for part in progress_bar(torch.split(data, batch), shown=progress, desc="likelihood"):
        x = part.to(device)
        found = log_likelihood(model, x, t_min, start=start, generator=generator, **options)
        bits.append(found.bits_per_dim(2 * end / levels).cpu().to(torch.float64))
        nfev += found.nfev * len(part)
    settings = {"kind": kind, "scale": scale, **options, "levels": levels, "batch": batch}
    settings |= {"seed": seed, "t_min": t_min, "device": str(device)}
    about = {"process": repr(model.sde), "nfev": nfev / len(images), "settings": settings}
    return _report(bits, images, kind, "torchdiffeq", **about)


@checked
def latent_likelihood(
    model: DiffusionModel,
    images: Tensor,
    *,
    levels: Levels = 256,
    batch: Count = 64,
    seed: Natural = 0,
    t_min: float = 1e-3,
    samples: Count = 16,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Bits per dim of a latent model on images, by its evidence lower bound; see `likelihood`."""
    if model.vae is None:
        raise ValueError("model must have an autoencoder; use likelihood for a model of pixels")
    _check(model, images, levels)
    pixels = model.vae.likelihood
    if pixels.levels != levels:
        name = type(pixels).__name__
        msg = f"the autoencoder's distribution of pixels, {name}, is of {pixels.levels} grey "
        msg += f"levels, so that no bound on the bits of images of {levels} follows from it"
        raise UndefinedLikelihoodError(msg)
    sde = model.score.sde
    generator = torch.Generator().manual_seed(seed)
    sampler = TimeSampler.importance(sde, t_min, weighting="likelihood")
    bits = []
    for part in progress_bar(torch.split(images, batch), shown=progress, desc="likelihood"):
        x = to_unit(part, levels).to(device)
        total = torch.zeros(len(x), dtype=torch.float64, device="cpu")
        for _ in range(samples):
            times = torch.stack(sampler.sample(len(x), generator=generator)).expand(2, 2, -1)
            pair = Batch(x, None, times)
            with torch.no_grad():
                bound, _ = negative_evidence_lower_bound(model, pair, generator, t_min)
            total += bound.cpu().double()
        bits.append(bit_per_dim(x) * total / samples)
    settings: dict[str, Any] = {"levels": levels, "batch": batch, "seed": seed, "t_min": t_min}
    settings |= {"samples": samples, "device": str(device)}
    about = {"process": repr(sde), "nfev": samples, "settings": settings}
    return _report(bits, images, "latent", "diffusers", **about)


def _report(
    parts: list[Tensor], images: Tensor, kind: str, package: str, **about: Any
) -> dict[str, Any]:
    """Mean over images with its standard error, and everything that it depends on."""
    bits = torch.cat(parts)
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else None,
        "images": len(bits),
        "quantity": _QUANTITY[kind],
        "is_bound": kind != "exact",
        "images_sha256": images_sha256(images),
        **about,
        "versions": package_versions("cldsde", "torch", package),
    }


def _check(model: nn.Module, images: Tensor, levels: int) -> None:
    learnt = (x for x in model.modules() if next(x.parameters(recurse=False), None) is not None)
    if any(x.training for x in learnt):
        raise ValueError("model must be in evaluation mode; call .eval()")
    check_values(check_images(images, "images"), levels)
