"""Fréchet distances between the Gaussians of two sets of images, in any features."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldsde.images.evaluate.features import FeatureNetwork, checked_features, feature_name
from cldsde.images.evaluate.shared import (
    check_count,
    check_images,
    check_pair,
    package_versions,
    parts,
)
from cldsde.images.files import load_tensors, save_tensors
from cldsde.progress import progress_bar

def frechet_distance(first: Tensor, second: Tensor) -> float:
    r"""Fréchet distance between Gaussians fitted to two sets of features.

    .. math:: ‖m_1 − m_2‖² + \mathrm{tr}\bigl(C_1 + C_2 − 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr)

    The squared Wasserstein-2 distance of the two normal laws (Dowson and Landau 1982). It is
    called FID only with the features of Inception-v3 (Heusel et al. 2017).

    Parameters
    ----------
    first, second
        Features ``(n, F)`` and ``(m, F)``, at least two rows each.

    Raises
    ------
    ValueError
        If the shapes do not fit or a feature is not finite.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(x, x + 2), 6)  # three features moved by 2
    12.0
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        msg = (
            "first and second must be (n, F) and (m, F); got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
        raise ValueError(msg)
    if min(len(first), len(second)) < 2:
        msg = f"first and second need two rows each; got {len(first)} and {len(second)}"
        raise ValueError(msg)
    if not bool(first.isfinite().all() and second.isfinite().all()):
        msg = "first and second must be finite"
        raise ValueError(msg)
    a, b = first.to("cpu", torch.float64), second.to("cpu", torch.float64)
    return _gaussian_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def _gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    shift = (mean_a - mean_b).square().sum()
    # tr (A^½ B A^½)^½ is the sum of the singular values of A^½ B^½.
    overlap = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * overlap)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


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
                values = checked_features(features(part), len(part))
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


def frechet_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance between the Gaussians of two sets; see `frechet_distance`.

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
    return _gaussian_distance(first.mean, first.covariance, second.mean, second.covariance)


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
        check_pair(images, check_images(reference, "reference", least=2))
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
        "versions": package_versions("cldsde", "torch"),
    }
