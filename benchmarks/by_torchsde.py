"""Euler–Maruyama by torchsde for the reverse SDE of CLD, with all that can be tabulated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from by_hand import BETA, FRICTION, INVERSE_MASS

__all__ = ["EulerMaruyama", "EulerMaruyamaOfOneRow"]


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
        bm = self.brownian(ends, **({"dt": self.h} if informed else {}))
        return torchsde.sdeint(self, self.y0, ends, bm=bm, dt=self.h, method="euler")

    def brownian(self, ends: Tensor, **options: Any) -> Any:
        """torchsde's motion, as `torchsde.sdeint` makes it by default, or with options."""
        import torchsde

        return torchsde.BrownianInterval(*ends, size=(len(self.y0), 1), **options)


class EulerMaruyamaOfOneRow(EulerMaruyama):
    """The same with the whole batch in one row, ``(1, 2·B·D)``, position and velocity apart.

    Fit for states of little data, though not what torchsde's interface leads one to: its noise has
    no matrix, but for what multiplies with it.
    """

    def __init__(self, score: Any, state: Tensor, times: Tensor) -> None:
        super().__init__(score, state, times)
        self.shape = (2, len(state), *state.shape[2:])
        self.y0 = state.movedim(1, 0).reshape(1, -1)
        self.size = self.y0.shape[1] // 2

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        i = min(round((float(s) + float(self.times[0])) / self.h), self.last)
        pull = self.table(y.view(self.shape).transpose(0, 1), i).reshape(-1)
        (x, v), out = y.view(2, -1), torch.empty_like(y)
        dx, dv = out.view(2, -1)
        torch.mul(v, -BETA * INVERSE_MASS, out=dx)
        torch.mul(x, BETA, out=dv).add_(v, alpha=BETA * FRICTION * INVERSE_MASS)
        dv.add_(pull, alpha=2 * FRICTION * BETA)
        return out

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        return y.new_zeros(1, 1, 1).expand(1, 2 * self.size, self.size)

    def g_prod(self, s: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        out = torch.zeros_like(y)
        torch.mul(noise[0], math.sqrt(2 * FRICTION * BETA), out=out[0, self.size :])
        return out

    def brownian(self, ends: Tensor, **options: Any) -> Any:
        import torchsde

        return torchsde.BrownianInterval(*ends, size=(1, self.size), **options)
