r"""Conditional scores and classifier-free guidance, for any score and any process."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cldsde.linear.checks import TimeLike, as_number
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.sde import LinearSDE
from cldsde.score.checks import two_increasing
from cldsde.score.reverse import Score, check_score, checked_data_method, same_dynamics
from cldsde.score.times import score_times

__all__ = ["ConditionalScore", "GuidedScore"]


class ConditionalScore(nn.Module):
    """Conditional score, such as the score of a class: calls ``score(z, t, **conditions)``.

    Parameters
    ----------
    score
        A score that accepts conditions: a `DenoiserScore`, a `MixedScore` (``condition=…``), or any
        callable.
    conditions
        Keyword arguments of every call. Tensors have one row per sample, ``(B, …)``. A tensor
        without axes is repeated for each sample, ``(B,)``.

    Raises
    ------
    TypeError
        If ``score`` is not callable.

    Examples
    --------
    >>> import torch
    >>> score = ConditionalScore(lambda z, t, shift: shift - z, shift=2.0)
    >>> score(torch.zeros(1, 1, 1), 0.5)
    tensor([[[2.]]])
    """

    def __init__(self, score: Any, **conditions: Any) -> None:
        super().__init__()
        check_score(score)
        self.score = score
        self.conditions = conditions
        # Expose the process and the noise levels of the wrapped score to solvers.
        for name in ("sde", "noise_levels", "evaluations", "check_times"):
            if hasattr(score, name):
                setattr(self, name, getattr(score, name))

    def forward(self, z: Tensor, t: TimeLike) -> Tensor:
        """Score of the driven components, ``(B, d, *D)``."""
        score: Tensor = self.score(z, t, **self._expanded(len(z)))
        return score

    def data_prediction(self, z: Tensor, t: TimeLike) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``, from the score's own ``data_prediction``."""
        method: Any = checked_data_method(self.score)
        data: Tensor = method(z, t, **self._expanded(len(z)))
        return data

    def part(self, samples: slice, count: int) -> ConditionalScore:
        """The score of some of ``count`` samples: tensors of conditions keep the rows of these.

        Raises
        ------
        ValueError
            If a condition has another number of rows than ``count``.
        """
        conditions = {}
        for name, value in self.conditions.items():
            rows = isinstance(value, Tensor) and value.ndim > 0
            if rows and len(value) != count:
                msg = (
                    f"condition {name} of the score must have one row per sample, {count}; got "
                    f"{len(value)}"
                )
                raise ValueError(msg)
            conditions[name] = value[samples] if rows else value
        return ConditionalScore(part_of(self.score, samples, count), **conditions)

    def _expanded(self, batch: int) -> dict[str, Any]:
        return {name: _per_sample(name, x, batch) for name, x in self.conditions.items()}


class GuidedScore(nn.Module):
    r"""Classifier-free guidance (Ho and Salimans 2021) of any two scores of one process.

    .. math:: s = s_u + w\,(s_c − s_u)

    Parameters
    ----------
    conditional, unconditional
        s_c and s_u, functions score(z, t). If both are `ConditionalScore` objects of one score
        whose conditions are tensors of one kind, each guided evaluation is one call with twice the
        batch.
    weight
        w: 0 is the unconditional score, 1 the conditional score, and a larger number strengthens
        the condition.
    interval
        Noise levels (σ_low, σ_high). Guidance acts for σ_low < σ ≤ σ_high, with σ = e^{−κ(t)} and
        κ = ½ log SNR. Outside of them the score is s_c (Kynkäänniemi et al. 2024). None: guidance
        at all levels.

    Raises
    ------
    TypeError
        If a score is not callable or the weight is not a number.
    ValueError
        If the weight is not finite, the scores belong to different processes, or the interval is
        empty or given for scores without an attribute ``sde``.

    Notes
    -----
    ``Solution.nfev`` counts a guided evaluation as two, an evaluation of one score as one.

    References
    ----------
    J. Ho and T. Salimans, *Classifier-free diffusion guidance*, 2021. T. Kynkäänniemi et al.,
    *Applying guidance in a limited interval improves sample and distribution quality in diffusion
    models*, 2024.

    Examples
    --------
    >>> import torch
    >>> guided = GuidedScore(lambda z, t: 1 - z, lambda z, t: -z, weight=3.0)
    >>> guided(torch.zeros(1, 1, 1), 0.5)
    tensor([[[3.]]])
    """

    def __init__(
        self,
        conditional: Score,
        unconditional: Score,
        weight: float,
        *,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_score(conditional, "conditional")
        check_score(unconditional, "unconditional")
        self.conditional = conditional
        self.unconditional = unconditional
        self.weight = as_number(weight, "weight")
        if not math.isfinite(self.weight):
            msg = f"weight must be finite; got {weight}"
            raise ValueError(msg)
        self.interval = None if interval is None else two_increasing(interval, "interval")
        found = [score.sde for score in (conditional, unconditional) if hasattr(score, "sde")]
        if found:
            self.sde: LinearSDE = found[0]
            if found[-1] is not found[0] and not same_dynamics(found[0], found[-1]):
                msg = (
                    f"conditional and unconditional must be scores of one process; got scores of "
                    f"{found[0]!r} and {found[-1]!r}"
                )
                raise ValueError(msg)
        known = [getattr(score, "noise_levels", None) for score in (conditional, unconditional)]
        ranges = [levels for levels in known if levels is not None]
        #: Noise levels that both scores were trained on; None if neither knows them.
        self.noise_levels: tuple[float, float] | None = None
        if ranges:
            self.noise_levels = max(low for low, _ in ranges), min(high for _, high in ranges)
        self._times = None if self.interval is None else _times(self.interval, found)

    def extra_repr(self) -> str:
        """Weight and interval, for the representation."""
        return f"weight={self.weight:g}, interval={self.interval}"

    def forward(self, z: Tensor, t: Any) -> Tensor:
        """Score of the driven components, ``(B, d, *D)``."""
        if self.weight == 0 and self.interval is None:
            return self.unconditional(z, t)
        guided = self._guided(score_times(t, z))
        if not bool(guided.any()):
            return self.conditional(z, t)
        given, free = self._both(z, t)
        # A shared weight is a number; weights per sample are copied to the device.
        if guided.ndim == 0:
            return free.lerp(given, self.weight)
        weight = torch.where(guided, self.weight, 1.0).to(z).reshape(-1, *(1,) * (z.ndim - 1))
        return free.lerp(given, weight)

    def data_prediction(self, z: Tensor, t: Any) -> Tensor:
        """Guided E[x_0 | z_t], ``(B, *D)``, from the scores' own ``data_prediction``."""
        given: Any = self.conditional
        if not bool(self._guided(score_times(t, z)).any()):
            return checked_data_method(given)(z, t)
        parts = (checked_data_method(score)(z, t) for score in (self.unconditional, given))
        return next(parts).lerp(next(parts), self.weight)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if a time is outside of the noise levels of either score."""
        for score in (self.conditional, self.unconditional):
            if hasattr(score, "check_times"):
                score.check_times(t)

    def part(self, samples: slice, count: int) -> GuidedScore:
        """The guided score of some of ``count`` samples, see `ConditionalScore.part`."""
        scores = (self.conditional, self.unconditional)
        given, free = (part_of(score, samples, count) for score in scores)
        return GuidedScore(given, free, self.weight, interval=self.interval)

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of score evaluations per call at each time, 1 or 2, int64 of the shape of ``t``.

        Parameters
        ----------
        t
            Times ``(n,)`` of n calls, or ``(n, B)`` if each sample has a time of its own. A call
            evaluates both scores for all samples if any sample is guided.
        """
        if self.weight == 0 and self.interval is None:
            return torch.ones_like(t, dtype=torch.int64)
        guided = self._guided(t)
        if t.ndim > 1:
            guided = guided.any(-1, keepdim=True).expand_as(t)
        return 1 + guided.long()

    def _guided(self, t: Tensor) -> Tensor:
        guided = torch.full_like(t, self.weight != 1, dtype=torch.bool)
        if self._times is None:
            return guided
        low, high = self._times
        return guided & (t > low) & (t <= high)

    def _both(self, z: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        joined = _joined(self.conditional, self.unconditional, len(z))
        shared = isinstance(t, Tensor) and score_times(t, z).ndim == 0
        if joined is None or not shared:
            return self.conditional(z, t), self.unconditional(z, t)
        score, conditions = joined
        first = t.reshape(-1)[:1]
        twice = first.expand(2 * len(z))
        if (known := getattr(t, "known", None)) is not None:
            twice.known = known
        given, free = score(torch.cat([z, z]), twice, **conditions).chunk(2)
        return given, free


def _joined(
    conditional: Score, unconditional: Score, batch: int
) -> tuple[Any, dict[str, Tensor]] | None:
    """Common score and joined conditions of two conditional scores; None if they differ in kind."""
    first, second = conditional, unconditional
    if not (isinstance(first, ConditionalScore) and isinstance(second, ConditionalScore)):
        return None
    # A denoiser that fills states up depends on the place in the batch.
    if getattr(first.score, "fills", False):
        return None
    if first.score is not second.score or first.conditions.keys() != second.conditions.keys():
        return None
    conditions = {}
    for name, given in first.conditions.items():
        pair = [_per_sample(name, x, batch) for x in (given, second.conditions[name])]
        if not all(isinstance(x, Tensor) for x in pair):
            return None
        if pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
            return None
        conditions[name] = torch.cat(pair)
    return first.score, conditions


def part_of(score: Any, samples: slice, count: int) -> Any:
    """The score of some of ``count`` samples, for scores with and without conditions."""
    conditional = isinstance(score, ConditionalScore | GuidedScore)
    return score.part(samples, count) if conditional else score


def _per_sample(name: str, condition: Any, batch: int) -> Any:
    if not isinstance(condition, Tensor):
        return condition
    if condition.ndim == 0:
        return condition.expand(batch)
    if len(condition) != batch:
        msg = (
            f"condition {name} of the score must have one row per sample, {batch}; got "
            f"{len(condition)}. Solvers with a step length per sample leave finished samples out: "
            "give them a condition without axes, or solve one condition at a time"
        )
        raise ValueError(msg)
    return condition


def _times(interval: tuple[float, float], found: list[LinearSDE]) -> tuple[float, float]:
    """Times of the ends of an interval of noise levels."""
    if interval[0] < 0:
        msg = f"interval must hold noise levels ≥ 0; got {interval}"
        raise ValueError(msg)
    if not found:
        msg = (
            "interval must be None for scores without an attribute sde, which noise levels need; "
            f"got {interval}"
        )
        raise ValueError(msg)
    levels = torch.tensor(interval, dtype=torch.float64, device="cpu")
    ends = times_of_log_snr(found[0], -levels.clamp(1e-300, 1e300).log()).tolist()
    return ends[0], ends[1]
