"""`LinearSDE`: a process declared by its dynamics and its initial covariance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import MatrixLike, Parameter, TimeLike, as_matrix
from cldsde.linear.covariance import covariance_root
from cldsde.linear.distributions import Distributions, frozen_parameters
from cldsde.linear.dynamics import Dynamics, TimeChangedDynamics
from cldsde.linear.function_dynamics import FunctionDynamics
from cldsde.linear.kernel import Gaussian
from cldsde.linear.random import Generators, check_generator, standard_normal
from cldsde.linear.reprs import constructor_repr, shown
from cldsde.linear.schedule import Schedule
from cldsde.linear.signal_noise import OfTime, SignalNoiseDynamics


class LinearSDE(Distributions):
    r"""Linear SDE with one k×k block for every data dimension: the forward process.

    .. math:: dz = F(t)\,z\,dt + G(t)\,dw, \qquad z = (x, v, …) ∈ R^{k×D}, \quad t ∈ [0, 1].

    Component 0 is the data x. The process starts from z_0 = (x, 0, …) plus Gaussian noise of the
    initial covariance, as a rule noise of the auxiliary components alone. Transition kernels,
    prior and stationary distribution follow from F and G. To declare a process, subclass and pass
    its dynamics to ``super().__init__``, or use `from_matrices`, `from_functions` or
    `from_signal_noise`.

    Parameters
    ----------
    dynamics
        F, G and their transitions.
    initial_covariance
        Covariance of z_0 given the data, ``(k, k)``; None: zero. Derivatives by its variances exist
        if they are above zero. ValueError if a covariance is not symmetric and positive
        semi-definite.
    stationary_covariance
        Σ∞, ``(k, k)``, if it is known exactly; None: derived. ValueError if it is not stationary
        under F and G.
    prior_covariance
        Covariance of the prior at t = 1, ``(k, k)``. None: Σ∞, or without a stationary distribution
        the covariance of z_1 given x = 0.

    Notes
    -----
    Times are numbers or floating-point tensors in [0, 1], and ``T`` is 1 for every subclass; two
    times s ≤ t broadcast. Coefficients and kernels have the shape of the times before their matrix
    axes, and are float64 on the CPU. States have the dtype and device of the data. Methods
    raise TypeError for a time of another type, ValueError for a time beyond [0, 1] or if s > t
    somewhere, and OverflowError if a number is beyond the range of float64.

    Kernels are differentiable in tensors that the process is made of. To learn such a parameter,
    make the process anew in each training step. A process that is used after a change of its
    parameters raises RuntimeError. Only rates β that are learnt themselves, and parameters of
    functions, are read at each use.

    Examples
    --------
    >>> from cldsde.linear import TimeChangedDynamics
    >>> class Overdamped(LinearSDE):
    ...     def __init__(self, stiffness: float) -> None:
    ...         dynamics = TimeChangedDynamics([[-stiffness]], [[2**0.5]], schedule=(0.1, 20.0))
    ...         super().__init__(dynamics)
    >>> Overdamped(2.0).prior.covariance
    tensor([[0.5000]], dtype=torch.float64)

    :doc:`/how-to/declare-a-process` has more.
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
        super().__init__(dynamics, initial_covariance)
        k = self.components
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

        See `TimeChangedDynamics` for A, Q_root and schedule, and `LinearSDE` for the covariances.
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
        drift, diffusion
            Functions of a time (0-dimensional float64 tensor) that return F, ``(k, k)``, and G,
            ``(k, r)``. They may jump, and must be smooth in t between jumps.
        initial_covariance, stationary_covariance, prior_covariance
            See `LinearSDE`.

        Notes
        -----
        Raises a ValueError if a function returns matrices that do not fit or values that are not
        finite, nearly diverges or varies too quickly at a time, which is named; or if all diffusion
        is zero. The process can be pickled if its functions can, such as functions of a module.
        :doc:`/how-to/declare-a-process` has an example.
        """
        return LinearSDE(
            FunctionDynamics(drift, diffusion),
            initial_covariance=initial_covariance,
            stationary_covariance=stationary_covariance,
            prior_covariance=prior_covariance,
        )

    @classmethod
    def from_signal_noise(cls, signal: OfTime, noise: OfTime) -> LinearSDE:
        """Create a one-component process from x_t = signal(t) x_0 + noise(t) n, n ~ N(0, 1).

        Interpolants of flow matching are such processes (:doc:`/how-to/flow-matching` has
        examples). The signal may vanish at t = 1, as in `RectifiedFlow`. Kernels are finite there,
        but drift and diffusion diverge (`regular_until`). Raises a ValueError if a function returns
        another shape or dtype or values that are not finite, α or σ is out of range, α/σ increases
        somewhere, or a function is not smooth. Raises a TypeError if an argument is not a function.

        Parameters
        ----------
        signal
            α, a function of float64 times of any shape that returns values of that shape. It is
            differentiated, so it must consist of torch's operations. α(0) = 1 and α > 0 before
            t = 1. Kernels are differentiable in its parameters.
        noise
            σ, a function like ``signal`` with σ > 0 for t > 0. σ(0) is the standard deviation of
            x_0 given the data. α/σ must decrease with t.
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
    def prior(self) -> Gaussian:
        """Gaussian prior from which sampling starts at t = 1."""
        self._check_current()
        root = self._prior_root
        return Gaussian(self.marginal(1.0).root if root is None else root)

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
        """Draw initial states z_0 = (x, 0, …) plus noise of the initial covariance, ``(B, k, *D)``.

        Parameters
        ----------
        x
            Data ``(B, *D)``, floating point.
        generator
            Random generator, or several for equal shares of the batch.
        """
        state = self.embed(x)
        noise = standard_normal(state.shape, generator=generator, dtype=x.dtype, device=x.device)
        return state + apply_blocks(self.initial_root, noise)

    def perturb(
        self,
        x0: Tensor,
        t: TimeLike,
        *,
        conditioning: Literal["data", "all"] = "data",
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw a noisy state z_t = Ψ z_0 + L ξ from the forward process that starts at the data.

        Returns z_t and ξ, both ``(B, k, *D)``, in the dtype and on the device of ``x0``.

        Parameters
        ----------
        x0
            Data ``(B, *D)``, floating point.
        t
            One time, or ``(B,)``; ValueError for another shape.
        conditioning
            ``"data"``: ξ is the noise given x_0 alone (hybrid score matching). ``"all"``: z_0 is
            drawn first, and ξ is the noise given z_0 (denoising score matching). ValueError for
            another name.
        generator
            See `augment`.
        """
        check_generator(generator)
        if conditioning == "data":
            return self.marginal(t).perturb(self.embed(x0), generator=generator)
        if conditioning == "all":
            return self.transition(0.0, t).perturb(self.augment(x0, generator), generator=generator)
        raise ValueError(f"conditioning must be 'data' or 'all'; got {conditioning!r}")

    def embed(self, x: Tensor) -> Tensor:
        """Mean of z_0: the state (x, 0, …), ``(B, k, *D)``, for data x ``(B, *D)``.

        Raises a TypeError if ``x`` is not a floating-point tensor with a batch axis.
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
