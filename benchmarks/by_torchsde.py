"""Euler–Maruyama by torchsde for the reverse SDE of CLD, with all that can be tabulated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from by_hand import BETA, FRICTION, INVERSE_MASS

__all__ = ["EulerMaruyama"]


class EulerMaruyama:
    """A problem in torchsde's clock and layout, ``(B·D, 2)``, for a grid of even steps."""

    noise_type, sde_type = "additive", "ito"

    def __init__(self, score: Any, state: Tensor, times: Tensor) -> None:
        self.score, self.state, self.times = score, state, times
        self.shape = (len(state), *state.shape[2:], 2)
        self.h, self.last = float(times[0] - times[1]), len(times) - 2
        self.y0 = state.movedim(1, -1).reshape(-1, 2)
        root = torch.tensor([[0.0], [math.sqrt(2 * FRICTION * BETA)]])
        self.root = root.expand(len(self.y0), 2, 1)
        self.table: Callable[[Tensor, int], Tensor]

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, 0], y[:, 1]
        z = y.reshape(self.shape).movedim(-1, 1)
        # torchsde adds up its steps, and may take one too many.
        i = min(round((float(s) + float(self.times[0])) / self.h), self.last)
        pull = self.table(z, i).reshape(-1)
        drift = BETA * x + BETA * FRICTION * INVERSE_MASS * v
        return torch.stack(
            [-BETA * INVERSE_MASS * v, drift.add_(pull, alpha=2 * FRICTION * BETA)], dim=1
        )

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        return self.root

    def g_prod(self, s: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return self.root[:, :, 0] * noise

    def f_and_g_prod(self, s: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(s, y), self.g_prod(s, y, noise)

    @torch.no_grad()
    def run(self, *, informed: bool) -> Tensor:
        """Solve, with torchsde's default Brownian motion or one that knows the step."""
        import torchsde

        self.table = self.score.tabulate(self.times[:-1], self.state)
        ends = torch.tensor([-float(self.times[0]), -float(self.times[-1])], dtype=torch.float64)
        bm = None
        if informed:
            bm = torchsde.BrownianInterval(ends[0], ends[1], size=(len(self.y0), 1), dt=self.h)
        return torchsde.sdeint(self, self.y0, ends, bm=bm, dt=self.h, method="euler")
