"""Devices, processes and precision of a training, by the library accelerate."""

from __future__ import annotations

import math
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, GradientAccumulationPlugin

from cldsde.images.config import RunConfig
from cldsde.images.data import DataSet
from cldsde.images.errors import SettingError
from cldsde.images.model import ImageSpace, Statistics, check_model, data_statistics
from cldsde.images.sample.sampler import check_sampling

_BLOCK = 8  # images that share generators, at most: what processes share is a number of blocks
_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
_PATIENCE = timedelta(hours=12)  # of processes that wait for the one that writes


def check_run(
    config: RunConfig, data: DataSet, *, device: str = "auto", processes: int = 1
) -> Statistics:
    """Refuse what cannot be trained or sampled, before anything is made."""
    space = ImageSpace.of(data.train, config)
    check_model(config, space)
    try:
        check_sampling(lambda z, t: z, config.sampling, config.process.make())
    except SettingError as error:
        raise error.within("sampling") from error
    except (ArithmeticError, RuntimeError) as error:
        msg = f"no grid of times can be computed for this process and sampling ({error})"
        raise SettingError("process.options", msg) from error
    shares(config, processes)
    if device.startswith("cuda:") and processes > 1:
        raise SettingError("device", f"{device} cannot be shared by {processes} processes")
    if config.training.precision == "fp16" and (
        device in {"cpu", "mps"} or not torch.cuda.is_available()
    ):
        raise SettingError("training.precision", "'fp16' needs a GPU; take 'fp32' or 'bf16'")
    return data_statistics(config, data.train)


def make_engine(config: RunConfig, device: str) -> Accelerator:
    """The processes and devices of a training."""
    settings = config.training
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        device = "cpu"
    engine = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        dynamo_backend=DynamoBackend.INDUCTOR if settings.compile else DynamoBackend.NO,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        # Given, it is not taken from the environment: micro-batches are counted here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if engine.distributed_type in _SHARDED:
        msg = f"{engine.distributed_type.value} is not supported: start processes with torchrun"
        raise SettingError("training", msg)
    wanted = device.partition(":")[0]
    if wanted not in {"auto", engine.device.type}:
        # accelerate settles on a device once for each process.
        msg = f"this process has settled on {engine.device}; {device!r} needs a new one"
        raise SettingError("device", msg)
    return engine


def shares(config: RunConfig, processes: int) -> tuple[int, int, int]:
    """Images of a process, of one pass through the network, and of a block, in each batch."""
    batch, most = config.training.batch, config.training.micro_batch
    block = math.gcd(batch, _BLOCK)
    if batch % (block * processes):
        msg = (
            f"must be a multiple of {block * processes} for {processes} processes, which take "
            f"{block} images or a multiple each; got {batch}"
        )
        raise SettingError("training.batch", msg)
    share = batch // processes
    part = share if most is None or most >= share else most
    if share % part or part % block:
        msg = (
            f"must divide the {share} images of a process, and be a multiple of {block}; got {most}"
        )
        raise SettingError("training.micro_batch", msg)
    return share, part, block
