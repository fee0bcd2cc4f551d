"""Models of the library diffusers as denoisers."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cldsde.score import NoisePath, PredictionDenoiser
from cldsde.score.denoisers import Clock, Predicts

__all__ = ["DiffusersDenoiser", "from_diffusers"]

_PREDICTIONS: dict[str, Predicts] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "velocity",
}
# Parts of a pipeline that are networks of noisy data, in the order in which they are looked for.
_NETWORKS = ("unet", "transformer")
_SCHEDULER_FILE = "scheduler_config.json"


class DiffusersDenoiser(PredictionDenoiser):
    """Denoiser of a network of diffusers, with the shape of its data.

    Parameters
    ----------
    network, path, predicts, clock
        See `PredictionDenoiser`.
    shape
        Channels, rows and columns of the data, if the network's configuration says them.
    classes
        Number of classes, if the network takes ``class_labels``.
    """

    def __init__(
        self,
        network: nn.Module,
        path: NoisePath,
        predicts: Predicts,
        *,
        clock: Clock | Callable[[Tensor], Tensor],
        shape: tuple[int, ...] | None,
        classes: int | None,
    ) -> None:
        super().__init__(network, path, predicts, clock=clock)
        self.shape = shape
        self.classes = classes


def from_diffusers(
    source: Any, scheduler: Any = None, *, nearest: bool = False, download: bool = False
) -> DiffusersDenoiser:
    """Denoiser of a model of diffusers: a DDPM or v-prediction network, or a flow-matching network.

    Parameters
    ----------
    source
        A folder that ``save_pretrained`` wrote, of a pipeline or of a model; a pipeline; or a
        model. Of a pipeline of latent variables or with a text encoder, the network alone is
        loaded: it denoises latents, and takes its conditions (``encoder_hidden_states``,
        ``class_labels``) as the denoiser's.
    scheduler
        The scheduler whose levels the model was trained with, its configuration, or a file or
        folder of it. None takes the pipeline's, or the one saved beside the model.
    nearest
        Tell the network the nearest of its levels, as an integer, in place of a fraction between
        two levels.
    download
        Whether a name that is no folder may be fetched from the Hugging Face hub.

    Returns
    -------
    DiffusersDenoiser
        denoiser(u, sigma, **conditions), in evaluation mode and without gradients of its weights.

    Raises
    ------
    ImportError
        If diffusers is not installed.
    FileNotFoundError
        If ``source`` is no folder and ``download`` is False, or a file is missing.
    TypeError
        If ``source`` or ``scheduler`` is something else.
    ValueError
        If weights are not safetensors, there is no scheduler, or levels or prediction of the
        scheduler are unknown.

    Notes
    -----
    Schedulers that clip the data prediction (``clip_sample``) change samples; the denoiser does
    not clip.

    Examples
    --------
    >>> import cldsde
    >>> from diffusers import DDPMScheduler, UNet2DModel
    >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, **blocks)
    >>> denoiser = from_diffusers(unet, DDPMScheduler())
    >>> sde = cldsde.CLD()
    >>> cldsde.sample(sde, cldsde.DenoiserScore(denoiser, sde), (2, *denoiser.shape), nfe=5).shape
    torch.Size([2, 1, 8, 8])
    """
    import diffusers

    if isinstance(source, str | Path):
        network, found = _load(Path(source).expanduser(), str(source), download=download)
    else:
        network, found = _parts(source)
    scheduler = found if scheduler is None else scheduler
    if scheduler is None:
        msg = (
            "scheduler must be given for a model without one: the scheduler that it was trained "
            "with, such as diffusers.DDPMScheduler(), or its configuration"
        )
        raise ValueError(msg)
    made = _scheduler(scheduler)
    path, predicts, clock = _convention(made)
    if nearest:
        if clock != "time":
            msg = f"nearest must be False for {type(made).__name__}, whose levels have no index"
            raise ValueError(msg)
        clock = "index"
    assert isinstance(network, diffusers.ModelMixin)
    network.eval().requires_grad_(False)
    learnt = str(made.config.get("variance_type", "")).startswith("learned")
    return DiffusersDenoiser(
        _Network(network, halve=learnt),
        path,
        predicts,
        clock=clock,
        shape=_shape(network),
        classes=network.config.get("num_class_embeds"),
    )


class _Network(nn.Module):
    """A model of diffusers as network(x, clock, **conditions)."""

    def __init__(self, model: nn.Module, *, halve: bool) -> None:
        super().__init__()
        self.model = model
        self.halve = halve  # the second half of the channels is a variance

    def forward(self, x: Tensor, clock: Tensor, **conditions: Any) -> Tensor:
        out: Tensor = self.model(x, timestep=clock, return_dict=False, **conditions)[0]
        if self.halve and out.shape[1] == 2 * x.shape[1]:
            out = out.chunk(2, dim=1)[0]
        return out


def _parts(source: Any) -> tuple[nn.Module, Any]:
    """Network and scheduler of a pipeline, or a model alone."""
    import diffusers

    if isinstance(source, diffusers.ModelMixin):
        return source, None
    for name in _NETWORKS:
        network = getattr(source, name, None)
        if isinstance(network, diffusers.ModelMixin):
            return network, getattr(source, "scheduler", None)
    msg = (
        f"source must be a folder, a pipeline or a model of diffusers; got {type(source).__name__}"
    )
    raise TypeError(msg)


def _load(folder: Path, name: str, *, download: bool) -> tuple[nn.Module, Any]:
    """Network and scheduler of a folder."""
    if not folder.is_dir():
        if not download:
            msg = (
                f"source: {name} is no folder; with download=True a model of this name is fetched "
                "from the Hugging Face hub"
            )
            raise FileNotFoundError(msg)
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    index = folder / "model_index.json"
    if not index.is_file():
        beside = [folder / _SCHEDULER_FILE, folder.parent / "scheduler" / _SCHEDULER_FILE]
        return _load_network(folder), next((file for file in beside if file.is_file()), None)
    listed = _read_json(index)
    for part in _NETWORKS:
        if part in listed:
            file = folder / "scheduler" / _SCHEDULER_FILE
            return _load_network(folder / part), file if file.is_file() else None
    msg = f"source: {index} lists none of {', '.join(_NETWORKS)}"
    raise ValueError(msg)


def _load_network(folder: Path) -> nn.Module:
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        msg = f"source: {config} is missing, so that {folder} is no model of diffusers"
        raise FileNotFoundError(msg)
    kind = _class(_read_json(config), diffusers.ModelMixin, config)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.ckpt")))
        held = f"it holds {pickles[0]}, and a pickle may run code" if pickles else "it holds none"
        msg = (
            f"source: weights must be safetensors; {held} ({folder}). Save the model again with "
            "save_pretrained"
        )
        raise ValueError(msg)
    model: nn.Module = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return model


def _scheduler(given: Any) -> Any:
    """A scheduler of diffusers from itself, its configuration, or a file of it."""
    import diffusers

    if isinstance(given, diffusers.SchedulerMixin):
        return given
    origin: object = "scheduler"
    if isinstance(given, str | Path):
        origin = given = Path(given).expanduser()
        given = given / _SCHEDULER_FILE if given.is_dir() else given
        if not given.is_file():
            msg = f"scheduler: there is no file {given}"
            raise FileNotFoundError(msg)
        given = _read_json(given)
    if not isinstance(given, Mapping):
        msg = (
            "scheduler must be a scheduler of diffusers, its configuration, or a file of it; got "
            f"{type(given).__name__}"
        )
        raise TypeError(msg)
    return _class(given, diffusers.SchedulerMixin, origin).from_config(dict(given))


def _convention(scheduler: Any) -> tuple[NoisePath, Predicts, Clock | Callable[[Tensor], Tensor]]:
    """Path, prediction and clock that a network of a scheduler was trained with."""
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        steps = config.num_train_timesteps
        low, high = 1 / steps, 1.0
        if hasattr(scheduler, "sigma_min"):
            low, high = float(scheduler.sigma_min), float(scheduler.sigma_max)
        path = dataclasses.replace(NoisePath.linear(), interval=(low, high))
        return path, "flow", lambda t: steps * t
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or prediction not in _PREDICTIONS:
        msg = (
            f"scheduler: levels and prediction of {name} (prediction_type={prediction!r}) are "
            "unknown here; known are schedulers with alphas_cumprod that predict "
            f"{', '.join(_PREDICTIONS)}, and flow-matching schedulers. Wrap the network as a "
            "denoiser(u, sigma) instead"
        )
        raise ValueError(msg)
    continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
    clock: Clock = "log_sigma/4" if continuous else "time"
    return NoisePath.from_alphas_cumprod(table), _PREDICTIONS[prediction], clock


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
        msg = f"{file} is no JSON file: {error}"
        raise ValueError(msg) from error
    if not isinstance(found, dict):
        msg = f"{file} must hold a JSON object; got {type(found).__name__}"
        raise ValueError(msg)  # noqa: TRY004 -- the file is wrong, not an argument's type
    return found


def _shape(network: Any) -> tuple[int, ...] | None:
    channels, size = (network.config.get(name) for name in ("in_channels", "sample_size"))
    if channels is None or size is None:
        return None
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sizes)
