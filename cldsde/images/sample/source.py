"""Models to sample from: runs, networks and pipelines of diffusers, with any process."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cldsde.errors import SettingError, require, setting
from cldsde.images.config import ProcessConfig, SamplingConfig
from cldsde.images.model import ImageModel, ImageSpace, TrainedModel, load_model
from cldsde.images.sample.export import is_exported, load_exported
from cldsde.images.sample.sampler import Samples, Weight
from cldsde.images.schema import Count, check_type, plain
from cldsde.images.tensor_files import tensors_digest
from cldsde.pretrained import PipelineScheduler, from_diffusers
from cldsde.pretrained.diffusers_models import network_and_scheduler
from cldsde.score import Denoiser, DenoiserScore, ScoreDenoiser
from cldsde.solvers import SamplerSettings
from cldsde.solvers.base import Solver

# Networks of a pipeline besides the one that `from_diffusers` reads.
_MORE_PARTS = ("text_encoder", "vae", "vqvae")
_STEPS, _BATCH = 20, 4


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

    The model is changed in place. The mode ``"reduce-overhead"`` replays CUDA graphs; None compiles
    nothing. Raises a SettingError for a model that is not compiled.
    """
    if channels_last:
        model.score.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_mode is None:
        return
    if not isinstance(model, TrainedModel):
        msg = "needs a run under its own process, whose network is compiled"
        raise SettingError("compile_mode", msg)
    model.model.score.network.compile(mode=compile_mode)


def is_pipeline(source: Path) -> bool:
    """Whether a folder, or a file in it, is a pipeline with text or an autoencoder."""
    index = (source.parent if source.is_file() else source) / "model_index.json"
    if not index.is_file():
        return False
    with setting("model"):
        listed = json.loads(index.read_text(encoding="utf-8"))
    return any(listed.get(part, [None])[0] is not None for part in _MORE_PARTS)


@dataclass(frozen=True, eq=False)
class PipelineSampler:
    """Sampler of images with a pipeline, whose text encoder, guidance and decoder are its own."""

    pipeline: Any  # with a `cldsde.pretrained.PipelineScheduler`
    process: ProcessConfig  # of that
    arguments: dict[str, Any]  # of a call for one image: prompt, negative_prompt, class_labels
    guidance: float | None = None  # weight of text or class; None: the pipeline's own default
    nfe: int = _STEPS  # number of steps
    batch: int = _BATCH  # largest number of images in one call
    space: ClassVar = ImageSpace((3, 1, 1))  # colours

    @classmethod
    def load(
        cls,
        source: Path,
        process: ProcessConfig,
        device: torch.device | str,
        *,
        prompt: str | None,
        negative_prompt: str | None,
        label: str | None,
        guidance: float | None,
        solver: Solver | None,
        settings: SamplerSettings | None,
        nfe: int | None,
        batch: int | None,
    ) -> PipelineSampler:
        """Load a pipeline of a folder; raise a SettingError if it does not take what is asked."""
        folder = source.parent if source.is_file() else source
        try:
            pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise SettingError("model", f"{folder} cannot be loaded: {error}") from error
        taken = inspect.signature(pipeline.__call__).parameters
        name = type(pipeline).__name__
        words = {"prompt": prompt, "negative_prompt": negative_prompt}
        for key, value in words.items():
            require(value is None or key in taken, key, f"must be left out for a {name}")
        arguments: dict[str, Any] = {key: x for key, x in words.items() if x is not None}
        require("prompt" not in taken or prompt is not None, "prompt", f"needed for a {name}")
        require(label is None or "class_labels" in taken, "label", f"must be left out for a {name}")
        if "class_labels" in taken:
            require(str(label).isdecimal(), "label", f"must be a number for a {name}; got {label}")
            arguments["class_labels"] = int(str(label))
        others = [key for key, x in taken.items() if x.default is inspect.Parameter.empty]
        lacking = [key for key in others if key not in (*arguments, "args", "kwargs")]
        require(not lacking, "model", f"a {name} also needs {', '.join(lacking)}")
        given: Any = (("nfe", nfe, Count), ("batch", batch, Count), ("guidance", guidance, Weight))
        for key, value, kind in given:
            check_type(value, kind | None, key)
        with setting("solver" if settings is None else "settings"):
            made = PipelineScheduler(pipeline.scheduler, process.make(), solver, settings=settings)
            made.set_timesteps(nfe or (_STEPS if settings is None else None))
        pipeline.scheduler, steps = made, len(made.timesteps)
        pipeline.to(device).set_progress_bar_config(disable=True)
        return cls(pipeline, process, arguments, guidance, steps, batch or _BATCH)

    def batches(self, seeds: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """Seeds of batches; None stands for the label, which the arguments have."""
        starts = range(0, len(seeds), self.batch)
        return [(None, list(seeds[i : i + self.batch])) for i in starts]

    def start(self, seeds: Sequence[int]) -> None:
        """Nothing: a pipeline draws its own start."""

    def draw(self, seeds: Sequence[int], label: int | None = None, start: None = None) -> Samples:
        """One image for each seed."""
        given = {name: [x] * len(seeds) for name, x in self.arguments.items()}
        if self.guidance is not None:
            given["guidance_scale"] = self.guidance  # type: ignore[assignment]
        rows: list[int] = []

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            noisy = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            rows.append(len(noisy))

        network, _ = network_and_scheduler(self.pipeline)
        with network.register_forward_pre_hook(count, with_kwargs=True):
            made = self.pipeline(
                **given,
                num_inference_steps=self.nfe,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
        images = torch.as_tensor(made, device="cpu").movedim(-1, 1)
        evaluations = torch.full((len(seeds),), sum(rows) // len(seeds), device="cpu")
        return Samples((images.clamp(0, 1) * 255).round().to(torch.uint8), evaluations)

    def digest(self) -> str:
        """SHA-256 of all weights."""
        parts = self.pipeline.components.items()
        networks = nn.ModuleDict({name: x for name, x in parts if isinstance(x, nn.Module)})
        return tensors_digest({name: x.cpu() for name, x in networks.state_dict().items()})

    def recipe(self) -> dict[str, object]:
        """Everything that the images depend on besides weights and seeds, in JSON types."""
        own = {name: getattr(self, name) for name in ("nfe", "batch", "guidance")}
        scheduler = self.pipeline.scheduler  # its steps were set when it was made
        sampler = {"solver": repr(scheduler.steps.solver), "sigmas": scheduler.sigmas.tolist()}
        return {"process": plain(self.process), "sampler": sampler, **own, **self.arguments}
