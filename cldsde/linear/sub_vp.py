"""Dynamics of the sub-variance-preserving process."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import safe_sqrt
from cldsde.linear.covariance import joint_root
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.elementary import exponential_rest
from cldsde.linear.schedule import Schedule


class SubVPDynamics(Dynamics):
    """Dynamics of sub-VP: F = −β/2 and GGᵀ = β (1 − e^{−2B(0,t)})."""

    components = 1
    driven = (0,)

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def _clock(self, t: Tensor) -> Tensor:
        return self.schedule.integral(torch.zeros_like(t), t)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return (-0.5 * self.schedule.rate(t))[..., None, None]

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        squared = -self.schedule.rate(t) * torch.expm1(-2 * self._clock(t))
        return safe_sqrt(squared)[..., None, None]

    @override
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        step = self.schedule.integral(s, t)
        # With b = B(s,t), Q = (1 − e^{−b}) (1 − e^{−B(0,s)−B(0,t)}). Use expm1 for both factors.
        variance = torch.expm1(-step) * torch.expm1(-(self._clock(s) + self._clock(t)))
        psi = torch.exp(-0.5 * step)[..., None, None]
        root = safe_sqrt(variance)[..., None, None]
        return psi, root if initial_root is None else joint_root(psi @ initial_root, root)

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        # ∫ β (1 − e^{−2B}) dt = f(2B(0,t)) / 2 − f(2B(0,s)) / 2, f(y) = y + e^{−y} − 1; with b for
        # 2B(s,t) the difference is [b + e^{−b} − 1 + (1 − e^{−2B(0,s)}) (1 − e^{−b})] / 2.
        b, since = 2 * self.schedule.integral(s, t), 2 * self._clock(s)
        squared = 0.5 * (exponential_rest(b) + torch.expm1(-since) * torch.expm1(-b))
        return safe_sqrt(squared)[..., None, None]
