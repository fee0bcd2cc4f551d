"""Models to sample from: runs, runs under another process, diffusers folders; faster networks."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cldsde.errors import SettingError, require, setting
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.model import ImageModel, ImageSpace, TrainedModel, load_model
from cldsde.images.sample.export import is_exported, load_exported
from cldsde.images.schema import check_name, plain
from cldsde.images.tensor_files import tensors_digest
from cldsde.pretrained import from_diffusers
from cldsde.score import Denoiser, DenoiserScore, ScoreDenoiser


def of_run(
    run: Path,
    process: ProcessConfig | None = None,
    device: torch.device | str = "cpu",
    *,
    trust: bool = False,
) -> ImageModel:
    """The model of a run, under its own process or another; see `load_model` and `export`."""
    exported = is_exported(run)
    model = load_exported(run, device) if exported else load_model(run, device, trust=trust)
    if process is None:
        return model
    sde, inner = process.make(), model.score
    with setting("process"):
        start = model.config.training.t_min
        denoiser = ScoreDenoiser(inner, fill=inner.inputs == "state", start=start)
        score = DenoiserScore(denoiser, sde)
    how: Any = {"digest": _digest(model.digest, process), "sampling": SamplingConfig()}
    return ImageModel(score=score, space=model.space, vae=model.vae, **how)


def of_diffusers(
    source: Path, process: ProcessConfig, device: torch.device | str = "cpu"
) -> ImageModel:
    """The model of a folder of diffusers, sampled with a process."""
    with setting("model"):
        denoiser = from_diffusers(source).to(device)
        shape = denoiser.shape
        msg = f"{source} has no channels and size of its images (sample_size)"
        require(shape is not None and len(shape) == 3, "", msg)
        network: Any = denoiser.network
        taken = inspect.signature(network.model.forward).parameters
        msg = f"{source} is a network with a condition; give the folder of its whole pipeline"
        require("encoder_hidden_states" not in taken, "", msg)
    classes = denoiser.classes
    labelled = _Labelled(denoiser) if classes is not None else denoiser
    sde = process.make()
    score = DenoiserScore(labelled, sde, noise_levels=denoiser.noise_levels).eval()
    always = classes is not None  # no class stands for none
    space = ImageSpace(cast(Any, tuple(shape or ())), classes=classes, always_classes=always)
    digest = _digest(tensors_digest(score.state_dict()), process)
    return ImageModel(score=score, space=space, digest=digest, sampling=SamplingConfig())


class _Labelled(Denoiser):
    """A denoiser of diffusers that takes its class labels as `MixedScore` does."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, u: Tensor, sigma: Tensor, *, condition: Tensor, **options: Any) -> Tensor:
        found: Tensor = self.denoiser(u, sigma, class_labels=condition, **options)
        return found


def _digest(weights: str, process: ProcessConfig) -> str:
    # The representation of a process rounds its parameters.
    settings = json.dumps(plain(process), sort_keys=True)
    return hashlib.sha256(f"{weights} {settings}".encode()).hexdigest()


CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


def speed_up(model: ImageModel, compile_mode: CompileMode | None, *, channels_last: bool) -> None:
    """Compile the network of a model, and store its weights and features with channels last.

    The model is changed in place, so that names of weights stay. The mode ``"reduce-overhead"``
    replays CUDA graphs; None compiles nothing. Raises a SettingError for a model that is not
    compiled.
    """
    if channels_last:
        model.score.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_mode is None:
        return
    check_name(compile_mode, get_args(CompileMode), "compile_mode")
    if not isinstance(model, TrainedModel):
        msg = "needs a run under its own process, whose network is compiled"
        raise SettingError("compile_mode", msg)
    model.model.score.network.compile(mode=compile_mode)
