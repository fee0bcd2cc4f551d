"""Errors of posterior samplers against exact posteriors, and calibration by ranks of the truth."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cldsde.linear import CLD, LinearSDE
from cldsde.linear.checks import as_integer, one_of, shaped
from cldsde.score import GaussianMixture, ReverseProcess

from .metrics import responsibilities, sliced_wasserstein
from .order_estimate import Verdict
from .plain import plain
from .posterior_methods import PosteriorMethod, PosteriorSampler, posterior_methods
from .posterior_problems import PosteriorProblem

# Exact samplers may be so far off, with two standard errors to spare. Particles are correlated: a
# few thousand are worth a few hundred exact samples, whose errors are three times as large.
_DISTANCE, _MODES, _MOMENT = 3.0, 0.1, 6.0

# Pairs of exact samples whose mean is the floor. If two far modes dominate the distance, one pair
# scatters by three quarters of the mean; 32 pairs leave an error of an eighth.
_FLOORS = 32


@dataclass(frozen=True)
class PosteriorError:
    """Distance of a sampler's distribution from the exact posterior.

    Numbers are means over repetitions; ``…_std`` are their standard errors. A "floor" is the value
    for the same number of exact samples, so a ratio of 1 is as good as exact.
    """

    method: str
    problem: str
    process: str
    noise_std: float  #: Standard deviation of the observation's noise.
    distance: float  #: Sliced Wasserstein-2 distance over its floor.
    distance_std: float
    mode_error: float  #: Total variation distance of the weights of the posterior's components.
    mode_error_std: float
    mode_floor: float
    #: Length of the mean, after whitening by the exact posterior, over its floor.
    mean_error: float
    mean_error_std: float
    #: Largest deviation from 1 of an eigenvalue of the covariance, after whitening, over its floor.
    spread_error: float
    spread_error_std: float
    samples: int
    steps: int
    repeats: int
    seconds: float  #: Time per repetition.
    exact: bool  #: Whether the sampler claims the exact posterior of these data.

    @property
    def verdict(self) -> Verdict | None:
        """Whether a sampler that claims the exact posterior has it; None for other samplers.

        FAIL if a bound is exceeded by more than two standard errors. The bounds are 3 floors for
        the distance, 0.1 plus the floor for the weights, and 6 floors for the moments.
        """
        if not self.exact:
            return None
        bounds = (
            (self.distance, self.distance_std, _DISTANCE),
            (self.mode_error, self.mode_error_std, _MODES + self.mode_floor),
            (self.mean_error, self.mean_error_std, _MOMENT),
            (self.spread_error, self.spread_error_std, _MOMENT),
        )
        # These comparisons are False for NaN, which therefore fails.
        sound = all(value - 2 * std <= bound for value, std, bound in bounds)
        return Verdict.PASS if sound else Verdict.FAIL

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {**plain(self), "verdict": plain(self.verdict)}


def posterior_error(
    method: str | PosteriorMethod | PosteriorSampler,
    problem: PosteriorProblem,
    *,
    sde: LinearSDE | None = None,
    samples: int = 1000,
    steps: int = 50,
    repeats: int = 4,
    seed: int = 0,
    name: str | None = None,
) -> PosteriorError:
    """Measure the error of a posterior sampler against the exact posterior.

    Parameters
    ----------
    method
        A name in `posterior_methods`, ValueError for another name; or your own sampler
        (`PosteriorSampler`), which then claims the exact posterior.
    problem
        Data and observation; TypeError for another type.
    sde
        The forward process; None: `CLD`.
    samples, repeats
        Samples of each repetition, at least 100, and independent repetitions, at least 2.
    steps
        Steps of the grid, `PosteriorProblem.times`, at least 2. ValueError if ``samples``,
        ``repeats`` or ``steps`` is smaller, TypeError if one is not an integer.
    seed
        Seed of all random numbers.
    name
        Name of the method in the result.

    Examples
    --------
    >>> from cldsde.validation import posterior_error, posterior_problems
    >>> problem = posterior_problems()["one Gaussian"]
    >>> found = posterior_error("exact", problem, samples=500, steps=20, repeats=2)
    >>> found.verdict
    <Verdict.PASS: 'PASS'>
    """
    label = method if isinstance(method, str) else getattr(method, "__name__", "sampler")
    label = str(label) if name is None else name
    method = _checked(method, problem, steps)
    as_integer(samples, 100, "samples")
    as_integer(repeats, 2, "repeats")
    sde = CLD() if sde is None else sde
    posterior, noise = problem.posterior, problem.observation.noise_std
    process = ReverseProcess(sde, problem.data.score(sde))
    measure = _Measure(posterior, samples, torch.Generator().manual_seed(seed + 1))
    times = problem.times(sde, steps)
    began, rows = time.perf_counter(), []
    for repeat in range(repeats):
        # Use seeds far from the seeds of the exact samples.
        g = torch.Generator().manual_seed(1_000_003 * (seed + 1) + repeat)
        drawn = method.sampler(process, problem.observation, times, samples, g)
        x, weights = drawn if isinstance(drawn, tuple) else (drawn, None)
        if shaped(x) != (samples, posterior.dimension):
            msg = f"{label} must return samples of shape {(samples, posterior.dimension)}"
            raise ValueError(f"{msg}; got {shaped(x)}")
        rows.append(measure(x.detach().to("cpu", torch.float64), weights))
    seconds = (time.perf_counter() - began) / repeats
    found = torch.tensor(rows, dtype=torch.float64, device="cpu")
    mean, std = found.mean(0), found.std(0) / math.sqrt(repeats)
    single = len(problem.data.weights) == 1
    names = ("distance", "mode_error", "mean_error", "spread_error")
    values = dict(zip(names, mean.tolist(), strict=True))
    values |= dict(zip((f"{name}_std" for name in names), std.tolist(), strict=True))
    return PosteriorError(
        method=label,
        problem=problem.name,
        process=type(sde).__name__,
        noise_std=noise,
        **values,
        mode_floor=measure.mode_floor,
        samples=samples,
        steps=steps,
        repeats=repeats,
        seconds=seconds,
        exact=method.exact == "always" or (method.exact == "gaussian" and single),
    )


def _checked(
    method: str | PosteriorMethod | PosteriorSampler, problem: PosteriorProblem, steps: int
) -> PosteriorMethod:
    """Check these arguments, and return the method; a sampler claims the exact posterior."""
    as_integer(steps, 2, "steps")
    if not isinstance(problem, PosteriorProblem):
        msg = "problem must be a PosteriorProblem, such as posterior_problems()['mask']"
        raise TypeError(f"{msg}; got {problem!r}")
    if isinstance(method, str):
        known = posterior_methods()
        one_of(method, tuple(known), "method")
        return known[method]
    if isinstance(method, PosteriorMethod):
        return method
    return PosteriorMethod(sampler=method, exact="always")


class _Measure:
    """Distance, mode error, mean error and spread error of samples, over their floors."""

    def __init__(self, posterior: GaussianMixture, n: int, generator: torch.Generator) -> None:
        self._posterior, self._n, self._generator = posterior, n, generator
        weights, means = posterior.weights, posterior.means
        self._mean = weights @ means
        apart = means - self._mean
        within = torch.einsum("n,nij->ij", weights, posterior.covariances)
        covariance = within + torch.einsum("n,ni,nj->ij", weights, apart, apart)
        self._root = torch.linalg.cholesky(covariance)
        floors = torch.tensor(
            [self._raw(self._exact(), None) for _ in range(_FLOORS)], device="cpu"
        ).mean(0)
        self._distance, self.mode_floor, self._shift, self._spread = floors.tolist()

    def __call__(self, x: Tensor, weights: Tensor | None) -> list[float]:
        if not bool(x.isfinite().all()):
            return [math.inf, 1.0, math.inf, math.inf]
        distance, modes, shift, spread = self._raw(x, weights)
        return [distance / self._distance, modes, shift / self._shift, spread / self._spread]

    def _exact(self) -> Tensor:
        return self._posterior.sample(self._n, generator=self._generator, dtype=torch.float64)

    def _raw(self, x: Tensor, weights: Tensor | None) -> list[float]:
        mass = x.new_full((len(x),), 1 / len(x)) if weights is None else weights
        directions = torch.Generator().manual_seed(0)
        distance = sliced_wasserstein(x, self._exact(), weights=weights, generator=directions)
        exact = self._posterior
        shares = mass @ responsibilities(x, exact.weights, exact.means, exact.covariances).mT
        modes = float((shares - exact.weights).abs().sum() / 2)
        white = torch.linalg.solve_triangular(self._root, (x - self._mean).mT, upper=False).mT
        shift = mass @ white
        apart = white - shift
        spread = torch.linalg.eigvalsh(apart.mT @ (apart * mass.unsqueeze(1))) - 1
        return [distance, modes, float(shift.norm()), float(spread.abs().max())]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of the truth among posterior samples, which are uniform for an exact sampler."""

    #: ``(draws, D + m)`` in [0, 1]: ranks of the D numbers of the data, then of the m numbers of
    #: A x.
    ranks: Tensor = field(repr=False)
    p_values: Tensor  #: ``(D + m,)``: p-values of the Kolmogorov–Smirnov test for uniformity.

    @property
    def p_value(self) -> float:
        """Smallest p-value times their number (Bonferroni), at most 1."""
        return min(1.0, float(self.p_values.min()) * len(self.p_values))


def calibration_ranks(
    method: str | PosteriorMethod | PosteriorSampler,
    problem: PosteriorProblem,
    *,
    sde: LinearSDE | None = None,
    draws: int = 100,
    samples: int = 50,
    steps: int = 50,
    seed: int = 0,
) -> Calibration:
    """Simulation-based calibration: test a posterior sampler without the exact posterior.

    Data are drawn and observed, and the sampler is run on each observation. If the sampler is
    exact, the truth has the distribution of the samples. Its rank among them is then uniform, for
    every number of the data and of A x.

    Parameters
    ----------
    method, problem, sde, steps, seed
        See `posterior_error`. The problem's y is not used: each draw has its own observation.
    draws, samples
        Numbers of data points drawn, and of posterior samples per data point. ValueError if one is
        below 1, TypeError if it is not an integer.

    References
    ----------
    S. Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    2018.
    """
    from scipy.stats import kstest  # slow to import

    sampler = _checked(method, problem, steps).sampler
    as_integer(draws, 1, "draws")
    as_integer(samples, 1, "samples")
    sde = CLD() if sde is None else sde
    times = problem.times(sde, steps)
    process = ReverseProcess(sde, problem.data.score(sde))
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        truth, drawn = problem.observe(g)
        found = sampler(process, drawn.observation, times, samples, g)
        x, weights = found if isinstance(found, tuple) else (found, None)
        mass = x.new_full((len(x),), 1 / len(x)) if weights is None else weights
        below = (_numbers(drawn, x) < _numbers(drawn, truth)).double()
        # The truth has one of samples + 1 ranks; a uniform number makes the rank continuous.
        jitter = torch.rand(below.shape[1], generator=g, dtype=torch.float64, device="cpu")
        rows.append((samples * (mass.double() @ below) + jitter) / (samples + 1))
    ranks = torch.stack(rows)
    p_values = [float(kstest(column.numpy(), "uniform").pvalue) for column in ranks.mT]
    return Calibration(ranks, torch.tensor(p_values, dtype=torch.float64, device="cpu"))


def _numbers(problem: PosteriorProblem, x: Tensor) -> Tensor:
    x = x.double()
    return torch.cat([x, problem.observation.forward(x)], 1)
