"""Runs as pipelines of diffusers: the network as it is, and a scheduler that calls it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ConfigMixin, DDPMPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor, nn

from cldsde.errors import require, setting
from cldsde.files import PARTIAL, check_writable, new_folder
from cldsde.images.config import RunConfig
from cldsde.images.model import (
    ImageSpace,
    Statistics,
    TrainedModel,
    as_trained,
    copy_network,
    make_model,
)
from cldsde.images.networks import CLOCK_SCALE
from cldsde.images.sample.sampler import changed_recipe, make_plan
from cldsde.images.schema import plain
from cldsde.images.tensor_files import tensors_digest
from cldsde.linear.blocks import apply_blocks
from cldsde.linear.random import Generators
from cldsde.pretrained.stepping import GeneratorNoise, check_steppable, streams_of
from cldsde.score import MixedScore
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes
from cldsde.solvers.base import Memory
from cldsde.solvers.noise import start_root


class RunScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Scheduler of diffusers for the network of a run, with its process, solver and reference.

    Latents are the network's inputs: components of the state as channels, scaled to unit size. They
    start as independent normals. The last step returns images in [−1, 1].
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, run: dict[str, Any], space: list[Any], mean: Any, variance: Any, images_seen: int
    ) -> None:
        self.run, self.space = RunConfig.from_dict(run), ImageSpace.from_json(space)
        self.statistics = Statistics(*(torch.tensor(x, device="cpu") for x in (mean, variance)))
        sde, inputs = self.run.process.make(), self.run.score.inputs
        self._network = _Relay(self.space.shape[0] * (len(sde.driven) if inputs == "state" else 1))
        self._score = MixedScore(self._network, sde, *self.statistics, inputs=inputs)
        self.timesteps = torch.empty(0, device="cpu")

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of the run for a number of score evaluations; pipelines call it."""
        # Raises an error for a solver that is code, which the file of a scheduler must not run.
        sampling = dataclasses.replace(changed_recipe(self.run.sampling), nfe=num_inference_steps)
        made = make_plan(self._score, sampling, shape=self.space.shape)
        self._plan = made
        with setting("solver"):
            self._solver = check_steppable(made.solver)
        self._times = made.times if made.denoise else made.times[:-1]
        self._known = KnownTimes(made.times[:-1])
        zero = torch.zeros(1, made.process.sde.components, *self.space.shape, device="cpu")
        clocks = [self._inputs(zero, i)[1] for i in range(len(self._times))]
        self.timesteps = (CLOCK_SCALE * torch.cat(clocks)).to(device)
        self._index = 0

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor]:
        """Take one step of the solver; pipelines call it with the network's output."""
        i, last = self._index, len(self._times) - 1
        if i == 0:
            self._noise = streams_of(sample) if generator is None else GeneratorNoise(generator)
            self._state = self._started(sample.float())
            self._memory: Memory = ()
        self._network.output = model_output
        if i == len(self._plan.times) - 1:
            found = self._score.data_prediction(self._state, self._times[i])
        else:
            score = KnownScore(self._plan.process, self._known, self._state)
            given = (self._state, self._memory, self._plan.tables, i, score, self._noise)
            self._state, self._memory = self._solver.step(*given)
            found = self._state[:, 0] if i == last else self._inputs(self._state, i + 1)[0]
        self._index = i + 1
        found = found.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=found) if return_dict else (found,)

    def _inputs(self, z: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Inputs of the network at a state and the time of an evaluation."""
        self._network.output = None
        self._score(z, self._times[i])
        return self._network.given

    def _started(self, sample: Tensor) -> Tensor:
        """State at the first time at which the network has these inputs."""
        sde, shape = self._plan.process.sde, self.space.shape
        parts = (-1, shape[0])
        like = sample[:, None, : shape[0]]
        root = start_root(sde, float(self._times[0])).to(like)
        state = apply_blocks(root, self._noise.normal(like, sde.components))
        # The inputs are affine in the state: take its values at 0 and at unit vectors.
        units = torch.eye(1 + sde.components, sde.components, device=like.device)
        given = self._inputs(units[..., None, None, None].expand(-1, -1, *shape), 0)[0]
        *columns, constant = given.unflatten(1, parts).movedim(1, -1)  # type: ignore[no-untyped-call]
        slope = torch.stack([column - constant for column in columns], -1)
        gain = root @ torch.linalg.pinv(slope @ root)
        change = (sample - self._inputs(state, 0)[0]).unflatten(1, parts).movedim(1, -1)  # type: ignore[no-untyped-call]
        shift: Tensor = gain @ change.unsqueeze(-1)
        return state + shift.squeeze(-1).movedim(-1, 1)


class _Relay(nn.Module):
    """Stands for the network: keeps its inputs, and returns the output that a pipeline brought."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.output: Tensor | None = None
        self.given: tuple[Tensor, Tensor]

    def forward(self, inputs: Tensor, clock: Tensor) -> Tensor:
        self.given = inputs, clock
        nothing = inputs.new_zeros(len(inputs), self.channels, *inputs.shape[2:])
        return nothing if self.output is None else self.output


def check_export(run: TrainedModel, folder: Path) -> RunScheduler:
    """The scheduler of an exported run; raise a SettingError if it cannot be exported."""
    config, space = run.config, run.space
    checks = {
        "network.name": (config.network.name, "UNet"),
        "network.conditional": (space.classes is not None, False),
        "score.code": (config.score.code, "cldsde"),
        "score.mixing": (config.score.mixing, None),
        "latent": (config.latent and "an autoencoder", None),
    }
    for key, (value, needed) in checks.items():
        msg = f"must be {needed!r} for a pipeline of a UNet2DModel; got {value!r}"
        require(value == needed, key, msg)
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(free, "folder", f"must not be there yet, or be empty; got {folder}")
    with setting("folder"):
        check_writable(next(place for place in folder.absolute().parents if place.exists()))
    score = cast(MixedScore, run.score)
    statistics = (x.tolist() for x in (score.data_mean, score.data_variance))
    values = plain(dataclasses.astuple(space))
    scheduler: RunScheduler = RunScheduler(config.to_dict(), values, *statistics, run.images_seen)
    scheduler.set_timesteps(run.sampling.nfe)
    return scheduler


def export(run: TrainedModel, folder: Path) -> None:
    """Write a run as a pipeline, whole or not at all; raise the errors of `check_export`."""
    network = cast(MixedScore, run.score).network.get_submodule("network")
    pipeline, folder = DDPMPipeline(network, check_export(run, folder)), folder.absolute()
    with (
        new_folder(folder.parent),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as temporary,
    ):
        pipeline.save_pretrained(Path(temporary) / folder.name)
        (Path(temporary) / folder.name).replace(folder)


def is_exported(folder: Path) -> bool:
    """Whether a folder is a pipeline that `export` wrote."""
    index = (folder.parent if folder.is_file() else folder) / "model_index.json"
    return index.is_file() and f'"{RunScheduler.__name__}"' in index.read_text(encoding="utf-8")


def load_exported(folder: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """The model that `export` wrote; ``folder`` may also be a file in its folder."""
    folder = folder.parent if folder.is_file() else folder
    with setting("model"):
        scheduler = RunScheduler.from_pretrained(folder, subfolder="scheduler")
        model = make_model(scheduler.run, scheduler.space, scheduler.statistics)
        copy_network(model, folder / "unet")
    seen, digest = scheduler.config.images_seen, scheduler.run.model_digest()
    digest = tensors_digest(model.state_dict(), {"config": digest})
    return as_trained(model, scheduler.run, scheduler.space, digest, seen, device)
