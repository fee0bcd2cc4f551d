r"""Posterior scores given a linear observation of the data, for inverse problems.

û = aᵀz is the best unbiased estimate of x_0 from the state. Its error has the standard deviation
σ = e^{−κ(t)} with κ = ½ log SNR. D = E[x_0 | û], J = ∂D/∂û, and V = Cov[x_0 | û] = σ²J.
docs/explanation/posterior-samplers.md derives the methods. Because û(z + ψδ) = û + δ, products with
J need gradients by the state only: Jᵀw = ψᵀ ∂_z (wᵀD). The method therefore works with any score
that determines D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks, per_sample
from cldsde.linear.checks import TimeLike, as_integer, check_positive, check_state, one_of
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import whiten
from cldsde.score.observation import Observation, check_observation
from cldsde.score.operators import conjugate_gradients, dot
from cldsde.score.protocol import ScoreFunction, ScoreWrapper
from cldsde.score.reverse import checked_score
from cldsde.score.times import PlannedTime, coefficients_at, score_argument, score_times

PosteriorMethod = Literal["moments", "pigdm", "dps"]
"""Approximations of p(y | z_t); see `PosteriorScore`."""

# Weight of the wide R of "pigdm" in the likelihood of particles by "moments". Between modes of the
# data, moment matching can give a particle a likelihood that is far too small. A later step
# corrects this at once, and the particle outweighs all others.
_DEFENSIVE = 0.1

# Largest number of conjugate-gradient iterations of a solve to convergence.
_LONGEST_SOLVE = 100


class _Coefficients(NamedTuple):
    """Coefficients of a process at times of shape ``*``, with k components, d of them driven."""

    state: Tensor  # (*, 1, k), of the state in D
    score: Tensor  # (*, 1, d), of the driven score in D
    psi: Tensor  # (*, 1, k)
    to_score: Tensor  # (*, d, 1), maps a change of D to a change of the driven score
    variance: Tensor  # (*), σ²


class Guided(NamedTuple):
    """Data prediction without and with an observation, and the likelihood of the observation."""

    data: Tensor  #: D, ``(B, *D)``.
    shift: Tensor  #: D_y − D, ``(B, *D)``.
    log_likelihood: Tensor  #: log p̃(y | z), ``(B,)``; see `PosteriorScore.guide`.


class _Linearised(NamedTuple):
    """Score and data prediction at a state, with products by V."""

    score: Tensor
    data: Tensor
    spread: Callable[[Tensor], Tensor]  # maps w to V w
    coefficients: _Coefficients
    isotropic: Tensor  # r², (B,) or (1,)


class PosteriorScore(ScoreWrapper):
    r"""Score of p(z_t | y) for a linear observation y of the data, from any score of p(z_t).

    .. math::
        \hat x_y = D + V A^⊤ R^{-1} (y − A D), \qquad D = E[x_0 | z_t], \quad V ≈ Cov[x_0 | z_t]

    The methods differ in R. All but converged ``"moments"`` of Gaussian data are biased for every
    solver and number of steps; `solvers.sample_posterior` corrects the bias.

    Parameters
    ----------
    score
        Function score(z, t) of the driven components, exact or a network, of any linear SDE. It
        gets states in single precision at least.
    observation
        The observation; the score's ``.to(device)`` moves it.
    method
        ``"moments"``: R = A V Aᵀ + s²I by conjugate gradients (Rozet et al. 2024); the least
        biased. ``"pigdm"``: R = r² A Aᵀ + s²I with r² = σ²v₀/(σ² + v₀) (Song et al. 2023).
        ``"dps"``: R = s²I (Chung et al. 2023); with the right noise it overshoots, and diverges for
        small s.
    iterations
        Conjugate-gradient iterations of ``"moments"``; each takes one gradient of the score. None:
        to convergence, with at most as many as y has numbers and at most 100.
    gradient
        Whether to take gradients of the score. False replaces V by r²I; ``"moments"`` and
        ``"pigdm"`` are then the same.
    data_variance
        v₀, the variance of one number of the data. It sets r², and it limits the conjugate
        gradients: they stop at a direction in which V exceeds the data's total variance.
    sde
        The forward process; None: the score's own.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, the process is not known, or the
        observation has no noise and the method divides by it.

    Notes
    -----
    A call costs one score evaluation and, with ``gradient``, at most ``iterations`` + 1 gradients
    of it for ``"moments"``, one otherwise. It records its own gradients, also under
    `torch.no_grad` and `torch.inference_mode`, and returns a score without any. End sampling at
    `Observation.end_time` or below.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> from cldsde.score import Observation
    >>> sde = CLD()
    >>> data = GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.8], [0.8, 1.0]]])
    >>> seen = Observation.mask(torch.tensor([True, False]), torch.tensor([1.0, 0.0]), 0.1)
    >>> guided = PosteriorScore(data.score(sde), seen, iterations=None)
    >>> z = sde.prior.sample((4, 2), dtype=torch.float64)
    >>> exact = data.condition(seen).score(sde)
    >>> bool(torch.allclose(guided(z, 0.5), exact(z, 0.5)))  # Gaussian data: no approximation
    True
    """

    sde: LinearSDE

    def __init__(
        self,
        score: ScoreFunction,
        observation: Observation,
        method: PosteriorMethod = "moments",
        *,
        iterations: int | None = 3,
        gradient: bool = True,
        data_variance: float = 1.0,
        sde: LinearSDE | None = None,
    ) -> None:
        super().__init__(score)
        check_observation(observation)
        one_of(method, PosteriorMethod, "method")
        process = self.score.sde if sde is None else sde
        if process is None:
            raise TypeError("sde must be given for a score that has no attribute sde; got None")
        self.sde = check_process(process)
        if iterations is not None:
            as_integer(iterations, 1, "iterations")
        if method == "dps" and observation.noise_std == 0:
            raise ValueError(
                "noise_std must be positive with method='dps', which divides by it; got 0. Use "
                "'moments' or 'pigdm'"
            )
        self.observation = observation
        self.method = method
        self.iterations = iterations
        self.gradient = bool(gradient)
        self.data_variance = check_positive(data_variance, "data_variance")

    def __repr__(self) -> str:
        return f"PosteriorScore({self.score!r}, {self.observation!r}, {self.method!r})"

    def forward(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """Score of the driven components given y, ``(B, len(driven), *D)``."""
        found, shift = self._guide(z, t, **options)
        change = apply_blocks(found.coefficients.to_score, shift.unsqueeze(1))
        return (found.score + change).to(z.dtype)

    def data_prediction(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """E[x_0 | z_t, y], ``(B, *D)``; one score evaluation."""
        found, shift = self._guide(z, t, own_data=self.score.predicts_data, **options)
        return (found.data + shift).to(z.dtype)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if the score cannot be evaluated, or nothing of the data is left."""
        super().check_times(t)
        lost = self.sde.kappa(t) == -math.inf
        if bool(lost.any()):
            raise ValueError(
                f"t must be earlier than {float(t[lost].min()):g} for a PosteriorScore, because "
                f"nothing of x_0 is left there; take t ≤ {self.sde.regular_until:.15g}"
            )

    def part(self, samples: slice, shape: Sequence[int]) -> Self:
        """The score of some samples: one observation per sample keeps the rows of these."""
        observation = self.observation.part(samples, shape)
        return self._changed({"score": self.score.part(samples, shape)}, observation=observation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.observation = self.observation.with_y(fn(self.observation.y))
        if isinstance(self.observation.forward, nn.Module):
            self.observation.forward._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def guide(self, z: Tensor, t: TimeLike, **options: Any) -> Guided:
        """D, D_y − D, and log p̃(y | z) with R as a dense matrix, for particle samplers.

        For ``"pigdm"``, p̃ = N(y; A D, R). For ``"moments"``, p̃ is 0.9 of this density plus 0.1 of
        the density for ``"pigdm"``, and takes one gradient of the score per number of y. ``"dps"``
        has no likelihood and raises a ValueError.
        """
        if self.method == "dps":
            raise ValueError("method must be 'moments' or 'pigdm' to weigh particles; got 'dps'")
        found = self._linearise(z, t, **options)
        residual = self.observation.residual(found.data)
        root, wide = self._dense_roots(found, residual)
        flat = residual.flatten(1).unsqueeze(-1)
        likelihood, whitened = _log_normal(flat, root)
        if root is not wide:
            other, _ = _log_normal(flat, wide)
            likelihood = torch.logaddexp(
                likelihood + math.log1p(-_DEFENSIVE), other + math.log(_DEFENSIVE)
            )
        weight = torch.linalg.solve_triangular(root.mT, whitened, upper=True)
        pulled = self.observation.adjoint(weight.reshape(residual.shape), found.data.shape[1:])
        return Guided(found.data, found.spread(pulled), likelihood)

    def _guide(self, z: Tensor, t: TimeLike, **options: Any) -> tuple[_Linearised, Tensor]:
        """The linearised score and D_y − D."""
        found = self._linearise(z, t, **options)
        observation, shape = self.observation, found.data.shape[1:]
        variance = observation.noise_std**2
        residual = observation.residual(found.data)

        def isotropic(v: Tensor) -> Tensor:
            seen = observation.forward(observation.adjoint(v, shape))
            return per_sample(found.isotropic, v) * seen + variance * v

        # No eigenvalue of a covariance exceeds its trace, on average the trace of the data's.
        total = self.data_variance * math.prod(shape)

        def moments(v: Tensor) -> tuple[Tensor, Tensor]:
            pulled = found.spread(observation.adjoint(v, shape))
            # For a covariance |V w|² is at most its largest eigenvalue times wᵀV w. Without this
            # bound, a learnt Jacobian that is small for y but not for the rest of x would cause
            # large errors in the rest. Use half the bound to allow for rounding.
            least = 0.5 * (variance * dot(v, v) + dot(pulled, pulled) / total)
            return observation.forward(pulled) + variance * v, least

        if self.method == "dps":
            weight = residual / variance
        else:
            matched = self.method == "moments" and self.gradient
            weight = conjugate_gradients(
                moments if matched else lambda v: (isotropic(v), v.new_zeros(len(v))),
                isotropic,
                residual,
                # In exact arithmetic as many iterations as y has numbers suffice. More of them
                # amplify the error of a Jacobian that is not symmetric.
                iterations=(matched and self.iterations)
                or min(_LONGEST_SOLVE, residual[0].numel()),
            )
        return found, found.spread(observation.adjoint(weight, shape))

    def _dense_roots(self, found: _Linearised, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factors ``(B, m, m)`` of R and of the wide R of "pigdm"."""
        observation, shape = self.observation, found.data.shape[1:]
        eye = torch.eye(residual[0].numel(), dtype=residual.dtype, device=residual.device)
        noise = observation.noise_std**2 * eye
        wide = found.isotropic[:, None, None] * observation.gram(shape, residual)
        # If rows of A depend on each other and the noise is small, rounding would make R singular.
        trace = wide.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        rounding = 2 * torch.finfo(wide.dtype).eps * trace * eye
        wide_root: Tensor = torch.linalg.cholesky(wide + noise + rounding)
        wide_root = wide_root.expand(len(residual), -1, -1)
        if self.method == "pigdm" or not self.gradient:
            return wide_root, wide_root
        rows = []
        for unit in eye:
            row = observation.adjoint(unit.reshape(1, *residual.shape[1:]), shape)
            seen = observation.forward(found.spread(row.expand_as(found.data)))
            rows.append(seen.flatten(1))
        R = torch.stack(rows, 1)
        root, faults = torch.linalg.cholesky_ex((R + R.mT) / 2 + noise)
        return torch.where((faults > 0)[:, None, None], wide_root, root), wide_root

    def _linearise(
        self,
        z: Tensor,
        t: TimeLike,
        *,
        own_data: bool = False,
        planned: PlannedTime | None = None,
        **conditions: Any,
    ) -> _Linearised:
        """Score, data prediction and its Jacobian; with ``own_data`` the score's own prediction."""
        check_state(z, self.sde.components)
        if torch.is_grad_enabled() and z.requires_grad:
            raise ValueError(
                "z must not require gradients, because a PosteriorScore cannot be differentiated; "
                "pass z.detach()"
            )
        dtype = torch.promote_types(z.dtype, torch.float32)
        self.observation.check(z.shape[2:], dtype=dtype, device=z.device)
        driven = len(self.sde.driven)
        # V needs gradients, which solvers disable.
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradient):
            t, planned = _recordable(t, z, planned)
            at = coefficients_at(self, t, z, self._coefficients, dtype, planned=planned)
            # In half precision, small gradients would underflow.
            state = z.detach().to(dtype, copy=True).requires_grad_(self.gradient)
            if own_data:
                value = self.score.data_prediction(state, t, planned=planned, **conditions)
                score, mean = torch.zeros_like(state[:, :driven]), value
            else:
                value = self.score(state, t, planned=planned, **conditions)
                score = checked_score(value, state, driven)
                mean = (apply_blocks(at.state, state) + apply_blocks(at.score, score))[:, 0]
            if self.gradient and not value.requires_grad:
                raise ValueError(
                    "score must be differentiable with respect to its state; it returned a tensor "
                    "without gradients. Remove torch.no_grad from it, or take gradient=False"
                )
        variance = at.variance.flatten()
        isotropic = variance * self.data_variance / (variance + self.data_variance)

        def spread(w: Tensor) -> Tensor:
            if not self.gradient:
                return per_sample(isotropic, w) * w
            with torch.inference_mode(False):
                w = w.clone() if w.is_inference() else w
                (slope,) = torch.autograd.grad(mean, state, w, retain_graph=True)
                return per_sample(variance, w) * apply_blocks(at.psi, slope)[:, 0]

        return _Linearised(score.detach(), mean.detach(), spread, at, isotropic)

    def _coefficients(self, t: Tensor) -> _Coefficients:
        whitened = whiten(self.sde, self.sde.marginal(t), t)
        data, score = whitened.convert("score", "data"), whitened.convert("data", "score")
        variance = 1 / whitened.information()
        return _Coefficients(data.state, data.value, whitened.psi.mT, score.value, variance)


def _log_normal(residual: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Log-densities ``(B,)`` of residuals ``(B, m, 1)`` with covariances LLᵀ, and L⁻¹ residual."""
    whitened = torch.linalg.solve_triangular(root, residual, upper=False)
    volume = root.diagonal(dim1=1, dim2=2).log().sum(1)
    constant = 0.5 * residual.shape[1] * math.log(2 * math.pi)
    return -0.5 * whitened.square().sum((1, 2)) - volume - constant, whitened


def _recordable(
    t: TimeLike, z: Tensor, planned: PlannedTime | None
) -> tuple[Tensor, PlannedTime | None]:
    """Times as a score receives them, as tensors that autograd can record in inference mode."""
    if not isinstance(t, Tensor):
        return score_argument(score_times(t, z), z).expand(len(z)), None
    if not t.is_inference():
        return t, planned
    shared = t.ndim == 1 and t.stride() == (0,) and len(t) > 0
    copy = t[:1].clone().expand(len(t)) if shared else t.clone()
    return copy, planned and planned.moved(t, copy)
