"""The Inception network as features, with weights from a file whose code is not run."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file of Inception weights; its SHA-256 begins as the name ends."""

_PREFIX = "6726825d"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_EXTRACTOR = "inception-v3-compat"  # torch-fidelity's name of the network
# Errors of `torch.load` for files that are damaged or of another format.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


class InceptionFeatures:
    """2,048 features and 1,008 logits of the Inception network: a `FeatureNetwork`.

    Its weights have the hash ``sha256``; ``published``: they are the weights of published FIDs.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            msg = "Inception needs torch-fidelity: pip install 'cldsde[images]'"
            raise ImportError(msg) from error
        if not weights.is_file():
            msg = f"there is no file {weights}; get {INCEPTION_FILE}, whose SHA-256 begins with "
            raise FileNotFoundError(f"{msg}{_PREFIX}, from {_URL}")
        with weights.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        other = f"{weights} (SHA-256 {self.sha256[:8]}…) is not {INCEPTION_FILE}"
        # torch-fidelity would run code of the file, so that it gets a copy that holds none.
        copy = io.BytesIO()
        torch.save(_state(weights, other), copy)
        copy.seek(0)
        try:
            layers, path = ["2048", "logits_unbiased"], {"feature_extractor_weights_path": copy}
            with torch.random.fork_rng(devices=[]):
                network = FeatureExtractorInceptionV3(_EXTRACTOR, layers, **path)
        except RuntimeError as error:
            lines = [line.strip()[:120] for line in str(error).splitlines()[:2]]
            msg = f"{other}: names or shapes of its tensors differ ({' '.join(lines)})"
            raise ValueError(msg) from error
        self._network, self._device = network.to(device), device
        self.name, self.file = f"{_EXTRACTOR} {self.sha256}", weights.name
        self.published = self.sha256.startswith(_PREFIX)

    def __call__(self, images: Tensor) -> Tensor:
        """Features and logits of uint8 images, ``(B, 3056)``."""
        return torch.cat(self._network(images.to(self._device).expand(-1, 3, -1, -1)), 1)


def _state(weights: Path, other: str) -> dict[str, Tensor]:
    """Finite tensors of a file by their names, or a ValueError that begins with ``other``."""
    try:
        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        msg = f"{other}: it is damaged, or holds other things than tensors, which are not loaded; "
        raise ValueError(f"{msg}get it from {_URL}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()
    ):
        msg = f"{other}: it must hold a dictionary of tensors; got {type(state).__name__}"
        raise ValueError(msg)
    if not all(bool(x.isfinite().all()) for x in state.values()):
        raise ValueError(f"{other}: it holds NaN or infinity")
    return state
