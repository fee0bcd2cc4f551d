"""Models of the library diffusers as denoisers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cldsde.pretrained.conventions import Convention
from cldsde.pretrained.diffusers_networks import (
    check_channels,
    classes_of,
    clock_of,
    shared_conditions_of,
)
from cldsde.score import PredictionDenoiser
from cldsde.score.denoisers import Clock
from cldsde.score.estimator import compiled_module

# Parts of a pipeline that are networks of noisy data, in the order in which they are looked for.
_NETWORKS = ("unet", "transformer")
_SCHEDULER_FILE = "scheduler_config.json"


class DiffusersDenoiser(PredictionDenoiser):
    """Denoiser of a network of diffusers, with the shape of its data; `from_diffusers` makes it."""

    #: Channels, rows and columns of the data, if the network's configuration says them.
    shape: tuple[int, ...] | None = None
    #: Number of classes, if the network takes ``class_labels``.
    classes: int | None = None
    #: Class label that stands for no class, for guidance, if the network has one.
    null_class: int | None = None


def from_diffusers(
    source: Any,
    scheduler: Any = None,
    *,
    clock: Clock | Callable[[Tensor], Tensor] | None = None,
    nearest: bool = False,
    download: bool = False,
) -> DiffusersDenoiser:
    """Denoiser of a model of diffusers: a DDPM or v-prediction network, or a flow-matching network.

    Parameters
    ----------
    source
        A folder that ``save_pretrained`` wrote, of a pipeline or of a model, or a file in it; a
        pipeline; or a model, which is used as it is: call its ``eval()`` first. Of a pipeline of
        latent variables or with a text encoder, the network alone is loaded: it denoises latents,
        and its conditions (``encoder_hidden_states``, ``class_labels``) are the denoiser's.
    scheduler
        The scheduler whose levels the model was trained with, its configuration, or a file or
        folder of it. None takes the pipeline's, or the one saved beside the model.
    clock
        Form in which the network receives the noise level, see `PredictionDenoiser`. None: known
        for classes of diffusers, such as the index for a U-Net and σ for Flux.
    nearest
        Tell the network the nearest of its levels, as an integer, in place of a fraction between
        two levels.
    download
        Whether a name that is no folder may be fetched from the Hugging Face hub.

    Returns
    -------
    DiffusersDenoiser
        A denoiser of u, sigma and conditions by name. It does not clip the data prediction, unlike
        schedulers with ``clip_sample``. A network that is loaded is in evaluation mode and has no
        gradients.

    Raises
    ------
    ImportError
        If diffusers is not installed.
    FileNotFoundError
        If ``source`` is no folder and ``download`` is False, or a file is missing.
    TypeError
        If ``source`` or ``scheduler`` is something else.
    ValueError
        If weights are not safetensors, there is no scheduler, levels or prediction of the scheduler
        or the clock of the network are unknown, or the network takes more than noisy data.
    """
    try:
        import diffusers  # noqa: F401 -- fail before anything else
    except ImportError as error:
        msg = "from_diffusers needs diffusers; install it with pip install 'cldsde[diffusers]'"
        raise ImportError(msg) from error
    if isinstance(source, str | Path):
        network, found = _load(Path(source).expanduser(), str(source), download=download)
    else:
        network, found = network_and_scheduler(source)
    made = _scheduler(found if scheduler is None else scheduler)
    convention = Convention.of(made)
    plain = _original(network)
    check_channels(plain)
    if nearest:
        if convention.table is None or convention.continuous:
            msg = f"nearest must be False for {type(made).__name__}, whose levels have no index"
            raise ValueError(msg)
        if clock is not None:
            raise ValueError(f"nearest must be False if clock is given; got clock={clock!r}")
        clock = "index"
    shared = shared_conditions_of(plain)
    denoiser = DiffusersDenoiser(
        _Network(network, shared),
        convention.path,
        convention.predicts,
        clock=clock_of(plain, convention, clock),
    )
    denoiser.shared_conditions = shared
    denoiser.shape = _shape(plain)
    denoiser.classes, denoiser.null_class = classes_of(plain)
    return denoiser


class _Network(nn.Module):
    """A model of diffusers as network(x, clock, **conditions), in the precision of its weights."""

    def __init__(self, model: Any, shared: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.shared = shared

    def forward(self, x: Tensor, clock: Tensor, **conditions: Any) -> Tensor:
        for name in self.shared:
            # A `ConditionalScore` gives each sample the same row.
            if isinstance(value := conditions.get(name), Tensor):
                conditions[name] = value.reshape(-1, *value.shape[-2:])[0]
        given = x.to(self.model.dtype)
        out: Tensor = self.model(given, timestep=clock, return_dict=False, **conditions)[0]
        if out.shape[1] == 2 * x.shape[1]:
            out = out.chunk(2, dim=1)[0]  # the second half is a learnt variance
        return out.to(x.dtype)


def network_and_scheduler(source: Any) -> tuple[Any, Any]:
    """Network and scheduler of a pipeline, or a model alone."""
    import diffusers

    if isinstance(_original(source), diffusers.ModelMixin):
        _check_takes_time(type(_original(source)))
        return source, None
    for name in _NETWORKS:
        network = getattr(source, name, None)
        if isinstance(_original(network), diffusers.ModelMixin):
            return network, getattr(source, "scheduler", None)
    raise TypeError(
        f"source must be a folder, a pipeline or a model of diffusers; got {type(source).__name__}"
    )


def _original(network: Any) -> Any:
    """The network itself, or the original of a compiled one."""
    return compiled_module(network) or network


def _check_takes_time(kind: Any, where: str = "") -> None:
    if "timestep" not in inspect.signature(kind.forward).parameters:
        msg = f"source: {kind.__name__}{where} is no network of noisy data and a timestep"
        raise ValueError(msg)


def _load(folder: Path, name: str, *, download: bool) -> tuple[Any, Any]:
    """Network and scheduler of a folder."""
    folder = folder.parent if folder.is_file() else folder
    if not folder.is_dir():
        if not download:
            raise FileNotFoundError(
                f"source: {name} is no folder; with download=True a model of this name is fetched "
                "from the Hugging Face hub"
            )
        from huggingface_hub import snapshot_download

        parts = [f"{part}/*.{end}" for part in _NETWORKS for end in ("json", "safetensors")]
        more = ["*.json", "scheduler/*.json", "diffusion_pytorch_model*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=[*more, *parts]))
    index = folder / "model_index.json"
    if not index.is_file():
        beside = [folder / _SCHEDULER_FILE, folder.parent / "scheduler" / _SCHEDULER_FILE]
        return _load_network(folder), next((file for file in beside if file.is_file()), None)
    listed = _read_json(index)
    for part in _NETWORKS:
        if part in listed:
            file = folder / "scheduler" / _SCHEDULER_FILE
            return _load_network(folder / part), file if file.is_file() else None
    raise ValueError(f"source: {index} lists none of {', '.join(_NETWORKS)}")


def _load_network(folder: Path) -> Any:
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        msg = f"source: {config} is missing, so that {folder} is no model of diffusers"
        raise FileNotFoundError(msg)
    kind = _class(_read_json(config), diffusers.ModelMixin, config)
    _check_takes_time(kind, f" of {folder}")
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.ckpt")))
        held = f"it holds {pickles[0]}, and a pickle may run code" if pickles else "it holds none"
        raise ValueError(
            f"source: weights must be safetensors; {held} ({folder}). Save the model again with "
            "save_pretrained"
        )
    # diffusion_pytorch_model.fp16.safetensors is the variant "fp16".
    variants = [name.split(".")[1] for name in weights]
    variant = None if "safetensors" in variants else variants[0]
    model = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, variant=variant
    )
    return model.eval().requires_grad_(False)


def _scheduler(given: Any) -> Any:
    """A scheduler of diffusers from itself, its configuration, or a file of it."""
    import diffusers

    if given is None:
        raise ValueError(
            "scheduler must be given for a model without one: the scheduler that it was trained "
            "with, such as diffusers.DDPMScheduler(), or its configuration"
        )
    given = getattr(given, "replaced", given)  # of a `PipelineScheduler`
    if isinstance(given, diffusers.SchedulerMixin):
        return given
    origin: object = "scheduler"
    if isinstance(given, str | Path):
        origin = given = Path(given).expanduser()
        given = given / _SCHEDULER_FILE if given.is_dir() else given
        if not given.is_file():
            raise FileNotFoundError(f"scheduler: there is no file {given}")
        given = _read_json(given)
    if not isinstance(given, Mapping):
        raise TypeError(
            "scheduler must be a scheduler of diffusers, its configuration, or a file of it; got "
            f"{type(given).__name__}"
        )
    if given.get("_class_name") == "PipelineScheduler":
        from cldsde.pretrained.pipeline_scheduler import PipelineScheduler

        return PipelineScheduler.from_config(given).replaced
    if "_class_name" not in given:
        # The configuration of a scheduler, unlike its file, does not say whose it is.
        likely = {"beta_schedule": "DDPMScheduler", "shift": "FlowMatchEulerDiscreteScheduler"}
        names = [name for key, name in likely.items() if key in given]
        given = {**given, "_class_name": names[0] if names else None}
    return _class(given, diffusers.SchedulerMixin, origin).from_config(dict(given))


def _class(config: Mapping[str, Any], kind: type, origin: object) -> Any:
    """The class of diffusers that a configuration names."""
    import diffusers

    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, kind)):
        msg = f"{origin}: _class_name must name a {kind.__name__} of diffusers; got {name!r}"
        raise ValueError(msg)
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        msg = f"{file} must hold a JSON object; got {type(found).__name__}"
        raise ValueError(msg)  # noqa: TRY004 -- the file is wrong, not an argument's type
    return found


def _shape(network: Any) -> tuple[int, ...] | None:
    channels, size = (network.config.get(name) for name in ("in_channels", "sample_size"))
    if channels is None or size is None or re.search("[13]D", type(network).__name__):
        return None
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sizes)
