"""Euler–Maruyama by torchsde for the reverse SDE of CLD with the constants of `by_hand`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torchsde
from torch import Tensor

from by_hand import BETA, FRICTION, INVERSE_MASS

__all__ = ["EulerMaruyama"]


class EulerMaruyama:
    """A problem in torchsde's time and layout, ``(B, 2·D)``, for a uniform grid."""

    noise_type, sde_type = "additive", "ito"

    def __init__(
        self, score: Callable[[Tensor, Tensor], Tensor], state: Tensor, times: Tensor
    ) -> None:
        self.score, self.shape, self.times = score, state.shape, times
        self.h, self.y0 = float(times[0] - times[1]), state.flatten(1)
        self.size = self.y0.shape[1] // 2
        root = math.sqrt(2 * FRICTION * BETA) * torch.eye(self.size)
        self.root = torch.cat([0 * root, root]).expand(len(state), -1, -1)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        # torchsde sums up its steps, and rounding may lead past the end.
        t = (-s).clamp(self.times[-1], self.times[0]).to(y)
        pull = self.score(y.view(self.shape), t.expand(len(y))).flatten(1)
        x, v = y.chunk(2, dim=1)
        drift = torch.add(BETA * x, v, alpha=BETA * FRICTION * INVERSE_MASS)
        return torch.cat(
            [v * -(BETA * INVERSE_MASS), drift.add_(pull, alpha=2 * FRICTION * BETA)], 1
        )

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        return self.root

    def g_prod(self, s: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """The product with g, without its matrix."""
        kick = noise * math.sqrt(2 * FRICTION * BETA)
        return torch.cat([torch.zeros_like(kick), kick], 1)

    def f_and_g_prod(self, s: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(s, y), self.g_prod(s, y, noise)

    @torch.no_grad()
    def run(self, *, informed: bool) -> Tensor:
        """Solve with torchsde's default Brownian motion, or with one that knows the step."""
        ends = torch.tensor([-float(self.times[0]), -float(self.times[-1])], dtype=torch.float64)
        motion = torchsde.BrownianInterval(
            *ends, size=(len(self.y0), self.size), **({"dt": self.h} if informed else {})
        )
        found = torchsde.sdeint(self, self.y0, ends, bm=motion, dt=self.h, method="euler")
        return found[-1].view(self.shape)
