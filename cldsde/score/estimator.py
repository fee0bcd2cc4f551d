"""Base class of scores and denoisers: abilities that solvers ask for, with defaults."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class Estimator(nn.Module):
    """Base class of `Score` and `Denoiser`.

    Attributes
    ----------
    noise_levels
        Smallest and largest noise level σ = e^{−κ} of the training; None: not known. By default
        `cldsde.sample` stays within them. `check_times` may raise an error at other levels, as for
        `DenoiserScore`.
    depends_on_place
        Whether an estimate depends on the sample's index in the batch, or on the batch's size.
    shared_conditions
        Names of conditions that have no axis of samples, such as the positions of Flux.
    """

    noise_levels: tuple[float, float] | None = None
    depends_on_place: bool = False
    shared_conditions: tuple[str, ...] = ()

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if a time, or for denoisers a noise level, is not allowed.

        `cldsde.solvers.plan` calls it with the times of a grid ``(n,)``, before any evaluation.
        """

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each time, int64 of the shape of ``t``.

        ``t`` holds times, for denoisers noise levels, of n calls: ``(n,)``, or ``(n, B)`` if each
        sample has its own.
        """
        return torch.ones_like(t, dtype=torch.int64)

    @property
    def evaluates_once(self) -> bool:
        """Whether `evaluations` is one at every time, so that it needs no noise levels."""
        return type(self).evaluations is Estimator.evaluations

    def part(self, samples: slice, shape: Sequence[int]) -> Self:
        """The same estimate for some samples of a batch: everything per sample keeps their rows.

        ``shape`` is the shape ``(B, *D)`` of the data of all samples. Only direct submodules are
        asked for their parts. A condition or an observation with another number of rows than B
        raises a ValueError.
        """
        changed = {}
        for name, child in self._modules.items():
            if isinstance(child, Estimator) and (part := child.part(samples, shape)) is not child:
                changed[name] = part
        return self._changed(changed) if changed else self

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; the CPU if there is none."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _changed(self, modules: dict[str, Any], **attributes: Any) -> Self:
        """A shallow copy with other submodules or attributes, such as a compiled ``forward``."""
        other = copy.copy(self)
        other.__dict__.pop("forward", None)  # it was compiled with the present submodules
        other.__dict__.update(attributes, _modules={**self._modules, **modules})
        other._buffers = dict(self._buffers)
        return other


def compiled_module(module: object) -> nn.Module | None:
    """The original of a module that torch.compile compiled; None for other objects."""
    return module._modules.get("_orig_mod") if isinstance(module, nn.Module) else None
