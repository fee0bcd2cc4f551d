r"""Posterior sampling by twisted sequential Monte Carlo on the second-order multistep step.

A step of `ExponentialMultistep` with noise is Gaussian given its history,
z' = Φz + Σⱼ Bⱼ Dⱼ + Lξ. A particle takes it with the predictions D_y given the observation in place
of D. With q = L⁻¹ Σⱼ Bⱼ (D_y,j − Dⱼ) its log-weight grows by

.. math:: −q^⊤(ξ + q/2) + \log \tilde p(y | z') − \log \tilde p(y | z).

`PosteriorScore.guide` approximates p(y | z) by p̃(y | z). These products telescope: whatever D_y and
p̃ are, weighted particles approach the distribution of the sampler's z_ε, reweighted by
p̃(y | z_ε), as their number grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import as_grid_times, check_between
from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.random import check_generator, standard_normal
from cldsde.progress import progress_bar
from cldsde.score import Observation, PosteriorScore, ReverseProcess
from cldsde.score.checks import one_of
from cldsde.score.observation import check_observation
from cldsde.score.posterior_score import Guided
from cldsde.score.reverse import check_reverse_process
from cldsde.score.times import KnownTimes, PlannedTime

from .combine import Block, as_blocks, combine
from .exponential_multistep import ExponentialMultistep
from .noise import checked_seeds, start_root
from .planning import plan

__all__ = ["PosteriorSamples", "sample_posterior"]

_Generators = list[torch.Generator] | None

_Twist = Literal["moments", "pigdm"]


@dataclass(frozen=True, eq=False)
class PosteriorSamples:
    """Weighted samples of a posterior, made by `sample_posterior`.

    Attributes
    ----------
    samples
        Data ``(N, *D)``, the particles of all runs.
    log_weights
        ``(N,)`` float64 on the CPU, not normalised: the mean of their exponentials is the estimate
        of p(y). So the samples of several calls with as many particles can be put together.
    log_evidence
        Estimate of log p(y). Before the logarithm, its bias is the error of the steps alone, for
        any number of particles.
    log_evidence_std
        Its standard error, from the spread of the runs; NaN for a single run. A value near 1, the
        largest possible, means that one run has most of the weight: take more particles.
    ess
        Effective sample size of each run at each time of the grid, ``(runs, n + 1)``, before
        particles are resampled.
    nfev
        Score evaluations of each particle.
    """

    samples: Tensor
    log_weights: Tensor
    log_evidence: float
    log_evidence_std: float
    ess: Tensor = field(repr=False)
    nfev: int

    @property
    def weights(self) -> Tensor:
        """Normalised weights, ``(N,)`` float64 on the CPU."""
        return self.log_weights.softmax(0)

    def resample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples of equal weight, ``(n, *D)``, by systematic resampling.

        Samples of large weight are repeated.
        """
        check_generator(generator, several=False)
        uniform = _uniforms([generator] if generator is not None else None, 1)
        chosen = _systematic(self.weights.unsqueeze(0), uniform, n)[0]
        return self.samples[chosen.to(self.samples.device)]

    def __repr__(self) -> str:
        """Facts in one line."""
        return (
            f"PosteriorSamples(samples={tuple(self.samples.shape)}, "
            f"log_evidence={self.log_evidence:.4g}, nfev={self.nfev})"
        )


class _Steps(NamedTuple):
    """Blocks of each step."""

    move: list[Block]  # Φ, k×k
    noise: list[Block]  # L, k×k
    weights: list[list[Block]]  # Bⱼ, k×1, newest first
    tilt: list[list[Block]]  # L⁻¹Bⱼ


def sample_posterior(
    process: ReverseProcess,
    observation: Observation,
    times: Tensor,
    *,
    particles: int = 16,
    threshold: float = 0.5,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    shape: Sequence[int] | None = None,
    method: _Twist = "moments",
    gradient: bool = True,
    data_variance: float = 1.0,
    chunk: int | None = None,
    denoise: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PosteriorSamples:
    """Posterior sampling by twisted sequential Monte Carlo: samples and evidence of p(x_0 | y).

    Each run is a population of particles. Guided steps move them, weights measure how well they
    explain y, and particles of small weight are replaced by copies of others. The error falls with
    the number of particles and of steps, for any score; `PosteriorScore` alone keeps a bias.

    Parameters
    ----------
    process
        Forward SDE and score of the data, without the observation.
    observation
        The observation, one y for all particles.
    times
        Decreasing grid from T to ε at most `Observation.end_time`. On `logistic_times` the weights
        vary less than on `root_times` with as many steps.
    particles
        Particles K of one run.
    threshold
        A run resamples when its effective sample size falls below this part of K, in [0, 1].
    seeds
        One integer in [0, 2³²) per run. A run depends on its own seed, not on the runs beside it.
        None makes one run from ``generator``.
    generator
        Source of all randomness in place of seeds.
    shape
        Shape ``(*D)`` of one data point; None takes the observation's.
    method
        ``"moments"``: the sharper proposal and weight; one gradient of the score per number of y,
        so for dozens of numbers. ``"pigdm"``: one gradient in all. See `PosteriorScore`.
    gradient
        False takes no gradient of the score; for data of a few numbers.
    data_variance
        Variance of one number of the data. Particles start from it, too, if ``times[0]`` < T.
    chunk
        Particles for which the score is evaluated at a time; None evaluates all at once. Less
        memory and, apart from rounding, the same samples.
    denoise
        Return E[x_0 | z_ε, y] in place of the data component of z_ε.
    dtype, device
        Of the particles.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    PosteriorSamples
        N = runs · particles weighted samples.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If an argument is out of range, the observation does not fit the data or is not linear, its
        noise is 0, or the grid ends too late for its noise; all before the score is evaluated.
    FloatingPointError
        If no particle of a run has a finite weight.

    References
    ----------
    L. Wu et al., *Practical and asymptotically exact conditional sampling in diffusion models*,
    2023, for the first-order step of variance-preserving processes.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, Observation, ReverseProcess, solvers
    >>> sde = CLD()
    >>> width = 0.04 * torch.eye(2).expand(2, 2, 2)
    >>> data = GaussianMixture([1, 1], [[-1.0, 0.0], [1.0, 0.0]], width)
    >>> seen = Observation.matrix([[0.0, 1.0]], torch.tensor([0.1]), noise_std=0.1)
    >>> times = solvers.root_times(sde.T, seen.end_time(sde, (2,)), 25)
    >>> found = solvers.sample_posterior(
    ...     ReverseProcess(sde, data.score(sde)), seen, times, particles=500, seeds=range(4)
    ... )
    >>> abs(found.log_evidence - data.log_evidence(seen)) < 4 * found.log_evidence_std
    True
    """
    check_reverse_process(process)
    check_observation(observation)
    one_of(method, _Twist, "method")
    sde = process.sde
    grid = as_grid_times(times, "times", sde.T)
    for name, count in (("particles", particles), ("chunk", 1 if chunk is None else chunk)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            msg = f"{name} must be an integer of at least 1; got {count!r}"
            raise ValueError(msg)
    check_between(threshold, 0.0, 1.0, "threshold")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        msg = f"dtype must be a floating-point type of torch; got {dtype!r}"
        raise TypeError(msg)
    generators, runs = _generators(seeds, generator)
    data_shape = _data_shape(observation, shape)
    observation.check(data_shape, dtype=dtype, device=device)
    latest = observation.end_time(sde, data_shape)
    if float(grid[-1]) > latest * (1 + 1e-6):
        msg = (
            f"times must end at {latest:.3g} or earlier for noise_std = {observation.noise_std:g}: "
            f"noise left at their end would blur the posterior; got {float(grid[-1]):.3g}"
        )
        raise ValueError(msg)
    guided = PosteriorScore(
        process.score,
        observation,
        method,
        gradient=gradient,
        data_variance=data_variance,
        sde=sde,
    )
    steps = _steps(process, grid)
    like = torch.empty(runs * particles, sde.components, *data_shape, dtype=dtype, device=device)
    guide = _Guide(guided, grid, len(like) if chunk is None else chunk)
    with torch.no_grad():
        return _Population(guide, steps, like, generators, runs, threshold).run(
            start_root(sde, float(grid[0]), data_variance),
            int(guided.evaluations(grid).sum()),
            denoise=denoise,
            progress=progress,
        )


class _Guide:
    """Predictions at the times of a grid, for a few particles at a time."""

    def __init__(self, score: PosteriorScore, grid: Tensor, chunk: int) -> None:
        self._score, self._times, self._chunk = score, KnownTimes(grid), chunk
        self._arguments: dict[int, list[PlannedTime]] = {}

    def __call__(self, z: Tensor, i: int) -> Guided:
        parts = []
        for few in torch.split(z, self._chunk):
            if len(few) not in self._arguments:
                self._arguments[len(few)] = self._times.arguments(few)
            at = self._arguments[len(few)][i]
            parts.append(self._score.guide(few, at.argument, planned=at))
        return Guided(*(torch.cat(part) for part in zip(*parts, strict=True)))


class _Population:
    """Particles of all runs, one after the other, and their log-weights ``(runs, K)``."""

    def __init__(
        self,
        guide: _Guide,
        steps: _Steps,
        like: Tensor,
        generators: _Generators,
        runs: int,
        threshold: float,
    ) -> None:
        self._guide, self._steps, self._like = guide, steps, like
        self._generators, self._runs = generators, runs
        self._count = len(like) // runs
        self._least = threshold * self._count
        self._log_evidence = torch.zeros(runs, 1, dtype=torch.float64, device="cpu")
        self._ess: list[Tensor] = []

    def run(self, root: Tensor, nfev: int, *, denoise: bool, progress: bool) -> PosteriorSamples:
        """Take the particles from the prior to the end of the grid."""
        z = apply_blocks(root, self._normals())
        now = self._guide(z, 0)
        log_weights = self._by_run(now.log_likelihood)
        earlier: tuple[Tensor, ...] = ()
        n = len(self._steps.move)
        for i in progress_bar(range(n), shown=progress, desc="posterior"):
            log_weights, chosen = self._resampled(log_weights, i)
            if chosen is not None:
                z, now = z[chosen], Guided(*(x[chosen] for x in now))
                earlier = tuple(x[chosen] for x in earlier)
            noise = self._normals()
            z, change, earlier = self._step(z, now, earlier, i, noise)
            before, now = now.log_likelihood, self._guide(z, i + 1)
            log_weights = log_weights + self._by_run(now.log_likelihood - before + change)
        self._measure(log_weights, n)
        total = self._log_evidence + log_weights
        evidence = total.logsumexp(1) - math.log(self._count)
        mean = evidence.logsumexp(0) - math.log(self._runs)
        spread = (evidence - mean).exp().std() / math.sqrt(self._runs) if self._runs > 1 else None
        return PosteriorSamples(
            samples=now.data + now.shift if denoise else z[:, 0].clone(),
            log_weights=total.flatten(),
            log_evidence=float(mean),
            log_evidence_std=math.nan if spread is None else float(spread),
            ess=torch.stack(self._ess, 1),
            nfev=nfev,
        )

    def _step(
        self, z: Tensor, now: Guided, earlier: tuple[Tensor, ...], i: int, noise: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """State after a step, the change of the log-weights by the proposal, and the history."""
        history = [(now.data.unsqueeze(1), now.shift.unsqueeze(1))]
        if earlier:
            history.append((earlier[0], earlier[1]))
        used = list(zip(self._steps.weights[i], history, strict=False))
        moved = [(block, data + shift) for block, (data, shift) in used]
        tilts = zip(self._steps.tilt[i], history, strict=False)
        q = combine(*((block, shift) for block, (_, shift) in tilts))
        change = -(q * (noise + q / 2)).flatten(1).sum(1)
        z = combine((self._steps.move[i], z), *moved, (self._steps.noise[i], noise))
        return z, change, history[0]

    def _resampled(self, log_weights: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """Weights after resampling, and which particles were chosen if any run was resampled."""
        poor = self._measure(log_weights, i) < self._least
        # Drawn for each run, so that a run does not depend on the others.
        uniform = _uniforms(self._generators, self._runs)
        if not bool(poor.any()):
            return log_weights, None
        identity = torch.arange(self._count, device="cpu").expand(self._runs, -1)
        drawn = _systematic(log_weights.softmax(1), uniform, self._count)
        chosen = torch.where(poor, drawn, identity)
        chosen = chosen + self._count * torch.arange(self._runs, device="cpu").unsqueeze(1)
        mean = log_weights.logsumexp(1, keepdim=True) - math.log(self._count)
        self._log_evidence = self._log_evidence + torch.where(poor, mean, 0.0)
        return torch.where(poor, 0.0, log_weights), chosen.flatten().to(self._like.device)

    def _measure(self, log_weights: Tensor, i: int) -> Tensor:
        """Record and return the effective sample sizes ``(runs, 1)``."""
        dead = ~(log_weights > -math.inf).any(1)
        if bool(dead.any()):
            run = int(dead.nonzero()[0])
            msg = (
                f"no particle of run {run} has a finite weight after {i} steps: the score is not "
                "finite, or y is impossible under it"
            )
            raise FloatingPointError(msg)
        ess = 1 / log_weights.softmax(1).square().sum(1)
        self._ess.append(ess)
        return ess.unsqueeze(1)

    def _by_run(self, log_weights: Tensor) -> Tensor:
        values = log_weights.to("cpu", torch.float64).reshape(self._runs, self._count)
        return values.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def _normals(self) -> Tensor:
        like = self._like
        return standard_normal(
            like.shape, generator=self._generators, dtype=like.dtype, device=like.device
        )


def _steps(process: ReverseProcess, grid: Tensor) -> _Steps:
    """Blocks of the second-order multistep solver with noise, and what its noise is tilted by."""
    tables = plan(process, ExponentialMultistep(order=2, stochasticity=1.0), grid).tables
    inverse = triangular_inverse(torch.tensor(tables.noise, dtype=torch.float64, device="cpu"))
    tilt = []
    for i, blocks in enumerate(tables.weights):
        stacked = torch.tensor(blocks, dtype=torch.float64, device="cpu")
        tilt.append(as_blocks(inverse[i] @ stacked))
    return _Steps(tables.move, tables.noise, tables.weights, tilt)


def _generators(
    seeds: Sequence[int] | Tensor | None, generator: torch.Generator | None
) -> tuple[_Generators, int]:
    """Generators, one per run, and the number of runs."""
    check_generator(generator, several=False)
    if seeds is None:
        return None if generator is None else [generator], 1
    if generator is not None:
        msg = "generator and seeds are alternatives; got both"
        raise ValueError(msg)
    checked = checked_seeds(seeds)
    return [torch.Generator().manual_seed(seed) for seed in checked], len(checked)


def _data_shape(observation: Observation, shape: Sequence[int] | None) -> tuple[int, ...]:
    found = observation.shape if shape is None else tuple(shape)
    if found is None:
        msg = "shape must be given: this observation does not know the shape of the data; got None"
        raise ValueError(msg)
    return tuple(found)


def _uniforms(generators: _Generators, runs: int) -> Tensor:
    """One uniform number per run, ``(runs, 1)`` float64 on the CPU."""
    if generators is None:
        return torch.rand(runs, 1, dtype=torch.float64, device="cpu")
    drawn = [torch.rand(1, generator=g, device=g.device).cpu() for g in generators]
    return torch.stack(drawn).to(torch.float64)


def _systematic(weights: Tensor, uniform: Tensor, n: int) -> Tensor:
    """Indices ``(runs, n)`` drawn with probabilities ``(runs, K)``."""
    points = (torch.arange(n, dtype=torch.float64, device="cpu") + uniform) / n
    edges = weights.cumsum(1)
    chosen = torch.searchsorted(edges / edges[:, -1:], points, right=True)
    return chosen.clamp_max(weights.shape[1] - 1)
