"""Image data sets as tensors in [−1, 1]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["ImageData", "digits"]


class ImageData(NamedTuple):
    """Images and labels, split into training and held-out parts.

    Attributes
    ----------
    train, held_out
        Images ``(N, C, H, W)`` float32 in [−1, 1].
    train_labels, held_out_labels
        Classes ``(N,)`` int64.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits(held_out: float = 0.2, *, seed: int = 0) -> ImageData:
    """Scikit-learn's 1,797 handwritten digits, 8×8 with 17 grey levels, split at random.

    Parameters
    ----------
    held_out
        Share of the images held out, between 0 and 1.
    seed
        Of the split.

    Raises
    ------
    ValueError
        If the share leaves either part empty.
    """
    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(source.target).to(torch.int64)
    n = round(len(images) * held_out)
    if not 0 < n < len(images):
        msg = f"held_out must be a share that leaves both parts an image; got {held_out}"
        raise ValueError(msg)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:n], order[n:]
    return ImageData(images[train], labels[train], images[test], labels[test])
