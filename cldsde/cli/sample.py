"""Generate images from a trained run, or from a model of diffusers.

An image depends on its seed alone, in whatever batch or process it is sampled. A folder beside the
output keeps finished batches, so that the same command resumes, and that several processes, started
by ``torchrun``, share the work.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import (
    device_option,
    flag,
    needs_images,
    option,
    resolve_device,
    set_option,
)
from cldsde.solvers import named_solvers

if TYPE_CHECKING:
    from cldsde.images.config import SamplingConfig
    from cldsde.images.sample.source import Model


def add_sampling_arguments(parser: ArgumentParser, *, several: bool = False) -> None:
    """Declare the sampling settings; the defaults are the settings of the run."""
    more = ", or several with commas" if several else ""
    text = f"solver{more}: module:Class, or one of {', '.join(named_solvers())}"
    option(parser, "--solver", "NAME", text)
    kind = str if several else int
    option(parser, "--nfe", "N", f"score evaluations per image{more}", kind=kind)
    text = "grid of times: uniform, quadratic, root, log_snr, logistic or karras"
    option(parser, "--grid", "NAME", text)
    option(parser, "--t-start", "T", "time at which sampling starts", kind=float)
    option(parser, "--t-end", "EPS", "time at which sampling ends", kind=float)
    option(parser, "--denoise", "BOOL", "end with the prediction of the data", kind=bool)
    set_option(parser, "option of the solver, such as rtol=0.01", "OPTION=VALUE")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare the model to sample, if it is not a run or not under its own process."""
    text = "diffusers folder, or a file in it, to sample in place of a run"
    option(parser, "--model", "FOLDER|FILE", text, kind=Path)
    text = "process to sample with: CLD, VPSDE, …; the run's own by default, CLD with --model"
    option(parser, "--process", "NAME", text)
    text = "option of the process, such as beta=8.0; may be repeated"
    option(parser, "--process-set", "OPTION=VALUE", text, action="append", default=[])
    flag(parser, "--trust", "import the network that the run names by module:Class")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde sample``."""
    option(parser, "run", "RUN", "folder of a run of cldsde train", nargs="?", kind=Path)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    option(parser, "--seeds", "A-B", "seeds of the images, such as 0-49999; 0-63 by default")
    option(parser, "--seed", "N", "one seed, the same as --seeds N", kind=int)
    text = "FILE.npz, a picture of a grid (FILE.png), or a folder for one picture per image"
    option(parser, "--out", "PATH", text, kind=Path, default=Path("samples.png"))
    flag(parser, "--overwrite", "replace an existing file")
    option(parser, "--batch", "N", "images per batch", kind=int, default=64)
    text = "class to sample, by name or number, or 'all' to cycle through the classes by seed"
    option(parser, "--class", "NAME", text, dest="label")
    option(parser, "--guidance", "W", "weight of the class", kind=float, default=1.0)
    option(parser, "--known", "IMAGE", "picture that was observed", kind=Path)
    text = "the same as --observe grey"
    parser.add_argument(
        "--colourise", dest="observe", action="store_const", const="grey", help=text
    )
    text = (
        "relation of the picture to the images: a picture of a mask, white for observed "
        "pixels; grey; downsample:N, means of N×N pixels; blur:STD, a Gaussian of STD pixels"
    )
    parser.add_argument("--mask", "--observe", dest="observe", type=str, metavar="HOW", help=text)
    text = "moments, pigdm, dps, twisted (particles) or replacement (no noise; mask or grey)"
    option(parser, "--method", "NAME", text, default="moments")
    text = "standard deviation of the picture's noise, black being -1 and white 1"
    option(parser, "--noise-std", "S", text, kind=float, default=0.05)
    option(parser, "--particles", "N", "particles per image of twisted", kind=int, default=16)
    text = "precision of the network: fp32, bf16 or fp16"
    option(parser, "--precision", "NAME", text, default="fp32")
    text = "compile the network: default, reduce-overhead (CUDA graphs) or max-autotune"
    option(parser, "--compile", "MODE", text, dest="compile_mode", nargs="?", const="default")
    flag(parser, "--channels-last", "store features with channels last, may be faster on a GPU")
    device_option(parser)


def model_of(options: Namespace, run: Path | None, device: Any) -> Model:
    """The model that the options name."""
    from cldsde.images.config import ProcessConfig
    from cldsde.images.sample.source import of_diffusers, of_run
    from cldsde.images.schema import from_dict, parse_overrides

    if (run is None) == (options.model is None):
        raise ValueError("a run or --model is needed, one of them")
    changes = parse_overrides(options.process_set)
    if changes and options.process is None and run is not None:
        raise ValueError("--process-set needs --process")
    values = {"name": options.process or "CLD", "options": changes}
    process = from_dict(ProcessConfig, values, "process")
    if run is None:
        return of_diffusers(options.model, process, device)
    return of_run(run, process if options.process else None, device, trust=options.trust)


def sampling_of(options: Namespace, configured: SamplingConfig, **given: Any) -> SamplingConfig:
    """The sampling settings of the run, changed by options; code in them is not run."""
    from cldsde.errors import SettingError
    from cldsde.images.config import SamplingConfig
    from cldsde.images.sample.sampler import make_solver
    from cldsde.images.schema import from_dict, parse_overrides

    names = ("solver", "nfe", "grid", "t_start", "t_end", "denoise")
    given = {name: getattr(options, name) for name in names} | given
    given = {name: value for name, value in given.items() if value is not None}
    if "solver" not in given and ":" in configured.solver:
        msg = f"the run's own, {configured.solver}, is code outside of cldsde; name it here to run "
        raise SettingError("solver", f"{msg}it, or take another")
    values = dataclasses.asdict(configured) | given
    before = {} if "solver" in given else values["options"]
    values["options"] = {**before, **parse_overrides(options.set)}
    sampling = from_dict(SamplingConfig, values)
    if "nfe" in given and make_solver(sampling).facts.adaptive:
        msg = f"{sampling.solver} is adaptive; use --set rtol=… and --set atol=… instead"
        raise SettingError("nfe", msg)
    return sampling


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and load the model; return the remaining work."""
    with needs_images():
        from accelerate import PartialState

        from cldsde.images.sample import (
            ImageSampler,
            ObservedImage,
            SampleRequest,
            alone,
            check_output,
            draw_to,
            speed_up,
        )
    if options.seeds is not None and options.seed is not None:
        raise ValueError("--seed and --seeds are alternatives; got both")
    one = None if options.seed is None else str(options.seed)
    seeds, out = _seeds(options.seeds or one or "0-63"), options.out
    device = resolve_device(options.device)
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))
    model = model_of(options, options.run, state.device if device == "cuda" else device)
    speed_up(model, options.compile_mode, channels_last=options.channels_last)
    how = {name: getattr(options, name) for name in ("method", "noise_std", "particles")}
    channels = model.space.shape[0]
    sampler = ImageSampler.of(
        *(model, sampling_of(options, model.sampling)),
        label=model.space.label(options.label),
        observed=ObservedImage.read(options.known, options.observe, channels, **how),
        **{name: getattr(options, name) for name in ("batch", "guidance", "precision")},
    )
    request = SampleRequest(model, sampler, seeds)
    check_output(out, request, overwrite=options.overwrite)
    if state.is_main_process:
        with alone(out):
            pass

    def work() -> None:
        for note in request.notes() if state.is_main_process else ():
            print(f"note: {note}", file=sys.stderr)
        nfe = draw_to(
            *(out, request),
            process=state.process_index,
            processes=state.num_processes,
            wait=state.wait_for_everyone,
        )
        if nfe is not None:
            print(f"Images of {len(seeds):,} seeds are in {out.resolve()}")
            print(f"Score evaluations per image: {nfe:.4g}")

    return work


def _seeds(text: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last < 2**32:
        raise ValueError(f"--seeds must be A-B with 0 ≤ A ≤ B < 2³²; got {text!r}")
    return range(first, last + 1)
