"""Interpolants x_t = alpha x_0 + sigma n of the package, beside alpha and sigma in mpmath."""

from collections.abc import Callable
from typing import Any

import mpmath as mp
import torch

from cldsde import VPSDE, CosineVP, LinearSDE, RectifiedFlow
from references.kernels import DIGITS, Matrix, Reference

TABLE = [float(x) for x in torch.cumprod(1 - torch.linspace(1e-3, 0.3, 12).double(), 0)]
ENDING = [0.99, 0.8, 0.3, 0.0]


class SignalNoise(Reference):
    """x_t = alpha(t) x_0 + sigma(t) n, by the plain formulas."""

    def __init__(self, signal: Callable[[Any], Any], noise: Callable[[Any], Any]) -> None:
        self.signal, self.noise = signal, noise
        with mp.workdps(DIGITS):
            self.own = mp.matrix([[noise(mp.mpf(0)) ** 2]])

    def moments(self, s: Any, t: Any) -> tuple[Matrix, Matrix]:
        psi = self.signal(t) / self.signal(s)
        return mp.matrix([[psi]]), mp.matrix([[self.noise(t) ** 2 - (psi * self.noise(s)) ** 2]])

    def slopes(self, t: Any) -> tuple[Matrix, Matrix]:
        rate = mp.diff(lambda u: mp.log(self.signal(u)), t)
        gain = mp.diff(lambda u: self.noise(u) ** 2, t) - 2 * rate * self.noise(t) ** 2
        return mp.matrix([[rate]]), mp.matrix([[gain]])


def of_table(table: list[float]) -> SignalNoise:
    """alpha^2 of a table: log sigma/alpha is linear between the times, or the angle at the ends."""

    def angle(t: Any) -> Any:
        n, full = len(table), [mp.mpf(1), *map(mp.mpf, table)]
        i = min(int(mp.floor(t * n)), n - 1)
        knots = [mp.atan2(mp.sqrt(1 - a), mp.sqrt(a)) for a in full[i : i + 2]]
        if i > 0 and full[i + 1] > 0:
            low, high = (mp.log(mp.tan(x)) for x in knots)
            return mp.atan(mp.exp(low + (high - low) * (t * n - i)))
        return knots[0] + (knots[1] - knots[0]) * (t * n - i)

    def signal(t: Any) -> Any:
        # The rounding of pi would remain of a signal that vanishes.
        return mp.cos(angle(t)) if t < 1 or table[-1] else mp.mpf(0)

    return SignalNoise(signal, lambda t: mp.sin(angle(t)))


LINEAR = SignalNoise(lambda t: 1 - t, lambda t: t)
SINE = SignalNoise(lambda t: mp.sin(mp.pi * (1 - t) / 2), lambda t: mp.sin(mp.pi * t / 2))
VP = SignalNoise(lambda t: mp.exp(-2 * t**2 - t), lambda t: mp.sqrt(1 - mp.exp(-4 * t**2 - 2 * t)))
INTERPOLANTS: dict[str, tuple[LinearSDE, SignalNoise]] = {
    "rectified flow": (RectifiedFlow(), LINEAR),
    "cosine": (CosineVP(), SINE),
    "linear functions": (LinearSDE.from_signal_noise(lambda t: 1 - t, lambda t: 1 * t), LINEAR),
    "VP functions": (
        LinearSDE.from_signal_noise(
            lambda t: torch.exp(-2 * t**2 - t),
            lambda t: torch.sqrt(-torch.expm1(-4 * t**2 - 2 * t)),
        ),
        VP,
    ),
    "uncertain start": (
        LinearSDE.from_signal_noise(lambda t: (1 - t) ** 2, lambda t: torch.sqrt(0.04 + 2 * t)),
        SignalNoise(lambda t: (1 - t) ** 2, lambda t: mp.sqrt(mp.mpf(0.04) + 2 * t)),
    ),
    "table": (VPSDE.from_alphas_cumprod(TABLE), of_table(TABLE)),
    "table to zero": (VPSDE.from_alphas_cumprod(ENDING), of_table(ENDING)),
}
