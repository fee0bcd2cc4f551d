"""Weights that processes share (FSDP), by the library accelerate and its settings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from cldsde.images.model import DiffusionModel


def networks(model: DiffusionModel) -> list[tuple[nn.Module, str]]:
    """Networks of a model: the module that each belongs to, and its name there."""
    of_vae = [] if model.vae is None else [(model.vae, x) for x in ("encoder", "decoder")]
    return [(model.score, "network"), *of_vae]


def shard(engine: Accelerator, model: DiffusionModel) -> DiffusionModel:
    """The model itself; with FSDP, with a share of its weights, which each pass gathers."""
    for owner, name in networks(model) if engine.is_fsdp2 else ():
        network = fsdp2_prepare_model(engine, getattr(owner, name))
        if not model.training:  # no backward pass frees the gathered weights
            network.register_forward_hook(_free)
    return model


def _free(network: nn.Module, *_: object) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own(x: Tensor) -> Tensor:
    """The share of this process."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """The tensor of all shares; all processes must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_cpu(tensors: Mapping[str, Tensor], *, kept: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, or none if they are not ``kept``; all processes must call it."""
    found = ((name, whole(x)) for name, x in tensors.items())
    return {name: x.detach().cpu() for name, x in found if kept}


def like(x: Tensor, share: Tensor) -> Tensor:
    """The share of a whole tensor, if ``share`` is one."""
    if not isinstance(share, DTensor) or x.shape != share.shape:
        return x
    return distribute_tensor(x.to(share.device), share.device_mesh, share.placements)


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors; raise a RuntimeError if they do not fit."""
    there = model.state_dict()
    model.load_state_dict({name: like(x, there.get(name, x)) for name, x in weights.items()})
