"""Generate images from a trained run, or from a model of diffusers.

Image i is that of seed i, whatever batch or process it is drawn in. A folder beside the output
keeps what is done, so that an interrupted command goes on where it was left, and that several
processes, started by ``torchrun``, share the work.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from cldsde.cli.options import INTERRUPTED, add_device_argument, needs_images, resolve_device
from cldsde.solvers import named_solvers

if TYPE_CHECKING:
    from cldsde.images.model import ImageModel, ImageSpace
    from cldsde.images.sample.source import OtherDynamics

__all__ = [
    "INTERRUPTED",
    "add_arguments",
    "add_model_arguments",
    "add_sampling_arguments",
    "model_of",
    "prepare",
    "sampling_of",
]


def add_sampling_arguments(parser: ArgumentParser, *, several: bool = False) -> None:
    """Declare what says how to sample; what is left out is taken from the run's configuration."""
    more = ", or several with commas" if several else ""
    parser.add_argument(
        "--solver",
        type=str,
        metavar="NAME",
        help=f"solver{more}: module:Class, or one of {', '.join(named_solvers())}",
    )
    parser.add_argument(
        "--nfe", type=str if several else int, metavar="N", help=f"score evaluations{more}"
    )
    parser.add_argument(
        "--grid",
        type=str,
        metavar="NAME",
        help="grid of times: uniform, quadratic, root, log_snr, logistic or karras",
    )
    parser.add_argument("--t-start", type=float, metavar="T", help="time at which sampling starts")
    parser.add_argument("--t-end", type=float, metavar="EPS", help="time at which sampling ends")
    parser.add_argument(
        "--denoise", type=bool, metavar="BOOL", help="end with the prediction of the data"
    )
    parser.add_argument(
        "--set",
        type=str,
        action="append",
        metavar="OPTION=VALUE",
        help="option of the solver, such as rtol=0.01; may be repeated",
    )


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``cldsde sample``."""
    parser.add_argument(
        "run", type=str, nargs="?", metavar="RUN", help="folder of a run of cldsde train"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--seeds", type=str, metavar="A-B", help="of the images, such as 0-49999; 0-63 by default"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="one image, that of this seed; same as --seeds N"
    )
    parser.add_argument(
        "--out",
        type=str,
        metavar="PATH",
        default="samples.png",
        help="FILE.npz, a picture of a grid (FILE.png), or a folder for one picture an image",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--batch", type=int, metavar="N", default=64, help="images sampled at once")
    parser.add_argument(
        "--class",
        dest="label",
        type=str,
        metavar="NAME",
        help="class to sample, by name or number, or 'all' to cycle through the classes by seed",
    )
    parser.add_argument(
        "--guidance", type=float, metavar="W", default=1.0, help="weight of the class"
    )
    add_observation_arguments(parser)
    add_device_argument(parser)


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare the model to sample, if it is not a run or not under its own process."""
    parser.add_argument(
        "--model",
        type=str,
        metavar="FOLDER|FILE",
        help="diffusers folder, or a file in it, to sample in place of a run",
    )
    parser.add_argument(
        "--process",
        type=str,
        metavar="NAME",
        help="process to sample with: CLD, VPSDE, …; the run's own by default, CLD with --model",
    )
    parser.add_argument(
        "--process-set",
        type=str,
        action="append",
        metavar="OPTION=VALUE",
        help="option of the process, such as beta=8.0; may be repeated",
    )


def add_observation_arguments(parser: ArgumentParser) -> None:
    """Declare the picture of what is known of the images, and the method of sampling given it."""
    parser.add_argument("--known", type=str, metavar="IMAGE", help="picture that was observed")
    parser.add_argument(
        "--colourise",
        dest="observe",
        action="store_const",
        const="grey",
        help="the same as --observe grey",
    )
    parser.add_argument(
        "--mask",
        "--observe",
        dest="observe",
        type=str,
        metavar="HOW",
        help="relation of the picture to the images: a picture of a mask, white for observed "
        "pixels; grey; downsample:N, means of N×N pixels; blur:STD, a Gaussian of STD pixels",
    )
    parser.add_argument(
        "--method",
        type=str,
        metavar="NAME",
        default="moments",
        help="moments, pigdm, dps, twisted (particles) or replacement (no noise; mask or grey)",
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        metavar="S",
        default=0.05,
        help="standard deviation of the picture's noise, black being -1 and white 1",
    )
    parser.add_argument(
        "--particles", type=int, metavar="N", default=16, help="particles per image of twisted"
    )


def model_of(options: Namespace, run: str | None, device: Any) -> ImageModel | OtherDynamics:
    """The model that the options name.

    Raises
    ------
    ValueError
        If it cannot be used.
    """
    from cldsde.images.config import ProcessConfig
    from cldsde.images.sample.source import of_diffusers, of_run
    from cldsde.images.schema import from_dict, parse_overrides

    if (run is None) == (options.model is None):
        msg = "a run or --model is needed, one of them"
        raise ValueError(msg)
    changes = parse_overrides(options.process_set or [])
    if options.process is None and run is not None:
        if changes:
            msg = "--process-set needs --process"
            raise ValueError(msg)
        return of_run(Path(run).expanduser(), None, device)
    values = {"name": options.process or "CLD", "options": changes}
    process = from_dict(ProcessConfig, values, "process")
    if run is not None:
        return of_run(Path(run).expanduser(), process, device)
    return of_diffusers(Path(options.model).expanduser(), process, device)


def sampling_of(options: Namespace, configured: Any) -> Any:
    """The run's sampling section with what the command line says otherwise.

    Raises
    ------
    ValueError
        If something does not fit, or the run's own solver is code: a run's files never bring code
        to be run.
    """
    from cldsde.images.config import SamplingConfig
    from cldsde.images.errors import SettingError
    from cldsde.images.sample.sampler import make_solver
    from cldsde.images.schema import from_dict, parse_overrides

    if options.solver is None and ":" in configured.solver:
        msg = (
            f"the run's own, {configured.solver}, is code outside of cldsde; name it here if it is "
            "to be run, or take another"
        )
        raise SettingError("solver", msg)
    names = ("solver", "nfe", "grid", "t_start", "t_end", "denoise")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    values = dataclasses.asdict(configured) | given
    if "solver" in given:
        values["options"] = {}
    values["options"] = {**values["options"], **parse_overrides(options.set or [])}
    sampling = from_dict(SamplingConfig, values)
    if "nfe" in given and make_solver(sampling).facts.adaptive:
        msg = f"{sampling.solver} chooses its own times; take --set rtol=… and --set atol=… instead"
        raise SettingError("nfe", msg)
    return sampling


def prepare(options: Namespace) -> Callable[[], None]:
    """Check the options and load the model; return the work that is left.

    Raises
    ------
    ImportError
        If the extra ``images`` is not installed.
    ValueError
        If the run cannot be used, or an option does not fit it.
    OSError
        If the output cannot be written.
    """
    with needs_images():
        from accelerate import PartialState

        from cldsde.images.sample import ObservedImage, SampleRequest, alone, check_output, draw_to
    if options.seeds is not None and options.seed is not None:
        msg = "--seed and --seeds are alternatives; got both"
        raise ValueError(msg)
    one = None if options.seed is None else str(options.seed)
    seeds = _seeds(options.seeds or one or "0-63")
    device = resolve_device(options.device)
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))
    model = model_of(options, options.run, state.device if device == "cuda" else device)
    request = SampleRequest(
        model=model,
        sampling=sampling_of(options, model.sampling),
        seeds=seeds,
        batch=options.batch,
        label=_label(options.label, model.space),
        guidance=options.guidance,
        observed=ObservedImage.read(
            None if options.known is None else Path(options.known).expanduser(),
            options.observe,
            model.space.shape[0],
            method=options.method,
            noise_std=options.noise_std,
            particles=options.particles,
        ),
    )
    out = Path(options.out).expanduser()
    request.check()
    check_output(out, request, overwrite=options.overwrite)
    if state.is_main_process:
        with alone(out):
            pass

    def work() -> None:
        for note in request.notes() if state.is_main_process else ():
            print(f"note: {note}", file=sys.stderr)
        draw_to(
            out,
            request,
            process=state.process_index,
            processes=state.num_processes,
            wait=state.wait_for_everyone,
        )
        if state.is_main_process:
            print(f"Images of {len(seeds):,} seeds are in {out.resolve()}")

    return work


def _seeds(text: str) -> range:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last < 2**32:
        msg = f"--seeds must be A-B with 0 ≤ A ≤ B < 2³²; got {text!r}"
        raise ValueError(msg)
    return range(first, last + 1)


def _label(text: str | None, space: ImageSpace) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all" and space.classes is not None:
        return "all"
    return space.class_number(text)
