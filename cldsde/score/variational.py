r"""Evidence lower bounds of diffusion models without an ODE, and cross-entropies.

The reverse SDE from the prior to t_min, followed by a decoder, is a latent-variable model. The
decoder is p(x_0 | z) = N(x̃(z), 1/I) with x̃ = ψᵀΣ⁻¹z / I and I = ψᵀΣ⁻¹ψ at t_min. The forward
process given x_0 is the approximate posterior of its latents. The divergence of the two path
measures gives (Kingma et al. 2021; with auxiliary components Singhal, Goldstein and Ranganath 2023)

.. math::
    −\log p(x_0) ≤ \mathrm{KL}\bigl(q(z_T | x_0) \,\|\, p_T\bigr)
      + ∫_{t_{min}}^T \tfrac12 \mathbb{E} ‖G^⊤ (s − ∇\log q(z_t | x_0))‖^2\,dt
      + \tfrac D2 \log\frac{2πe}{I(t_{min})}.

q(z_t | x_0) has the auxiliary components integrated out, so the integrand is the hybrid
score-matching loss. In terms of the data prediction it is ½ (−dI/dt) E|x_0 − x̂_0|². Everything is
differentiable in the process.

With ``of="state"``, `cross_entropy` replaces the last term by the entropy of z given x_0 at t_min,
½ D log((2πe)^k det Σ). This bound is exact if s is the score of a process that starts from some
distribution and ends at p_T.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, flatten_data
from cldsde.linear.checks import TimeLike, check_between, check_positive, one_of
from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.kernel import Gaussian, check_density
from cldsde.linear.sde import LinearSDE
from cldsde.score.conversion import TRAINED, Prediction
from cldsde.score.matching import PerturbedData
from cldsde.score.protocol import ScoreFunction
from cldsde.score.times import score_argument

CrossEntropyOf = Literal["state", "data"]


def evidence_lower_bound(
    model: ScoreFunction,
    sde: LinearSDE,
    x0: Tensor,
    t: TimeLike,
    weight: Tensor | float = 1.0,
    *,
    t_min: float,
    prediction: Prediction = "score",
    data_mean: Tensor | float = 0.0,
    data_variance: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of the evidence lower bound (ELBO) of each data point, ``(B,)`` nats.

    Estimates of one batch share stratified times. The standard error of their mean is therefore
    smaller than their spread suggests. `cross_entropy` has an example of such times.

    Parameters
    ----------
    model
        See `score_matching_loss`.
    sde, x0, generator
        See `PerturbedData.draw`.
    t, weight
        Times ``(B,)`` in [t_min, T] and their weights, from a `TimeSampler`. The mean of
        weight · f(t) must equal the mean of f over uniform times.
    t_min
        Time at which the model stops and decodes, 0 < t_min < T.
    prediction
        Prediction of the model: ``"score"``, ``"noise"`` or ``"data"``.
    data_mean, data_variance
        Mean and variance of a Gaussian reference, whose known bound is a control variate. With the
        data's own moments the estimate has no variance for Gaussian data and an exact model. For
        separated modes it removes a part of the variance. None: no control variate.

    Raises
    ------
    ValueError
        If a time lies outside [t_min, T], shapes do not fit, or a distribution has no density.
    """
    one_of(prediction, TRAINED, "prediction")  # before the model is evaluated
    if data_variance is None and not (isinstance(data_mean, int | float) and data_mean == 0):
        msg = "data_variance must be given with data_mean, for the control variate; got None"
        raise ValueError(msg)
    if data_variance is not None:
        check_positive(data_variance, "data_variance")
    pair = PerturbedData.draw(sde, x0, t, generator=generator)
    _check_times(pair, weight, t_min)
    known: Tensor | float = 0.0
    baseline: Tensor | float = 0.0
    if data_variance is not None:
        mean = torch.as_tensor(data_mean, dtype=x0.dtype, device=x0.device)
        try:
            mean = mean.expand(x0.shape)
        except RuntimeError:
            msg = f"data_mean must broadcast with x0, {tuple(x0.shape)}; got {tuple(mean.shape)}"
            raise ValueError(msg) from None
        guess = _gaussian_noise(pair, mean, data_variance)
        baseline = pair.loss(guess, "noise", weighting="likelihood")
        known = _gaussian_diffusion(pair, mean, data_variance, t_min)
    output = model(pair.z, score_argument(pair.t, pair.z).expand(len(x0)))
    losses = pair.loss(output, prediction, weighting="likelihood") - baseline
    return -(cross_entropy(pair, losses, weight, t_min=t_min, of="data") + known)


def cross_entropy(
    pair: PerturbedData,
    losses: Tensor,
    weight: Tensor | float = 1.0,
    *,
    t_min: float,
    of: CrossEntropyOf = "state",
    prior: Gaussian | None = None,
) -> Tensor:
    r"""Cross-entropy of a data distribution and a diffusion model, ``(B,)`` nats.

    The value estimates −E log p(z) at t_min for z drawn given each data point. Its mean over data
    from a distribution q bounds the cross-entropy of the perturbed q and the model (Vahdat, Kreis
    and Kautz 2021, theorem 1, for k = 1). This is the loss for training a latent diffusion model
    together with the encoder of q. It is differentiable in the data, too.

    Parameters
    ----------
    pair
        Random states of the process given the data, at times in [t_min, T].
    losses
        Losses of the model's score, ``(B,)``, from ``pair.loss(…, weighting="likelihood")`` or
        from ``loss`` of a `MixedScore`.
    weight, t_min
        See `evidence_lower_bound`.
    of
        ``"state"``: all components at t_min. ``"data"``: the data, which the model decodes at
        t_min; this is minus the evidence lower bound. The two differ by a constant.
    prior
        Distribution that the model starts from; None: the process's prior.

    Raises
    ------
    ValueError
        If the pair is conditioned on all of z_0, a time lies outside [t_min, T], shapes do not fit,
        or a distribution has no density.

    Notes
    -----
    Auxiliary components add their own entropy: for CLD ½ log(2πeγM) nats per data dimension.
    Subtracting it does not give the cross-entropy of the data if they start far from equilibrium.
    For CLD with ``velocity_scale=0.04`` at t_min = 1e-3 the difference is 0.3 nats per dimension.
    With ``velocity_scale=1``, or ``of="data"``, there is none.

    Examples
    --------
    Cross-entropy of a narrow encoder, N(0.5, 0.01), and a wide prior, N(0, 0.5):

    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> from cldsde.score import PerturbedData, TimeSampler
    >>> sde, g = CLD(velocity_scale=1.0), torch.Generator().manual_seed(0)
    >>> prior = GaussianMixture([1.0], [[0.0] * 8], [0.5 * torch.eye(8).double()])
    >>> x0 = 0.5 + 0.1 * torch.randn(20_000, 8, generator=g, dtype=torch.float64)
    >>> sampler = TimeSampler.importance(sde, 1e-3, weighting="likelihood")
    >>> t, weight = sampler.sample(len(x0), generator=g)
    >>> pair = PerturbedData.draw(sde, x0, t, generator=g)
    >>> losses = pair.loss(prior.score(sde)(pair.z, t), "score", weighting="likelihood")
    >>> bound = cross_entropy(pair, losses, weight, t_min=1e-3, of="data").mean() / 8
    >>> f"{bound:.1f}"  # ½ log(2π · 0.5) + 0.26/(2 · 0.5) = 0.83
    '0.8'
    """
    if not isinstance(pair, PerturbedData) or pair.conditioning != "data":
        got = f"conditioning={pair.conditioning!r}" if isinstance(pair, PerturbedData) else pair
        raise ValueError(f"pair must be PerturbedData conditioned on the data; got {got}")
    one_of(of, CrossEntropyOf, "of")
    sde = pair.sde
    _check_times(pair, weight, t_min)
    if losses.shape != (len(pair.x0),):
        raise ValueError(f"losses must have shape ({len(pair.x0)},); got {tuple(losses.shape)}")
    if isinstance(weight, Tensor):
        weight = weight.to(losses)
    dimension = math.prod(pair.x0.shape[1:])
    divergence = _prior_divergence(sde, pair.x0, prior or sde.prior)
    diffusion = dimension * (1 - t_min) * weight * losses
    return divergence + diffusion + (dimension * _entropy(sde, t_min, of)).to(losses)


def _check_times(pair: PerturbedData, weight: Tensor | float, t_min: float) -> None:
    check_between(t_min, 1e-300, 1 - 1e-9, "t_min")
    times = pair.t
    # A time in single precision may round below the smallest.
    if times.numel() and float(times.min()) < t_min * (1 - 1e-6):
        raise ValueError(f"t must lie in [t_min, T] = [{t_min:g}, 1]; got {float(times.min()):g}")
    fitting = (torch.Size([]), torch.Size([len(pair.x0)]))
    if isinstance(weight, Tensor) and weight.shape not in fitting:
        raise ValueError(
            f"weight must be one number or have shape ({len(pair.x0)},); got {tuple(weight.shape)}"
        )


def _gaussian_noise(pair: PerturbedData, mean: Tensor, variance: float) -> Tensor:
    """E[n* | z_t] for data N(μ, s²), from x̂_0 = μ + s² ψᵀΣ⁻¹(z − ψμ) / (1 + s² I).

    It is computed from the state, as a model's prediction is, so that both round alike.
    """
    whitened, driven = pair.whitened, slice(-len(pair.sde.driven), None)
    shrinkage = variance / (1 + variance * whitened.information()[..., None, None])
    gain = shrinkage * whitened.signal.mT @ whitened.inverse
    noise = whitened.inverse[..., driven, :] - whitened.signal[..., driven, :] @ gain
    return apply_blocks(noise, pair.z - apply_blocks(whitened.psi, mean.unsqueeze(1)))


def _gaussian_diffusion(pair: PerturbedData, mean: Tensor, variance: float, t_min: float) -> Tensor:
    """½ ∫ E|x_0 − x̂_0|² (−dI) for this prediction and given data, ``(B,)`` nats.

    With u = 1 + s²I the integrand is E(x_0 − x̂_0)² = [(x_0 − μ)² + s⁴ I] / u², a rational
    function of I.
    """
    sde, x0 = pair.sde, pair.x0
    ends = torch.tensor([t_min, 1.0], dtype=torch.float64, device="cpu")
    first, last = 1 + variance * (2 * sde.kappa(ends)).exp()
    square = flatten_data((x0 - mean).unsqueeze(1)).squeeze(1).square().sum(1)
    dimension = math.prod(x0.shape[1:])
    excess = square / variance - dimension
    known: Tensor = excess * (1 / last - 1 / first).to(x0) + dimension * (first / last).log()
    return 0.5 * known.to(x0)


def _entropy(sde: LinearSDE, t_min: float, of: CrossEntropyOf) -> Tensor:
    """Entropy of z given x_0 at t_min, or of the decoded data given z, per data dimension."""
    standard = 0.5 * math.log(2 * math.pi * math.e)  # of a standard normal number
    if of == "data":
        return standard - sde.kappa(t_min)
    root = sde.marginal(t_min).root
    check_density(root, torch.tensor(t_min, device="cpu"), "t_min")
    return standard * sde.components + root.diagonal().log().sum()


def _prior_divergence(sde: LinearSDE, x0: Tensor, prior: Gaussian) -> Tensor:
    """KL(q(z_T | x_0) ‖ prior), ``(B,)``."""
    k = sde.components
    if prior.root.shape != (k, k):
        msg = f"prior must have the {k} components of {sde!r}; got {tuple(prior.root.shape)}"
        raise ValueError(msg)
    kernel = sde.marginal(1.0)
    inverse = triangular_inverse(prior.root)
    spread = (inverse @ kernel.root).square().sum()
    log_det = 2 * (prior.root.diagonal().log() - kernel.root.diagonal().log()).sum()
    mean = (inverse @ kernel.mean[:, 0]).square().sum()
    flat = flatten_data(x0.unsqueeze(1)).squeeze(1)
    constant = 0.5 * flat.shape[1] * (spread - sde.components + log_det)
    return constant.to(x0) + 0.5 * mean.to(x0) * flat.square().sum(1)
