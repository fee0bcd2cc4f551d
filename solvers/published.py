"""Published samplers by the names that people know; each is a setting of one solver."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .exponential_multistep import ExponentialMultistep, LevelNoise, Weights


def ddim() -> ExponentialMultistep:
    """DDIM (Song et al., arXiv:2010.02502); ``DDIMScheduler`` with ``clip_sample=False``.

    This is the form without noise, ``eta=0`` of the scheduler's ``step``. `ddpm` is ``eta=1``.
    """
    return ExponentialMultistep(order=1)


def ddpm() -> ExponentialMultistep:
    """DDPM (Ho et al., arXiv:2006.11239); ``DDPMScheduler`` with ``clip_sample=False``.

    The scheduler has its default variance, ``variance_type="fixed_small"``. The method is also
    known as ancestral sampling, and as DDIM with η = 1.
    """
    return ExponentialMultistep(order=1, stochasticity=1.0)


def dpm_solver_pp(order: int, sde: bool = False) -> ExponentialMultistep:
    """DPM-Solver++ (Lu et al., arXiv:2211.01095); ``DPMSolverMultistepScheduler``.

    The scheduler has ``solver_order=order``, ``lower_order_final=False`` and
    ``final_sigmas_type="sigma_min"``. For order 3 it also has ``solver_type="heun"``, which
    concerns the second step.

    Parameters
    ----------
    order
        1, 2 or 3. Order 3 takes half the quadratic term of its polynomial, as the scheduler does,
        so its error is of order 2.
    sde
        Whether to sample the reverse SDE: ``algorithm_type="sde-dpmsolver++"``. At order 3 the
        scheduler has the wrong sign in one weight, so this solver equals ``sample_dpmpp_3m_sde`` of
        k-diffusion instead.

    Examples
    --------
    >>> from cldsde import solvers
    >>> solvers.dpm_solver_pp(2, sde=True).stochasticity
    1.0
    """
    weights: Weights = "dpm_solver_3m" if order == 3 else "published"
    level = 1.0 if sde else 0.0
    return ExponentialMultistep(order=order, stochasticity=level, variable="kappa", weights=weights)


def unipc(order: int) -> ExponentialMultistep:
    """UniPC, variant bh2 (Zhao et al., arXiv:2302.04867); ``UniPCMultistepScheduler``.

    The scheduler has ``solver_order=order``, ``lower_order_final=False`` and
    ``final_sigmas_type="sigma_min"``.

    Parameters
    ----------
    order
        Order of the predictor: 1, 2 or 3.
    """
    return ExponentialMultistep(order=order, corrector=True, variable="kappa", weights="published")


def deis(order: int) -> ExponentialMultistep:
    """DEIS, polynomials in log σ/α (Zhang and Chen, arXiv:2204.13902); ``DEISMultistepScheduler``.

    The scheduler has ``lower_order_final=False`` and ``solver_order=order``. Polynomials are those
    of the predicted noise.

    Parameters
    ----------
    order
        1, 2 or 3.
    """
    return ExponentialMultistep(order=order, prediction="noise", variable="kappa")


def sa_solver(
    order: int, *, stochasticity: float | LevelNoise | Callable[[Tensor], Tensor] = 1.0
) -> ExponentialMultistep:
    """SA-Solver (Xue et al., arXiv:2309.05019); ``SASolverScheduler``.

    The scheduler has ``predictor_order=order``, ``corrector_order=order + 1``,
    ``lower_order_final=False`` and, as its ``tau_func``, the stochasticity.

    Parameters
    ----------
    order
        Order of the predictor: 1, 2 or 3.
    stochasticity
        τ of the paper, λ here: a number, or a function as for `ExponentialMultistep`. With its own
        default the scheduler has τ = 1 between its times 200 and 800, and 0 elsewhere.
    """
    return ExponentialMultistep(
        order=order,
        stochasticity=stochasticity,
        corrector=True,
        variable="kappa",
        weights="sa_solver",
    )
