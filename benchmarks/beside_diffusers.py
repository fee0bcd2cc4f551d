"""Fréchet distances of `cldsde.sample` beside the schedulers of diffusers, with the same network.

``python benchmarks/beside_diffusers.py RUN RESULTS.json`` samples the network of a run of ``cldsde
train`` that was trained with VP. The features come from a classifier of the run's data, and
from a network with random weights.
Settings that ``cldsde tune RUN`` has kept in ``RUN/sampler-N.json`` are measured, too. The script
can be interrupted and keeps finished sets.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import cldsde
from cldsde import CLD, PSLD, VPSDE, DenoiserScore, LinearSDE, sample
from cldsde.files import write_whole
from cldsde.images.data import to_levels
from cldsde.images.data.pixels import measured, measured_batches, save_grid
from cldsde.images.evaluate.classifier import CLASSIFIER, kept_classifier, random_features
from cldsde.images.evaluate.distances import FeatureSums, frechet_of
from cldsde.images.model import TrainedModel, load_model
from cldsde.pretrained import PipelineScheduler, sample_k_diffusion
from cldsde.score import Denoiser, ReverseProcess
from cldsde.solvers import SamplerSettings, recommend

_BATCH = 250
_LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_TRAILING, _KARRAS = {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_BOTH = [_TRAILING, _KARRAS]
# Each with its choices of levels, which are all measured. UniPC, SA-Solver and Heun had 1.4 to 6.6
# times these distances with Karras' levels.
SCHEDULERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "DDIM": ("DDIMScheduler", [_TRAILING]),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", _BOTH),
    "DPM-Solver++ 2M, SDE": ("DPMSolverMultistepScheduler", [{**_SDE, **x} for x in _BOTH]),
    "UniPC 3": ("UniPCMultistepScheduler", [{"solver_order": 3, **_TRAILING}]),
    "SA-Solver": ("SASolverScheduler", [_TRAILING]),
    "Heun": ("HeunDiscreteScheduler", [_TRAILING]),
    "Euler, ancestral": ("EulerAncestralDiscreteScheduler", [_TRAILING]),
}
DYNAMICS: dict[str, Callable[[], LinearSDE]] = {"VP": VPSDE, "CLD": CLD, "PSLD": PSLD}

Draw = Callable[[Denoiser, tuple[int, ...], int, int], Tensor]
"""Samples of a denoiser: of a shape, with a number of evaluations and a seed."""


@torch.no_grad()
def by_diffusers(
    name: str,
    options: dict[str, Any],
    denoiser: Denoiser,
    shape: tuple[int, ...],
    nfe: int,
    seed: int,
    process: LinearSDE | None = None,
) -> Tensor:
    """Samples of a scheduler, whose network predicts the noise at one of 1,000 times of VP.

    With a process, `PipelineScheduler` replaces the scheduler.
    """
    replaced = getattr(diffusers, name)(**_LINEAR, **options)
    scheduler = replaced if process is None else PipelineScheduler(replaced, process)
    alpha = replaced.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(seed)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": generator} if takes else {}
    levels, parts = ((1 - alpha) / alpha).log() / 2, []
    for first in range(0, shape[0], _BATCH):
        scheduler.set_timesteps((nfe + 1) // 2 if name.startswith("Heun") else nfe)
        x = torch.randn(min(_BATCH, shape[0] - first), *shape[1:], generator=generator)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            low = min(int(t), len(levels) - 2)
            sigma = torch.lerp(levels[low], levels[low + 1], t.double() - low).exp().float()
            # The last time of the schedule has a little more noise than a process in t ≤ 1.
            sigma = sigma.clamp(*denoiser.noise_levels)
            u = scheduler.scale_model_input(x, t) * (1 + sigma**2).sqrt()
            noise = (u - denoiser(u, sigma.expand(len(u)))) / sigma
            x = scheduler.step(noise, t, x, **more).prev_sample.float()
        parts.append(x)
    return torch.cat(parts)


def by_sample(
    dynamics: str,
    settings: dict[int, SamplerSettings],
    denoiser: Denoiser,
    shape: tuple[int, ...],
    nfe: int,
    seed: int,
) -> Tensor:
    """Samples of `cldsde.sample`, with settings for the number of evaluations or its own."""
    sde, options = DYNAMICS[dynamics](), {"seed": seed, "batch": _BATCH}
    score = DenoiserScore(denoiser, sde)
    if settings:
        options["seed"] += 100  # the search had the first ones
    return sample(sde, score, shape, nfe=nfe, settings=settings.get(nfe), **options)


def by_k_diffusion(
    sde: LinearSDE,
    kind: str,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    nfe: int,
    seed: int,
) -> Tensor:
    """Samples of `sample_k_diffusion`, on Karras' levels from 80 to 0.02, or the default ones."""
    if kind == "default levels":
        process = ReverseProcess(sde, DenoiserScore(denoiser, sde))
        sigmas = recommend(process, nfe, shape=shape[1:]).sigmas.float()
    else:
        roots = torch.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), nfe)
        sigmas = torch.cat([roots**7, torch.zeros(1)])
    generator, parts = torch.Generator().manual_seed(seed), []
    for first in range(0, shape[0], _BATCH):
        size = min(_BATCH, shape[0] - first)
        x = sigmas[0] * torch.randn(size, *shape[1:], generator=generator)
        options = {"process": sde, "noise": 1000 * seed + first // _BATCH, "disable": True}
        parts.append(sample_k_diffusion(denoiser, x, sigmas, **options))
    return torch.cat(parts)


def samplers(settings: dict[int, SamplerSettings]) -> Iterator[tuple[str, str, Draw]]:
    """Names of sampler and options, and how it draws; ``settings`` are fitted to the network."""
    for dynamics in DYNAMICS:
        yield f"cldsde.sample, {dynamics}", "default", partial(by_sample, dynamics, {})
    for name, (kind, choices) in SCHEDULERS.items():
        for options in choices:
            label = ", ".join(f"{key}={value}" for key, value in options.items())
            yield name, label, partial(by_diffusers, kind, options)
    for dynamics in ("VP", "CLD"):
        sde, plain = DYNAMICS[dynamics](), {"clip_sample": False}
        draw = partial(by_diffusers, "DDIMScheduler", plain, process=sde)
        yield f"PipelineScheduler, {dynamics}", "default", draw
    for dynamics in ("VP", "CLD"):
        for kind in ("Karras levels", "default levels"):
            draw = partial(by_k_diffusion, DYNAMICS[dynamics](), kind)
            yield f"sample_k_diffusion, {dynamics}", kind, draw
    if settings:
        yield "cldsde.sample, fitted", "VP", partial(by_sample, "VP", settings)


def recipe(dynamics: str, nfe: int) -> list[Any]:
    """Solver and noise levels of `cldsde.sample`, by which a page knows whether they changed."""
    sde = DYNAMICS[dynamics]()
    made = recommend(ReverseProcess(sde, DenoiserScore(lambda u, _: u, sde)), nfe)
    solver = replace(made.solver, stochasticity=made.stochasticity[0])  # one λ for all steps
    return [repr(solver), [round(x, 4) for x in made.kappa]]


def pipeline_recipe(dynamics: str, nfe: int) -> list[Any]:
    """Solver and noise levels of `PipelineScheduler`, as `recipe` has those of `cldsde.sample`."""
    scheduler = PipelineScheduler(diffusers.DDIMScheduler(**_LINEAR), DYNAMICS[dynamics]())
    scheduler.set_timesteps(nfe)
    return [repr(scheduler.steps.solver), [round(x, 3) for x in scheduler.sigmas.tolist()]]


def check_kept(kept: dict[str, Any], now: dict[str, Any]) -> None:
    """Stop before sets of other settings are put beside those that a file has kept."""
    kept, now = json.loads(json.dumps([kept, now]))
    if other := [key for key in kept.keys() & now.keys() if kept[key] != now[key]]:
        raise SystemExit(f"the results were measured with other {', '.join(sorted(other))}")


class Distances:
    """Fréchet distances to the data of a run, in the features of two networks."""

    def __init__(self, run: Path, model: TrainedModel) -> None:
        self.space, data = model.space, model.config.data.load()
        self.networks = {
            "distances": kept_classifier(run / CLASSIFIER, data, progress=True),
            "random features": random_features(self.space.shape[0]),
        }
        shape = (len(data.train), *self.space.shape)
        self.known = {
            key: FeatureSums(network, shape).of(measured_batches(data.train))
            for key, network in self.networks.items()
        }

    def add(self, cell: dict[str, Any], x: Tensor) -> None:
        """Append the distances of samples to a cell."""
        levels = to_levels(x, self.space.levels, dequantised=self.space.dequantised)
        parts = torch.split(measured(levels, self.space.levels), _BATCH)
        for key, network in self.networks.items():
            distance = frechet_of(FeatureSums(network, x.shape).of(parts), self.known[key])
            cell.setdefault(key, []).append(round(distance, 4))


def draw_rows(file: Path, model: TrainedModel, names: list[str], nfe: int) -> None:
    """Twelve images of each sampler in a row, with its first choice of levels."""
    draws = {name: draw for name, _, draw in reversed(list(samplers({})))}
    shape, space = (12, *model.space.shape), model.space
    x = torch.cat([draws[name](model.score.denoiser, shape, nfe, 0) for name in names])
    save_grid(file, to_levels(x, space.levels, dequantised=space.dequantised), columns=12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 7, 10, 15, 20, 50])
    parser.add_argument("--images", type=int, default=1000, help="images per set")
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--samplers", nargs="+", help="names, such as SA-Solver; all by default")
    parser.add_argument("--picture", type=Path, help="draw images of 5 evaluations instead")
    arguments = parser.parse_args()
    model = load_model(arguments.run)
    if arguments.picture is not None:
        names = arguments.samplers or [*dict.fromkeys(name for name, *_ in samplers({}))]
        draw_rows(arguments.picture, model, names, 5)
        return
    distances, space = Distances(arguments.run, model), model.space
    settings = {
        nfe: SamplerSettings.load(file)
        for nfe in arguments.nfe
        if (file := arguments.run / f"sampler-{nfe}.json").exists()
    }
    results: dict[str, Any] = {"samplers": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    about = {
        "weights": sum(x.numel() for x in model.score.parameters()),
        "data": model.config.data.name,
        "shape": space.shape,
        "images": arguments.images,
        "trained_on": model.images_seen,
        "recipes": {
            **{x: {str(n): recipe(x, n) for n in arguments.nfe} for x in DYNAMICS},
            **{
                f"PipelineScheduler, {x}": {str(n): pipeline_recipe(x, n) for n in arguments.nfe}
                for x in ("VP", "CLD")
            },
        },
        "versions": {x.__name__: x.__version__ for x in (cldsde, diffusers, torch)},
    }
    kept = results.setdefault("about", about)
    check_kept(kept, {key: about[key] for key in ("weights", "data", "shape", "images")})
    for name, recipes in about["recipes"].items():
        check_kept(kept["recipes"].setdefault(name, {}), recipes)
        kept["recipes"][name] |= recipes

    def save() -> None:
        text = json.dumps(results, indent=1) + "\n"
        write_whole(arguments.results, lambda file: file.write_text(text))

    save()
    calls: list[int] = []
    model.score.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    shape = (arguments.images, *space.shape)
    wanted = arguments.samplers
    everything = [x for x in samplers(settings) if wanted is None or x[0] in wanted]
    for nfe in arguments.nfe:
        for name, options, draw in everything:
            if "fitted" in name and nfe not in settings:
                continue
            cells = results["samplers"].setdefault(name, {}).setdefault(options, {})
            found = cells.setdefault(str(nfe), {"evaluations": 0, "distances": []})
            for seed in range(len(found["distances"]), arguments.sets):
                calls.clear()
                x = draw(model.score.denoiser, shape, nfe, seed)
                found["evaluations"] = sum(calls) / len(x)
                distances.add(found, x)
                save()
            mean = sum(found["distances"]) / len(found["distances"])
            print(f"{nfe:3d} {name:24s} {options:50s} {mean:.3f}", flush=True)


if __name__ == "__main__":
    main()
