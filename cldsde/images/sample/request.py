"""A request for samples of a trained model: checked before any work, sampled batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch

from cldsde.errors import SettingError
from cldsde.images.config import SamplingConfig
from cldsde.images.model import ImageModel
from cldsde.images.sample.observed import ObservedImage
from cldsde.images.sample.sampler import ImageSampler, Precision, Samples, Start
from cldsde.images.sample.source import Model
from cldsde.images.schema import check_name

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]

GRID_LIMIT = 4096
"""Largest number of images in a picture of a grid."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleRequest:
    """A request for samples of a trained model.

    Attributes
    ----------
    model, sampling
        The model; solver and budget.
    seeds, batch
        One seed for each image; images per batch.
    label, guidance
        Class of all images; ``"all"``: class i modulo their number for seed i; None: no class.
        Weight of the class, see `cldsde.GuidedScore`.
    observed
        An observation of the images, if any.
    precision, channels_last
        Precision of the network, and whether its weights and features are stored with channels
        last, which may be faster on a GPU.
    compile_mode
        Mode of ``torch.compile`` for the network; None does not compile it. ``"reduce-overhead"``
        replays CUDA graphs.
    """

    model: Model
    sampling: SamplingConfig
    seeds: range
    batch: int = 64
    label: int | Literal["all"] | None = None
    guidance: float = 1.0
    observed: ObservedImage | None = None
    precision: Precision = "fp32"
    compile_mode: CompileMode | None = None
    channels_last: bool = False

    def check(self) -> None:
        """Check the options against the model, before any work is done."""
        if self.batch < 1:
            raise SettingError("batch", f"must be at least 1; got {self.batch}")
        if self.guidance < 0 or not np.isfinite(self.guidance):
            raise SettingError("guidance", f"must be finite and at least 0; got {self.guidance}")
        if self.guidance != 1 and self.model.space.always_classes:
            msg = "needs a network that was trained without classes, too (network.label_dropout)"
            raise SettingError("guidance", msg)
        if self.guidance != 1 and self.label is None:
            msg = f"needs a class; got {self.guidance} and no class"
            raise SettingError("guidance", msg)
        check_name(self.precision, get_args(Precision), "precision")
        if self.compile_mode is not None:
            check_name(self.compile_mode, get_args(CompileMode), "compile_mode")
            if not isinstance(self.model, ImageModel):
                msg = "needs a run under its own process, whose network is compiled"
                raise SettingError("compile_mode", msg)
        if self.observed is not None and self.model.vae is not None:
            msg = "needs a process of pixels; the process of this model is of latent variables"
            raise SettingError("observe", msg)
        _ = self.sampler

    def draw(self, label: int | None, seeds: list[int], start: Start | None = None) -> Samples:
        """Sample one batch; see `ImageSampler.draw`."""
        return self.sampler.draw(seeds, label, start)

    def recipe(self) -> dict[str, object]:
        """Everything that the images and their parts depend on, in JSON types."""
        return {
            "weights": self.model.digest,
            "sampling": dataclasses.asdict(self.sampling),
            "batch": self.batch,
            "label": self.label,
            "guidance": self.guidance,
            "observed": None if self.observed is None else self.observed.recipe(),
            "seeds": [self.seeds.start, self.seeds.stop],
            # Left out in single precision, so that older samples can be resumed.
            **({} if self.precision == "fp32" else {"precision": self.precision}),
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

    @cached_property
    def sampler(self) -> ImageSampler:
        """The sampler of the request."""
        model = self.model
        if self.channels_last:
            model.score.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_mode is not None:
            # In place, so that names of weights stay.
            model.score.network.compile(mode=self.compile_mode)  # type: ignore[union-attr]
        return ImageSampler(
            *(model.score, model.space, self.sampling),
            vae=model.vae,
            label=self.label,
            guidance=self.guidance,
            observed=self.observed,
            batch=self.batch,
            precision=self.precision,
        )
