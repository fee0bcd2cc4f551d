"""Noise levels, prediction and time of a network, read from its scheduler of diffusers.

In a pipeline, data predictions are clipped as the scheduler clips them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.interpolants import AlphasCumprod
from cldsde.score import NoisePath
from cldsde.score.conversion import Prediction

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "velocity",
}
# Schedulers put this value in place of ᾱ = 0.
_NO_SIGNAL = 2.0**-24
# A κ without signal in float32, for arithmetic that must not meet −∞.
LEAST_KAPPA = -40.0
_CLIPS = ("thresholding", "clip_sample")
# Schedulers that have an option to clip and do not read it.
_NEVER_CLIP = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# Schedulers that keep the network's noise prediction when they clip the data prediction.
_KEEPS_NOISE = ("DDIMScheduler", "DDIMParallelScheduler")


@dataclass(frozen=True, eq=False)
class Convention:
    """Levels, prediction and time of a network on x = α x_0 + σ n.

    Either α² + σ² = 1 with a table of levels, or α + σ = 1 (flow matching).
    """

    predicts: Prediction
    steps: int  #: Time of the scheduler at σ = 1 of a flow, or number of levels of the table.
    #: κ of the noisiest level that the network can denoise, which may be −∞, and of the last one.
    ends: tuple[float, float]
    table: Tensor | None = None  #: κ_i of the table, ``(N,)`` float64; −∞ only at its end.
    continuous: bool = False  #: Whether the time is log(σ/α)/4 in place of an index.

    @classmethod
    def of(cls, scheduler: Any) -> Convention:
        """Read it from a scheduler; raise ValueError if its levels or prediction are unknown."""
        config, name = scheduler.config, type(scheduler).__name__
        if "Inverse" in name:
            raise ValueError(f"scheduler: {name} adds noise; pass the one that removes it")
        prediction = config.get("prediction_type", "epsilon")
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            if config.get("invert_sigmas"):
                raise ValueError(
                    f"scheduler: {name} with invert_sigmas has noise at time 0, which is unknown "
                    "here"
                )
            steps = config.num_train_timesteps
            low, high = (vars(scheduler).get(end) for end in ("sigma_min", "sigma_max"))
            low, high = float(low or 1 / steps), float(high or 1.0)
            return cls("flow", steps, (_flow_kappa(high), _flow_kappa(low)))
        found = getattr(scheduler, "alphas_cumprod", None)
        if found is None or prediction not in _PREDICTIONS:
            raise ValueError(
                f"scheduler: levels and prediction of {name} (prediction_type={prediction!r}) are "
                "unknown here; known are schedulers with alphas_cumprod that predict "
                f"{', '.join(_PREDICTIONS)}, and flow-matching schedulers. Wrap the network as a "
                "denoiser(u, sigma) instead"
            )
        alphas = found.detach().cpu().double()
        if config.get("rescale_betas_zero_snr") and float(alphas[-1]) <= _NO_SIGNAL:
            alphas = torch.cat([alphas[:-1], alphas.new_zeros(1)])
        predicts, table = _PREDICTIONS[prediction], 0.5 * alphas.logit()
        # A network that predicts the noise says nothing of the data if there is next to no signal.
        usable = table if predicts != "noise" else table[alphas > _NO_SIGNAL]
        ends = float(usable[-1]), float(usable[0])
        continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
        if continuous and config.get("sigma_min") and config.get("sigma_max"):
            ends = -math.log(config.sigma_max), -math.log(config.sigma_min)
        return cls(predicts, len(alphas), ends, table, continuous)

    @property
    def path(self) -> NoisePath:
        """Path of the levels that the network can denoise."""
        if self.table is None:
            noisiest, last = (
                torch.tensor(self.ends, dtype=torch.float64, device="cpu").neg().sigmoid().tolist()
            )
            return dataclasses.replace(NoisePath.linear(), interval=(last, noisiest))
        alphas = torch.sigmoid(2 * self.table)
        if self.ends[0] > -math.inf:
            return NoisePath.from_alphas_cumprod(alphas)
        found, last = AlphasCumprod(alphas, start=-1.0, end=self.steps - 1.0), self.steps - 1.0
        return NoisePath(found.signal, found.noise, interval=(0.0, last), inverse=self.times)

    def scales(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at values of κ, finite or not, in their type and on their device."""
        power = 1 if self.table is None else 2
        signal, noise = torch.sigmoid(power * kappa), torch.sigmoid(-power * kappa)
        return (signal, noise) if power == 1 else (signal.sqrt(), noise.sqrt())

    def times(self, kappa: Tensor) -> Tensor:
        """Times of the scheduler at values of κ, float64 ``(n,)``."""
        if self.table is None:
            return self.steps * torch.sigmoid(-kappa)
        if self.continuous:
            return -kappa / 4
        index = (torch.searchsorted(-self.table, -kappa) - 1).clamp(0, self.steps - 2)
        low, high = self.table[index], self.table[index + 1]
        # After the last entry with signal, the angle atan(α/σ) is linear, as in `AlphasCumprod`.
        angles = 1 - kappa.exp().atan() / low.exp().atan()
        return index + torch.where(high == -math.inf, angles, (low - kappa) / (low - high))

    def kappa(self, times: Tensor) -> Tensor:
        """κ at times of the scheduler ``(n,)``, on their device; −40 if there is no signal."""
        times = times if times.is_floating_point() else times.float()
        if self.table is None:
            share = times / self.steps
            return (torch.log1p(-share) - share.log()).clamp(min=LEAST_KAPPA)
        if self.continuous:
            return -4 * times
        table = self.table.clamp(min=LEAST_KAPPA).to(times)
        index = times.floor().clamp(0, self.steps - 2).long()
        low, high, share = table[index], table[index + 1], times - index
        angles = (low.exp().atan() * (1 - share)).tan().log().clamp(min=LEAST_KAPPA)
        return torch.where(high == LEAST_KAPPA, angles, low.lerp(high, share))

    def estimate(self, signal: float, noise: float) -> tuple[float, float]:
        """Coefficients of x and of the network's output in its prediction of the data."""
        known = {"data": (0.0, 1.0), "flow": (1.0, -noise), "velocity": (signal, -noise)}
        if self.predicts in known:
            return known[self.predicts]
        if signal == 0:
            raise ValueError(
                "scheduler: a network that predicts the noise (prediction_type='epsilon') cannot "
                "start at a level without signal (rescale_betas_zero_snr); use 'v_prediction'"
            )
        return 1 / signal, -noise / signal


def _flow_kappa(noise: float) -> float:
    return math.log1p(-noise) - math.log(noise) if noise < 1 else -math.inf


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
