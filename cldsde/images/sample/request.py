"""A request for samples of a trained model: checked before any work, drawn batch by batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cldsde.images.config import SamplingConfig
from cldsde.images.data import to_unit
from cldsde.images.data.pictures import pixels_of_picture, read_picture
from cldsde.images.errors import SettingError, setting
from cldsde.images.model import ImageModel
from cldsde.images.sample.sampler import ImageSampler, make_solver
from cldsde.images.sample.source import OtherDynamics
from cldsde.solvers import Imputation
from cldsde.solvers.authoring import Solver
from cldsde.solvers.sampling import device_of

__all__ = ["SampleRequest", "grey_basis"]

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
    known, mask
        Pictures of the image of which a part is kept, and of that part in white.
    colourise
        Keep the grey levels of the known picture instead of a part.
    """

    model: ImageModel | OtherDynamics
    sampling: SamplingConfig
    seeds: range
    batch: int = 64
    label: int | Literal["all"] | None = None
    guidance: float = 1.0
    known: Path | None = None
    mask: Path | None = None
    colourise: bool = False

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
        self._check_known()
        _ = self.sampler

    def _check_known(self) -> None:
        if self.known is None:
            if self.mask is not None or self.colourise:
                name = "mask" if self.mask is not None else "colourise"
                raise SettingError(name, "needs a known picture, of which a part is kept")
            return
        if self.model.vae is not None:
            msg = "needs a process of pixels; the process of this model is of latent variables"
            raise SettingError("known", msg)
        if (self.mask is None) != self.colourise:
            raise SettingError("known", "takes either a mask or colourisation")
        if make_solver(self.sampling).facts.adaptive:
            msg = f"needs a solver on a grid of times; {self.sampling.solver} chooses its times"
            raise SettingError("known", msg)

    def batches(self) -> list[tuple[int | None, list[int]]]:
        """Classes and seeds of the batches; all images of a batch are of one class."""
        return self.sampler.batches(self.seeds)

    def draw(self, label: int | None, seeds: list[int]) -> Tensor:
        """Images of one batch, uint8."""
        return self.sampler.draw(seeds, label).images

    def recipe(self) -> dict[str, object]:
        """Everything that the images and their parts depend on, in JSON types."""
        pictures = [
            None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (self.known, self.mask)
        ]
        return {
            "weights": self.model.digest,
            "sampling": dataclasses.asdict(self.sampling),
            "batch": self.batch,
            "label": self.label,
            "guidance": self.guidance,
            "known_and_mask_sha256": pictures,
            "colourise": self.colourise,
            "seeds": [self.seeds.start, self.seeds.stop],
        }

    def digest(self) -> str:
        """SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()

    def notes(self) -> list[str]:
        """Remarks on settings that are allowed, and probably not meant."""
        t_min, t_end = self.model.t_min, self.sampling.t_end
        if t_min is None or t_end is None or t_end >= t_min:
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
            around=self._around,
            batch=self.batch,
        )

    @cached_property
    def _around(self) -> Callable[[Solver], Imputation] | None:
        """Makes an imputation of a solver; its tensors are on the device of the states."""
        if self.known is None:
            return None
        shape = self.model.space.shape
        device = device_of(self.model.score)
        known = _picture(self.known, shape, "known")
        known = (known + 0.5) / 128 - 1 if self.model.space.dequantised else to_unit(known)
        known = known.to(device)
        if self.colourise:
            if shape[0] != 3:
                msg = f"needs a model of colour images; this one makes {shape}"
                raise SettingError("colourise", msg)
            grey = torch.tensor([True, False, False], device=device).reshape(3, 1, 1)
            return lambda solver: Imputation(solver, known, grey, basis=grey_basis())
        assert self.mask is not None
        mask = _picture(self.mask, (1, *shape[1:]), "mask").to(device) >= 128
        if mask.device.type != "meta" and not bool(mask.any()):
            msg = f"{self.mask} is all black: white marks the part that is kept"
            raise SettingError("mask", msg)
        return lambda solver: Imputation(solver, known, mask)


def grey_basis() -> Tensor:
    """Orthonormal basis of the three channels whose first vector is grey, for colourisation.

    Returns
    -------
    Tensor
        ``(3, 3)`` float64, one vector per row: (1, 1, 1)/√3, (1, −1, 0)/√2, (1, 1, −2)/√6.
    """
    rows = [[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]
    basis = torch.tensor(rows, dtype=torch.float64)
    return basis / basis.square().sum(1, keepdim=True).sqrt()


def _picture(file: Path, shape: tuple[int, int, int], key: str) -> Tensor:
    """A picture as ``(C, H, W)`` uint8."""
    channels, height, width = shape
    with setting(key):
        image = read_picture(file, "L" if channels == 1 else "RGB")
    if image.size != (width, height):
        msg = (
            f"{file} must have {height} rows and {width} columns; got "
            f"{image.size[1]} and {image.size[0]}"
        )
        raise SettingError(key, msg)
    return pixels_of_picture(image).contiguous()
