r"""Scores of published networks, with the parameterisation of the code that trained them.

All of these scores have the form

.. math:: s_d(z, t) = −r(t)\, z_d + g(t)\, n_θ(z, c(t))

with a clock c, a gain g and, for mixed scores, a reference r:

===============  =====================  ================  ======================
code             clock c                gain g            reference r, if mixed
===============  =====================  ================  ======================
"cld-sgm"        t                      −ℓ(t)             1/Σ_vv; 1 for VP
"score-sde-vp"   999 t                  −1/σ(t)           none
"score-sde-ve"   σ(t)/2                 1/σ(t)            none
===============  =====================  ================  ======================

1/ℓ is the last diagonal entry of the root of Σ (Dockhorn et al. 2022, §3.2). Networks with Fourier
features take the log of the clock. The VE networks of Y. Song et al. (2021) were trained on data in
[0, 1]. For data in [−1, 1], as here, their noise levels are twice as large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import check_at_least, one_of
from cldsde.linear.covariance import joint_root
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import Prediction
from cldsde.score.network_score import Inputs, NetworkScore

Code = Literal["cld-sgm", "score-sde-vp", "score-sde-ve"]
"""Code that trained a network, and for ``score_sde`` the kind of process."""

_LAST_LABEL = 999.0  # at t = 1, for networks trained on a continuum of times


@dataclass(frozen=True, kw_only=True)
class Parameterisation:
    """Parameterisation of a published score: clock, gain and reference.

    Raises
    ------
    ValueError
        If an argument is out of range, or the code does not have the option.
    """

    code: Code  #: Code that trained the network.
    #: Whether the network takes the log of the clock, as networks with Fourier features do.
    log_clock: bool = False
    #: Whether the score of a Gaussian is added to the network's output; for ``"cld-sgm"`` only.
    mixed: bool = False
    #: Number added to variances; for ``"cld-sgm"`` only. It is 1e-9 for CIFAR-10 and 1e-6 for
    #: CelebA-HQ-256.
    numerical_eps: float = 0.0
    #: Number of noise levels of a network trained on discrete noise levels. The clock is then the
    #: index of the level: from small to large noise for VP, from large to small for VE. None: the
    #: network was trained on continuous times.
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


class PublishedScore(NetworkScore[_Coefficients]):
    r"""Score of the driven component from a published network.

    It is s_d = −r z_d + g n_θ(z, c), with the clock c, gain g and reference r of Dockhorn et al.
    (2022) or Y. Song et al. (2021).

    Parameters
    ----------
    network
        Module called as (state, clock) with ``(B, k·C, *S)`` and ``(B,)``, or as (state, clock,
        condition). It returns ``(B, C, *S)``. The state is not scaled.
    sde
        The process, with one driven component.
    parameterisation
        Clock, gain and reference of the score.

    Raises
    ------
    TypeError, ValueError
        If ``sde`` is not a process, or several components are driven.

    Notes
    -----
    With N discrete noise levels, the gain at time t is the gain of a level, as in the published
    code: of level ⌊(N − 1) t⌋ for VP, and of (N − 1)(1 − t) rounded for VE.
    """

    inputs: Inputs = "state"

    def __init__(self, network: nn.Module, sde: LinearSDE, parameterisation: Parameterisation):
        super().__init__()
        check_process(sde)
        if len(sde.driven) != 1:
            msg = f"sde must have one driven component; got {sde!r} with {len(sde.driven)}"
            raise ValueError(msg)
        self.network = network
        self.sde = sde
        self.parameterisation = parameterisation

    def _predict(
        self, z: Tensor, c: _Coefficients, prediction: Prediction, condition: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        learnt = self._evaluate(z.flatten(1, 2), c.clock, condition, z.shape[2])
        score = apply_blocks(c.gain[..., None, None], learnt.unsqueeze(1))
        reference = apply_blocks(c.reference[..., None, None], z[:, list(self.sde.driven)])
        return "score", score - reference

    def _coefficients(self, times: Tensor) -> _Coefficients:
        """Clock, gain and reference; the clock is in single precision, as in the published code."""
        how, reference = self.parameterisation, torch.zeros_like(times)
        if how.code == "cld-sgm":
            clock = times
            gain, reference = _cld_sgm(self.sde, times, how)
        elif how.code == "score-sde-vp":
            clock, gain = _score_sde_vp(self.sde, times, how.levels)
        else:
            clock, gain = _score_sde_ve(self.sde, times, how.levels)
        clock = clock.to(torch.float32)
        return _Coefficients(clock.log() if how.log_clock else clock, gain, reference)


def _cld_sgm(sde: LinearSDE, t: Tensor, how: Parameterisation) -> tuple[Tensor, Tensor]:
    """Gain and reference."""
    root = sde.marginal(t).root
    if sde.components == 1:
        # Without numerical_eps, and with a reference of unit variance, as in the published code.
        return -1 / root[..., 0, 0], torch.full_like(t, how.mixed)
    eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
    root = joint_root(root, (math.sqrt(how.numerical_eps) * eye).expand_as(root))
    variance = root[..., -1, :].square().sum(-1)
    return -1 / root[..., -1, -1], how.mixed / variance


def _score_sde_vp(sde: LinearSDE, t: Tensor, levels: int | None) -> tuple[Tensor, Tensor]:
    """Clock and gain."""
    if levels is None:
        return _LAST_LABEL * t, -1 / sde.marginal(t).root[..., 0, 0]
    # β/N at the two ends, as DDPM has them; drift is −β/2.
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    low, high = (-2 * sde.drift(ends)[:, 0, 0] / levels).tolist()
    betas = torch.linspace(low, high, levels, dtype=torch.float64, device="cpu")
    deviations = (-torch.log1p(-betas).cumsum(0).expm1()).sqrt()
    label = (levels - 1) * t
    # A time on the grid must not fall to the level below by rounding.
    return label, -1 / deviations[(label + 1e-6).long()]


def _score_sde_ve(sde: LinearSDE, t: Tensor, levels: int | None) -> tuple[Tensor, Tensor]:
    """Clock and gain."""
    if levels is None:
        deviation = sde.marginal(t).root[..., 0, 0]
        return deviation / 2, 1 / deviation
    label = ((levels - 1) * (1 - t)).round()
    at = 1 - label / (levels - 1)
    return label, 1 / sde.marginal(at).root[..., 0, 0]
