"""Forward processes of the literature: VP, sub-VP, VE, CLD, PSLD and HOLD.

Each is declared by its matrices, noise schedule and initial covariance. Parameters may be tensors
with one element. Kernels are differentiable in them, and they are stored as float64 attributes.
`LinearSDE` says how to learn them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from torch import Tensor

from cldsde.linear.blocks import safe_sqrt
from cldsde.linear.checks import (
    Parameter,
    as_float64,
    as_parameter,
    parameter_at_least,
    positive_parameter,
)
from cldsde.linear.dynamics import SubVPDynamics, TimeChangedDynamics
from cldsde.linear.interpolants import TableProcess
from cldsde.linear.schedule import Schedule
from cldsde.linear.sde import LinearSDE

# With this coupling and friction HOLD has the triple eigenvalue −√3.
_CRITICAL_COUPLING, _CRITICAL_FRICTION = 2 * sqrt(2), 3 * sqrt(3)


class VPSDE(LinearSDE):
    r"""Variance-preserving SDE (Song et al. 2021, equation 11), the limit of DDPM.

    .. math::
        dx = -\tfrac12 β(t)\,x\,dt + \sqrt{β(t)}\,dw, \qquad β(t) = β_{min} + (β_{max}-β_{min})\,t

    Parameters
    ----------
    beta_min, beta_max
        Finite β(0) ≥ 0 and β(1) > 0, in units of 1/t; ValueError otherwise.
    schedule
        Noise schedule β in place of the linear one, e.g. ``Schedule.cosine()``.
    """

    def __init__(
        self,
        beta_min: Parameter = 0.1,
        beta_max: Parameter = 20.0,
        *,
        schedule: Schedule | None = None,
    ) -> None:
        self.beta_min, self.beta_max, self.schedule, beta = _rates(beta_min, beta_max, schedule)
        super().__init__(
            TimeChangedDynamics([[-0.5]], [[1.0]], beta), stationary_covariance=[[1.0]]
        )

    @staticmethod
    def from_alphas_cumprod(table: Tensor | Sequence[float]) -> LinearSDE:
        r"""Variance-preserving process through a table ᾱ of a discrete diffusion model.

        .. math::
            x_t = \cos θ(t)\,x_0 + \sin θ(t)\,n, \qquad
            \cos^2 θ\bigl(\tfrac{i+1}N\bigr) = ᾱ_i, \quad i = 0, …, N − 1,

        with θ(0) = 0. Step i of the model is at t = (i + 1)/N. Between entries log-SNR is linear in
        t, as networks of `NoisePath.from_alphas_cumprod` assume. The angle θ is linear before the
        first entry, and before a last entry 0.

        Parameters
        ----------
        table
            ``(N,)``, decreasing from below 1 to at least 0, such as ``scheduler.alphas_cumprod``;
            ValueError otherwise. The last entry may be 0, for a terminal signal-to-noise ratio of
            zero. The table may be a learnt parameter.
        """
        return TableProcess(table)


class SubVPSDE(LinearSDE):
    r"""Sub-variance-preserving SDE (Song et al. 2021, equation 13).

    .. math:: dx = -\tfrac12 β(t)\,x\,dt + \sqrt{β(t)(1 - e^{-2B(t)})}\,dw, \qquad B(t) = ∫_0^t β

    Its variance given x_0, (1 − e^{−B})², is smaller than for `VPSDE`. The prior is N(0, 1).

    Parameters
    ----------
    beta_min, beta_max, schedule
        See `VPSDE`.
    """

    def __init__(
        self,
        beta_min: Parameter = 0.1,
        beta_max: Parameter = 20.0,
        *,
        schedule: Schedule | None = None,
    ) -> None:
        self.beta_min, self.beta_max, self.schedule, beta = _rates(beta_min, beta_max, schedule)
        super().__init__(SubVPDynamics(beta), prior_covariance=[[1.0]])


class VESDE(LinearSDE):
    r"""Variance-exploding SDE (Song et al. 2021, equation 9 and appendix C).

    .. math::
        dx = σ(t) \sqrt{2 \log(σ_{max}/σ_{min})}\,dw, \qquad
        σ(t) = σ_{min} (σ_{max}/σ_{min})^t

    The initial covariance is σ_min², so that ``marginal(t)`` has the variance σ(t)² as in the
    literature. With ``initial_covariance=[[0.0]]`` it has the variance σ(t)² − σ_min². The prior is
    N(0, σ_max²).

    Parameters
    ----------
    sigma_min, sigma_max
        Noise levels at t = 0 and 1, 0 < σ_min < σ_max, in units of the data; ValueError otherwise.
    """

    def __init__(self, sigma_min: Parameter = 0.01, sigma_max: Parameter = 50.0) -> None:
        self.sigma_min = positive_parameter(sigma_min, "sigma_min")
        self.sigma_max = positive_parameter(sigma_max, "sigma_max")
        super().__init__(
            TimeChangedDynamics([[0.0]], [[1.0]], Schedule.geometric(sigma_min, sigma_max)),
            initial_covariance=[[self.sigma_min**2]],
            prior_covariance=[[self.sigma_max**2]],
        )


class CLD(LinearSDE):
    r"""Critically-damped Langevin diffusion (Dockhorn et al. 2022, equation 5).

    .. math:: dx = β M^{-1} v\,dt, \qquad dv = -β x\,dt - β Γ M^{-1} v\,dt + \sqrt{2Γβ}\,dw

    Noise enters the velocity alone and reaches the data smoothly. For Γ² = 4M the damping is
    critical: in the long run no other friction approaches equilibrium faster. For Γ² < 4M the
    process is underdamped, for Γ² > 4M overdamped. The stationary distribution is x ~ N(0, 1),
    v ~ N(0, M). The velocity starts from N(0, γM). Raises a ValueError if a parameter is out of
    range or not finite.

    Parameters
    ----------
    beta
        Rate β: a number, a pair (β(0), β(1)) for a linear schedule, or a `Schedule`.
    mass
        M > 0.
    friction
        Γ > 0.
    velocity_scale
        γ ≥ 0, the initial variance of v in units of its stationary variance.
    position_noise
        ε ≥ 0. If ε > 0, √β ε dw is added to dx (Strasman et al. 2025). Both components are then
        driven, and x and v are correlated in the stationary distribution.
    """

    def __init__(
        self,
        beta: Schedule | Parameter | tuple[Parameter, Parameter] = 4.0,
        mass: Parameter = 0.25,
        friction: Parameter = 1.0,
        velocity_scale: Parameter = 0.04,
        position_noise: Parameter = 0.0,
    ) -> None:
        self.beta = beta
        self.mass = mass = positive_parameter(mass, "mass")
        self.friction = friction = positive_parameter(friction, "friction")
        self.velocity_scale = parameter_at_least(velocity_scale, 0.0, "velocity_scale")
        self.position_noise = parameter_at_least(position_noise, 0.0, "position_noise")
        noise = (2 * friction) ** 0.5
        quiet = not isinstance(position_noise, Tensor) and position_noise == 0
        super().__init__(
            TimeChangedDynamics(
                [[0, 1 / mass], [-1, -friction / mass]],
                [[0], [noise]] if quiet else [[self.position_noise, 0], [0, noise]],
                beta,
            ),
            initial_covariance=_diagonal(0, self.velocity_scale * mass),
            stationary_covariance=_diagonal(1, mass) if quiet else None,
        )


class PSLD(LinearSDE):
    r"""Phase-space Langevin diffusion (Pandey and Mandt 2023), with noise in data and momentum.

    .. math::
        dz = \frac β2 \begin{pmatrix} -Γ & M^{-1} \\ -1 & -ν \end{pmatrix} z\,dt
             + \sqrt β \begin{pmatrix} \sqrtΓ & 0 \\ 0 & \sqrt{Mν} \end{pmatrix} dw

    The damping is critical for (Γ − ν)² = 4 M⁻¹. With Γ = 0 the process is CLD at half the rate
    with friction Mν. The stationary distribution is x ~ N(0, 1), m ~ N(0, M). Raises a ValueError
    if a parameter is out of range or not finite.

    Parameters
    ----------
    beta
        Rate β; see `CLD`.
    gamma
        Γ ≥ 0, friction of the data.
    nu
        ν ≥ 0, friction of the momentum; Γ + ν > 0.
    mass
        M > 0.
    velocity_scale
        Initial variance of the momentum in units of its stationary variance, ≥ 0.
    """

    def __init__(
        self,
        beta: Schedule | Parameter | tuple[Parameter, Parameter] = 8.0,
        gamma: Parameter = 0.01,
        nu: Parameter = 4.01,
        mass: Parameter = 0.25,
        velocity_scale: Parameter = 0.04,
    ) -> None:
        self.beta = beta
        self.gamma = gamma = parameter_at_least(gamma, 0.0, "gamma")
        self.nu = nu = parameter_at_least(nu, 0.0, "nu")
        positive_parameter(gamma + nu, "gamma + nu")
        self.mass = mass = positive_parameter(mass, "mass")
        self.velocity_scale = parameter_at_least(velocity_scale, 0.0, "velocity_scale")
        super().__init__(
            TimeChangedDynamics(
                [[-gamma / 2, 0.5 / mass], [-0.5, -nu / 2]],
                [[safe_sqrt(as_float64(gamma)), 0], [0, safe_sqrt(as_float64(mass * nu))]],
                beta,
            ),
            initial_covariance=_diagonal(0, self.velocity_scale * mass),
            stationary_covariance=_diagonal(1, mass),
        )


class HOLD(LinearSDE):
    r"""Third-order Langevin diffusion (Shi and Liu 2024): noise two integrations from the data.

    .. math::
        F = β \begin{pmatrix} 0 & 1 & 0 \\ -1 & 0 & g \\ 0 & -g & -ξ \end{pmatrix}, \qquad
        G = (0, 0, \sqrt{2ξβL^{-1}})^⊤

    With the defaults all three eigenvalues are −√3 β, which is critical damping. The stationary
    distribution is N(0, L⁻¹) in each component. Raises a ValueError if a parameter is out of range
    or not finite.

    Parameters
    ----------
    beta
        Rate β; see `CLD`.
    coupling
        g ≠ 0, between velocity and acceleration.
    friction
        ξ > 0.
    inverse_mass
        L > 0, the inverse of the stationary variance.
    auxiliary_scale
        Initial variance of the two auxiliary components in units of L⁻¹, ≥ 0.
    """

    def __init__(
        self,
        beta: Schedule | Parameter | tuple[Parameter, Parameter] = 4.0,
        coupling: Parameter = _CRITICAL_COUPLING,
        friction: Parameter = _CRITICAL_FRICTION,
        inverse_mass: Parameter = 1.0,
        auxiliary_scale: Parameter = 0.04,
    ) -> None:
        self.beta = beta
        self.coupling = coupling = as_parameter(coupling, "coupling")
        positive_parameter(abs(coupling), "abs(coupling)")
        self.friction = friction = positive_parameter(friction, "friction")
        self.inverse_mass = positive_parameter(inverse_mass, "inverse_mass")
        self.auxiliary_scale = parameter_at_least(auxiliary_scale, 0.0, "auxiliary_scale")
        variance = 1 / self.inverse_mass
        start = self.auxiliary_scale * variance
        super().__init__(
            TimeChangedDynamics(
                [[0, 1, 0], [-1, 0, coupling], [0, -coupling, -friction]],
                [[0], [0], [(2 * friction * variance) ** 0.5]],
                beta,
            ),
            initial_covariance=_diagonal(0, start, start),
            stationary_covariance=_diagonal(variance, variance, variance),
        )


def _rates(
    beta_min: Parameter, beta_max: Parameter, schedule: Schedule | None
) -> tuple[Parameter | None, Parameter | None, Schedule | None, Schedule]:
    """The two rates, or the schedule in their place, and β; unused values are None."""
    if schedule is not None:
        beta = Schedule.of(schedule)
        return None, None, beta, beta
    low = parameter_at_least(beta_min, 0.0, "beta_min")
    high = positive_parameter(beta_max, "beta_max")
    return low, high, None, Schedule.linear(beta_min, beta_max)


def _diagonal(*entries: Parameter) -> Tensor:
    return as_float64(entries).diag()
