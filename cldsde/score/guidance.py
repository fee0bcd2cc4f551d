r"""Conditional scores and classifier-free guidance, for any score and any process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, Self

import torch
from torch import Tensor

from cldsde.linear.blocks import per_sample
from cldsde.linear.checks import TimeLike, as_number, two_increasing
from cldsde.linear.identity import same_process
from cldsde.linear.kappa import times_of_kappa
from cldsde.score.protocol import FunctionScore, Score, ScoreFunction, ScoreWrapper, as_score
from cldsde.score.times import PlannedTime, score_times


class ConditionalScore(ScoreWrapper):
    """Conditional score, such as the score of a class: calls ``score(z, t, **conditions)``.

    Parameters
    ----------
    score
        A score that accepts conditions: a `DenoiserScore`, a `MixedScore` (``condition=…``), or any
        callable.
    conditions
        Keyword arguments of every call; also dictionaries and lists of such. Tensors have one row
        per sample, ``(B, …)``. A tensor with one row or without axes is repeated for each sample.
        The score's ``shared_conditions`` have no axis of samples. The score's ``.to(device)`` moves
        all of them.

    Raises
    ------
    TypeError, ValueError
        If ``score`` is not callable, or a condition is called z, t or planned.

    Examples
    --------
    >>> import torch
    >>> score = ConditionalScore(lambda z, t, shift: shift - z, shift=2.0)
    >>> score(torch.zeros(1, 1, 1), 0.5)
    tensor([[[2.]]])
    """

    def __init__(self, score: ScoreFunction, **conditions: Any) -> None:
        super().__init__(score)
        if reserved := {"z", "t", "planned"} & conditions.keys():
            raise ValueError(f"conditions must have other names than z, t, planned; got {reserved}")
        self.conditions = {
            name: x.unsqueeze(0) if name in self.shared_conditions and isinstance(x, Tensor) else x
            for name, x in conditions.items()
        }

    def forward(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """Score of the driven components, ``(B, d, *D)``; further conditions replace its own."""
        return super().forward(z, t, **{**self.expanded(len(z)), **options})

    def data_prediction(self, z: Tensor, t: TimeLike, **options: Any) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``, from the score's own ``data_prediction``."""
        return super().data_prediction(z, t, **{**self.expanded(len(z)), **options})

    def part(self, samples: slice, shape: Sequence[int]) -> Self:
        """The score of some samples: tensors of conditions keep the rows of these."""

        def rows(name: str, x: Any) -> Any:
            whole = isinstance(x, Tensor) and x.ndim > 0
            return _per_sample(name, x, shape[0])[samples] if whole else x

        inner = self.score.part(samples, shape)
        whole = [x for x in _leaves(self.conditions).values() if isinstance(x, Tensor)]
        if inner is self.score and all(x.ndim == 0 or len(x) == 1 for x in whole):
            return self
        return self._changed({"score": inner}, conditions=_map(rows, self.conditions))

    def expanded(self, batch: int) -> dict[str, Any]:
        """Conditions of a batch, with one row per sample."""
        found: dict[str, Any] = _map(lambda name, x: _per_sample(name, x, batch), self.conditions)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move = lambda _, x: fn(x) if isinstance(x, Tensor) else x  # noqa: E731
        self.conditions = _map(move, self.conditions)
        return self


class GuidedScore(Score):
    r"""Classifier-free guidance (Ho and Salimans 2021) of any two scores of one process.

    .. math:: s = s_u + w\,(s_c − s_u)

    Parameters
    ----------
    conditional, unconditional
        s_c and s_u, functions score(z, t). If both are `ConditionalScore` objects of one score
        whose conditions are tensors of one kind, each guided evaluation at one time for all samples
        is one call with twice the batch.
    weight
        w: 0 is the unconditional score, 1 the conditional score, and a larger number strengthens
        the condition.
    interval
        Noise levels (σ_low, σ_high). Guidance acts for σ_low < σ ≤ σ_high, with σ = e^{−κ(t)} and
        κ = ½ log SNR. Outside of them the score is s_c (Kynkäänniemi et al. 2024). None: guidance
        at all levels.

    Raises
    ------
    TypeError, ValueError
        If a score is not callable, the weight is not a finite number, the scores belong to
        different processes, or the interval is empty or given for scores of an unknown process.

    Notes
    -----
    A guided evaluation costs the evaluations of both scores. Outside of the interval only the
    conditional score is evaluated. With times per sample both scores are evaluated for all samples
    if any sample is guided. The scores get states in single precision at least.

    Examples
    --------
    >>> import torch
    >>> guided = GuidedScore(lambda z, t: 1 - z, lambda z, t: -z, weight=3.0)
    >>> guided(torch.zeros(1, 1, 1), 0.5)
    tensor([[[3.]]])
    """

    def __init__(
        self,
        conditional: ScoreFunction,
        unconditional: ScoreFunction,
        weight: float,
        *,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        given = self.conditional = as_score(conditional, "conditional")
        free = self.unconditional = as_score(unconditional, "unconditional")
        self.weight = weight
        if given.sde and free.sde and not same_process(given.sde, free.sde):
            raise ValueError(
                "conditional and unconditional must be scores of one process; got scores of "
                f"{given.sde!r} and {free.sde!r}"
            )
        self.sde = given.sde or free.sde
        ranges = [x.noise_levels for x in (given, free) if x.noise_levels is not None]
        if ranges:
            both = max(low for low, _ in ranges), min(high for _, high in ranges)
            self.noise_levels = two_increasing(both, "noise levels that both scores know")
        self.predicts_data = given.predicts_data and free.predicts_data
        self.depends_on_place = given.depends_on_place or free.depends_on_place
        self.shared_conditions = (*given.shared_conditions, *free.shared_conditions)
        self.interval = interval

    @property
    def weight(self) -> float:
        """w, a finite number; it can be set."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        number = as_number(weight, "weight")
        if not math.isfinite(number):
            raise ValueError(f"weight must be finite; got {weight}")
        self._weight = number

    @property
    def interval(self) -> tuple[float, float] | None:
        """Noise levels at which guidance acts, or None; it can be set."""
        return self._interval

    @interval.setter
    def interval(self, interval: tuple[float, float] | None) -> None:
        known = None if interval is None else two_increasing(interval, "interval")
        self._times = None if known is None else self._ends(known)
        self._interval = known

    def extra_repr(self) -> str:
        """Weight and interval, for the representation."""
        return f"weight={self.weight:g}, interval={self.interval}"

    def forward(self, z: Tensor, t: Any, **options: Any) -> Tensor:
        """Score of the driven components, ``(B, d, *D)``."""
        return self._evaluated("__call__", z, t, **options)

    def data_prediction(self, z: Tensor, t: Any, **options: Any) -> Tensor:
        """Guided E[x_0 | z_t], ``(B, *D)``, from the scores' own ``data_prediction``."""
        return self._evaluated("data_prediction", z, t, **options)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if a time is outside of the noise levels of either score."""
        self.conditional.check_times(t)
        self.unconditional.check_times(t)

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each time; see `Score.evaluations`."""
        free = self.unconditional.evaluations(t)
        if self._never_conditional:
            return free
        guided = self._guided(t)
        if t.ndim > 1:
            guided = guided.any(-1, keepdim=True)
        return self.conditional.evaluations(t) + guided * free

    @property
    def _never_conditional(self) -> bool:
        return self.weight == 0 and self.interval is None

    def _ends(self, interval: tuple[float, float]) -> tuple[float, float]:
        """Times of the ends of an interval of noise levels."""
        if interval[0] < 0:
            raise ValueError(f"interval must hold noise levels ≥ 0; got {interval}")
        if self.sde is None:
            raise ValueError(
                "interval must be None for scores without an attribute sde, which noise levels "
                f"need; got {interval}"
            )
        levels = torch.tensor(interval, dtype=torch.float64, device="cpu")
        low, high = times_of_kappa(self.sde, -levels.clamp(1e-300, 1e300).log()).tolist()
        return low, high

    def _guided(self, t: Tensor) -> Tensor:
        guided = torch.full_like(t, self.weight != 1, dtype=torch.bool)
        if self._times is None:
            return guided
        low, high = self._times
        return guided & (t > low) & (t <= high)

    def _evaluated(
        self, name: str, z: Tensor, t: Any, *, planned: PlannedTime | None = None, **conditions: Any
    ) -> Tensor:
        """A method of the scores, guided."""
        call: Callable[[Score], Tensor] = methodcaller(name, z, t, planned=planned, **conditions)
        if self._never_conditional:
            return call(self.unconditional)
        guided = self._guided(score_times(t, z, planned))
        if not bool(guided.any()):
            return call(self.conditional)
        dtype, z = z.dtype, z.to(torch.promote_types(z.dtype, torch.float32))
        call = methodcaller(name, z, t, planned=planned, **conditions)
        apart = guided.ndim or conditions
        joined = None if apart else _joined(self.conditional, self.unconditional, z)
        if joined is None:
            pair: Sequence[Tensor] = call(self.conditional), call(self.unconditional)
        else:
            score, doubled = joined
            if isinstance(t, Tensor):
                twice = t.reshape(-1)[:1].expand(2 * len(z))
                planned = planned and planned.moved(t, twice)
                t = twice
            call = methodcaller(name, torch.cat([z, z]), t, planned=planned, **doubled)
            pair = call(score).chunk(2)
        given, free = pair
        # A shared weight is a number; weights per sample are copied to the device.
        if guided.ndim == 0:
            return free.lerp(given, self.weight).to(dtype)
        weight = torch.where(guided, self.weight, 1.0).to(free)
        return free.lerp(given, per_sample(weight, free)).to(dtype)


def _joined(first: Score, second: Score, z: Tensor) -> tuple[Score, dict[str, Any]] | None:
    """Common score and joined conditions of two conditional scores; None if they differ in kind."""
    if not (isinstance(first, ConditionalScore) and isinstance(second, ConditionalScore)):
        return None
    inner = first.score
    if _identity(inner) is not _identity(second.score) or inner.depends_on_place:
        return None
    if inner.part(slice(0, 1), (len(z), *z.shape[2:])) is not inner:
        return None  # it has data per sample, which would have to be doubled, too
    ours, theirs = (_leaves(score.expanded(len(z))) for score in (first, second))
    kinds = [
        {name: isinstance(x, Tensor) and (x.shape, x.dtype) for name, x in leaves.items()}
        for leaves in (ours, theirs)
    ]
    if kinds[0] != kinds[1] or not all(kinds[0].values()):
        return None
    join = lambda name, _: torch.cat([ours[name], theirs[name]])  # noqa: E731
    return first.score, _map(join, first.conditions)


def _identity(score: Score) -> object:
    """The score, or the function that was adapted to it."""
    return score.function if isinstance(score, FunctionScore) else score


def _map(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """Apply a function of name and value to all values of nested dictionaries, lists and tuples."""
    if type(tree) is dict:
        return {k: _map(function, x, f"{name}[{k!r}]" if name else k) for k, x in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([_map(function, x, f"{name}[{i}]") for i, x in enumerate(tree)])
    return function(name, tree)


def _leaves(tree: Any) -> dict[str, Any]:
    """Values of nested dictionaries, lists and tuples by their names."""
    found: dict[str, Any] = {}
    _map(found.__setitem__, tree)
    return found


def _per_sample(name: str, condition: Any, batch: int) -> Any:
    if not isinstance(condition, Tensor):
        return condition
    if condition.ndim == 0 or len(condition) == 1:
        return condition.expand(batch, *condition.shape[1:])
    if len(condition) != batch:
        raise ValueError(
            f"condition {name} of the score must have one row per sample, {batch}; got "
            f"{len(condition)}. One row is repeated for all samples"
        )
    return condition
