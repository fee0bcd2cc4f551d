"""Adapters that let torchdiffeq and torchsde integrate a process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import one_of
from cldsde.linear.sde import LinearSDE
from cldsde.score.reverse import ReverseProcess


def as_torchdiffeq(process: LinearSDE | ReverseProcess) -> torch.nn.Module:
    """Adapt a process to the function (t, z) that ``torchdiffeq.odeint`` integrates.

    For a `ReverseProcess` the function is the probability flow, over decreasing times. For a
    `LinearSDE` it is the flow of the mean, F(t) z. If the score is a module, its parameters are
    parameters of the result, as ``odeint_adjoint`` needs them. Times are constants. For gradients
    of an adaptive method pass ``first_step``, because torchdiffeq's own estimate depends on the
    state. Pass ``step_t`` with the last time, or the method evaluates past it. Another ``process``
    raises a TypeError.
    """
    return _Flow(process)


class _ProcessModule(torch.nn.Module):
    """A process for another library; it owns the parameters of a score that is a module."""

    def __init__(self, process: LinearSDE | ReverseProcess) -> None:
        super().__init__()
        if not isinstance(process, LinearSDE | ReverseProcess):
            msg = f"process must be a LinearSDE or a ReverseProcess; got {type(process).__name__}"
            raise TypeError(msg)
        self._process = process
        if isinstance(process, ReverseProcess) and isinstance(process.score, torch.nn.Module):
            self.score = process.score


class _Flow(_ProcessModule):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        at = t.detach().to("cpu", torch.float64)
        if isinstance(self._process, LinearSDE):
            return apply_blocks(self._process.drift(at), z)
        return self._process.probability_flow(z, at)


def _pack(z: Tensor) -> Tensor:
    """States ``(B, k, *D)`` as torchsde's batch ``(B ∏D, k)``: noise does not mix data axes."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


class _TorchSDEForm(_ProcessModule):
    noise_type = "additive"

    def __init__(
        self, process: LinearSDE | ReverseProcess, shape: Sequence[int], calculus: str
    ) -> None:
        super().__init__(process)
        one_of(calculus, ("ito", "stratonovich"), "calculus")
        self.sde_type, self._shape = calculus, tuple(shape)
        self._reverse = isinstance(process, ReverseProcess)
        self._sde = process.sde if isinstance(process, ReverseProcess) else process

    def clock(self, times: Tensor) -> Tensor:
        """Convert times of the process to torchsde's increasing times: −t for a reverse process."""
        return -times if self._reverse else times

    def pack(self, state: Tensor) -> Tensor:
        """Convert states ``(B, k, *D)`` to torchsde's ``(B ∏D, k)``."""
        expected = (self._sde.components, *self._shape)
        if state.ndim < 2 or state.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"state must have shape (B, {sizes}); got {tuple(state.shape)}")
        return _pack(state)

    def unpack(self, y: Tensor) -> Tensor:
        """Convert torchsde's ``(*, B ∏D, k)`` to states ``(*, B, k, *D)``."""
        size = y.shape[-2] // max(math.prod(self._shape), 1)
        return y.reshape(*y.shape[:-2], size, *self._shape, y.shape[-1]).movedim(-1, y.ndim - 1)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift as a function of torchsde's time."""
        t, z = self._time(s), self.unpack(y)
        if isinstance(self._process, ReverseProcess):
            return _pack(-self._process.drift(z, t))
        return _pack(apply_blocks(self._sde.drift(t), z))

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """Diffusion, ``(B ∏D, k, m)``."""
        return self._sde.diffusion(self._time(s)).to(y).expand(len(y), -1, -1)

    def _time(self, s: Tensor | float) -> Tensor:
        return self.clock(torch.as_tensor(s).detach().to("cpu", torch.float64))


def as_torchsde(
    process: LinearSDE | ReverseProcess, shape: Sequence[int], *, calculus: str = "ito"
) -> _TorchSDEForm:
    """Adapt a process to the object that ``torchsde.sdeint`` integrates.

    Every data dimension has the same dynamics, so torchsde's states are ``(B ∏D, k)``, with noise
    of type ``"additive"``. ``pack`` and ``unpack`` convert states. ``clock`` converts times,
    because times of a reverse process decrease and torchsde's times increase. The page "Use it with
    other libraries" has an example.

    Parameters
    ----------
    process
        A `LinearSDE` to run forward, or a `ReverseProcess` to run backward.
    shape
        Shape ``(*D)`` of one sample's data.
    calculus
        ``"ito"`` or ``"stratonovich"``, as torchsde's method requires. Both are the same for
        additive noise.

    Raises
    ------
    TypeError, ValueError
        If ``process`` is neither, or the calculus is unknown.
    """
    return _TorchSDEForm(process, shape, calculus)
