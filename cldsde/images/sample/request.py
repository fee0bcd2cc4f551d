"""A request for samples of a trained model in files, and what its samples depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cldsde.errors import SettingError
from cldsde.images.model import ImageModel, TrainedModel
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.schema import check_name

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """A request for samples of a trained model, one image for each seed.

    Attributes
    ----------
    model, sampler
        The model, and its sampler.
    seeds
        Integers in [0, 2³²).
    """

    model: ImageModel
    sampler: ImageSampler
    seeds: range

    def recipe(self) -> dict[str, object]:
        """Everything that the images and their parts depend on, in JSON types."""
        how = self.sampler
        return {
            "weights": self.model.digest,
            "sampling": dataclasses.asdict(how.sampling),
            "batch": how.batch,
            "label": how.label,
            "guidance": how.guidance,
            "observed": None if how.observed is None else how.observed.recipe(),
            "seeds": [self.seeds.start, self.seeds.stop],
            # Left out in single precision, so that older samples can be resumed.
            **({} if how.precision == "fp32" else {"precision": how.precision}),
        }

    def digest(self) -> str:
        """SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()

    def notes(self) -> list[str]:
        """Notes on settings that are allowed, but probably a mistake."""
        t_min, t_end = self.model.t_min, self.sampler.t_end
        if t_min is None or t_end >= t_min:
            return []
        msg = f"t_end = {t_end:g} is below training.t_min = {t_min:g}: the network was not trained "
        return [f"{msg}at such times"]


def speed_up(model: ImageModel, compile_mode: CompileMode | None, *, channels_last: bool) -> None:
    """Compile the network of a model, and store its weights and features with channels last.

    The model is changed in place, so that names of weights stay. The mode ``"reduce-overhead"``
    replays CUDA graphs; None compiles nothing. Raises a SettingError for a model that is not
    compiled.
    """
    if channels_last:
        model.score.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_mode is None:
        return
    check_name(compile_mode, get_args(CompileMode), "compile_mode")
    if not isinstance(model, TrainedModel):
        msg = "needs a run under its own process, whose network is compiled"
        raise SettingError("compile_mode", msg)
    model.model.score.network.compile(mode=compile_mode)
