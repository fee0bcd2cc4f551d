"""The Inception network with weights from a file, whose code is not run."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

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


def load_inception(weights: Path) -> tuple[nn.Module, str]:
    """The network, which returns 2,048 features and 1,008 logits, and SHA-256 of its weights."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        msg = "Inception needs torch-fidelity: pip install 'cldsde[images]'"
        raise ImportError(msg) from error
    if not weights.is_file():
        msg = f"there is no file {weights}; get {INCEPTION_FILE}, whose SHA-256 begins with "
        raise FileNotFoundError(f"{msg}{_INCEPTION_PREFIX}, from {_INCEPTION_URL}")
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    other = f"{weights} (SHA-256 {sha256[:8]}…) is not {INCEPTION_FILE}"
    try:
        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
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
    # torch-fidelity would run code of the file, so that it gets a copy that holds none.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        path: Any = {"feature_extractor_weights_path": copy}
        with torch.random.fork_rng(devices=[]):
            layers = ["2048", "logits_unbiased"]
            network: nn.Module = FeatureExtractorInceptionV3(EXTRACTOR, layers, **path)
    except RuntimeError as error:
        lines = [line.strip()[:120] for line in str(error).splitlines()[:2]]
        msg = f"{other}: names or shapes of its tensors differ ({' '.join(lines)})"
        raise ValueError(msg) from error
    return network, sha256


def is_published(sha256: str) -> bool:
    """Whether this is the hash of the published weights."""
    return sha256.startswith(_INCEPTION_PREFIX)
