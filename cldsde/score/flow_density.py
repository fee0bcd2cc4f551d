r"""Log-densities of states by the probability-flow ODE.

Along the flow dz/dt = f(z, t) = F z − ½ GGᵀ s the log-density of the model follows the
instantaneous change of variables (Song et al. 2021, §4.3),

.. math:: \log p_t(z_t) = \log p_T(z_T) + ∫_t^T ∇·f\,dτ, \qquad
          ∇·f = D\,\mathrm{tr}F − \tfrac12 \sum_{i,j\ \text{driven}} (G G^⊤)_{ij}\,
          \mathrm{tr}\frac{∂ s_i}{∂ z_j}.

This is the density of the whole state at t > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import as_integer, check_between, check_positive, check_state, one_of
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.kernel import Gaussian
from cldsde.linear.random import check_generator, standard_normal
from cldsde.messages import counted
from cldsde.score.reverse import ReverseProcess, check_reverse_process, checked_score
from cldsde.score.times import score_argument

Divergence = Literal["exact", "hutchinson"]

_BACKWARD_AT_ONCE = 64


class UnsolvedFlowError(RuntimeError):
    """Raised if the ODE of the probability flow cannot be solved to its end."""


@dataclass(frozen=True, eq=False)
class FlowDensity:
    """Log-density of states under the model; the result of `flow_log_prob`."""

    log_prob: Tensor  #: Log-density of the prior at ``latent`` plus ``divergence``, ``(B,)`` nats.
    latent: Tensor  #: States at T, ``(B, k, *D)``.
    divergence: Tensor  #: ∫ ∇·f along the path, ``(B,)``.
    nfev: int  #: Number of score evaluations.


def flow_log_prob(
    process: ReverseProcess,
    z: Tensor,
    t: float,
    *,
    divergence: Divergence = "exact",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_nfev: int = 100_000,
    generator: torch.Generator | None = None,
) -> FlowDensity:
    """Log-density of states at time t under the model, by its probability-flow ODE.

    torchdiffeq solves the ODE in float64 (float32 on devices without float64), without gradients.
    The score gets states of the dtype of ``z``. The tolerances hold for each sample, including its
    divergence integral, so the most demanding sample sets the step lengths. Times stay in [t, T],
    with T = 1, or the time with κ = −10 (`LinearSDE.kappa`) if drift and diffusion diverge at 1.

    Parameters
    ----------
    process
        Forward process and score. The score must be differentiable in the state.
    z, t
        States ``(B, k, *D)`` and their time, 0 ≤ t < T.
    divergence
        ``"exact"``: D·len(driven) backward passes per evaluation. ``"hutchinson"``: one backward
        pass, with a random vector of signs per sample that is fixed along its path; unbiased.
    rtol, atol
        Relative and absolute tolerance of the ODE solver, > 0.
    method
        Method of torchdiffeq: ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or ``"adaptive_heun"``.
    max_nfev
        Largest number of score evaluations, ≥ 1.
    generator
        Random generator of the signs.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range, or shapes do not fit.
    FloatingPointError
        If the score is not finite.
    UnsolvedFlowError
        If ``max_nfev`` is exhausted or the tolerances cannot be met; it is a RuntimeError.
    """
    check_reverse_process(process)
    sde = process.sde
    check_state(z, sde.components)
    if not bool(z.isfinite().all()):
        raise ValueError("z must be finite; it holds NaN or infinity")
    # The prior replaces the distribution of the states at T.
    T = 1.0 if sde.regular_until == 1 else float(times_of_kappa(sde, -10.0))
    check_between(t, 0.0, T * (1 - 1e-9), "t")
    one_of(divergence, Divergence, "divergence")
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    as_integer(max_nfev, 1, "max_nfev")
    one_of(method, _ADAPTIVE, "method")
    precision = torch.float32 if z.device.type == "mps" else torch.float64
    check_generator(generator)
    process.score.check_times(torch.tensor([t, T], dtype=torch.float64, device="cpu"))
    signs = None
    if divergence == "hutchinson":
        shape = (len(z), len(sde.driven), *z.shape[2:])
        draws = standard_normal(shape, generator=generator, dtype=torch.float32, device=z.device)
        signs = torch.where(draws < 0, -1.0, 1.0)
    flow = _Flow(process, z.dtype, (t, T), max_nfev, signs)
    start = (z.detach().to(precision), z.new_zeros(len(z), dtype=precision))
    if len(z) == 0:
        return FlowDensity(start[1], start[0], start[1], 0)
    latent, integral = flow.solve(start, rtol, atol, method)
    # Before T the prior is the distribution of the noise at that time.
    prior = sde.prior if T == 1 else Gaussian(sde.marginal(T).root)
    return FlowDensity(prior.log_prob(latent) + integral, latent, integral, flow.nfev)


# Adaptive methods of torchdiffeq that meet a tolerance. fehlberg2 misses it by a factor of 100.
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


def _worst_sample(y: tuple[Tensor, Tensor]) -> Tensor:
    """Largest scaled error of a sample, so that the tolerances do not average over the batch."""
    z, integral = y
    return torch.maximum(z.square().flatten(1).mean(1).sqrt(), integral.abs()).max()


@dataclass(eq=False)
class _Flow:
    """ODE of states and the integral of their divergence; called, it is the right-hand side."""

    process: ReverseProcess
    dtype: torch.dtype  # of the states that the score gets
    interval: tuple[float, float]
    max_nfev: int
    signs: Tensor | None  # of Hutchinson's estimate, (B, d, *D); None: the exact divergence
    nfev: int = 0
    raised: AssertionError | None = None  # by the score

    def __call__(self, time: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sde, z = self.process.sde, y[0]
        driven = list(sde.driven)
        # torchdiffeq's estimate of the first step length may look beyond the interval.
        low, high = self.interval
        t = time.cpu().to(torch.float64).clamp(low, high)
        if not bool(t.isfinite()):
            raise UnsolvedFlowError(
                "rtol and atol cannot be met, because the first step length is not finite; check "
                "the score"
            )
        self.nfev += int(self.process.score.evaluations(t))
        if self.nfev > self.max_nfev:
            raise UnsolvedFlowError(
                f"max_nfev = {counted(self.max_nfev, 'evaluation')} did not reach T; increase "
                "max_nfev, or rtol and atol"
            )
        F, G = sde.drift(t), sde.diffusion(t)
        pull = (G @ G.mT)[..., driven]
        with torch.enable_grad():
            leaf = z.detach().to(self.dtype).requires_grad_()
            try:
                score = self.process.score(leaf, score_argument(t, leaf).expand(len(z)))
            except AssertionError as error:
                self.raised = error
                raise
            score = checked_score(score, leaf, len(driven))
            force = apply_blocks(pull[driven], score.to(z.dtype))
            if not bool(score.isfinite().all()):
                raise FloatingPointError(f"the score is not finite at t = {float(t):g}")
            trace = self._trace(force, leaf)
        velocity = apply_blocks(F, z) - 0.5 * apply_blocks(pull, score.detach().to(z.dtype))
        divergence = math.prod(z.shape[2:]) * float(F.detach().trace()) - 0.5 * trace.to(z.dtype)
        return velocity, divergence

    def solve(
        self, start: tuple[Tensor, Tensor], rtol: float, atol: float, method: str
    ) -> tuple[Tensor, Tensor]:
        """States and integrals at the end of the interval."""
        from torchdiffeq import odeint  # imported here because it is slow to import

        ends = torch.tensor(self.interval, dtype=start[0].dtype, device=start[0].device)
        options = {"norm": _worst_sample, "step_t": ends[1:]}
        try:
            with torch.no_grad():
                states, integrals = odeint(
                    self, start, ends, rtol=rtol, atol=atol, method=method, options=options
                )
        except AssertionError as error:
            if error is self.raised:
                raise
            # torchdiffeq asserts that its step does not underflow and that numbers are finite.
            msg = f"rtol = {rtol:g} and atol = {atol:g} cannot be met ({str(error)[:60]})"
            raise UnsolvedFlowError(f"{msg}; increase them") from error
        return states[-1], integrals[-1]

    def _trace(self, force: Tensor, leaf: Tensor) -> Tensor:
        """Trace of ∂force/∂z over the driven components, ``(B,)``."""
        driven = list(self.process.sde.driven)
        if not force.requires_grad:
            raise ValueError(
                "process must have a score that is differentiable in the state; got a score "
                "without a graph, as under torch.no_grad or after detach"
            )
        if self.signs is not None:
            signs = self.signs.to(force)
            (slope,) = torch.autograd.grad(force, leaf, signs, materialize_grads=True)
            return (slope[:, driven] * signs).flatten(1).sum(1)
        size = force[0].numel()
        trace = force.new_zeros(len(leaf))
        for first in range(0, size, _BACKWARD_AT_ONCE):
            entries = torch.arange(first, min(first + _BACKWARD_AT_ONCE, size), device=force.device)
            basis = force.new_zeros(len(entries), size)
            basis[entries - first, entries] = 1.0
            directions = basis.reshape(len(entries), 1, *force.shape[1:]).expand(-1, *force.shape)
            (slopes,) = torch.autograd.grad(
                force, leaf, directions, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            if slopes is None:  # the score ignores the state
                return trace
            rows = slopes[:, :, driven].flatten(2)
            trace = trace + (rows * basis.unsqueeze(1)).sum((0, 2))
        return trace
