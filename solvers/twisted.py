r"""Posterior sampling by twisted sequential Monte Carlo on the second-order multistep step.

L. Wu et al. (2023) have the first-order step of variance-preserving processes. Here a step of
`ExponentialMultistep` with noise is Gaussian given its history, z' = Φz + Σⱼ Bⱼ Dⱼ + Lξ. A particle
takes it with the predictions D_y given the observation in place of D. With
q = L⁻¹ Σⱼ Bⱼ (D_y,j − Dⱼ) its log-weight grows by

.. math:: −q^⊤(ξ + q/2) + \log \tilde p(y | z') − \log \tilde p(y | z).

`PosteriorScore.guide` approximates p(y | z) by p̃(y | z). These products telescope: whatever D_y and
p̃ are, weighted particles approach the distribution of the sampler's z_ε, reweighted by
p̃(y | z_ε), as their number grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import (
    as_device,
    as_grid_times,
    as_integer,
    check_between,
    check_dtype,
    one_of,
)
from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.random import check_generator, standard_normal
from cldsde.linear.sde import LinearSDE
from cldsde.progress import progress_bar
from cldsde.renamed import takes_old
from cldsde.score import Observation, PosteriorScore, ReverseProcess
from cldsde.score.observation import check_observation
from cldsde.score.posterior_score import Guided
from cldsde.score.reverse import check_reverse_process
from cldsde.score.times import KnownTimes, PlannedTime, score_argument

from .combine import Block, combine
from .exponential_multistep import ExponentialMultistep
from .noise import Seeds, checked_seeds, start_root
from .planning import Plan, plan

_Twist = Literal["moments", "pigdm"]
_SOLVER = ExponentialMultistep(order=2, stochasticity=1.0)


@dataclass(frozen=True, eq=False)
class PosteriorSamples:
    """Weighted samples of a posterior, made by `sample_posterior`."""

    samples: Tensor  #: Data ``(N, *D)``, the particles of all runs.
    #: ``(N,)`` float64 on the CPU, not normalised: the mean of their exponentials is the estimate
    #: of p(y). So the samples of several calls with as many particles can be put together.
    log_weights: Tensor
    #: Estimate of log p(y). Before the logarithm, its bias is the error of the steps alone, for any
    #: number of particles.
    log_evidence: float
    #: Its standard error, from the spread of the runs; NaN for a single run. A value near 1, the
    #: largest possible, means that one run has most of the weight: take more particles.
    log_evidence_std: float
    #: Effective sample size of each run at each time of the grid, ``(runs, n + 1)``, before
    #: particles are resampled.
    ess: Tensor
    nfev: int  #: Score evaluations of each particle.

    @property
    def weights(self) -> Tensor:
        """Normalised weights, ``(N,)`` float64 on the CPU."""
        return self.log_weights.softmax(0)

    def resample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples of equal weight, ``(n, *D)``, by systematic resampling.

        Their order is random.
        """
        check_generator(generator, several=False)
        n = as_integer(n, 0, "n")
        uniform = _uniforms([generator] if generator is not None else None, 1)
        chosen = _systematic(self.weights.unsqueeze(0), uniform, n)[0]
        # Systematic resampling keeps the order, so the first samples would be of the first runs.
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=device)
        return self.samples[chosen[order.cpu()].to(self.samples.device)]

    def __repr__(self) -> str:
        return (
            f"PosteriorSamples(samples={tuple(self.samples.shape)}, "
            f"log_evidence={self.log_evidence:.4g}, nfev={self.nfev})"
        )


@takes_old(seeds="seed")
def sample_posterior(
    process: ReverseProcess,
    observation: Observation,
    times: Tensor,
    *,
    particles: int = 16,
    threshold: float = 0.5,
    seed: int | Seeds | None = None,
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

    Guided steps move particles, weights measure how well they explain y, and particles of small
    weight are replaced by copies of others (L. Wu et al. 2023). The error falls with the number of
    particles and of steps, for any score. See :doc:`/how-to/solve-an-inverse-problem`.

    Parameters
    ----------
    process, observation
        Forward SDE and score of the data alone, and the observation: one y of shape ``(*E)`` for
        all particles.
    times
        Decreasing grid from T to ε at most `Observation.end_time`.
    particles, threshold
        Number K of particles per run. A run resamples when its effective sample size falls below
        ``threshold`` · K, with a threshold in [0, 1].
    seed, generator
        Seed in [0, 2³²) of a single run, or a sequence, tensor or array of one seed per run; or
        None and the random generator of a single run. A run depends on its own seed alone.
    shape
        Shape ``(*D)`` of one data point; None takes the observation's.
    method, gradient, data_variance
        See `PosteriorScore`. ``"moments"`` takes one gradient per number of y, at most dozens.
        Particles start with the data variance, too, if ``times[0]`` < T.
    chunk
        Particles per call of the score, to save memory; None: all. Samples change by rounding.
    denoise
        Return E[x_0 | z_ε, y] in place of the data component of z_ε.
    dtype, device, progress
        Dtype and device of the particles; whether to show a progress bar on stderr.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, the observation is not linear, has no
        noise or several y, or does not fit the data, or the grid ends too late; all before any
        score evaluation.
    FloatingPointError
        If no particle of a run has a finite weight.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, Observation, ReverseProcess, solvers
    >>> sde, data = CLD(), GaussianMixture([1, 1], [[-1.0], [1.0]], [[[0.25]]] * 2)
    >>> seen = Observation.matrix([[1.0]], torch.tensor([0.1]), noise_std=0.1)
    >>> times = solvers.root_times(sde.T, seen.end_time(sde, (1,)), 25)
    >>> process = ReverseProcess(sde, data.score(sde))
    >>> found = solvers.sample_posterior(process, seen, times, particles=500, seed=range(4))
    >>> abs(found.log_evidence - data.log_evidence(seen)) < 4 * found.log_evidence_std
    True
    """
    _check_arguments(process, observation, method, times, particles, chunk, threshold, dtype)
    generators, runs = _generators(seed, generator)
    sde, grid = process.sde, as_grid_times(times, "times")
    data_shape = _data_shape(observation, shape, sde, float(grid[-1]), dtype, device)
    guided = PosteriorScore(
        process.score, observation, method, gradient=gradient, data_variance=data_variance, sde=sde
    )
    count = runs * int(particles)
    like = torch.empty(count, sde.components, *data_shape, dtype=dtype, device=device)
    steps = _GuidedSteps(plan(process, _SOLVER, grid), guided, like, chunk)
    return _sequential_monte_carlo(steps, generators, runs, threshold, denoise, progress)


def _check_arguments(
    process: object,
    observation: object,
    method: object,
    times: object,
    particles: object,
    chunk: object,
    threshold: float,
    dtype: object,
) -> None:
    check_reverse_process(process)
    check_observation(observation)
    one_of(method, _Twist, "method")
    as_grid_times(times, "times")
    as_integer(particles, 1, "particles")
    if chunk is not None:
        as_integer(chunk, 1, "chunk")
    check_between(threshold, 0.0, 1.0, "threshold")
    check_dtype(dtype)


def _data_shape(
    observation: Observation,
    shape: Sequence[int] | None,
    sde: LinearSDE,
    end: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[int, ...]:
    """Shape of one data point; raise a ValueError if observation, shape and end do not fit."""
    data_shape = observation.shape if shape is None else tuple(shape)
    if data_shape is None:
        msg = "shape must be given: this observation does not know the shape of the data; got None"
        raise ValueError(msg)
    observation.check(data_shape, dtype=dtype, device=as_device(device))
    with torch.no_grad():
        zeros = torch.zeros(1, *data_shape, dtype=dtype, device=device)
        seen = tuple(observation.forward(zeros).shape[1:])
    if observation.y.shape != seen:
        # Rows of y would go to the slots of particles, which resampling mixes.
        raise ValueError(
            f"observation must hold one y for all particles, of shape {seen}; "
            f"got shape {tuple(observation.y.shape)}. Call sample_posterior once per observation"
        )
    latest = observation.end_time(sde, data_shape)
    if end > latest * (1 + 1e-6):
        raise ValueError(
            f"times must end at {latest:.3g} or earlier for noise_std = {observation.noise_std:g}: "
            f"noise left at their end would blur the posterior; got {end:.3g}"
        )
    return data_shape


class _GuidedSteps:
    """Steps of the multistep solver with predictions given y, on one grid."""

    def __init__(
        self, steps: Plan, guided: PosteriorScore, like: Tensor, chunk: int | None
    ) -> None:
        self.times, self.guided, self.like = steps.times, guided, like
        self._chunk = len(like) if chunk is None else int(chunk)
        score = steps.process.score
        if score.part(slice(0, 1), (len(like), *like.shape[2:])) is not score:
            msg = "score must have one condition for all particles, because they are mixed"
            raise ValueError(msg)
        if self._chunk < len(like) and score.depends_on_place:
            msg = "chunk must be None for a score that depends on the place in the batch"
            raise ValueError(msg)
        self._known, self._moved = KnownTimes(self.times), score_argument(self.times, like)
        self._tables = steps.tables
        noise = torch.tensor(steps.tables.noise, dtype=torch.float64, device="cpu")
        weights = torch.tensor(steps.tables.weights, dtype=torch.float64, device="cpu")
        # L⁻¹Bⱼ of each step, which map shifts D_y − D to q.
        self._tilts: list[list[Block]] = (triangular_inverse(noise).unsqueeze(1) @ weights).tolist()

    def guide(self, z: Tensor, i: int) -> Guided:
        """Predictions of particles at ``times[i]``."""
        parts = []
        for few in torch.split(z, self._chunk):
            at = PlannedTime(self._known, i, self._moved[i].expand(len(few)))
            parts.append(self.guided.guide(few, at.argument, planned=at))
        return Guided(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def step(
        self, i: int, z: Tensor, history: list[Guided], noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State after step i, and the change of the log-weights by its proposal."""
        tables = self._tables
        shifts = [past.shift.unsqueeze(1) for past in history]
        predictions = [past.data.unsqueeze(1) + past.shift.unsqueeze(1) for past in history]
        # The first step has fewer predictions than weights.
        q = combine(*zip(self._tilts[i], shifts, strict=False))
        moved = zip(tables.weights[i], predictions, strict=False)
        z = combine((tables.move[i], z), *moved, (tables.noise[i], noise))
        return z, -(q * (noise + q / 2)).flatten(1).sum(1)


def _sequential_monte_carlo(
    steps: _GuidedSteps,
    generators: list[torch.Generator] | None,
    runs: int,
    threshold: float,
    denoise: bool,
    progress: bool,
) -> PosteriorSamples:
    """Move, weigh and resample the particles of all runs."""
    guided, times, like = steps.guided, steps.times, steps.like
    dtype, device = like.dtype, like.device

    def normals() -> Tensor:
        return standard_normal(like.shape, generator=generators, dtype=dtype, device=device)

    weights = _Weights(runs, len(like) // runs)
    with torch.no_grad():
        root = start_root(guided.sde, float(times[0]), guided.data_variance)
        z = apply_blocks(root, normals())
        history = [steps.guide(z, 0)]  # the newest first
        weights.add(history[0].log_likelihood)
        for i in progress_bar(range(len(times) - 1), shown=progress, desc="posterior"):
            chosen = weights.resampled(threshold, _uniforms(generators, runs))
            if chosen is not None:
                chosen = chosen.to(device)
                z, history = z[chosen], [Guided(*(x[chosen] for x in y)) for y in history]
            z, change = steps.step(i, z, history, normals())
            history = [steps.guide(z, i + 1), history[0]]
            weights.add(history[0].log_likelihood - history[1].log_likelihood + change)
    log_evidence, log_evidence_std = weights.evidence()
    return PosteriorSamples(
        samples=history[0].data + history[0].shift if denoise else z[:, 0].clone(),
        log_weights=weights.log_weights.flatten(),
        log_evidence=log_evidence,
        log_evidence_std=log_evidence_std,
        ess=torch.stack(weights.ess, 1),
        nfev=int(guided.evaluations(times).sum()),
    )


class _Weights:
    """Log-weights ``(runs, K)``, float64 on the CPU; resampling gives a run its mean weight."""

    def __init__(self, runs: int, count: int) -> None:
        self.log_weights = torch.zeros(runs, count, dtype=torch.float64, device="cpu")
        self.ess: list[Tensor] = []

    def evidence(self) -> tuple[float, float]:
        """Estimate of log p(y) from all runs, and its standard error."""
        runs, count = self.log_weights.shape
        each = self.log_weights.logsumexp(1) - math.log(count)
        mean = each.logsumexp(0) - math.log(runs)
        spread = float((each - mean).exp().std()) if runs > 1 else math.nan
        return float(mean), spread / math.sqrt(runs)

    def add(self, change: Tensor) -> None:
        """Add to the log-weights, and record the effective sample sizes."""
        change = change.to("cpu", torch.float64).reshape(self.log_weights.shape)
        change = change.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        self.log_weights = self.log_weights + change
        dead = ~(self.log_weights > -math.inf).any(1)
        if bool(dead.any()):
            run = int(dead.nonzero()[0])
            raise FloatingPointError(
                f"no particle of run {run} has a finite weight after {len(self.ess)} steps: the "
                "score is not finite, or y is impossible under it"
            )
        self.ess.append(1 / self.log_weights.softmax(1).square().sum(1))

    def resampled(self, threshold: float, uniform: Tensor) -> Tensor | None:
        """Resample runs of a small effective sample size; indices of the particles that stay.

        ``uniform`` has one number per run, so that a run does not depend on the others.
        """
        runs, count = self.log_weights.shape
        poor = self.ess[-1].unsqueeze(1) < threshold * count
        if not bool(poor.any()):
            return None
        drawn = _systematic(self.log_weights.softmax(1), uniform, count)
        chosen = torch.where(poor, drawn, torch.arange(count, device="cpu"))
        mean = self.log_weights.logsumexp(1, keepdim=True) - math.log(count)
        self.log_weights = torch.where(poor, mean, self.log_weights)
        return (chosen + count * torch.arange(runs, device="cpu").unsqueeze(1)).flatten()


def _generators(
    seed: int | Seeds | None, generator: torch.Generator | None
) -> tuple[list[torch.Generator] | None, int]:
    """Generators, one per run, and the number of runs."""
    check_generator(generator, several=False)
    if seed is None:
        return None if generator is None else [generator], 1
    if generator is not None:
        raise ValueError("generator and seed are alternatives; got both")
    several: Any = [seed] if isinstance(seed, Integral) else seed
    checked = checked_seeds(several, "seed")
    return [torch.Generator().manual_seed(each) for each in checked], len(checked)


def _uniforms(generators: list[torch.Generator] | None, runs: int) -> Tensor:
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
