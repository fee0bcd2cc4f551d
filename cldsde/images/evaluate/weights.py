"""Files of Inception weights and features, read without running code that they may hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file of Inception weights; its SHA-256 begins as the name ends."""

_INCEPTION_PREFIX = "6726825d"
_INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)

EXTRACTOR = "inception-v3-compat"
"""torch-fidelity's name of the network."""

# Errors of `torch.load` for files that are damaged or of another format.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


def check_inception_weights(weights: Path) -> str:
    """SHA-256 of a file of weights; raise if they do not fit the network. No code of it is run."""
    return load_inception(weights)[1]


def load_inception(weights: Path) -> tuple[nn.Module, str]:
    """The network, which returns 2,048 features, and `check_inception_weights` of its file."""
    if not weights.is_file():
        msg = f"weights: there is no file {weights}; get {INCEPTION_FILE}, whose SHA-256 begins "
        msg += f"with {_INCEPTION_PREFIX}, from {_INCEPTION_URL}"
        raise FileNotFoundError(msg)
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    other = f"weights: {weights} (SHA-256 {sha256[:8]}…) is not {INCEPTION_FILE}"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        msg = f"{other}: it is damaged, or holds other things than tensors, which are not loaded; "
        raise ValueError(f"{msg}get it from {_INCEPTION_URL}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()
    ):
        msg = f"{other}: it must hold a dictionary of tensors; got {type(state).__name__}"
        raise ValueError(msg)
    if not all(bool(x.isfinite().all()) for x in state.values()):
        raise ValueError(f"{other}: it holds NaN or infinity")
    from torch_fidelity import FeatureExtractorInceptionV3

    try:
        path = {"feature_extractor_weights_path": str(weights)}
        with plain_loads(), torch.random.fork_rng(devices=[]):
            network: nn.Module = FeatureExtractorInceptionV3(EXTRACTOR, ["2048"], **path)
    except RuntimeError as error:
        lines = [line.strip()[:120] for line in str(error).splitlines()[:2]]
        msg = f"{other}: names or shapes of its tensors differ ({' '.join(lines)})"
        raise ValueError(msg) from error
    return network, sha256


def is_published(sha256: str) -> bool:
    """Whether this is the hash of the published weights."""
    return sha256.startswith(_INCEPTION_PREFIX)


def check_cache(cache: Path, key: str, count: int) -> None:
    """Make the folder; raise for damaged files before they end a long run."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache: {cache} cannot be made ({error.strerror})") from error
    for file in sorted(cache.glob(f"{key}-*.pt")):
        try:
            with plain_loads():
                held = torch.load(file, map_location="cpu", weights_only=True)
            whole = len(held) == (count if isinstance(held, Tensor) else 2)
        except _UNREADABLE as error:
            msg = f"cache: {file} is damaged or holds code; delete it to have it made again"
            raise ValueError(msg) from error
        if not whole:
            raise ValueError(f"cache: {file} holds something else; delete it to have it made again")


@contextlib.contextmanager
def plain_loads() -> Iterator[None]:
    """Let torch.load read tensors and arrays only: torch-fidelity asks it to run pickled code."""
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
