"""Linear operators on a batch of data: test, inverse, and copies of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cldsde.linear.blocks import per_sample

Operator = Callable[[Tensor], Tensor]
"""Function of data ``(B, *D)`` that returns ``(B, *E)`` and acts on each sample separately."""

# Largest relative error of a linear function. GPUs convolve with 10-bit mantissas (TF32).
_TOLERANCE = 3e-3


class Copies:
    """A tensor, and its copies in other dtypes and on other devices, each of which is made once."""

    def __init__(self, original: Tensor) -> None:
        # The caller may change the original, and autograd cannot save tensors of inference mode.
        with torch.inference_mode(False):
            original = original.clone()
        self._copies = {(original.dtype, original.device): original}
        self._original = original

    def like(self, x: Tensor) -> Tensor:
        """The tensor with the dtype (if it has floating-point numbers) and on the device of x."""
        floating = self._original.is_floating_point()
        key = (x.dtype if floating else self._original.dtype, x.device)
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._original.to(key[1], key[0])
        return self._copies[key]


def check_linear(
    forward: Operator, y: Tensor, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise an error as `Observation.check`, by a test on random data ``(*D)``."""
    with torch.inference_mode(False):
        probes = fixed_probes(2, shape).to(dtype).to(device).requires_grad_()
        a, b = probes[:1], probes[1:]
        with torch.enable_grad():
            values = forward(torch.cat([a, b, 3 * a - 2 * b, 0 * a]))
        if not isinstance(values, Tensor) or not values.requires_grad:
            raise TypeError(
                "forward must return a tensor that autograd can differentiate with respect to its "
                f"argument; got {type(values).__name__}"
            )
        values = values.detach()
        with torch.no_grad():
            alone = forward(a.detach())
    seen = values.shape[1:]
    if len(values) != 4 or y.shape[-len(seen) :] != seen or y.ndim > len(seen) + 1:
        raise ValueError(
            f"y must have shape {tuple(seen)}, which forward returns for data of shape "
            f"{tuple(shape)}; got {tuple(y.shape)}"
        )
    size = float(values.abs().max()) + torch.finfo(dtype).tiny
    tolerance = max(_TOLERANCE, 4 * torch.finfo(dtype).eps)
    # The comparisons are written so that NaN fails, too.
    if not float((values[0] - alone[0]).abs().max()) <= tolerance * size:
        msg = "forward must act on each sample separately; got values that depend on the batch"
        raise ValueError(msg)
    if not float(values[3].abs().max()) <= tolerance * size:
        raise ValueError(
            "forward must be linear; got forward(0) ≠ 0. Subtract the constant from forward and "
            "from y"
        )
    error = float((values[2] - (3 * values[0] - 2 * values[1])).abs().max())
    if not error <= tolerance * size:
        raise ValueError(
            f"forward must be linear; got a relative difference of {error / size:.2g} between "
            "forward(3a − 2b) and 3 forward(a) − 2 forward(b)"
        )


def fixed_probes(n: int, shape: Sequence[int]) -> Tensor:
    """Fixed random data ``(n, *D)``, float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64, device="cpu")


def conjugate_gradients(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]], safe: Operator, b: Tensor, *, iterations: int
) -> Tensor:
    """Solve R x = b for each sample of a batch ``(B, *E)`` with at most ``iterations`` products.

    With a learnt Jacobian R may be neither symmetric nor positive definite. ``apply`` returns R p
    of a direction p, and the theoretical bound on its curvature pᵀRp of each sample, ``(B,)``. A
    sample stops with its current x when the curvature falls below this bound. If this happens in
    the first direction, x is the first step for the positive definite matrix of ``safe``.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = dot(b, b)
    # The relative residual is then 2e-12 in float64 and 7e-6 in float32.
    small = square * torch.finfo(b.dtype).eps ** 1.5
    active = square > 0
    for i in range(iterations):
        if not bool(active.any()):
            break
        moved, least = apply(direction)
        curvature = dot(direction, moved)
        # This comparison is False for NaN, which counts as a failure, too.
        sound = active & (curvature > least)
        stepping = sound
        if i == 0 and not torch.equal(sound, active):
            stepping = active
            curvature = torch.where(sound, curvature, dot(direction, safe(direction)))
        step = torch.where(stepping, square / curvature, 0.0)
        x = x + per_sample(step, b) * direction
        active = sound
        residual = residual - per_sample(torch.where(active, step, 0.0), b) * moved.nan_to_num()
        new = dot(residual, residual)
        active = active & (new > small)
        ratio = torch.where(active, new / square, 0.0)
        direction = residual + per_sample(ratio, b) * direction
        square = new
    return x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)
