"""Fit noise levels, noise and order of a sampler with few evaluations to a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from cldsde.linear.checks import as_integer, check_callable
from cldsde.linear.kappa import kappa_range
from cldsde.progress import progress_bar
from cldsde.renamed import warn_of_old
from cldsde.score import ReverseProcess
from cldsde.score.reverse import check_reverse_process

from .recommended import checked_shape, recommend
from .sampling import sample
from .settings import SamplerSettings

Distance = Callable[[Tensor], float]

_FORMS = [(order, corrector) for order in (1, 2, 3) for corrector in (False, True)]
TRIES = 200  #: Tries of a search by default.
_CHOSEN, _SETS = 3, 8  # settings that are compared at the end, and sets of samples of each
# Steps of the search in κ at the start, log Δκ and λ, and the largest λ.
_SPREADS = (0.4, 0.25, 0.3)
_MOST_NOISE = 3.0
_LONGEST = math.log(6.0)  # step in κ


def fit_sampler(
    process: ReverseProcess,
    shape: Sequence[int],
    *,
    nfe: int,
    samples: int,
    distance: Distance,
    budget: int | None = None,
    seed: int = 0,
    progress: bool = False,
    network: str = "",
) -> SamplerSettings:
    """Fit the sampler of few evaluations to a network: noise levels, noise per step, and order.

    The search is CMA-ES (Hansen 2016, arXiv 1604.00772), which needs the library ``cma``. It starts
    from the levels of `sample`, and uses the same random numbers for all settings. Then eight new
    sets of samples decide between the best settings, the mean of the search distribution and the
    settings of `sample`.

    Parameters
    ----------
    process
        The reverse process with the network's score.
    shape
        ``(*D)`` of one sample.
    nfe
        Network evaluations per sample, as in `sample`; at least 2.
    samples
        B, the number of samples of a try. Some hundreds of images suffice.
    distance
        Function of samples ``(B, *D)``, smaller if they are better, such as a Fréchet distance to
        data in features of a network that knows such data.
    budget
        Largest number of network evaluations, all samples counted: a try needs B·nfe. None: 200
        tries, of which 24 are for the comparison.
    seed
        Seed of the search and of the samples, which have the seeds ``seed`` to ``seed + 8``.
        Measure the result with others.
    progress
        Show a progress bar on stderr.
    network
        Name that the settings keep.

    Raises
    ------
    ImportError
        If ``cma`` is missing.
    TypeError, ValueError
        If an argument is not allowed, or no `ExponentialMultistep` applies to the process.
    """
    search = Search(process, shape, nfe, samples, distance, seed, network)
    if budget is not None:
        each = search.nfe * search.samples
        search.most = as_integer(budget, 1, "budget") // each
        least = fewest_tries(len(search.best.kappa))
        if search.most < least:
            msg = f"budget must be at least {least * each}, for {least} tries of "
            raise ValueError(f"{msg}{each} network evaluations; got {budget}")
    search.run(progress=progress)
    return search.best


def fewest_tries(levels: int) -> int:
    """Smallest number of tries: forms of the start, three generations, and the comparison."""
    return len(_FORMS) + 3 * _generation(levels) + _CHOSEN * _SETS


def _generation(levels: int) -> int:
    """Number of tries of a generation, 4 + 3 log of the number of unknowns (Hansen 2016)."""
    return 4 + int(3 * math.log(2 * levels - 1))


def default_settings(
    process: ReverseProcess, shape: Sequence[int], nfe: int, network: str = ""
) -> SamplerSettings:
    """Old name of `recommend`."""
    warn_of_old("default_settings", "recommend")
    return recommend(process, nfe, shape=shape, network=network)


@dataclass
class Search:
    """Search for the settings of `fit_sampler`; ``best`` are the best ones at any time.

    ``most`` is the number of tries, at least `fewest_tries`.
    """

    process: ReverseProcess
    shape: Sequence[int]
    nfe: int
    samples: int
    distance: Distance
    seed: int = 0
    network: str = ""
    most: int = TRIES
    best: SamplerSettings = field(init=False)
    tries: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_reverse_process(self.process)
        check_callable(self.distance, "distance", "a function of samples")
        self.shape = checked_shape(self.shape)
        self.samples = as_integer(self.samples, 1, "samples")
        self.nfe, self.seed = as_integer(self.nfe, 2, "nfe"), as_integer(self.seed, 0, "seed")
        self._cma = import_cma()
        self.best = recommend(self.process, self.nfe, shape=self.shape, network=self.network)
        self._first, self._smallest = self.best, math.inf
        self._generation = _generation(len(self.best.kappa))

    def run(self, *, progress: bool = False) -> None:
        """Search until the budget is spent, and compare the best settings with the first ones."""
        with progress_bar(None, shown=progress, total=self.most, desc="fitting") as bar:
            for order, corrector in _FORMS:
                self._try(replace(self._first, order=order, corrector=corrector), bar)
            strategy = self._strategy(self.best)
            while self.tries + self._generation + _CHOSEN * _SETS <= self.most:
                points = strategy.ask()
                strategy.tell(points, [self._try(self._settings(x), bar) for x in points])
            if self._smallest == math.inf:
                raise ValueError("distance must be finite for some samples; it never was")
            # The best of many tries is partly luck, which the centre of the search has less of.
            centre = self._settings(strategy.result.xfavorite) or self.best
            chosen = list(dict.fromkeys((self._first, self.best, centre)))
            seeds = range(self.seed + 1, self.seed + 1 + _SETS)
            means = [fmean(self._distance(each, k, bar) for k in seeds) for each in chosen]
            self.best = chosen[means.index(min(means))]
            bar.update(self.most - self.tries)

    def _try(self, settings: SamplerSettings | None, bar: Any) -> float:
        found = self._distance(settings, self.seed, bar)
        if settings is not None and found < self._smallest:
            self.best, self._smallest = settings, found
        bar.set_postfix(best=f"{self._smallest:.4g}", refresh=False)
        return found

    def _distance(self, settings: SamplerSettings | None, seed: int, bar: Any) -> float:
        """Distance of samples; infinite if it or a sample is not finite, or without settings."""
        sde, score, found = self.process.sde, self.process.score, math.inf
        if settings is not None:
            with suppress(FloatingPointError):
                shape = (self.samples, *self.shape)
                made = sample(sde, score, shape, seed=seed, settings=settings)
                found = float(self.distance(made))
        self.tries += 1
        bar.update()
        return found if math.isfinite(found) else math.inf

    def _strategy(self, start: SamplerSettings) -> Any:
        low, _ = self._range()
        kappa = np.array(start.kappa)
        steps = np.log(np.diff(kappa))
        x = np.concatenate([kappa[:1], steps, start.stochasticity])
        n = len(steps)
        spreads = [_SPREADS[0]] + [_SPREADS[1]] * n + [_SPREADS[2]] * n
        lower = [low] + [-math.inf] * n + [0.0] * n
        upper = [math.inf] + [max(_LONGEST, steps.max())] * n + [_MOST_NOISE] * n
        x = np.clip(x, lower, upper)  # κ at the start of the default is at the bound, but rounded
        random = np.random.default_rng(self.seed)
        options = {
            "CMA_stds": spreads,
            "bounds": [lower, upper],
            "popsize": self._generation,
            "seed": math.nan,  # leave numpy's global generator alone
            "randn": lambda *size: random.standard_normal(size),
            "verbose": -9,
        }
        return self._cma.CMAEvolutionStrategy(x, 1.0, options)

    def _settings(self, x: Any) -> SamplerSettings | None:
        """Settings of a point of the search; None if they are not allowed or cost too much."""
        n = (len(x) - 1) // 2
        kappa = x[0] + np.concatenate([[0.0], np.exp(x[1 : n + 1]).cumsum()])
        if kappa[-1] > self._range()[1] or not (np.diff(kappa) > 0).all():
            return None
        found = replace(
            self.best, kappa=tuple(kappa.tolist()), stochasticity=tuple(x[n + 1 :].tolist())
        )
        # Guidance in an interval doubles the evaluations of the levels in it.
        evaluations = self.process.score.evaluations(found.times(self.process.sde))
        return found if int(evaluations.sum()) <= self.nfe else None

    def _range(self) -> tuple[float, float]:
        """Range of κ in which process and score can be evaluated."""
        first, last = kappa_range(self.process.sde)
        low, high = self.process.score.noise_levels or (0.0, math.inf)
        return max(first, -math.log(high)), min(last, -math.log(low) if low > 0 else math.inf)


def import_cma() -> Any:
    """The optional library; raise an ImportError that says how to install it."""
    try:
        import cma
    except ImportError as error:
        msg = "fit_sampler needs the library cma: pip install 'cldsde[tune]'"
        raise ImportError(msg) from error
    return cma
