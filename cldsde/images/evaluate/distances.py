"""Fréchet distances between Gaussians fitted to two sets of images, in features of any network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from cldsde.errors import SettingError, require, setting
from cldsde.images.checks import check_images, check_same_shape
from cldsde.linear.checks import shaped
from cldsde.messages import brief, imported, in_words
from cldsde.progress import progress_bar

FeatureNetwork = Callable[[Tensor], Tensor]
"""See `load_features`."""


def load_features(name: str) -> FeatureNetwork:
    """Load a feature network by its name, ``module:attribute``.

    A feature network is a callable from uint8 images ``(B, C, H, W)`` on the CPU to features
    ``(B, F)`` on any device. Continuous data are float32 from −1 to 1, the ends of their range. Its
    attribute ``name``, a string, if it has one, identifies it in results, for example by a hash of
    its weights. A class is instantiated without arguments; any other callable is taken as it is.
    PyTorch modules are put into evaluation mode. Raises a ValueError for other names.
    """
    with setting("features"):
        found: Any = imported(name)
    if isinstance(found, type):
        try:
            found = found()
        except (Exception, SystemExit) as error:  # whatever its constructor raises
            raise SettingError("features", f"{name!r} cannot be made: {brief(error)}") from error
    kind = type(found).__name__
    msg = f"must be callable, uint8 images (B, C, H, W) to features (B, F); {name!r} is {kind}"
    require(callable(found), "features", msg)
    if isinstance(found, nn.Module):
        found.eval().requires_grad_(False)
    network: FeatureNetwork = found
    return network


def check_features(features: FeatureNetwork, images: Tensor) -> None:
    """Raise a SettingError if a network does not return finite ``(B, F)`` for some images."""
    try:
        with torch.no_grad():
            checked_features(features(images), len(images))
    except Exception as error:
        shape = tuple(images.shape)
        msg = f"{feature_name(features)!r} fails for images {shape} ({in_words(error)})"
        raise SettingError("features", msg) from error


def checked_features(values: object, count: int) -> Tensor:
    """Features in float64 on the CPU if they are finite ``(count, F)``; raise otherwise."""
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != count:
        got = f"{shaped(values)} for {count} images"
        raise ValueError(f"features must return a tensor (B, F), one row per image; got {got}")
    if not (values.is_floating_point() and bool(values.isfinite().all())):
        msg = f"features must return finite floating-point numbers; got others, of {values.dtype}"
        raise ValueError(msg)
    return values.detach().cpu().to(torch.float64)


def feature_name(features: FeatureNetwork) -> str:
    """Name of a feature network: its attribute ``name``, or ``module:attribute`` of its code."""
    name = getattr(features, "name", None)
    owner: Any = features if hasattr(features, "__qualname__") else type(features)
    return name if isinstance(name, str) else f"{owner.__module__}:{owner.__qualname__}"


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def images_sha256(images: Iterable[Tensor], shape: Sequence[int] = ()) -> str:
    """SHA-256 of the shape and the bytes of uint8 images: a tensor, or batches and their shape."""
    if isinstance(images, Tensor):
        shape, images = images.shape, torch.split(images, 4096)
    total = hashlib.sha256(f"{tuple(shape)}".encode())
    for part in images:
        total.update(part.numpy().tobytes())
    return total.hexdigest()


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages by their names."""
    return {package: version(package) for package in packages}


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images."""

    mean: Tensor  #: ``(F,)`` float64.
    covariance: Tensor  #: ``(F, F)`` float64, divided by ``count`` − 1.
    count: int  #: Number of images.
    features: str  #: Name of the feature network. Only statistics in the same features compare.
    data_sha256: str  #: Hash of the images, or an empty string.
    rows: Tensor | None = None  #: Features of each image, ``(N, ≥ F)`` float32, if they are kept.

    @classmethod
    def of(
        cls, images: Tensor, features: FeatureNetwork, *, batch: int = 256, progress: bool = False
    ) -> FeatureStatistics:
        """Compute statistics batch by batch, in float64; for the arguments see `frechet`."""
        check_images(images, "images", least=2)
        require(batch >= 1, "batch", f"must be at least 1; got {batch}")
        bar = progress_bar(torch.split(images, batch), shown=progress, desc="features")
        return FeatureSums(features, images.shape).of(bar)


@dataclass(eq=False)
class FeatureSums:
    """Running `FeatureStatistics` of uint8 images that come in batches and are not kept."""

    features: FeatureNetwork
    shape: Sequence[int]  # (N, C, H, W) of all images
    _: KW_ONLY
    size: int | None = None  # number of features, if the network returns more numbers
    keep: bool = False  # keep all numbers of each image

    def __post_init__(self) -> None:
        self._name, self._rows = feature_name(self.features), list[Tensor]()
        self._hash = hashlib.sha256(f"{tuple(self.shape)}".encode())
        self._seen, zero = 0, torch.zeros((), device="cpu")
        self._mean, self._scatter = zero, zero

    def add(self, images: Tensor) -> None:
        """Add a batch of uint8 images ``(B, C, H, W)``."""
        with torch.no_grad():
            rows = checked_features(self.features(images), len(images))
        if self.keep:
            self._rows.append(rows.float())
        rows = rows[:, : self.size]
        if self._seen and self._mean.shape != rows.shape[1:]:
            sizes = f"{len(self._mean)} and {rows.shape[1]}"
            raise ValueError(f"features must return as many features for each batch; got {sizes}")
        self._hash.update(images.numpy().tobytes())
        # Sums of non-negative terms (Chan et al. 1983), so that nothing cancels.
        own, total = rows.mean(0), self._seen + len(rows)
        centred, shift = rows - own, own - self._mean
        weight = self._seen * len(rows) / total
        self._scatter = self._scatter + centred.T @ centred + weight * torch.outer(shift, shift)
        self._mean, self._seen = self._mean + shift * (len(rows) / total), total

    def of(self, batches: Iterable[Tensor]) -> FeatureStatistics:
        """Add all batches; return the statistics."""
        for images in batches:
            self.add(images)
        return self.statistics()

    def statistics(self) -> FeatureStatistics:
        """The statistics of all images."""
        covariance = self._scatter / (self._seen - 1)
        found = self._mean, covariance, self._seen, self._name, self._hash.hexdigest()
        return FeatureStatistics(*found, torch.cat(self._rows) if self.keep else None)


def frechet_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    r"""Fréchet distance of two sets from their statistics, which must be in the same features.

    .. math:: ‖m_1 − m_2‖² + \mathrm{tr}\bigl(C_1 + C_2 − 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr)

    The squared Wasserstein-2 distance of the two fitted Gaussians (Dowson and Landau 1982). It is
    called FID only with the features of Inception-v3 (Heusel et al. 2017).
    """
    if first.features != second.features or first.mean.shape != second.mean.shape:
        own, other = (f"{x.features!r} ({len(x.mean)})" for x in (first, second))
        raise ValueError(f"statistics must be of the same features; got {own} and {other}")
    a, b = first.covariance, second.covariance
    shift = (first.mean - second.mean).square().sum()
    # tr (A^½ B A^½)^½ is the sum of the singular values of A^½ B^½.
    overlap = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    return float(shift + a.trace() + b.trace() - 2 * overlap)


def frechet(
    images: Tensor,
    reference: Tensor | FeatureStatistics,
    features: FeatureNetwork,
    *,
    batch: int = 256,
    progress: bool = False,
) -> dict[str, Any]:
    """Fréchet distance of images to a reference in the features of any network.

    The distance of few images is biased upwards, so compare equal numbers of images only.

    Parameters
    ----------
    images, reference
        uint8 ``(N, C, H, W)`` and ``(M, C, H, W)``, or float32 from −1 to 1 for continuous data; at
        least two. The reference may also be `FeatureStatistics` in the same features.
    features
        Feature network, see `load_features`.
    batch, progress
        Images per batch; whether to show progress bars on stderr.

    Returns
    -------
    dict
        ``frechet_distance``, ``features`` and ``feature_count``, ``samples`` and
        ``reference_samples``, ``samples_sha256`` and ``reference_sha256``, ``singular``: whether a
        set has no more images than features, ``versions``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, shapes do not fit, or statistics are of other features.
    """
    check_images(images, "images", least=2)
    options: dict[str, Any] = {"batch": batch, "progress": progress}
    if isinstance(reference, Tensor):
        check_same_shape(images, check_images(reference, "reference", least=2))
        reference = FeatureStatistics.of(reference, features, **options)
    name = feature_name(features)
    msg = f"must be in the features {name!r}; got statistics in {reference.features!r}"
    require(reference.features == name, "reference", msg)
    return frechet_report(FeatureStatistics.of(images, features, **options), reference)


def frechet_report(first: FeatureStatistics, second: FeatureStatistics) -> dict[str, Any]:
    """Fréchet distance of images to a reference, by their statistics; see `frechet`."""
    own = {"frechet_distance": frechet_of(first, second), **frechet_conditions(first, second)}
    return own | {"versions": package_versions("cldsde", "torch")}


def frechet_conditions(first: FeatureStatistics, second: FeatureStatistics) -> dict[str, Any]:
    """Features and images on which a distance depends."""
    return {
        "features": first.features,
        "feature_count": len(first.mean),
        "samples": first.count,
        "reference_samples": second.count,
        "samples_sha256": first.data_sha256,
        "reference_sha256": second.data_sha256,
        "singular": min(first.count, second.count) <= len(first.mean),
    }
