"""Times at which a score is called.

A score is called as score(z, t) with times ``(B,)`` on the state's device, rounded to its dtype.
The coefficients of a process are computed on the CPU from float64 times. Reading the times back
would wait for the device and lose digits. Solvers therefore also pass `PlannedTime`, the place of t
among times that are known before the solve, and scores compute their coefficients for all of these
times at once (`coefficients_at`). A planned time is valid for the tensor it was made with: whoever
passes another tensor t has its values read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cldsde.linear.checks import TimeLike, as_float64, as_times

Coefficients = TypeVar("Coefficients", bound=tuple[Tensor, ...])
"""A NamedTuple of tensors whose first axes are the axes of the times."""

P = ParamSpec("P")
R = TypeVar("R")


def _outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Apply `torch.compiler.disable`, but import the compiler only while a graph is traced."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        outside: Callable[[Callable[P, R]], Callable[P, R]] = torch.compiler.disable
        return outside(function)(*args, **kwargs)

    return call


class KnownTimes:
    """Times of score evaluations known before these: ``(n,)`` or ``(n, B)``, float64 on the CPU."""

    def __init__(self, times: Tensor) -> None:
        self.times = times
        self._tables: WeakKeyDictionary[object, dict[Any, Any]] = WeakKeyDictionary()
        self._mapped: WeakKeyDictionary[object, KnownTimes] = WeakKeyDictionary()

    def arguments(self, z: Tensor, moved: Tensor | None = None) -> list[PlannedTime]:
        """Times as a score receives them with states like z, one per evaluation.

        ``moved`` holds the times in that dtype and on that device, if they have been copied.
        """
        table = score_argument(self.times, z) if moved is None else moved
        rows = enumerate(table.unbind())
        return [PlannedTime(self, number, row.expand(len(z))) for number, row in rows]

    def mapped(self, owner: object, function: Callable[[Tensor], Tensor]) -> KnownTimes:
        """Known values of a function of the times, which is called once per ``owner``."""
        if owner not in self._mapped:
            with torch.inference_mode(False), torch.no_grad():
                self._mapped[owner] = KnownTimes(function(self.times))
        return self._mapped[owner]

    def __reduce__(self) -> tuple[type[KnownTimes], tuple[Tensor]]:
        """Pickle without the tables, which are computed again when needed."""
        return KnownTimes, (self.times,)

    def row(
        self,
        owner: object,
        number: int,
        make: Callable[[Tensor], Coefficients],
        kind: tuple[torch.dtype, torch.device],
        version: object,
    ) -> Coefficients:
        """Coefficients of ``owner`` at the time with the given index, from a table of all times.

        There is one table per dtype and device. It is computed again if the version changes.
        """
        tables = self._tables.setdefault(owner, {})
        known, rows = tables.get(kind, (None, []))
        if known != version:
            # The table must hold no autograd graph and no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                made: Any = make(self.times)
            rows = [type(made)(*row) for row in zip(*(x.unbind() for x in made), strict=True)]
            tables[kind] = version, rows
        found: Coefficients = rows[number]
        return found


class PlannedTime(NamedTuple):
    """The time of a score evaluation, as a place among known times."""

    times: KnownTimes
    number: int
    argument: Tensor  # t, (B,), that the score is called with

    def moved(self, t: TimeLike, argument: Tensor) -> PlannedTime | None:
        """The place of t for another tensor with its values; None if t is not planned."""
        return self._replace(argument=argument) if self.argument is t else None

    @_outside_graphs
    def mapped(
        self, t: TimeLike, owner: object, function: Callable[[Tensor], Tensor], argument: Tensor
    ) -> PlannedTime | None:
        """The place of a function of t with the values ``argument``; None if t is not planned."""
        if self.argument is not t:
            return None
        return PlannedTime(self.times.mapped(owner, function), self.number, argument)


def score_argument(times: Tensor, z: Tensor) -> Tensor:
    """Times as a score receives them: on the state's device, in its dtype, at least float32."""
    return times.to(torch.promote_types(z.dtype, torch.float32)).to(z.device)


@_outside_graphs
def score_times(
    t: TimeLike, z: Tensor, planned: PlannedTime | None = None, *, levels: bool = False
) -> Tensor:
    """Times of a score call in float64 on the CPU, ``()`` if the batch shares one.

    A ``(B,)`` tensor expanded from one number (stride 0) counts as shared without a look at its
    values. ``levels`` says whether ``t`` holds noise levels, which have no upper limit.
    """
    if planned is not None and planned.argument is t:
        times = planned.times.times[planned.number]
    else:
        if isinstance(t, Tensor) and t.ndim == 1 and t.stride() == (0,) and len(t) == len(z) > 0:
            t = t[0]
        times = as_float64(t).detach().cpu() if levels else as_times(t, "t")
    if times.shape not in (torch.Size([]), torch.Size([len(z)])):
        name, what = ("sigma", "one level") if levels else ("t", "one time")
        msg = f"{name} must be {what} or have shape ({len(z)},); got {tuple(times.shape)}"
        raise ValueError(msg)
    return times


@_outside_graphs
def coefficients_at(
    owner: object,
    t: TimeLike,
    z: Tensor,
    make: Callable[[Tensor], Coefficients],
    dtype: torch.dtype,
    *,
    planned: PlannedTime | None,
    version: object = 0,
    levels: bool = False,
) -> Coefficients:
    """Coefficients of a score at the times of a call, on the state's device.

    ``owner`` is the score, which owns the tables of known times, and ``make`` a function of float64
    times on the CPU. A table is computed again if ``version``, the version of everything that it
    depends on, changes. None: coefficients need gradients and are computed at each call.
    """

    def moved(times: Tensor) -> Coefficients:
        table: Any = make(times)
        found: Coefficients = type(table)(*on_device(table, dtype, z.device))
        return found

    times = score_times(t, z, planned, levels=levels)
    if planned is None or planned.argument is not t or version is None:
        return moved(times)
    return planned.times.row(owner, planned.number, moved, (dtype, z.device), version)


def on_device(parts: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Copy CPU tensors to a device in a given dtype, in one transfer."""
    parts = [part.to(dtype) for part in parts]
    if device.type == "cpu":
        return parts
    flat = torch.cat([part.flatten() for part in parts]).to(device)
    pieces = torch.split(flat, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
