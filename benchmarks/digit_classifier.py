"""The classifier of the demonstration, of 8 × 8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cldsde.images.data import DataSet, Images, to_unit
from cldsde.progress import progress_bar


def pixels_of(images: Images) -> Tensor:
    """All images of a set, ``(N, C, H, W)`` float32 in [−1, 1]."""
    return to_unit(images.load(torch.arange(len(images))), images.levels)


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
    test = data.held_out or data.train
    held_out, held_out_labels = pixels_of(test), test.labels
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
