"""`LinearSDE`: a process declared by its dynamics and its initial covariance."""

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
from cldsde.linear.learnt import frozen_parameters
from cldsde.linear.posterior import Posterior, bayes, reverse_family
from cldsde.linear.random import Generators, check_generator, standard_normal
from cldsde.linear.reprs import constructor_repr, shown
from cldsde.linear.schedule import Schedule
from cldsde.linear.signal_noise import OfTime, SignalNoiseDynamics


class LinearSDE:
    r"""Linear SDE with one k×k block for every data dimension: the forward process.

    .. math:: dz = F(t)\,z\,dt + G(t)\,dw, \qquad z = (x, v, …) ∈ R^{k×D}, \quad t ∈ [0, 1].

    Component 0 is the data x. The process starts from z_0 = (x, 0, …) plus Gaussian noise of the
    initial covariance, which is the distribution of the auxiliary components. Transition kernels,
    prior and stationary distribution follow from F and G. To declare a process, subclass and pass
    its dynamics to ``super().__init__``, or use `from_matrices`, `from_functions` or
    `from_signal_noise`.

    Parameters
    ----------
    dynamics
        F, G and their transitions.
    initial_covariance
        Covariance of z_0 given the data, ``(k, k)``; None: zero. Derivatives by its variances exist
        if they are above zero.
    stationary_covariance
        Σ∞, ``(k, k)``, if it is known exactly; None: derived. It is checked against F and G.
    prior_covariance
        Covariance of the prior at t = 1, ``(k, k)``. None: Σ∞, or without a stationary distribution
        the covariance of z_1 given x = 0.

    Raises
    ------
    TypeError
        If ``dynamics`` has another type than ``Dynamics``.
    ValueError
        If a covariance is not a symmetric positive semi-definite k×k matrix,
        ``stationary_covariance`` is not stationary, or a subclass sets another ``T`` than 1.

    Notes
    -----
    Kernels are differentiable in tensors that the process is made of. To learn such a parameter,
    make the process anew in each training step. A process that is used after a change of its
    parameters raises RuntimeError. Only rates β that are learnt themselves, and parameters of
    functions, are read at each use.

    Examples
    --------
    A named process:

    >>> from cldsde.linear import TimeChangedDynamics
    >>> class Overdamped(LinearSDE):
    ...     def __init__(self, stiffness: float) -> None:
    ...         dynamics = TimeChangedDynamics([[-stiffness]], [[2**0.5]], schedule=(0.1, 20.0))
    ...         super().__init__(dynamics)
    >>> Overdamped(2.0).prior.covariance
    tensor([[0.5000]], dtype=torch.float64)

    An unnamed process with two auxiliary components:

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
            raise TypeError(
                "dynamics must be a Dynamics, such as TimeChangedDynamics(A, Q_root, schedule); "
                f"got {type(dynamics).__name__}"
            )
        if self.T != 1.0:
            raise ValueError(
                f"T must be 1, because every process runs on [0, 1]; {type(self).__name__} sets "
                f"{self.T!r}. Rescale the schedule instead: the rate T β(T t) on [0, 1] is β(t) on "
                "[0, T]"
            )
        self._frozen: list[tuple[Tensor, Tensor]] = []
        self._dynamics = dynamics
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
        self._frozen = frozen_parameters(self._parts)

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
        """Create a process from constant matrices: F(t) = β(t) A, G(t) = √β(t) Q_root.

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

        Examples
        --------
        >>> sde = LinearSDE.from_matrices([[-0.5]], [[1.0]], schedule=(0.1, 20.0))
        >>> sde.transition(0.2, 0.7).root.shape
        torch.Size([1, 1])
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
        """Create a process from functions F(t) and G(t), which need not commute.

        Parameters
        ----------
        drift
            Function of a time (0-dimensional float64 tensor) that returns F, ``(k, k)``. It may
            jump, and must be smooth in t between jumps.
        diffusion
            Function of a time that returns G, ``(k, r)``; it may jump, too.
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
        The process can be pickled if its functions can, such as functions of a module.

        Examples
        --------
        >>> import torch
        >>> sde = LinearSDE.from_functions(
        ...     lambda t: (-1 - t).reshape(1, 1), lambda t: torch.ones(1, 1, dtype=torch.float64)
        ... )
        >>> f"{sde.transition_matrix(0.0, 1.0).item():.6f}"  # e^{-3/2}
        '0.223130'
        """
        return LinearSDE(
            FunctionDynamics(drift, diffusion, cls.T),
            initial_covariance=initial_covariance,
            stationary_covariance=stationary_covariance,
            prior_covariance=prior_covariance,
        )

    @classmethod
    def from_signal_noise(cls, signal: OfTime, noise: OfTime) -> LinearSDE:
        """Create a one-component process from x_t = signal(t) x_0 + noise(t) n, n ~ N(0, 1).

        Interpolants of flow matching are such processes. The signal may vanish at t = 1, as in
        `RectifiedFlow`. Kernels are finite there, but drift and diffusion diverge
        (`regular_until`).

        Parameters
        ----------
        signal
            α, a function of float64 times of any shape that returns values of that shape. It is
            differentiated, so it must consist of torch's operations. α(0) = 1 and α > 0 before
            t = 1. Kernels are differentiable in its parameters.
        noise
            σ, a function like ``signal`` with σ > 0 for t > 0. σ(0) is the standard deviation of
            x_0 given the data. α/σ must decrease with t.

        Raises
        ------
        TypeError
            If an argument is not a function.
        ValueError
            If a function returns another shape or dtype or values that are not finite, α or σ is
            out of range, α/σ increases somewhere, or a function is not smooth.

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
            root = self.initial_root
            start = f", initial_covariance={shown(root @ root.mT)}" if root.any() else ""
            return f"LinearSDE({self._dynamics!r}{start})"
        return constructor_repr(self)

    def _parts(self) -> list[Tensor]:
        """All that distributions depend on, at a time at which F and G are finite."""
        t = torch.tensor(0.5 * self.regular_until, dtype=torch.float64, device="cpu")
        roots = self.initial_root, self.stationary_covariance, self._prior_root
        parts = self._dynamics.drift(t), self._dynamics.diffusion(t), *roots
        return [part for part in parts if part is not None]

    @property
    def dynamics(self) -> Dynamics:
        """F, G and their transitions."""
        self._check_current()
        return self._dynamics

    def _check_current(self) -> None:
        """Raise RuntimeError if a learnt parameter has changed that was read when made."""
        for leaf, value in self._frozen:
            if not torch.equal(leaf.detach(), value):
                raise RuntimeError(
                    f"{type(self).__name__} has the values that its learnt parameters had when it "
                    f"was made; one of them was {shown(value)} and is {shown(leaf)} now. Make the "
                    "process anew after each step of the optimiser"
                )

    @property
    def initial_covariance(self) -> Tensor:
        """Covariance of z_0 given the data, ``(k, k)`` float64 on the CPU."""
        self._check_current()
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
        """Latest start time of solvers that evaluate F and G; 1 unless F or G diverges at t = 1.

        F and G diverge if nothing of the data is left at t = 1, as under `RectifiedFlow`. Then this
        is the time with κ = −5 (`log_snr`), the value that `VPSDE` has at t = 1. A state drawn from
        the prior there has an error of 0.7 % of the data's size. Starts closer to t = 1 need many
        more steps.
        """
        return self.dynamics.regular_until

    def drift(self, t: TimeLike) -> Tensor:
        """Drift matrix F(t), ``(*t.shape, k, k)`` float64 on the CPU.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1], or F diverges there.
        """
        return self.dynamics.drift(as_times(t, "t", self.T))

    def diffusion(self, t: TimeLike) -> Tensor:
        """Diffusion matrix G(t), ``(*t.shape, k, r)`` float64 on the CPU.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1], or G diverges there.
        """
        return self.dynamics.diffusion(as_times(t, "t", self.T))

    def transition(self, s: TimeLike, t: TimeLike) -> Kernel:
        r"""Transition kernel: the distribution of z_t given z_s, for s ≤ t.

        .. math:: z_t \mid z_s ∼ N(Ψ(t,s)\,z_s,\ ∫_s^t Ψ(t,u) G G^⊤ Ψ(t,u)^⊤ du)

        Parameters
        ----------
        s, t
            Times in [0, 1]: numbers or floating-point tensors that broadcast.

        Returns
        -------
        Kernel
            Kernel of the broadcast shape, float64 on the CPU.

        Raises
        ------
        TypeError
            If a time is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1], or s > t somewhere.
        OverflowError
            If a number is beyond the range of float64.

        Examples
        --------
        >>> kernel = LinearSDE.from_matrices([[-1.0]], [[2**0.5]]).transition(0.0, 1.0)
        >>> f"{kernel.mean.item():.4f} {kernel.covariance.item():.4f}"  # e^{-1}, 1 − e^{-2}
        '0.3679 0.8647'
        """
        return Kernel(*self._factors(*self._interval(s, t)))

    def transition_matrix(self, s: TimeLike, t: TimeLike) -> Tensor:
        """Transition matrix Ψ(t, s): the mean of `transition` alone, in less time.

        Parameters
        ----------
        s, t
            Times in [0, 1], s ≤ t: numbers or floating-point tensors that broadcast.

        Returns
        -------
        Tensor
            ``(*, k, k)`` of the broadcast shape, float64 on the CPU.

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
        r"""Integrated squared diffusion, :math:`∫_s^t G G^⊤`, ``(*, k, k)`` float64 on the CPU."""
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
        r"""Marginal kernel: the distribution of z_t given the mean of z_0.

        .. math:: z_t ∼ N(Ψ(t,0)\,E z_0,\ Ψ(t,0) Σ_0 Ψ(t,0)^⊤ + Q(0,t))

        Parameters
        ----------
        t
            Times in [0, 1].
        initial_covariance
            Σ_0, ``(k, k)``. None: the process's own, so that the auxiliary components are
            integrated out (hybrid score matching). Zeros: the distribution given all of z_0
            (denoising score matching). The process's own plus the data's variance in the first
            entry: the true marginal of Gaussian data.

        Returns
        -------
        Kernel
            Kernel of the shape of t, float64 on the CPU.

        Raises
        ------
        TypeError
            If ``t`` is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1] or Σ_0 is not a covariance.
        OverflowError
            If a number is beyond the range of float64.
        """
        return self._marginal(as_times(t, "t", self.T), self._root_at_start(initial_covariance))

    def log_snr(self, t: TimeLike) -> Tensor:
        r"""Half the log of the signal-to-noise ratio, κ(t) = ½ log ψᵀΣ_t⁻¹ψ, float64 on the CPU.

        ψ = Ψ(t,0)e₀ and Σ_t are the mean and the covariance of z_t given the data. For one
        component κ = log α/σ with the signal α and the noise level σ. κ decreases with t, to −∞ at
        t = 1 if nothing of the data is left there. Networks of this package get κ as their time.

        Parameters
        ----------
        t
            Times in (0, 1].

        Returns
        -------
        Tensor
            Values of the shape of t.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1] or the distribution at a time has no density.

        Examples
        --------
        >>> from cldsde import RectifiedFlow
        >>> RectifiedFlow().log_snr(0.5).item()  # α = σ = 1/2
        0.0
        """
        times = as_times(t, "t", self.T)
        kernel = self._marginal(times, self.initial_root)
        check_density(kernel.root, times, "t")
        signal = triangular_inverse(kernel.root) @ kernel.mean[..., :1]
        return 0.5 * signal.square().sum((-2, -1)).log()

    def posterior(
        self,
        s: TimeLike,
        t: TimeLike,
        *,
        stochasticity: float | Tensor = 1.0,
        initial_covariance: MatrixLike | None = None,
    ) -> Posterior:
        r"""Posterior distribution of z_s given z_t and the mean of z_0, for s ≤ t.

        .. math:: z_s = Ψ(s,0) z_0 + Φ_λ (z_t − Ψ(t,0) z_0) + ζ, \qquad
                  ζ ∼ N(0,\ Σ_s − Φ_λ Σ_t Φ_λ^⊤)

        Parameters
        ----------
        s, t
            Times in [0, 1] that broadcast, t > 0. If λ ≠ 1 and z_0 has no density given the data,
            s > 0 as well.
        stochasticity
            λ ≥ 0, a number or a tensor that broadcasts with the times. 1: the Bayesian posterior
            p(z_s | z_t, z_0), the step of ancestral sampling. 0: the probability flow of a single
            data point, the step of DDIM. Every λ maps the distribution of z_t given z_0 to the
            distribution of z_s given z_0.
        initial_covariance
            Σ_0 as in `marginal`. None conditions on the data, zeros on all of z_0. With the data's
            variance in its first entry the result is the exact reverse transition p(z_s | z_t) of
            Gaussian data.

        Returns
        -------
        Posterior
            Posterior of the broadcast shape, float64 on the CPU.

        Raises
        ------
        TypeError
            If a time is not a real number or floating-point tensor.
        ValueError
            If a time lies outside [0, 1], s > t somewhere, λ is negative, or the distribution of
            z_t given z_0 has no density; for λ ≠ 1 also if z_s given z_0 has no density.

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
        r"""Covariance root R_t that follows the probability flow of a single data point (gDDIM).

        .. math:: R' = (F + \tfrac12 G G^⊤ Σ_t^{-1}) R, \qquad R_t R_t^⊤ = Σ_t

        On the probability-flow ODE of a single data point z_t = Ψ(t,0) z_0 + R_t c with a constant
        c. Noise predicted in these coordinates therefore varies slowly (Zhang, Tao and Chen 2023,
        eq. 17). With the triangular root c would rotate by several turns. R is determined up to a
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
            ``(*t.shape, k, k)`` float64 on the CPU.

        Raises
        ------
        ValueError
            If a time lies outside [0, 1] or the distribution at a time has no density.
        """
        times, root = as_times(t, "t", self.T), self._root_at_start(initial_covariance)
        triangular = self._marginal(times, root).root
        check_density(triangular, times, "t")
        end = torch.full((1,), self.T, device="cpu", dtype=torch.float64)
        stops = torch.cat([times.flatten(), end])
        rotation = flow_rotations(self.dynamics, lambda u: self._marginal(u, root).root, stops)
        rotation = rotation[:-1].reshape(triangular.shape)
        # One Newton step to the nearest rotation, which makes R Rᵀ = Σ to rounding.
        eye = torch.eye(self.components, device="cpu", dtype=torch.float64)
        rotation = 0.5 * rotation @ (3 * eye - rotation.mT @ rotation)
        return triangular @ rotation

    def _interval(self, s: TimeLike, t: TimeLike) -> tuple[Tensor, Tensor]:
        start, end = as_times(s, "s", self.T), as_times(t, "t", self.T)
        try:
            start, end = torch.broadcast_tensors(start, end)  # type: ignore[no-untyped-call]
        except RuntimeError:
            msg = f"s and t must broadcast; got shapes {tuple(start.shape)} and {tuple(end.shape)}"
            raise ValueError(msg) from None
        late = start > end
        if bool(late.any()):
            raise ValueError(
                f"s must not be later than t; got s = {float(start[late][0])!r}, "
                f"t = {float(end[late][0])!r}. Pass the earlier time first"
            )
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
            raise OverflowError(
                f"the transition kernel of {type(self).__name__} overflows float64; rescale the "
                "process"
            )

    @property
    def prior(self) -> Gaussian:
        """Gaussian prior from which sampling starts at t = 1."""
        self._check_current()
        root = self._prior_root
        return Gaussian(self.marginal(self.T).root if root is None else root)

    @property
    def stationary_reversal(self) -> LinearSDE | None:
        """Time reversal of the stationary process; None without a stationary distribution.

        Its drift is Σ∞ F(t)ᵀ Σ∞⁻¹ and its diffusion G(t). Over [u, t] it is the reverse process
        from t back to u with the stationary score −Σ∞⁻¹z. `SSCS` solves this part exactly.
        """
        if self.stationary_covariance is None or self._prior_root is None:
            return None
        if not bool((self._prior_root.diagonal() > 0).all()):
            return None  # a stationary distribution without density has no score
        dynamics = self.dynamics.stationary_reversal(self.stationary_covariance)
        if dynamics is None:
            return None
        return LinearSDE(dynamics, stationary_covariance=self.stationary_covariance)

    def augment(self, x: Tensor, generator: Generators | None = None) -> Tensor:
        """Draw an initial state z_0 = (x, 0, …) plus noise of the initial covariance.

        Parameters
        ----------
        x
            Data ``(B, *D)``, floating point.
        generator
            Random generator, or several for equal shares of the batch.

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
        """Draw a noisy state z_t = Ψ z_0 + L ξ from the forward process that starts at the data.

        Parameters
        ----------
        x0
            Data ``(B, *D)``, floating point.
        t
            One time, or ``(B,)``.
        conditioning
            ``"data"``: ξ is the noise given x_0 alone (hybrid score matching). ``"all"``: z_0 is
            drawn first, and ξ is the noise given z_0 (denoising score matching).
        generator
            Random generator.

        Returns
        -------
        z_t, noise : tuple of Tensor
            State and ξ, both ``(B, k, *D)``, dtype and device of ``x0``.

        Raises
        ------
        ValueError
            If shapes do not fit or ``conditioning`` is unknown.

        Examples
        --------
        >>> import torch
        >>> from cldsde import CLD
        >>> z, noise = CLD().perturb(torch.zeros(8, 3), 0.5)
        >>> z.shape
        torch.Size([8, 2, 3])
        """
        check_generator(generator)
        if conditioning == "data":
            return self.marginal(t).perturb(self.embed(x0), generator=generator)
        if conditioning == "all":
            return self.transition(0.0, t).perturb(self.augment(x0, generator), generator=generator)
        raise ValueError(f"conditioning must be 'data' or 'all'; got {conditioning!r}")

    def embed(self, x: Tensor) -> Tensor:
        """Mean of z_0: the state (x, 0, …), ``(B, k, *D)``, for data x ``(B, *D)``.

        Raises
        ------
        TypeError
            If ``x`` is not a floating-point tensor with a batch axis.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"data must be a floating-point tensor of shape (B, *D); got {got}")
        state = x.new_zeros(len(x), self.components, *x.shape[1:])
        state[:, 0] = x
        return state

    def _checked_stationary(self, covariance: Tensor) -> Tensor:
        t = torch.linspace(0, self.regular_until, 17, device="cpu", dtype=torch.float64)
        F, G = self.drift(t).detach(), self.diffusion(t).detach()
        flow = F @ covariance.detach()
        residual = flow + flow.mT + G @ G.mT
        if float(residual.abs().max()) > 1e-10 * float(flow.abs().max()):
            raise ValueError(
                "stationary_covariance must satisfy F Σ + Σ Fᵀ + GGᵀ = 0 at all times; "
                f"the residual reaches {float(residual.abs().max()):g}"
            )
        return covariance


def check_process(sde: object) -> LinearSDE:
    """Return the argument if it is an initialised `LinearSDE`; otherwise raise TypeError."""
    if not isinstance(sde, LinearSDE):
        hint = " (write it with parentheses)" if isinstance(sde, type) else ""
        got = sde.__name__ if isinstance(sde, type) else type(sde).__name__
        raise TypeError(f"sde must be a LinearSDE; got {got}{hint}")
    if not hasattr(sde, "dynamics"):
        raise TypeError(
            f"sde must be initialised; {type(sde).__name__} does not call "
            "super().__init__ with its dynamics"
        )
    return sde
