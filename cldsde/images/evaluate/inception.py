"""FID, KID, Inception score, precision and recall, in features of the Inception network of 2015."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from cldsde.images.checks import check_images, check_same_shape
from cldsde.images.evaluate.distances import images_sha256, package_versions
from cldsde.images.evaluate.weights import (
    EXTRACTOR,
    check_cache,
    check_inception_weights,
    is_published,
    load_inception,
    plain_loads,
)
from cldsde.images.schema import Count, Natural, checked
from cldsde.progress import progress_bar

InceptionMetric = Literal["fid", "kid", "isc", "prc"]
"""Fréchet and kernel distance, inception score, precision and recall, by torch-fidelity's names."""

_NEIGHBOURS = 3
_SPLITS = 10
_NAMES: dict[str, dict[str, tuple[str, str | None]]] = {
    "fid": {"fid": ("frechet_inception_distance", None)},
    "kid": {"kid": ("kernel_inception_distance_mean", "kernel_inception_distance_std")},
    "isc": {"isc": ("inception_score_mean", "inception_score_std")},
    "prc": {name: (name, None) for name in ("precision", "recall", "f_score")},
}
"""For each metric our names, and torch-fidelity's of value and spread."""


@checked
def inception_metrics(
    images: Tensor,
    reference: Tensor,
    weights: Path,
    *,
    metrics: Annotated[Sequence[InceptionMetric], Field(min_length=1)] = get_args(InceptionMetric),
    batch: Count = 64,
    device: torch.device | str = "cpu",
    seed: Annotated[Natural, Field(lt=2**32)] = 0,
    kid_subsets: Count = 100,
    kid_subset_size: Annotated[Count, Field(ge=2)] = 1000,
    cache: Path | None = None,
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
        The file `INCEPTION_FILE`. Other weights of that network are accepted, and the result says
        so: ``weights.published`` is false.
    metrics
        Some of ``"fid"``, ``"kid"``, ``"isc"`` (Inception score of ``images``), ``"prc"``
        (precision and recall, with 3 neighbours).
    batch
        Images per batch.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    seed
        Seed of the subsets of KID and the order of the images for the Inception score, below 2³².
    kid_subsets, kid_subset_size
        Number and size of the subsets of KID.
    cache
        Folder that keeps features of the reference, by the hashes of images and weights; None
        keeps nothing. Its files are read without running code that they may hold.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    dict
        ``metrics``: for each number its ``value``, its ``spread``, and ``spread_is``, a description
        of the spread (both None for FID, precision, recall and F-score); ``samples``,
        ``reference_samples``, their SHA-256, ``channels``, ``extractor``, ``resize``, ``weights``,
        ``settings`` and ``versions``.

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
    options = get_args(InceptionMetric)
    chosen = [option for option in options if option in metrics]
    _check_sets(images, reference, chosen, kid_subset_size)
    on = _check_device(device)
    try:
        import torch_fidelity
    except ImportError as error:
        msg = "inception_metrics needs torch-fidelity: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
    weights = Path(weights)
    weights_sha256 = check_inception_weights(weights)
    own, other = images_sha256(images), images_sha256(reference)
    cached: dict[str, Any] = {"cache": False}
    if cache is not None:
        key = f"cldsde-{other[:32]}-{weights_sha256[:32]}"
        check_cache(cache, key, len(reference))
        cached = {"cache": True, "cache_root": str(cache), "input2_cache_name": key}
    total = len(images) + len(reference)
    with (
        torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext(),
        plain_loads(),
        # The network is initialised before its weights are read, and its loader draws a seed.
        torch.random.fork_rng(devices=[]),
        progress_bar(None, shown=progress, total=total, desc="Inception") as bar,
    ):
        found = torch_fidelity.calculate_metrics(
            input1=_Coloured(images, bar),
            input2=_Coloured(reference, bar),
            # Named, because the default for precision and recall is a VGG that is downloaded.
            feature_extractor=EXTRACTOR,
            feature_extractor_weights_path=str(weights),
            **{metric: metric in chosen for metric in options},
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
    of_kid = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
    settings = {"isc_splits": _SPLITS, **of_kid, "prc_neighbourhood": _NEIGHBOURS}
    spreads = {
        "kid": f"standard deviation over {kid_subsets} subsets of {kid_subset_size}",
        "isc": f"standard deviation over {_SPLITS} splits",
    }
    return {
        "metrics": {
            name: {
                "value": found[value],
                "spread": None if spread is None else found[spread],
                "spread_is": spreads.get(name),
            }
            for metric in chosen
            for name, (value, spread) in _NAMES[metric].items()
        },
        "samples": len(images),
        "reference_samples": len(reference),
        "samples_sha256": own,
        "reference_sha256": other,
        "channels": "grey repeated to three" if images.shape[1] == 1 else "three",
        "extractor": EXTRACTOR,
        "resize": "bilinear to 299×299 as in TensorFlow 1, in torch-fidelity",
        "weights": {
            "file": weights.name,
            "sha256": weights_sha256,
            "published": is_published(weights_sha256),
        },
        "settings": {"batch": batch, "device": str(on), "seed": seed, **settings},
        "versions": package_versions("cldsde", "torch", "torch-fidelity", "numpy"),
    }


class InceptionFeatures:
    """Features of the Inception network, ``(B, 2048)``: a `FeatureNetwork`, for FID alone.

    Parameters
    ----------
    weights, device
        See `inception_metrics`.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        self._device = _check_device(device)
        network, self.sha256 = load_inception(weights)
        self._network = network.to(self._device)
        self.name = f"{EXTRACTOR} {self.sha256}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features of uint8 images."""
        features: Tensor = self._network(images.to(self._device).expand(-1, 3, -1, -1))[0]
        return features


def _check_sets(
    images: Tensor, reference: Tensor, chosen: Sequence[str], kid_subset_size: int
) -> None:
    least, why = 2, "a covariance"
    if "prc" in chosen:
        least, why = _NEIGHBOURS + 1, f"{_NEIGHBOURS} neighbours"
    if "kid" in chosen and kid_subset_size > least:
        least, why = kid_subset_size, "kid_subset_size"
    needs = [(images, "images", least, why), (reference, "reference", least, why)]
    if "isc" in chosen:
        needs.append((images, "images", _SPLITS, f"{_SPLITS} splits"))
    for some, name, count, reason in needs:
        if len(check_images(some, name)) < count:
            msg = f"{name} must hold at least {count} images, for {reason}; got {len(some)}"
            raise ValueError(msg)
    check_same_shape(images, reference)
    if images.shape[1] not in {1, 3}:
        raise ValueError(f"images must have 1 or 3 channels; got {images.shape[1]}")


def _check_device(device: torch.device | str) -> torch.device:
    on = torch.device(device)
    if on.type not in {"cpu", "cuda"}:
        msg = f"device must be 'cpu', 'cuda' or 'cuda:N' for torch-fidelity; got {str(device)!r}"
        raise ValueError(msg)
    if on.type == "cuda" and (on.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: this machine has no {on}; use 'cpu'")
    return on


class _Coloured(torch.utils.data.Dataset[Tensor]):
    """Images with three channels, as torch-fidelity takes them; counts them on a bar."""

    def __init__(self, images: Tensor, bar: Any) -> None:
        self.images, self.bar, self.seen = images, bar, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index == self.seen:  # torch-fidelity reads the first image twice
            self.seen += 1
            self.bar.update()
        return self.images[index].expand(3, -1, -1)
