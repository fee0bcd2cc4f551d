r"""Log-likelihoods by the probability-flow ODE.

Along the flow dz/dt = f(z, t) = F z − ½ GGᵀ s the log-density of the model obeys the instantaneous
change of variables (Song et al. 2021, §4.3),

.. math:: \log p_t(z_t) = \log p_T(z_T) + ∫_t^T ∇·f\,dτ, \qquad
          ∇·f = D\,\mathrm{tr}F − \tfrac12 \sum_{i,j\ \text{driven}} (G G^⊤)_{ij}\,
          \mathrm{tr}\frac{∂ s_i}{∂ z_j}.

That is the density of the whole state at t > 0. The likelihood of data needs two things more: the
auxiliary components are integrated out by importance sampling, whose expected logarithm is a lower
bound, and the gap between 0 and t is bridged (see `log_likelihood`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, flatten_data
from cldsde.linear.checks import check_at_least, check_between, check_positive, check_state
from cldsde.linear.covariance import joint_root
from cldsde.linear.kernel import Gaussian
from cldsde.linear.random import standard_normal
from cldsde.score.checks import one_of
from cldsde.score.conversion import whiten
from cldsde.score.reverse import ReverseProcess, checked_score, score_argument

__all__ = [
    "FlowDensity",
    "Likelihood",
    "bits_per_dim",
    "dequantise",
    "flow_log_prob",
    "log_likelihood",
]

Divergence = Literal["exact", "hutchinson"]
Start = Literal["perturb", "replace"]

_BACKWARD_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class FlowDensity:
    """Log-density of states under the model, and where the flow takes them.

    Attributes
    ----------
    log_prob
        Log-density of the prior at ``latent`` plus ``divergence``, ``(B,)`` nats.
    latent
        The states at T, ``(B, k, *D)``.
    divergence
        ∫ ∇·f along the path, ``(B,)``.
    nfev
        Score evaluations.
    """

    log_prob: Tensor
    latent: Tensor
    divergence: Tensor
    nfev: int


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihood of data.

    Attributes
    ----------
    log_prob
        ``(B,)`` nats.
    standard_error
        Of each estimate, ``(B,)``, from the scatter of its samples; NaN if there is but one.
    is_bound
        Whether the expectation of ``log_prob`` is a lower bound instead of the value itself.
    dimension
        Numbers of a datum, D.
    nfev
        Score evaluations of each sample of each datum.
    """

    log_prob: Tensor
    standard_error: Tensor
    is_bound: bool
    dimension: int
    nfev: int

    def bits_per_dim(self, bin_width: float = 1.0) -> Tensor:
        """Negative log-likelihood in bits a dimension, ``(B,)``; see `bits_per_dim`."""
        return bits_per_dim(self.log_prob, self.dimension, bin_width)


def bits_per_dim(log_prob: Tensor, dimension: int, bin_width: float = 1.0) -> Tensor:
    """Negative log-likelihood in bits a dimension of the discrete data that were dequantised.

    Parameters
    ----------
    log_prob
        Log-density in nats.
    dimension
        Numbers of a datum.
    bin_width
        Distance of two levels in the units of the density: 2/256 for bytes scaled to [−1, 1],
        1/256 for [0, 1]; 1 for a density of its own.

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
    """Spread discrete levels uniformly over their bins, (level + U) / count, scaled to [low, high].

    The density of the result bounds the probability of the levels (Theis et al. 2016): pass
    ``bin_width=(high - low) / count`` to `bits_per_dim`.

    Parameters
    ----------
    levels
        Integers in 0 … count − 1, of any shape.
    count
        Number of levels.
    low, high
        Ends of the scale.
    generator
        Source of U.

    Returns
    -------
    Tensor
        float32, of the shape of ``levels``.

    Raises
    ------
    TypeError
        If the levels are not integers.
    ValueError
        If a level is out of range or low ≥ high.
    """
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.is_complex():
        got = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        msg = f"levels must be a tensor of integers; got {got}"
        raise TypeError(msg)
    check_at_least(count, 2, "count")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        msg = f"low must be below high, and both finite; got {low} and {high}"
        raise ValueError(msg)
    if levels.numel() and not (int(levels.min()) >= 0 and int(levels.max()) < count):
        msg = f"levels must lie in 0 … {count - 1}; got {int(levels.min())} to {int(levels.max())}"
        raise ValueError(msg)
    source = levels.device if generator is None else generator.device
    uniform = torch.rand(levels.shape, generator=generator, device=source).to(levels.device)
    return low + (high - low) * (levels + uniform) / count


def flow_log_prob(
    process: ReverseProcess,
    z: Tensor,
    t: float,
    *,
    divergence: Divergence = "exact",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_nfev: int = 100_000,
    generator: torch.Generator | None = None,
) -> FlowDensity:
    """Log-density of states at time t under the model, by its probability-flow ODE.

    The ODE is solved by torchdiffeq in float64 (float32 on devices that have no other), the score
    sees states of the dtype given. The tolerances hold for each sample, the divergence integral
    included; steps are those of the sample that needs the shortest. Times are kept in [t, T].
    Nothing of the result carries gradients.

    Parameters
    ----------
    process
        Forward process and score; the score must be differentiable in the state.
    z
        States ``(B, k, *D)``.
    t
        Time of the states, 0 ≤ t < T.
    divergence
        ``"exact"``: D·len(driven) backward passes an evaluation. ``"hutchinson"``: one, with a
        random vector of signs for each sample that stays fixed along its path; unbiased.
    rtol, atol
        Tolerances of the ODE solver.
    method
        Of torchdiffeq: ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or ``"adaptive_heun"``.
    max_nfev
        Evaluations after which to give up.
    generator
        Source of the signs.

    Returns
    -------
    FlowDensity
        In float64 (float32 on devices that have no other).

    Raises
    ------
    ValueError
        If an argument is out of range or shapes do not fit.
    FloatingPointError
        If the score is not finite.
    RuntimeError
        If ``max_nfev`` is exhausted or the tolerances cannot be met.

    Examples
    --------
    >>> import torch
    >>> from cldsde import VPSDE, GaussianMixture
    >>> sde, data = VPSDE(), GaussianMixture([1.0], [[1.0]], [[[0.25]]])
    >>> x = torch.tensor([[[0.5]]], dtype=torch.float64)
    >>> found = flow_log_prob(ReverseProcess(sde, data.score(sde)), x, 1e-3)
    >>> exact = data.log_prob(sde, x, 1e-3)
    >>> bool((found.log_prob - exact).abs() < 1e-2)  # the prior is p_T up to e^{-B/2} = 0.007
    True
    """
    from torchdiffeq import odeint  # imports scipy, ten times as long as cldsde takes

    if not isinstance(process, ReverseProcess):
        msg = f"process must be a ReverseProcess; got {type(process).__name__}"
        raise TypeError(msg)
    sde = process.sde
    check_state(z, sde.components)
    if not bool(z.isfinite().all()):
        msg = "z must be finite; it holds NaN or infinity"
        raise ValueError(msg)
    check_between(t, 0.0, sde.T * (1 - 1e-9), "t")
    one_of(divergence, Divergence, "divergence")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_at_least(max_nfev, 1, "max_nfev")
    if method not in _ADAPTIVE:
        msg = f"method must be one of {', '.join(map(repr, _ADAPTIVE))}; got {method!r}"
        raise ValueError(msg)
    precision = torch.float32 if z.device.type == "mps" else torch.float64
    flow = _Flow(process, z, t, divergence, max_nfev, generator)
    start = (z.detach().to(precision), z.new_zeros(len(z), dtype=precision))
    if len(z) == 0:
        return FlowDensity(start[1], start[0], start[1], 0)
    ends = torch.tensor([t, sde.T], dtype=precision, device=z.device)
    options = {"norm": _worst_sample, "step_t": ends[1:]}
    try:
        with torch.no_grad():
            states, integrals = odeint(
                flow, start, ends, rtol=rtol, atol=atol, method=method, options=options
            )
    except AssertionError as error:
        if "underflow" not in str(error):
            raise
        msg = f"rtol, atol: {rtol:g} and {atol:g} cannot be met; the step length underflowed"
        raise RuntimeError(msg) from error
    latent, integral = states[-1], integrals[-1]
    return FlowDensity(sde.prior.log_prob(latent) + integral, latent, integral, flow.nfev)


# Those of torchdiffeq that keep a tolerance; fehlberg2 misses it a hundredfold.
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


def _worst_sample(y: tuple[Tensor, Tensor]) -> Tensor:
    """Largest scaled error of a sample, so that the tolerances do not average over the batch."""
    z, integral = y
    return torch.maximum(z.square().flatten(1).mean(1).sqrt(), integral.abs()).max()


class _Flow:
    """Right-hand side: velocity of the flow and its divergence."""

    def __init__(
        self,
        process: ReverseProcess,
        z: Tensor,
        t: float,
        divergence: Divergence,
        max_nfev: int,
        generator: torch.Generator | None,
    ) -> None:
        self.nfev = 0
        self._process = process
        self._interval = (t, process.sde.T)
        self._max_nfev = max_nfev
        self._dtype = z.dtype
        self._driven = list(process.sde.driven)
        self._dimension = math.prod(z.shape[2:])
        shape = (len(z), len(self._driven), *z.shape[2:])
        self._signs: Tensor | None = None
        if divergence == "hutchinson":
            draws = standard_normal(
                shape, generator=generator, dtype=torch.float32, device=z.device
            )
            self._signs = torch.where(draws < 0, -1.0, 1.0)

    def __call__(self, time: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfev += 1
        if self.nfev > self._max_nfev:
            msg = f"max_nfev: {self._max_nfev} evaluations did not reach T; relax rtol and atol"
            raise RuntimeError(msg)
        sde, z = self._process.sde, y[0]
        # The probe for the first step length may look beyond the interval.
        low, high = self._interval
        t = time.cpu().to(torch.float64).clamp(low, high)
        if not bool(t.isfinite()):
            msg = "rtol, atol: they cannot be met; the first step length is not finite"
            raise RuntimeError(msg)
        F, G = sde.drift(t), sde.diffusion(t)
        pull = (G @ G.mT)[..., self._driven]
        with torch.enable_grad():
            leaf = z.detach().to(self._dtype).requires_grad_()
            score = self._process.score(leaf, score_argument(t, leaf).expand(len(z)))
            score = checked_score(score, leaf, len(self._driven))
            force = apply_blocks(pull[self._driven], score.to(z.dtype))
            if not bool(score.isfinite().all()):
                msg = f"the score is not finite at t = {float(t):g}"
                raise FloatingPointError(msg)
            trace = self._trace(force, leaf)
        velocity = apply_blocks(F, z) - 0.5 * apply_blocks(pull, score.detach().to(z.dtype))
        divergence = self._dimension * float(F.detach().trace()) - 0.5 * trace.to(z.dtype)
        return velocity, divergence

    def _trace(self, force: Tensor, leaf: Tensor) -> Tensor:
        """Trace of ∂force/∂z over the driven components, ``(B,)``."""
        n = len(leaf)
        if not force.requires_grad:
            msg = (
                "process: its score must be differentiable in the state; it returned a tensor "
                "without a graph, as under torch.no_grad or after detach"
            )
            raise ValueError(msg)
        if self._signs is not None:
            signs = self._signs.to(force)
            (slope,) = torch.autograd.grad(force, leaf, signs, materialize_grads=True)
            return (slope[:, self._driven] * signs).flatten(1).sum(1)
        size = force[0].numel()
        trace = torch.zeros(n, dtype=force.dtype, device=force.device)
        for first in range(0, size, _BACKWARD_AT_ONCE):
            entries = torch.arange(first, min(first + _BACKWARD_AT_ONCE, size))
            basis = torch.zeros(len(entries), size, dtype=force.dtype, device=force.device)
            basis[torch.arange(len(entries)), entries] = 1.0
            directions = basis.reshape(len(entries), 1, *force.shape[1:]).expand(-1, *force.shape)
            (slopes,) = torch.autograd.grad(
                force,
                leaf,
                directions,
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
            if slopes is None:  # the score ignores the state
                return trace
            rows = slopes[:, :, self._driven].flatten(2)
            trace = trace + (rows * basis.unsqueeze(1)).sum((0, 2))
        return trace


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

    A state is drawn for each datum from a law q, and the logarithm of

    .. math:: w = \frac{p_{t_{min}}(z)\ p(x_0 \mid z)}{q(z \mid x_0)}

    averaged. E w is the model's density at x_0 and E log w a lower bound on its logarithm.

    ``start="perturb"``
        q is the forward process given x_0 at ``t_min``. The model's density of data is that of the
        estimate x̃ = ψᵀΣ⁻¹z / ψᵀΣ⁻¹ψ with the noise N(0, 1/ψᵀΣ⁻¹ψ) that it has, p(x_0 | z): a
        proper bound for a model that stops at ``t_min``.
    ``start="replace"``
        The state is (x_0, v) with auxiliary components v of the process's initial law, and p(x_0|z)
        is left out: the density of the model's x at ``t_min``, taken at the data (the common
        practice). Without auxiliary components it is a value; with them a bound on that value.
        Velocities heat up from their initial law; where their variance at ``t_min`` is twice that,
        importance weights no longer have a variance, and ``standard_error`` means nothing: take a
        smaller ``t_min`` or ``"perturb"``.

    Parameters
    ----------
    process
        Forward process and score; the score must be differentiable in the state.
    x0
        Data ``(B, *D)``, floating point.
    t_min
        Time at which the model stops, 0 < t_min < T.
    start
        See above.
    samples
        States drawn for each datum.
    importance_weighted
        Average w instead of log w over the samples: a tighter bound (Burda et al. 2016). Needs the
        exact divergence, since noise in log w would bias the mean of w upwards.
    divergence, rtol, atol, method, max_nfev
        See `flow_log_prob`.
    generator
        Source of all noise.

    Returns
    -------
    Likelihood
        In nats; `Likelihood.bits_per_dim` converts.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes do not fit, or the auxiliary components have no
        initial density where ``start="replace"`` needs it.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> sde, data = CLD(), GaussianMixture([1.0], [[1.0]], [[[0.25]]])
    >>> process = ReverseProcess(sde, data.score(sde))
    >>> x = torch.tensor([[0.5]], dtype=torch.float64)
    >>> g = torch.Generator().manual_seed(0)
    >>> found = log_likelihood(process, x, samples=16, importance_weighted=True, generator=g)
    >>> found.is_bound, found.nfev > 0
    (True, True)
    """
    if not isinstance(process, ReverseProcess):
        msg = f"process must be a ReverseProcess; got {type(process).__name__}"
        raise TypeError(msg)
    sde = process.sde
    mean = sde.embed(x0)
    check_between(t_min, 1e-300, sde.T * (1 - 1e-9), "t_min")
    one_of(start, Start, "start")
    one_of(divergence, Divergence, "divergence")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        msg = f"samples must be a positive integer; got {samples!r}"
        raise ValueError(msg)
    if x0.numel() == 0 and len(x0):
        msg = f"x0 must hold at least one number a datum; got shape {tuple(x0.shape)}"
        raise ValueError(msg)
    if importance_weighted and divergence != "exact":
        msg = (
            "importance_weighted needs divergence='exact': the noise of a Hutchinson estimate "
            "would bias the mean of the weights"
        )
        raise ValueError(msg)
    repeated = mean.repeat_interleave(samples, dim=0)
    draw = _perturbed if start == "perturb" else _replaced
    z, log_ratio = draw(process, repeated, t_min, generator)
    density = flow_log_prob(
        process,
        z,
        t_min,
        divergence=divergence,
        rtol=rtol,
        atol=atol,
        method=method,
        max_nfev=max_nfev,
        generator=generator,
    )
    log_w = (density.log_prob + log_ratio).reshape(len(x0), samples)
    if importance_weighted:
        log_prob = log_w.logsumexp(1) - math.log(samples)
        # Relative to their mean the weights scatter as the logarithm of it does (delta method).
        spread = (log_w - log_prob.unsqueeze(1)).exp()
    else:
        log_prob, spread = log_w.mean(1), log_w
    unknown = torch.full_like(log_prob, math.nan)
    return Likelihood(
        log_prob=log_prob,
        standard_error=spread.std(1) / math.sqrt(samples) if samples > 1 and len(x0) else unknown,
        is_bound=start == "perturb" or sde.components > 1,
        dimension=math.prod(x0.shape[1:]),
        nfev=density.nfev,
    )


def _perturbed(
    process: ReverseProcess, mean: Tensor, t: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States from the forward process and log p(x_0 | z) / q(z | x_0)."""
    sde = process.sde
    times = torch.tensor(t, dtype=torch.float64)
    kernel = sde.marginal(times)
    law = whiten(sde, kernel, times)
    z, epsilon = kernel.perturb(mean, generator=generator)
    # In whitened coordinates L⁻¹(z − ψx_0) the error of x̃ is c·w/|c|², so that both Gaussians are
    # functions of the same noise: p(x_0|z)/q(z|x_0) leaves that of the directions normal to c.
    return z, _noise_ratio(law.inverse @ kernel.root, law.signal, epsilon, kernel.root)


def _noise_ratio(rotation: Tensor, signal: Tensor, epsilon: Tensor, root: Tensor) -> Tensor:
    precision = torch.promote_types(epsilon.dtype, torch.float32)
    white = flatten_data(apply_blocks(rotation, epsilon.to(precision)))
    size = torch.linalg.vector_norm(signal)
    along = (apply_blocks((signal / size).mT, white)).squeeze(1)
    k, dimension = white.shape[1:]
    quadratic = white.square().sum((1, 2)) - along.square().sum(1)
    log_det = float((root.diagonal().log().sum() + size.log()).detach())
    return 0.5 * quadratic + dimension * (log_det + 0.5 * (k - 1) * math.log(2 * math.pi))


def _replaced(
    process: ReverseProcess, mean: Tensor, t: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States (x_0, v) with v of the initial law, and −log of its density."""
    sde = process.sde
    if sde.components == 1:
        return mean, mean.new_zeros(len(mean))
    root = joint_root(sde.initial_root[1:])
    if not bool((root.diagonal() > 0).all()):
        msg = (
            "start='replace' needs auxiliary components that start with a density, e.g. "
            "velocity_scale > 0; use start='perturb'"
        )
        raise ValueError(msg)
    rest = mean[:, 1:]
    noise = standard_normal(rest.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    auxiliary = apply_blocks(root, noise)
    return torch.cat([mean[:, :1], auxiliary], dim=1), -Gaussian(root).log_prob(auxiliary)
