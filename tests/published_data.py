"""Small published networks: numbers of the reference codes, and checkpoints like theirs."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cldsde.pretrained import PublishedModel, load_cld_sgm, load_score_sde
from cldsde.pretrained.published_score import Parameterisation, PublishedScore

DATA = Path(__file__).parent / "data"

CHANNELS = {"channels": (4, 4), "blocks": 1, "attention": (4,)}
FOURIER = {"fourier_scale": 1.0}
DDPMPP = {"fir": False, "inputs_enter": "once"}
SKIPS = {"inputs_enter": "skip", "outputs_leave": "skip", "channels": (4, 8)}


def _model(code: Any, process: str, network: dict[str, Any], **more: Any) -> PublishedModel:
    how = {key: more.pop(key) for key in ("mixed", "numerical_eps", "levels") if key in more}
    how |= {"code": code, "log_clock": "fourier_scale" in network}
    more |= {"network": {**CHANNELS, **network}, "parameterisation": Parameterisation(**how)}
    return PublishedModel(process=process, shape=(1, 8, 8), **more)


VE = {"sigma_min": 0.02, "sigma_max": 100.0}
WIDE = {"sigma_min": 0.02, "sigma_max": 696.0}
LEVELS = (50.0, 0.01, 1000)
_cld_sgm = partial(_model, "cld-sgm", mixed=True)
_ve = partial(_model, "score-sde-ve", "VESDE", options=VE, sigmas=LEVELS)
_vp = partial(_model, "score-sde-vp", sigmas=LEVELS)
CLD_SGM = {
    "cld_fourier": _cld_sgm("CLD", {**FOURIER, "channels": (4, 8)}, numerical_eps=1e-9),
    "cld_positional": _cld_sgm(
        "CLD", {**DDPMPP, "blocks": 2}, numerical_eps=1e-6, options={"beta": (0.1, 7.0)}
    ),
    "vp_mixed": _cld_sgm("VPSDE", FOURIER),
}
SCORE_SDE = {
    "ve_fourier": _ve(FOURIER),
    "ve_skips": _ve({**FOURIER, **SKIPS}, options=WIDE, sigmas=(348.0, 0.01, 2000)),
    "ve_levels": _ve({}, levels=1000),
    "vp": _vp("VPSDE", DDPMPP),
    "vp_levels": _vp("VPSDE", DDPMPP, levels=1000),
    "subvp": _vp("SubVPSDE", {}),
}
MODELS = CLD_SGM | SCORE_SDE


@cache
def _arrays(file: str) -> dict[str, Any]:
    with np.load(DATA / f"{file}.npz") as found:
        return dict(found)


def case(name: str) -> dict[str, Any]:
    """Arrays of a case, as tensors; names as a list."""
    arrays = _arrays("cld_sgm" if name in CLD_SGM else "score_sde")
    own = {key.partition("/")[2]: x for key, x in arrays.items() if key.startswith(f"{name}/")}
    names = json.loads(str(own.pop("names")))
    return {"names": names, **{key: torch.from_numpy(x) for key, x in own.items()}}


def checkpoint(name: str) -> dict[str, Any]:
    """A checkpoint as the code writes it; averaged weights are zero in the model itself."""
    found, start = case(name), 0
    model, average = OrderedDict(), []
    if "sigmas" in found:
        first, last, count = found["sigmas"].tolist()
        table = np.exp(np.linspace(np.log(first), np.log(last), int(count)))
        model["module.sigmas"] = torch.from_numpy(table)
    for key, shape in found["names"]:
        size = int(np.prod(shape))
        x = found["weights"][start : start + size].float().reshape(shape)
        start += size
        learnt = not key.endswith("0.W") or key.count(".") > 2
        model[f"module.{key}"] = torch.zeros_like(x) if learnt else x
        average += [x] if learnt else []
    ema = {"decay": 0.9999, "num_updates": 5, "shadow_params": average}
    # The codes compute learning rates with NumPy, and the optimiser keeps them so.
    optimiser = {"state": {}, "param_groups": [{"lr": np.float64(1e-4) * np.minimum(0.5, 1.0)}]}
    return {"optimizer": optimiser, "model": model, "ema": ema, "step": 5}


def save_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a case, in a file."""
    file = folder / f"{name}.pth"
    torch.save(checkpoint(name), file)
    return file


def load(name: str, folder: Path, model: PublishedModel | None = None) -> PublishedScore:
    """The score of a case's checkpoint, by the loader of its code."""
    loader = load_cld_sgm if name in CLD_SGM else load_score_sde
    return loader(save_checkpoint(name, folder), model or MODELS[name])
