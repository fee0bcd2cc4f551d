"""Gaussian mixtures as data distributions, with exact densities and scores under any linear SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import flatten_data
from cldsde.linear.checks import TimeLike, as_float64, check_at_least, check_state, one_of
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import check_density
from cldsde.linear.random import check_generator, standard_normal
from cldsde.linear.reprs import constructor_repr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.observation import Observation, conditioned
from cldsde.score.operators import Copies
from cldsde.score.protocol import Score
from cldsde.score.times import PlannedTime, coefficients_at, on_device, score_times

Rows = Literal["driven", "all", "auxiliary"]
"""Components whose score is computed."""

_DENSE = 32  # largest size of a state for which dense matrices over all its numbers are fast


class _Marginal(NamedTuple):
    """The distribution of z_t for each of n mixture components, in the basis of its covariance."""

    psi: Tensor  # (*, k), maps the data to the mean of the state
    mean: Tensor  # (*, n, k, D)
    whitening: Tensor  # (*, n, D, k, k), inverse of the triangular root
    log_scale: Tensor  # (*, n), log weight + log normalisation
    data_log_scale: Tensor  # (*, n), the same for the data component of the state alone


class _DenseMarginal(NamedTuple):
    """The same for small states, as matrices over all numbers, component by component."""

    mean: Tensor  # (*, n, k D, 1)
    whitening: Tensor  # (*, n, k D, k D)
    log_scale: Tensor  # (*, n, 1)
    pull: Tensor  # (*, d D, n k D), from whitened residuals to the score

    def score(self, flat: Tensor) -> Tensor:
        """Score ``(B, d D)`` of states ``(B, k, D)`` that share a time."""
        # Sums and softmaxes over few entries are much faster if the long axis, the batch, is last.
        whitened = self.whitening @ (flat.flatten(1).mT - self.mean)
        if len(whitened) > 1:
            log_terms = self.log_scale - 0.5 * whitened.square().sum(1)
            whitened = whitened * log_terms.softmax(0).unsqueeze(1)
        score: Tensor = (self.pull @ whitened.flatten(0, 1)).mT
        return score


class GaussianMixture:
    r"""Gaussian mixture Σᵢ wᵢ N(mᵢ, Cᵢ) on R^D as data, with exact scores under any linear SDE.

    In the eigenbasis of Cᵢ = U diag(λ) Uᵀ the state splits into D independent k-vectors with
    covariance Σ_t + λⱼψψᵀ, ψ = Ψ(t, 0) e₀. The root tri[L_t, √λⱼ ψ] is computed by an LQ
    factorisation. λⱼ = 0 is therefore allowed: point masses, lines, planes.

    Parameters
    ----------
    weights
        ``(n,)``, positive; they are normalised to sum 1.
    means
        ``(n, D)``.
    covariances
        ``(n, D, D)``, symmetric positive semi-definite.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type or shape, a number is not finite, a weight is not positive,
        or a covariance is not symmetric positive semi-definite or requires gradients.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> data = GaussianMixture([1.0, 1.0], [[-1.0], [1.0]], [[[0.01]], [[0.01]]])
    >>> sde = CLD()
    >>> z = sde.prior.sample((5, 1), generator=torch.Generator().manual_seed(0))
    >>> data.score(sde)(z, 0.5).shape
    torch.Size([5, 1, 1])
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor | Sequence[Sequence[float]],
        covariances: Tensor | Sequence[Sequence[Sequence[float]]],
    ) -> None:
        self.weights = _numbers(weights, "weights")
        self.means = _numbers(means, "means")
        self.covariances = _numbers(covariances, "covariances")
        axes = (self.weights.ndim, self.means.ndim, self.covariances.ndim)
        if axes != (1, 2, 3) or not self.means.numel():
            raise ValueError(
                "weights, means and covariances must have shapes (n,), (n, D) and (n, D, D), n and "
                f"D at least 1; got {tuple(self.weights.shape)}, {tuple(self.means.shape)}, "
                f"{tuple(self.covariances.shape)}"
            )
        n, dimension = self.means.shape
        if self.weights.shape != (n,) or self.covariances.shape != (n, dimension, dimension):
            raise ValueError(
                f"means of shape {(n, dimension)} need weights of shape {(n,)} and covariances of "
                f"shape {(n, dimension, dimension)}; got {tuple(self.weights.shape)} and "
                f"{tuple(self.covariances.shape)}"
            )
        if not bool((self.weights.isfinite() & (self.weights > 0)).all()):
            raise ValueError(f"weights must be finite and positive; got {self.weights.tolist()}")
        if not bool(self.means.isfinite().all() and self.covariances.isfinite().all()):
            raise ValueError("means and covariances must be finite; got NaN or infinity")
        if self.covariances.requires_grad:
            raise ValueError(
                "covariances must not require gradients, because derivatives do not exist if "
                "eigenvalues coincide; pass covariances.detach()"
            )
        scale = self.covariances.abs().amax((1, 2))
        skew = (self.covariances - self.covariances.mT).abs().amax((1, 2))
        if bool((skew > 1e-12 * scale).any()):
            raise ValueError(f"covariances must be symmetric; got {self.covariances.tolist()}")
        self.weights = self.weights / self.weights.sum()
        self._variances, self._axes = torch.linalg.eigh(self.covariances)
        if bool((self._variances.amin(1) < -1e-12 * scale).any()):
            raise ValueError(
                "covariances must be positive semi-definite; got the eigenvalue "
                f"{float(self._variances.min()):g}"
            )
        self._variances = self._variances.clamp_min(0)
        self._rotation = Copies(self._axes)

    def __repr__(self) -> str:
        return f"GaussianMixture(modes={len(self.weights)}, dimension={self.dimension})"

    @property
    def dimension(self) -> int:
        """D, the dimension of the data."""
        return self.means.shape[1]

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw ``n`` ≥ 1 data points, ``(n, D)``."""
        check_generator(generator, several=False)
        check_at_least(n, 1, "n")
        source = "cpu" if generator is None else generator.device
        which = torch.multinomial(
            self.weights.to(source, torch.float32), n, replacement=True, generator=generator
        ).to(device)
        noise = standard_normal(
            (n, self.dimension), generator=generator, dtype=dtype, device=device
        )
        roots = (self._axes * self._variances.sqrt().unsqueeze(1)).to(noise)
        return self.means.to(noise)[which] + torch.einsum("bij,bj->bi", roots[which], noise)

    def log_prob(self, sde: LinearSDE, z: Tensor, t: TimeLike) -> Tensor:
        """Log-density of the state, log p_t(z), ``(B,)`` nats in the dtype of ``z``.

        ``z`` is a state ``(B, k, *D)`` with D numbers per component, and ``t`` one time or
        ``(B,)``. t > 0 always has a density. If shapes do not fit or the distribution has no
        density at some time, a ValueError is raised.
        """
        _, _, log_terms = self._whitened(sde, z, t)
        return log_terms.logsumexp(-1).to(z.dtype)

    def conditional_log_prob(self, sde: LinearSDE, z: Tensor, t: TimeLike) -> Tensor:
        """Log-density of the auxiliary components given the data component, log p_t(v, … | x).

        Its gradient is ``score(sde, rows="auxiliary")``. See `log_prob` for arguments, result and
        errors. A process of one component raises a ValueError, too.
        """
        _rows(sde, "auxiliary")
        marginal, whitened, log_joint = self._whitened(sde, z, t)
        # The root is lower triangular, so its first row whitens x alone.
        log_data = marginal.data_log_scale - 0.5 * whitened[:, :, 0].square().sum(-1)
        return (log_joint.logsumexp(-1) - log_data.logsumexp(-1)).to(z.dtype)

    def posterior_mean(self, sde: LinearSDE, z: Tensor, t: TimeLike) -> Tensor:
        """Posterior mean E[x_0 | z_t = z], the best prediction of the data, ``(B, *D)``.

        See `log_prob` for arguments and errors.
        """
        marginal, whitened, log_terms = self._whitened(sde, z, t)
        with torch.autocast(z.device.type, enabled=False):
            signal = torch.einsum("...njkl,...l->...nkj", marginal.whitening, marginal.psi)
            gain = self._variances.to(whitened) * (signal * whitened).sum(-2)
            shift = torch.einsum("bnj,ndj->bnd", gain, self._rotation.like(gain))
            means = self.means.to(gain) + shift
            mean = torch.einsum("bn,bnd->bd", log_terms.softmax(-1), means)
        return mean.to(z.dtype).reshape(len(z), *z.shape[2:])

    def score(self, sde: LinearSDE, *, rows: Rows = "driven") -> MixtureScore:
        """Exact score ∂ log p_t(z)/∂z, as a function score(z, t).

        Parameters
        ----------
        sde
            The forward process.
        rows
            Components of the score. ``"driven"``: the components that noise enters, as a
            `ReverseProcess` needs. ``"all"``: all components. ``"auxiliary"``: all but the data,
            which is the conditional score ∂ log p_t(v, … | x)/∂(v, …). For a process of one
            component it raises a ValueError.
        """
        return MixtureScore(self, sde, rows=rows)

    def condition(self, observation: Observation) -> GaussianMixture:
        """Exact posterior p(x_0 | y) given one linear observation, which is a mixture again.

        ``mixture.condition(observation).score(sde)`` is the exact guided score ∂ log p(z_t | y)/∂z
        of any process. Modes keep their order.

        Raises
        ------
        TypeError, ValueError
            If ``observation`` is not an `Observation`, does not fit the data, holds several
            observations, or has no density.
        """
        log_evidence, means, covariances = conditioned(self.means, self.covariances, observation)
        # Weights must be positive, so a weight that underflows is set to the smallest number.
        weights = (self.weights.log() + log_evidence).softmax(0)
        return GaussianMixture(
            weights.clamp_min(torch.finfo(weights.dtype).tiny), means, covariances
        )

    def log_evidence(self, observation: Observation) -> float:
        """Log-evidence log p(y) in nats of an observation; see `condition`."""
        log_evidence, _, _ = conditioned(self.means, self.covariances, observation)
        return float((self.weights.log() + log_evidence).logsumexp(0))

    def _flat_state(self, sde: LinearSDE, z: Tensor) -> Tensor:
        flat = flatten_data(check_state(z, sde.components))
        flat = flat.to(torch.promote_types(z.dtype, torch.float32))
        if flat.shape[-1] != self.dimension:
            raise ValueError(
                f"z must hold {self.dimension} numbers per component, the mixture's dimension; "
                f"got shape {tuple(z.shape)}"
            )
        return flat

    def _marginal(self, sde: LinearSDE, t: Tensor) -> _Marginal:
        kernel = sde.marginal(t)
        psi, root = kernel.mean[..., 0], kernel.root
        spread = self._variances.sqrt()[..., None, None] * psi[..., None, None, :, None]
        factor = joint_root(root[..., None, None, :, :], spread)
        check_density(factor, t, "t")
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        # Weighted log-normalisations: the first row of the root for x alone, all rows for z.
        constant = 0.5 * self.dimension * math.log(2 * math.pi)
        scales = self.weights.log().unsqueeze(-1) - (diagonal.log().sum(-2) + constant).cumsum(-1)
        mean = psi[..., None, :, None] * self.means.unsqueeze(1)
        return _Marginal(psi, mean, triangular_inverse(factor), scales[..., -1], scales[..., 0])

    def _whitened(self, sde: LinearSDE, z: Tensor, t: TimeLike) -> tuple[_Marginal, Tensor, Tensor]:
        """The distribution of a state, and its `_terms`."""
        check_process(sde)
        flat = self._flat_state(sde, z)
        with torch.autocast(z.device.type, enabled=False):
            found = self._marginal(sde, score_times(t, z))
            marginal = _Marginal(*on_device(found, flat.dtype, flat.device))
            return marginal, *self._terms(flat, marginal)

    def _terms(self, z: Tensor, marginal: _Marginal) -> tuple[Tensor, Tensor]:
        """Whitened residuals ``(B, n, k, D)`` and log joint densities ``(B, n)``."""
        residual = z.unsqueeze(1) - marginal.mean
        residual = torch.einsum("bnkd,ndj->bnkj", residual, self._rotation.like(z))
        whitened = torch.einsum("...njkl,...nlj->...nkj", marginal.whitening, residual)
        return whitened, marginal.log_scale - 0.5 * whitened.square().sum((-2, -1))

    def _dense_marginal(self, sde: LinearSDE, rows: list[int], t: Tensor) -> _DenseMarginal:
        _, mean, blocks, log_scale, _ = self._marginal(sde, t)
        whitening = torch.einsum("...njkl,nij->...nkjli", blocks, self._axes)
        pull = -whitening[..., rows, :].flatten(-2).flatten(-4, -2).mT
        whole = whitening.flatten(-2).flatten(-3, -2)
        return _DenseMarginal(mean.flatten(-2).unsqueeze(-1), whole, log_scale.unsqueeze(-1), pull)

    def _score(self, flat: Tensor, rows: list[int], marginal: _Marginal) -> Tensor:
        whitened, log_terms = self._terms(flat, marginal)
        responsible = log_terms.softmax(-1)
        # A list of rows would be an index tensor, copied to the device.
        whitening = torch.stack([marginal.whitening[..., row] for row in rows], dim=-1)
        pulled = torch.einsum("...njkl,...nkj->...nlj", whitening, whitened)
        axes = self._rotation.like(flat)
        return -torch.einsum("bn,bnlj,ndj->bld", responsible, pulled, axes)

    def _version(self) -> object:
        """Version of weights and means, which may be learnt; None if they need gradients."""
        parts = (self.weights, self.means)
        if torch.is_grad_enabled() and any(x.requires_grad for x in parts):
            return None
        return tuple(0 if x.is_inference() else x._version for x in parts)


def _rows(sde: LinearSDE, rows: Rows) -> list[int]:
    check_process(sde)
    one_of(rows, Rows, "rows")
    if rows == "driven":
        return list(sde.driven)
    if rows == "auxiliary" and sde.components == 1:
        raise ValueError(
            f"rows must be 'driven' or 'all', because {type(sde).__name__} has no auxiliary "
            "components; got 'auxiliary'"
        )
    return list(range(1 if rows == "auxiliary" else 0, sde.components))


def _numbers(value: object, name: str) -> Tensor:
    try:
        return as_float64(value).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of real numbers; got {value!r}") from error


class MixtureScore(Score):
    """Exact score ∂ log p_t(z)/∂z of a `GaussianMixture`, which `GaussianMixture.score` makes."""

    predicts_data = True
    sde: LinearSDE

    def __init__(self, data: GaussianMixture, sde: LinearSDE, *, rows: Rows = "driven") -> None:
        super().__init__()
        self.rows = _rows(sde, rows)
        self.data = data
        self.sde = sde

    def __repr__(self) -> str:
        return constructor_repr(self)

    def forward(self, z: Tensor, t: TimeLike, *, planned: PlannedTime | None = None) -> Tensor:
        """Score ``(B, len(rows), *D)`` of states ``(B, k, *D)`` at one time or ``(B,)``."""
        data, rows = self.data, self.rows
        # Compare densities in single precision at least, also for states in half precision.
        flat, version = data._flat_state(self.sde, z), data._version()
        make: Callable[[Tensor], Any] = partial(data._marginal, self.sde)
        shared = score_times(t, z, planned).ndim == 0
        if dense := shared and self.sde.components * data.dimension <= _DENSE:
            make = partial(data._dense_marginal, self.sde, rows)
        with torch.autocast(z.device.type, enabled=False):
            table = coefficients_at(self, t, z, make, flat.dtype, planned=planned, version=version)
            score = table.score(flat) if dense else data._score(flat, rows, table)
        return score.to(z.dtype).reshape(len(z), len(rows), *z.shape[2:])

    def data_prediction(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """E[x_0 | z_t = z], ``(B, *D)``, also if the driven score does not determine it."""
        return self.data.posterior_mean(self.sde, z, score_times(t, z, **options))
