"""Devices, processes, their signals, and shared weights (FSDP) of a training, by accelerate."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    fsdp2_prepare_model,
)
from accelerate.utils.environment import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from cldsde.errors import SettingError, require
from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.model import (
    MODEL,
    DiffusionModel,
    ImageSpace,
    Statistics,
    check_model,
    copy_weights,
    data_statistics,
    make_model,
)
from cldsde.images.runs import STATE
from cldsde.images.sample.sampler import make_plan
from cldsde.images.schema import check_name

_BLOCK = 8  # largest number of images that share generators; processes share blocks
_FSDP = "ACCELERATE_USE_FSDP"  # the variable by which `accelerate launch --use_fsdp` asks for it
_UNSUPPORTED = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
_PATIENCE = timedelta(hours=12)  # of processes that wait for the one that writes


def check_run(
    config: RunConfig,
    data: DataSet,
    device: str = "auto",
    processes: int = 1,
    run: Path | None = None,
    *,
    progress: bool = False,
) -> Statistics:
    """Check a training, and its first weights if ``run`` is new; return statistics of the data.

    Pictures are decoded, with a bar on stderr if ``progress``, after everything else was checked.
    """
    space = ImageSpace.of(data.train, config)
    check_model(config, space)
    try:
        make_plan(lambda z, t: z, config.sampling, config.process.make())
    except SettingError as error:
        raise error.within("sampling") from error
    except (ArithmeticError, RuntimeError) as error:
        msg = f"no grid of times can be computed for this process and sampling ({error})"
        raise SettingError("process.options", msg) from error
    shares(config, processes)
    settings, gpu = config.training, device not in {"cpu", "mps"} and torch.cuda.is_available()
    fits = settings.measure is None or (data.train.labels is not None and min(space.shape[1:]) >= 8)
    require(fits, "training.measure", "'fd' needs images with classes, of 8×8 pixels or more")
    fits = settings.snapshots_by != "held_out_loss" or data.held_out is not None
    require(fits, "training.snapshots_by", "'held_out_loss' needs held-out images")
    shared = processes > 1 and device.startswith("cuda:")
    require(not shared, "device", f"{device} cannot be shared by {processes} processes")
    fits = settings.precision != "fp16" or gpu
    require(fits, "training.precision", "'fp16' needs a GPU; use 'fp32' or 'bf16'")
    whole = (processes == 1 and not gpu) or not parse_flag_from_env(_FSDP)
    fits = whole or config.score.mixing is None
    require(fits, "score.mixing", "learnt weights are not supported with FSDP; leave mixing out")
    fits = whole or settings.optimiser != "Adafactor"  # torch 2.13 cannot shard its moments
    require(fits, "training.optimiser", "'Adafactor' is not supported with FSDP; use 'AdamW'")
    fits = whole or not parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
    msg = "unset FSDP_ACTIVATION_CHECKPOINTING, and set network.options.gradient_checkpointing"
    require(fits, "training", msg)
    available = [str(kind) for kind in get_available_trackers()]
    for name in settings.trackers:
        check_name(name, available, "training.trackers")
    data.train.keep_decoded(progress=progress)
    statistics = data_statistics(config, data.train, progress=progress)
    new = run is not None and not any((run / name).exists() for name in (MODEL, STATE))
    if new and settings.init_from is not None:
        copy_weights(make_model(config, space, statistics), Path(settings.init_from).expanduser())
    return statistics


def make_engine(config: RunConfig, device: str) -> Accelerator:
    """Processes, devices and trackers of a training; raise a SettingError if one is missing."""
    settings = config.training
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        device = "cpu"
    sharing = parse_flag_from_env(_FSDP)
    if sharing:  # before accelerate reads settings of version 1, which it rejects on CPUs
        msg = "FSDP needs its version 2: accelerate launch --use_fsdp --fsdp_version 2"
        require(os.environ.get("FSDP_VERSION") == "2", "training", msg)
    engine = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        dynamo_backend=DynamoBackend.INDUCTOR if settings.compile else DynamoBackend.NO,
        log_with=list(settings.trackers) or None,
        project_dir=".",  # the run, as soon as the trackers start
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        # Given, so that it is not taken from the environment: micro-batches are counted here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    state: Any = engine.state
    if state.distributed_type == DistributedType.MULTI_CPU and sharing:
        # accelerate 1.15 reads its settings of FSDP on GPUs alone.
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    msg = f"{engine.distributed_type.value} is not supported: start processes with torchrun"
    require(engine.distributed_type not in _UNSUPPORTED, "training", msg)
    if state.distributed_type == DistributedType.FSDP:
        # The network alone has another precision, by autocast, as without FSDP.
        state.fsdp_plugin.mixed_precision_policy = None
        # Each process makes the same weights. This loading, which `accelerate launch` sets, rejects
        # networks with buffers.
        state.fsdp_plugin.cpu_ram_efficient_loading = False
    # accelerate chooses a device once per process.
    msg = f"this process already uses {engine.device}; {device!r} needs a new one"
    require(device.partition(":")[0] in {"auto", engine.device.type}, "device", msg)
    return engine


@contextmanager
def stop_signals(engine: Accelerator) -> Iterator[Callable[[], int]]:
    """SIGINT and SIGTERM during a training: a function returns the one received, or 0.

    Several processes receive them at different steps, and agree when all call the function. A
    second signal ends a single process as usual. Outside the main thread the first one does.
    """
    received, alone = 0, engine.num_processes == 1
    before: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        nonlocal received
        received = number
        if alone:
            tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def wanted() -> int:
        if alone:
            return received
        return int(engine.gather(torch.tensor([received], device=engine.device)).max())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield wanted
    finally:
        restore()


def shares(config: RunConfig, processes: int) -> tuple[int, int, int]:
    """Images per process, per pass through the network, and per block, in each batch."""
    batch, most = config.training.batch, config.training.micro_batch
    block = math.gcd(batch, _BLOCK)
    msg = f"must be a multiple of {block * processes} for {processes} processes, which take "
    msg += f"{block} images or a multiple each; got {batch}"
    require(batch % (block * processes) == 0, "training.batch", msg)
    share = batch // processes
    part = share if most is None or most >= share else most
    msg = f"must divide the {share} images of a process, and be a multiple of {block}; got {most}"
    require(share % part == 0 and part % block == 0, "training.micro_batch", msg)
    return share, part, block


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
