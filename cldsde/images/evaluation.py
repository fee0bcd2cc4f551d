"""How good samples and models are: Fréchet distances, Inception metrics, likelihoods.

All take uint8 images ``(N, C, H, W)`` on the host and return dictionaries of JSON types that hold
the numbers and what they depend on: settings, hashes of images and weights, versions. Published
FIDs are of 50,000 samples against the training set in the features of the Inception network of
2015, resized as TensorFlow 1 did (`inception_metrics`); a distance in any other features, from
fewer samples or to other images compares with nothing but its like.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import math
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cldsde.images.features import (
    FeatureNetwork,
    check_count,
    check_images,
    feature_name,
    parts,
)
from cldsde.images.files import load_tensors, save_tensors
from cldsde.linear.checks import check_between, check_positive
from cldsde.score import ReverseProcess, dequantise, log_likelihood
from cldsde.score.checks import one_of
from cldsde.score.flow_density import Divergence
from cldsde.solvers.progress import progress_bar

__all__ = [
    "INCEPTION_FILE",
    "FeatureStatistics",
    "InceptionMetric",
    "check_inception_weights",
    "frechet",
    "frechet_of",
    "images_sha256",
    "inception_metrics",
    "likelihood",
]


def images_sha256(images: Tensor) -> str:
    """SHA-256 of the shape and the bytes of uint8 images."""
    total = hashlib.sha256(f"{tuple(images.shape)}".encode())
    for part in parts(images, 4096):
        total.update(part.numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes
    ----------
    mean
        ``(F,)`` float64.
    covariance
        ``(F, F)`` float64, divided by count − 1.
    count
        Number of images.
    features
        Name of the feature network, see `feature_name`.
    data_sha256
        Of the images, see `images_sha256`.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    features: str
    data_sha256: str

    @classmethod
    def of(
        cls,
        images: Tensor,
        features: FeatureNetwork,
        *,
        batch: int = 256,
        name: str | None = None,
        progress: bool = False,
    ) -> FeatureStatistics:
        """Statistics of images, batch by batch in float64: no more than a batch is held.

        Parameters
        ----------
        images
            uint8 ``(N, C, H, W)``, two at least.
        features
            Feature network.
        batch
            Images at a time.
        name
            Of the feature network; its own where None.
        progress
            Show a progress bar on stderr.

        Raises
        ------
        TypeError, ValueError
            If an argument is out of range, or the network does not return finite ``(B, F)``.
        """
        check_images(images, "images", least=2)
        check_count(batch, "batch")
        name = feature_name(features) if name is None else name
        moments: _Moments | None = None
        batches = math.ceil(len(images) / batch)
        for part in progress_bar(
            parts(images, batch), shown=progress, total=batches, desc="features"
        ):
            with torch.no_grad():
                values = _checked_features(features(part), len(part))
            new = _Moments.of(values)
            if moments is not None and len(moments.mean) != len(new.mean):
                msg = (
                    "features must return as many features for each batch; got "
                    f"{len(moments.mean)} and {len(new.mean)}"
                )
                raise ValueError(msg)
            moments = new if moments is None else moments.joined(new)
        assert moments is not None  # there are two images at least
        return cls(
            moments.mean,
            moments.scatter / (moments.count - 1),
            moments.count,
            name,
            images_sha256(images),
        )

    def save(self, file: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        notes = {
            "count": str(self.count),
            "features": self.features,
            "data_sha256": self.data_sha256,
        }
        tensors = {"mean": self.mean, "covariance": self.covariance}
        save_tensors(file, "FeatureStatistics", tensors, notes)

    @classmethod
    def load(cls, file: Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged or holds something else.
        """
        tensors, notes = load_tensors(file, "FeatureStatistics")
        try:
            return cls(
                tensors["mean"],
                tensors["covariance"],
                int(notes["count"]),
                notes["features"],
                notes["data_sha256"],
            )
        except (KeyError, ValueError) as error:
            msg = f"{file} is damaged: it lacks a part of the statistics ({error})"
            raise ValueError(msg) from error


@dataclass(frozen=True, eq=False)
class _Moments:
    """Mean and scatter matrix Σ(x − m)(x − m)ᵀ of some rows, in float64 on the host."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Moments:
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def joined(self, other: _Moments) -> _Moments:
        """Moments of both sets of rows; sums of non-negative terms, so that nothing cancels."""
        count = self.count + other.count
        shift = other.mean - self.mean
        weight = self.count * other.count / count
        return _Moments(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + weight * torch.outer(shift, shift),
        )


def _checked_features(values: object, count: int) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        msg = f"features must return a floating-point tensor (B, F); got {got}"
        raise TypeError(msg)
    if values.ndim != 2 or len(values) != count or values.shape[1] < 1:
        msg = (
            f"features must return (B, F), one row an image; got {tuple(values.shape)} "
            f"for {count} images"
        )
        raise ValueError(msg)
    if not bool(values.isfinite().all()):
        msg = "features must return finite numbers; it returned NaN or infinity"
        raise ValueError(msg)
    return values.detach().cpu().to(torch.float64)


def frechet_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance between the Gaussians of two sets; see `metrics.frechet_distance`.

    Raises
    ------
    ValueError
        If the statistics are of different features.
    """
    if first.features != second.features or first.mean.shape != second.mean.shape:
        msg = (
            "statistics must be of the same features; got "
            f"{first.features!r} ({len(first.mean)}) and {second.features!r} ({len(second.mean)})"
        )
        raise ValueError(msg)
    shift = (first.mean - second.mean).square().sum()
    # tr (A^½ B A^½)^½ is the sum of the singular values of A^½ B^½.
    overlap = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance)).sum()
    return float(shift + first.covariance.trace() + second.covariance.trace() - 2 * overlap)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def frechet(
    images: Tensor,
    reference: Tensor | FeatureStatistics,
    features: FeatureNetwork,
    *,
    batch: int = 256,
    name: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Fréchet distance of images to a reference in the features of any network.

    It is biased upwards, by about a constant over the number of images: compare equal numbers only.
    Where there are no more images than features a covariance is singular, and the bias large.

    Parameters
    ----------
    images
        uint8 ``(N, C, H, W)``, two at least.
    reference
        uint8 ``(M, C, H, W)``, or their `FeatureStatistics` in the same features.
    features
        Feature network, see `load_features`.
    batch
        Images at a time.
    name
        Of the feature network; its own where None.
    progress
        Show progress bars on stderr.

    Returns
    -------
    dict
        ``frechet_distance``, ``features`` and ``feature_count``, ``samples`` and
        ``reference_samples``, ``samples_sha256`` and ``reference_sha256``, ``singular``: whether a
        covariance is for want of images, ``versions``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, shapes do not fit, or the reference's statistics are of
        other features.
    """
    check_images(images, "images", least=2)
    check_count(batch, "batch")
    name = feature_name(features) if name is None else name
    if isinstance(reference, FeatureStatistics):
        if reference.features != name:
            msg = f"reference must be in the features {name!r}; got statistics in "
            msg += repr(reference.features)
            raise ValueError(msg)
        second = reference
    else:
        _check_pair(images, check_images(reference, "reference", least=2))
        second = FeatureStatistics.of(
            reference, features, batch=batch, name=name, progress=progress
        )
    first = FeatureStatistics.of(images, features, batch=batch, name=name, progress=progress)
    return {
        "frechet_distance": frechet_of(first, second),
        "features": name,
        "feature_count": len(first.mean),
        "samples": first.count,
        "reference_samples": second.count,
        "samples_sha256": first.data_sha256,
        "reference_sha256": second.data_sha256,
        "singular": min(first.count, second.count) <= len(first.mean),
        "versions": _versions("cldsde", "torch"),
    }


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if reference.shape[1:] != images.shape[1:]:
        msg = (
            f"reference must have the shape of images, {tuple(images.shape[1:])}; "
            f"got {tuple(reference.shape[1:])}"
        )
        raise ValueError(msg)


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


InceptionMetric = Literal["fid", "kid", "isc", "prc"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file of Inception weights; its SHA-256 begins as the name ends."""

_INCEPTION_PREFIX = "6726825d"
_INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
_EXTRACTOR = "inception-v3-compat"
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
    check_count(batch, "batch")
    check_count(kid_subsets, "kid_subsets")
    check_count(kid_subset_size, "kid_subset_size", least=2)
    check_between(check_count(seed, "seed", least=0), 0, 2**32 - 1, "seed")
    least, why = 2, "a covariance"
    if "prc" in chosen:
        least, why = _NEIGHBOURS + 1, f"{_NEIGHBOURS} neighbours"
    if "kid" in chosen and kid_subset_size > least:
        least, why = kid_subset_size, "kid_subset_size"
    _check_enough(images, "images", least, why)
    _check_enough(reference, "reference", least, why)
    if "isc" in chosen:
        _check_enough(images, "images", _SPLITS, f"{_SPLITS} splits")
    _check_pair(images, reference)
    if images.shape[1] not in {1, 3}:
        msg = f"images must have 1 or 3 channels; got {images.shape[1]}"
        raise ValueError(msg)
    on = _check_device(device)
    try:
        import torch_fidelity
    except ImportError as error:
        msg = "inception_metrics needs torch-fidelity: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
    weights_sha256 = check_inception_weights(weights)
    hashes = images_sha256(images), images_sha256(reference)
    cached: dict[str, Any] = {"cache": False}
    if cache is not None:
        key = f"cldsde-{hashes[1][:32]}-{weights_sha256[:32]}"
        _check_cache(cache, key, len(reference))
        cached = {"cache": True, "cache_root": str(cache), "input2_cache_name": key}
    here = torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext()
    total = len(images) + len(reference)
    with (
        here,
        _plain_loads(),
        # The network is initialised before its weights are read, and its loader draws a seed.
        torch.random.fork_rng(devices=[]),
        progress_bar(None, shown=progress, total=total, desc="Inception") as bar,
    ):
        found = torch_fidelity.calculate_metrics(
            input1=_Coloured(images, bar),
            input2=_Coloured(reference, bar),
            # Named, since the default for precision and recall is a VGG that would be downloaded.
            feature_extractor=_EXTRACTOR,
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
    subsets = f"standard deviation over {kid_subsets} subsets of {kid_subset_size}"
    return {
        "metrics": _named(found, chosen, subsets),
        "samples": len(images),
        "reference_samples": len(reference),
        "samples_sha256": hashes[0],
        "reference_sha256": hashes[1],
        "source": source,
        "channels": "grey repeated to three" if images.shape[1] == 1 else "three",
        "extractor": _EXTRACTOR,
        "resize": "bilinear to 299×299 as in TensorFlow 1, in torch-fidelity",
        "weights": {
            "file": weights.name,
            "sha256": weights_sha256,
            "published": weights_sha256.startswith(_INCEPTION_PREFIX),
        },
        "settings": {
            "batch": batch,
            "device": str(on),
            "seed": seed,
            "isc_splits": _SPLITS,
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "prc_neighbourhood": _NEIGHBOURS,
        },
        "versions": _versions("cldsde", "torch", "torch-fidelity", "numpy"),
    }


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


def check_inception_weights(weights: Path) -> str:
    """Refuse a file that is not of the network, without running what it may hold; its SHA-256."""
    if not weights.is_file():
        msg = (
            f"weights: there is no file {weights}; get {INCEPTION_FILE}, whose SHA-256 begins with "
            f"{_INCEPTION_PREFIX}, from {_INCEPTION_URL}"
        )
        raise FileNotFoundError(msg)
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    other = f"weights: {weights} (SHA-256 {sha256[:8]}…) is not {INCEPTION_FILE}"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        msg = (
            f"{other}: it is damaged, or holds other things than tensors, which are not loaded; "
            f"get it from {_INCEPTION_URL}"
        )
        raise ValueError(msg) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()
    ):
        msg = f"{other}: it must hold a dictionary of tensors; got {type(state).__name__}"
        raise ValueError(msg)
    if not all(bool(x.isfinite().all()) for x in state.values()):
        msg = f"{other}: it holds NaN or infinity"
        raise ValueError(msg)
    from torch_fidelity import FeatureExtractorInceptionV3

    try:
        with _plain_loads(), torch.random.fork_rng(devices=[]):
            FeatureExtractorInceptionV3(
                _EXTRACTOR, ["2048"], feature_extractor_weights_path=str(weights)
            )
    except RuntimeError as error:
        lines = [line.strip()[:120] for line in str(error).splitlines()[:2]]
        msg = f"{other}: names or shapes of its tensors differ ({' '.join(lines)})"
        raise ValueError(msg) from error
    return sha256


_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
)
"""What `torch.load` raises on files that are damaged or of another format."""


def _check_cache(cache: Path, key: str, count: int) -> None:
    """Make the folder, and refuse damaged files before they end a long run."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cache: {cache} cannot be made ({error.strerror})"
        raise ValueError(msg) from error
    for file in sorted(cache.glob(f"{key}-*.pt")):
        try:
            with _plain_loads():
                held = torch.load(file, map_location="cpu", weights_only=True)
            whole = len(held) == (count if isinstance(held, Tensor) else 2)
        except _UNREADABLE as error:
            msg = f"cache: {file} is damaged or holds code; delete it to have it made again"
            raise ValueError(msg) from error
        if not whole:
            msg = f"cache: {file} holds something else; delete it to have it made again"
            raise ValueError(msg)


@contextlib.contextmanager
def _plain_loads() -> Iterator[None]:
    """Have torch.load read tensors and arrays only: torch-fidelity asks it to run pickled code."""
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    # torch-fidelity keeps means and covariances as arrays.
    rebuild: Any = np.empty(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    try:
        with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, *dtypes]):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


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


Kind = Literal["auto", "exact", "bound"]
Scale = Literal["bins", "ends"]

_QUANTITY = {
    "exact": (
        "negative log-density of dequantised images by the probability-flow ODE, exact up to its "
        "tolerance; an upper bound on the bits of the discrete images"
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
    check_images(images, "images", least=1)
    if check_count(levels, "levels", least=2) > 256:
        msg = f"levels must be at most 256, the number of uint8 values; got {levels}"
        raise ValueError(msg)
    if int(images.max()) >= levels:
        msg = f"images must have values below levels, {levels}; got {int(images.max())}"
        raise ValueError(msg)
    for name, value in {"batch": batch, "samples": samples, "max_nfev": max_nfev}.items():
        check_count(value, name)
    check_count(seed, "seed", least=0)
    check_between(t_min, 1e-300, process.sde.T * (1 - 1e-9), "t_min")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    if kind == "auto":
        kind = "exact" if process.sde.components == 1 else "bound"
    if kind == "exact" and process.sde.components > 1:
        msg = (
            "kind='exact' needs a process without auxiliary components; got "
            f"{process.sde!r}; use 'bound'"
        )
        raise ValueError(msg)
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
                samples=samples,
                divergence=divergence,
                rtol=rtol,
                atol=atol,
                max_nfev=max_nfev,
                generator=generator,
            )
            bits.append(found.bits_per_dim(2 * end / levels).cpu().to(torch.float64))
            nfev += found.nfev * len(part)
            bar.update(len(part))
    all_bits = torch.cat(bits)
    error = float(all_bits.std()) / math.sqrt(len(images)) if len(images) > 1 else None
    return {
        "bits_per_dim": float(all_bits.mean()),
        "standard_error": error,
        "images": len(images),
        "quantity": _QUANTITY[kind],
        "is_bound": found.is_bound,
        "nfev": nfev / len(images),
        "images_sha256": images_sha256(images),
        "process": repr(process.sde),
        "settings": {
            "kind": kind,
            "levels": levels,
            "scale": scale,
            "batch": batch,
            "seed": seed,
            "t_min": t_min,
            "samples": samples,
            "divergence": divergence,
            "rtol": rtol,
            "atol": atol,
            "max_nfev": max_nfev,
            "device": str(device),
        },
        "versions": _versions("cldsde", "torch", "torchdiffeq"),
    }


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
