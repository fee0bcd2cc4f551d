"""Means of losses and gradients over the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Means of losses and of gradients' norms, read seldom: reading waits for the device.

    ``loss`` is the sum of all losses, ``gradient_norm`` the norm of all parts together, and
    ``PART_loss`` and ``PART_gradient_norm`` belong to one part.
    """

    def __init__(self, engine: Accelerator, parts: Sequence[str]) -> None:
        self._engine = engine
        names = [f"{part}_{what}" for what in ("loss", "gradient_norm") for part in parts]
        self._names = ["loss", "gradient_norm", *names]
        dtype = torch.float64 if engine.device.type == "cpu" else None
        self.sums = torch.zeros(len(self._names) + 1, dtype=dtype).to(engine.device)

    def add(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Add a step of this process: losses and norms of each part, by its name."""
        each = torch.stack(list(losses.values()))
        sizes = torch.stack([norm.detach() for norm in norms.values()]).to(each)
        whole = torch.stack([each.sum(), sizes.norm()])
        self.sums += torch.cat([whole, each, sizes, torch.ones_like(each[:1])])

    def shared(self) -> Tensor:
        """Sums of losses, norms and steps, averaged over all processes, which all must call it."""
        return cast(Tensor, self._engine.reduce(self.sums, "mean"))

    def means(self) -> dict[str, float]:
        """Means over steps and processes since `clear`; 0 without a step."""
        *sums, steps = self.shared().tolist()
        return {name: x / max(steps, 1) for name, x in zip(self._names, sums, strict=True)}

    def clear(self) -> None:
        """Reset all sums."""
        self.sums.zero_()
