"""The linear SDE: declared by its dynamics and its initial law, everything else derived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import MatrixLike, Parameter, TimeLike, as_levels, as_matrix, as_times
from cldsde.linear.covariance import covariance_root, joint_root, triangular_inverse
from cldsde.linear.dynamics import Dynamics, TimeChangedDynamics
from cldsde.linear.flow import flow_rotations
from cldsde.linear.function_dynamics import FunctionDynamics
from cldsde.linear.kernel import Gaussian, Kernel, check_density
from cldsde.linear.posterior import Posterior, bayes, reverse_family
from cldsde.linear.random import Generators, check_generator, standard_normal
from cldsde.linear.reprs import constructor_repr, shown
from cldsde.linear.schedule import Schedule
from cldsde.linear.signal_noise import OfTime, SignalNoiseDynamics

__all__ = ["LinearSDE", "check_process"]


class LinearSDE:
    r"""A linear SDE with one k×k block for every data dimension.

    .. math:: dz = F(t)\,z\,dt + G(t)\,dw, \qquad z = (x, v, …) ∈ R^{k×D}, \quad t ∈ [0, 1].

    Component 0 is the data x. The process starts from z_0 = (x, 0, …) plus Gaussian noise of
    the initial covariance: the law of the auxiliary components. Transition kernels, prior and
    stationary law follow from F and G. To declare a process, subclass and pass its dynamics to
    ``super().__init__``, or use `from_matrices` or `from_functions`.

    Parameters
    ----------
    dynamics
        F, G and the transition law.
    initial_covariance
        Covariance of z_0 given the data, ``(k, k)``; None is zero. What is learnt of it has
        derivatives where the variances are above zero.
    stationary_covariance
        Σ∞ where it is known exactly; None derives it. It is checked against F and G.
    prior_covariance
        Covariance of the prior at t = 1; None takes Σ∞, or, for a process without a stationary
        law, the covariance of z_1 given x = 0.

    Raises
    ------
    ValueError
        If a covariance is not a symmetric positive semi-definite k×k matrix,
        ``stationary_covariance`` is not stationary, or a subclass sets another ``T`` than 1.

    Examples
    --------
    A process with a name of its own:

    >>> from cldsde.linear import TimeChangedDynamics
    >>> class Overdamped(LinearSDE):
    ...     def __init__(self, stiffness: float) -> None:
    ...         dynamics = TimeChangedDynamics([[-stiffness]], [[2**0.5]], schedule=(0.1, 20.0))
    ...         super().__init__(dynamics)
    >>> Overdamped(2.0).prior.covariance
    tensor([[0.5000]], dtype=torch.float64)

    One with two auxiliary components, without a name:

    >>> sde = LinearSDE.from_matrices(
    ...     A=[[0, 1, 0], [-1, 0, 2], [0, -2, -3]],
    ...     Q_root=[[0], [0], [6**0.5]],
    ...     schedule=4.0,
    ...     initial_covariance=[[0, 0, 0], [0, 0.1, 0], [0, 0, 0.1]],
    ... )
    >>> sde.components, sde.driven
    (3, (2,))
    >>> sde.transition(0.2, 0.7).root.shape
    torch.Size([3, 3])
    """

    T: ClassVar[float] = 1.0

    def __init__(
        self,
        dynamics: Dynamics,
        *,
        initial_covariance: MatrixLike | None = None,
        stationary_covariance: MatrixLike | None = None,
        prior_covariance: MatrixLike | None = None,
    ) -> None:
        if not isinstance(dynamics, Dynamics):
            msg = (
                "dynamics must be a Dynamics, such as TimeChangedDynamics(A, Q_root, schedule); "
                f"got {type(dynamics).__name__}"
            )
            raise TypeError(msg)
        if self.T != 1.0:
            msg = (
                f"T must be 1, as every process runs on [0, 1]; {type(self).__name__} sets "
                f"{self.T!r}. Rescale the schedule instead: the rate T β(T t) on [0, 1] is β(t) on "
                "[0, T]"
            )
            raise ValueError(msg)
        self.dynamics = dynamics
        k = self.components
        if initial_covariance is None:
            initial_covariance = torch.zeros(k, k, device="cpu", dtype=torch.float64)
        self.initial_root = covariance_root(initial_covariance, "initial_covariance", k)
        if stationary_covariance is None:
            self.stationary_covariance = dynamics.stationary_covariance()
        else:
            given = as_matrix(stationary_covariance, "stationary_covariance", (k, k))
            self.stationary_covariance = self._checked_stationary(given)
        if prior_covariance is None:
            prior_covariance = self.stationary_covariance
        self._prior_root: Tensor | None = None
        if prior_covariance is not None:
            self._prior_root = covariance_root(prior_covariance, "prior_covariance", k)

    @classmethod
    def from_matrices(
        cls,
        A: MatrixLike,
        Q_root: MatrixLike,
        schedule: Schedule | Parameter | Sequence[Parameter] = 1.0,
        *,
        initial_covariance: MatrixLike | None = None,
        stationary_covariance: MatrixLike | None = None,
        prior_covariance: MatrixLike | None = None,
    ) -> LinearSDE:
        """The process F(t) = β(t) A, G(t) = √β(t) Q_root.

        Parameters
        ----------
        A
            ``(k, k)``.
        Q_root
            ``(k, r)``.
        schedule
            β: a number, a pair (β(0), β(1)) for a linear schedule, or a `Schedule`.
        initial_covariance, stationary_covariance, prior_covariance
            See `LinearSDE`.

        Raises
        ------
        ValueError
            If A is not square, the matrices do not fit, or an entry is not finite.
        """
        return LinearSDE(
            TimeChangedDynamics(A, Q_root, schedule),
            initial_covariance=initial_covariance,
            stationary_covariance=stationary_covariance,
            prior_covariance=prior_covariance,
        )

    @classmethod
    def from_functions(
        cls,
        drift: Callable[[Tensor], Tensor],
        diffusion: Callable[[Tensor], Tensor],
        *,
        initial_covariance: MatrixLike | None = None,
        stationary_covariance: MatrixLike | None = None,
        prior_covariance: MatrixLike | None = None,
    ) -> LinearSDE:
        """The process with F(t) and G(t) given by functions, which need not commute.

        Parameters
        ----------
        drift
            A time (0-dimensional float64 tensor) to F, ``(k, k)``. It may jump; between jumps it is
            smooth in t.
        diffusion
            A time to G, ``(k, r)``, alike.
        initial_covariance, stationary_covariance, prior_covariance
            See `LinearSDE`.

        Raises
        ------
        ValueError
            If a function returns matrices that do not fit or values that are not finite, if the
            diffusion is zero at all times, or if a function nearly diverges or varies too quickly
            somewhere; the message names the time.

        Notes
        -----
        The process can be pickled if its functions can, as those of a module can.
        """
        return LinearSDE(
            FunctionDynamics(drift, diffusion, cls.T),
            initial_covariance=initial_covariance,
            stationary_covariance=stationary_covariance,
            prior_covariance=prior_covariance,
        )

    @classmethod
    def from_signal_noise(cls, signal: OfTime, noise: OfTime) -> LinearSDE:
        """The process with one component and x_t = signal(t) x_0 + noise(t) n, n ~ N(0, 1).

        An interpolant of flow matching is such a process. The signal may vanish at t = 1, as that
        of `RectifiedFlow` does: kernels stay finite there, drift and diffusion do not
        (`regular_until`).

        Parameters
        ----------
        signal
            α: float64 times of any shape to values of that shape, in torch's operations, which are
            differentiated. α(0) = 1 and α > 0 before t = 1. Kernels are differentiable in its
            learnt parameters.
        noise
            σ, alike: σ > 0 for t > 0. σ(0) is the standard deviation of x_0 given the data. The
            ratio α/σ falls with t.

        Raises
        ------
        TypeError
            If an argument is no function.
        ValueError
            If a function returns another shape or dtype or values that are not finite, α or σ is
            out of range, α/σ rises somewhere, or a function is not smooth.

        Examples
        --------
        >>> import torch
        >>> sde = LinearSDE.from_signal_noise(lambda t: (1 - t) ** 2, torch.sqrt)
        >>> sde.transition(0.5, 1.0).mean.item(), sde.marginal(0.5).covariance.item()
        (0.0, 0.5...)
        """
        dynamics = SignalNoiseDynamics(signal, noise)
        start = noise(torch.zeros(1, 1, dtype=torch.float64, device="cpu"))
        return LinearSDE(dynamics, initial_covariance=start.square())

    def __repr__(self) -> str:
        """Facts in one line."""
        if type(self) is LinearSDE:
            start = f", initial_covariance={shown(self.initial_covariance)}"
            return f"LinearSDE({self.dynamics!r}{start if self.initial_root.any() else ''})"
        return constructor_repr(self)

    @property
    def initial_covariance(self) -> Tensor:
        """Covariance of z_0 given the data, ``(k, k)`` float64 on the host."""
        return self.initial_root @ self.initial_root.mT

    @property
    def components(self) -> int:
        """Number k of components of the state."""
        return self.dynamics.components

    @property
    def driven(self) -> tuple[int, ...]:
        """Components that noise enters, in increasing order."""
        return self.dynamics.driven

    @property
    def regular_until(self) -> float:
        """Latest time from which solvers that evaluate F and G start: 1 unless these diverge there.

        They do if nothing of the data is left at t = 1, as under `RectifiedFlow`. Then κ, half the
        log of the signal-to-noise ratio (`log_snr`), is −5 at this time, as it is at the end of
        `VPSDE`: a state drawn from the prior there is wrong by 0.7 % of the data's size. Starts
        closer to t = 1 need many more steps.
        """
        return self.dynamics.regular_until

    def drift(self, t: TimeLike) -> Tensor:
        """F(t), ``(*t.shape, k, k)`` float64 on the host.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1], or F diverges there.
        """
        return self.dynamics.drift(as_times(t, "t", self.T))

    def diffusion(self, t: TimeLike) -> Tensor:
        """G(t), ``(*t.shape, k, r)`` float64 on the host.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1], or G diverges there.
        """
        return self.dynamics.diffusion(as_times(t, "t", self.T))

    def transition(self, s: TimeLike, t: TimeLike) -> Kernel:
        r"""Law of z_t given z_s, for s ≤ t.

        .. math:: z_t \mid z_s ∼ N(Ψ(t,s)\,z_s,\ ∫_s^t Ψ(t,u) G G^⊤ Ψ(t,u)^⊤ du)

        Parameters
        ----------
        s, t
            Times in [0, 1]: numbers or floating-point tensors that broadcast.

        Returns
        -------
        Kernel
            Of the broadcast shape, float64 on the host.

        Raises
        ------
        TypeError
            If a time is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1], or s > t somewhere.
        OverflowError
            If the law is beyond the range of float64.
        """
        return Kernel(*self._factors(*self._interval(s, t)))

    def transition_matrix(self, s: TimeLike, t: TimeLike) -> Tensor:
        """Ψ(t, s), the mean of `transition` alone, in less time.

        Parameters
        ----------
        s, t
            Times in [0, 1], s ≤ t: numbers or floating-point tensors that broadcast.

        Returns
        -------
        Tensor
            ``(*, k, k)`` of the broadcast shape, float64 on the host.

        Raises
        ------
        TypeError
            If a time is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1], or s > t somewhere.
        OverflowError
            If an entry is beyond the range of float64.
        """
        psi = self.dynamics.transition_matrix(*self._interval(s, t))
        self._check_range(psi)
        return psi

    def accumulated_noise(self, s: TimeLike, t: TimeLike) -> Tensor:
        r"""Squared diffusion of an interval, :math:`∫_s^t G G^⊤`, ``(*, k, k)`` float64."""
        root = self.noise_root(s, t)
        return root @ root.mT

    def noise_root(self, s: TimeLike, t: TimeLike) -> Tensor:
        r"""Root of :math:`∫_s^t G G^⊤`, lower triangular in the driven rows, ``(*, k, d)``."""
        noise = self.dynamics.noise_root(*self._interval(s, t))
        driven = list(self.driven)
        root = noise.new_zeros(*noise.shape[:-1], len(driven))
        root[..., driven, :] = joint_root(noise[..., driven, :])
        return root

    def marginal(self, t: TimeLike, initial_covariance: MatrixLike | None = None) -> Kernel:
        r"""Law of z_t given the mean of z_0.

        .. math:: z_t ∼ N(Ψ(t,0)\,E z_0,\ Ψ(t,0) Σ_0 Ψ(t,0)^⊤ + Q(0,t))

        Parameters
        ----------
        t
            Times in [0, 1].
        initial_covariance
            Σ_0, ``(k, k)``. None is the process's own, so that the auxiliary components are
            integrated out (the kernel of hybrid score matching); zeros give the law given all of
            z_0 (denoising score matching); Σ_0 with the data's variance in its first entry gives
            the true marginal of Gaussian data.

        Returns
        -------
        Kernel
            Of the shape of t, float64 on the host.

        Raises
        ------
        TypeError
            If ``t`` is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1] or Σ_0 is not a covariance.
        OverflowError
            If the law is beyond the range of float64.
        """
        return self._marginal(as_times(t, "t", self.T), self._root_at_start(initial_covariance))

    def log_snr(self, t: TimeLike) -> Tensor:
        r"""κ(t) = ½ log ψᵀΣ_t⁻¹ψ, half the log of what the state tells of the data, float64.

        ψ = Ψ(t,0)e₀ and Σ_t belong to the law given the data; for one component it is
        log α/σ. It falls with t, to −∞ at t = 1 if nothing of the data is left there, and is the
        clock in which score networks see time.

        Parameters
        ----------
        t
            Times in (0, 1].

        Returns
        -------
        Tensor
            Of the shape of t.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1] or the law at a time has no density.
        """
        times = as_times(t, "t", self.T)
        law = self._marginal(times, self.initial_root)
        check_density(law.root, times, "t")
        signal = triangular_inverse(law.root) @ law.mean[..., :1]
        return 0.5 * signal.square().sum((-2, -1)).log()

    def posterior(
        self,
        s: TimeLike,
        t: TimeLike,
        *,
        stochasticity: float | Tensor = 1.0,
        initial_covariance: MatrixLike | None = None,
    ) -> Posterior:
        r"""Law of z_s given z_t and the mean of z_0, for s ≤ t, and the family around it.

        .. math:: z_s = Ψ(s,0) z_0 + Φ_λ (z_t − Ψ(t,0) z_0) + ζ, \qquad
                  ζ ∼ N(0,\ Σ_s − Φ_λ Σ_t Φ_λ^⊤)

        Parameters
        ----------
        s, t
            Times in [0, 1] that broadcast, t > 0; s > 0 too where λ is not 1 and z_0 has no
            density of its own.
        stochasticity
            λ ≥ 0, a number or a tensor that broadcasts with the times. 1: the Bayesian posterior
            p(z_s | z_t, z_0), the step of ancestral sampling. 0: the probability flow of a single
            datum, the step of DDIM. Every λ carries the law of z_t given z_0 to that of z_s given
            z_0.
        initial_covariance
            Σ_0 as in `marginal`: None conditions on the data, zeros on all of z_0; with the data's
            variance in its first entry the law is the exact reverse transition p(z_s | z_t) of
            Gaussian data.

        Returns
        -------
        Posterior
            Of the broadcast shape, float64 on the host.

        Raises
        ------
        TypeError
            If a time is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1], s > t somewhere, λ is negative, or the law of z_t (for
            λ ≠ 1 that of z_s as well) given z_0 has no density.

        References
        ----------
        J. Song, C. Meng and S. Ermon, *Denoising diffusion implicit models*, 2021, eq. 7.

        Examples
        --------
        >>> sde = LinearSDE.from_matrices([[-0.5]], [[1.0]], (0.1, 20.0))
        >>> step = sde.posterior(0.4, 0.5)
        >>> step.state.item(), step.root.item()
        (0.555..., 0.721...)
        """
        start, end = self._interval(s, t)
        levels = as_levels(stochasticity, "stochasticity", start.shape)
        root = self._root_at_start(initial_covariance)
        earlier, later = self._marginal(start, root), self._marginal(end, root)
        check_density(later.root, end, "t")
        if bool((levels == 1).all()):
            step = Kernel(*self._factors(start, end))
            state, noise = bayes(step, earlier.root, later.root)
        else:
            check_density(earlier.root, start, "s")
            state, noise = reverse_family(
                self.dynamics, lambda u: self._marginal(u, root).root, start, end, levels
            )
        return Posterior(state, earlier.mean - state @ later.mean, noise)

    def probability_flow_root(
        self, t: TimeLike, initial_covariance: MatrixLike | None = None
    ) -> Tensor:
        r"""Root R_t of the marginal covariance that the probability flow of a datum carries along.

        .. math:: R' = (F + \tfrac12 G G^⊤ Σ_t^{-1}) R, \qquad R_t R_t^⊤ = Σ_t

        On the probability-flow ODE of a single datum z_t = Ψ(t,0) z_0 + R_t c with a constant c,
        so that noise predicted in these coordinates varies slowly (Zhang, Tao and Chen 2023,
        eq. 17); with the triangular root c rotates by several turns. R is determined up to a
        constant rotation from the right; here R_T is triangular.

        Parameters
        ----------
        t
            Times in (0, 1].
        initial_covariance
            Σ_0 as in `marginal`.

        Returns
        -------
        Tensor
            ``(*t.shape, k, k)`` float64 on the host.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1] or the law at a time has no density.
        """
        times, root = as_times(t, "t", self.T), self._root_at_start(initial_covariance)
        law = self._marginal(times, root).root
        check_density(law, times, "t")
        end = torch.full((1,), self.T, device="cpu", dtype=torch.float64)
        stops = torch.cat([times.flatten(), end])
        rotation = flow_rotations(self.dynamics, lambda u: self._marginal(u, root).root, stops)
        rotation = rotation[:-1].reshape(law.shape)
        # One Newton step to the nearest rotation, which makes R Rᵀ = Σ to rounding.
        eye = torch.eye(self.components, device="cpu", dtype=torch.float64)
        rotation = 0.5 * rotation @ (3 * eye - rotation.mT @ rotation)
        return law @ rotation

    def _interval(self, s: TimeLike, t: TimeLike) -> tuple[Tensor, Tensor]:
        start, end = as_times(s, "s", self.T), as_times(t, "t", self.T)
        try:
            start, end = torch.broadcast_tensors(start, end)  # type: ignore[no-untyped-call]
        except RuntimeError:
            msg = f"s and t must broadcast; got shapes {tuple(start.shape)} and {tuple(end.shape)}"
            raise ValueError(msg) from None
        late = start > end
        if bool(late.any()):
            msg = (
                f"s must not be later than t; got s = {float(start[late][0])!r}, "
                f"t = {float(end[late][0])!r} (the earlier time comes first)"
            )
            raise ValueError(msg)
        return start, end

    def _root_at_start(self, initial_covariance: MatrixLike | None) -> Tensor:
        if initial_covariance is None:
            return self.initial_root
        return covariance_root(initial_covariance, "initial_covariance", self.components)

    def _marginal(self, times: Tensor, initial_root: Tensor) -> Kernel:
        known = not initial_root.requires_grad and not bool(initial_root.any())
        return Kernel(
            *self._factors(torch.zeros_like(times), times, None if known else initial_root)
        )

    def _factors(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        psi, root = self.dynamics.transition(s, t, initial_root)
        self._check_range(psi, root)
        return psi, root

    def _check_range(self, *parts: Tensor) -> None:
        if not all(bool(part.detach().isfinite().all()) for part in parts):
            msg = (
                f"{type(self).__name__}: the transition law overflows float64; rescale the process"
            )
            raise OverflowError(msg)

    @property
    def prior(self) -> Gaussian:
        """Gaussian law from which sampling starts at t = 1."""
        root = self._prior_root
        return Gaussian(self.marginal(self.T).root if root is None else root)

    @property
    def stationary_reversal(self) -> LinearSDE | None:
        """The time reversal of the process at its stationary law; None where there is none.

        Its drift is Σ∞ F(t)ᵀ Σ∞⁻¹ and its diffusion G(t). Run over [u, t] it carries a state from
        t back to u when the score is that of the stationary law, which is the exact part of the
        splitting of SSCS.
        """
        if self.stationary_covariance is None or self._prior_root is None:
            return None
        if not bool((self._prior_root.diagonal() > 0).all()):
            return None  # a stationary law without density has no score
        dynamics = self.dynamics.stationary_reversal(self.stationary_covariance)
        if dynamics is None:
            return None
        return LinearSDE(dynamics, stationary_covariance=self.stationary_covariance)

    def augment(self, x: Tensor, generator: Generators | None = None) -> Tensor:
        """Draw z_0 = (x, 0, …) plus noise of the initial covariance.

        Parameters
        ----------
        x
            Data ``(B, *D)``, floating point.
        generator
            Source of the normals.

        Returns
        -------
        Tensor
            ``(B, k, *D)``.
        """
        check_generator(generator)
        state = self.embed(x)
        noise = standard_normal(state.shape, generator=generator, dtype=x.dtype, device=x.device)
        return state + apply_blocks(self.initial_root, noise)

    def perturb(
        self,
        x0: Tensor,
        t: TimeLike,
        *,
        conditioning: Literal["data", "all"] = "data",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw z_t from the forward process started at data, z_t = Ψ z_0 + L ε.

        Parameters
        ----------
        x0
            Data ``(B, *D)``, floating point.
        t
            One time, or ``(B,)``.
        conditioning
            ``"data"``: ε belongs to the law given x_0 alone (hybrid score matching).
            ``"all"``: z_0 is drawn first, ε belongs to the law given z_0 (denoising score
            matching).
        generator
            Source of the normals.

        Returns
        -------
        z_t, noise : tuple of Tensor
            State and ε, both ``(B, k, *D)``, dtype and device of ``x0``.

        Raises
        ------
        ValueError
            If shapes do not fit or ``conditioning`` is unknown.
        """
        check_generator(generator)
        if conditioning == "data":
            return self.marginal(t).perturb(self.embed(x0), generator=generator)
        if conditioning == "all":
            return self.transition(0.0, t).perturb(self.augment(x0, generator), generator=generator)
        msg = f"conditioning must be 'data' or 'all'; got {conditioning!r}"
        raise ValueError(msg)

    def embed(self, x: Tensor) -> Tensor:
        """State (x, 0, …) ``(B, k, *D)`` of data ``(B, *D)``: the mean of z_0.

        Raises
        ------
        TypeError
            If ``x`` is not a floating-point tensor with a batch axis.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            msg = f"data must be a floating-point tensor of shape (B, *D); got {got}"
            raise TypeError(msg)
        state = x.new_zeros(len(x), self.components, *x.shape[1:])
        state[:, 0] = x
        return state

    def _checked_stationary(self, covariance: Tensor) -> Tensor:
        t = torch.linspace(0, self.regular_until, 17, device="cpu", dtype=torch.float64)
        F, G = self.drift(t).detach(), self.diffusion(t).detach()
        flow = F @ covariance.detach()
        residual = flow + flow.mT + G @ G.mT
        if float(residual.abs().max()) > 1e-10 * float(flow.abs().max()):
            msg = (
                "stationary_covariance must satisfy F Σ + Σ Fᵀ + GGᵀ = 0 at all times; "
                f"the residual reaches {float(residual.abs().max()):g}"
            )
            raise ValueError(msg)
        return covariance


def check_process(sde: object) -> None:
    """Raise TypeError unless ``sde`` is a `LinearSDE`, ready for use."""
    if not isinstance(sde, LinearSDE):
        hint = " (write it with parentheses)" if isinstance(sde, type) else ""
        got = sde.__name__ if isinstance(sde, type) else type(sde).__name__
        msg = f"sde must be a LinearSDE; got {got}{hint}"
        raise TypeError(msg)
    if not hasattr(sde, "dynamics"):
        msg = f"sde: {type(sde).__name__} has to call super().__init__ with its dynamics"
        raise TypeError(msg)
