"""`Distributions`: kernels, marginals and posteriors that follow from dynamics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import MatrixLike, TimeLike, as_levels, as_times
from cldsde.linear.covariance import covariance_root, joint_root, triangular_inverse
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.flow import flow_rotations
from cldsde.linear.kernel import Kernel, check_density
from cldsde.linear.posterior import Posterior, bayes
from cldsde.linear.reprs import shown
from cldsde.linear.reverse_family import reverse_family
from cldsde.renamed import warn_of_old


class Distributions:
    """The part of `cldsde.LinearSDE` that gives distributions at all times, from its dynamics."""

    def __init__(self, dynamics: Dynamics, initial_covariance: MatrixLike | None) -> None:
        self._frozen: list[tuple[Tensor, Tensor]] = []  # learnt parameters and their values
        self._dynamics = dynamics
        k = dynamics.components
        if initial_covariance is None:
            initial_covariance = torch.zeros(k, k, device="cpu", dtype=torch.float64)
        #: Lower-triangular root of the initial covariance, ``(k, k)``.
        self.initial_root = covariance_root(initial_covariance, "initial_covariance", k)

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
        """Covariance of z_0 given the data, ``(k, k)``."""
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
        is the time with κ = −5 (`kappa`), the value that `VPSDE` has at t = 1. A state drawn from
        the prior there lacks α x₀, 0.7 % of the noise for data of variance 1. Starts closer to
        t = 1 need many more steps.
        """
        return self.dynamics.regular_until

    def drift(self, t: TimeLike) -> Tensor:
        """Drift matrix F(t), ``(*t.shape, k, k)``; a ValueError if it diverges at a time."""
        return self.dynamics.drift(as_times(t, "t"))

    def diffusion(self, t: TimeLike) -> Tensor:
        """Diffusion matrix G(t), ``(*t.shape, k, r)``; a ValueError if it diverges at a time."""
        return self.dynamics.diffusion(as_times(t, "t"))

    def transition(self, s: TimeLike, t: TimeLike) -> Kernel:
        r"""Transition kernel: the distribution of z_t given z_s, for times s ≤ t that broadcast.

        .. math:: z_t \mid z_s ∼ N(Ψ(t,s)\,z_s,\ ∫_s^t Ψ(t,u) G G^⊤ Ψ(t,u)^⊤ du)

        See `Kernel` for an example.
        """
        return Kernel(*self._factors(*self._interval(s, t)))

    def transition_matrix(self, s: TimeLike, t: TimeLike) -> Tensor:
        """Transition matrix Ψ(t, s), ``(*, k, k)``: the mean of `transition`, in less time."""
        psi = self.dynamics.transition_matrix(*self._interval(s, t))
        self._check_range(psi)
        return psi

    def accumulated_noise(self, s: TimeLike, t: TimeLike) -> Tensor:
        r"""Integrated squared diffusion, :math:`∫_s^t G G^⊤`, ``(*, k, k)``."""
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
            Σ_0, ``(k, k)``; ValueError if it is not a covariance. None: the process's own, so that
            the auxiliary components are integrated out (hybrid score matching). Zeros: the
            distribution given all of z_0 (denoising score matching). The process's own plus the
            data's variance in the first entry: the true marginal of Gaussian data.
        """
        return self._marginal(as_times(t, "t"), self._root_at_start(initial_covariance))

    def kappa(self, t: TimeLike) -> Tensor:
        r"""Half the log of the signal-to-noise ratio, κ(t) = ½ log ψᵀΣ_t⁻¹ψ.

        ψ = Ψ(t,0)e₀ and Σ_t are the mean and the covariance of z_t given the data. For one
        component κ = log α/σ with the signal α and the noise level σ. κ decreases with t, to −∞ at
        t = 1 if nothing of the data is left there. Networks of this package get κ as their time.

        Parameters
        ----------
        t
            Times in (0, 1]; ValueError if the distribution at a time has no density.
        """
        times = as_times(t, "t")
        kernel = self._marginal(times, self.initial_root)
        check_density(kernel.root, times, "t")
        signal = triangular_inverse(kernel.root) @ kernel.mean[..., :1]
        return 0.5 * signal.square().sum((-2, -1)).log()

    def log_snr(self, t: TimeLike) -> Tensor:
        """Old name of `kappa`, which warns."""
        warn_of_old("log_snr", "kappa")
        return self.kappa(t)

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

        Φ_λ is the transition matrix from t to s of :math:`F + \tfrac{1+λ^2}2 G G^⊤ Σ^{-1}`. See
        `Posterior` for an example.

        Parameters
        ----------
        s, t
            Times in [0, 1] that broadcast, t > 0. If λ ≠ 1 and z_0 has no density given the data,
            s > 0 as well. ValueError if z_t given z_0, or for λ ≠ 1 z_s given z_0, has no density.
        stochasticity
            λ ≥ 0, a number or a tensor that broadcasts with the times. 1: the Bayesian posterior
            p(z_s | z_t, z_0), the step of ancestral sampling. 0: the probability flow of a single
            data point, the step of DDIM. Every λ maps the distribution of z_t given z_0 to the
            distribution of z_s given z_0.
        initial_covariance
            Σ_0 as in `marginal`. None conditions on the data, zeros on all of z_0. With the data's
            variance in its first entry the result is the exact reverse transition p(z_s | z_t) of
            Gaussian data.

        References
        ----------
        J. Song, C. Meng and S. Ermon, *Denoising diffusion implicit models*, 2021, eq. 7.
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
        r"""Covariance root R_t along the probability flow of a data point (gDDIM), ``(*, k, k)``.

        .. math:: R' = (F + \tfrac12 G G^⊤ Σ_t^{-1}) R, \qquad R_t R_t^⊤ = Σ_t

        On the probability-flow ODE of a single data point z_t = Ψ(t,0) z_0 + R_t c with a constant
        c. Noise predicted in these coordinates therefore varies slowly (Zhang, Tao and Chen 2023,
        eq. 17). With the triangular root c would rotate. R is determined up to a constant rotation
        from the right; here R_T is triangular.

        Parameters
        ----------
        t
            Times in (0, 1]; ValueError if the distribution at a time has no density.
        initial_covariance
            Σ_0 as in `marginal`.
        """
        times, root = as_times(t, "t"), self._root_at_start(initial_covariance)
        triangular = self._marginal(times, root).root
        check_density(triangular, times, "t")
        end = torch.ones(1, device="cpu", dtype=torch.float64)
        stops = torch.cat([times.flatten(), end])
        rotation = flow_rotations(self.dynamics, lambda u: self._marginal(u, root).root, stops)
        rotation = rotation[:-1].reshape(triangular.shape)
        # One Newton step to the nearest rotation, which makes R Rᵀ = Σ to rounding.
        eye = torch.eye(self.components, device="cpu", dtype=torch.float64)
        rotation = 0.5 * rotation @ (3 * eye - rotation.mT @ rotation)
        return triangular @ rotation

    def _interval(self, s: TimeLike, t: TimeLike) -> tuple[Tensor, Tensor]:
        start, end = as_times(s, "s"), as_times(t, "t")
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


def frozen_parameters(compute: Callable[[], Iterable[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Leaves of autograd's graph that ``compute`` does not read anew, and their values.

    Two computations share the nodes of the graph that were made before both. Later changes of the
    leaves below these nodes do not reach the results.
    """
    first = _nodes(x.grad_fn for x in compute())
    if not first:
        return []
    second = _nodes(x.grad_fn for x in compute())
    frozen = _nodes(node for node in first & second if not hasattr(node, "variable"))
    leaves = [node.variable for node in frozen if hasattr(node, "variable")]
    return [(leaf, leaf.detach().clone()) for leaf in leaves]


def _nodes(ends: Iterable[Any]) -> set[Any]:
    """Nodes of autograd's graph at and below ``ends``."""
    found: set[Any] = set()
    left = [*ends]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [below for below, _ in node.next_functions]
    return found
