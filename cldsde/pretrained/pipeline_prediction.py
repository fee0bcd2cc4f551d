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
    """Data prediction from a network's output at levels α and σ, by a pipeline's own scheduler."""

    def __init__(
        self, replaced: Any, convention: Convention, signal: Sequence[float], noise: Sequence[float]
    ) -> None:
        self._replaced, self._signal = replaced, signal
        self._estimates = [convention.estimate(*pair) for pair in zip(signal, noise, strict=True)]
        name = type(replaced).__name__
        # A configuration may hold keys of other schedulers, which its class does not read.
        read = inspect.signature(type(replaced).__init__).parameters
        names = () if name in _NEVER_CLIP else _CLIPS
        self._clips = [x for x in names if x in read and replaced.config.get(x)]
        self._keeps_noise = bool(self._clips) and name in _KEEPS_NOISE

    def __call__(
        self, i: int, output: Tensor, x: Tensor, *, keeps_noise: bool
    ) -> tuple[Tensor, Tensor]:
        """Data prediction at level i, and the latents with it and the noise predicted before."""
        config = self._replaced.config
        learned = str(config.get("variance_type")).startswith("learned")
        if learned and output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(x.shape)}; got "
                f"{tuple(output.shape)}"
            )
        exact = torch.promote_types(x.dtype, torch.float32)
        of_x, of_output = self._estimates[i]
        data = predicted = of_output * output.to(exact)
        if of_x:
            predicted.add_(x.to(exact), alpha=of_x)
        if "thresholding" in self._clips:
            data = self._replaced._threshold_sample(predicted)
        elif "clip_sample" in self._clips:
            data = predicted.clamp(-config.clip_sample_range, config.clip_sample_range)
        if keeps_noise and self._keeps_noise:
            x = x + self._signal[i] * (data - predicted)
        return data, x
