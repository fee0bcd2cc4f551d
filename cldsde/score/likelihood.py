"""Log-likelihoods of data by the probability-flow ODE, in nats and in bits per dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, flatten_data
from cldsde.linear.checks import (
    as_integer,
    check_at_least,
    check_between,
    check_positive,
    described,
    one_of,
)
from cldsde.linear.covariance import joint_root
from cldsde.linear.kernel import Gaussian
from cldsde.linear.random import check_generator, standard_normal
from cldsde.linear.sde import LinearSDE
from cldsde.score.conversion import whiten
from cldsde.score.flow_density import Divergence, flow_log_prob
from cldsde.score.reverse import ReverseProcess, check_reverse_process

Start = Literal["perturb", "replace"]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihood of data; the result of `log_likelihood`."""

    log_prob: Tensor  #: Log-likelihood of each data point, ``(B,)`` nats.
    standard_error: Tensor  #: From the spread of the samples, ``(B,)``; NaN for a single sample.
    is_bound: bool  #: Whether the expectation of ``log_prob`` is a lower bound, not the value.
    dimension: int  #: Number D of entries of a data point.
    nfev: int  #: Score evaluations of each sample of each data point.

    def bits_per_dim(self, bin_width: float = 1.0) -> Tensor:
        """Negative log-likelihood in bits per dimension, ``(B,)``; see `bits_per_dim`."""
        return bits_per_dim(self.log_prob, self.dimension, bin_width)


def log_likelihood(
    process: ReverseProcess,
    x0: Tensor,
    t_min: float = 1e-5,
    *,
    start: Start = "perturb",
    samples: int = 1,
    importance_weighted: bool = False,
    divergence: Divergence = "exact",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_nfev: int = 100_000,
    generator: torch.Generator | None = None,
) -> Likelihood:
    r"""Log-likelihood of data under the model, by its probability-flow ODE.

    The result is the average, over states that are drawn from a distribution q, of the logarithm of

    .. math:: w = \frac{p_{t_{min}}(z)\ p(x_0 \mid z)}{q(z \mid x_0)}.

    E w is the model's density at x_0, and E log w is a lower bound on its logarithm.

    Parameters
    ----------
    process
        Forward process and score. The score must be differentiable in the state.
    x0
        Data ``(B, *D)``, floating point.
    t_min
        Time at which the model stops, 0 < t_min < T.
    start
        ``"perturb"``: q is the forward process given x_0 at ``t_min``, and p(x_0 | z) = N(x̃, 1/I)
        with x̃ = ψᵀΣ⁻¹z / I and I = ψᵀΣ⁻¹ψ. It is a bound for a model that stops at ``t_min``.

        ``"replace"``: the state is (x_0, v) with auxiliary components v from their initial
        distribution, and p(x_0 | z) is left out. This is the common practice: the density of the
        model's x at ``t_min``, evaluated at the data. It is exact without auxiliary components, and
        a bound with them. If the variance of the velocity has doubled at ``t_min``, w has infinite
        variance and ``standard_error`` is meaningless: take a smaller ``t_min`` or ``"perturb"``.
    samples
        Number of states drawn for each data point, ≥ 1.
    importance_weighted
        Average w instead of log w over the samples, for a tighter bound (Burda et al. 2016). It
        needs the exact divergence.
    divergence, rtol, atol, method, max_nfev
        See `flow_log_prob`.
    generator
        Random generator of all noise.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes do not fit, or ``start="replace"`` and the auxiliary
        components have no initial density. `flow_log_prob` raises further errors.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> sde, data = CLD(), GaussianMixture([1.0], [[1.0]], [[[0.25]]])
    >>> x = torch.tensor([[0.5]], dtype=torch.float64)
    >>> found = log_likelihood(ReverseProcess(sde, data.score(sde)), x, rtol=1e-3, atol=1e-3)
    >>> found.log_prob.shape, found.is_bound
    (torch.Size([1]), True)
    """
    check_reverse_process(process)
    sde, mean = process.sde, process.sde.embed(x0)
    check_between(t_min, 1e-300, 1 - 1e-9, "t_min")
    one_of(start, Start, "start")
    _check_sampling(x0, samples, divergence, importance_weighted=importance_weighted)
    draw = _perturbed if start == "perturb" else _replaced
    z, log_ratio = draw(sde, mean.repeat_interleave(samples, dim=0), t_min, generator)
    solved = partial(flow_log_prob, rtol=rtol, atol=atol, method=method, max_nfev=max_nfev)
    density = solved(process, z, t_min, divergence=divergence, generator=generator)
    log_w = (density.log_prob + log_ratio).reshape(len(x0), samples)
    log_prob, standard_error = _averaged(log_w, importance_weighted=importance_weighted)
    is_bound = start == "perturb" or sde.components > 1
    dimension = math.prod(x0.shape[1:])
    return Likelihood(log_prob, standard_error, is_bound, dimension, density.nfev)


def _check_sampling(
    x0: Tensor, samples: int, divergence: Divergence, *, importance_weighted: bool
) -> None:
    """Raise an error unless data, samples and divergence give an average without bias."""
    one_of(divergence, Divergence, "divergence")
    as_integer(samples, 1, "samples")
    if x0.numel() == 0 and len(x0):
        msg = f"x0 must hold at least one number per data point; got shape {tuple(x0.shape)}"
        raise ValueError(msg)
    if importance_weighted and divergence != "exact":
        raise ValueError(
            "divergence must be 'exact' with importance_weighted=True, because the noise of a "
            f"Hutchinson estimate would bias the mean of the weights; got {divergence!r}"
        )


def _averaged(log_w: Tensor, *, importance_weighted: bool) -> tuple[Tensor, Tensor]:
    """Estimate of log E w or of E log w from samples ``(B, S)``, and its standard error."""
    count, samples = log_w.shape
    if importance_weighted:
        average = log_w.logsumexp(1) - math.log(samples)
        # By the delta method, the log of the mean has the relative spread of the weights.
        spread = (log_w - average.unsqueeze(1)).exp()
    else:
        average, spread = log_w.mean(1), log_w
    if samples == 1 or count == 0:
        return average, torch.full_like(average, math.nan)
    return average, spread.std(1) / math.sqrt(samples)


def _perturbed(
    sde: LinearSDE, mean: Tensor, t: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States from the forward process and log p(x_0 | z) / q(z | x_0)."""
    times = torch.tensor(t, dtype=torch.float64, device="cpu")
    kernel = sde.marginal(times)
    whitened = whiten(sde, kernel, times)
    z, epsilon = kernel.perturb(mean, generator=generator)
    # In whitened coordinates w = L⁻¹(z − ψx_0) the error of x̃ is c·w/|c|². Both Gaussians are
    # functions of the same noise, so p(x_0|z)/q(z|x_0) depends on the directions normal to c only.
    epsilon = epsilon.to(torch.promote_types(epsilon.dtype, torch.float32))
    white = flatten_data(apply_blocks(whitened.inverse @ kernel.root, epsilon))
    size = torch.linalg.vector_norm(whitened.signal)
    along = apply_blocks((whitened.signal / size).mT, white).squeeze(1)
    k, dimension = white.shape[1:]
    quadratic = white.square().sum((1, 2)) - along.square().sum(1)
    log_det = float((kernel.root.diagonal().log().sum() + size.log()).detach())
    constant = dimension * (log_det + 0.5 * (k - 1) * math.log(2 * math.pi))
    return z, 0.5 * quadratic + constant


def _replaced(
    sde: LinearSDE, mean: Tensor, t: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States (x_0, v) with v from its initial distribution, and minus the log of its density."""
    if sde.components == 1:
        return mean, mean.new_zeros(len(mean))
    root = joint_root(sde.initial_root[1:])
    if not bool((root.diagonal() > 0).all()):
        raise ValueError(
            "start='replace' needs auxiliary components with an initial density, e.g. "
            "velocity_scale > 0; use start='perturb'"
        )
    rest = mean[:, 1:]
    noise = standard_normal(rest.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    auxiliary = apply_blocks(root, noise)
    return torch.cat([mean[:, :1], auxiliary], dim=1), -Gaussian(root).log_prob(auxiliary)


def bits_per_dim(log_prob: Tensor, dimension: int, bin_width: float = 1.0) -> Tensor:
    """Negative log-likelihood in bits per dimension of dequantised discrete data.

    Parameters
    ----------
    log_prob
        Log-density in nats, of any shape, which the result has, too.
    dimension
        Number D of entries of a data point.
    bin_width
        Distance between two levels in the units of the density: 2/256 for bytes scaled to [−1, 1],
        1/256 for [0, 1], and 1 for continuous data.

    Examples
    --------
    >>> import torch
    >>> round(float(bits_per_dim(torch.tensor(0.0), 3072, bin_width=2 / 256)), 12)
    7.0
    """
    check_at_least(dimension, 1, "dimension")
    check_positive(bin_width, "bin_width")
    return -log_prob / (dimension * math.log(2)) - math.log2(bin_width)


def dequantise(
    levels: Tensor,
    *,
    count: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniform dequantisation: (level + U) / count with U ~ U(0, 1), scaled to [low, high].

    The density of the result bounds the probability of the levels (Theis et al. 2016): pass
    ``bin_width=(high - low) / count`` to `bits_per_dim`.

    Parameters
    ----------
    levels
        Integers in 0 … count − 1, of any shape. The result has this shape, float32.
    count, low, high
        Number of levels, and ends of the scale.
    generator
        Random generator of U.

    Raises
    ------
    TypeError, ValueError
        If the levels are not integers, a level is out of range, or low ≥ high.
    """
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.is_complex():
        raise TypeError(f"levels must be a tensor of integers; got {described(levels)}")
    check_generator(generator, several=False)
    check_at_least(count, 2, "count")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low must be below high, and both finite; got {low} and {high}")
    if levels.numel() and not (int(levels.min()) >= 0 and int(levels.max()) < count):
        msg = f"levels must lie in 0 … {count - 1}; got {int(levels.min())} to {int(levels.max())}"
        raise ValueError(msg)
    source = levels.device if generator is None else generator.device
    uniform = torch.rand(levels.shape, generator=generator, device=source).to(levels.device)
    return low + (high - low) * (levels + uniform) / count
