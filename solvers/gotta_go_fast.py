"""Gotta Go Fast: adaptive stochastic improved Euler, each sample at its own pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import check_at_least, check_between, check_positive
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .adaptive import ActiveSamples, Callback, Integration, Integrator, common_time
from .base import Facts
from .combine import per_sample
from .noise import NoiseSource

__all__ = ["GottaGoFast"]


@dataclass(frozen=True, kw_only=True)
class GottaGoFast(Integrator):
    r"""Adaptive stochastic improved Euler (Jolicoeur-Martineau et al. 2021, algorithm 1).

    .. math::
        K_1 = h\,d(z, t) + G(t)\,ΔW, \quad K_2 = h\,d(z + K_1, t−h) + G(t−h)\,ΔW, \quad
        z ← z + \tfrac12 (K_1 + K_2), \qquad d = −F z + G G^⊤ s,

    with the error e = ½(K_2 − K_1) in units of the larger of atol and rtol times the larger of
    z + K_1 and the same of the step before, in the root mean square over a sample's numbers. A step
    is accepted where e is at most 1, and the next is h ← min(t − ε, θ h e^{−r}).

    After a rejection the published method draws new noise: then accepted steps are those with small
    noise, and in few dimensions the samples are biased. With ``noise_on_reject="bridge"`` what is
    known of the Brownian path is kept, and the shorter step sees a part of it, drawn from the
    Brownian bridge. Two evaluations an attempt, rejected ones included.

    Parameters
    ----------
    rtol
        Relative tolerance, > 0.
    atol
        Absolute tolerance, > 0: a number, or one for each component; for images in [−1, 1] one
        level of 8 bits, 0.0078, for the data and √M times that for a velocity.
    noise_on_reject
        ``"bridge"`` or ``"fresh"``, as published.
    safety
        θ in (0, 1].
    exponent
        r in (0, 1]; 0.9 as published. The local error is of order 3/2, which 2/3 would match.
    first_step
        Length of the first step, > 0.
    max_nfev
        Evaluations of a sample after which to give up.

    Raises
    ------
    ValueError
        If an option is out of range.
    """

    rtol: float = 0.01
    atol: float | Sequence[float] = 0.0078
    noise_on_reject: Literal["bridge", "fresh"] = "bridge"
    safety: float = 0.9
    exponent: float = 0.9
    first_step: float = 0.01
    max_nfev: int = 100_000

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        check_positive(self.rtol, "rtol")
        if isinstance(self.atol, int | float):
            check_positive(self.atol, "atol")
        elif isinstance(self.atol, Sequence) and not isinstance(self.atol, str):
            object.__setattr__(self, "atol", tuple(check_positive(x, "atol") for x in self.atol))
        else:
            msg = f"atol must be a number or a sequence of numbers; got {self.atol!r}"
            raise TypeError(msg)
        if self.noise_on_reject not in ("bridge", "fresh"):
            msg = f"noise_on_reject must be 'bridge' or 'fresh'; got {self.noise_on_reject!r}"
            raise ValueError(msg)
        check_between(self.safety, 1e-3, 1.0, "safety")
        check_between(self.exponent, 1e-3, 1.0, "exponent")
        check_positive(self.first_step, "first_step")
        check_at_least(self.max_nfev, 2, "max_nfev")

    @property
    def facts(self) -> Facts:
        """Every linear SDE; no order, as there is no grid."""
        return Facts(applies_to="every linear SDE", nfe_per_step=2, adaptive=True)

    def integrate(
        self,
        process: ReverseProcess,
        z: Tensor,
        times: Tensor,
        noise: NoiseSource,
        *,
        stops: Tensor,
        callback: Callback | None,
        progress: bool,
    ) -> Integration:
        """Run each sample from ``times[0]`` down to ``times[-1]``.

        Raises
        ------
        ValueError
            If ``atol`` has another number of components than the process.
        """

        def change(z: Tensor, t: Tensor, step: Tensor, increment: Tensor) -> Tensor:
            at = common_time(t)
            return apply_blocks(process.diffusion(at), increment) - step * process.drift(z, at)

        start = float(times[0])
        atol = self._tolerances(process.sde, z)
        samples = ActiveSamples(
            z,
            start,
            stops,
            max_nfev=self.max_nfev,
            callback=callback,
            progress=progress,
            name=type(self).__name__,
        )
        path = _Path(z, process.diffusion(start).shape[-1], noise)
        h = _coarse(torch.full((len(z),), self.first_step, dtype=torch.float64))
        low_before = z
        rejections = 0
        going = samples.screen(h, cost=2)
        while samples.on_their_way():
            if going is not None:
                path.keep(going)
                on_device = going.to(z.device)
                h, z, low_before = h[going], z[on_device], low_before[on_device]
            h, after = samples.attempt(h)
            samples.spend(2)
            increment, step = path.over(h), per_sample(h, z)
            first = change(z, samples.t, step, increment)
            low = z + first
            second = change(low, after, step, increment)
            scale = torch.maximum(atol, self.rtol * torch.maximum(low.abs(), low_before.abs()))
            error = (0.5 * (second - first) / scale).square().flatten(1).mean(1).sqrt()
            error = error.detach().cpu().to(torch.float64)
            accept = error <= 1
            rejections += int((~accept).sum())
            path.settle(accept, keep_rejected=self.noise_on_reject == "bridge")
            keep = per_sample(accept, z)
            z = torch.where(keep, z + 0.5 * (first + second), z)
            low_before = torch.where(keep, low, low_before)
            factor = self.safety * error.clamp_min(1e-10) ** -self.exponent
            h = _coarse(h * factor.nan_to_num(0.2).clamp(0.2, 5.0))
            h = samples.settle(z, torch.where(accept, after, samples.t), h)
            going = samples.screen(h, cost=2)
        return samples.result(rejections=rejections)

    def _tolerances(self, sde: LinearSDE, z: Tensor) -> Tensor:
        values = [self.atol] if isinstance(self.atol, int | float) else list(self.atol)
        if len(values) not in (1, sde.components):
            msg = (
                f"atol must be a number or one for each of the {sde.components} components; "
                f"got {len(values)}"
            )
            raise ValueError(msg)
        return torch.tensor(values, dtype=z.dtype, device=z.device).reshape(
            1, -1, *(1,) * (z.ndim - 2)
        )


def _coarse(h: Tensor) -> Tensor:
    """Step lengths with ten bits, rounded down.

    A path changes with the root of a length: without this the rounding of an error estimate, which
    depends on the batch, would grow from step to step.
    """
    mantissa, exponent = torch.frexp(h)
    return torch.ldexp(torch.floor(mantissa * 1024) / 1024, exponent)


class _Path:
    """A Brownian path for each sample, of which all that was ever seen is kept.

    What is known of the future is a queue of pieces, each a length and the path's increment over
    it; pieces of length zero are padding.
    """

    def __init__(self, z: Tensor, rows: int, noise: NoiseSource) -> None:
        self._like, self._rows, self._noise = z, rows, noise
        self._alive = torch.arange(len(z))
        self._lengths = torch.zeros(len(z), 0, dtype=torch.float64)
        self._increments = z.new_zeros(len(z), 0, rows, *z.shape[2:])
        self._inside = torch.zeros(len(z), 0, dtype=torch.bool)

    def over(self, h: Tensor) -> Tensor:
        """Increment over the next h of each sample, ``(B, rows, *D)``."""
        # Two draws an attempt, for all samples, make a sample's stream independent of its batch.
        fresh, bridge = self._draw(), self._draw()
        missing = h - self._lengths.sum(1)
        missing = torch.where(missing > 1e-12 * h, missing, 0.0)
        self._append(missing, per_sample(missing.sqrt(), fresh) * fresh)
        end = self._lengths.cumsum(1)
        begin = end - self._lengths
        slack = 1e-12 * h.unsqueeze(1)
        cut = (end - h.unsqueeze(1) > slack) & (h.unsqueeze(1) - begin > slack)
        if bool(cut.any()):
            self._split(cut, h, begin, bridge)
        end = self._lengths.cumsum(1)
        self._inside = end - h.unsqueeze(1) <= slack
        mask = self._inside.to(self._increments)
        return (self._increments * mask.reshape(*mask.shape, *(1,) * (self._like.ndim - 1))).sum(1)

    def settle(self, accept: Tensor, *, keep_rejected: bool) -> None:
        """Forget the pieces that were walked over; and, where not kept, all of a rejected path."""
        gone = self._inside & accept.unsqueeze(1)
        if not keep_rejected:
            gone = gone | ~accept.unsqueeze(1)
        self._lengths = self._lengths.masked_fill(gone, 0.0)
        used = (self._lengths > 0).any(0)
        left = (self._lengths > 0)[:, used].to(self._increments)
        self._lengths = self._lengths[:, used]
        self._increments = self._increments[:, used.to(self._increments.device)]
        self._increments = self._increments * left.reshape(
            *left.shape, *(1,) * (self._like.ndim - 1)
        )

    def keep(self, going: Tensor) -> None:
        """Drop the samples that have arrived."""
        self._alive, self._lengths = self._alive[going], self._lengths[going]
        self._increments = self._increments[going.to(self._increments.device)]

    def _draw(self) -> Tensor:
        return self._noise.normal(self._like, self._rows)[self._alive.to(self._like.device)]

    def _append(self, length: Tensor, increment: Tensor) -> None:
        self._lengths = torch.cat([self._lengths, length.unsqueeze(1)], dim=1)
        self._increments = torch.cat([self._increments, increment.unsqueeze(1)], dim=1)

    def _split(self, cut: Tensor, h: Tensor, begin: Tensor, normal: Tensor) -> None:
        """Split the piece that is cut at h: given W over L, W over l ~ N(l/L W, l (L − l)/L)."""
        n, pieces = cut.shape
        split = cut.any(1)
        # Where nothing is cut an empty piece is appended.
        at = torch.where(split, cut.to(torch.uint8).argmax(1), pieces)
        self._append(h.new_zeros(n), torch.zeros_like(normal))
        length = self._lengths.gather(1, at.unsqueeze(1)).squeeze(1)
        begin = torch.cat([begin, begin.new_zeros(n, 1)], dim=1)
        part = torch.where(split, h - begin.gather(1, at.unsqueeze(1)).squeeze(1), 0.0)
        share = part / torch.where(split, length, 1.0)
        rows = torch.arange(n)
        device = normal.device
        whole = self._increments[rows.to(device), at.to(device)]
        first = (
            per_sample(share, whole) * whole
            + per_sample((part * (1 - share)).sqrt(), whole) * normal
        )
        first = torch.where(per_sample(split, whole), first, 0.0)
        # Pieces behind the cut move back by one.
        source = torch.arange(pieces + 1).expand(n, -1)
        source = torch.where(source > at.unsqueeze(1), source - 1, source)
        self._lengths = self._lengths.gather(1, source)
        self._increments = self._increments[rows.to(device).unsqueeze(1), source.to(device)]
        one, both = rows[split], at[split]
        self._lengths[one, both] = part[split]
        self._lengths[one, both + 1] = (length - part)[split]
        one, both = one.to(device), both.to(device)
        on_device = split.to(device)
        self._increments[one, both] = first[on_device]
        self._increments[one, both + 1] = (whole - first)[on_device]
