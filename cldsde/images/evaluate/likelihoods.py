"""Likelihoods of images under score models."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cldsde.images.evaluate.distances import images_sha256
from cldsde.images.evaluate.shared import (
    check_count,
    check_images,
    package_versions,
    parts,
)
from cldsde.linear.checks import check_between, check_positive
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess, dequantise, log_likelihood
from cldsde.score.checks import one_of
from cldsde.score.flow_density import Divergence

Kind = Literal["auto", "exact", "bound"]
Scale = Literal["bins", "ends"]

_QUANTITY = {
    "exact": (
        "negative log-density of dequantised images, taken as states at t_min, by the "
        "probability-flow ODE, exact up to its tolerance; an upper bound on the bits of the "
        "discrete images"
    ),
    "bound": (
        "negative lower bound on the log-density of dequantised images, of a model that stops at "
        "t_min; an upper bound on the bits of the discrete images"
    ),
}


def likelihood(
    model: Any,
    images: Tensor,
    *,
    kind: Kind = "auto",
    levels: int = 256,
    scale: Scale = "bins",
    batch: int = 64,
    seed: int = 0,
    t_min: float = 1e-5,
    samples: int = 1,
    divergence: Divergence = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfev: int = 100_000,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Bits a dimension of a score model on images, by its probability-flow ODE.

    Levels are dequantised, spread uniformly over their bins. The dequantised images depend on the
    seed alone; the noise of the estimate, where there is any, on the batches, too.

    Parameters
    ----------
    model
        A `ReverseProcess`, or a score that knows its process by an attribute ``sde``, such as
        `MixedScore`; on ``device``, in evaluation mode.
    images
        uint8 ``(N, C, H, W)`` with values below ``levels``.
    kind
        ``"exact"``: the model's density at ``t_min``, taken at the images, for processes without
        auxiliary components. ``"bound"``: a proper lower bound for a model that stops at ``t_min``,
        for all processes; see `log_likelihood`, where they are ``"replace"`` and ``"perturb"``.
        ``"auto"``: exact where there are no auxiliary components.
    levels
        Number of grey levels L, 2 … 256.
    scale
        Of the images that the model was trained on. ``"bins"``: (level + U) / L scaled to [−1, 1],
        dequantised images. ``"ends"``: levels on 2·level/(L − 1) − 1 with bins about them. A model
        trained on the levels themselves has no density to speak of at small ``t_min``.
    batch
        Images at a time.
    seed
        Of the dequantisation and all other noise.
    t_min, samples, divergence, rtol, atol, max_nfev
        See `log_likelihood`.
    device
        Where to compute.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    dict
        ``bits_per_dim``, the mean over images; ``standard_error`` of that mean, which covers the
        choice of the images and all noise (None for one image); ``images``, their number;
        ``quantity``, what was computed, in words; ``is_bound``, whether it is a bound on the
        density's bits and not their value; ``nfev`` of each image, on average over images;
        ``images_sha256``, ``process``, ``settings`` and ``versions``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, the model has no process, or is in training mode.
    """
    process = _process_of(model)
    one_of(kind, Kind, "kind")
    one_of(scale, Scale, "scale")
    one_of(divergence, Divergence, "divergence")
    check_levels(images, levels)
    _check_numbers(
        process,
        {"batch": batch, "samples": samples, "max_nfev": max_nfev},
        seed=seed,
        t_min=t_min,
        rtol=rtol,
        atol=atol,
    )
    kind = _resolved(kind, process)
    options: dict[str, Any] = {
        "samples": samples,
        "divergence": divergence,
        "rtol": rtol,
        "atol": atol,
        "max_nfev": max_nfev,
    }
    generator = torch.Generator().manual_seed(seed)
    end = 1.0 if scale == "bins" else levels / (levels - 1)
    data = dequantise(images, count=levels, low=-end, high=end, generator=generator)
    bits, nfev = [], 0
    with progress_bar(None, shown=progress, total=len(images), desc="likelihood") as bar:
        for part in parts(data, batch):
            found = log_likelihood(
                process,
                part.to(device),
                t_min,
                start="replace" if kind == "exact" else "perturb",
                generator=generator,
                **options,
            )
            bits.append(found.bits_per_dim(2 * end / levels).cpu().to(torch.float64))
            nfev += found.nfev * len(part)
            bar.update(len(part))
    settings = {
        "kind": kind,
        "levels": levels,
        "scale": scale,
        "batch": batch,
        "seed": seed,
        "t_min": t_min,
        **options,
        "device": str(device),
    }
    return {
        **mean_bits(torch.cat(bits)),
        "quantity": _QUANTITY[kind],
        "is_bound": found.is_bound,
        "nfev": nfev / len(images),
        "images_sha256": images_sha256(images),
        "process": repr(process.sde),
        "settings": settings,
        "versions": package_versions("cldsde", "torch", "torchdiffeq"),
    }


def mean_bits(bits: Tensor) -> dict[str, Any]:
    """Mean over images and its standard error."""
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return {"bits_per_dim": float(bits.mean()), "standard_error": error, "images": len(bits)}


def check_levels(images: Tensor, levels: int) -> None:
    """Raise unless images are uint8 ``(N, C, H, W)`` with values below ``levels``."""
    check_images(images, "images", least=1)
    if check_count(levels, "levels", least=2) > 256:
        msg = f"levels must be at most 256, the number of uint8 values; got {levels}"
        raise ValueError(msg)
    if int(images.max()) >= levels:
        msg = f"images must have values below levels, {levels}; got {int(images.max())}"
        raise ValueError(msg)


def _check_numbers(
    process: ReverseProcess,
    counts: dict[str, int],
    *,
    seed: int,
    t_min: float,
    rtol: float,
    atol: float,
) -> None:
    for name, value in counts.items():
        check_count(value, name)
    check_count(seed, "seed", least=0)
    check_between(t_min, 1e-300, process.sde.T * (1 - 1e-9), "t_min")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")


def _resolved(kind: Kind, process: ReverseProcess) -> Kind:
    """Check the kind against the process; what ``"auto"`` stands for."""
    components = process.sde.components
    if kind == "auto":
        return "exact" if components == 1 else "bound"
    if kind == "exact" and components > 1:
        msg = (
            "kind='exact' needs a process without auxiliary components; got "
            f"{process.sde!r}; use 'bound'"
        )
        raise ValueError(msg)
    return kind


def _process_of(model: Any) -> ReverseProcess:
    if isinstance(model, ReverseProcess):
        process = model
    else:
        sde = getattr(model, "sde", None)
        if sde is None:
            msg = (
                "model must be a ReverseProcess, or a score with an attribute sde; got "
                f"{type(model).__name__}"
            )
            raise TypeError(msg)
        process = ReverseProcess(sde, model)
    if isinstance(process.score, nn.Module) and process.score.training:
        msg = "model must be in evaluation mode; call .eval()"
        raise ValueError(msg)
    return process
