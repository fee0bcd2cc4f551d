"""How alike two sets of images are, in the features of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cldsde.images.data import DataSet, pixels_of
from cldsde.solvers.progress import progress_bar

__all__ = ["DigitClassifier", "frechet_distance", "train_classifier"]


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
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (A^½ B A^½)^½ is the sum of the singular values of A^½ B^½.
    overlap = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float(shift.square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


class DigitClassifier(nn.Module):
    """A small convolutional classifier whose last hidden layer serves as a feature space.

    Images ``(B, 1, 8, 8)`` in [−1, 1] to logits ``(B, 10)``.
    """

    def __init__(self, width: int = 32, features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 16, features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Activations of the last hidden layer, ``(B, features)``."""
        features: Tensor = self.body(images)
        return features


def train_classifier(
    data: DataSet, *, epochs: int = 20, batch: int = 64, seed: int = 0, progress: bool = False
) -> tuple[DigitClassifier, float]:
    """Train a `DigitClassifier`; return it in evaluation mode with its held-out accuracy.

    Parameters
    ----------
    data
        Digits with labels.
    epochs
        Passes over the training images.
    batch
        Images a step.
    seed
        Of the initial weights and the order of the images.
    progress
        Show a progress bar on stderr.
    """
    images, labels = pixels_of(data.train), data.train.labels
    held_out, held_out_labels = pixels_of(data.held_out), data.held_out.labels
    assert labels is not None
    assert held_out_labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in progress_bar(range(epochs), shown=progress, desc="classifier"):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            logits = model(images[rows])
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    model.eval().requires_grad_(False)
    hits = model(held_out).argmax(1) == held_out_labels
    return model, float(hits.double().mean())
