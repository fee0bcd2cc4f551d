"""Feature networks: what two sets of images are compared in.

A feature network is any callable from uint8 images ``(B, C, H, W)`` to features ``(B, F)``; a user
names one as ``module:attribute`` and `load_features` finds it. `ImageClassifier` is one to train on
the data at hand, where no pretrained network fits them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cldsde.images.errors import SettingError

FeatureNetwork = Callable[[Tensor], Tensor]
"""uint8 images ``(B, C, H, W)`` on the host to features ``(B, F)``, on any device. An attribute
``name``, a string, tells it from others of its kind, e.g. by a hash of its weights."""


def load_features(name: str) -> FeatureNetwork:
    """Find a feature network by name.

    Parameters
    ----------
    name
        ``module:attribute``. A class is made without arguments; anything else that can be called
        is taken as it is. PyTorch modules are put into evaluation mode.

    Returns
    -------
    FeatureNetwork
        Takes uint8 images ``(B, C, H, W)``, returns features ``(B, F)``.

    Raises
    ------
    ModuleNotFoundError
        If a module that the network's imports is not there.
    SettingError
        If the name is not of that form, there is no such module or attribute, the module or the
        class fails, or what was found cannot be called.

    Examples
    --------
    >>> load_features("torch:flatten").__name__
    'flatten'
    """
    form = "must be 'module:attribute', e.g. 'my_package.features:Network'"
    if not isinstance(name, str):
        msg = f"{form}; got {name!r}"
        raise SettingError("features", msg)
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        msg = f"{form}; got {name!r}"
        raise SettingError("features", msg)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, one that it imports is not
        msg = (
            f"there is no module {error.name!r}; install it, or stand in its folder or "
            f"put that on PYTHONPATH; got {name!r}"
        )
        raise SettingError("features", msg) from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        msg = f"{module_name!r} cannot be imported ({_told(error)}); got {name!r}"
        raise SettingError("features", msg) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            msg = f"{module_name!r} has no attribute {attribute!r}; got {name!r}"
            raise SettingError("features", msg)
        found = getattr(found, part)
    if isinstance(found, type):
        found = _made(found, name)
    if not callable(found) or isinstance(found, type):
        msg = (
            "must be callable, uint8 images (B, C, H, W) to features (B, F); "
            f"{name!r} is {type(found).__name__}"
        )
        raise SettingError("features", msg)
    if isinstance(found, nn.Module):
        found.eval().requires_grad_(False)
    network: FeatureNetwork = found
    return network


def _made(kind: type, name: str) -> Any:
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        msg = f"{name!r} must be made without arguments ({error})"
        raise SettingError("features", msg) from error
    except ValueError:  # no signature to be had, as for some classes written in C
        pass
    try:
        return kind()
    except (Exception, SystemExit) as error:
        msg = f"{name!r} cannot be made ({_told(error)})"
        raise SettingError("features", msg) from error


def _told(error: BaseException) -> str:
    """Kind and words of an error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_features(features: FeatureNetwork, images: Tensor) -> None:
    """Refuse a feature network that makes no features of some images.

    Parameters
    ----------
    features
        What may be a feature network.
    images
        uint8 ``(B, C, H, W)``.

    Raises
    ------
    SettingError
        If it fails, or returns anything but finite ``(B, F)``.
    """
    try:
        with torch.no_grad():
            checked_features(features(images), len(images))
    except Exception as error:
        name, shape = feature_name(features), tuple(images.shape)
        msg = f"{name!r} makes none of images {shape} ({_told(error)})"
        raise SettingError("features", msg) from error


def checked_features(values: object, count: int) -> Tensor:
    """What a feature network returned, in float64 on the host, if it is ``(count, F)``.

    Raises
    ------
    TypeError, ValueError
        If it is not, or not finite.
    """
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


def feature_name(features: FeatureNetwork) -> str:
    """Name of a feature network: its attribute ``name``, or ``module:attribute`` of its code.

    Raises
    ------
    TypeError
        If it cannot be called.
    """
    if not callable(features) or isinstance(features, type):
        got = repr(features) if isinstance(features, type) else type(features).__name__
        msg = (
            "features must be a callable from uint8 images (B, C, H, W) to features (B, F); "
            f"got {got}"
        )
        raise TypeError(msg)
    name = getattr(features, "name", None)
    return name if isinstance(name, str) else _path_of(features)


def _path_of(item: Any) -> str:
    owner = item if hasattr(item, "__qualname__") else type(item)
    return f"{owner.__module__}:{owner.__qualname__}"
