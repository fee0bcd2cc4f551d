"""Solvers with planted faults."""

from dataclasses import replace
from typing import Any

from cldsde.solvers.authoring import Facts


def same(value: Any, *_: Any) -> Any:
    return value


def altered(
    base: Any,
    *,
    tables: Any = same,
    path: Any = same,
    inputs: Any = None,
    step: Any = same,
    **facts: Any,
) -> Any:
    """A class of solvers with other tables, path, inputs, steps or facts than the given class.

    Functions of: ``tables``: tables and times. ``path``: the path noise. ``inputs``: score and
    noise. ``step``: the state after a step, its number, the score and the tables.
    """

    class Altered(base):
        @property
        def facts(self) -> Facts:
            return replace(super().facts, **facts)

        def prepare(self, process, times):
            return tables(super().prepare(process, times), times)

        def path_noise(self, process, times):
            return path(super().path_noise(process, times))

        def step(self, z, memory, table, i, score, noise):
            given = inputs(score, noise) if inputs else (score, noise)
            z, memory = super().step(z, memory, table, i, *given)
            return step(z, i, score, table), memory

    return Altered


def declaring(solver: Any, **facts: Any) -> Any:
    """The same solver with other facts."""
    options = {name: getattr(solver, name) for name in solver.__dataclass_fields__}
    return altered(type(solver), **facts)(**options)
