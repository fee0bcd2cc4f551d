"""Distances between a solver's samples and the exact distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from cldsde.score import GaussianMixture


def bures_wasserstein(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> float:
    r"""Wasserstein-2 (Bures–Wasserstein) distance of two Gaussians.

    .. math:: W_2^2 = |m_1 − m_2|^2 + \operatorname{tr}\bigl(C_1 + C_2
              − 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr)

    Parameters
    ----------
    mean, other_mean
        ``(d,)``.
    covariance, other_covariance
        ``(d, d)``, positive semi-definite.
    """
    first, second = covariance.to(torch.float64), other_covariance.to(torch.float64)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    shift = (mean - other_mean).to(torch.float64).square().sum()
    squared = shift + first.trace() + second.trace() - 2 * cross
    return float(squared.clamp_min(0).sqrt())


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    projections: int = 200,
    generator: torch.Generator | None = None,
) -> float:
    """Sliced Wasserstein-2 distance of two samples.

    Parameters
    ----------
    x, y
        ``(n, D)`` and ``(m, D)``.
    weights
        Weights of x, ``(n,)``, of sum 1; None weighs all alike.
    projections
        Number of random directions; one dimension needs none.
    generator
        Source of the directions.
    """
    directions = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if x.shape[1] > 1:
        directions = torch.randn(
            projections, x.shape[1], dtype=torch.float64, generator=generator, device="cpu"
        )
        directions = directions / directions.norm(dim=1, keepdim=True)
    if weights is None and len(x) == len(y):
        # The k-th smallest of x goes to the k-th smallest of y.
        first, second = ((directions @ z.double().mT).sort(1).values for z in (x, y))
        return float((first - second).square().mean().sqrt())
    values, edges = [], []  # of the quantile functions, which are steps
    for z, masses in ((x, weights), (y, None)):
        found = (directions @ z.double().mT).sort(1)
        each = torch.full((len(z),), 1 / len(z), dtype=torch.float64, device="cpu")
        values.append(found.values)
        edges.append((each if masses is None else masses.double())[found.indices].cumsum(1))
    ends = torch.cat(edges, 1).sort(1).values
    widths = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    first, second = (
        steps.gather(1, torch.searchsorted(edge, ends - widths / 2).clamp_max(steps.shape[1] - 1))
        for steps, edge in zip(values, edges, strict=True)
    )
    return float((widths * (first - second).square()).sum(1).mean().sqrt())


def mode_spread_error(x: Tensor, data: GaussianMixture, scale: float, noise: float) -> float:
    r"""Relative error of the modes' standard deviations, root mean square over modes.

    A point counts for each mode with the mode's posterior weight :math:`r_i(x)` under the exact
    distribution. Then :math:`\operatorname E r_i (x − m_i)(x − m_i)^⊤ / \operatorname E r_i = C_i`,
    however much modes overlap. The error of exact samples therefore goes to 0 with their number.

    Solvers that sharpen or blur modes show an error here long before distances between
    distributions grow, in particular for modes that lie far apart. ``x`` are samples ``(n, D)`` of
    scale · data + N(0, noise). Raises a ValueError if a mode is flat in some direction and
    ``noise`` is 0.
    """
    samples, identity = x.to(torch.float64), torch.eye(data.dimension, device="cpu")
    covariances = scale**2 * data.covariances.to(samples) + noise * identity.to(samples)
    means = scale * data.means.to(samples)
    weights = responsibilities(samples, data.weights.to(samples), means, covariances)
    total = weights.sum(1)
    own = weights / total[:, None]
    squares = (samples - (own @ samples)[:, None]).square().mean(2)
    # The estimated mean reduces the variance, by 1/n for points with equal weights.
    variances = (own * squares).sum(1) / (1 - own.square().sum(1))
    errors = (variances / covariances.diagonal(dim1=1, dim2=2).mean(1)).sqrt() - 1
    errors[total < 1.5] = 1.0  # fewer than two points
    return float(errors.square().mean().sqrt())


def responsibilities(x: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Posterior weights of the modes of a mixture at points ``(n, D)``, ``(modes, n)``.

    Raises a ValueError if a covariance is singular.
    """
    roots, faults = torch.linalg.cholesky_ex(covariances)
    if bool(faults.any()):
        msg = "data must have modes of positive width in all directions, or noise be positive"
        raise ValueError(msg)
    # Validation would reject points that are NaN, and an empty set of points.
    modes = MultivariateNormal(means[:, None], scale_tril=roots[:, None], validate_args=False)
    logits: Tensor = weights.log()[:, None] + modes.log_prob(x)
    return logits.softmax(0)
