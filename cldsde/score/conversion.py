r"""Conversions between predictions of a network: score, noise, data, velocity and flow.

Let z_t | x_0 ~ N(ψ x_0, Σ_t) and x̂₀ = E[x_0 | z_t]. Order the components so that the driven
components d come last, and whiten with the root L of the reordered covariance,

.. math:: w = L^{-1} z, \qquad c = L^{-1} ψ, \qquad n = −L_{dd}^⊤ s_d.

n is the best prediction of the noise in z_t, and w_d − n = c_d x̂₀. So the driven score alone
determines x̂₀ by least squares, and x̂₀ determines the full score s = −L^{−⊤}(w − c x̂₀).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, as_times, one_of
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import Kernel, check_density, check_kernel_shape
from cldsde.linear.sde import LinearSDE, check_process

Prediction = Literal["score", "noise", "data", "full_score", "velocity", "flow"]
"""``"score"``: of the driven components. ``"noise"``: n = −L_ddᵀ s_d. ``"data"``: E[x_0 | z_t].
``"full_score"``: of all components. For processes of one component, x_t = α x_0 + σ n, also
``"velocity"``: E[α n − σ x_0 | x_t] (Salimans and Ho 2022), and ``"flow"``: E[α′ x_0 + σ′ n | x_t],
the velocity of the probability flow, which flow matching learns."""

TRAINED: tuple[Prediction, ...] = ("score", "noise", "data", "velocity", "flow")
"""Predictions of networks."""

MEASURED: tuple[Prediction, ...] = ("noise", "velocity", "flow")
"""Predictions whose squared error is a loss. The loss of the flow is flow matching."""

Conditioning = Literal["data", "all"]
"""Condition on the data x_0 (hybrid score matching) or on all of z_0 (denoising score matching)."""

# Above this ratio of the noise in x̂₀ to the noise of the best estimate, the driven rows do not
# determine x_0. Critically damped processes stay below 4. Underdamped ones pass through infinity.
_LARGEST_AMPLIFICATION = 20.0


class Form(NamedTuple):
    """A prediction as the combination a x_0 + B n of the data and the noise n = w − c x_0."""

    data: Tensor  # a, (*, 1, 1); 0 for a score or noise
    noise: Tensor  # B, (*, out, rows), of the last rows of n
    inverse: Tensor | None = None  # B⁻¹ of a score or noise


@dataclass(frozen=True, eq=False)
class WhitenedKernel:
    """The distribution of z_t given the start, whitened with the driven components last."""

    root: Tensor  # L, in the order (rest, driven), (*, k, k)
    inverse: Tensor  # L⁻¹ with columns in the components' own order: w = inverse z, (*, k, k)
    psi: Tensor  # ψ = Ψ(t, 0) e₀, in the components' own order, (*, k, 1)
    signal: Tensor  # c = L⁻¹ψ, (*, k, 1)
    times: Tensor  # (*), float64 on the CPU
    driven: tuple[int, ...]
    rates: Callable[[], tuple[Tensor, Tensor]]  # α′, σ′ of x_t = α x_0 + σ n, (*), for k = 1
    end: float = 1.0  # latest time at which something of x_0 is left in the state

    def driven_root(self) -> Tensor:
        """L_dd, the root of the driven components' covariance given all others, ``(*, d, d)``."""
        d = len(self.driven)
        return self.root[..., -d:, -d:]

    def information(self) -> Tensor:
        """ψᵀΣ⁻¹ψ, the generalised signal-to-noise ratio, ``(*)``."""
        return self.signal.square().sum((-2, -1))

    def estimate(self) -> Tensor:
        """Row of û = ψᵀΣ⁻¹z / ψᵀΣ⁻¹ψ, the best unbiased estimate of x_0, ``(*, 1, k)``."""
        return self.signal.mT @ self.inverse / self.information()[..., None, None]

    def form(self, kind: Prediction, noise_root: Tensor | None = None) -> Form:
        """A prediction as a combination of data and noise: the table of all kinds.

        ``"noise"`` means −Kᵀ s_d with the root K = ``noise_root``, ``(*, d, d)``; None: L_dd.
        """
        k, d, root = self.root.shape[-1], len(self.driven), self.driven_root()
        nothing = torch.zeros_like(self.signal.mT)
        if kind == "score":
            return Form(nothing[..., :1], -triangular_inverse(root).mT, -root.mT)
        if kind == "full_score":
            order = torch.tensor(component_order(k, self.driven), device="cpu")
            return Form(nothing[..., :1], -self.inverse.mT, -self.root.mT[..., order.argsort()])
        if kind == "noise":
            if noise_root is None:
                return Form(nothing[..., :1], self._eye(d), self._eye(d))
            noise = triangular_inverse(root) @ noise_root
            return Form(nothing[..., :1], noise.mT, (triangular_inverse(noise_root) @ root).mT)
        if kind == "data":
            return Form(self._eye(1), nothing)
        if k != 1:
            raise ValueError(
                f"a prediction of the {kind} needs a process of one component; this process has "
                f"{k}. Use 'noise' or 'data'"
            )
        parts = (-root, self.psi) if kind == "velocity" else self.rates()
        data, noise = (part.reshape(root.shape) for part in parts)
        return Form(data, noise)

    def convert(
        self, source: Prediction, target: Prediction, noise_root: Tensor | None = None
    ) -> Conversion:
        """Solve state and source for data and noise, of which the target is a combination."""
        given, wanted = (self.form(kind, noise_root) for kind in (source, target))
        inverse, c = self.inverse, self.signal
        k, out = inverse.shape[-1], given.noise.shape[-2]
        # Coefficients of the state and of the prediction, side by side: (*, rows, k + out).
        value = torch.cat([c.new_zeros(*c.shape[:-2], out, k), self._eye(out)], dim=-1)
        if source == target:
            return Conversion(value[..., :k], value[..., k:], source, target)
        state = torch.cat([inverse, c.new_zeros(*c.shape[:-1], out)], dim=-1)
        if target == "full_score" and k > len(self.driven):
            self._check_resolved()
        rows = wanted.noise.shape[-1]
        if given.inverse is None:
            # Cramer's rule for w = c x_0 + n and a x_0 + B n, because B = 0 or k = 1.
            scale = 1 / (given.noise @ c - given.data)
            data = scale * (given.noise @ state - value)
            noise = scale * (c @ value - given.data * state)
        else:
            noise = given.inverse @ value
            known = noise.shape[-2]
            if wanted.inverse is None or rows > known:
                # Least squares for x_0 in the rows of w = c x_0 + n whose noise is known.
                part = c[..., -known:, :]
                # One rounded gain for both coefficients, whose terms may cancel.
                gain = part.mT / self._power(part)
                data = gain @ (state[..., -known:, :] - noise)
                rest = state[..., :-known, :] - c[..., :-known, :] @ data
                noise = torch.cat([rest, noise], dim=-2)
        found = wanted.noise @ noise[..., -rows:, :]
        if wanted.inverse is None:
            found = found + wanted.data * data
        return Conversion(found[..., :k], found[..., k:], source, target)

    def _power(self, part: Tensor) -> Tensor:
        """Contribution of rows of c to ψᵀΣ⁻¹ψ; raise ValueError if they do not determine x_0."""
        power = self.information()
        if not bool((power > 0).all()):
            advice = f"take t ≤ {self.end:.15g}" if self.end < 1 else "end earlier or lower beta"
            raise ValueError(
                "t must be earlier: nothing of x_0 is left in the state at "
                f"t = {float(self.times.detach().max()):g}, so the score does not determine it; "
                f"{advice}"
            )
        found = part.square().sum((-2, -1))
        worst, where = self._largest((power / found).sqrt())
        if not worst <= _LARGEST_AMPLIFICATION:
            raise ValueError(
                f"the score of the driven components {self.driven} does not determine x_0 "
                f"at t = {where:g}: it would amplify noise {worst:.3g} times. Underdamped and far "
                "overdamped processes have such times; use critical damping, or a solver that "
                "needs no x_0, such as SSCS or StochasticHeun"
            )
        return found[..., None, None]

    def _check_resolved(self) -> None:
        """Raise ValueError if rounding of x_0 leaves no digit of the full score."""
        loss, where = self._largest(torch.finfo(torch.float64).eps * self.information().sqrt())
        if loss > 1e-4:
            raise ValueError(
                f"t must be later for the full score: at t = {where:g} the state determines x_0 so "
                "exactly that float64 holds no digit of it"
            )

    def _largest(self, values: Tensor) -> tuple[float, float]:
        """Largest of the values at the times, or 0 if there are none, and its time."""
        if values.numel() == 0:
            return 0.0, math.nan
        index = values.detach().flatten().argmax()
        return float(values.flatten()[index]), float(self.times.flatten()[index])

    def _eye(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64, device="cpu").expand(*self.times.shape, n, n)


def conditional_kernel(sde: LinearSDE, t: Tensor, conditioning: Conditioning) -> Kernel:
    """Kernel of z_t given the data or all of z_0."""
    one_of(conditioning, Conditioning, "conditioning")
    return sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)


def component_order(k: int, driven: tuple[int, ...]) -> list[int]:
    """All components, the driven ones last."""
    return [i for i in range(k) if i not in driven] + list(driven)


def whiten(sde: LinearSDE, kernel: Kernel, t: Tensor) -> WhitenedKernel:
    """Whiten the distribution of z_t given the start; raise ValueError if it has no density."""
    root, psi = kernel.root, kernel.mean[..., :1]
    check_density(root, t, "t")
    order = component_order(sde.components, sde.driven)
    ordered = root if order == sorted(order) else joint_root(root[..., order, :])
    inverse = triangular_inverse(ordered)[..., :, torch.tensor(order, device="cpu").argsort()]
    rates = partial(sde.dynamics.rates, t, sde.initial_covariance[0, 0])
    parts = (ordered, inverse, psi, inverse @ psi)
    return WhitenedKernel(*parts, t, sde.driven, rates, sde.regular_until)


@dataclass(frozen=True, eq=False)
class Conversion:
    """Conversion of one prediction to another, linear in the state; `Conversion.at` makes it.

    The sizes ``in`` and ``out`` of predictions are 1 for data, velocity and flow, the number of
    driven components for score and noise, and k for the full score.

    Examples
    --------
    x̂₀ from the velocity's score alone:

    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> sde, t = CLD(), 0.3
    >>> data = GaussianMixture([0.5, 0.5], [[-1.0], [2.0]], [[[0.1]], [[0.0]]])
    >>> z = sde.prior.sample((4, 1), dtype=torch.float64)
    >>> x0 = Conversion.at(sde, t, "score", "data")(z, data.score(sde)(z, t))
    >>> bool(torch.allclose(x0, data.posterior_mean(sde, z, t)))
    True
    """

    state: Tensor  #: Coefficients of the state, ``(*, out, k)`` float64 on the CPU.
    value: Tensor  #: Coefficients of the prediction, ``(*, out, in)`` float64 on the CPU.
    source: Prediction
    target: Prediction

    @classmethod
    def at(
        cls,
        sde: LinearSDE,
        t: TimeLike,
        source: Prediction,
        target: Prediction,
        *,
        conditioning: Conditioning = "data",
    ) -> Conversion:
        """Compute the coefficients at times t > 0.

        Parameters
        ----------
        sde
            The forward process.
        t
            Times of any shape in (0, 1].
        source, target
            ``"score"``, ``"noise"``, ``"data"``, ``"full_score"``, ``"velocity"`` or ``"flow"``.
            The full score amplifies rounding errors: its relative error is about √(ψᵀΣ⁻¹ψ) times
            the rounding error, which is large for third-order processes at small times.
        conditioning
            Meaning of ``"noise"``: the noise of z_t given the data (hybrid score matching), or
            given all of z_0 (denoising score matching).

        Raises
        ------
        TypeError
            If ``sde`` is not a `LinearSDE`, or a time is not a number.
        ValueError
            In any of these cases:

            - The distribution given the data has no density at some time.
            - Source or target is a velocity or a flow, and the process has several components.
            - The target is the data or the flow, and nothing of x_0 is left in the state, as for
              `RectifiedFlow` at t = 1.
            - The target is the data, and the driven score does not determine it, as at and near
              isolated times of an underdamped process.
            - The target is the full score, and float64 has too few digits for it.
        """
        check_process(sde)
        times = as_times(t, "t")
        one_of(source, Prediction, "source")
        one_of(target, Prediction, "target")
        one_of(conditioning, Conditioning, "conditioning")
        whitened = whiten(sde, sde.marginal(times), times)
        noise_root = None
        if conditioning == "all" and "noise" in (source, target):
            given_all = conditional_kernel(sde, times, conditioning)
            noise_root = whiten(sde, given_all, times).driven_root()
        return whitened.convert(source, target, noise_root)

    def __call__(self, z: Tensor, value: Tensor) -> Tensor:
        """Convert a prediction at states ``(B, k, *D)`` from ``(B, in, *D)`` to ``(B, out, *D)``.

        Data have the shape ``(B, *D)``. Other shapes raise a ValueError.
        """
        check_kernel_shape(self.state, z=z)
        axes = () if self.source == "data" else (self.value.shape[-1],)
        expected = (len(z), *axes, *z.shape[2:])
        if value.shape != expected:
            raise ValueError(
                f"value must be a prediction of the {self.source} of shape {tuple(expected)} for "
                f"these states; got {tuple(value.shape)}"
            )
        rows = value.unsqueeze(1) if self.source == "data" else value
        out = apply_blocks(self.state, z) + apply_blocks(self.value, rows)
        return out[:, 0] if self.target == "data" else out
