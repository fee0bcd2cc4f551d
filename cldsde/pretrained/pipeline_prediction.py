"""Data predictions of a network in a pipeline, clipped as its own scheduler clips them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cldsde.pretrained.conventions import Convention

_CLIPS = ("thresholding", "clip_sample")
# Schedulers that have an option to clip and do not read it.
_NEVER_CLIP = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# Schedulers that keep the network's noise prediction when they clip the data prediction.
_KEEPS_NOISE = ("DDIMScheduler", "DDIMParallelScheduler")


class DataPrediction:
    """Data prediction from a network's output at the levels of a run.

    It is made from the pipeline's own scheduler, and the convention of its network.
    """

    def __init__(self, replaced: Any, convention: Convention) -> None:
        self._replaced, self._convention = replaced, convention
        name = type(replaced).__name__
        # A configuration may hold keys of other schedulers, which its class does not read.
        read = inspect.signature(type(replaced).__init__).parameters
        names = () if name in _NEVER_CLIP else _CLIPS
        self._clips = [x for x in names if x in read and replaced.config.get(x)]
        self._keeps_noise = bool(self._clips) and name in _KEEPS_NOISE

    def set_levels(self, signal: Sequence[float], noise: Sequence[float]) -> None:
        """Set α and σ of the levels; the last level has no prediction."""
        pairs = zip(signal[:-1], noise[:-1], strict=True)
        self._signal = signal
        self._estimates = [self._convention.estimate(*pair) for pair in pairs]

    def __call__(
        self, i: int, output: Tensor, x: Tensor, *, keeps_noise: bool
    ) -> tuple[Tensor, Tensor]:
        """Data prediction at level i, and the latents with it and the noise predicted before."""
        predicted = self._predicted(i, output, x)
        data = self._clipped(predicted)
        if keeps_noise and self._keeps_noise:
            x = x + self._signal[i] * (data - predicted)
        return data, x

    def _predicted(self, i: int, output: Tensor, x: Tensor) -> Tensor:
        learned = str(self._replaced.config.get("variance_type")).startswith("learned")
        if learned and output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(x.shape)}; got "
                f"{tuple(output.shape)}"
            )
        exact = torch.promote_types(x.dtype, torch.float32)
        of_x, of_output = self._estimates[i]
        data = of_output * output.to(exact)
        return data.add_(x.to(exact), alpha=of_x) if of_x else data

    def _clipped(self, data: Tensor) -> Tensor:
        """Data prediction clipped as the replaced scheduler clips it."""
        theirs = self._replaced
        if "thresholding" in self._clips:
            return theirs._threshold_sample(data)  # type: ignore[no-any-return]
        if "clip_sample" in self._clips:
            return data.clamp(*(sign * theirs.config.clip_sample_range for sign in (-1, 1)))
        return data
