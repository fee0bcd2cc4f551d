"""Images from a score model, one seed per image, in whatever batch it is sampled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from cldsde.errors import SettingError, require, setting
from cldsde.images.checks import Scale
from cldsde.images.config import RECOMMENDED, SamplingConfig
from cldsde.images.data import to_levels
from cldsde.images.latent import VAE
from cldsde.images.model import ImageModel, ImageSpace
from cldsde.images.sample.observed import Conditioning, ObservedImage
from cldsde.images.schema import Count, Number, check_type, checked_options
from cldsde.linear import LinearSDE
from cldsde.linear.sde import check_process
from cldsde.progress import progress_bar
from cldsde.score import ConditionalScore, GuidedScore, ReverseProcess, Score, ScoreFunction
from cldsde.score.protocol import as_score
from cldsde.solvers import Imputation, Plan, SampleNoise, SamplerSettings, find_solver, grids, plan
from cldsde.solvers.authoring import Solver
from cldsde.solvers.noise import Seeds, checked_seeds
from cldsde.solvers.recommended import fit_grid, recommended_plan, window

Item = TypeVar("Item")
Made = TypeVar("Made")


Recipe = SamplingConfig | SamplerSettings
"""How to sample: a configuration, of which the recommended parts are chosen later, or settings."""


def described_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe in JSON types; settings are called by the name ``"settings"``."""
    if isinstance(recipe, SamplerSettings):
        return {"solver": "settings", "nfe": recipe.nfe, "settings": recipe.as_dict()}
    return dataclasses.asdict(recipe)


def make_solver(sampling: SamplingConfig) -> Solver | None:
    """The solver of a configuration; None if it is the recommended one."""
    if sampling.solver == RECOMMENDED:
        msg = "needs a solver by name; 'recommended' chooses grid and options itself"
        require(sampling.grid is None, "grid", msg)
        require(sampling.denoise, "denoise", msg)
        require(not sampling.options, "options", msg)
        return None
    with setting("solver"):
        solver = find_solver(sampling.solver, RECOMMENDED)
    options = checked_options(type(solver), sampling.options)
    with setting("options"):
        made: Solver = dataclasses.replace(solver, **options)  # type: ignore[type-var]
    return made


def changed_recipe(
    recipe: SamplingConfig, options: Mapping[str, Any] | None = None, **changes: Any
) -> SamplingConfig:
    """Change fields of a recipe, and options of its solver; another solver has its own defaults."""
    named = "solver" in changes or ":" not in recipe.solver
    require(named, "solver", f"{recipe.solver} is code outside of cldsde: name it in the command")
    kept = {} if "solver" in changes else recipe.options
    if changes.get("solver") == RECOMMENDED:
        own = {"grid": None, "t_start": None, "t_end": None, "denoise": True}
        changes = {**own, **changes}
    changed = dataclasses.replace(recipe, **changes, options={**kept, **(options or {})})
    solver = make_solver(changed)
    msg = f"{changed.solver} is adaptive; set its options rtol and atol instead"
    for name in ("nfe", "grid"):
        require(name not in changes or solver is None or not solver.facts.adaptive, name, msg)
    return changed


def make_plan(
    score: ScoreFunction,
    recipe: Recipe,
    sde: LinearSDE | None = None,
    observed: Conditioning | None = None,
    shape: Sequence[int] = (1,),
) -> Plan:
    """The plan of a recipe for data of a shape, with its way to denoise at the end.

    The grid of a configuration is the longest with at most ``nfe`` score evaluations, the denoising
    and guidance included. With an observed picture the recommended solver is ``multistep-2-sde``.
    Raises a SettingError if recipe, process and observation do not fit.
    """
    score = as_score(score)
    sde = check_process(score.sde if sde is None else sde)
    process = ReverseProcess(sde, score if observed is None else observed.score(score, sde))
    if isinstance(recipe, SamplerSettings):
        msg = "are for sampling without an observed picture; name a solver"
        require(observed is None, "settings", msg)
        with setting("settings"):
            return plan(process, recipe)
    if observed is not None and recipe.solver == RECOMMENDED:
        recipe = dataclasses.replace(recipe, solver="multistep-2-sde")
    solver = make_solver(recipe)
    how: dict[str, Any] = {"nfe": recipe.nfe, "shape": shape}
    how |= {"start": recipe.t_start, "end": recipe.t_end}
    try:
        if solver is None:
            with setting("t_end"):
                window(process, **how)  # raises if the ends are the reason
            with setting("nfe"):
                return recommended_plan(process, **how)[0]
        if observed is not None:
            solver = observed.solver(solver)
        with setting("t_end"):
            start, end = window(process, **how)
        end = end if observed is None else observed.end(sde, end)
        with setting("nfe"):
            grid = getattr(grids, f"{recipe.grid}_times")
            denoise = recipe.denoise
            times = fit_grid(process, solver, start, end, recipe.nfe, grid=grid, denoise=denoise)
        made = plan(process, solver, times, denoise=denoise)
        if observed is not None:
            observed.check_steps(made)
        return made
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError("solver", str(error)) from error


Precision = Literal["fp32", "bf16", "fp16"]
"""Precision of networks; states and coefficients have single precision at least."""
Weight = Annotated[Number, Field(ge=0)]
Start = tuple[SampleNoise, Tensor]
"""Source of the random numbers of a batch, and the states at which its sampling starts."""


class Samples(NamedTuple):
    """Images and their score evaluations."""

    images: Tensor  #: ``(N, C, H, W)`` uint8, or float32 for continuous data, on the CPU.
    evaluations: Tensor  #: Score evaluations of each image, ``(N,)`` int64.
    levels: Scale = 256  #: Number of grey levels, or range of continuous numbers.


@dataclass(frozen=True, eq=False)
class ImageSampler:
    """Sampler of images: process, solver, plan, classes, guidance, inpainting and autoencoder.

    The plan is computed once, for any number of batches. An image depends on its own seed alone,
    except for rounding in the network, which may depend on the size of the batch. Settings that do
    not fit the model or each other raise a SettingError at once.
    """

    score: Score
    space: ImageSpace
    sampling: Recipe
    _: KW_ONLY
    vae: VAE | None = None  # if the process is of latent variables
    label: int | Literal["all"] | None = None  # class of all images, or i for seed i; None: none
    guidance: float = 1.0  # weight of the class, see `cldsde.GuidedScore`
    observed: ObservedImage | None = None
    batch: int = 64  # images per batch
    precision: Precision = "fp32"  # of the network

    @classmethod
    def of(
        cls, model: ImageModel, sampling: Recipe, batch: int | None = None, **options: Any
    ) -> Self:
        """The sampler of a trained model; batches of small images are larger by default."""
        if batch is None:
            batch = 256 if math.prod(model.space.shape) <= 2**10 else 64
        return cls(model.score, model.space, sampling, vae=model.vae, batch=batch, **options)

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"batch": Count, "guidance": Weight, "precision": Precision}
        for name, kind in kinds.items():
            check_type(getattr(self, name), kind, name)
        guided = self.guidance != 1
        on_cpu = self.score.device.type == "cpu"
        msg = "'fp16' needs a GPU; use 'fp32' or 'bf16'"
        require(self.precision != "fp16" or not on_cpu, "precision", msg)
        msg = "needs a network that was trained without classes, too (network.label_dropout)"
        require(not (guided and self.space.always_classes), "guidance", msg)
        msg = f"needs a class; got {self.guidance} and no class"
        require(not guided or self.label is not None, "guidance", msg)
        msg = "needs a process of pixels; the process of this model is of latent variables"
        require(self.observed is None or self.vae is None, "observe", msg)
        _ = self.plan

    @cached_property
    def _conditioning(self) -> Conditioning | None:
        return None if self.observed is None else self.observed.of(self.space, self.score.device)

    @cached_property
    def plan(self) -> Plan:
        """The plan, whose ``described()`` decides the images beside weights and seeds."""
        # Guidance counts, so that the plan is made for a guided score.
        planned = self.score if self.guidance == 1 else self._given(0)
        return make_plan(planned, self.sampling, None, self._conditioning, self._data_shape)

    @property
    def _data_shape(self) -> Sequence[int]:
        """Shape of one sample of the process."""
        return self.space.shape if self.vae is None else self.vae.latent_shape

    @property
    def t_end(self) -> float:
        """Time at which sampling ends."""
        return float(self.plan.times[-1])

    def recipe(self) -> dict[str, object]:
        """Everything that the images depend on besides weights and seeds, in JSON types."""
        own = {name: getattr(self, name) for name in ("batch", "label", "guidance")}
        if self.precision != "fp32":  # left out, so that older samples can be resumed
            own["precision"] = self.precision
        observed = None if self.observed is None else self.observed.recipe()
        return {
            "sampling": described_recipe(self.sampling),
            "sampler": self.plan.described(),
            "observed": observed,
            **own,
        }

    def batches(self, seeds: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """Classes and seeds of batches of one class each.

        With the label ``"all"``, and without a label for a network that always sees a class, seed i
        has class i modulo their number.
        """
        label, classes = self.label, self.space.classes or 1
        label = "all" if label is None and self.space.always_classes else label
        groups: dict[int | None, list[int]] = {}
        for seed in seeds:
            groups.setdefault(seed % classes if label == "all" else label, []).append(seed)
        return [
            (c, some[first : first + self.batch])
            for c, some in sorted(groups.items(), key=lambda group: group[0] or 0)
            for first in range(0, len(some), self.batch)
        ]

    def start(self, seeds: Sequence[int]) -> Start:
        """Draw the random numbers with which the sampling of a batch starts."""
        noise, plan = SampleNoise(seeds), self.plan
        first, device = float(plan.times[0]), self.score.device
        state = noise.start(plan.process.sde, self._data_shape, device=device, t=first)
        return noise, state

    def draw(
        self, seeds: Sequence[int], label: int | None = None, start: Start | None = None
    ) -> Samples:
        """Sample one image for each seed in [0, 2³²), as one batch of one class or none.

        ``start`` may have been made ahead by the method `start`, for one call.
        """
        plan, observed = self.plan, self._conditioning
        space, vae = self.space, self.vae
        noise, state = self.start(seeds) if start is None else start
        if label is not None:
            score = self._given(label)
            sde = plan.process.sde
            plan = plan.with_score(score if observed is None else observed.score(score, sde))
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        # Around the whole solve: its own arithmetic is elementwise, which autocast leaves alone.
        cast = torch.autocast(self.score.device.type, dtype=half) if half else nullcontext()
        with torch.no_grad(), cast:
            if observed is not None and observed.particles:
                data, evaluations = observed.sample(plan, seeds, chunk=self.batch)
            else:
                found = plan.solve(state, noise=noise, warn=False)
                if not found.success:
                    name = described_recipe(self.sampling)["solver"]
                    raise FloatingPointError(f"{name} failed: {found.message}")
                data, evaluations = found.data, found.stats["nfev"]
            if isinstance(plan.solver, Imputation):
                data = plan.solver.impose(data)
            if vae is not None:
                data = vae.images(data)
        images = to_levels(data.cpu(), space.levels, dequantised=space.dequantised)
        return Samples(images, evaluations, space.levels)

    def _given(self, label: int) -> Score:
        """The score of a class."""
        assert self.space.classes is not None
        # Made on the device: a number of the CPU would be copied there at every evaluation.
        given, free = (
            ConditionalScore(self.score, condition=torch.full((), number, device=self.score.device))
            for number in (label, self.space.classes)
        )
        return given if self.guidance == 1 else GuidedScore(given, free, self.guidance)

    def sample(self, seeds: Seeds, *, progress: bool = False, **how: Any) -> Samples:
        """Sample one image for each seed, in the order of the seeds; see `batches_of`."""
        listed = isinstance(seeds, Sized) and getattr(seeds, "ndim", 1) == 1
        require(listed, "seeds", f"must be a sequence of integers; got {seeds!r}")
        require(len(seeds) > 0, "seeds", "must be one or more; got none")
        seeds = checked_seeds(seeds)
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for some, found in batches_of(self, self.batches(seeds), shown=progress, **how):
            drawn |= dict(zip(some, zip(*found[:2], strict=True), strict=True))
        images, evaluations = zip(*(drawn[seed] for seed in seeds), strict=True)
        return Samples(torch.stack(images), torch.stack(evaluations), self.space.levels)


def batches_of(
    sampler: Any,
    batches: Sequence[tuple[int | None, list[int]]],
    *,
    shown: bool,
    before_batch: Callable[[], object] = lambda: None,
) -> Iterator[tuple[list[int], Samples]]:
    """Sample classes and seeds; yield seeds and images of each batch, with a bar if ``shown``.

    ``before_batch`` may end the sampling by an exception.
    """
    starts = ahead(sampler.start, (seeds for _, seeds in batches))
    options = {"total": sum(len(seeds) for _, seeds in batches), "unit": "image"}
    with progress_bar(None, shown=shown, desc="sampling", **options) as bar:
        for (label, seeds), start in zip(batches, starts, strict=True):
            before_batch()
            yield seeds, sampler.draw(seeds, label, start)
            bar.update(len(seeds))


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Map items in a thread, which makes the next one while the last one is used."""
    with ThreadPoolExecutor(1) as thread:
        made: list[Future[Made]] = []
        for item in items:
            made.append(thread.submit(make, item))
            if len(made) == 2:
                yield made.pop(0).result()
        yield from (last.result() for last in made)
