r"""Scores of published networks, with the parameterisation of the code that trained them.

Every one of them has the form

.. math:: s_d(z, t) = −r(t)\, z_d + g(t)\, n_θ(z, c(t))

with a clock c, a gain g and, for mixed scores, a reference r. The codes differ in these three:

===============  =====================  ================  ======================
code             clock c                gain g            reference r, if mixed
===============  =====================  ================  ======================
"cld-sgm"        t                      −ℓ(t)             1/Σ_vv; 1 for VP
"score-sde-vp"   999 t                  −1/σ(t)           none
"score-sde-ve"   σ(t)/2                 1/σ(t)            none
===============  =====================  ================  ======================

ℓ is 1 over the last diagonal entry of the root of Σ (Dockhorn et al. 2022, §3.2). Networks with
Fourier features see the log of the clock. Song et al.'s VE networks are trained on data in [0, 1]:
here, for data in [−1, 1], noise levels are twice as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, check_at_least, check_state
from cldsde.linear.covariance import joint_root
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.checks import one_of
from cldsde.score.conversion import Conversion, Prediction
from cldsde.score.matching import Measured, PerturbedData, Weighting
from cldsde.score.score_denoiser import ScoreDenoiser
from cldsde.score.times import coefficients_at, score_times

__all__ = ["Code", "Parameterisation", "PublishedScore"]

Code = Literal["cld-sgm", "score-sde-vp", "score-sde-ve"]
"""Code that trained a network, and for ``score_sde`` the kind of process."""

_LAST_LABEL = 999.0  # at t = 1, for networks trained on a continuum of times


@dataclass(frozen=True, kw_only=True)
class Parameterisation:
    """How a published code turns the output of its network into a score.

    Attributes
    ----------
    code
        The code.
    log_clock
        Whether the network takes the log of the clock, as those with Fourier features do.
    mixed
        Whether the network's part is added to the score of a Gaussian (``"cld-sgm"`` alone).
    numerical_eps
        Number that ``cld-sgm`` adds to the variances: 1e-9 for CIFAR-10, 1e-6 for CelebA-HQ-256.
    levels
        Number of noise levels of a network that was trained on a discrete set; None for a
        continuum of times. The clock is then the number of the level, counted from small noise up
        for VP and from large noise down for VE.

    Raises
    ------
    ValueError
        If an argument is out of range, or the code has no such option.
    """

    code: Code
    log_clock: bool = False
    mixed: bool = False
    numerical_eps: float = 0.0
    levels: int | None = None

    def __post_init__(self) -> None:
        """Reject options that the code does not have."""
        one_of(self.code, Code, "code")
        check_at_least(self.numerical_eps, 0, "numerical_eps")
        own = self.code == "cld-sgm"
        if not own and (self.mixed or self.numerical_eps):
            msg = f"mixed and numerical_eps are options of 'cld-sgm'; got code={self.code!r}"
            raise ValueError(msg)
        if self.levels is not None and (own or self.levels < 2):
            msg = f"levels must be None for 'cld-sgm' and at least 2 otherwise; got {self.levels}"
            raise ValueError(msg)


class _Coefficients(NamedTuple):
    """Coefficients of a published score at times of shape ``*``."""

    clock: Tensor
    gain: Tensor
    reference: Tensor


class PublishedScore(nn.Module):
    r"""Score of the driven component from a published network.

    Parameters
    ----------
    network
        Module of (state, clock) or, if it is conditional, (state, clock, condition):
        ``(B, k·C, *S)`` and ``(B,)`` to ``(B, C, *S)``. It sees the state as it is.
    sde
        The process, with one driven component.
    parameterisation
        How its output becomes a score.

    Raises
    ------
    TypeError
        If ``sde`` is no process.
    ValueError
        If several components are driven.

    Notes
    -----
    For networks of discrete levels the gain belongs to a level, as in the code that trained them. A
    VP network has the level ⌊(N − 1) t⌋ at time t, a VE network (N − 1)(1 − t) rounded.

    References
    ----------
    Y. Song et al., *Score-based generative modeling through stochastic differential equations*,
    2021. T. Dockhorn et al., *Score-based generative modeling with critically-damped Langevin
    diffusion*, 2022.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> from cldsde.pretrained.ncsnpp import NCSNpp
    >>> network = NCSNpp((2, 8, 8), 1, channels=(8, 8), fourier_scale=16.0)
    >>> how = Parameterisation(code="cld-sgm", log_clock=True, mixed=True, numerical_eps=1e-9)
    >>> score = PublishedScore(network, CLD(), how)
    >>> score(torch.randn(3, 2, 1, 8, 8), 0.5).shape
    torch.Size([3, 1, 1, 8, 8])
    """

    inputs = "state"

    def __init__(self, network: nn.Module, sde: LinearSDE, parameterisation: Parameterisation):
        super().__init__()
        check_process(sde)
        if len(sde.driven) != 1:
            msg = f"sde must have one driven component; got {sde!r} with {len(sde.driven)}"
            raise ValueError(msg)
        self.network = network
        self.sde = sde
        self.parameterisation = parameterisation

    @property
    def denoiser(self) -> ScoreDenoiser:
        """The denoiser D(u, σ) of the network, for sampling with other processes."""
        return ScoreDenoiser(self)

    def forward(
        self,
        z: Tensor,
        t: TimeLike,
        *,
        prediction: Prediction = "score",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score of the driven component ``(B, 1, *D)``, or another prediction.

        Parameters
        ----------
        z
            States ``(B, k, *D)``.
        t
            One time or ``(B,)``, above 0.
        prediction
            See `Conversion`; of the data ``(B, *D)``.
        condition
            Of each sample, ``(B, ...)``, or of all, 0-dimensional; passed to the network as it is.
        """
        check_state(z, self.sde.components)
        c = coefficients_at(self, t, z, self._coefficients, z.dtype, 0)
        batch = len(z)
        given = () if condition is None else (condition.expand(batch, *condition.shape[1:]),)
        learnt = self.network(z.flatten(1, 2), c.clock.expand(batch), *given).to(z.dtype)
        driven = z[:, list(self.sde.driven)]
        if learnt.shape != driven.shape[:1] + driven.shape[2:]:
            msg = f"network must return {tuple(driven[:, 0].shape)}; got {tuple(learnt.shape)}"
            raise ValueError(msg)
        score = apply_blocks(c.gain[..., None, None], learnt.unsqueeze(1))
        score = score - apply_blocks(c.reference[..., None, None], driven)
        if prediction == "score":
            return score
        convert = Conversion.at(self.sde, score_times(t, z), "score", prediction)
        return convert(z, score)

    def data_prediction(self, z: Tensor, t: TimeLike, *, condition: Tensor | None = None) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``; see `forward`."""
        found: Tensor = self(z, t, prediction="data", condition=condition)
        return found

    def loss(
        self,
        pair: PerturbedData,
        *,
        prediction: Measured = "noise",
        weighting: Weighting = "reweighted",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score-matching loss of each sample, ``(B,)``; see `PerturbedData.loss`."""
        score = self(pair.z, pair.t, condition=condition)
        return pair.loss(score, "score", weighting=weighting, measured=prediction)

    def _coefficients(self, times: Tensor) -> _Coefficients:
        """Clock, gain and reference; the clock in the single precision of the published code."""
        how = self.parameterisation
        clock, gain, reference = _CODES[how.code](self.sde, times, how)
        clock = clock.to(torch.float32)
        return _Coefficients(clock.log() if how.log_clock else clock, gain, reference)


def _cld_sgm(sde: LinearSDE, t: Tensor, how: Parameterisation) -> tuple[Tensor, Tensor, Tensor]:
    root = sde.marginal(t).root
    if sde.components == 1:
        # The code adds no number here, and its reference has unit variance.
        return t, -1 / root[..., 0, 0], torch.full_like(t, how.mixed)
    eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
    root = joint_root(root, (math.sqrt(how.numerical_eps) * eye).expand_as(root))
    variance = root[..., -1, :].square().sum(-1)
    return t, -1 / root[..., -1, -1], how.mixed / variance


def _score_sde_vp(
    sde: LinearSDE, t: Tensor, how: Parameterisation
) -> tuple[Tensor, Tensor, Tensor]:
    if how.levels is None:
        return _LAST_LABEL * t, -1 / sde.marginal(t).root[..., 0, 0], torch.zeros_like(t)
    # β/N at the two ends, as DDPM has them; drift is −β/2.
    ends = torch.tensor([0.0, sde.T], dtype=torch.float64, device="cpu")
    low, high = (-2 * sde.drift(ends)[:, 0, 0] / how.levels).tolist()
    betas = torch.linspace(low, high, how.levels, dtype=torch.float64, device="cpu")
    deviations = (-torch.log1p(-betas).cumsum(0).expm1()).sqrt()
    label = (how.levels - 1) * t
    # A time on the grid must not fall to the level below by rounding.
    level = (label + 1e-6).long()
    return label, -1 / deviations[level], torch.zeros_like(t)


def _score_sde_ve(
    sde: LinearSDE, t: Tensor, how: Parameterisation
) -> tuple[Tensor, Tensor, Tensor]:
    if how.levels is None:
        deviation = sde.marginal(t).root[..., 0, 0]
        return deviation / 2, 1 / deviation, torch.zeros_like(t)
    label = ((how.levels - 1) * (sde.T - t)).round()
    at = sde.T - label / (how.levels - 1)
    return label, 1 / sde.marginal(at).root[..., 0, 0], torch.zeros_like(t)


_CODES: dict[
    Code, Callable[[LinearSDE, Tensor, Parameterisation], tuple[Tensor, Tensor, Tensor]]
] = {"cld-sgm": _cld_sgm, "score-sde-vp": _score_sde_vp, "score-sde-ve": _score_sde_ve}
