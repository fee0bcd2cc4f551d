"""Learnt parameters whose values a process has taken over when it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def frozen_parameters(compute: Callable[[], Iterable[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Leaves of autograd's graph that ``compute`` does not read anew, and their values.

    Two computations share the nodes of the graph that were made before both. Later changes of the
    leaves below these nodes do not reach the results.
    """
    first = _nodes(x.grad_fn for x in compute())
    if not first:
        return []
    second = _nodes(x.grad_fn for x in compute())
    frozen = _nodes(node for node in first & second if not hasattr(node, "variable"))
    leaves = [node.variable for node in frozen if hasattr(node, "variable")]
    return [(leaf, leaf.detach().clone()) for leaf in leaves]


def _nodes(ends: Iterable[Any]) -> set[Any]:
    """Nodes of autograd's graph at and below ``ends``."""
    found: set[Any] = set()
    left = [*ends]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [below for below, _ in node.next_functions]
    return found
