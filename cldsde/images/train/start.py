"""Weights that a training starts from: of another run, or of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DModel

from cldsde.images.errors import SettingError
from cldsde.images.files import load_tensors
from cldsde.images.model import KIND, MODEL, DiffusionModel

def copy_weights(model: DiffusionModel, source: Path) -> None:
    """Start a model from other weights; statistics of the data stay its own."""
    own = ("data_mean", "data_variance")
    try:
        if (source / MODEL).is_file():
            weights, _ = load_tensors(source / MODEL, KIND)
            kept = {name: x for name, x in model.state_dict().items() if name.endswith(own)}
            model.load_state_dict({**weights, **kept})
        else:
            unet = UNet2DModel.from_pretrained(
                source, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
            network = model.score.network.get_submodule("network")
            network.load_state_dict(unet.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        msg = f"weights of {source} cannot be used ({' '.join(str(error).split())[:300]})"
        raise SettingError("training.init_from", msg) from error
