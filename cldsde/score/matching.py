r"""Score matching: hybrid and denoising targets, losses, and the loss of the best score.

A state z_t drawn given the start has the score target −L_t^{−⊤}ξ. Its driven rows are −L_dd^{−⊤}n*
with the noise n* of the driven components given all others (see `cldsde.score.conversion`).
Conditioning on the data alone is hybrid score matching (Dockhorn et al. 2022). Conditioning on all
of z_0 is denoising score matching. docs/explanation/hybrid-score-matching.md compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, as_times, check_positive, one_of
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import Kernel
from cldsde.linear.random import Generators
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import (
    MEASURED,
    TRAINED,
    Conditioning,
    Conversion,
    Prediction,
    WhitenedKernel,
    component_order,
    conditional_kernel,
    whiten,
)
from cldsde.score.protocol import ScoreFunction
from cldsde.score.times import score_argument, score_times

Weighting = Literal["reweighted", "likelihood"] | Callable[[Tensor], Tensor]
r"""Weighting of errors over time. ``"reweighted"``: the mean squared error of the noise, or of the
velocity or flow if the loss measures it. ``"likelihood"``: ½‖Gᵀ(s − s*)‖² per data dimension, the
integrand of a bound on the log-likelihood in nats. A function of float64 times ``(n,)`` that
returns ``(n,)``: its value times ``"reweighted"``."""


@dataclass(frozen=True, eq=False)
class PerturbedData:
    """Perturbed data: random states with their noise and training targets; `draw` makes them."""

    sde: LinearSDE
    x0: Tensor  #: The data, ``(B, *D)``.
    z: Tensor  #: States, ``(B, k, *D)``.
    noise: Tensor  #: n*, the standard normal noise of the driven components, ``(B, d, *D)``.
    t: Tensor  #: Times, ``()`` or ``(B,)`` float64 on the CPU.
    kernel: Kernel  #: Distribution of z_t given the data, or given all of z_0.
    conditioning: Conditioning
    whitened: WhitenedKernel

    @classmethod
    def draw(
        cls,
        sde: LinearSDE,
        x0: Tensor,
        t: TimeLike,
        *,
        conditioning: Conditioning = "data",
        generator: Generators | None = None,
    ) -> PerturbedData:
        """Draw z_t from the forward process that starts at the data.

        Parameters
        ----------
        sde
            The forward process.
        x0
            Data ``(B, *D)``, floating point.
        t
            One time or ``(B,)``, in (0, 1].
        conditioning
            ``"data"``: targets of hybrid score matching. ``"all"``: targets of denoising score
            matching, for which z_0 is drawn first.
        generator
            Random generator, or several, each of which draws for an equal share of the batch.

        Raises
        ------
        TypeError, ValueError
            If an argument has the wrong type, shapes do not fit, a time lies outside (0, 1] or
            ``conditioning`` is unknown.
        """
        check_process(sde)
        start = sde.embed(x0)
        times = score_times(t, start)
        if conditioning == "all":
            start = sde.augment(x0, generator)
        kernel = conditional_kernel(sde, times, conditioning)
        whitened = whiten(sde, kernel, times)
        z, epsilon = kernel.perturb(start, generator=generator)
        # n = −L_ddᵀ s_d are the last rows of L⁻¹(z − ψx_0), which are ε if no component moves.
        order, last = component_order(sde.components, sde.driven), slice(-len(sde.driven), None)
        noise = epsilon[:, last]
        if order != sorted(order):
            noise = apply_blocks(whitened.inverse[..., last, :] @ kernel.root, epsilon)
        return cls(sde, x0, z, noise, times, kernel, conditioning, whitened)

    def target(self, prediction: Prediction = "score") -> Tensor:
        """Training target of a network that predicts the given quantity.

        ``"score"``: s* = −L_dd^{−⊤} n*, ``(B, d, *D)``. ``"noise"``: n*. ``"data"``: x_0.
        ``"velocity"``: α n* − σ x_0, and ``"flow"``: α′ x_0 + σ′ n*, ``(B, 1, *D)``.

        Raises
        ------
        ValueError
            If the prediction is unknown, or is a velocity or a flow and the process has several
            components or the states were drawn given all of z_0.
        """
        one_of(prediction, TRAINED, "prediction")
        self._check_given_data(prediction)
        if prediction in ("data", "noise"):
            return self.x0 if prediction == "data" else self.noise
        form = self.whitened.form(prediction)
        noise = apply_blocks(form.noise, self.noise)
        if form.inverse is not None:  # a score
            return noise
        return noise + apply_blocks(form.data, self.x0.unsqueeze(1))

    def loss(
        self,
        output: Tensor,
        prediction: Prediction = "noise",
        *,
        weighting: Weighting = "reweighted",
        measured: Prediction | None = None,
    ) -> Tensor:
        """Score-matching loss of each sample, ``(B,)``, for a network's output at ``z``.

        Parameters
        ----------
        output
            The prediction, ``(B, d, *D)``, or ``(B, *D)`` for the data.
        prediction
            Quantity that is predicted.
        weighting
            See `Weighting`.
        measured
            Quantity whose error is the loss; the prediction is converted to it. None: the velocity
            or flow if it is predicted, otherwise the noise.

        Raises
        ------
        TypeError, ValueError
            If the output is not a tensor of this shape, or an option is unknown. `target` lists the
            errors for a velocity or a flow.
        """
        one_of(prediction, TRAINED, "prediction")
        if measured is None:
            measured = prediction if prediction in ("velocity", "flow") else "noise"
        one_of(measured, MEASURED, "measured")
        if not isinstance(output, Tensor):
            raise TypeError(f"output must be a tensor; got {type(output).__name__}")
        expected = self.x0.shape if prediction == "data" else self.noise.shape
        if output.shape != expected:
            raise ValueError(
                f"output must be a prediction of the {prediction} of shape {tuple(expected)}; "
                f"got {tuple(output.shape)}"
            )
        output = output.to(self.noise.dtype)
        if weighting == "likelihood":
            diverges = self.sde.regular_until < 1 and bool((self.t == 1).any())
            if diverges and prediction != "data":
                raise ValueError(
                    "t must be below 1 with weighting='likelihood', because the "
                    "diffusion of this process diverges there; draw earlier times or use "
                    "prediction='data'"
                )
            error = self._error(output, prediction, "noise")
            pulled = apply_blocks(likelihood_rows(self.sde, self.whitened), error)
            return 0.5 * pulled.square().flatten(1).sum(1) / math.prod(self.x0.shape[1:])
        error = self._error(output, prediction, measured)
        return _weights(weighting, self.t).to(error) * error.square().flatten(1).mean(1)

    def _error(self, output: Tensor, prediction: Prediction, measured: Prediction) -> Tensor:
        """Error of the measured quantity, converted from the prediction."""
        self._check_given_data(measured)
        if self.conditioning == "all" and prediction == "data":
            # The noise given all of z_0 does not follow from the data and the state alone.
            convert = Conversion.at(self.sde, self.t, "data", "noise", conditioning="all")
            return convert(self.z, output) - self.noise
        # The difference comes before the conversion. Noises of x̂_0 and x_0 would cancel.
        error = output - self.target(prediction)
        if prediction == measured:
            return error
        convert = self.whitened.convert(prediction, measured)
        return apply_blocks(convert.value, error.unsqueeze(1) if prediction == "data" else error)

    def _check_given_data(self, kind: Prediction) -> None:
        if self.conditioning != "data" and kind in ("velocity", "flow"):
            raise ValueError(
                f"conditioning must be 'data' for a prediction of the {kind}; got "
                f"{self.conditioning!r}"
            )


def score_matching_loss(
    model: ScoreFunction,
    sde: LinearSDE,
    x0: Tensor,
    t: TimeLike,
    *,
    prediction: Prediction = "score",
    conditioning: Conditioning = "data",
    weighting: Weighting = "reweighted",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Score-matching loss ``(B,)`` of a network at random states of the forward process.

    Parameters
    ----------
    model
        Function model(z, t) of states ``(B, k, *D)`` and times ``(B,)``, on the data's device. It
        returns a prediction ``(B, d, *D)``, or ``(B, *D)`` if it predicts the data.
    sde, x0, t, conditioning, generator
        See `PerturbedData.draw`; `TimeSampler` draws times.
    prediction
        Prediction of the model: ``"score"``, ``"noise"``, ``"data"``, ``"velocity"`` or ``"flow"``.
        With ``"flow"`` and `cldsde.RectifiedFlow` this is the flow-matching loss.
    weighting
        See `Weighting`. The weights of a `TimeSampler` are not included.

    Raises
    ------
    TypeError, ValueError
        See `PerturbedData.draw` and `PerturbedData.loss`.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> sde, g = CLD(), torch.Generator().manual_seed(0)
    >>> data = GaussianMixture([1.0], [[0.0]], [[[0.25]]])
    >>> x0 = data.sample(50_000, generator=g)
    >>> loss = score_matching_loss(data.score(sde), sde, x0, 0.02, generator=g).mean()
    >>> least = optimal_loss(sde, 0.02, data_variance=0.25)
    >>> f"{loss:.2f} {least:.2f}"  # the score of the data attains the least loss
    '0.69 0.69'
    """
    pair = PerturbedData.draw(sde, x0, t, conditioning=conditioning, generator=generator)
    output = model(pair.z, score_argument(pair.t, pair.z).expand(len(pair.z)))
    return pair.loss(output, prediction, weighting=weighting)


def optimal_loss(
    sde: LinearSDE,
    t: TimeLike,
    *,
    data_variance: float = 1.0,
    conditioning: Conditioning = "data",
    weighting: Weighting = "reweighted",
) -> Tensor:
    r"""Expected score-matching loss of the best score on Gaussian data, at each time.

    The marginal of the Gaussian data has the covariance Σ_t + UUᵀ. With C = L⁻¹U the unpredictable
    part of the noise has the covariance [C (I + CᵀC)⁻¹ Cᵀ]_dd. For hybrid score matching with the
    weighting ``"likelihood"`` the loss is −dH/dt of H = ½ log(1 + s₀² ψᵀΣ_t⁻¹ψ). Use it as the
    density of a `TimeSampler`.

    Parameters
    ----------
    t
        Times of any shape in (0, 1]. The result has this shape, float64 on the CPU.
    data_variance
        s₀², the mean variance of the data's entries.
    sde, conditioning, weighting
        See `score_matching_loss`.

    Raises
    ------
    ValueError
        If the distribution has no density at some time, or an argument is out of range.
    """
    check_process(sde)
    check_positive(data_variance, "data_variance")
    times = as_times(t, "t")
    kernel = conditional_kernel(sde, times, conditioning)
    whitened = whiten(sde, kernel, times)
    U = math.sqrt(data_variance) * kernel.mean[..., :1]
    if conditioning == "all":
        U = torch.cat([U, kernel.mean @ sde.initial_root], dim=-1)
    C = whitened.inverse @ U
    eye = torch.eye(U.shape[-1], dtype=torch.float64, device="cpu")
    factor = joint_root(eye, C.mT)
    d = len(sde.driven)
    unknown = C[..., -d:, :] @ triangular_inverse(factor).mT
    if weighting == "likelihood":
        pulled = likelihood_rows(sde, whitened) @ unknown
        return 0.5 * pulled.square().sum((-2, -1))
    return _weights(weighting, times) * unknown.square().sum((-2, -1)) / d


def likelihood_rows(sde: LinearSDE, whitened: WhitenedKernel) -> Tensor:
    """Matrix (L_dd⁻¹ G_d)ᵀ from an error of the noise to an error of −Gᵀs, ``(*, r, d)``."""
    # G of an interpolant diverges at t = 1. An error that is α times an error of the data is zero
    # there for any finite matrix. `PerturbedData.loss` raises for the other predictions.
    t, end = whitened.times, sde.regular_until
    finite = torch.where((t == 1) & (end < 1), end, t)
    G = sde.diffusion(finite)[..., list(sde.driven), :]
    return (triangular_inverse(whitened.driven_root()) @ G).mT


def _weights(weighting: Weighting, t: Tensor) -> Tensor:
    if weighting == "reweighted":
        return torch.ones_like(t)
    if not callable(weighting):
        raise TypeError(
            "weighting must be 'reweighted', 'likelihood' or a function of times; "
            f"got {weighting!r}"
        )
    times = t.flatten()
    weights = torch.as_tensor(weighting(times), dtype=torch.float64, device="cpu")
    if weights.shape != times.shape:
        raise ValueError(
            f"weighting must return one number for each time, {tuple(times.shape)}; "
            f"got {tuple(weights.shape)}"
        )
    return weights.reshape(t.shape)
