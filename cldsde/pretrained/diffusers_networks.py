"""Facts about networks of diffusers that their configurations do not state."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cldsde.pretrained.conventions import Convention
from cldsde.score.denoisers import Clock

_Function = Callable[[Tensor], Tensor]

# Time that networks receive, relative to the scheduler's, which pipelines pass or divide by 1000.
_TIMES = dict.fromkeys(
    (
        "AllegroTransformer3DModel",
        "BriaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "ConsisIDTransformer3DModel",
        "DiTTransformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "LatteTransformer3DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "Transformer2DModel",
        "UNet1DModel",
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
        "WanTransformer3DModel",
    ),
    1.0,
) | dict.fromkeys(
    (
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "QwenImageTransformer2DModel",
    ),
    1e-3,
)
_REVERSED = ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel")
# Networks with positions that are the same for all samples, without a batch axis.
_WITH_POSITIONS = {"FluxTransformer2DModel", "ChromaTransformer2DModel"}


def _names(network: Any) -> list[str]:
    """Names of a network's class and of the classes that it derives from."""
    return [kind.__name__ for kind in type(network).__mro__]


def shared_conditions_of(network: Any) -> tuple[str, ...]:
    """Names of conditions without an axis of samples."""
    return () if _WITH_POSITIONS.isdisjoint(_names(network)) else ("img_ids", "txt_ids")


def clock_of(
    network: Any, convention: Convention, given: Clock | _Function | None
) -> Clock | _Function:
    """The form in which a network receives the noise level, if it is not given."""
    names = _names(network)
    reversed_names = [name for name in names if name in _REVERSED]
    if reversed_names:
        raise ValueError(
            f"source: {reversed_names[0]} predicts the negative flow, at a time that falls with "
            "the noise; wrap it in a PredictionDenoiser that negates its output"
        )
    if given is not None:
        return given
    if convention.continuous:
        return "log_sigma/4"
    factors = [_TIMES[name] for name in names if name in _TIMES]
    if not factors:
        raise ValueError(
            f"clock must be given for {names[0]}, because the form in which it receives the noise "
            "level is unknown here: 'time' for the path's time (an index, or σ of a flow), or a "
            "function of it, such as lambda t: 1000 * t"
        )
    factor = factors[0] * (1 if convention.table is not None else convention.steps)
    return "time" if factor == 1 else partial(operator.mul, factor)


def check_channels(network: Any) -> None:
    """Raise ValueError if a network takes more than noisy data."""
    taken, made = (network.config.get(name) for name in ("in_channels", "out_channels"))
    if taken is None or made is None or made in (taken, 2 * taken):
        return
    inpainting = ": it takes a mask and the masked image, too" if taken == 2 * made + 1 else ""
    raise ValueError(
        f"source: {type(network).__name__} takes {taken} channels and predicts {made}{inpainting}. "
        "A denoiser has noisy data only. Sample in the pipeline with PipelineScheduler, or wrap "
        "network and other inputs in a PredictionDenoiser"
    )


def classes_of(network: Any) -> tuple[int | None, int | None]:
    """Number of classes of a network, and the label that stands for none."""
    classes = network.config.get("num_class_embeds")
    if "DiTTransformer2DModel" in _names(network):
        # Other transformers have this number, too, and take no classes.
        classes = network.config.num_embeds_ada_norm
        return classes, classes
    return classes, None
