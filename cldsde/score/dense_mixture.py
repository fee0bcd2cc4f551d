"""Scores of Gaussian mixtures in few dimensions, by matrix products over the batch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = ["dense_score"]

_WIDTH = 16  # numbers of a row in products with the score of one Gaussian


def dense_score(
    psi: Tensor,
    whitening: Tensor,
    log_scale: Tensor,
    means: Tensor,
    axes: Tensor,
    rows: Sequence[int],
    like: Tensor,
    *,
    side_by_side: bool,
) -> Callable[[Tensor, int], Tensor]:
    """Scores at T times of n Gaussians whose laws are matrices over all k·D numbers of a state.

    Parameters
    ----------
    psi, whitening, log_scale
        Laws in the eigenbases of the covariances, ``(T, k)``, ``(T, n, D, k, k)``, ``(T, n)``.
    means, axes
        ``(n, D)`` and the eigenbases, ``(n, D, D)``.
    rows
        The d components whose score is wanted.
    like
        A tensor of the dtype and device of the states to come.
    side_by_side
        Whether samples may share products, which pays where the table is used many times. It takes
        a look at values, which `torch.func` does not allow.

    Returns
    -------
    callable
        States ``(B, k, D)`` and the number of a time to scores ``(B, d, D)``.
    """
    (modes, dimension), components = means.shape, psi.shape[-1]
    # Numbers of a state are ordered component by component.
    whole = torch.einsum("tnjkl,nij->tnkjli", whitening, axes).flatten(4).flatten(2, 3)
    mean = torch.einsum("tl,ni->tnli", psi, means).flatten(2)
    centre = -(whole @ mean.unsqueeze(-1)).flatten(1, 2)
    driven = whole.reshape(*whole.shape[:-1], components, dimension)[..., rows, :].flatten(-2)
    pull = -driven.flatten(1, 2).mT
    whole = whole.flatten(1, 2)
    if modes == 1:
        # The only Gaussian is responsible for every state: its score is linear.
        parts = _by_component(pull @ whole, components)
        return _Line(parts, pull @ centre, like, side_by_side=side_by_side)
    return _Mixture(_by_component(whole, components), centre, log_scale, pull, like)


def _by_component(matrix: Tensor, components: int) -> Tensor:
    """The parts ``(T, k, r, D)`` of matrices ``(T, r, k D)``."""
    return matrix.reshape(*matrix.shape[:-1], components, -1).movedim(-2, 1)


class _Mixture:
    """Scores of several Gaussians.

    Numbers of the batch lie in the last axis: products with small matrices, sums and softmaxes of
    few entries are many times faster along it than across it.

    Parameters
    ----------
    parts, centre
        Whitening ``(T, k, n k D, D)`` and minus the whitened means ``(T, n k D, 1)``.
    log_scale, pull
        Of the densities, ``(T, n)``, and from whitened residuals to the score, ``(T, d D, n k D)``.
    like
        A tensor of the dtype and device of the states to come.
    """

    def __init__(
        self, parts: Tensor, centre: Tensor, log_scale: Tensor, pull: Tensor, like: Tensor
    ) -> None:
        self._modes = log_scale.shape[-1]
        # Taken apart here: to index a table takes as long as to launch a small kernel.
        self._parts = [part.unbind() for part in parts.to(like).contiguous()]
        self._centre = centre.to(like).unbind()
        self._log_scale = log_scale.unsqueeze(-1).to(like).unbind()
        self._pull = pull.to(like).unbind()

    def __call__(self, z: Tensor, i: int) -> Tensor:
        whitened = self._centre[i]
        for part, x in zip(self._parts[i], z.unbind(1), strict=True):
            whitened = torch.addmm(whitened, part, x.mT)
        by_mode = whitened.reshape(self._modes, len(whitened) // self._modes, len(z))
        log_terms = self._log_scale[i] - 0.5 * by_mode.square().sum(1)
        weighted = by_mode * log_terms.softmax(0).unsqueeze(1)
        score = (self._pull[i] @ weighted.flatten(0, 1)).mT
        return score.view(len(z), score.shape[1] // z.shape[2], z.shape[2])


class _Line:
    """The score of one Gaussian: a linear map, which several samples share one product of.

    Products with matrices of eight columns and fewer waste most of what a processor can do; those
    of samples side by side, with a block-diagonal matrix, do not.

    Parameters
    ----------
    parts, offset
        ``(T, k, d D, D)`` and ``(T, d D, 1)``.
    like
        A tensor of the dtype and device of the states to come.
    side_by_side
        Whether samples may share products.
    """

    def __init__(self, parts: Tensor, offset: Tensor, like: Tensor, *, side_by_side: bool) -> None:
        parts, offset = parts.movedim(1, 0).mT.to(like), offset.squeeze(-1).to(like)
        components, times, dimension, wide = parts.shape
        self._law = offset, parts
        self._shape = wide // dimension, dimension
        # What is transformed is not to be written to; of a learnt process all is differentiated.
        self._in_place = side_by_side and not parts.requires_grad
        # To look whether a sum is finite would hold up another device.
        several = self._in_place and like.device.type == "cpu"
        self._count = count = max(1, _WIDTH // dimension) if several else 1
        if count > 1:
            blocks = like.new_zeros(components, times, count, dimension, count, wide)
            blocks.diagonal(dim1=2, dim2=4).copy_(parts.unsqueeze(-1))
            blocks = blocks.view(components, times, count * dimension, count * wide)
            self._together = _by_time(offset.repeat(1, count), blocks)
            self._columns = _Columns(count * dimension)

    @cached_property
    def _alone(self) -> list[_Row]:
        """Taken apart when it is asked for, which few tables are whose samples share products."""
        return _by_time(*self._law)

    def __call__(self, z: Tensor, i: int) -> Tensor:
        batch, count = z.shape[0], self._count
        in_place = self._in_place and not (
            z.requires_grad or torch.compiler.is_compiling() or is_functorch_wrapped_tensor(z)
        )
        if not in_place or count == 1 or batch % count:
            return self._one_by_one(z, i, in_place=in_place)
        offset, (first, *others) = self._together[i]
        x, *rest = self._columns(z)
        total = torch.addmm(offset, x, first)
        for x, part in zip(rest, others, strict=True):
            total.addmm_(x, part)
        score = total.view(batch, *self._shape)
        if not math.isfinite(total.sum()):
            # 0 · NaN: what is not finite has spread to the samples beside it.
            spread = total.isfinite().all(1).logical_not_().repeat_interleave(count)
            score[spread] = self._one_by_one(z[spread], i, in_place=True)
        return score

    def _one_by_one(self, z: Tensor, i: int, *, in_place: bool) -> Tensor:
        total, parts = self._alone[i]
        for number, (x, part) in enumerate(zip(z.unbind(1), parts, strict=True)):
            add = total.addmm_ if in_place and number else partial(torch.addmm, total)
            total = add(x, part)
        return total.view(len(z), *self._shape)


class _Columns:
    """Components of states ``(B, k, D)`` as matrices of a width.

    To take a state apart takes as long as a product of it. That is done once of states that come
    again, as those of a solver that writes to two pieces of memory in turn.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        # The two states that came last, where they lie, and their columns.
        self._known: list[tuple[weakref.ref[Tensor], int, Sequence[Tensor]]] = []

    def __call__(self, z: Tensor) -> Sequence[Tensor]:
        place = z.data_ptr()
        for state, known, columns in self._known:
            if state() is z and known == place:
                return columns or self._keep(z, self._apart(z))
        # None of one that may come but once.
        self._keep(z, ())
        return self._apart(z)

    def _keep(self, z: Tensor, columns: Sequence[Tensor]) -> Sequence[Tensor]:
        known = self._known

        def forget(state: weakref.ref[Tensor]) -> None:
            known[:] = [entry for entry in known if entry[0] is not state]

        # With a state its columns go, which would keep its memory.
        if not columns or z[:, 0].is_contiguous():  # else they are copies, which do not change
            others = [entry for entry in known if entry[0]() is not z]
            known[:] = [*others[-1:], (weakref.ref(z, forget), z.data_ptr(), columns)]
        return columns

    def _apart(self, z: Tensor) -> Sequence[Tensor]:
        return [x.reshape(-1, self._width) for x in z.unbind(1)]


_Row = tuple[Tensor, tuple[Tensor, ...]]
"""What is added to a state's products at one time, and the matrices of its components."""


def _by_time(offset: Tensor, parts: Tensor) -> list[_Row]:
    """Taken apart ahead: to index a table takes as long as to launch a small kernel."""
    by_time = zip(*(part.unbind() for part in parts), strict=True)
    return list(zip(offset.unbind(), by_time, strict=True))
