"""Generate images from a trained run, or from a model of diffusers.

The image of a seed depends on neither the batch nor the number of processes, up to rounding; the
FAQ has two exceptions. A folder beside the output keeps finished batches, so that the same command
resumes, and that several processes, started by ``torchrun``, share the work.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cldsde.cli.models import (
    MODEL,
    RECIPE,
    SOLVERS,
    model_of,
    process_config,
    recipes_of,
    settings_of,
)
from cldsde.cli.options import DEVICE, ONE_SEED, SEEDS, Kind, flag, join_processes, option, reject
from cldsde.errors import require
from cldsde.messages import counted
from cldsde.solvers.named import find_solver

_RUN = (
    "run of cldsde train, or a file in it: snapshots/N.safetensors, ema-DECAY.safetensors, "
    "power-WIDTH.safetensors (if the training has power_averages), or "
    "training.safetensors for the weights without average"
)
_OUT = "FILE.npz, a picture of a grid (FILE.png), or a folder for one picture per image"
_CLASS = "class to sample, by name or number, or 'all' to cycle through the classes by seed"
_OBSERVE = (
    "relation of the picture to the images: a picture of a mask, white for observed pixels; grey; "
    "downsample:N, means of N×N pixels; blur:STD, a Gaussian of STD pixels"
)
_METHODS = "moments, pigdm, dps, twisted (particles) or replacement (no noise; mask or grey)"
_NOISE = "standard deviation of the picture's noise, black being -1 and white 1"
_MODES = "default, reduce-overhead (CUDA graphs) or max-autotune"
_MODE = Kind({x: x for x in ("default", "reduce-overhead", "max-autotune")}.__getitem__, _MODES)
_COMPILE = (
    f"compile the network; MODE is {_MODES}. If MODE is left out, RUN must come before this option"
)
_BATCH = (
    "images per batch; default: 4 for a pipeline of diffusers, else 256, or 64 above 1,024 values "
    "per image"
)
_OPTIONAL = {"dest": "compile_mode", "nargs": "?", "const": "default"}
OPTIONS = (
    option("RUN", Path, _RUN, nargs="?"),
    *MODEL,
    option("--solver NAME", str, f"solver: {SOLVERS}"),
    option("--nfe N", int, "score evaluations per image"),
    *RECIPE,
    option("--seeds A-B", SEEDS, "seeds of the images, such as 0-49999; 0-63 by default"),
    option("--seed N", ONE_SEED, "one seed, the same as --seeds N"),
    option("--out PATH", Path, _OUT, default=Path("samples.png")),
    flag("--overwrite", "replace an existing file"),
    option("--batch N", int, _BATCH),
    option("--class NAME", str, _CLASS, dest="label"),
    option("--guidance W", float, "weight of the class or prompt"),
    option("--prompt TEXT", str, "prompt, for a text-to-image folder of diffusers"),
    option("--negative-prompt TEXT", str, "prompt to avoid, for a text-to-image folder"),
    option("--known IMAGE", Path, "picture that was observed"),
    option("--observe HOW", str, _OBSERVE),
    option("--method NAME", str, f"{_METHODS}; moments by default"),
    option("--noise-std S", float, f"{_NOISE}; 0.05 by default"),
    option("--particles N", int, "particles per image of twisted; 16 by default"),
    option("--precision NAME", str, "precision of the network: fp32, bf16 or fp16", default="fp32"),
    option("--compile MODE", _MODE, _COMPILE, **_OPTIONAL),
    flag("--channels-last", "store features with channels last, may be faster on a GPU"),
    DEVICE,
)
# Options that a pipeline decides by itself.
_NOT_FOR_PIPELINES = (
    *("grid", "t_start", "t_end", "denoise", "set", "known", "observe"),
    *("method", "noise_std", "particles", "compile_mode"),
)


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and load the model; return the remaining work."""
    from cldsde.images.sample import ImageSampler, ObservedImage, SampleRequest, speed_up
    from cldsde.images.sample.source import is_pipeline

    both = options.seeds is not None and options.seed is not None
    require(not both, "seed", "--seeds is an alternative; got both")
    seeds = options.seeds or options.seed or range(64)
    state, device = join_processes(options.device)
    if options.model is not None:
        require(options.model.exists(), "model", f"{options.model} is no folder")
    if options.run is None and options.model is not None and is_pipeline(options.model):
        return _work(options, _pipeline_request(options, seeds, device))
    msg = "needs --model and a text-to-image folder of diffusers"
    reject(options, ("prompt", "negative_prompt"), msg)
    model = model_of(options, options.run, device)
    speed_up(model, options.compile_mode, channels_last=options.channels_last)
    sampling, *more = recipes_of(options, model)
    require(not more, "settings", "must be one file")
    how = {name: getattr(options, name) for name in ("method", "noise_std", "particles")}
    observed = ObservedImage.read(options.known, options.observe, model.space, **how)
    how = {"label": model.space.label(options.label), "observed": observed}
    how |= {"guidance": 1.0 if options.guidance is None else options.guidance}
    sampler = ImageSampler.of(model, sampling, options.batch, precision=options.precision, **how)
    work, t_min = _work(options, SampleRequest(sampler, seeds, model.digest)), model.t_min
    if state.is_main_process:
        print(sampler.plan, file=sys.stderr)
    if state.is_main_process and t_min is not None and sampler.t_end < t_min:
        note = f"note: t_end = {sampler.t_end:g} is below training.t_min = {t_min:g}: the network "
        print(f"{note}was not trained at such times", file=sys.stderr)
    return work


def _pipeline_request(options: Namespace, seeds: range, device: Any) -> Any:
    """Request for images of a pipeline; raise a SettingError for options that it does not take."""
    from cldsde.images.sample import SampleRequest
    from cldsde.images.sample.source import PipelineSampler

    msg = "must be left out for a pipeline of diffusers"
    reject(options, _NOT_FOR_PIPELINES, msg)
    require(options.precision == "fp32", "precision", msg)
    require(not options.channels_last, "channels_last", msg)
    names = ("prompt", "negative_prompt", "label", "guidance", "nfe", "batch")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    chosen = options.solver in {None, "recommended"}
    how["solver"] = None if chosen else find_solver(options.solver, "recommended")
    how["settings"] = None
    if options.settings:
        reject(options, ("solver", "nfe"), "must be left out with --settings, which replaces it")
        how["settings"], *more = settings_of(options)
        require(not more, "settings", "must be one file")
    sampler = PipelineSampler.load(options.model, process_config(options), device, **how)
    return SampleRequest(sampler, seeds, sampler.digest())


def _work(options: Namespace, request: Any) -> Callable[[], None]:
    """Check the output, and return the work."""
    from cldsde.images.sample.outputs import check_output, draw_to

    seeds, out = request.seeds, options.out
    check_output(out, request, overwrite=options.overwrite)

    def work() -> None:
        nfe = draw_to(out, request)
        if nfe is not None:
            print(f"Images of {counted(len(seeds), 'seed')} are in {out.resolve()}")
            print(f"Score evaluations per image: {nfe:.4g}")

    return work
