"""Scheduler for pipelines of diffusers that samples with any linear SDE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from cldsde.linear.checks import one_of
from cldsde.linear.random import Generators
from cldsde.linear.sde import LinearSDE
from cldsde.pretrained.conventions import Convention, DataPrediction
from cldsde.pretrained.descriptions import (
    described_process,
    described_solver,
    process_of,
    settings_of,
    solver_of,
)
from cldsde.pretrained.pipeline_levels import (
    levels_of_grid,
    levels_of_scheduler,
    levels_of_settings,
    window,
)
from cldsde.pretrained.stepping import (
    GeneratorNoise,
    PathSteps,
    check_steppable,
    recommended_steps,
    streams_of,
)
from cldsde.solvers import SamplerSettings
from cldsde.solvers.base import Solver
from cldsde.solvers.noise import NoiseSource

Grid = Literal["recommended", "root_times", "scheduler"]

_IGNORED = ("prev_timestep", "use_clipped_model_output")
_OWN = ("scheduler", "process", "solver", "start", "end", "grid", "settings")


class PipelineScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Scheduler of diffusers that samples with any linear SDE, such as critically damped Langevin.

    Put it in place of a pipeline's scheduler. The pipeline sees x = α x_0 + σ n, as with
    `diffusers.DDIMScheduler`; velocities and other components of the process stay inside. n steps
    evaluate the network n times: the last step returns the data prediction. The page "Sample in a
    diffusers pipeline" has a complete program.

    Parameters
    ----------
    scheduler
        The pipeline's own scheduler, which knows how its network was trained. It is copied.
    process
        The process: a `LinearSDE`, or the name of its class.
    solver
        A solver that evaluates the score once per step, at its start. None: the recommended one.
    start, end
        Times of the process at which its own grids start and end. None: κ (½ log SNR) of the grid,
        or the nearest that the network knows. A process with less noise starts with its largest; in
        `set_timesteps`, one with more noise at the end raises a ValueError. If the path's noise has
        a variance below 0.99 at the start, one step leads to it from the network's noisiest level.
        With flow matching this is so, except with 25 or more steps under `CLD` and `PSLD`.
    grid
        ``"recommended"``: the levels of `cldsde.sample` for n evaluations and 4 × 128 × 128
        latents. With a given solver, and for ``"root_times"``: uniform in √t, from κ = −5 to 3.3.
        ``timesteps`` and ``sigmas`` of a pipeline must be evenly spaced; only their number counts.
        ``"scheduler"``: the levels of the scheduler replaced, with its ``timesteps``, ``sigmas``
        and ``mu``, and the level at which it ends.
    settings
        Settings of a fitted sampler, or a file of them, in place of ``solver``, ``start``, ``end``
        and ``grid``. They need as many steps as they have levels. Networks of flow matching, which
        know pure noise, need one more.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a name, or the levels or prediction of the scheduler, are unknown. If the solver
        evaluates the score elsewhere than at the start of a step, or a time lies outside of the
        network's levels.

    Notes
    -----
    - ``clip_sample`` and ``thresholding`` act on the data prediction if the replaced scheduler has
      them. DDIM keeps the noise of the prediction before it was clipped, and so does this scheduler
      in its place.
    - If a pipeline changes its latents between two steps (masks, callbacks), x changes and the rest
      of the state stays, so that the state keeps its distribution.
    """

    order = 1

    def __init__(
        self,
        scheduler: Any,
        process: LinearSDE | str | Mapping[str, Any] = "CLD",
        solver: Solver | str | Mapping[str, Any] | None = None,
        *,
        start: float | None = None,
        end: float | None = None,
        grid: Grid = "recommended",
        settings: SamplerSettings | Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        if isinstance(scheduler, PipelineScheduler):
            scheduler = scheduler.replaced
        if not isinstance(scheduler, SchedulerMixin):
            kind = type(scheduler).__name__
            msg = f"scheduler must be the pipeline's scheduler, such as pipe.scheduler; got {kind}"
            raise TypeError(msg)
        one_of(grid, Grid, "grid")
        #: Copy of the scheduler that this one replaces.
        self.replaced: Any = copy.deepcopy(scheduler)
        #: The process.
        self.sde = process_of(process)
        self.solver = None if solver is None else check_steppable(solver_of(solver))
        self._convention = convention = Convention.of(self.replaced)
        #: Settings of a fitted sampler.
        self.settings = None if settings is None else settings_of(settings)
        self._levels_of: Callable[..., tuple[Tensor, Tensor]]
        if self.settings is not None:
            if solver is not None or grid != "recommended":
                raise ValueError("solver and grid must be left out with settings, which have both")
            self.settings.times(self.sde)  # raises if they are for another process
            self.solver = self.settings.solver
            self._levels_of = partial(levels_of_settings, self.settings, convention)
        elif grid == "scheduler":
            self._levels_of = partial(levels_of_scheduler, self.replaced, convention)
        else:
            ends, fits = (start, end), grid == "recommended" and solver is None
            if ends != (None, None):
                window(self.sde, convention, ends)  # raises if the network does not know them
            self._levels_of = partial(levels_of_grid, self.sde, convention, ends, recommended=fits)
        for name, given in (("start", start), ("end", end)):
            if given is not None and (self.settings is not None or grid == "scheduler"):
                owner = "settings" if self.settings is not None else "grid='scheduler'"
                raise ValueError(f"{name} must be None with {owner}, which has its own ends")
        #: Steps on the levels of `set_timesteps`.
        self.steps: PathSteps | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, device="cpu")
        #: Standard deviation of a pipeline's first latents.
        self.init_noise_sigma = 1.0
        # Pipelines write to these, and read the properties.
        self._step_index: int | None = None
        self._begin_index: int | None = None
        kept = {name: x for name, x in self.replaced.config.items() if not name.startswith("_")}
        own = (
            type(self.replaced).__name__,
            described_process(self.sde),
            None if self.solver is None else described_solver(self.solver),
            *(start, end, grid),
            None if self.settings is None else self.settings.as_dict(),
        )
        self.register_to_config(**kept, **dict(zip(_OWN, own, strict=True)))

    def __len__(self) -> int:
        """Number of levels of the network's training."""
        return int(self.config.num_train_timesteps)

    # Grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the noise levels before a run; pipelines call it.

        ``timesteps``, ``sigmas`` and ``mu`` are arguments of the replaced scheduler, for
        ``grid="scheduler"``; ``device`` is the device of ``timesteps``. An argument that does not
        fit, or a solver that does not apply to the process, raises a ValueError.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        given = {name: x for name, x in given.items() if x is not None}
        levels, times = self._levels_of(num_inference_steps, given)
        signal, noise = self._convention.scales(levels)
        scales = signal[:-1].tolist(), noise[:-1].tolist()  # the last level has no prediction
        self._predict = DataPrediction(self.replaced, self._convention, *scales)
        if self.steps is None or not torch.equal(levels, self._levels):
            self.steps = recommended_steps(self.sde, self.solver, levels, signal, noise)
        self.steps.reset()
        self._levels: Tensor = levels
        self._step_index = self._begin_index = None
        self._streams: NoiseSource | None = None
        spread = float(getattr(self.replaced, "init_noise_sigma", 1.0))
        if self.config.grid == "scheduler" and spread != 1:
            # Euler's latents are x/α. Some of its grids leave the data's part out of the first.
            self.init_noise_sigma = spread * float(signal[0])
        self.num_inference_steps = len(times)
        self._known = times.tolist()
        self.timesteps = times.to(device)
        sigma = noise if self._convention.table is None else noise / signal
        self.sigmas = sigma.float().to(device)

    # Steps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the latents, which the network takes as they are.

        A pipeline with latents x_0 + σ n, which scales a noise level, gets a ValueError.
        """
        if sample.ndim < 2:
            raise ValueError(
                f"sample must be latents (B, *D); got the shape {tuple(sample.shape)}. The "
                "pipeline uses latents x_0 + σ n, and PipelineScheduler has α x_0 + σ n"
            )
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators | NoiseSource | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the solver; pipelines call it.

        Parameters
        ----------
        model_output
            The network's prediction, after guidance, like ``sample``; twice its channels if the
            network also predicts a variance.
        timestep, sample
            Time and latents ``(B, *D)`` that the network received. The time finds the first step.
            The others follow in order.
        generator
            Source of the noise: a generator, one per sample, or a `NoiseSource`. None: random
            streams that depend on each sample's first latents alone.
        return_dict
            Whether to return an object in place of a tuple.
        others
            Arguments of other schedulers that change nothing here: ``prev_timestep``,
            ``use_clipped_model_output``, and ``eta`` = 0. Others raise a TypeError.

        Returns
        -------
        DDPMSchedulerOutput or tuple
            The latents at the next level and the data prediction.

        Raises
        ------
        ValueError
            If ``set_timesteps`` was not called, all steps are done, the first time is not one of
            ``timesteps``, or a shape is wrong.
        """
        for name, value in others.items():
            if name not in _IGNORED and (name != "eta" or value):
                raise TypeError(
                    f"PipelineScheduler does not take {name} in step; the pipeline needs "
                    f"{type(self.replaced).__name__} itself"
                )
        i = self._index(timestep)
        assert self.steps is not None
        keeps_noise = not others.get("use_clipped_model_output")
        data, x = self._predict(i, model_output, sample, keeps_noise=keeps_noise)
        if isinstance(generator, NoiseSource):
            noise = generator
        elif generator is not None:
            noise = GeneratorNoise(generator)
        else:
            noise = self._streams = self._streams or streams_of(sample)
        found, data = self.steps.step(i, x, data, noise).to(sample.dtype), data.to(sample.dtype)
        self._step_index = i + 1
        if not return_dict:
            return found, data
        return DDPMSchedulerOutput(prev_sample=found, pred_original_sample=data)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents α x_0 + σ n at times of the scheduler, one or one per sample."""
        exact = torch.promote_types(original_samples.dtype, torch.float32)
        times = torch.as_tensor(timesteps, device=original_samples.device).flatten()
        scales = self._convention.scales(self._convention.kappa(times))
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        signal, spread = (scale.to(exact).reshape(shape) for scale in scales)
        return (signal * original_samples + spread * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise` with the arguments of flow-matching schedulers."""
        if noise is None:
            raise ValueError("noise must be given; got None")
        return self.add_noise(sample, noise, timestep)

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if a pipeline sets it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the first step; pipelines call it."""
        self._begin_index = begin_index

    def _index(self, timestep: Tensor | float) -> int:
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called before step")
        i = self._begin_index if self._step_index is None else self._step_index
        if i is None:
            first = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
            if float(first) not in self._known:
                msg = f"timestep must be one of timesteps, {self._known}; got {float(first):g}"
                raise ValueError(msg)
            i = self._known.index(float(first))
        if not 0 <= i < self.num_inference_steps:
            raise ValueError(
                f"step must be called at most {self.num_inference_steps} times; call set_timesteps "
                "to start again"
            )
        return i

    # Configuration

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Scheduler from a configuration that this class saved, with changes by name.

        The configuration of another scheduler raises a ValueError. It does not say by itself how
        the network was trained: pass the scheduler to the constructor.
        """
        kind: Any = getattr(diffusers, str(config.get("scheduler")), None)
        known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        if not known:
            raise ValueError(
                "config must come from a PipelineScheduler; got the configuration of "
                f"{config.get('_class_name', 'another scheduler')}. Pass the scheduler itself: "
                "PipelineScheduler(pipe.scheduler)"
            )
        own = {name: config[name] for name in _OWN[1:] if name in config}
        own |= {name: kwargs.pop(name) for name in _OWN[1:] if name in kwargs}
        kept = {name: x for name, x in config.items() if name not in (*_OWN, "_class_name")}
        found = cls(kind.from_config({**kept, **kwargs}), **own)
        return (found, {}) if return_unused_kwargs else found

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration; `save_pretrained` calls it.

        A process, solver or scheduler that name and options do not determine raises a ValueError.
        """
        parts = {"process": self.sde, "solver": None if self.settings else self.solver}
        for name, part in parts.items():
            if part is not None and self.config[name] is None:
                raise ValueError(
                    f"{name} cannot be saved: {part!r} is not determined by the name of a class of "
                    "cldsde and options of JSON"
                )
        kind = type(self.replaced)
        if getattr(diffusers, kind.__name__, None) is not kind:
            msg = f"scheduler cannot be saved: {kind.__name__} is no class of diffusers"
            raise ValueError(msg)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


# Pipelines store the module of a scheduler's class, and load the class from this module.
PipelineScheduler.__module__ = "cldsde.pretrained"
