"""Euler–Maruyama for CLD with diffrax, compiled by JAX for one thread."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from by_hand import BETA, FRICTION, INVERSE_MASS

__all__ = ["euler_maruyama"]


def euler_maruyama(
    start: torch.Tensor, times: torch.Tensor, path: Literal["stepwise", "tree"]
) -> Callable[[], np.ndarray]:
    """Compiled solve of states ``(B, 2, D)`` over a uniform grid, with `problems.linear` as score.

    ``path`` is diffrax's cheapest Brownian motion, or its default, which can be refined.
    """
    # JAX reads the variable when it starts.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    import diffrax
    import jax
    import jax.numpy as jnp

    steps, (batch, k, dimension) = len(times) - 1, start.shape
    h, drive = float(times[0] - times[1]), 2 * FRICTION * BETA
    matrix = jnp.asarray(np.kron([[0], [-INVERSE_MASS]], np.eye(dimension)).astype(np.float32))

    def drift(s: Any, z: Any, _: object) -> Any:
        pull = z.reshape(batch, k * dimension) @ matrix
        x, v = z[:, 0], z[:, 1]
        back = BETA * x + BETA * FRICTION * INVERSE_MASS * v + drive * pull
        return jnp.stack([-BETA * INVERSE_MASS * v, back], 1)

    class VelocityNoise(diffrax.ControlTerm):
        def prod(self, root: Any, control: Any) -> Any:
            return jnp.stack([jnp.zeros_like(control), root * control], 1)

    y0 = jnp.asarray(start.numpy())

    @jax.jit
    def solve(key: Any) -> Any:
        shape = (batch, dimension)
        motion = (
            diffrax.UnsafeBrownianPath(shape=shape, key=key)
            if path == "stepwise"
            else diffrax.VirtualBrownianTree(0.0, h * steps, tol=h / 2, shape=shape, key=key)
        )
        noise = VelocityNoise(lambda s, z, _: math.sqrt(drive), motion)
        return diffrax.diffeqsolve(
            diffrax.MultiTerm(diffrax.ODETerm(drift), noise),
            diffrax.Euler(),
            0.0,
            h * steps,
            h,
            y0,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.ForwardMode(),  # the only mode in which a path draws step by step
            max_steps=steps + 2,
        ).ys[-1]

    return lambda: np.asarray(solve(jax.random.PRNGKey(1)))
