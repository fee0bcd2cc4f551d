"""FID, KID, Inception score, precision and recall, in features of the Inception network of 2015.

Its weights are read from a file whose code is not run.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from cldsde.errors import require
from cldsde.images.checks import check_images, check_same_shape
from cldsde.images.evaluate import distances
from cldsde.images.schema import Count, Natural, checked
from cldsde.images.tensor_files import load_tensors, save_tensors
from cldsde.messages import brief
from cldsde.progress import progress_bar

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file of Inception weights; its SHA-256 begins as the name ends."""

_PREFIX = "6726825d"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_EXTRACTOR = "inception-v3-compat"  # torch-fidelity's name of the network
InceptionMetric = Literal["fid", "kid", "isc", "prc"]
"""Fréchet and kernel distance, inception score, precision and recall, by torch-fidelity's names."""

_NEIGHBOURS = 3
_SPLITS = 10
_FEATURES = 2048
_KIND = "a set of images in the features of Inception"


class InceptionFeatures:
    """2,048 features and 1,008 logits of the Inception network: a `FeatureNetwork`."""

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        if not weights.is_file():
            msg = f"there is no file {weights}; get {INCEPTION_FILE}, whose SHA-256 begins with "
            raise FileNotFoundError(f"{msg}{_PREFIX}, from {_URL}")
        with weights.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # torch-fidelity would run code of the file, so that it gets a copy that holds none.
        copy = io.BytesIO()
        layers, options = ["2048", "logits_unbiased"], {"feature_extractor_weights_path": copy}
        try:
            torch.save(torch.load(weights, map_location="cpu", weights_only=True), copy)
            copy.seek(0)
            with torch.random.fork_rng(devices=[]):
                network = FeatureExtractorInceptionV3(_EXTRACTOR, layers, **options)
        except Exception as error:  # torch documents none, and raises many
            msg = f"{weights} (SHA-256 {self.sha256[:8]}…) is damaged or has other weights "
            raise ValueError(f"{msg}({brief(error)}); get {INCEPTION_FILE} from {_URL}") from error
        self._network, self._device = network.to(device), device
        self.name, self.file = f"{_EXTRACTOR} {self.sha256}", weights.name
        self.published = self.sha256.startswith(_PREFIX)  # the weights of published FIDs

    def __call__(self, images: Tensor) -> Tensor:
        """Features and logits of uint8 images, ``(B, 3056)``."""
        return torch.cat(self._network(images.to(self._device).expand(-1, 3, -1, -1)), 1)


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
    """FID, KID, Inception score, precision and recall, with the network of torch-fidelity.

    Grey images are repeated to three channels. An image takes about 0.4 s on a processor core.

    Parameters
    ----------
    images, reference
        uint8 ``(N, C, H, W)`` and ``(M, C, H, W)`` with 1 or 3 channels.
    weights
        The file `INCEPTION_FILE`, which is not downloaded, or other weights of that network; then
        ``weights.published`` of the result is false.
    metrics
        Some of ``"fid"``, ``"kid"``, ``"isc"`` (Inception score of ``images``), ``"prc"``
        (precision and recall, with 3 neighbours).
    batch, device, progress
        Images per batch; device of the network; whether to show a progress bar on stderr.
    seed, kid_subsets, kid_subset_size
        Seed, below 2³², of the subsets of KID and of the order for the Inception score; number and
        size of these subsets.
    cache
        Folder that keeps features of the reference, by the hashes of images and weights.

    Returns
    -------
    dict
        ``metrics``: for each number its ``value``, its ``spread`` and ``spread_is``, a description
        of it (or None); ``resize``, ``weights``, ``channels``, ``settings``; others of `frechet`.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        If there is no file ``weights``, or it is damaged or of another network; if an argument is
        out of range, shapes do not fit, or there are too few images for a metric.
    """
    check_same_shape(check_images(images, "images"), check_images(reference, "reference"))
    check_counts(metrics, len(images), len(reference), kid_subset_size=kid_subset_size)
    if images.dtype != torch.uint8 or images.shape[1] not in {1, 3}:
        got = f"{images.shape[1]} channels of {images.dtype}"
        raise ValueError(f"images must have 1 or 3 channels of uint8; got {got}")
    network = InceptionFeatures(Path(weights), device)

    def batches(some: Tensor) -> Iterator[Tensor]:
        yield from progress_bar(torch.split(some, batch), shown=progress, desc="Inception")

    own = feature_sums(network, images.shape, metrics).of(batches(images))
    known = reference.shape, distances.images_sha256(reference), network
    other = reference_statistics(batches(reference), *known, metrics, cache)
    kid = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size}
    return report(own, other, network, metrics, kid, seed)


def feature_sums(
    network: InceptionFeatures, shape: Sequence[int], metrics: Iterable[str]
) -> distances.FeatureSums:
    """Sums for metrics of images ``(N, C, H, W)``; FID keeps no features of single images."""
    return distances.FeatureSums(network, shape, size=_FEATURES, keep={*metrics} != {"fid"})


def reference_statistics(
    batches: Iterable[Tensor],
    shape: Sequence[int],
    sha256: str,
    network: InceptionFeatures,
    metrics: Iterable[str],
    cache: Path | None,
) -> distances.FeatureStatistics:
    """Statistics of images to compare with, from a file in the folder ``cache`` if there is one."""
    metrics = {*metrics} - {"isc"}  # takes no reference
    known: dict[str, Any] = {"count": shape[0], "features": network.name, "data_sha256": sha256}
    if not metrics:
        none = torch.empty(0, 0, device="cpu")
        return distances.FeatureStatistics(none.flatten(), none, **known)
    file = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"{sha256[:32]}-{network.sha256[:32]}.safetensors"
        with suppress(ValueError, FileNotFoundError):  # damaged or missing: made again
            kept: dict[str, Any] = load_tensors(file, _KIND)[0]
            if "rows" in kept or metrics == {"fid"}:
                return distances.FeatureStatistics(**kept, **known)
    found = feature_sums(network, shape, metrics).of(batches)
    if file is not None:
        tensors = {name: getattr(found, name) for name in ("mean", "covariance", "rows")}
        save_tensors(file, _KIND, {k: x for k, x in tensors.items() if x is not None}, {})
    return found


def report(
    own: distances.FeatureStatistics,
    other: distances.FeatureStatistics,
    network: InceptionFeatures,
    metrics: Iterable[str],
    kid: Mapping[str, int],
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of images compared with others; see `inception_metrics`."""
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    features: Any = [x.rows[:, :_FEATURES] for x in (own, other) if x.rows is not None]
    found: dict[str, tuple[float, float | None, str | None]] = {}
    if "fid" in metrics:
        found["fid"] = distances.frechet_of(own, other), None, None
    if "kid" in metrics:
        options = {"rng_seed": seed, "verbose": False, **kid}
        mean, spread = metric_kid.kid_features_to_metric(*features, **options).values()
        kind = "standard deviation over {kid_subsets} subsets of {kid_subset_size}"
        found["kid"] = mean, spread, kind.format_map(kid)
    if "isc" in metrics:
        assert own.rows is not None
        logits = own.rows[:, _FEATURES:]
        mean, spread = metric_isc.isc_features_to_metric(logits, _SPLITS, rng_seed=seed).values()
        found["isc"] = mean, spread, f"standard deviation over {_SPLITS} splits"
    if "prc" in metrics:
        # Without an N × M matrix of distances.
        options = {"prc_neighborhood": _NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        shares = metric_prc.prc_features_to_metric(*features, **options)
        found |= {name: (share, None, None) for name, share in shares.items()}
    columns = ("value", "spread", "spread_is")
    return {
        "metrics": {name: dict(zip(columns, row, strict=True)) for name, row in found.items()},
        **distances.frechet_conditions(own, other),
        "channels": "grey is repeated to three",
        "resize": "bilinear to 299×299 as in TensorFlow 1, in torch-fidelity",
        "weights": {name: getattr(network, name) for name in ("file", "sha256", "published")},
        "settings": {"seed": seed, "splits": _SPLITS, "neighbours": _NEIGHBOURS, **kid},
        "versions": distances.package_versions("cldsde", "torch", "torch-fidelity", "numpy"),
    }


def check_counts(
    metrics: Iterable[str], images: int, reference: int, *, kid_subset_size: int = 2
) -> None:
    """Raise a SettingError if there are too few images, or too few to compare with."""
    needs = {"kid": kid_subset_size, "isc": _SPLITS, "prc": _NEIGHBOURS + 1}
    for metric in metrics:
        least = needs.get(metric, 2)
        msg = f"{metric} needs at least {least} images"
        require(images >= least, "metrics", f"{msg}; got {images}")
        enough = reference >= least or metric == "isc"
        require(enough, "metrics", f"{msg} to compare with; got {reference}")
