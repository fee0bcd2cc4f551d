"""FID and its like: distances in the features of the Inception network of 2015."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cldsde.images.evaluate.distances import images_sha256
from cldsde.images.evaluate.shared import (
    check_count,
    check_images,
    check_pair,
    package_versions,
)
from cldsde.images.evaluate.weights import (
    EXTRACTOR,
    check_cache,
    check_inception_weights,
    is_published,
    plain_loads,
)
from cldsde.linear.checks import check_between
from cldsde.progress import progress_bar

InceptionMetric = Literal["fid", "kid", "isc", "prc"]
"""Fréchet and kernel distance, inception score, precision and recall, by torch-fidelity's names."""

_NEIGHBOURS = 3
_SPLITS = 10


def inception_metrics(
    images: Tensor,
    reference: Tensor,
    weights: Path,
    *,
    metrics: Sequence[InceptionMetric] = ("fid", "kid", "isc", "prc"),
    batch: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    cache: Path | None = None,
    source: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """FID, KID, Inception score, precision and recall, by torch-fidelity.

    Nothing is downloaded: the weights come from a file. Grey images are repeated to three channels.
    An image takes about 0.4 s on a processor core.

    Parameters
    ----------
    images, reference
        uint8 ``(N, C, H, W)`` and ``(M, C, H, W)`` with 1 or 3 channels.
    weights
        The file `INCEPTION_FILE`. Other weights of that network are taken, and the result says so:
        ``weights.published`` is false.
    metrics
        Which: ``"fid"``, ``"kid"``, ``"isc"`` (Inception score of ``images``), ``"prc"``
        (precision and recall, with 3 neighbours).
    batch
        Images at a time.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    seed
        Of the subsets of KID and the order of the images for the Inception score, 0 … 2³² − 1.
    kid_subsets, kid_subset_size
        Of KID.
    cache
        Folder that keeps features of the reference, by the hashes of images and weights; None for
        nothing kept. Its files are read without running code that they may hold.
    source
        Where the samples come from, noted in the result.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    dict
        ``metrics``: for each number its ``value``, its ``spread`` and ``spread_is``, what that
        spread is (both None for FID, precision, recall and F-score); ``samples``,
        ``reference_samples``, their SHA-256, ``source``, ``channels``, ``extractor``, ``resize``,
        ``weights``, ``settings`` and ``versions``.

    Raises
    ------
    FileNotFoundError
        If there is no file ``weights``; says where to get it.
    ImportError
        If torch-fidelity is not installed.
    TypeError, ValueError
        If an argument is out of range, shapes do not fit, there are too few images for a metric,
        or a file is damaged or not of that network.
    """
    weights = Path(weights)
    chosen = _check_metrics(metrics)
    _check_numbers(batch, seed, kid_subsets, kid_subset_size)
    _check_sets(images, reference, chosen, kid_subset_size)
    on = _check_device(device)
    try:
        import torch_fidelity
    except ImportError as error:
        msg = "inception_metrics needs torch-fidelity: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
    weights_sha256 = check_inception_weights(weights)
    hashes = images_sha256(images), images_sha256(reference)
    cached = _cached(cache, hashes[1], weights_sha256, len(reference))
    here = torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext()
    total = len(images) + len(reference)
    with (
        here,
        plain_loads(),
        # The network is initialised before its weights are read, and its loader draws a seed.
        torch.random.fork_rng(devices=[]),
        progress_bar(None, shown=progress, total=total, desc="Inception") as bar,
    ):
        found = torch_fidelity.calculate_metrics(
            input1=_Coloured(images, bar),
            input2=_Coloured(reference, bar),
            # Named, since the default for precision and recall is a VGG that would be downloaded.
            feature_extractor=EXTRACTOR,
            feature_extractor_weights_path=str(weights),
            **{metric: metric in chosen for metric in get_args(InceptionMetric)},
            isc_splits=_SPLITS,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            prc_neighborhood=_NEIGHBOURS,
            batch_size=batch,
            cuda=on.type == "cuda",
            rng_seed=seed,
            datasets_download=False,
            save_cpu_ram=True,  # no worker processes, and no N × M matrix of distances
            verbose=False,
            **cached,
        )
    settings = {
        "batch": batch,
        "device": str(on),
        "seed": seed,
        "isc_splits": _SPLITS,
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
        "prc_neighbourhood": _NEIGHBOURS,
    }
    subsets = f"standard deviation over {kid_subsets} subsets of {kid_subset_size}"
    return {
        "metrics": _named(found, chosen, subsets),
        **_sources(images, reference, hashes, source),
        **_network(weights, weights_sha256),
        "settings": settings,
        "versions": package_versions("cldsde", "torch", "torch-fidelity", "numpy"),
    }


def _sources(
    images: Tensor, reference: Tensor, hashes: tuple[str, str], source: str | None
) -> dict[str, Any]:
    return {
        "samples": len(images),
        "reference_samples": len(reference),
        "samples_sha256": hashes[0],
        "reference_sha256": hashes[1],
        "source": source,
        "channels": "grey repeated to three" if images.shape[1] == 1 else "three",
    }


def _network(weights: Path, sha256: str) -> dict[str, Any]:
    return {
        "extractor": EXTRACTOR,
        "resize": "bilinear to 299×299 as in TensorFlow 1, in torch-fidelity",
        "weights": {
            "file": weights.name,
            "sha256": sha256,
            "published": is_published(sha256),
        },
    }


def _cached(cache: Path | None, reference: str, weights: str, count: int) -> dict[str, Any]:
    """Arguments of torch-fidelity that have it keep the features of the reference."""
    if cache is None:
        return {"cache": False}
    key = f"cldsde-{reference[:32]}-{weights[:32]}"
    check_cache(cache, key, count)
    return {"cache": True, "cache_root": str(cache), "input2_cache_name": key}


_KEYS: dict[str, dict[str, tuple[str, str | None]]] = {
    "fid": {"fid": ("frechet_inception_distance", None)},
    "kid": {"kid": ("kernel_inception_distance_mean", "kernel_inception_distance_std")},
    "isc": {"isc": ("inception_score_mean", "inception_score_std")},
    "prc": {
        "precision": ("precision", None),
        "recall": ("recall", None),
        "f_score": ("f_score", None),
    },
}
"""Our names, and torch-fidelity's of value and spread."""


def _named(found: dict[str, float], chosen: Sequence[str], subsets: str) -> dict[str, Any]:
    spreads = {"kid": subsets, "isc": f"standard deviation over {_SPLITS} splits"}
    return {
        name: {
            "value": found[value],
            "spread": None if spread is None else found[spread],
            "spread_is": spreads.get(name),
        }
        for metric in chosen
        for name, (value, spread) in _KEYS[metric].items()
    }


def _check_metrics(metrics: Sequence[str]) -> list[str]:
    options = get_args(InceptionMetric)
    names = [] if isinstance(metrics, str) else list(metrics)
    if not names or not set(names) <= set(options):
        msg = f"metrics must be some of {', '.join(map(repr, options))}; got {metrics!r}"
        raise ValueError(msg)
    return [option for option in options if option in names]


def _check_numbers(batch: int, seed: int, kid_subsets: int, kid_subset_size: int) -> None:
    check_count(batch, "batch")
    check_count(kid_subsets, "kid_subsets")
    check_count(kid_subset_size, "kid_subset_size", least=2)
    check_between(check_count(seed, "seed", least=0), 0, 2**32 - 1, "seed")


def _check_sets(
    images: Tensor, reference: Tensor, chosen: Sequence[str], kid_subset_size: int
) -> None:
    least, why = 2, "a covariance"
    if "prc" in chosen:
        least, why = _NEIGHBOURS + 1, f"{_NEIGHBOURS} neighbours"
    if "kid" in chosen and kid_subset_size > least:
        least, why = kid_subset_size, "kid_subset_size"
    _check_enough(images, "images", least, why)
    _check_enough(reference, "reference", least, why)
    if "isc" in chosen:
        _check_enough(images, "images", _SPLITS, f"{_SPLITS} splits")
    check_pair(images, reference)
    if images.shape[1] not in {1, 3}:
        msg = f"images must have 1 or 3 channels; got {images.shape[1]}"
        raise ValueError(msg)


def _check_enough(images: object, name: str, least: int, why: str) -> None:
    count = len(check_images(images, name))
    if count < least:
        msg = f"{name} must hold at least {least} images, for {why}; got {count}"
        raise ValueError(msg)


def _check_device(device: torch.device | str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        msg = f"device must be 'cpu', 'cuda' or 'cuda:N' for torch-fidelity; got {str(device)!r}"
        raise ValueError(msg)
    on = torch.device(device)
    if on.type == "cuda" and (on.index or 0) >= torch.cuda.device_count():
        msg = f"device: this machine has no {on}; use 'cpu'"
        raise ValueError(msg)
    return on


class _Coloured(torch.utils.data.Dataset[Tensor]):
    """Images with three channels, as torch-fidelity takes them; counts them on a bar."""

    def __init__(self, images: Tensor, bar: Any) -> None:
        self.images, self.bar, self.seen = images, bar, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index == self.seen:  # torch-fidelity looks at the first one twice
            self.seen += 1
            self.bar.update()
        return self.images[index].expand(3, -1, -1)
