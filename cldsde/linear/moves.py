"""Transitions of the reverse process over many steps at once, for the tables of integrators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.flow import flow_rotations
from cldsde.linear.kernel import check_density
from cldsde.linear.posterior import bayes
from cldsde.linear.sde import LinearSDE

_STEPS = 25  # number of steps whose tables are computed at once


def by_steps(function: Callable[..., tuple[Tensor, ...]], *tables: Tensor) -> list[Tensor]:
    """Apply a function to the tables of a few steps at a time.

    Larger tables would use much memory and wake torch's thread pool.
    """
    parts = [function(*few) for few in zip(*(torch.split(t, _STEPS) for t in tables), strict=True)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def marginal_factors(sde: LinearSDE, stops: Tensor) -> list[Tensor]:
    """Mean matrices and covariance roots of the distributions given the data."""

    def marginals(times: Tensor) -> tuple[Tensor, Tensor]:
        kernel = sde.marginal(times)
        check_density(kernel.root, times, "times")
        return kernel.mean, kernel.root

    return by_steps(marginals, stops)


def carried_roots(sde: LinearSDE, stops: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Roots that follow the probability flow, triangular at the latest stop, and their inverses."""
    rotations = flow_rotations(sde.dynamics, lambda t: sde.marginal(t).root, stops.flatten())
    rotations = rotations.reshape(root.shape)
    return root @ rotations, rotations.mT @ triangular_inverse(root)


def moves_to_end(
    sde: LinearSDE, stops: Tensor, root: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Transitions Φ_λ ``(n, m, k, k)`` from each stop to its step's end, and noise of whole steps.

    ``stops`` ``(n, m + 1)`` run from the start of each step to its end. ``root`` holds the roots of
    the distributions given the data there, and ``levels`` ``(n,)`` holds λ. The noise roots are
    ``(n, k, k)``, without columns if λ = 0.
    """
    if not bool(levels.any()):
        carried, inverse = carried_roots(sde, stops, root)
        return carried[:, -1:] @ inverse[:, :-1], root[:, 0, :, :0]
    if bool((levels == 1).all()):

        def posterior(stops: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
            step = sde.transition(stops[:, -1:], stops[:, :-1])
            moves, noise = bayes(step, root[:, -1:].expand_as(step.root), root[:, :-1])
            return moves, noise[:, 0]

        moves, noise = by_steps(posterior, stops, root)
        return moves, noise

    def family(stops: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        # Integrate between neighbouring stops only: integrals up to the end would overlap. The last
        # interval is the whole step, for its noise.
        ends = torch.cat([stops[:, 1:], stops[:, -1:]], dim=1)
        starts = torch.cat([stops[:, :-1], stops[:, :1]], dim=1)
        step = sde.posterior(ends, starts, stochasticity=levels.unsqueeze(1))
        return step.state[:, :-1], step.root[:, -1]

    pieces, noise = by_steps(family, stops, levels)
    to_end = [pieces[:, -1]]
    for i in range(pieces.shape[1] - 2, -1, -1):
        to_end.append(to_end[-1] @ pieces[:, i])
    return torch.stack(to_end[::-1], dim=1), noise
