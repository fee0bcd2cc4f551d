"""Networks from checkpoints of CLD-SGM and score_sde_pytorch. Code in a checkpoint is never run.

Both projects save a dictionary of ``model`` (weights by name), ``ema`` (averaged weights as a list,
in the order of the parameters, without those that are not trained), ``optimizer`` and ``step``.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cldsde.errors import SettingError, require
from cldsde.pretrained.ncsnpp import NCSNpp
from cldsde.pretrained.ncsnpp_layers import Attention, Block
from cldsde.pretrained.published_models import PUBLISHED, Family, PublishedModel, Sigmas
from cldsde.pretrained.published_score import PublishedScore

# Published and own names of the parts of a layer.
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    Block: {
        "GroupNorm_0.": ".norm_1",
        "Conv_0.": ".conv",
        "Dense_0.": ".clock",
        "GroupNorm_1.": ".norm_2",
        "Conv_1.": ".last",
        "Conv_2.": ".shortcut",
    },
    Attention: {
        "GroupNorm_0.": ".norm",
        "NIN_0.": ".query",
        "NIN_1.": ".key",
        "NIN_2.": ".value",
        "NIN_3.": ".last",
    },
}
# Learning rates that the codes leave in the state of the optimiser: plain numbers of NumPy.
_NUMBERS: list[Any] = [
    # The function that makes a number, by its names in NumPy 1 and 2.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]


class Checkpoint(NamedTuple):
    """Contents of a checkpoint."""

    weights: dict[str, Tensor]  #: Tensors of the model by their published names.
    average: list[Tensor]  #: Averaged weights in the order of the trained parameters.
    step: int  #: Optimiser steps.


@dataclass(frozen=True)
class _Weight:
    """A published weight and its place in ``NCSNpp``."""

    name: str
    own: str
    transposed: bool = False
    trained: bool = True


def load_cld_sgm(path: Path | str, config: str | PublishedModel | None = None) -> PublishedScore:
    """Score of a checkpoint of CLD-SGM (Dockhorn et al. 2022), with averaged weights.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote, such as ``checkpoint_800000.pth``. Code in it is not run.
    config
        Name of the settings, ``"cifar10"``, ``"celeba_paper"``, ``"celeba_post_paper"`` or
        ``"cifar10_vpsde"``, or settings of your own. The last name is the network of ``"cifar10"``
        with VP, whose settings were not published. None: those that fit the weights.

    Returns
    -------
    PublishedScore
        Score of the driven components, in evaluation mode and without gradients; its process is
        ``score.sde``. Data are images in [−1, 1].

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SettingError
        If the path is a folder, or the file is truncated, holds code, or is a checkpoint of another
        network; or if ``config`` is unknown. The message lists what is missing.
    """
    return _load(path, "cld-sgm", config)


def load_score_sde(path: Path | str, config: str | PublishedModel | None = None) -> PublishedScore:
    """Score of a checkpoint of score_sde_pytorch (Song et al. 2021), with averaged weights.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote, such as
        ``ve/cifar10_ncsnpp_deep_continuous/checkpoint_12.pth``. Code in it is not run.
    config
        Name of the published settings, such as ``"vp/cifar10_ddpmpp_deep_continuous"``, or settings
        of your own. None: those that fit the weights and the folders of the path. The weights do
        not tell VP from sub-VP. If several settings fit, a SettingError is raised.

    Returns
    -------
    PublishedScore
        See `load_cld_sgm`, also for errors.
    """
    return _load(path, "score-sde", config)


def recognise(
    checkpoint: Checkpoint, path: Path | str, family: Family, name: str | None = None
) -> PublishedModel:
    """Published settings of a checkpoint: by name, or those that fit the weights best.

    Raises a SettingError if the name is unknown, or several settings fit equally well.
    """
    known: Mapping[str, PublishedModel] = PUBLISHED[family]
    if name is not None:
        require(name in known, "config", f"must be one of {', '.join(known)}; got {name!r}")
        return known[name]
    counts: dict[str, int] = {}  # many models share a network
    misfits = {}
    for key, model in known.items():
        kind = repr((model.process == "CLD", model.shape, model.network))
        if kind not in counts:
            counts[kind] = _mismatch(model.make_network("meta"), checkpoint)
        misfits[key] = counts[kind] + (not _same_levels(checkpoint, model.sigmas))
    nearest = [key for key, count in misfits.items() if count == min(misfits.values())]
    if len(nearest) > 1:
        folders = Path(path).expanduser().resolve().parent.as_posix() + "/"
        nearest = [key for key in nearest if f"/{key}/" in folders] or nearest
    msg = "must be given: the weights alone do not tell which of these they are: "
    require(len(nearest) == 1, "config", f"{msg}{', '.join(nearest)}")
    return known[nearest[0]]


def _load(path: Path | str, family: Family, config: str | PublishedModel | None) -> PublishedScore:
    checkpoint = read_checkpoint(path)
    model = config
    if not isinstance(model, PublishedModel):
        model = recognise(checkpoint, path, family, model)
    network = model.make_network()
    load_weights(network, checkpoint, path, model.sigmas)
    score = PublishedScore(network, model.make_process(), model.parameterisation)
    return score.eval().requires_grad_(requires_grad=False)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint; code in the file is not run.

    Raises a FileNotFoundError if there is no such file, and a SettingError if the path is a folder,
    or the file is truncated, holds anything but tensors, numbers and their containers, or is not a
    checkpoint of these codes.
    """
    path = Path(path).expanduser()
    msg = f"{path} is a folder; name the file in it that torch.save wrote, checkpoint_….pth"
    require(not path.is_dir(), "path", msg)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            # Memory-mapped, so that the state of the optimiser is never read.
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to allow code.
        msg = (
            f"{path} is truncated, no checkpoint of torch.save, or holds code, which is never run; "
            "get the file again from its authors"
        )
        raise SettingError("path", msg) from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        msg = f"{path} is truncated, no checkpoint of torch.save, or damaged; get it again"
        raise SettingError("path", msg) from error
    return _checked(found, path)


def _checked(found: Any, path: Path) -> Checkpoint:
    parts = ("model", "ema", "step")
    held = list(found) if isinstance(found, Mapping) else []
    missing = [name for name in parts if name not in held]
    msg = (
        f"{path} must hold {', '.join(parts)}, as checkpoints of CLD-SGM and score_sde_pytorch do; "
        f"missing: {', '.join(missing)}; it holds "
        f"{', '.join(map(str, held[:5])) or type(found).__name__}"
    )
    require(not missing, "path", msg)
    weights, ema, step = (found[name] for name in parts)
    average = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    named = isinstance(weights, Mapping) and all(isinstance(x, Tensor) for x in weights.values())
    listed = isinstance(average, list) and all(isinstance(x, Tensor) for x in average)
    require(named, "path", f"in {path}, model must map names to tensors")
    require(listed, "path", f"in {path}, ema.shadow_params must be a list of tensors")
    try:
        step = int(step)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        msg = f"in {path}, step must be a whole number; got {step!r}"
        raise SettingError("path", msg) from error
    # Both codes save the weights of a model that is wrapped for several GPUs.
    plain = {str(name).removeprefix("module."): x.detach() for name, x in weights.items()}
    assert average is not None
    return Checkpoint(plain, [x.detach() for x in average], step)


def load_weights(
    network: NCSNpp, checkpoint: Checkpoint, path: Path | str, sigmas: Sigmas | None
) -> None:
    """Load averaged weights into a network; weights that are not averaged come from the model.

    Every tensor of the checkpoint is used. Raises a SettingError if a weight is missing, unknown,
    of another shape, not of real numbers or not finite, or the checkpoint does not hold the table
    of noise levels ``sigmas``.
    """
    state, wanted = network.state_dict(), list(_published(network))
    names = {weight.name for weight in wanted}
    given = {name for name in checkpoint.weights if name != "sigmas"}
    other = f"{path} is of another network than expected"
    missing, unknown = names - given, given - names
    msg = f"{len(missing)} of {len(names)} weights are missing: {_some(missing)}"
    require(not missing, "path", f"{other}; {msg}")
    require(not unknown, "path", f"{other}; unknown weights: {_some(unknown)}")
    trained, count = [weight.name for weight in wanted if weight.trained], len(checkpoint.average)
    msg = f"{path} must hold {len(trained)} averaged weights, ema.shadow_params; got {count}"
    require(len(trained) == count, "path", msg)
    averaged = dict(zip(trained, checkpoint.average, strict=True))
    loaded = {}
    for weight in wanted:
        for source, held in (("model", checkpoint.weights), ("ema.shadow_params", averaged)):
            if weight.name in held:
                tensor, like = held[weight.name], state[weight.own]
                problem = _problem(tensor, _published_shape(like, weight))
                msg = f"{weight.name} in {source} of {path} must {problem}"
                require(problem is None, "path", msg)
                loaded[weight.own] = (tensor.mT if weight.transposed else tensor).reshape_as(like)
    found, got = checkpoint.weights.get("sigmas"), "no table"
    if found is not None:
        known = found.numel() and found.is_floating_point()
        got = f"{found.numel()} levels{f' up to {found.max().item():g}' if known else ''}"
    table = "no table sigmas" if sigmas is None else f"the table sigmas of {sigmas}"
    require(_same_levels(checkpoint, sigmas), "path", f"{path} must hold {table}; got {got}")
    network.load_state_dict(loaded)


def _some(names: set[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{' and others' if len(names) > 3 else ''}"


def _problem(tensor: Tensor, shape: torch.Size) -> str | None:
    """The requirement that a published weight violates, and the value received."""
    if tensor.shape != shape:
        return f"have the shape {tuple(shape)}; got {tuple(tensor.shape)}"
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        return f"be a dense tensor of real floating-point numbers; got {tensor.dtype}"
    if not bool(tensor.isfinite().all()):
        return "be finite; it holds NaN or infinity"
    return None


def _mismatch(network: NCSNpp, checkpoint: Checkpoint) -> int:
    """Number of weights of a checkpoint that do not fit a network, by name or by shape."""
    state = network.state_dict()
    wanted = {w.name: _published_shape(state[w.own], w) for w in _published(network)}
    given = {name: x.shape for name, x in checkpoint.weights.items() if name != "sigmas"}
    return sum(wanted.get(name) != given.get(name) for name in wanted.keys() | given.keys())


def _same_levels(checkpoint: Checkpoint, sigmas: Sigmas | None) -> bool:
    """Whether a checkpoint holds the table of noise levels; None: holds no table."""
    found = checkpoint.weights.get("sigmas")
    if sigmas is None or found is None:
        return sigmas is None and found is None
    largest, smallest, count = sigmas
    start, end = math.log(largest), math.log(smallest)
    table = torch.linspace(start, end, count, dtype=torch.float64, device="cpu").exp()
    if not found.is_floating_point() or found.shape != table.shape:
        return False
    # The code may have saved the table in single precision.
    return torch.allclose(found.double(), table, rtol=1e-5)


def _published_shape(own: Tensor, weight: _Weight) -> torch.Size:
    return own[..., 0, 0].mT.shape if weight.transposed else own.shape


def _published(network: NCSNpp) -> Iterator[_Weight]:
    """Weights in the published order of the parameters."""
    modules = dict(network.named_modules())
    for number, own in enumerate(name for name in _layers(network) if name in modules):
        start = f"all_modules.{number}."
        if own == "embedding":
            yield _Weight(f"{start}W", f"{own}.frequencies", trained=False)
            continue
        prefix = {"enter": "Conv_0.", "conv": "Conv2d_0."}.get(own.rpartition(".")[2], "")
        for name, part in _PARTS.get(type(modules[own]), {prefix: ""}).items():
            if own + part in modules:
                mixes = name.startswith("NIN")
                weight, bias = ("W", "b") if mixes else ("weight", "bias")
                yield _Weight(f"{start}{name}{weight}", f"{own}{part}.weight", transposed=mixes)
                yield _Weight(f"{start}{name}{bias}", f"{own}{part}.bias")


def _layers(network: NCSNpp) -> list[str]:
    """Own names of layers in the published order, with some that a network may not have."""
    layers = [] if network.embedding.frequencies is None else ["embedding"]
    layers += ["embedding.linear_1", "embedding.linear_2", "conv_in"]
    for i, row in enumerate(network.down.children()):
        for j, _ in enumerate(row.get_submodule("blocks").children()):
            layers += [f"down.{i}.blocks.{j}", f"down.{i}.attentions.{j}"]
        layers += [f"down.{i}.{part}" for part in ("shrink", "enter", "filter.conv")]
    layers += [f"middle.{i}" for i in range(3)]
    for i, row in enumerate(network.up.children()):
        blocks = [f"blocks.{j}" for j, _ in enumerate(row.get_submodule("blocks").children())]
        parts = (*blocks, "attentions.0", "leave.0", "leave.2", "grow")
        layers += [f"up.{i}.{part}" for part in parts]
    return layers
