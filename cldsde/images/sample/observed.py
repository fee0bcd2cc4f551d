"""Images given an observation of them: inpainting, colourisation, super-resolution, deblurring."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from scipy.linalg import helmert
from torch import Tensor

from cldsde.errors import require, setting
from cldsde.images.data import to_unit
from cldsde.images.data.pictures import fitted, pixels_of_picture, read_picture
from cldsde.images.model import ImageSpace
from cldsde.images.schema import check_name
from cldsde.images.streams import stream
from cldsde.linear import LinearSDE
from cldsde.linear.checks import check_positive
from cldsde.score import Observation, PosteriorScore, Score
from cldsde.solvers import ExponentialMultistep, Imputation, Plan, sample_posterior
from cldsde.solvers.authoring import Solver

ObservedMethod = Literal["moments", "pigdm", "dps", "twisted", "replacement"]
_OPERATORS = re.compile(r"mask|grey|downsample:[1-9]\d*|blur:\d*\.?\d+(e-?\d+)?")

# Stability of DPS, see `Conditioning.check_steps`: in 68 settings for trained digits no
# posterior was lost below 2.7, and with masks and blurs every one above 5.
_LARGEST_GAIN = 4.0
_TWISTED = ExponentialMultistep(order=2, stochasticity=1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class ObservedImage:
    """A picture of an image that is to be sampled, and the method of sampling given it.

    Attributes
    ----------
    known
        The observed picture, ``(C, h, w)`` uint8.
    operator
        How it was observed. ``"mask"``: some pixels; ``"grey"``: the mean of the colour channels;
        ``"downsample:4"``: means of blocks of 4×4 pixels; ``"blur:1.5"``: a Gaussian blur with a
        standard deviation of 1.5 pixels and black surroundings.
    mask
        Bool ``(h, w)``, True for observed pixels, if the operator is ``"mask"``.
    method
        ``"moments"``, ``"pigdm"`` or ``"dps"``: a method of `PosteriorScore`. ``"dps"`` raises an
        error if the steps are too long for the noise. ``"twisted"``: `sample_posterior` with
        ``"pigdm"``, one run per image. ``"replacement"``: `Imputation`, which ignores the noise.
    noise_std
        Standard deviation of the noise of the picture, in the scale of the model: from −1 to 1.
    particles
        Particles per image of ``"twisted"``.
    """

    known: Tensor
    operator: str
    mask: Tensor | None = None
    method: ObservedMethod = "moments"
    noise_std: float = 0.05
    particles: int = 16

    def __post_init__(self) -> None:
        check_name(self.method, get_args(ObservedMethod), "method")
        msg = f"must be finite and positive; got {self.noise_std:g}"
        require(0 < self.noise_std < math.inf, "noise_std", msg)
        require(self.particles >= 1, "particles", f"must be at least 1; got {self.particles}")
        msg = f"must be 'mask', 'grey', 'downsample:N' or 'blur:STD'; got {self.operator!r}"
        require(_OPERATORS.fullmatch(self.operator) is not None, "observe", msg)
        seen = self.operator != "mask" or (self.mask is not None and bool(self.mask.any()))
        require(seen, "observe", "must mark some pixels in white; it is all black")

    @classmethod
    def read(
        cls, known: Path | None, observe: str | None, space: ImageSpace, **options: Any
    ) -> Self | None:
        """Read the picture ``known`` that a command names; None if it names none.

        ``observe`` is the operator, or a picture of the mask, white for observed pixels. Both are
        cropped and resized as pictures of a training are, to the model's size or its blocks.
        """
        options = {key: x for key, x in options.items() if x is not None}
        if known is None or observe is None:
            given = {"known": known, "observe": observe, **options}
            key = next((key for key, x in given.items() if x is not None), None)
            msg = "needs `known` and `observe`: the picture, and how it was observed"
            require(key is None, str(key), msg)
            return None
        channels, height, width = space.shape
        made = f"{channels} channels, levels {space.levels}"
        msg = f"needs a model of pictures; this one makes {made}"
        require(channels in {1, 3} and isinstance(space.levels, int), "known", msg)
        observe, mask = "grey" if observe == "gray" else observe, None
        name, _, number = observe.partition(":")
        if name not in {"grey", "downsample", "blur"}:
            file, shape = Path(observe).expanduser(), (1, height, width)
            msg = f"must be a picture, 'grey', 'downsample:N' or 'blur:STD'; there is no {file}"
            require(os.path.exists(file), "observe", msg)
            mask = _read(file, shape, "observe")[0] >= 128
        block = int(number) if name == "downsample" and _OPERATORS.fullmatch(observe) else 1
        picture = _read(known, (channels, height // block, width // block), "known")
        operator = observe if mask is None else "mask"
        return cls(known=picture, operator=operator, mask=mask, **options)

    def recipe(self) -> dict[str, object]:
        """Everything that the samples depend on, in JSON types."""
        pictures = [None if x is None else x.numpy().tobytes() for x in (self.known, self.mask)]
        digests = [x and hashlib.sha256(x).hexdigest() for x in pictures]
        names = ("operator", "method", "noise_std", "particles")
        return {"known_and_mask_sha256": digests, **{x: getattr(self, x) for x in names}}

    def of(self, space: ImageSpace, device: torch.device | str) -> Conditioning:
        """The method for images of a model; raise a SettingError if the picture does not fit."""
        known = (self.known + 0.5) / 128 - 1 if space.dequantised else to_unit(self.known)
        mask = None if self.mask is None else self.mask.to(device)
        name, _, number = self.operator.partition(":")
        with setting("observe"):
            seen = _observation(name, number, known.to(device), mask, self.noise_std)
        msg = f"is a picture of images of shape {seen.shape}; the model makes {space.shape}"
        require(seen.shape == space.shape, "known", msg)
        msg = f"'grey' needs a model of colour images; this one makes {space.shape}"
        require(name != "grey" or space.shape[0] == 3, "observe", msg)
        msg = f"'replacement' needs a mask or 'grey'; got {self.operator!r}"
        require(self.method != "replacement" or name in {"mask", "grey"}, "method", msg)
        return Conditioning(self, seen, known.to(device))


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Score, solver and solution given an observation; see `ObservedImage.of`."""

    observed: ObservedImage
    observation: Observation
    known: Tensor

    @property
    def particles(self) -> int:
        """Particles per image; 0 for methods without particles."""
        return self.observed.particles if self.observed.method == "twisted" else 0

    def score(self, score: Score, sde: LinearSDE) -> Score:
        """The score given the observation, if the method has one."""
        method = self.observed.method
        if method == "twisted" or method == "replacement":  # noqa: PLR1714 mypy narrows this form
            return score
        return PosteriorScore(score, self.observation, method, sde=sde)

    def solver(self, solver: Solver) -> Solver:
        """The solver, with replacement if that is the method; raise a SettingError if it cannot."""
        msg = "must be multistep-2-sde, of which 'twisted' takes steps"
        require(not self.particles or solver == _TWISTED, "solver", msg)
        if self.observed.method != "replacement":
            return solver
        require(not solver.facts.adaptive, "solver", "must have a grid of times for 'replacement'")
        mask, basis = self.observed.mask, None
        if mask is None:  # grey, the first vector of the basis
            mask = torch.eye(3, 1, dtype=torch.bool, device="cpu")[..., None]
            basis = torch.from_numpy(helmert(3, full=True))
        return Imputation(solver, self.known, mask.to(self.known.device), basis=basis)

    def end(self, sde: LinearSDE, end: float) -> float:
        """An end of sampling that is early enough: later noise would blur the posterior."""
        if self.observed.method == "replacement":
            return end
        latest = self.observation.end_time(sde, self.observation.shape or ())
        msg = f"is so small that sampling would end before 1e-8, at t = {latest:g}; got "
        require(latest >= 1e-8, "noise_std", f"{msg}{self.observed.noise_std:g}")
        return min(end, latest)

    def check_steps(self, plan: Plan) -> None:
        """Raise a SettingError if the steps are too long for DPS, which then diverges.

        A step from κ to κ + h changes the data prediction of DPS by (1 − e^−h) σ²v²/(v + σ²)² / s²
        of its error, for noise levels σ = e^−κ, noise s of the picture and variance v = 1 of data.
        """
        if self.observed.method != "dps" or plan.solver.facts.adaptive:
            return
        levels = plan.process.sde.kappa(plan.times)
        variance = (-2 * levels[:-1]).exp()
        gain = -torch.expm1(-levels.diff()) * 1 / ((1 + variance) * (1 + 1 / variance))
        least = math.sqrt(float(gain.max()) / _LARGEST_GAIN)
        msg = f"'dps' diverges with {len(gain)} steps if `noise_std` is below {least:.2g}; got "
        msg += f"{self.observed.noise_std:g}. Use 'moments' or 'pigdm', which do not, or more steps"
        require(self.observed.noise_std >= least, "method", msg)

    def sample(self, plan: Plan, seeds: Sequence[int], *, chunk: int) -> tuple[Tensor, Tensor]:
        """Data ``(N, C, H, W)`` and their score evaluations ``(N,)``, a posterior run per seed."""
        count = self.particles
        how: Any = {"method": "pigdm", "denoise": plan.denoise, "chunk": chunk, "particles": count}
        given = (plan.process, self.observation, plan.times)
        found = sample_posterior(*given, seed=seeds, device=self.known.device, **how)
        weights = zip(found.log_weights.reshape(-1, count).softmax(1), seeds, strict=True)
        # The run draws its numbers from the seed itself, so the choice has another stream.
        numbers = [torch.multinomial(w, 1, generator=stream(x, "particle")) for w, x in weights]
        data = found.samples.reshape(-1, count, *found.samples.shape[1:])
        evaluations = torch.full((len(seeds),), count * found.nfev, device="cpu")
        return data[torch.arange(len(seeds), device="cpu"), torch.cat(numbers)], evaluations


def _observation(
    name: str, number: str, y: Tensor, mask: Tensor | None, noise_std: float
) -> Observation:
    """How a picture ``(C, h, w)`` was observed; raise a ValueError if something does not fit."""
    if name == "mask":
        assert mask is not None
        if mask.shape != y.shape[1:]:
            shapes = f"{tuple(y.shape[1:])}; got {tuple(mask.shape)}"
            raise ValueError(f"the mask must have the picture's shape {shapes}")
        return Observation.mask(mask.expand_as(y), y, noise_std)
    if name == "grey":
        seen = y.mean(0, keepdim=True)
        return Observation(lambda x: x.mean(1, keepdim=True), seen, noise_std, tuple(y.shape))
    if name == "downsample":
        return Observation.downsample(int(number), y, noise_std)
    std = check_positive(float(number), "blur")
    if std > max(y.shape[1:]):
        side = max(y.shape[1:])
        raise ValueError(f"blur must be at most {side}, the picture's side; got {std:g}")
    place = torch.arange(-math.ceil(3 * std), math.ceil(3 * std) + 1, device="cpu")
    row = (-0.5 * (place / std).square()).softmax(0)
    blurred = Observation.blur(torch.outer(row, row), y, noise_std)
    # Black is −1, and zeros surround the data: the blur is of data + 1.
    black = 1 - blurred.forward(torch.ones_like(y).unsqueeze(0))[0]
    return Observation(blurred.forward, y + black, noise_std, blurred.shape)


def _read(file: Path, shape: Sequence[int], key: str) -> Tensor:
    with setting(key):
        image = read_picture(file, "L" if shape[0] == 1 else "RGB")
        return pixels_of_picture(fitted(image, *map(max, shape[1:], (1, 1)))).contiguous()
