"""Feature networks, in which two sets of images are compared.

A feature network is any callable from uint8 images ``(B, C, H, W)`` to features ``(B, F)``. A user
names one as ``module:attribute``. `ImageClassifier` is one to train on the data at hand, if no
pretrained network fits them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cldsde.errors import SettingError, setting
from cldsde.images.checks import kind_of
from cldsde.messages import imported, in_words

FeatureNetwork = Callable[[Tensor], Tensor]
"""uint8 images ``(B, C, H, W)`` on the CPU to features ``(B, F)``, on any device. Continuous data
are float32 from −1 to 1, the ends of their range. An attribute ``name``, a string, tells it from
others of its kind, for example by a hash of its weights."""


def load_features(name: str) -> FeatureNetwork:
    """Load a feature network by its name, ``module:attribute``.

    A class is instantiated without arguments; any other callable is taken as it is. PyTorch modules
    are put into evaluation mode.

    Examples
    --------
    >>> load_features("torch:flatten").__name__
    'flatten'
    """
    with setting("features"):
        found: Any = imported(name)
    if isinstance(found, type):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            msg = f"{name!r} cannot be made without arguments ({in_words(error)})"
            raise SettingError("features", msg) from error
    if not callable(found):
        kind = type(found).__name__
        msg = f"must be callable, uint8 images (B, C, H, W) to features (B, F); {name!r} is {kind}"
        raise SettingError("features", msg)
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
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = kind_of(values)
        raise TypeError(f"features must return a floating-point tensor (B, F); got {got}")
    if values.ndim != 2 or len(values) != count or values.shape[1] < 1:
        got = f"{tuple(values.shape)} for {count} images"
        raise ValueError(f"features must return (B, F), one row per image; got {got}")
    if not bool(values.isfinite().all()):
        raise ValueError("features must return finite numbers; it returned NaN or infinity")
    return values.detach().cpu().to(torch.float64)


def feature_name(features: FeatureNetwork) -> str:
    """Name of a feature network: its attribute ``name``, or ``module:attribute`` of its code."""
    if not callable(features) or isinstance(features, type):
        got = repr(features) if isinstance(features, type) else type(features).__name__
        wanted = "a callable from uint8 images (B, C, H, W) to features (B, F)"
        raise TypeError(f"features must be {wanted}; got {got}")
    name = getattr(features, "name", None)
    owner: Any = features if hasattr(features, "__qualname__") else type(features)
    return name if isinstance(name, str) else f"{owner.__module__}:{owner.__qualname__}"
