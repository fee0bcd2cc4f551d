"""Gotta Go Fast: adaptive stochastic improved Euler with step lengths per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, per_sample
from cldsde.linear.checks import as_integer, check_between, check_positive, one_of
from cldsde.score import ReverseProcess
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes, on_device

from .adaptive import ActiveSamples
from .base import Facts, Integration, Run, Solver
from .noise import NoiseSource

OnReject = Literal["bridge", "fresh"]


@dataclass(frozen=True, kw_only=True)
class GottaGoFast(Solver):
    r"""Adaptive stochastic improved Euler (Jolicoeur-Martineau et al. 2021, algorithm 1).

    .. math::
        K_1 = h\,d(z, t) + G(t)\,ΔW, \quad K_2 = h\,d(z + K_1, t−h) + G(t−h)\,ΔW, \quad
        z ← z + \tfrac12 (K_1 + K_2), \qquad d = −F z + G G^⊤ s,

    The error estimate ½(K_2 − K_1) is divided elementwise by
    max(atol, rtol · max(\|z + K_1\|, \|z' + K_1'\|)), with primes for the last accepted step.
    Its root mean square over a sample is e. The step is accepted if e ≤ 1, and the next step length
    is h ← min(t − ε, θ h e^{−r}), here with θ e^{−r} in [0.2, 5] and h rounded down to ten bits.

    After a rejection the published method draws new noise, so that samples in few dimensions are
    biased. ``noise_on_reject="bridge"`` draws the shorter step's noise from the Brownian bridge.

    A step that would pass a requested time (``t_eval``) is shortened to end there. The state is the
    final state of a solve that ends at this time and has the same requests before it. Later steps
    have other lengths and other noise, so requests change the final state for the same seed.

    Each attempt, accepted or rejected, takes two score evaluations. The score gets the whole batch
    until the last sample arrives. Options out of range raise a ValueError, and options of another
    type a TypeError.

    Parameters
    ----------
    rtol
        Relative tolerance, > 0.
    atol
        Absolute tolerance, > 0: a number, or one per component. For images in [−1, 1] take one
        8-bit level, 0.0078, for the data, and √M times that for a velocity.
    noise_on_reject
        ``"bridge"``, or ``"fresh"`` as published.
    safety
        θ in [0.001, 1].
    exponent
        r in [0.001, 1]; 0.9 as published. The local error is of order 3/2, which 2/3 would match.
    first_step
        Length of the first step, > 0.
    max_nfev
        Largest number of evaluations per sample, an integer ≥ 2. A sample that needs more
        has failed.
    """

    rtol: float = 0.01
    atol: float | Sequence[float] = 0.0078
    noise_on_reject: OnReject = "bridge"
    safety: float = 0.9
    exponent: float = 0.9
    first_step: float = 0.01
    max_nfev: int = 100_000

    def __post_init__(self) -> None:
        check_positive(self.rtol, "rtol")
        if isinstance(self.atol, int | float):
            check_positive(self.atol, "atol")
        elif isinstance(self.atol, Sequence) and not isinstance(self.atol, str):
            object.__setattr__(self, "atol", tuple(check_positive(x, "atol") for x in self.atol))
        else:
            raise TypeError(f"atol must be a number or a sequence of numbers; got {self.atol!r}")
        one_of(self.noise_on_reject, OnReject, "noise_on_reject")
        check_between(self.safety, 1e-3, 1.0, "safety")
        check_between(self.exponent, 1e-3, 1.0, "exponent")
        check_positive(self.first_step, "first_step")
        as_integer(self.max_nfev, 2, "max_nfev")

    # No order, because there is no grid.
    facts = Facts(applies_to="every linear SDE", nfe_per_step=2, state_on_grid=False, adaptive=True)

    def prepare(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The tolerance of each component, ``(k,)``."""
        k = process.sde.components
        values = torch.tensor(self.atol, dtype=torch.float64, device="cpu").flatten()
        if len(values) not in (1, k):
            msg = f"atol must be a number or one for each of the {k} components; got {len(values)}"
            raise ValueError(msg)
        return values.expand(k)

    def integrate(self, run: Run) -> Integration:
        """Integrate each sample to the end with step lengths of its own."""
        # Copy the state, because a score may write to its argument.
        z, sde = run.state.clone(memory_format=torch.contiguous_format), run.process.sde
        samples = ActiveSamples(run, z, max_nfev=self.max_nfev, name=type(self).__name__)
        path = _Path(z, sde.diffusion(run.times[0]).shape[-1], run.noise)
        (atol,) = on_device([run.tables], z.dtype, z.device)
        atol = atol.reshape(1, -1, *(1,) * (z.ndim - 2))
        h = _coarse(torch.full_like(samples.t, self.first_step))
        low_before = z
        rejections = 0
        samples.screen(h, cost=2)
        while samples.on_their_way():
            h, after = samples.attempt(h)
            times = torch.stack([samples.t, after])
            samples.spend(run.process.score.evaluations(times).sum(0))
            G = sde.diffusion(times)
            pull = (G @ G.mT)[..., list(sde.driven)]
            at, length, weights, drift, gain, diffusion = samples.moved(
                [times, h, path.weights(h), sde.drift(times), pull, G]
            )
            score = KnownScore(run.process, KnownTimes(times), z, at)
            increment = path.increment(weights)
            first = _change(z, score(z, 0), drift[0], gain[0], diffusion[0], length, increment)
            low = z + first
            second = _change(low, score(low, 1), drift[1], gain[1], diffusion[1], length, increment)
            scale = torch.maximum(atol, self.rtol * torch.maximum(low.abs(), low_before.abs()))
            errors = (0.5 * (second - first) / scale).square().flatten(1).mean(1).sqrt()
            error = errors.detach().cpu().to(torch.float64)
            accept, accept_on_device = error <= 1, errors <= 1
            rejections += int((samples.active & ~accept).sum())
            bridged = self.noise_on_reject == "bridge"
            path.settle(accept, keep=samples.active if bridged else accept)
            keep = per_sample(accept_on_device, z)
            z = torch.where(keep, z + 0.5 * (first + second), z)
            low_before = torch.where(keep, low, low_before)
            factor = self.safety * error.clamp_min(1e-10) ** -self.exponent
            h = _coarse(h * factor.nan_to_num(0.2).clamp(0.2, 5.0))
            h = samples.settle(z, accept, accept_on_device, after, h)
            samples.screen(h, cost=2)
        return samples.result(rejections=rejections)


def _change(
    z: Tensor, s: Tensor, drift: Tensor, pull: Tensor, diffusion: Tensor, h: Tensor, dw: Tensor
) -> Tensor:
    """Change G ΔW − h (F z − GGᵀ s) of the state over a step of length h."""
    velocity = apply_blocks(drift, z) - apply_blocks(pull, s)
    return apply_blocks(diffusion, dw) - per_sample(h.to(z.dtype), z) * velocity


def _coarse(h: Tensor) -> Tensor:
    """Round step lengths down to ten bits.

    Increments depend on them: rounding errors that depend on the batch would grow with each step.
    """
    mantissa, exponent = torch.frexp(h)
    return torch.ldexp(torch.floor(mantissa * 1024) / 1024, exponent)


class _Path:
    """Brownian path of each sample, which remembers the increments of rejected steps.

    The known part of the path beyond a sample's time consists of pieces. A piece has a begin, a
    length and an increment. Every sample has the same number of slots for pieces, and a slot of
    length zero is free. Begins and lengths are on the CPU, so that an attempt sends weights to the
    device and reads nothing back.
    """

    def __init__(self, z: Tensor, rows: int, noise: NoiseSource) -> None:
        self._like, self._rows, self._noise = z, rows, noise
        self._begins = self._lengths = torch.zeros(len(z), 0, dtype=torch.float64, device="cpu")
        self.pieces = z.new_zeros(len(z), 0, rows, *z.shape[2:])

    def weights(self, h: Tensor) -> Tensor:
        """Weights from which `increment` computes the increments over the next h, on the CPU."""
        known, h = self._lengths.sum(1, keepdim=True), h.unsqueeze(1)
        slack = 1e-12 * h
        missing = torch.where(h - known > slack, h - known, 0.0)
        cut = (self._begins + self._lengths - h > slack) & (h - self._begins > slack)
        cut &= self._lengths > 0
        if bool((((missing > 0).squeeze(1) | cut.any(1)) & (self._lengths > 0).all(1)).any()):
            self._begins, self._lengths, cut = (
                torch.nn.functional.pad(x, (0, 1)) for x in (self._begins, self._lengths, cut)
            )
        # The first free slot takes the part of a piece beyond h, or the missing part up to h.
        free = self._lengths == 0
        put = free & (free.cumsum(1) == 1)
        # Brownian bridge: given W over L, the increment over l is N(l/L W, l (L − l)/L).
        part = torch.where(cut, h - self._begins, self._lengths)
        share = torch.where(cut, part / self._lengths, (~put).to(h.dtype))
        spread = torch.where(cut, (part * (1 - share)).sqrt(), 0.0)
        rest = missing + (self._lengths - part).sum(1, keepdim=True)
        self._begins = torch.where(put, torch.where(missing > 0, known, h), self._begins)
        self._lengths = torch.where(put, rest, part)
        self._inside = (self._begins + self._lengths <= h + slack) & (self._lengths > 0)
        self._h = h
        start = put * missing.sqrt()
        return torch.stack([share, spread, put.to(h.dtype), start, self._inside.to(h.dtype)])

    def increment(self, weights: Tensor) -> Tensor:
        """Increment over the length that the weights belong to, ``(B, rows, *D)``."""
        # Draw twice per attempt for all samples, so that a sample's stream is independent of its
        # batch.
        fresh, bridge = self._draw(), self._draw()
        old, slots = self.pieces, weights.shape[2]
        if old.shape[1] < slots:
            old = torch.cat([old, torch.zeros_like(fresh).unsqueeze(1)], dim=1)
        weights = weights.to(old.dtype).reshape(*weights.shape, *(1,) * (old.ndim - 2))
        share, spread, put, start, inside = weights
        new = (share * old).addcmul_(spread, bridge.unsqueeze(1))
        rest = (old - new).addcmul_(put, old, value=-1).sum(1, keepdim=True)
        self.pieces = new.addcmul_(put, rest).addcmul_(start, fresh.unsqueeze(1))
        increment: Tensor = (inside * new).sum(1)
        return increment

    def settle(self, accept: Tensor, *, keep: Tensor) -> None:
        """Drop pieces of accepted steps, and all pieces of samples that ``keep`` leaves out."""
        accept = accept.unsqueeze(1)
        gone = (self._inside & accept) | ~keep.unsqueeze(1)
        self._begins = self._begins - torch.where(accept, self._h, 0.0)
        self._lengths = self._lengths.masked_fill(gone, 0.0)
        slots = max((self._lengths > 0).any(0).nonzero().flatten().tolist(), default=-1) + 1
        self._begins, self._lengths = self._begins[:, :slots], self._lengths[:, :slots]
        self.pieces = self.pieces[:, :slots]

    def _draw(self) -> Tensor:
        return self._noise.normal(self._like, self._rows)
