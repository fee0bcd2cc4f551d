"""The score at times that are known in advance."""

from __future__ import annotations

from torch import Tensor

from cldsde.score import ReverseProcess, TabulatedScore
from cldsde.score.reverse import checked_score, score_argument

from .combine import batch_first

__all__ = ["NumberedScore"]


class NumberedScore:
    """The score at numbered times; counts its evaluations and checks what it returns."""

    def __init__(self, process: ReverseProcess, times: Tensor, z: Tensor) -> None:
        self.nfev = 0
        self._driven = len(process.sde.driven)
        self._shape, self._dtype = (len(z), self._driven, *z.shape[2:]), z.dtype
        score = process.score
        self.tabulated = False
        if isinstance(score, TabulatedScore):
            self.tabulated = True
            self._evaluate = score.tabulate(times, z)
        else:
            table = score_argument(times, z)
            self._evaluate = lambda z, i: score(batch_first(z), table[i].expand(len(z)))

    def __call__(self, z: Tensor, i: int) -> Tensor:
        """Score ``(B, d, *D)`` of states at the time of the given number."""
        self.nfev += 1
        value = self._evaluate(z, i)
        # What is right is found out without delay; what is not is told by the check.
        if type(value) is Tensor and value.shape == self._shape and value.dtype == self._dtype:
            return value
        return checked_score(value, z, self._driven)
