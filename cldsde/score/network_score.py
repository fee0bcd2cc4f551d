"""Scores from networks: how they are called, in whatever form the network enters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, final

import torch
from torch import Tensor, nn

from cldsde.linear.checks import TimeLike, check_state, one_of
from cldsde.linear.sde import LinearSDE
from cldsde.score.conversion import MEASURED, TRAINED, Conversion, Prediction
from cldsde.score.denoiser_score import ScoreDenoiser
from cldsde.score.denoisers import input_dtype
from cldsde.score.matching import PerturbedData, Weighting
from cldsde.score.protocol import Score
from cldsde.score.times import Coefficients, PlannedTime, coefficients_at, score_times

Inputs = Literal["state", "estimate"]
"""Input of the network: all components, or the best unbiased estimate of the data."""


class NetworkScore(Score, ABC, Generic[Coefficients]):
    """Score of the driven components from a network; the base of `MixedScore`."""

    network: nn.Module
    sde: LinearSDE
    inputs: Inputs

    @property
    def denoiser(self) -> ScoreDenoiser:
        """The model's denoiser D(u, σ, condition=…), for sampling with other processes.

        If the network's input is a state of several components, noise fills the state up; see
        `ScoreDenoiser`.
        """
        return ScoreDenoiser(self, fill=self.inputs == "state")

    def forward(
        self,
        z: Tensor,
        t: TimeLike,
        *,
        planned: PlannedTime | None = None,
        prediction: Prediction = "score",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score of the driven components, or another prediction, ``(B, len(driven), *D)``.

        Parameters
        ----------
        z, planned
            See `Score`.
        t
            One time or ``(B,)``, above 0.
        prediction
            ``"score"``, ``"noise"``, ``"data"`` of shape ``(B, *D)``, or for processes of one
            component ``"velocity"`` or ``"flow"``; see `Conversion`. In the additive form of
            `MixedScore` the last three are exact even at t = 1 of `cldsde.RectifiedFlow`.
        condition
            Condition of each sample, ``(B, ...)``, or of all, 0-dimensional. It is passed to the
            network.

        Raises
        ------
        ValueError
            If shapes do not fit, ``prediction`` is unknown, or a time is not above 0.
        """
        one_of(prediction, TRAINED, "prediction")
        wide = check_state(z, self.sde.components).to(torch.promote_types(z.dtype, torch.float32))
        table = coefficients_at(
            self,
            t,
            wide,
            self._coefficients,
            wide.dtype,
            planned=planned,
            version=self._state_version(),
        )
        source, value = self._predict(wide, table, prediction, condition)
        if source != prediction:
            times = score_times(t, wide, planned)
            value = Conversion.at(self.sde, times, source, prediction)(wide, value)
        return value.to(z.dtype)

    def data_prediction(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``; see `forward`."""
        found: Tensor = self(z, t, prediction="data", **options)
        return found

    @final
    def loss(
        self,
        pair: PerturbedData,
        *,
        prediction: Prediction = "noise",
        weighting: Weighting = "reweighted",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score-matching loss of each sample, ``(B,)``; see `PerturbedData.loss`.

        Parameters
        ----------
        pair
            Perturbed data of the score's process. `MixedScore` uses their kernels.
        prediction
            Quantity whose squared error is the loss: ``"noise"``, or for processes of one component
            ``"velocity"`` or ``"flow"``. The meaning of the network's output does not change.
        weighting, condition
            See `Weighting` and `forward`.
        """
        one_of(prediction, MEASURED, "prediction")
        direct = self._direct_loss(pair, prediction, weighting, condition)
        if direct is not None:
            return direct
        score = self(pair.z, pair.t, condition=condition)
        return pair.loss(score, "score", weighting=weighting, measured=prediction)

    def _direct_loss(
        self, pair: PerturbedData, kind: Prediction, weighting: Weighting, condition: Tensor | None
    ) -> Tensor | None:
        """The loss by a prediction of the network's own; None: `loss` evaluates the score."""
        return None

    def _state_version(self) -> object:
        """Version of everything that `_coefficients` depends on; see `coefficients_at`."""
        return 0

    @abstractmethod
    def _coefficients(self, times: Tensor) -> Coefficients:
        """Coefficients at float64 times on the CPU, for `_predict`."""

    @abstractmethod
    def _predict(
        self, z: Tensor, c: Coefficients, prediction: Prediction, condition: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        """Return a prediction and its name, for a state that has been checked.

        It is ``prediction`` itself if the network gives it directly, and otherwise one that
        `forward` converts. ``c`` is the result of `_coefficients` on the state's device.
        """

    def _evaluate(
        self, inputs: Tensor, clock: Tensor, condition: Tensor | None, outputs: int
    ) -> Tensor:
        """Output of the network for inputs ``(B, C, *S)`` and a clock ``()`` or ``(B,)``.

        Raises a ValueError unless it has the shape ``(B, outputs, *S)``.
        """
        batch = len(inputs)
        given = () if condition is None else (condition.expand(batch, *condition.shape[1:]),)
        inside = input_dtype(self.network, inputs.dtype)
        learnt: Tensor = self.network(inputs.to(inside), clock.expand(batch), *given)
        expected = (batch, outputs, *inputs.shape[2:])
        if learnt.shape != expected:
            raise ValueError(f"network must return shape {expected}; got {tuple(learnt.shape)}")
        return learnt.to(inputs.dtype)
