"""Models to sample from: runs, runs under the dynamics of another process, diffusers folders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cldsde.errors import SettingError, setting
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.latent import VAE
from cldsde.images.model import ImageModel, ImageSpace, load_model
from cldsde.images.tensor_files import tensors_digest
from cldsde.linear import LinearSDE
from cldsde.pretrained import from_diffusers
from cldsde.score import DenoiserScore, ScoreDenoiser


@dataclass(frozen=True)
class OtherDynamics:
    """A trained model with the process that it is sampled with; see `ImageModel`.

    ``t_min`` is None: the score raises an error outside the noise levels of its training.
    """

    score: DenoiserScore
    space: ImageSpace
    digest: str
    sampling: SamplingConfig
    vae: VAE | None = None
    t_min: float | None = None


Model = ImageModel | OtherDynamics
"""Something to sample."""


def of_run(
    run: Path,
    process: ProcessConfig | None = None,
    device: torch.device | str = "cpu",
    *,
    trust: bool = False,
) -> Model:
    """The model of a run, under its own process or another; see `load_model`."""
    model = load_model(run, device, trust=trust)
    if process is None:
        return model
    sde, inner = process.make(), model.score
    with setting("process"):
        start = model.config.training.t_min
        denoiser = ScoreDenoiser(inner, fill=inner.inputs == "state", start=start)
        score = DenoiserScore(denoiser, sde)
    return OtherDynamics(
        score, model.space, _digest(model.digest, sde), SamplingConfig(), model.vae
    )


def of_diffusers(
    source: Path, process: ProcessConfig, device: torch.device | str = "cpu"
) -> OtherDynamics:
    """The model of a folder of diffusers, sampled with a process."""
    with setting("model"):
        denoiser = from_diffusers(source).to(device)
        shape = denoiser.shape
        if shape is None or len(shape) != 3:
            msg = f"{source} has no channels and size of its images (sample_size)"
            raise SettingError("", msg)
    classes = denoiser.classes
    labelled = _Labelled(denoiser) if classes is not None else denoiser
    sde = process.make()
    score = DenoiserScore(labelled, sde, noise_levels=denoiser.noise_levels).eval()
    channels, height, width = shape
    return OtherDynamics(
        score,
        # Without a class that stands for none.
        ImageSpace((channels, height, width), classes=classes, always_classes=classes is not None),
        _digest(tensors_digest(score.state_dict()), sde),
        SamplingConfig(),
    )


class _Labelled(nn.Module):
    """A denoiser of diffusers that takes its class labels as `MixedScore` does."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, u: Tensor, sigma: Tensor, *, condition: Tensor) -> Tensor:
        found: Tensor = self.denoiser(u, sigma, class_labels=condition)
        return found


def _digest(weights: str, sde: LinearSDE) -> str:
    return hashlib.sha256(f"{weights} {sde!r}".encode()).hexdigest()
