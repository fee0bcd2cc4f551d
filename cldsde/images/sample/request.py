"""A request for samples of a trained model: checked before any work, drawn batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from cldsde.images.config import SamplingConfig
from cldsde.images.errors import SettingError
from cldsde.images.model import ImageModel
from cldsde.images.sample.observed import ObservedImage
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.sample.source import OtherDynamics

__all__ = ["SampleRequest"]

GRID_LIMIT = 4096
"""Images that a picture of a grid may hold."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleRequest:
    """A request for samples of a trained model.

    Attributes
    ----------
    model
        The model.
    sampling
        Solver and budget.
    seeds
        One for each image.
    batch
        Images sampled at once.
    label
        Class of all images; ``"all"``: class i modulo their number for seed i; None: no class.
    guidance
        Weight of the class, see `cldsde.GuidedScore`.
    observed
        A picture of what is known of the image, if anything.
    """

    model: ImageModel | OtherDynamics
    sampling: SamplingConfig
    seeds: range
    batch: int = 64
    label: int | Literal["all"] | None = None
    guidance: float = 1.0
    observed: ObservedImage | None = None

    def check(self) -> None:
        """Reject options that do not fit the model or each other, before any work is done.

        Raises
        ------
        SettingError
            If there are such options.
        """
        space = self.model.space
        if self.batch < 1:
            raise SettingError("batch", f"must be at least 1; got {self.batch}")
        if self.guidance < 0 or not np.isfinite(self.guidance):
            raise SettingError("guidance", f"must be finite and at least 0; got {self.guidance}")
        if self.guidance != 1 and space.always_classes:
            msg = "needs a network that was trained without classes, too (network.label_dropout)"
            raise SettingError("guidance", msg)
        if self.guidance != 1 and self.label is None:
            msg = f"needs a class to stress; got {self.guidance} and no class"
            raise SettingError("guidance", msg)
        if self.observed is not None and self.model.vae is not None:
            msg = "needs a process of pixels; the process of this model is of latent variables"
            raise SettingError("observe", msg)
        _ = self.sampler

    def batches(self) -> list[tuple[int | None, list[int]]]:
        """Classes and seeds of the batches; all images of a batch are of one class."""
        return self.sampler.batches(self.seeds)

    def draw(self, label: int | None, seeds: list[int]) -> Tensor:
        """Images of one batch, uint8."""
        return self.sampler.draw(seeds, label).images

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
        }

    def digest(self) -> str:
        """SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()

    def notes(self) -> list[str]:
        """Remarks on settings that are allowed, and probably not meant."""
        t_min, t_end = self.model.t_min, self.sampler.t_end
        if t_min is None or t_end >= t_min:
            return []
        return [
            (
                f"t_end = {t_end:g} is below training.t_min = {t_min:g}: the network "
                "was not trained at such times"
            )
        ]

    @cached_property
    def sampler(self) -> ImageSampler:
        """The sampler of the request."""
        model = self.model
        return ImageSampler(
            model.score,
            model.space,
            self.sampling,
            vae=model.vae,
            label=self.label,
            guidance=self.guidance,
            observed=self.observed,
            batch=self.batch,
        )
